"""A plan survives the disk unchanged, and nothing but a whole, known plan for this model is applied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.errors import PlanError, SlimformerWarning
from slimformer.plans.plan import FILE, fingerprint
from tiny_models import tiny_model

DROP = LayerDrop(attention=[1], block=[2])


def test_a_saved_plan_gives_the_same_logits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 13)[None]
    with slimformer.patched(model, DROP), torch.no_grad():
        expected = model(ids).logits
    Plan([DROP], fingerprint(model), {"seed": 3}, {"kl": 0.1}).save_pretrained(tmp_path / "new" / "plan")
    plan = Plan.from_pretrained(tmp_path / "new" / "plan")
    assert (plan.provenance, plan.measured) == ({"seed": 3}, {"kl": 0.1})
    assert plan.to_dict()["per_layer_config"] == {
        "1": {"skip": ["self_attn"]},
        "2": {"skip": ["self_attn", "mlp"]},
    }
    with slimformer.patched(model, plan), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_a_printed_plan_says_its_methods_and_its_model_in_a_line() -> None:
    provenance = {"similarity": {"attention": [0.123456] * 99}}
    shown = str(Plan([DROP], fingerprint(tiny_model("llama")), provenance, {"speed": {"prefill_speedup": 2}}))
    assert "LayerDrop(attention=(1,)" in shown
    assert "'model_type': 'llama'" in shown
    assert "0.123456" not in shown
    assert "prefill_speedup" not in shown


def test_a_plan_for_another_model_is_refused_with_the_difference() -> None:
    plan = Plan([DROP], fingerprint(tiny_model("llama", num_hidden_layers=6)))
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="its layers is 6, and this model's is 4"):
        slimformer.patch(model, plan)
    assert slimformer.status(model) == {}


@pytest.mark.parametrize(("change", "message"), [
    (lambda text: text[: len(text) // 2], "damaged"),
    (lambda text: "[]", "not a plan"),
    (lambda text: text.replace('"format": 1', '"format": 2'), "Upgrade"),
    (lambda text: text.replace('"LayerDrop"', '"Unheard"'), "'Unheard'"),
    (lambda text: json.dumps({**json.loads(text), "methods": [3]}), "cannot be read"),
])  # fmt: skip
def test_a_damaged_or_newer_file_is_refused(tmp_path: Path, change: object, message: str) -> None:
    Plan([DROP]).save_pretrained(tmp_path)
    file = tmp_path / FILE
    file.write_text(change(file.read_text()))
    with pytest.raises(PlanError, match=message):
        Plan.from_pretrained(tmp_path)


def test_newer_fields_warn_and_pickles_are_refused(tmp_path: Path) -> None:
    Plan([DROP]).save_pretrained(tmp_path)
    file = tmp_path / FILE
    file.write_text(file.read_text().replace('"method": "LayerDrop",', '"method": "LayerDrop", "shiny": 1,'))
    with pytest.warns(SlimformerWarning, match="shiny"):
        assert Plan.from_pretrained(file).methods == (DROP,)
    with pytest.raises(PlanError, match="pickle"):
        Plan.from_pretrained(tmp_path / "plan.bin")
    with pytest.raises(PlanError, match="No plan at"):
        Plan.from_pretrained(tmp_path / "absent")


def test_a_failed_save_keeps_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Plan([DROP]).save_pretrained(tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PlanError, match="No space left"):
        Plan([LayerDrop(mlp=[0])]).save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).methods == (DROP,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", FILE]

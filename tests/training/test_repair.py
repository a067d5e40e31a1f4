"""Repair: the dense model teaches its slimmed self, and nothing of the user's checkpoint changes."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from tests.training.test_training import TEXTS
from torch import Tensor
from transformers import PreTrainedModel

import slimformer
from real_models import minilm
from slimformer import EarlyExit, LayerDrop, MixtureOfDepths, Plan, TempScale, TokenElimination
from slimformer.calibration.drops.replay import Fitted, saved_weights
from slimformer.errors import CalibrationError, DataError, PlanError
from slimformer.evaluation.panel import Judgement, Kept
from slimformer.methods.weight_delta import WeightDelta
from slimformer.training.attempts.outcome import Judged, Outcome
from slimformer.training.loop import TrainingSettings
from slimformer.training.rounds import in_rounds
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

SHORT = TrainingSettings(steps=6, rows=2, learning_rate=5e-3)
LONG = TrainingSettings(steps=40, rows=4, learning_rate=3e-3)
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(3, 60, (2, 70), generator=GENERATOR)


def strong(name: str, **overrides: object) -> PreTrainedModel:
    """Weights large enough that every sublayer matters."""
    return tiny_model(
        name,
        **{"initializer_range": 0.3, "max_position_embeddings": 256, "num_hidden_layers": 5, **overrides},
    )


def filters(*sublayers: tuple[Any, int], taps: int = 2, hidden: int = 32) -> LayerDrop:
    """A drop whose filters are small random ones."""
    fitted = {
        (kind, layer): Fitted(
            torch.randn(hidden, generator=GENERATOR) / 100,
            torch.randn(hidden, hidden * (taps if kind == "attention" else 1), generator=GENERATOR) / 100,
            taps,
            True,
        )
        for kind, layer in sublayers
    }
    lists = {kind: [layer for k, layer in sublayers if k == kind] for kind in ("attention", "mlp")}
    return LayerDrop(**lists, replace="filter", taps=taps, weights=saved_weights(fitted))


def routed(**layers: list[int]) -> MixtureOfDepths:
    weights = {}
    for kind, of in layers.items():
        for layer in of:
            weights[f"{kind}.{layer}.weight"] = torch.randn(32, generator=GENERATOR)
            weights[f"{kind}.{layer}.bias"] = torch.zeros(1)
    return MixtureOfDepths(**layers, weights=weights)


def repaired(model: Any, plan: Plan, settings: TrainingSettings = SHORT, **options: Any) -> Plan:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 256
    given: dict[str, Any] = {
        "data": TEXTS,
        "length": 48,
        "every": 10,
        "rank": 4,
        "minutes": None,
        "panel": None,
    }
    given |= options
    return slimformer.repair(model, plan, tokenizer, settings=settings, **given)


def output(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids)[0]
    return found


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "mixtral", "bert", "distilbert", "mpnet", "modernbert"],
)
def test_the_model_is_left_bit_for_bit_and_the_plan_gives_the_same_outputs_anywhere(
    name: str, tmp_path: Path
) -> None:
    model = tiny_model(name)
    keys, state, dense = set(vars(model)), copy.deepcopy(model.state_dict()), output(model)
    plan = repaired(model, Plan([LayerDrop(attention=[1], mlp=[2])]))
    assert isinstance(plan.methods[-1], WeightDelta)
    assert set(vars(model)) == keys
    assert all(p.requires_grad for p in model.parameters())
    slim = output(slimformer.patch(model, plan))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert list(model.state_dict()) == list(state)
    slimformer.unpatch(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(output(model), dense)
    plan.save_pretrained(tmp_path)
    fresh = slimformer.patch(tiny_model(name), Plan.from_pretrained(tmp_path))
    assert torch.equal(output(fresh), slim)


@pytest.mark.parametrize(
    ("name", "methods", "options"),
    [
        ("llama", [filters(("attention", 1), ("attention", 3), ("mlp", 2))], {}),
        ("llama", [filters(("attention", 1), ("attention", 3))], {"what": ["added"]}),
        ("llama", [EarlyExit(3)], {"near": None}),
        ("llama", [routed(attention=[1, 2], mlp=[3])], {}),
        ("llama", [LayerDrop(attention=[1]), routed(mlp=[2]), EarlyExit(4)], {"hidden": 0.5}),
        ("llama", [TempScale(tau=0.5)], {}),
        ("qwen3", [LayerDrop(block=[2]), TempScale(tau=0.9)], {"what": ["lora"]}),
        ("bert", [EarlyExit(3)], {"near": None}),
        (
            "bert",
            [EarlyExit(3, {"head.weight": torch.zeros(32, 32), "head.bias": torch.zeros(32)})],
            {"what": ["added"]},
        ),
        ("modernbert", [LayerDrop(attention=[1, 3])], {"what": ["norms", "lora"]}),
    ],
)
def test_every_kind_of_plan_comes_nearer_to_dense(
    name: str, methods: list[Any], options: dict[str, Any]
) -> None:
    plan = repaired(strong(name), Plan(methods), LONG, **options)
    measured = plan.measured["repair"]
    assert measured["divergence_after"] < measured["divergence_before"]
    if any(isinstance(method, MixtureOfDepths) for method in methods):
        # Thresholds were set anew behind the last measurement.
        return
    best = plan.provenance["repair"][0]["best"]
    # What was trained beside the model is what stands in the plan, up to the rounding of its factors.
    assert measured["divergence_after"] == pytest.approx(
        plan.provenance["repair"][0]["held_out"][str(best)], rel=2e-2
    )


def test_rounds_drop_more_and_more_and_end_with_the_plan() -> None:
    steps = [{"kind": "attention", "layer": layer, "divergence": 0.1} for layer in (3, 1, 2)]
    plan = Plan([filters(("attention", 1), ("attention", 2), ("attention", 3))], provenance={"steps": steps})
    first, second = in_rounds(plan, 2)
    assert first.dropped("attention") == (1, 3)
    assert set(first.tensors()) == {f"0.attention.{n}.{part}" for n in (1, 3) for part in ("weight", "bias")}
    assert second.to_dict() == plan.to_dict()
    with pytest.raises(CalibrationError, match="from 1 to the number of removals, 3, got 4"):
        in_rounds(plan, 4)
    done = repaired(strong("llama"), plan, LONG, rounds=3)
    curves = done.provenance["repair"]
    assert [curve["dropped"] for curve in curves] == [1, 2, 3]
    assert done.dropped("attention") == (1, 2, 3)
    assert [type(method) for method in done.methods] == [LayerDrop, WeightDelta]
    # Three adapters of rank 4, one behind the other.
    assert done.methods[1].tensors()["1.mlp.up_proj.weight.left"].shape == (48, 12)
    assert done.measured["repair"]["divergence_after"] < curves[-1]["held_out"]["0"]


def test_a_repaired_plan_can_be_repaired_further() -> None:
    model = strong("llama")
    once = repaired(model, Plan([LayerDrop(attention=[1, 3])]), LONG)
    twice = repaired(model, once, LONG)
    assert [type(method) for method in twice.methods] == [LayerDrop, WeightDelta]
    assert len(twice.provenance["repair"]) == 2
    assert twice.measured["repair"]["divergence_after"] <= once.measured["repair"]["divergence_after"]
    slim = output(slimformer.patch(model, once))
    assert not torch.equal(output(slimformer.patch(model, twice)), slim)
    assert torch.equal(output(slimformer.patch(model, once)), slim)


def test_a_sentence_transformer_is_repaired_with_its_own_pooling(tmp_path: Path) -> None:
    strong("bert").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    transformer = Transformer(str(tmp_path), max_seq_length=48)
    model = SentenceTransformer(
        modules=[transformer, Pooling(32, pooling_mode="cls"), Normalize()], device="cpu"
    )
    dense = model.encode(TEXTS[:4])
    plan = repaired(model, Plan([LayerDrop(block=[2])]), LONG)
    assert (model.encode(TEXTS[:4]) == dense).all()
    after = (slimformer.patch(model, plan).encode(TEXTS[:4]) * dense).sum(1)
    before = (slimformer.patch(model, LayerDrop(block=[2])).encode(TEXTS[:4]) * dense).sum(1)
    assert after.mean() > before.mean()


def test_mixed_precision_and_a_bfloat16_model() -> None:
    plan = Plan([filters(("attention", 1), ("mlp", 2))])
    settings = TrainingSettings(steps=20, rows=4, learning_rate=3e-3, precision="bf16")
    for model in (strong("llama"), strong("llama").bfloat16()):
        found = repaired(model, plan, settings).measured["repair"]
        assert found["divergence_after"] < found["divergence_before"]


def test_a_repair_that_wins_nothing_gives_the_plan_as_it_was_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = Plan([LayerDrop(attention=[1])], measured={"quality": {"divergence": 0.5}})
    idle = TrainingSettings(steps=2, rows=2, learning_rate=1e-9)
    found = repaired(strong("llama"), plan, idle)
    assert found.methods == plan.methods
    assert found.measured["quality"] == {"divergence": 0.5}
    said = found.measured["repair"]
    assert said["won"] is False
    assert said["divergence_after"] == said["divergence_before"]
    assert "learning rates tried: 1e-09" in said["why"]
    assert "Repair won nothing" in caplog.text


def test_a_rate_that_is_too_high_is_lowered_and_wins() -> None:
    wild = TrainingSettings(steps=20, rows=4, learning_rate=30.0, warmup=0.0)
    found = repaired(strong("llama"), Plan([LayerDrop(attention=[1, 3])]), wild, every=5)
    (curve,) = found.provenance["repair"]
    assert found.measured["repair"]["won"]
    assert curve["failed"][0]["learning_rate"] == 30.0
    assert curve["learning_rate"] < 30.0


def test_without_data_and_rate_the_model_writes_and_a_range_test_decides(tmp_path: Path) -> None:
    model, plan = strong("llama"), Plan([LayerDrop(attention=[1, 3])])
    settings = TrainingSettings(steps=30, rows=4)
    options: dict[str, Any] = {"data": None, "panel": "quick", "cache": tmp_path, "minutes": 5.0}
    found = repaired(model, plan, settings, **options)
    measured = found.measured["repair"]
    assert measured["won"]
    assert list(measured["sources"]) == ["own-words", "built-in", "copying"]
    assert all(part["after"] < part["before"] for part in measured["sources"].values())
    (curve,) = found.provenance["repair"]
    tested = curve["range_test"]
    assert tested["held_out"][tested["rates"].index(min(tested["rates"]))] < tested["held_out_before"]
    assert curve["learning_rate"] < max(tested["rates"])
    # Every capability before and after, on prompts and texts that were not trained on.
    before, after = measured["panel_before"]["capabilities"], found.measured["panel"]["capabilities"]
    assert before.keys() == after.keys() >= {"text", "own words"}
    assert after["text"]["kept"] > before["text"]["kept"]
    assert list(tmp_path.glob("written-*.json"))


def test_a_plan_that_loses_elsewhere_has_won_nothing() -> None:
    """Trained on one text over and over, it comes nearer to dense there and nowhere else."""
    before, after = ([0.4, 0.6], ["a", "b"]), [0.2, 0.3]
    kept = [Kept("own words", part, 0.01, 8) for part in (0.9, 0.5)]
    judged = Judged(*(Judgement([one]) for one in kept))
    outcome = Outcome.of(*before[:1], after, before[1], [{"learning_rate": 1e-3, "losses": []}], judged)
    assert not outcome.won
    assert "the panel's score falls from 0.900 to 0.500" in outcome.why
    assert Outcome.of(*before[:1], after, before[1], [{"learning_rate": 1e-3, "losses": []}], Judged()).won


def test_plans_and_arguments_that_leave_nothing_to_repair_are_refused() -> None:
    model = strong("llama")
    drop = Plan([LayerDrop(attention=[1])])
    with pytest.raises(CalibrationError, match="nothing to train of added"):
        repaired(model, drop, what=["added"])
    with pytest.raises(CalibrationError, match="give a greater length"):
        repaired(model, Plan([TokenElimination({2: 0.5})]))
    everything = MixtureOfDepths.keeping_everything(32, mlp=[1])
    with pytest.raises(CalibrationError, match="nothing to repair"):
        repaired(model, Plan([everything]))
    with pytest.raises(CalibrationError, match="what takes some of added, norms, lora"):
        repaired(model, drop, what=["weights"])
    for name, value in (("rank", 0), ("near", -1), ("hidden", -1.0), ("rounds", 2), ("patience", 0)):
        with pytest.raises(CalibrationError, match=name):
            repaired(model, drop, **{name: value})
    for given in ({"hidden": 1.0}, {"gradient_checkpointing": True}):
        with pytest.raises(CalibrationError, match="lets tokens leave"):
            repaired(model, Plan([TokenElimination({2: 0.5}, least=16, window=4)]), **given)
    with pytest.raises(CalibrationError, match="minutes must be a number above 0"):
        repaired(model, drop, minutes=0)
    with pytest.raises(PlanError, match="5 layers"):
        repaired(model, Plan([LayerDrop(attention=[9])]))
    with pytest.raises(DataError, match="Give more text"):
        repaired(model, drop, data=["short"])
    with pytest.raises(DataError, match="Give more texts"):
        repaired(strong("bert"), drop, data=["short"], hold_out=False)
    with slimformer.patched(model, drop), pytest.raises(CalibrationError, match="Call unpatch first"):
        repaired(model, drop)
    assert slimformer.status(model) == {}


def test_a_quantised_base_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = strong("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(CalibrationError, match="is quantised"):
        repaired(model, Plan([LayerDrop(attention=[1])]))


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model, plan = strong("llama"), Plan([LayerDrop(attention=[1])])
    with pytest.raises(CalibrationError, match=r"slimformer\[training\]"):
        repaired(model, plan)
    assert repaired(model, plan, LONG, what=["norms"]).methods[-1].parameters


def test_minilm_without_a_layer_comes_nearer_to_itself_and_is_left_bit_for_bit() -> None:
    model = SentenceTransformer(str(minilm()), device="cpu")
    texts = ["A man plays a guitar.", "Nobody knows why the bridge fell.", "Prices rose again in May."]
    dense = model.encode(texts)
    plan = slimformer.repair(
        model,
        Plan([LayerDrop(block=[4])]),
        near=None,
        length=24,
        every=10,
        minutes=None,
        settings=TrainingSettings(steps=10, rows=8, learning_rate=1e-3),
    )
    assert (model.encode(texts) == dense).all()
    measured = plan.measured["repair"]
    assert measured["divergence_after"] < 0.8 * measured["divergence_before"]

"""Drafts whose steps are replayed, and steps that check several tokens at once, give what the model gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import slimformer
from slimformer import EarlyExit, LayerDrop, Plan, SelfSpeculation, TempScale
from slimformer.changes.running_calls import PATCH
from slimformer.decoding import capture
from slimformer.methods import RopeScaling, SelfExtend, WeightDelta
from slimformer.methods.speculation.pace import Pace
from tiny_models import tiny_model

NEW = 40
DRAFT = LayerDrop(block=[2])


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU too, and whether drafts pay or not: on a tiny model nothing does."""
    monkeypatch.setattr(capture, "_CAPTURES", {"cpu": lambda: True})
    monkeypatch.setattr(Pace, "_judge", lambda self, step: None)
    monkeypatch.setattr(Pace, "goes_on", lambda self, chance: chance > 0.05)
    monkeypatch.setattr(Pace, "copies", lambda self: 4)


def prompt(tokens: int = 12) -> Tensor:
    return torch.randint(3, 64, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def generated(model: Any, ids: Tensor, padded: int = 0, **options: Any) -> Tensor:
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    mask = torch.ones_like(ids)
    mask[:, :padded] = 0
    found: Tensor = model.generate(ids, attention_mask=mask, **given)
    return found


def reports(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = next(vars(m)[PATCH] for m in model.modules() if PATCH in vars(m)).reports
    return found


def of_draft(model: Any) -> Any:
    """The steps of the model's draft."""
    return reports(vars(model)["generate"].call.__self__.had_generate.call.draft.model)["steps"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_greedy_tokens_are_those_of_the_model_alone(name: str) -> None:
    model = tiny_model(name, initializer_range=0.1)
    given = (prompt(1), 0), (prompt(12), 3), (prompt(30), 0)
    expected = [generated(model, *each) for each in given]
    slimformer.patch(model, SelfSpeculation(DRAFT))
    for _ in range(2):
        assert all(map(torch.equal, [generated(model, *each) for each in given], expected))
    found = reports(model)
    assert found["drafts"].drafted > 20
    # Both are replayed, the model's for several numbers of tokens.
    assert found["steps"].steps > 40
    assert found["steps"].captured > 1


@pytest.mark.parametrize(
    "draft",
    [LayerDrop(attention=[1]), LayerDrop(mlp=[1]), EarlyExit(3), Plan([DRAFT, TempScale(0.9)]),
     Plan([DRAFT, WeightDelta({"3.mlp.down_proj.weight.added": torch.full((32, 48), 1e-3)})])],
    ids=["attention", "mlp", "exit", "temperature", "repaired"],
)  # fmt: skip
def test_every_kind_of_draft_leaves_the_tokens_as_they_are(draft: Any) -> None:
    model = tiny_model("llama", initializer_range=0.1)
    expected = generated(model, prompt())
    slimformer.patch(model, SelfSpeculation(draft))
    for _ in range(2):
        assert torch.equal(generated(model, prompt()), expected)
    assert reports(model)["drafts"].drafted > 5
    assert reports(model)["steps"].steps > 5


def filtered() -> LayerDrop:
    weights = torch.randn(32, 96, generator=torch.Generator().manual_seed(1)) * 0.2
    fitted = {"attention.1.weight": weights, "attention.1.bias": torch.zeros(32)}
    return LayerDrop(attention=[1], replace="filter", taps=3, weights=fitted)


@pytest.mark.parametrize(
    "beside",
    [LayerDrop(attention=[1]), filtered(), SelfExtend(8, 8, 16), RopeScaling("dynamic", 2.0, trained_length=14)],
    ids=["drop", "taps", "extend", "scaled"],
)  # fmt: skip
def test_beside_other_methods_tokens_are_those_of_the_others_alone(beside: Any) -> None:
    model = tiny_model("llama", initializer_range=0.1)
    expected = generated(slimformer.patch(model, beside), prompt())
    slimformer.patch(model, beside, SelfSpeculation(DRAFT))
    for _ in range(2):
        assert torch.equal(generated(model, prompt()), expected)
    assert reports(model)["drafts"].drafted > 5


def test_what_is_looked_up_is_checked_by_a_replayed_step() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        # What comes next depends on the last token alone, so that the text runs in a circle.
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    expected = generated(model, prompt())
    slimformer.patch(model)
    for _ in range(2):
        assert torch.equal(generated(model, prompt(), prompt_lookup_num_tokens=4), expected)
    # Of 40 tokens most came several at a time.
    assert 5 < reports(model)["steps"].steps < 60

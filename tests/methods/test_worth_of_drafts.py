"""Calls of `generate` go without drafts where those were slower, and try them again now and then."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import tiny_model

import slimformer
from slimformer import LayerDrop, SelfSpeculation
from slimformer.methods.speculation.worth import Clock, Worth


def without(worth: Worth, seconds: float) -> None:
    """A call of ten tokens without drafts."""
    assert worth.sits_out()
    clock = Clock()
    clock.tokens, clock.seconds = 10, 10 * seconds
    worth.count_without(clock)


def test_slower_drafts_are_left_out_for_ever_longer() -> None:
    worth, rests = Worth(), []
    for _ in range(9):
        assert not worth.sits_out()
        worth.count(tokens=10, seconds=2.0, rested=True)
        rests.append(worth.left)
        while worth.left:
            without(worth, 0.1)
    assert rests == [1, 2, 4, 8, 16, 32, 64, 64, 64]


def test_drafts_come_back_once_they_are_faster() -> None:
    worth = Worth()
    worth.count(tokens=10, seconds=2.0, rested=True)
    without(worth, 0.1)
    worth.count(tokens=10, seconds=0.5, rested=True)
    assert worth.left == 0
    worth.count(tokens=10, seconds=2.0, rested=False)
    assert worth.left == 1


def test_a_few_tokens_say_nothing() -> None:
    worth = Worth()
    worth.count(tokens=3, seconds=9.0, rested=True)
    assert not worth.sits_out()


def test_a_call_without_drafts_writes_the_same_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ids = torch.randint(5, 60, (1, 12), generator=torch.Generator().manual_seed(0))

    def generated() -> torch.Tensor:
        # Criteria are given by place, too.
        found: torch.Tensor = model.generate(
            ids, None, None, None, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return found

    expected = generated()
    slimformer.patch(model, SelfSpeculation(LayerDrop(block=[1])))
    with monkeypatch.context() as sitting_out:
        sitting_out.setattr(Worth, "sits_out", lambda self: True)
        assert torch.equal(generated(), expected)
        assert "they did not pay" in slimformer.status(model).generation["drafts"]
    assert torch.equal(generated(), expected)
    assert "none in the last call" not in slimformer.status(model).generation["drafts"]

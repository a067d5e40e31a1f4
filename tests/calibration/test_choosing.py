"""One `calibrate` for every method: what it takes, what it refuses, and the calls that it had before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slimformer
from slimformer import (
    EarlyExit,
    LayerDrop,
    MixtureOfDepths,
    NarrowMlp,
    SelfExtend,
    TempScale,
    TokenElimination,
)
from slimformer.choosing import options_of
from slimformer.errors import CalibrationError
from slimformer.training.loop import TrainingSettings
from slimformer.training.routing.routers import train_routers
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

TEXTS = [f"A text of number {chr(97 + i % 26)} says a little about nothing much." * 9 for i in range(40)]
# What means the same has the same name.
SHARED = {"data", "text_field", "hold_out", "progress"}


@pytest.mark.parametrize("method", [
    LayerDrop, NarrowMlp, EarlyExit, TokenElimination, TokenElimination(scorer="predictor"), TempScale, MixtureOfDepths,
], ids=str)  # fmt: skip
def test_every_method_takes_the_shared_options_and_lists_its_own(method: Any) -> None:
    options = options_of(method)
    assert set(options) >= SHARED
    assert not set(options) & {"method", "model", "tokenizer", "prompt", "max_divergence", "objective"}
    given = {"nonsense": 1, **({"schedule": {1: 0.5}} if "schedule" in options else {})}
    with pytest.raises(
        CalibrationError, match=r"nonsense does not apply to .*Its options are data, text_field"
    ):
        slimformer.calibrate(tiny_model("llama"), None, method, **given)


@pytest.mark.parametrize(("method", "options", "message"), [
    (LayerDrop, {"replace": "mean"}, r"replace is a field of the method: give LayerDrop\(replace=...\)"),
    (LayerDrop(attention=[1]), {"drop": 1}, "names its sublayers"),
    (TempScale(0.9), {}, r"TempScale\(tau=0.9\) leaves nothing to choose"),
    (TokenElimination({1: 0.5}), {}, "says already from which layers on"),
    (TokenElimination(scorer="predictor"), {}, r"needs schedule=\.\.\. as well"),
    (TokenElimination(revivable=True), {}, "threshold and revivable are not for it"),
    (MixtureOfDepths, {"kinds": ("block",)}, "kinds must be some of attention, mlp"),
    (MixtureOfDepths.keeping_everything(32, mlp=[1]), {"train": False}, "names its layers"),
    (SelfExtend, {}, "calibrate takes one of LayerDrop"),
    ("drop", {}, "calibrate takes one of LayerDrop"),
], ids=str)  # fmt: skip
def test_what_leaves_nothing_to_choose_or_does_not_apply_is_refused(
    method: Any, options: dict[str, Any], message: str
) -> None:
    model = tiny_model("llama", num_hidden_layers=6, max_position_embeddings=4096)
    with pytest.raises(CalibrationError, match=message):
        slimformer.calibrate(model, tiny_tokenizer(), method, data=TEXTS, **options)


def test_a_method_in_the_tokenizers_place_is_told_where_it_belongs() -> None:
    for method in (LayerDrop, LayerDrop(replace="mean")):
        with pytest.raises(CalibrationError, match=r"LayerDrop stands where the tokenizer belongs.*None for"):
            slimformer.calibrate(tiny_model("llama"), method, data=TEXTS, drop=1)
    with pytest.raises(CalibrationError, match="with its own tokenizer"):
        slimformer.calibrate(tiny_model("bert"), tiny_tokenizer(), EarlyExit(1), data=TEXTS)


def test_the_call_without_a_method_is_that_of_layer_drop_and_deprecated() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.warns(DeprecationWarning, match="calibrate without a method is deprecated") as warned:
        old = slimformer.calibrate(
            model, tokenizer, data=TEXTS, drop=2, max_divergence=9.0, replace="filter", taps=2
        )
    assert warned[0].filename == __file__
    new = slimformer.calibrate(
        model, tokenizer, LayerDrop(replace="filter", taps=2), data=TEXTS, drop=2, max_loss=9.0
    )
    assert old.to_dict() == new.to_dict()
    assert all(torch.equal(tensor, new.tensors()[name]) for name, tensor in old.tensors().items())


def test_routers_of_given_layers_are_trained_and_of_others_chosen_first() -> None:
    model, tokenizer = tiny_model("llama", num_hidden_layers=6), tiny_tokenizer()
    settings, short = TrainingSettings(steps=2), {"data": TEXTS, "length": 48}
    chosen = slimformer.calibrate(
        model, tokenizer, MixtureOfDepths(keep=0.6), number=1, texts=2, settings=settings, seed=3, **short
    )
    (method,) = chosen.methods
    assert (len(method.attention), method.keep) == (1, 0.6)
    assert chosen.provenance["arguments"]["seed"] == 3
    given = MixtureOfDepths.keeping_everything(32, attention=method.attention, keep=0.6)
    trained = slimformer.calibrate(model, tokenizer, given, settings=settings, seed=3, **short)
    with pytest.warns(DeprecationWarning, match="train_routers is deprecated"):
        old = train_routers(
            model, tokenizer, method=given, settings=TrainingSettings(steps=2, seed=3), **short
        )
    for plan in (trained, old):
        assert plan.measured == chosen.measured
        assert all(torch.equal(tensor, plan.tensors()[name]) for name, tensor in chosen.tensors().items())
    # An iterator is read once, whatever is done with it twice.
    again = slimformer.calibrate(
        model, tokenizer, MixtureOfDepths(keep=0.6), number=1, texts=2, settings=settings, seed=3, data=iter(TEXTS),
        length=48,
    )  # fmt: skip
    assert again.methods == chosen.methods

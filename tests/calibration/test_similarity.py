"""Similarity is the cosine of the true residual, whatever the structure calls its norms."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

import slimformer
from slimformer.calibration.drops.similarity import measure_similarity
from slimformer.errors import CalibrationError, DataError
from tiny_models import DECODERS, ENCODERS, tiny_model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_dropping_the_other_sublayer_leaves_the_measured_cosine(name: str) -> None:
    model = tiny_model(name)
    similarity = measure_similarity(model, [batch()])
    with slimformer.patched(model, slimformer.LayerDrop(mlp=[1])), torch.no_grad():
        states = model(**batch(), output_hidden_states=True).hidden_states
    real = batch()["attention_mask"].bool()
    expected = cosine_similarity(states[1], states[2], dim=-1)[real].mean().item()
    assert similarity.attention[1] == pytest.approx(expected, abs=1e-5)
    assert similarity.tokens == 26


def test_batches_add_up_and_the_model_is_left_alone() -> None:
    model = tiny_model("llama")
    once, twice = measure_similarity(model, [batch()]), measure_similarity(model, [batch(), batch()])
    assert twice.mlp == pytest.approx(once.mlp)
    assert "forward" not in vars(model.model.layers[0])
    ranked = once.most_similar(8)
    assert len(set(ranked)) == 8
    first_kind, first = ranked[0]
    assert getattr(once, first_kind)[first] == max(once.attention + once.mlp)


def test_what_cannot_be_measured_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match="at least one token"):
        measure_similarity(model, [])
    with pytest.raises(CalibrationError, match="allowed are 0 to 8"):
        measure_similarity(model, [batch()]).most_similar(9)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="mlp 2 is not a number"):
        measure_similarity(model, [batch()])
    slimformer.patch(tiny := tiny_model("llama"), slimformer.LayerDrop(mlp=[0]))
    with pytest.raises(CalibrationError, match="unpatch first"):
        measure_similarity(tiny, [batch()])

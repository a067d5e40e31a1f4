"""Thresholds set anew: routers compute the wanted part of a text whatever else a plan does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_training import TEXTS

import slimformer
from slimformer import LayerDrop, MixtureOfDepths, Plan
from slimformer.calibration.keep_ratio import meet_keep_ratio
from slimformer.methods.mixture_of_depths import router_name
from slimformer.patching import keep_ratios
from slimformer.training.loop import TrainingSettings
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

IDS = torch.randint(3, 60, (4, 64), generator=torch.Generator().manual_seed(2))
# Two texts are shorter, and their padding is not counted.
MASK = torch.ones_like(IDS)
MASK[1, 40:] = MASK[2, 10:] = 0


def routers(shared: Any, **fields: Any) -> MixtureOfDepths:
    """Random ones that keep far from what is wanted."""
    generator = torch.Generator().manual_seed(3)
    layers: dict[str, Any] = {"attention": [1, 2], "mlp": [2, 3]}
    names = {router_name(shared, kind, layer) for kind in layers for layer in layers[kind]}  # type: ignore[arg-type]
    weights = {f"{name}.weight": torch.randn(32, generator=generator) for name in sorted(names)}
    weights |= {f"{name}.bias": torch.full((1,), 2.0) for name in names}
    return MixtureOfDepths(**layers, shared=shared, weights=weights, **fields)


@pytest.mark.parametrize("shared", ["sublayer", "layer", "all"])
@pytest.mark.parametrize("keep", [0.25, 0.7, 1.0])
def test_the_wanted_part_is_computed_beside_other_methods(shared: Any, keep: float) -> None:
    model = tiny_model("llama", num_hidden_layers=5, initializer_range=0.3)
    plan = Plan([LayerDrop(mlp=[1]), routers(shared, keep=keep)])

    def run() -> None:
        with torch.no_grad():
            model(input_ids=IDS)

    met = meet_keep_ratio(model, plan, run)
    assert not slimformer.status(model)
    assert met.methods[0] == plan.methods[0]
    with slimformer.patched(model, met), torch.no_grad():
        model(input_ids=IDS)
        ratios = list(keep_ratios(model).values())
    assert len(ratios) == 4
    assert sum(ratios) / 4 == pytest.approx(keep, abs=0.01)


def test_padding_does_not_count() -> None:
    model = tiny_model("bert", num_hidden_layers=5, initializer_range=0.3)
    plan = Plan([routers("sublayer", keep=0.5)])

    def run() -> None:
        with torch.no_grad():
            model(input_ids=IDS, attention_mask=MASK)

    met = meet_keep_ratio(model, plan, run)
    # The same texts one by one, without padding, give the same part.
    total, count = 0.0, 0
    with slimformer.patched(model, met), torch.no_grad():
        for row, mask in zip(IDS, MASK, strict=True):
            length = int(mask.sum())
            model(input_ids=row[None, :length])
            total += length * sum(keep_ratios(model).values())
            count += 4 * length
    assert total / count == pytest.approx(0.5, abs=0.02)


def test_plans_without_thresholds_come_back_as_they_are() -> None:
    model = tiny_model("bert", num_hidden_layers=5)
    for plan in (Plan([LayerDrop(mlp=[1])]), Plan([routers("sublayer", keep=0.5, routing="top_k")])):
        assert meet_keep_ratio(model, plan, lambda: None).methods == plan.methods


def test_routers_that_nothing_has_trained_go_on_computing_every_token() -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    plan = Plan([MixtureOfDepths.keeping_everything(32, attention=[1, 2], keep=0.5)])

    def run() -> None:
        with torch.no_grad():
            model(input_ids=IDS)

    met = meet_keep_ratio(model, plan, run)
    with slimformer.patched(model, met):
        run()
        assert set(keep_ratios(model).values()) == {1.0}


def test_a_repair_sets_them_anew(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    model = tiny_model("llama", num_hidden_layers=5, initializer_range=0.3, max_position_embeddings=256)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 256
    plan = Plan([routers("sublayer", keep=0.5)])
    repaired = slimformer.repair(
        model,
        plan,
        tokenizer,
        data={tmp_path / "text.txt": 1.0},
        length=48,
        rank=4,
        minutes=None,
        panel=None,
        settings=TrainingSettings(steps=40, rows=4, learning_rate=3e-3),
    )
    before, after = (p.methods[0].tensors() for p in (plan, repaired))
    assert all(torch.equal(before[n], after[n]) for n in before if n.endswith("weight"))
    shifts = torch.cat([after[n] - before[n] for n in before if n.endswith("bias")])
    # One threshold for all.
    assert float(shifts.std()) == pytest.approx(0.0, abs=1e-6)
    assert abs(float(shifts[0])) > 0.1

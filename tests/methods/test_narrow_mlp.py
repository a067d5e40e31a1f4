"""Narrow MLPs compute what their weights say, and their units are those that cost least."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F

import slimformer
from command_line import run
from embedding_data import TEXTS, beir, pipeline
from real_models import minilm
from slimformer import EarlyExit, LayerDrop, Plan
from slimformer.calibration import narrow_mlps
from slimformer.calibration.narrow_mlps import fit_narrow
from slimformer.errors import CalibrationError, DataError, PlanError, UnsupportedModelError
from slimformer.evaluation.embedding_tasks import NeighbourTask
from slimformer.evaluation.retrieval import read_retrieval
from slimformer.methods.narrow_mlp import HEAD, PARTS, NarrowMlp
from slimformer.model.anatomy import find_anatomy
from tiny_models import ENCODERS, dropped, tiny_model

UNITS = {1: 5, 3: 0}


def weights(units: dict[int, int], hidden: int = 32, head: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer, number in units.items():
        shapes = ((number, hidden), (number,), (hidden, number), (hidden, hidden), (hidden,))
        for part, shape in zip(PARTS, shapes, strict=True):
            found[f"{layer}.{part}"] = torch.randn(shape, generator=generator) / 6
    if head:
        found.update(zip(HEAD, (torch.eye(hidden) / 3, torch.full((hidden,), 0.1)), strict=True))
    return found


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    return bent(pipeline(tmp_path / "model"))


def bent(model: SentenceTransformer) -> SentenceTransformer:
    """Hidden units of a tiny random model are next to linear; these are not."""
    with torch.no_grad():
        for layer in find_anatomy(model).layers:
            layer.intermediate.dense.weight.mul_(40)
            layer.output.dense.weight.mul_(10)
    return model


def slowly(model: Any, method: NarrowMlp, ids: torch.Tensor) -> torch.Tensor:
    """One text through modules that do what the method says, in place of the model's own."""
    layers = find_anatomy(model).layers
    x = model.embeddings(input_ids=ids) if hasattr(model, "embeddings") else None
    for index, layer in enumerate(layers):
        x = layer.attention(x)
        x = x[0] if isinstance(x, tuple) else x
        if index not in method.units:
            x = layer.output(layer.intermediate(x), x)
            continue
        w = {part: method.weights[f"{index}.{part}"] for part in PARTS}
        h = F.gelu(x @ w["up.weight"].T + w["up.bias"])
        x = layer.output.LayerNorm(x @ w["linear.weight"].T + w["linear.bias"] + h @ w["down.weight"].T)
    if HEAD[0] in method.weights:
        x = x + x @ method.weights["head.weight"].T + method.weights["head.bias"]
    return x


@pytest.mark.parametrize("head", [True, False])
@torch.no_grad()
def test_a_narrow_mlp_computes_what_its_weights_say(head: bool) -> None:
    model, method = tiny_model("bert"), NarrowMlp(UNITS, weights(UNITS, head=head))
    lengths = [9, 3, 14]
    ids = torch.arange(3 * 14).view(3, 14) % 60 + 3
    mask = torch.arange(14) < torch.tensor(lengths)[:, None]
    dense = model(input_ids=ids, attention_mask=mask.long())[0]
    slimformer.patch(model, method)
    found = model(input_ids=ids, attention_mask=mask.long())[0]
    assert dropped(model) == {1: ["mlp"], 3: ["mlp"]}
    slimformer.unpatch(model)
    for row, length in enumerate(lengths):
        expected = slowly(model, method, ids[row : row + 1, :length])[0]
        torch.testing.assert_close(found[row, :length], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(input_ids=ids, attention_mask=mask.long())[0], dense)


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_it_fits_encoders_of_berts_structure(name: str) -> None:
    model, ids = tiny_model(name), torch.arange(24).view(2, 12) + 3
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad(), slimformer.patched(model, NarrowMlp(UNITS, weights(UNITS))):
        both = model(input_ids=ids, attention_mask=mask)[0]
        alone = model(input_ids=ids[1:, :7])[0]
    torch.testing.assert_close(both[1:, :7], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted({*ENCODERS, "llama"} - {"bert", "roberta", "mpnet"}))
def test_other_structures_are_refused_and_left_alone(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(UnsupportedModelError, match="BERT, RoBERTa and MPNet"):
        slimformer.patch(model, NarrowMlp(UNITS, weights(UNITS)))
    assert slimformer.status(model) == {}


def test_a_plan_holds_it(tmp_path: Path, model: SentenceTransformer) -> None:
    method = NarrowMlp(UNITS, weights(UNITS))
    expected = slimformer.patch(model, method).encode(TEXTS)
    Plan([method]).save_pretrained(tmp_path / "plan")
    assert Plan.from_pretrained(tmp_path / "plan").methods == (method,)
    slimformer.patch(slimformer.unpatch(model), tmp_path / "plan")
    assert np.array_equal(model.encode(TEXTS), expected)


@pytest.mark.parametrize("other", [LayerDrop(mlp=[1]), LayerDrop(attention=[1, 2])])
def test_it_goes_with_layers_dropped(model: SentenceTransformer, other: LayerDrop) -> None:
    method = NarrowMlp(UNITS, weights(UNITS))
    slimformer.patch(model, method, other)
    assert np.isfinite(model.encode(TEXTS)).all()
    with pytest.raises(PlanError, match="Two methods leave something in place of the same sublayer"):
        slimformer.patch(model, method, EarlyExit(2, {HEAD[0]: torch.eye(32), HEAD[1]: torch.zeros(32)}))


@pytest.mark.parametrize(("units", "change", "message"), [
    ({}, {}, "such as {3: 384}"), ({-1: 2}, {}, "from 0 up"), ({1: 2.5}, {}, "from 0 up"), ({1: True}, {}, "from 0"),
    ([3], {}, "such as {3: 384}"), (UNITS, None, "no fitted weights"),
    (UNITS, {"1.up.bias": torch.zeros(4)}, r"1.up.bias has the shape \(4,\); it must be \(5,\)"),
    (UNITS, {"2.up.bias": torch.zeros(4)}, "2.up.bias has the shape .* it must be left out"),
    (UNITS, {"head.bias": torch.zeros(3)}, "head.bias has the shape"),
    ({**UNITS, 2: 1}, {}, "2.up.weight has the shape none, it is missing"),
])  # fmt: skip
def test_what_cannot_be_is_refused(units: Any, change: dict[str, torch.Tensor] | None, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        NarrowMlp(units, {} if change is None else {**weights(UNITS), **change})


@pytest.mark.parametrize(("units", "hidden", "message"), [
    ({4: 2}, 32, "names layer 4, but BertModel has 4 layers: allowed are 0 to 3"),
    ({3: 2}, 16, "hidden size of 16, and BertModel has 32"), ({1: 2}, 32, "leaves that layer's MLP whole"),
])  # fmt: skip
def test_a_method_for_another_model_is_refused(units: dict[int, int], hidden: int, message: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(PlanError, match=message):
        slimformer.patch(model, NarrowMlp(units, weights(units, hidden)))
    assert slimformer.status(model) == {}


@torch.no_grad()
def test_units_that_say_nothing_go_first_and_nothing_is_lost(model: SentenceTransformer) -> None:
    silent = [3, 17, 18, 40]
    for layer in find_anatomy(model).layers:
        layer.output.dense.weight[:, silent] = 0
    texts = [*TEXTS, *(text[::-1] for text in TEXTS)]
    dense = model.encode(texts)
    method = fit_narrow(model, texts, dict.fromkeys(range(4), 44))
    up = find_anatomy(model).layers[2].intermediate.dense.weight
    kept = [unit for unit in range(48) if unit not in silent]
    assert torch.equal(method.weights["2.up.weight"], up[kept])
    slim = slimformer.patch(model, method).encode(texts)
    assert np.abs(slim - dense).max() < 0.05 * np.abs(dense).max()


def test_the_unit_that_goes_is_the_one_whose_loss_costs_least_when_the_others_are_solved_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    units, residual, target = (torch.randn(200, size, generator=generator) for size in (6, 3, 3))
    sums = narrow_mlps._Sums.of(10, 3)
    sums.add(units, residual, target)
    features = torch.cat([units, residual, torch.ones(200, 1)], 1).double()
    penalty = torch.zeros(10, 10, dtype=torch.float64)
    penalty.diagonal()[:-1] = narrow_mlps.RIDGE * (features.T @ features).diagonal()[:-1].mean()

    def cost(columns: list[int]) -> tuple[float, torch.Tensor]:
        x, y, p = features[:, columns], target.double(), penalty[columns][:, columns]
        solved = torch.linalg.solve(x.T @ x + p, x.T @ y)
        return float((x @ solved - y).square().sum() + (solved * (p @ solved)).sum()), solved

    left = {unit: [c for c in range(10) if c != unit] for unit in range(6)}
    best = min(left, key=lambda unit: cost(left[unit])[0])
    alive, solved = sums.solve(6, 5)
    assert alive.tolist() == [unit for unit in range(6) if unit != best]
    torch.testing.assert_close(solved, cost(left[best])[1], atol=1e-6, rtol=1e-4)
    none, linear = sums.solve(6, 0)
    assert none.tolist() == []
    torch.testing.assert_close(linear, cost([6, 7, 8, 9])[1], atol=1e-6, rtol=1e-4)


@pytest.mark.full
def test_the_real_model_keeps_its_vectors_with_a_linear_last_mlp() -> None:
    model = SentenceTransformer(str(minilm()), device="cpu")
    texts = Path(__file__).read_text(encoding="utf-8").splitlines()
    texts = [text.strip() for text in texts if len(text) > 30]
    dense = model.encode(texts)
    bare = slimformer.patch(model, LayerDrop(mlp=[5])).encode(texts)
    method = fit_narrow(slimformer.unpatch(model), texts, {5: 0})
    slim = slimformer.patch(model, method).encode(texts)
    slimformer.unpatch(model)
    assert (dense * slim).sum(1).mean() > 0.97
    assert (dense * slim).sum(1).mean() > (dense * bare).sum(1).mean() + 0.1


def test_the_narrowest_within_the_loss_is_taken(tmp_path: Path, model: SentenceTransformer) -> None:
    task = read_retrieval(beir(tmp_path / "tiny"))
    dense = model.encode(TEXTS)
    plan = slimformer.calibrate(model, None, NarrowMlp, data=task, max_loss=0.99)
    assert np.array_equal(model.encode(TEXTS), dense)
    found = plan.provenance["narrow"]
    assert [point["keep"] for point in found["curve"]] == list(narrow_mlps.KEEPS)
    assert found["dense"] == task.split()[0].scores(model)[0]
    assert plan.methods[0].units == {0: 8, 1: 8, 2: 8, 3: 0}
    with slimformer.patched(model, plan):
        assert task.split()[0].scores(model)[0] == pytest.approx(found["curve"][-1]["score"], abs=1e-9)
    one = slimformer.calibrate(model, None, NarrowMlp, data=task, keep=0.5)
    assert one.methods[0].units == {0: 24, 1: 24, 2: 24, 3: 0}
    assert one.provenance["narrow"]["curve"][0]["score"] == found["curve"][0]["score"]


@pytest.mark.parametrize(("options", "message"), [
    ({}, "either keep or max_loss, got neither"), ({"keep": 0.5, "max_loss": 0.1}, "got both"),
    ({"keep": 1.0}, "keep must be a fraction"), ({"max_loss": -0.1}, "max_loss must be a fraction"),
    ({"max_loss": 0.0}, "No width loses at most 0.0 of the dense"),
])  # fmt: skip
def test_arguments_that_cannot_be_are_refused(
    model: SentenceTransformer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        slimformer.calibrate(model, None, NarrowMlp, data=NeighbourTask("text", TEXTS), **options)
    assert slimformer.status(model) == {}


def test_what_cannot_be_fitted_is_refused(tmp_path: Path, model: SentenceTransformer) -> None:
    with pytest.raises(CalibrationError, match="Layer 4 cannot keep 2 hidden units: layers are 0 to 3"):
        fit_narrow(model, TEXTS, {4: 2})
    with pytest.raises(CalibrationError, match="it has 48, of which fewer are to stay"):
        fit_narrow(model, TEXTS, {0: 48})
    with pytest.raises(DataError, match="at least two strings"):
        fit_narrow(model, "one text", {0: 2})
    with pytest.raises(CalibrationError, match="pooling 'max'"):
        fit_narrow(pipeline(tmp_path / "max", "max"), TEXTS, {0: 2})
    with pytest.raises(CalibrationError, match="unpatch"):
        fit_narrow(slimformer.patch(model), TEXTS, {0: 2})
    with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer has others"):
        fit_narrow(pipeline(tmp_path / "llama", name="llama"), TEXTS, {0: 2})


def test_the_command_makes_the_plan(tmp_path: Path) -> None:
    folder, data, out = tmp_path / "model", beir(tmp_path / "tiny"), tmp_path / "plan"
    bent(pipeline(folder)).save_pretrained(str(folder))

    shown = run("calibrate", "narrow", folder, "-o", out, "--max-loss", 0.99, "--data", data).stdout
    assert "17%" in shown
    assert "nDCG@10" in run("show", out).stdout
    figures = json.loads(run("eval", folder, "--plan", out, "--task", data, "--json").stdout)
    assert figures["data"].endswith("the held-out queries")

"""An early exit computes what a model cut off there computes; its head is the linear map that was fitted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from torch import Tensor

import slimformer
from slimformer import EarlyExit, LayerDrop, Plan
from slimformer.calibration.exit_heads import RIDGE, fit_exits
from slimformer.errors import CalibrationError, DataError, PlanError
from slimformer.model.anatomy import find_anatomy, transformer_of
from slimformer.plans.plan import fingerprint
from tiny_checkpoints import tiny_checkpoint
from tiny_models import DECODERS, ENCODERS, dropped, tiny_model

SENTENCE = "a cat sat on the mat and saw no dog run over hills of glass while seven old kings were asleep"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(1 + i * i % 17)) for i in range(90)]
GIVEN = {
    "input_ids": torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1)),
    "attention_mask": torch.ones(3, 12, dtype=torch.long).index_fill(1, torch.tensor([0]), 1),
}
GIVEN["attention_mask"][1, 7:] = 0


def pipeline(folder: Path, name: str = "bert", mode: str = "mean") -> SentenceTransformer:
    transformer = Transformer(tiny_checkpoint(folder, name))
    return SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode=mode)], device="cpu")


def hidden(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return find_anatomy(model).stack(**GIVEN).last_hidden_state[GIVEN["attention_mask"].bool()]


def head(seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "head.weight": torch.randn(32, 32, generator=generator),
        "head.bias": torch.randn(32, generator=generator),
    }


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_an_exit_is_the_model_cut_off_there(name: str, layer: int) -> None:
    model = tiny_model(name)
    if name in DECODERS and layer == 0:
        with pytest.raises(PlanError):
            slimformer.patch(model, EarlyExit(layer))
        assert slimformer.status(model) == {}
        return
    cut = copy.deepcopy(model)
    stack = find_anatomy(cut).stack
    del find_anatomy(cut).layers[layer:]
    stack.config.num_hidden_layers = layer
    with torch.no_grad():
        expected = stack(**GIVEN).last_hidden_state[GIVEN["attention_mask"].bool()]
    slimformer.patch(model, EarlyExit(layer))
    torch.testing.assert_close(hidden(model), expected, atol=1e-5, rtol=0)


def test_no_module_above_the_exit_runs() -> None:
    model, ran = tiny_model("modernbert"), set()
    for index, layer in enumerate(find_anatomy(model).layers):
        for module in layer.children():
            module.register_forward_hook(lambda *_, index=index: ran.add(index))
    slimformer.patch(model, EarlyExit(2))
    ran.clear()  # patching tries layers out
    hidden(model)
    assert ran == {0, 1}
    assert dropped(model) == {2: ["attention", "mlp"], 3: ["attention", "mlp"]}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_decoding_with_a_cache_is_decoding_without(name: str) -> None:
    model = slimformer.patch(tiny_model(name), EarlyExit(2, head()))
    ids = GIVEN["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :7], use_cache=True)
        rest = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", "weightedmean"])
def test_a_head_on_tokens_is_a_head_on_the_embedding(tmp_path: Path, mode: str) -> None:
    model, weights = pipeline(tmp_path, mode=mode), head()
    dense = model.encode(TEXTS, convert_to_tensor=True)
    with slimformer.patched(model, EarlyExit(2)):
        bare = model.encode(TEXTS, convert_to_tensor=True)
    with slimformer.patched(model, EarlyExit(2, weights)):
        found = model.encode(TEXTS, batch_size=7, convert_to_tensor=True)
    torch.testing.assert_close(
        found, bare + bare @ weights["head.weight"].T + weights["head.bias"], atol=1e-4, rtol=1e-4
    )
    assert torch.equal(model.encode(TEXTS, convert_to_tensor=True), dense)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", "weightedmean"])
def test_a_fitted_head_solves_the_ridge_regression_of_embeddings(tmp_path: Path, mode: str) -> None:
    model = pipeline(tmp_path, mode=mode)
    with slimformer.patched(model, EarlyExit(1)):
        x = model.encode(TEXTS, convert_to_tensor=True).double()
    y = model.encode(TEXTS, convert_to_tensor=True).double()
    weights = fit_exits(model, TEXTS, [1], batch_size=7)[1].weights
    centred, target = x - x.mean(0), (y - x) - (y - x).mean(0)
    penalty = RIDGE * (x * x).sum(0).mean() * torch.eye(32, dtype=torch.double)
    best = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ target)
    torch.testing.assert_close(weights["head.weight"].double(), best.T, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(
        weights["head.bias"].double(), (y - x).mean(0) - x.mean(0) @ best, atol=1e-3, rtol=1e-2
    )


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert", "mpnet", "llama", "gemma2", "gpt_neox"])
def test_a_fitted_head_brings_the_embedding_nearer(tmp_path: Path, name: str, mode: str) -> None:
    model = pipeline(tmp_path, name, mode)
    others = ["the dog saw seven cats", "kings of old sat over the hills", "no glass", "a mat on a mat"]
    dense = model.encode(others, convert_to_tensor=True)
    attributes = [sorted(vars(module)) for module in transformer_of(model).modules()]
    exits = fit_exits(model, TEXTS, [2])
    assert [sorted(vars(module)) for module in transformer_of(model).modules()] == attributes
    assert torch.equal(model.encode(others, convert_to_tensor=True), dense)
    errors = []
    for method in (EarlyExit(2), exits[2]):
        with slimformer.patched(model, method):
            errors.append((model.encode(others, convert_to_tensor=True) - dense).norm().item())
    assert errors[1] < 0.98 * errors[0]


def test_a_plan_keeps_the_head(tmp_path: Path) -> None:
    model = tiny_model("bert")
    plan = Plan([EarlyExit(2, head())], fingerprint(model))
    plan.save_pretrained(tmp_path)
    read = Plan.from_pretrained(tmp_path)
    assert read.methods == plan.methods
    expected = hidden(slimformer.patch(model, plan))
    assert torch.equal(hidden(slimformer.patch(model, read)), expected)
    assert not torch.equal(hidden(slimformer.patch(model, EarlyExit(2))), expected)
    assert plan.to_dict()["per_layer_config"] == {"2": {"skip": ["self_attn", "mlp"]},
                                                  "3": {"skip": ["self_attn", "mlp"]}}  # fmt: skip


@pytest.mark.parametrize("layers", [None, "many", 10**12])
def test_a_plan_for_an_impossible_model_is_still_written(layers: object) -> None:
    assert Plan([EarlyExit(2)], {"layers": layers}).to_dict()["per_layer_config"] == {}


@pytest.mark.parametrize("order", [1, -1])
def test_a_dropped_sublayer_does_not_take_the_head_with_it(order: int) -> None:
    model = tiny_model("bert")
    expected = hidden(slimformer.patch(model, EarlyExit(2, head())))
    slimformer.patch(model, *[LayerDrop(block=[3]), EarlyExit(2, head())][::order])
    assert torch.equal(hidden(model), expected)
    mean = LayerDrop(mlp=[3], replace="mean", weights={"mlp.3.bias": torch.ones(32)})
    with pytest.raises(PlanError, match="Two methods leave something"):
        slimformer.patch(model, *[mean, EarlyExit(2, head())][::order])
    assert torch.equal(hidden(model), expected)


@pytest.mark.parametrize("layer", [-1, True, 1.5, "2", None])
def test_a_layer_that_is_no_count_is_refused(layer: object) -> None:
    with pytest.raises(PlanError, match="number of layers that run, from 0 up"):
        EarlyExit(layer)


@pytest.mark.parametrize("weights", [
    {"head.weight": torch.ones(4, 4)}, {"head.weight": torch.ones(4, 3), "head.bias": torch.ones(4)},
    {"head.weight": torch.ones(4, 4), "head.bias": torch.ones(1, 4)},
    {"weight": torch.ones(4, 4), "head.bias": torch.ones(4)},
])  # fmt: skip
def test_a_head_of_another_form_is_refused(weights: dict[str, Tensor]) -> None:
    with pytest.raises(PlanError, match="head"):
        EarlyExit(2, weights)


def test_an_exit_or_a_head_that_does_not_fit_the_model_is_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(PlanError, match=r"has 4 layers\. Allowed are 0 to 3"):
        slimformer.patch(model, EarlyExit(4))
    with pytest.raises(PlanError, match="for a hidden size of 8, and BertModel has 32"):
        slimformer.patch(model, EarlyExit(2, {"head.weight": torch.ones(8, 8), "head.bias": torch.ones(8)}))
    assert slimformer.status(model) == {}


def test_fitting_says_what_it_needs(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "mean")
    for texts, message in (("a text", "one string"), (["one"], "1 texts"), (["a", 3], "a text of type int")):
        with pytest.raises(DataError, match=message):
            fit_exits(model, texts)
    with pytest.raises(
        CalibrationError, match="no exit at layer 4: BertModel has 4 layers, so exits are 0 to 3"
    ):
        fit_exits(model, TEXTS, [4])
    with pytest.raises(CalibrationError, match="unpatch"):
        fit_exits(slimformer.patch(model), TEXTS)
    with pytest.raises(CalibrationError, match="pooling 'max'"):
        fit_exits(pipeline(tmp_path / "max", mode="max"), TEXTS)
    with pytest.raises(CalibrationError, match="got BertModel"):
        fit_exits(tiny_model("bert"), TEXTS)

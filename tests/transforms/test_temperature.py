"""A temperature divides every score, and log-n scaling multiplies queries of long texts, in every structure."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForTextEncoding, DynamicCache, PreTrainedModel, T5Config

import slimformer
import slow_rows
from slimformer import LayerDrop, Plan, TempScale, TokenElimination
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.methods.temperature import LogNScale
from slimformer.model.anatomy import find_anatomy
from slow_rows import LAYOUTS, arguments, batch, error, one_thread, outputs, positions  # noqa: F401
from slow_scores import slow_scores
from tiny_models import DECODERS, ENCODERS

ALL = [*DECODERS, *ENCODERS]
# MPNet computes its scores itself, and the slow way of the others does not reach them.
THROUGH_FUNCTIONS = [name for name in ALL if name != "mpnet"]
CLOSE = 1e-5


def small(name: str, **overrides: object) -> PreTrainedModel:
    """The small model, of which some layers see all of a text."""
    mixed = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gemma3_text" else {}
    return slow_rows.small(name, **{**mixed, **overrides})


def mpnet_divided(model: PreTrainedModel, by: float) -> None:
    """Divide all scores by `by`, in the weights that they are made of."""
    with torch.no_grad():
        model.encoder.relative_attention_bias.weight.div_(by)
        for layer in model.encoder.layer:
            layer.attention.attn.q.weight.div_(by)
            layer.attention.attn.q.bias.div_(by)


def with_bias(model: PreTrainedModel) -> PreTrainedModel:
    """MPNet with a score bias that counts."""
    with torch.no_grad():
        weight = model.encoder.relative_attention_bias.weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", THROUGH_FUNCTIONS)
def test_a_temperature_divides_every_score(name: str, layout: str) -> None:
    model, given = small(name), batch(name, layout)
    dense, mask = outputs(model, given), given["attention_mask"]
    with slow_scores(model, lambda module, q, k, scaling: q @ k.mT * scaling / 0.6):
        expected = outputs(model, given)
    with slimformer.patched(model, TempScale(0.6)):
        actual = outputs(model, given)
    assert error(actual, expected, mask) <= CLOSE
    assert error(actual, dense, mask) > 1e-2
    assert torch.equal(outputs(model, given), dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_temperature_divides_a_score_bias_too(layout: str) -> None:
    model, given = with_bias(small("mpnet")), batch("mpnet", layout)
    with slimformer.patched(model, TempScale(0.6)):
        actual = outputs(model, given)
    mpnet_divided(model, 0.6)
    assert error(actual, outputs(model, given), given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bert", "modernbert"])
def test_every_attention_function_takes_a_temperature(name: str, attention: str) -> None:
    model, given = small(name, attn_implementation=attention), batch(name, "none")
    with slow_scores(model, lambda module, q, k, scaling: q @ k.mT * scaling / 0.6):
        expected = outputs(model, given)
    slimformer.patch(model, TempScale(0.6))
    assert error(outputs(model, given), expected) <= CLOSE


def logarithmic(base: int, counted: Tensor) -> Callable[[nn.Module, Tensor, Tensor, float], Tensor]:
    """Scores whose queries `[batch, tokens]` are multiplied by what LogNScale's documentation says."""
    factor = torch.tensor(
        [[max(1.0, math.log(max(n, 1)) / math.log(base)) for n in row] for row in counted.tolist()]
    )
    return lambda module, q, k, scaling: (q * factor[:, None, :, None]) @ k.mT * scaling


def counted(given: dict[str, Tensor], causal: bool) -> Tensor:
    """How many tokens a query sees at most `[batch, tokens]`: up to its own in a decoder, all in an encoder."""
    mask = given["attention_mask"]
    return positions(mask) + 1 if causal else mask.sum(1, keepdim=True).expand_as(mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", [n for n in THROUGH_FUNCTIONS if n not in ("gemma2", "gemma3_text", "modernbert")]
)
def test_queries_of_long_texts_grow_with_the_logarithm(name: str, layout: str) -> None:
    model, given = small(name), batch(name, layout)
    with slow_scores(model, logarithmic(6, counted(given, name in DECODERS))):
        expected = outputs(model, given)
    dense = outputs(model, given)
    slimformer.patch(model, LogNScale(6))
    assert error(outputs(model, given), expected, given["attention_mask"]) <= CLOSE
    assert error(outputs(model, given), dense, given["attention_mask"]) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "modernbert"])
def test_layers_with_a_sliding_window_keep_their_queries(name: str, layout: str) -> None:
    model, given = small(name), batch(name, layout)
    grown = logarithmic(6, counted(given, name in DECODERS))

    def score(module: nn.Module, q: Tensor, k: Tensor, scaling: float) -> Tensor:
        sliding = getattr(module, "sliding_window", None) is not None
        return q @ k.mT * scaling if sliding else grown(module, q, k, scaling)

    with slow_scores(model, score):
        expected = outputs(model, given)
    slimformer.patch(model, LogNScale(6))
    assert error(outputs(model, given), expected, given["attention_mask"]) <= CLOSE


def test_mpnet_takes_log_n_scaling_with_its_bias() -> None:
    model, given = with_bias(small("mpnet")), arguments("mpnet", [(0, 24), (0, 24)])
    with slimformer.patched(model, LogNScale(6)):
        actual = outputs(model, given)
    mpnet_divided(model, math.log(6) / math.log(24))
    assert error(actual, outputs(model, given)) <= CLOSE


@pytest.mark.parametrize("method", [LogNScale(24), TempScale(1.0)], ids=repr)
@pytest.mark.parametrize("name", ALL)
def test_short_texts_are_bit_identical_whatever_ran_before(name: str, method: Any) -> None:
    model, given = small(name), batch(name, "none")
    long = arguments(name, [(0, 40), (0, 30)], tokens=40)
    dense = outputs(model, given)
    slimformer.patch(model, method)
    assert torch.equal(outputs(model, given), dense)
    outputs(model, long)
    assert torch.equal(outputs(model, given), dense)


@pytest.mark.parametrize("name", ["bert", "modernbert", "mpnet", "distilbert"])
def test_an_encoders_factor_ignores_batch_mates(name: str) -> None:
    model = slimformer.patch(small(name), LogNScale(6))
    together = outputs(model, arguments(name, [(0, 9), (0, 24)]))
    given = arguments(name, [(0, 9), (0, 24)])
    alone = outputs(model, {key: value[:1, :9] for key, value in given.items()})
    assert error(together[:1, :9], alone) <= CLOSE


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("method", [LogNScale(6), TempScale(0.6)], ids=repr)
def test_cached_steps_equal_one_pass(name: str, method: Any) -> None:
    model, given = small(name), batch(name, "left")
    slimformer.patch(model, method)
    whole, mask = outputs(model, given), given["attention_mask"]
    cache, found = DynamicCache(config=model.config), []
    for start, end in ((0, 9), (9, 10), (10, 17), (17, 24)):
        step = {
            "input_ids": given["input_ids"][:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": given["position_ids"][:, start:end],
        }
        found.append(outputs(model, step, past_key_values=cache, use_cache=True))
    assert error(torch.cat(found, 1), whole, mask) <= CLOSE


@pytest.mark.parametrize("name", ["llama", "bert", "mpnet", "modernbert"])
def test_undo_leaves_nothing_behind(name: str) -> None:
    model, given = small(name), batch(name, "left")
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    state, dense = dict(model.state_dict()), outputs(model, given)
    config = model.config.to_dict()
    slimformer.patch(model, TempScale(0.6), LogNScale(6))
    assert list(model.state_dict()) == list(state)
    slimformer.unpatch(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert model.config.to_dict() == config
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(outputs(model, given), dense)


def test_it_composes_with_policies_and_itself() -> None:
    model, given = small("llama"), batch("llama", "left")
    mask = given["attention_mask"]
    slimformer.patch(model, TempScale(0.5), LayerDrop(attention=[1]), TempScale(0.8))
    actual = outputs(model, given)
    slimformer.unpatch(model)
    output = model.model.layers[1].self_attn.o_proj.weight
    kept = output.detach().clone()
    with torch.no_grad(), slow_scores(model, lambda module, q, k, scaling: q @ k.mT * scaling / 0.4):
        output.zero_()
        expected = outputs(model, given)
        output.copy_(kept)
    assert error(actual, expected, mask) <= CLOSE
    eliminated = TokenElimination({2: 0.5}, least=8, window=3, sink=2)
    slimformer.patch(model, eliminated)
    plain = outputs(model, given, use_cache=False)
    slimformer.patch(model, eliminated, TempScale(0.5), LogNScale(6))
    sharp = outputs(model, given, use_cache=False)
    for row in range(3):
        text = mask[row].bool()
        alone = {key: value[row : row + 1, text] for key, value in given.items()}
        assert error(sharp[row, text][None, -1:], outputs(model, alone, use_cache=False)[:, -1:]) <= CLOSE
    assert error(sharp, plain, mask) > 1e-2


def test_plans_carry_it_and_status_reports_it(tmp_path: Path) -> None:
    model, given = small("llama"), batch("llama", "none")
    plan = Plan([TempScale(0.6), LayerDrop(attention=[1]), LogNScale(6)])
    expected = outputs(slimformer.patch(model, *plan.methods), given)
    plan.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).methods == plan.methods
    assert torch.equal(outputs(slimformer.patch(model, str(tmp_path)), given), expected)
    rows = slimformer.status(model)
    assert rows[0] == {
        "attention": "text rows, TempScale(tau=0.6), LogNScale(base_length=6)",
        "mlp": "text rows",
    }
    assert rows[1]["attention"] == "dropped"


@pytest.mark.parametrize("tau", [0, -1.0, math.nan, math.inf, "sharp", True])
def test_temperatures_that_make_no_sense_are_refused(tau: Any) -> None:
    with pytest.raises(PlanError, match="a number above 0"):
        TempScale(tau)


@pytest.mark.parametrize("length", [1, 0, 2.5, True, None])
def test_base_lengths_that_make_no_sense_are_refused(length: Any) -> None:
    with pytest.raises(PlanError, match="from 2 up"):
        LogNScale(length)


class Deaf(nn.Module):
    """An attention that does what it always did, whatever its attributes say."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.layer_idx, self.scaling, self.is_causal = inner, inner.layer_idx, 1.0, True

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.inner(hidden_states, **kwargs)


@pytest.mark.parametrize("method", [LogNScale(6), TempScale(0.6)], ids=repr)
def test_an_attention_that_would_ignore_it_is_refused(method: Any) -> None:
    model, given = small("llama"), batch("llama", "none")
    find_anatomy(model).layers[2].self_attn = Deaf(model.model.layers[2].self_attn)
    dense = outputs(model, given)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match="Deaf ignores changes to its attention scores"):
        slimformer.patch(model, method)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert torch.equal(outputs(model, given), dense)


def test_models_whose_layers_all_see_a_window_take_no_log_n_scaling() -> None:
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        slimformer.patch(small("mistral", sliding_window=8), LogNScale(6))


def t5(attention: str) -> PreTrainedModel:
    """T5's encoder with a score bias that counts."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8, dropout_rate=0.0)
    model = AutoModelForTextEncoding.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for layer in model.encoder.block:
            layer.layer[0].SelfAttention.q.weight.mul_(6)
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    return model


def t5_divided(model: PreTrainedModel, by: float) -> None:
    """Divide all scores by `by`, in the weights that they are made of."""
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.div_(by)
        for layer in model.encoder.block:
            layer.layer[0].SelfAttention.q.weight.div_(by)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("method", "by"), [(TempScale(0.6), 0.6), (LogNScale(6), math.log(6) / math.log(24))]
)
def test_t5_divides_its_bias_too(method: Any, by: float, attention: str, layout: str) -> None:
    model = t5(attention)
    given = batch("bert", layout) if isinstance(method, TempScale) else arguments("bert", [(0, 24), (0, 24)])
    given = {name: given[name] for name in ("input_ids", "attention_mask")}
    dense = outputs(model, given)
    keys = [set(vars(m)) for m in model.modules()]
    with slimformer.patched(model, method):
        actual = outputs(model, given)
        assert slimformer.status(model)[2] == {"attention": f"all rows, {method!r}", "mlp": "all rows"}
    assert torch.equal(outputs(model, given), dense)
    assert [set(vars(m)) for m in model.modules()] == keys
    t5_divided(model, by)
    assert error(actual, outputs(model, given), given["attention_mask"]) <= CLOSE
    assert error(actual, dense, given["attention_mask"]) > 1e-2


def test_what_t5_cannot_take_is_refused_by_name() -> None:
    model = t5("sdpa")
    with pytest.raises(UnsupportedModelError, match="goes to the layers above"):
        slimformer.patch(model, LayerDrop(attention=[1]))
    with pytest.raises(UnsupportedModelError, match="keeps states that layers return"):
        slimformer.patch(model, LayerDrop(block=[1]))
    with pytest.raises(UnsupportedModelError, match="T5Stack has no rotary_emb"):
        slimformer.patch(model, slimformer.SelfExtend(2, 4))
    assert not slimformer.status(model)

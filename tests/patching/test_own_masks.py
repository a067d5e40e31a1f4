"""A mask that does more than padding, windows and packing explain is left to the model's own code, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.test_mixture_of_depths import routed
from tests.methods.test_replacements import filters
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import slimformer
from slimformer import LayerDrop, TokenElimination
from slimformer.calls.layer_calls import cache_argument
from slimformer.calls.masks import read_mask
from slimformer.errors import PlanError
from slimformer.methods.elimination.random_keep import RandomKeep
from slow_rows import (  # noqa: F401
    TOKENS,
    arguments,
    batch,
    error,
    kept,
    linears,
    one_thread,
    outputs,
    positions,
    rows_through,
    slowly,
    small,
)
from tiny_models import DECODERS

CLOSE = 1e-5
NAMES = ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "bert", "distilbert", "modernbert"]
OWN = ["bias", "head", "tree", "own key", "own keys", "last key", "hidden key", "lower left"]


def added(allowed: Tensor) -> Tensor:
    """A mask of booleans as one of additions."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def own_mask(kind: str, causal: bool) -> Tensor:
    """A mask `[3, 1 or 4, tokens, tokens]` as only its caller could have made it."""
    allowed = torch.ones(3, 1, TOKENS, TOKENS, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    if kind == "bias":
        mask = added(allowed)
        mask[..., 3:5] += -0.7
        return mask
    if kind == "head":
        allowed = allowed.expand(3, 4, TOKENS, TOKENS).clone()
        allowed[:, 1, 4:, 3] = False
    elif kind == "tree":
        # Two continuations of the same beginning.
        allowed[:, :, 16:, 8:16] = False
        if not causal:
            allowed[:, :, 8:16, 16:] = False
    elif kind == "own key":
        allowed[1, :, 7, 7] = False
    elif kind == "own keys":
        allowed = allowed & ~torch.eye(TOKENS, dtype=torch.bool)
        allowed[:, :, 0, 0] = True
    elif kind == "last key":
        # As padding on the right would be, but that its token counts.
        allowed[1, :, :, -1] = False
    elif kind == "hidden key":
        allowed[1, :, :, 7] = False
    elif kind == "lower left":
        allowed[2, :, 20:, :9] = False
    return allowed


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("name", NAMES)
def test_the_plain_patch_obeys_a_mask_of_ones_own_at_every_token(name: str, kind: str, form: str) -> None:
    # GPT-2, Gemma 2 and others read booleans only under sdpa.
    model = small(name, attn_implementation="sdpa" if form == "bool" and name != "gemma2" else "eager")
    mask = own_mask(kind, name in DECODERS)
    mask = added(mask) if mask.dtype == torch.bool and (form == "float" or name == "gemma2") else mask
    given = {**batch(name, "none"), "attention_mask": mask}
    expected = outputs(model, given)
    assert error(expected, outputs(model, batch(name, "none"))) > 1e-3
    slimformer.patch(model)
    assert torch.equal(outputs(model, given), expected)


@pytest.mark.parametrize("own", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("name", ["gemma2", "modernbert"])
def test_a_mask_of_ones_own_for_some_layers_is_obeyed(name: str, own: str) -> None:
    model, causal = small(name, attn_implementation="eager"), name in DECODERS
    plain = torch.ones(3, 1, TOKENS, TOKENS, dtype=torch.bool)
    plain = plain.tril() if causal else plain
    padded = plain & batch(name, "left")["attention_mask"].bool()[:, None, None, :]
    # The layers of one kind see what is padding for the others.
    masks = {"full_attention": padded, "sliding_attention": padded, own: plain}
    given = {**batch(name, "left"), "attention_mask": {kind: added(mask) for kind, mask in masks.items()}}
    real = batch(name, "left")["attention_mask"]
    expected = outputs(model, given)
    slimformer.patch(model)
    assert error(outputs(model, given), expected, real) <= CLOSE


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_choices_and_drops_obey_a_mask_of_ones_own(name: str, kind: str) -> None:
    model = small(name, attn_implementation="sdpa")
    given = {**batch(name, "none"), "attention_mask": own_mask(kind, name in DECODERS)}
    places = positions(torch.ones(3, TOKENS, dtype=torch.long))
    method, drop = RandomKeep(0.5, seed=3), LayerDrop(attention=[2])
    with slowly(model, kept(method, places)):
        expected = outputs(model, given)
    with slimformer.patched(model, method):
        assert error(outputs(model, given), expected) <= CLOSE
    nothing = torch.zeros(3, TOKENS, dtype=torch.bool)
    with slowly(model, {(2, "attention"): nothing}):
        expected = outputs(model, given)
    with slimformer.patched(model, drop):
        assert error(outputs(model, given), expected) <= CLOSE


def packed(causal: bool, lengths: tuple[int, ...], window: int | None = None) -> Tensor:
    """A mask `[1, 1, tokens, tokens]` of texts behind each other, and of padding behind them."""
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    text = torch.nn.functional.pad(text, (0, TOKENS - len(text)), value=-1)
    allowed = (text[:, None] == text) & (text >= 0)
    allowed = allowed.tril() if causal else allowed
    return allowed[None, None]


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_behind_packed_texts_is_not_computed(name: str, form: str) -> None:
    model = small(name, attn_implementation="sdpa" if form == "bool" else "eager")
    allowed = packed(name in DECODERS, (7, 9))
    # What padding sees is nobody's business, as long as it sees something.
    allowed[:, :, 16:, 0] = False
    mask = allowed if form == "bool" else added(allowed)
    given = {"input_ids": batch(name, "none")["input_ids"][:1], "attention_mask": mask}
    real = (torch.arange(TOKENS) < 16)[None]
    expected = outputs(model, given)
    slimformer.patch(model)
    with rows_through(*linears(model, name, "mlp")) as rows:
        assert error(outputs(model, given), expected, real) <= CLOSE
    assert rows == [16] * 4


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert"])
def test_a_filter_does_not_read_across_the_texts_of_a_packed_mask(name: str) -> None:
    model, causal = small(name), name in DECODERS
    slimformer.patch(model, filters(model, attention=[1, 2]))
    ids = arguments(name, [(0, 24)])["input_ids"]
    places = torch.cat([torch.arange(9), torch.arange(15)])[None]
    # A decoder turns by positions that differ alike; what tells the texts apart is the mask alone.
    given = {"input_ids": ids, "position_ids": torch.arange(24)[None] if causal else places}
    both = outputs(model, {**given, "attention_mask": packed(causal, (9, 15))})
    for begin, end in [(0, 9), (9, 24)]:
        alone = outputs(model, {"input_ids": ids[:, begin:end]})
        assert error(both[:, begin:end], alone) <= CLOSE


@pytest.mark.parametrize("kind", ["bias", "tree", "packed"])
def test_elimination_refuses_a_mask_that_says_no_text_per_row(kind: str) -> None:
    model = small("llama", attn_implementation="sdpa")
    slimformer.patch(model, TokenElimination({2: 0.4}, scorer="random", least=8, window=3, sink=2))
    mask = packed(True, (9, 15)).expand(3, -1, -1, -1) if kind == "packed" else own_mask(kind, True)
    with pytest.raises(PlanError, match="the attention mask of this call does not say"):
        outputs(model, {**batch("llama", "none"), "attention_mask": mask})


def test_a_tree_behind_an_eliminated_prompt_is_refused() -> None:
    model = small("llama", attn_implementation="sdpa")
    slimformer.patch(model, TokenElimination({2: 0.4}, scorer="random", least=8, window=3, sink=2))
    tree = torch.ones(1, 1, 4, 28, dtype=torch.bool).tril(24)
    plain = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": tree}

    def prompt() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        outputs(model, arguments("llama", [(0, 24)]), use_cache=True, **{cache_argument(model): cache})
        return cache

    with_branch = {**plain, "attention_mask": tree & (torch.arange(28) != 25)}
    with pytest.raises(PlanError, match="mask of your own"):
        outputs(model, with_branch, **{cache_argument(model): prompt()})
    without_mask = {"input_ids": plain["input_ids"]}
    expected = outputs(model, without_mask, **{cache_argument(model): prompt()})
    assert error(outputs(model, plain, **{cache_argument(model): prompt()}), expected) <= CLOSE


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_reading_a_mask_finds_texts_windows_and_holes(causal: bool, window: int | None) -> None:
    key = torch.arange(TOKENS)
    distance = key[:, None] - key
    rule = distance >= 0 if causal else torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    rule = rule if window is None else rule & (distance.abs() < window)
    text = batch("llama", "mixed")["attention_mask"].bool()
    plain = read_mask((rule & text[:, None, :])[:, None], 3, TOKENS, causal, window)
    assert plain.kind == "plain"
    assert torch.equal(plain.text, text)
    assert plain.ranges.tolist() == [[5, 24], [0, 20], [3, 14]]
    holes = text.clone()
    holes[1, 8:10] = False
    found = read_mask((rule & holes[:, None, :])[:, None], 3, TOKENS, causal)
    assert found.kind == "plain"
    assert found.ranges is None
    assert torch.equal(found.text, holes)
    several = read_mask(packed(causal, (7, 9)) & rule, 3, TOKENS, causal, window)
    assert several.kind == "packed"
    assert several.text.sum(1).tolist() == [16] * 3
    assert read_mask((rule & text[:, None, :])[:, None], 3, TOKENS, causal, 4).kind == "other"


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in out if isinstance(out, tuple) else (out,):
            if isinstance(found, Tensor):
                self.size = max(self.size, found.numel() * found.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_reading_a_mask_takes_no_more_memory_than_booleans_of_its_size(dtype: torch.dtype) -> None:
    tokens = 6000
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    mask = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    with _Largest() as largest:
        found = read_mask(mask, 1, tokens, causal=True, window=None)
    assert found.kind == "plain"
    # Views of the mask itself are no memory; of additions, parts are.
    assert largest.size <= mask.numel() * mask.element_size()


def test_flex_attention_is_left_to_the_model() -> None:
    model: nn.Module = small("llama", attn_implementation="flex_attention")
    given = batch("llama", "left")
    # What the compiler makes of it on a CPU differs between machines; masks and arguments do not.
    with torch.compiler.set_stance("force_eager"):
        expected = outputs(model, given)
        slimformer.patch(model)
        assert error(outputs(model, given), expected, given["attention_mask"]) <= CLOSE
        # Which of these masks' keys are padding is known to flex attention alone.
        with pytest.raises(PlanError, match="BlockMask"):
            outputs(slimformer.patch(model, routed(mlp=[1], routing="top_k", keep=0.5)), given)

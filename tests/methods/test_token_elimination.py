"""Eliminated tokens are gone: later layers run as if the text had only what stayed, in prompt and decode alike."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import slimformer
from slimformer import LayerDrop, Plan, TokenElimination
from slimformer.changes.ledger import Ledger
from slimformer.errors import PlanError
from slimformer.methods.elimination.random_keep import chances
from slimformer.model.anatomy import find_anatomy, positional_names
from tiny_models import DECODERS, ENCODERS, tiny_model

# Without layers that see only a window.
MODELS = [name for name in DECODERS if not name.startswith("gemma")]
TOKENS, NEW = 24, 5
SHORT: dict[str, Any] = {"least": 8, "window": 3, "sink": 2}
RANDOM = TokenElimination({2: 0.4}, scorer="random", **SHORT)


def ids(rows: int = 3, tokens: int = TOKENS + NEW) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


def mask_of(*padding: int, tokens: int = TOKENS) -> Tensor:
    mask = torch.ones(len(padding), tokens, dtype=torch.long)
    for row, count in zip(mask, padding, strict=True):
        row[:count] = 0
    return mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def not_evicted(length: int, keep: float, sink: int = 2, window: int = 3) -> Tensor:
    """The tokens of a text that stay, by the documentation of `scorer="random"`."""
    place = torch.arange(length)
    score = chances(place, 0).float()
    score[(place < sink) | (place >= length - window)] = math.inf
    return score.argsort(descending=True)[: math.ceil(length * keep)].sort().values


@contextlib.contextmanager
def only(model: nn.Module, first: int, stay: Tensor) -> Iterator[None]:
    """Run the layers from `first` on with the tokens `stay` of one text, as if there had never been others."""
    anatomy, ledger = find_anatomy(model), Ledger()
    full: list[Tensor] = []

    def wrap(index: int, layer: nn.Module) -> None:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            kwargs.update(zip(positional_names(layer)[1:], args, strict=False))
            if index == first:
                full.append(hidden)
                hidden = hidden[:, stay]
            kwargs["attention_mask"] = None
            if kwargs.get("position_embeddings") is not None:
                kwargs["position_embeddings"] = tuple(t[:, stay] for t in kwargs["position_embeddings"])
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = kwargs["position_bias"][:, :, stay][..., stay]
            out = had(hidden, **kwargs)
            if index < len(anatomy.layers) - 1:
                return out
            # MPNet's layers return tuples.
            beside = out[1:] if isinstance(out, tuple) else None
            whole = full.pop().index_copy(1, stay, out if beside is None else out[0])
            return whole if beside is None else (whole, *beside)

        had = ledger.set_forward(layer, forward)

    for index, layer in enumerate(anatomy.layers):
        if index >= first:
            wrap(index, layer)
    try:
        yield
    finally:
        ledger.undo()


@pytest.mark.parametrize("name", MODELS)
def test_everything_kept_is_the_dense_model(name: str) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        dense = model(ids(), attention_mask=mask_of(0, 0, 0, tokens=TOKENS + NEW)).logits
        slimformer.patch(model, TokenElimination({1: 1.0}, **SHORT))
        assert torch.equal(model(ids(), attention_mask=mask_of(0, 0, 0, tokens=TOKENS + NEW)).logits, dense)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_decode_and_later_chunks_see_only_what_stayed(name: str) -> None:
    model, mask = tiny_model(name), mask_of(0, 5, 11)
    place, whole = positions(mask), torch.cat([mask, torch.ones(3, NEW, dtype=torch.long)], 1)
    with torch.no_grad():
        slimformer.patch(model, RANDOM)
        cache = DynamicCache(config=model.config)
        first = model(
            ids()[:, :TOKENS], attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
        )
        got = [first.logits[:, -1:]]
        # One token, one token, and three at once, as assisted generation checks its guesses.
        for start, end in ((0, 1), (1, 2), (2, 5)):
            step = model(
                ids()[:, TOKENS + start : TOKENS + end],
                attention_mask=whole[:, : TOKENS + end],
                position_ids=place[:, -1:] + 1 + torch.arange(start, end),
                past_key_values=cache,
                use_cache=True,
            )
            got.append(step.logits)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        slimformer.unpatch(model)
        assert lengths == [29, 29, 10 + NEW, 10 + NEW]
        for row, padding in enumerate((0, 5, 11)):
            text, length = ids()[row : row + 1, padding:], TOKENS - padding
            stay = torch.cat([not_evicted(length, 0.4), length + torch.arange(NEW)])
            with only(model, 2, stay):
                expected = model(text, use_cache=False).logits[0, -NEW - 1 :]
            torch.testing.assert_close(torch.cat(got, 1)[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scorer", ["attention", "norm", "random"])
@pytest.mark.parametrize("block", [1, 4])
def test_a_text_is_treated_alike_alone_and_among_others(scorer: Any, block: int) -> None:
    method = TokenElimination({1: 0.7, 2: 0.4}, scorer=scorer, block=block, **SHORT)
    model, mask = slimformer.patch(tiny_model("llama"), method), mask_of(0, 5, 11)
    with torch.no_grad():
        together = model(ids()[:, :TOKENS], attention_mask=mask, position_ids=positions(mask)).logits
        for row, padding in enumerate((0, 5, 11)):
            alone = model(ids()[row : row + 1, padding:TOKENS]).logits
            torch.testing.assert_close(together[row, -1], alone[0, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", ["sum", "max"])
def test_the_attention_scorer_keeps_what_the_last_tokens_look_at(heads: Any) -> None:
    model = tiny_model("llama")
    method = TokenElimination({2: 0.4}, heads=heads, **SHORT)
    with torch.no_grad():
        slimformer.patch(model, method)
        slim = model(ids()[:1, :TOKENS], use_cache=False).logits[0, -1]
        slimformer.unpatch(model)
        weights = []

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            core, h = model.model.layers[2].self_attn, model.model.layers[2].input_layernorm(args[0])
            model.config._attn_implementation = "eager"
            weights.append(core(h, kwargs["position_embeddings"], eager_mask())[1])
            model.config._attn_implementation = "sdpa"

        hook = model.model.layers[2].register_forward_pre_hook(look, with_kwargs=True)
        model(ids()[:1, :TOKENS], use_cache=False)
        hook.remove()
        score = weights[0][0, :, -8:].sum(1)
        score = score.sum(0) if heads == "sum" else score.amax(0)
        pooled = torch.stack([score[max(i - 3, 0) : i + 4].mean() for i in range(TOKENS)])
        pooled[:2] = pooled[-3:] = math.inf
        stay = pooled.argsort(descending=True)[: math.ceil(0.4 * TOKENS)].sort().values
        with only(model, 2, stay):
            expected = model(ids()[:1, :TOKENS], use_cache=False).logits[0, -1]
    torch.testing.assert_close(slim, expected, atol=1e-5, rtol=0)


def eager_mask() -> Tensor:
    return torch.full((TOKENS, TOKENS), torch.finfo(torch.float32).min).triu(1)[None, None]


def test_a_prompt_in_chunks_loses_tokens_of_every_chunk() -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    text = ids(1, 40)
    with torch.no_grad():
        slimformer.patch(model, RANDOM)
        for start in (0, 20):
            chunk = model(text[:, start : start + 20], past_key_values=cache, use_cache=True).logits
        slimformer.unpatch(model)
        stay = torch.cat([not_evicted(20, 0.4), 20 + not_evicted(20, 0.4)])
        with only(model, 2, stay):
            expected = model(text, use_cache=False).logits
    torch.testing.assert_close(chunk[0, -1], expected[0, -1], atol=1e-5, rtol=0)
    assert [layer.get_seq_length() for layer in cache.layers] == [40, 40, 16, 16]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_follows_the_shorter_caches(attention: str, beams: int) -> None:
    model = tiny_model("llama", attn_implementation=attention)
    slimformer.patch(model, RANDOM)
    mask = mask_of(0, 5, 11)
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    together = model.generate(ids()[:, :TOKENS], attention_mask=mask, **options)
    for row, padding in enumerate((0, 5, 11)):
        alone = model.generate(ids()[row : row + 1, padding:TOKENS], **options)
        longest = min(alone.shape[1] - (TOKENS - padding), together.shape[1] - TOKENS)
        assert torch.equal(together[row, TOKENS : TOKENS + longest], alone[0, TOKENS - padding :][:longest])


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert"])
def test_an_encoders_eliminated_tokens_keep_their_last_residual(name: str) -> None:
    assert name in ENCODERS
    model, text = tiny_model(name), ids(1, TOKENS)
    mask = torch.ones_like(text)
    with torch.no_grad():
        before = model(text, attention_mask=mask, output_hidden_states=True).hidden_states[2]
        slimformer.patch(model, RANDOM)
        slim = model(text, attention_mask=mask).last_hidden_state
        slimformer.unpatch(model)
        stay = not_evicted(TOKENS, 0.4)
        with only(model, 2, stay):
            expected = model(text, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(slim, expected, atol=1e-5, rtol=0)
    gone = torch.ones(TOKENS, dtype=torch.bool).index_fill(0, stay, False)
    torch.testing.assert_close(slim[0, gone], before[0, gone], atol=1e-5, rtol=0)


def test_it_composes_with_dropped_sublayers() -> None:
    model, text = tiny_model("llama"), ids(1, TOKENS)
    drop = LayerDrop(attention=[3], mlp=[1])
    with torch.no_grad():
        slimformer.patch(model, drop, RANDOM)
        slim = model(text).logits[0, -1]
        slimformer.patch(model, drop)
        with only(model, 2, not_evicted(TOKENS, 0.4)):
            expected = model(text, use_cache=False).logits[0, -1]
    torch.testing.assert_close(slim, expected, atol=1e-5, rtol=0)


def test_short_prompts_and_recorded_hidden_states_are_dense() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        short, long = model(ids(1, 7)).logits, model(ids(1, TOKENS), output_hidden_states=True)
        slimformer.patch(model, RANDOM)
        torch.testing.assert_close(model(ids(1, 7)).logits, short, atol=1e-6, rtol=0)
        slim = model(ids(1, TOKENS), output_hidden_states=True)
    assert [state.shape for state in slim.hidden_states] == [state.shape for state in long.hidden_states]
    torch.testing.assert_close(slim.logits, long.logits, atol=1e-6, rtol=0)


def test_undo_is_exact_and_plans_carry_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        dense = model(ids()).logits
        slimformer.patch(model, RANDOM)
        slim = model(ids()).logits
        Plan([RANDOM, LayerDrop(mlp=[1])]).save_pretrained(tmp_path)
        assert Plan.from_pretrained(tmp_path).methods == (RANDOM, LayerDrop(mlp=[1]))
        slimformer.patch(model, Plan([RANDOM]))
        assert torch.equal(model(ids()).logits, slim)
        assert torch.equal(slimformer.unpatch(model)(ids()).logits, dense)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": None}, "takes layers and numbers"),
        ({"schedule": {0: 0.5}}, "layers from 1 up"),
        ({"schedule": {1: 0.0}}, "above 0 and up to 1"),
        ({"schedule": {1: 1.5}}, "above 0 and up to 1"),
        ({"schedule": {1: 0.3, 2: 0.5}}, "must not grow"),
        ({"schedule": {1: 0.5}, "scorer": "best"}, "one of attention, norm, predictor, random"),
        ({"schedule": {1: 0.5}, "block": 0}, "from 1 up"),
        ({"schedule": {1: 0.5}, "window": 0}, "from 1 up"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        TokenElimination(**settings)


def test_a_method_without_a_schedule_is_for_calibration_alone() -> None:
    with pytest.raises(PlanError, match=r"at least one layer.* chooses them"):
        slimformer.patch(tiny_model("llama"), TokenElimination(scorer="norm"))


def with_unknown_projections(model: nn.Module) -> nn.Module:
    """The same model, whose attentions have a child more, which may do anything."""
    for layer in find_anatomy(model).layers:
        layer.attention.self.add_module("gate", nn.Linear(32, 1))
    return model


def test_models_and_caches_that_cannot_lose_tokens_are_refused() -> None:
    with pytest.raises(PlanError, match=r"at least one layer.* chooses them"):
        slimformer.patch(tiny_model("llama"), TokenElimination(scorer="norm"))
    with pytest.raises(PlanError, match="allowed are 1 to 3"):
        slimformer.patch(tiny_model("llama"), TokenElimination({7: 0.5}))
    for name in ("gemma2", "modernbert"):
        with pytest.raises(PlanError, match="sliding window"):
            slimformer.patch(tiny_model(name), RANDOM)
    with pytest.raises(PlanError, match="projections that are not known"):
        slimformer.patch(with_unknown_projections(tiny_model("bert")), RANDOM)


def test_the_layer_that_counts_positions_keeps_every_token() -> None:
    drop = LayerDrop(attention=[0])
    with pytest.raises(PlanError, match="Positions are counted in the cache of layer 1"):
        slimformer.patch(tiny_model("llama"), drop, TokenElimination({1: 0.5}))
    slimformer.patch(tiny_model("llama"), drop, TokenElimination({2: 0.5}))

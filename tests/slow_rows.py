"""Chosen rows the slow way: every sublayer computes every token, and a mask says whose result counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimformer import LayerDrop
from slimformer.calls.layer_calls import layer_calls
from slimformer.changes.ledger import Ledger
from slimformer.methods.elimination.random_keep import RandomKeep, chances
from slimformer.model.anatomy import find_anatomy, positional_names
from slimformer.model.layer_parts import KINDS, Kind, Parts, Structure
from tiny_models import DECODERS, tiny_model

TOKENS = 24
# Where the text of every row begins, and its length; longer than the sliding windows of the tiny models.
LAYOUTS = {
    "none": [(0, 24), (0, 24), (0, 24)],
    "left": [(5, 19), (0, 24), (21, 3)],
    "right": [(0, 19), (0, 24), (0, 3)],
    "mixed": [(5, 19), (0, 20), (3, 11)],
}
# Windows shorter than the texts, and attention scores large enough that a scale or a cap on them counts.
OWN = {
    "modernbert": {"local_attention": 12},
    "gemma2": {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.0},
    "gemma3_text": {"query_pre_attn_scalar": 4},
}
# Tokens that a sublayer computes, bool [batch, tokens]; a sublayer that is not named computes all.
Keep = Mapping[tuple[int, Kind], Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread, above all where something else runs on its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(name: str, **overrides: object) -> PreTrainedModel:
    """The tiny model with weights under which every sublayer, bias and norm counts."""
    model = tiny_model(name, **{**OWN.get(name, {}), **overrides})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for table in (m for path, m in model.named_modules() if path.endswith("relative_attention_bias")):
            table.weight.normal_(generator=generator)
        for weight in find_anatomy(model).layers.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.add_(noise * 0.2)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return model


def batch(name: str, layout: str) -> dict[str, Tensor]:
    """Texts of one layout, as a tokenizer and `generate` hand them to a model."""
    return arguments(name, LAYOUTS[layout])


def arguments(name: str, texts: list[tuple[int, int]], tokens: int = TOKENS) -> dict[str, Tensor]:
    """Random ids, their mask, and for decoders their position ids."""
    ids = torch.randint(3, 64, (len(texts), tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, (begin, length) in zip(mask, texts, strict=True):
        row[begin : begin + length] = 1
    given = {"input_ids": ids * mask, "attention_mask": mask}
    return {**given, "position_ids": positions(mask)} if name in DECODERS else given


def positions(mask: Tensor) -> Tensor:
    """The position of every token in its text, 0 at padding in front."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def outputs(model: nn.Module, given: Mapping[str, Any], **more: object) -> Tensor:
    """Logits, or an encoder's last hidden states, `[batch, tokens, ...]`."""
    with torch.no_grad():
        return graded(model, given, **more)


def graded(model: nn.Module, given: Mapping[str, Any], **more: object) -> Tensor:
    """The same with gradients."""
    out = model(**given, **more)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def error(actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """The relative norm of the difference, at real tokens."""
    assert actual.shape == expected.shape
    if mask is not None:
        actual, expected = actual[mask.bool()], expected[mask.bool()]
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@contextlib.contextmanager
def rows_through(*linears: nn.Module) -> Iterator[list[int]]:
    """How many rows each linear layer gets, in the order of the calls.

    The layers are of a class of their own meanwhile, as adapters are; under hooks they would get all tokens.
    """
    found: list[int] = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            found.append(x.shape[:-1].numel())
            return super().forward(x)

    for linear in linears:
        assert type(linear) is nn.Linear
        linear.__class__ = Counting
    try:
        yield found
    finally:
        for linear in linears:
            linear.__class__ = nn.Linear


# The first linear layer of the MLP, and the one that makes queries.
LINEARS = {
    "llama": ("mlp.gate_proj", "self_attn.q_proj"),
    "phi": ("mlp.fc1", "self_attn.q_proj"),
    "bert": ("intermediate.dense", "attention.self.query"),
    "mpnet": ("intermediate.dense", "attention.attn.q"),
    "distilbert": ("ffn.lin1", "attention.q_lin"),
    "modernbert": ("mlp.Wi", "attn.Wqkv"),
}


def linears(model: nn.Module, name: str, kind: Kind) -> list[nn.Module]:
    """The layer of `LINEARS` in every layer of the model."""
    path = LINEARS[name][kind == "attention"]
    return [layer.get_submodule(path) for layer in find_anatomy(model).layers]


def kept(method: RandomKeep, places: Tensor) -> dict[tuple[int, Kind], Tensor]:
    """What a `RandomKeep` chooses among tokens at `places` `[batch, tokens]`, by its documentation."""
    masks = {}
    for index in range(4) if method.layers is None else method.layers:
        for kind in method.kinds:
            seed = 2 * index + KINDS.index(kind) + 1_000_003 * method.seed
            chance = chances(places.flatten(), seed).view(places.shape)
            if method.counts == "ragged":
                masks[index, kind] = chance < method.keep
            else:
                order = chance.argsort(1)
                best = order[:, : max(round(method.keep * places.shape[1]), 1)]
                masks[index, kind] = torch.zeros_like(places, dtype=torch.bool).scatter_(1, best, True)
    return masks


def both(first: Keep, second: Keep) -> dict[tuple[int, Kind], Tensor]:
    """Tokens that two choices keep."""
    ones = {name: torch.ones_like(mask) for name, mask in (*first.items(), *second.items())}
    return {name: first.get(name, one) & second.get(name, one) for name, one in ones.items()}


def nothing(drop: LayerDrop, places: Tensor) -> dict[tuple[int, Kind], Tensor]:
    """Dropped sublayers as ones that keep no token."""
    none = torch.zeros_like(places, dtype=torch.bool)
    return {(index, kind): none for kind in KINDS for index in drop.dropped(kind)}


@contextlib.contextmanager
def slowly(model: nn.Module, keep: Keep, compact: Tensor | None = None) -> Iterator[None]:
    """Run the model's layers the slow way.

    Args:
        model: The model, which is not patched.
        keep: The tokens that sublayers compute.
        compact: The real tokens `[batch, tokens]`, if those that an attention passes by are to be no keys either.
    """
    anatomy, ledger = find_anatomy(model), Ledger()
    calls = layer_calls(anatomy)
    returns = 0 if calls is None else calls.returns
    for index, layer in enumerate(anatomy.layers):
        own = {kind: keep[index, kind] for kind in KINDS if (index, kind) in keep}
        ledger.set_forward(
            layer, partial(_forward, layer, anatomy.structure, own, compact, anatomy.causal, returns)
        )
    try:
        yield
    finally:
        ledger.undo()


def _forward(
    layer: nn.Module,
    structure: Structure,
    keep: Mapping[Kind, Tensor],
    compact: Tensor | None,
    causal: bool,
    returns: int,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    names = positional_names(layer)[1:]
    kwargs.update(zip(names, args, strict=False))
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        kwargs.pop(name, None)
    if compact is not None and "attention" in keep:
        kwargs["attention_mask"] = _mask_of(keep["attention"], compact, causal).to(x.dtype)
    parallel, start = structure.is_parallel(layer), x
    for kind in KINDS:
        source = start if parallel else x
        after = _after(layer, structure.parts(kind), source, kwargs if kind == "attention" else {})
        after = after - source + x if parallel else after
        x = torch.where(keep[kind][..., None], after, x) if kind in keep else after
    return (x, *[None] * (returns - 1)) if returns else x


def _after(layer: nn.Module, parts: Parts, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The residual after a sublayer that computes every token, without dropout."""
    h = x if parts.norm_before is None else getattr(layer, parts.norm_before)(x)
    y = getattr(layer, parts.module)(h, **kwargs)
    y = y[0] if isinstance(y, tuple) else y
    if parts.whole:
        return y
    if parts.projection is not None:
        return getattr(layer, parts.projection)(y, x)
    if parts.norm_after is not None:
        y = getattr(layer, parts.norm_after)(y)
    return x + y if parts.outer_norm is None else getattr(layer, parts.outer_norm)(x + y)


def _mask_of(keep: Tensor, real: Tensor, causal: bool) -> Tensor:
    """What is added to attention scores so that only kept, real tokens are keys, `[batch, 1, tokens, tokens]`."""
    tokens = keep.shape[1]
    allowed = (keep & real.bool())[:, None, :].expand(-1, tokens, -1)
    allowed = allowed.tril() if causal else allowed
    # Tokens that are passed by must see something, and nobody reads the result.
    allowed = allowed | (torch.eye(tokens, dtype=torch.bool) & ~(keep & real.bool())[..., None])
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]

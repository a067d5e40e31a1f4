"""What transforms change about one attention module's scores, and the attention function that does it.

The module keeps its own `forward`. Its `config` is a copy that names the attention function registered here, which
changes queries and scale and then calls the function that the model had, or lets an extension attend instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slimformer.calls.texts import Texts, current_texts

# Where a module carries its `Scores`.
SCORES = "_slimformer_scores"
_FUNCTION = "slimformer"


class QueryFactor(Protocol):
    """A factor on every query that depends on the length of its text or on its place in it."""

    def applies(self, texts: Texts) -> bool:
        """Whether any factor may differ from 1; must not wait for the device."""
        ...

    def factors(self, places: Tensor, lengths: Tensor, causal: bool) -> Tensor:
        """Factors float32 like `places`, the place of each query in its text, and `lengths`, of those texts."""
        ...


class Extension(Protocol):
    """Attention with relative positions of its own, in the layout of `slimformer_kernels.attention_rows`."""

    def applies(self, texts: Texts) -> bool:
        """Whether some text of this forward pass needs it.

        Raises:
            DataError: If a text is longer than it reaches, or stands where its places cannot be counted.
        """
        ...

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        query_offsets: Tensor,
        key_ranges: Tensor,
        longest: int,
        causal: bool,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of `query` `[queries, heads, head_dim]`; arguments and result are those of `attention_rows`."""
        ...


@dataclass
class Scores:
    """How one attention module's scores are made, beyond what the module itself does.

    Attributes:
        config: The module's own config, which names the model's attention function; None if it has none.
        causal: Whether the model is a decoder.
        scale: A factor on all scores, bias included.
        query_factors: Factors that depend on the text.
        extension: What attends to texts longer than the model was trained for.
    """

    config: Any
    causal: bool
    scale: float = 1.0
    query_factors: list[QueryFactor] = field(default_factory=list)
    extension: Extension | None = None

    @property
    def implementation(self) -> Any:
        """The name of the model's own attention function."""
        return getattr(self.config, "_attn_implementation", None)

    def redirected(self) -> Any:
        """A copy of the module's config that names the function of this file."""
        if _FUNCTION not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(_FUNCTION, transformed_attention)
        config = copy.copy(self.config)
        # The property would set it in configs inside this one too, which the copy shares.
        config._attn_implementation_internal = _FUNCTION
        return config

    def factors(self, texts: Texts, tokens: Tensor | None = None) -> Tensor | None:
        """The product of all query factors, float32 `[batch * tokens]` or `[len(tokens)]`; None where all are 1.

        Args:
            texts: Those of the forward pass.
            tokens: Which of the `batch * tokens` tokens, int64; None for all in order.
        """
        active = [factor for factor in self.query_factors if factor.applies(texts)]
        if not active:
            return None
        places = texts.places().flatten()
        lengths = texts.lengths.repeat_interleave(texts.tokens)
        if tokens is not None:
            places, lengths = places.index_select(0, tokens), lengths.index_select(0, tokens)
        product = active[0].factors(places, lengths, self.causal)
        for factor in active[1:]:
            product = product * factor.factors(places, lengths, self.causal)
        return product

    def extended(self, texts: Texts) -> Extension | None:
        """The extension, where some text needs it."""
        return self.extension if self.extension is not None and self.extension.applies(texts) else None


def scores_of(core: nn.Module) -> Scores | None:
    """What transforms have changed about a module's scores."""
    found: Scores | None = vars(core).get(SCORES)
    return found


def own_config(core: nn.Module) -> Any:
    """A module's own config, whether transforms stand in front of its attention function or not; None without one."""
    scores = scores_of(core)
    return getattr(core, "config", None) if scores is None else scores.config


def own_implementation(core: nn.Module) -> Any:
    """The name of a module's own attention function, whether transforms stand in front of it or not."""
    return getattr(own_config(core), "_attn_implementation", None)


def own_eager_attention(core: nn.Module) -> Any:
    """The function that a module falls back to, from the file that its class is in."""
    forward = type(core).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward.__globals__.get("eager_attention_forward")


def transformed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of modules with `Scores`: arguments and results are those of transformers' own.

    Args:
        module: The attention module.
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`.
        value: The same.
        attention_mask: Made for the model's own function.
        scaling: Factor on the products of queries and keys.
        kwargs: What else the model's own function takes; a `position_bias` counts as part of the scores.

    Returns:
        `[batch, queries, heads, head_dim]`, and attention weights where the model's own function gives any.
    """
    scores: Scores = vars(module)[SCORES]
    batch, heads, tokens, width = query.shape
    scale = (width**-0.5 if scaling is None else scaling) * scores.scale
    texts = current_texts(batch, tokens, query.device)
    factors = scores.factors(texts)
    if factors is not None:
        # Texts are where the stack got them; a layer of a model on several devices may be elsewhere.
        factors = factors.to(query.device)
        query = (query * factors.view(batch, 1, tokens, 1)).to(key.dtype)
    extension = scores.extended(texts)
    if extension is not None:
        output = _extended(extension, scores, query, key, value, texts, scale, kwargs)
        return output.view(batch, tokens, heads, -1), None
    bias = kwargs.get("position_bias")
    if bias is not None:
        bias = (
            bias * scores.scale
            if factors is None
            else bias * scores.scale * factors.view(batch, 1, tokens, 1)
        )
        kwargs["position_bias"] = bias.to(query.dtype)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
        scores.implementation, own_eager_attention(module)
    )
    found: tuple[Tensor, Tensor | None] = function(
        _Before(module, scores.config), query, key, value, attention_mask, scaling=scale, **kwargs
    )
    return found


class _Before:
    """A module as it looks to the model's own attention function: with the config that it had."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _extended(
    extension: Extension,
    scores: Scores,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    texts: Texts,
    scale: float,
    kwargs: dict[str, Any],
) -> Tensor:
    """An extension's attention of a padded batch, `[batch * tokens, heads, head_dim]`."""
    positions, offsets, ranges = texts.layout
    return extension.attend(
        query.transpose(1, 2).flatten(0, 1),
        key.transpose(1, 2),
        value.transpose(1, 2),
        positions.to(query.device),
        offsets.to(query.device),
        ranges.to(query.device),
        texts.tokens,
        scores.causal,
        scale,
        # What the model itself does: its SDPA function has no cap (5.16 leaves it out, 5.23 refuses).
        None if scores.implementation == "sdpa" else kwargs.get("softcap"),
    )

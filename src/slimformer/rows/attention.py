"""Attention for some of the rows: queries of chosen tokens, keys and values of all that are in the stream.

A table says where an attention module keeps its projections. What stands in no row of it, or computes something else
with the same names, keeps its own `forward`, for all tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slimformer.cache.room import room_of
from slimformer.cache.slots import extended, layer_cache
from slimformer.cache.steps import Step, current_step
from slimformer.calls.texts import current_texts
from slimformer.model.anatomy import positional_names
from slimformer.model.projections import Projections, Rotation
from slimformer.rows.projections import RowProjections
from slimformer.rows.rows import Rows
from slimformer.rows.score_bias import ScoreBias
from slimformer.rows.scores import Extension, own_eager_attention, own_implementation, scores_of
from slimformer.rows.sdpa_backend import fastest_backend
from slimformer.rows.shorter_cache import ShorterLayer, ShorterStaticLayer, shorter_layer
from slimformer.rows.stream import Stream, in_a_graph
from slimformer_kernels.attention_blocks import WIDEST_HEAD
from slimformer_kernels.attention_rows import attention_rows_op
from slimformer_kernels.attention_rows_reference import attention_rows_reference
from slimformer_kernels.dispatch import runs_kernel
from slimformer_kernels.step_linear import InputNorm


@dataclass
class RowAttention:
    """Runs an attention module's layers on the rows that are asked for.

    Attributes:
        core: The module that calls the attention function.
        projections: The row of the table that it matches.
        rotation: Which channels rotation pairs, if there is any.
    """

    core: nn.Module
    projections: Projections
    rotation: Rotation = "halves"

    def __post_init__(self) -> None:
        config = getattr(self.core, "config", None)
        self.layers = RowProjections(self.core, self.projections, self.rotation)
        self.head_dim = self.layers.head_dim
        self.scale = float(getattr(self.core, "scaling", self.head_dim**-0.5))
        self.window: int | None = getattr(
            self.core, "sliding_window", getattr(config, "sliding_window", None)
        )
        self.softcap: float | None = getattr(self.core, "attn_logit_softcapping", None)
        self.names = set(positional_names(self.core)) | {"use_cache", "hidden_states"}
        self.eager = own_eager_attention(self.core)
        self.transformed = changed = scores_of(self.core)
        # The attention function multiplies by what transforms ask for itself.
        self.row_scale = self.scale * (1.0 if changed is None else changed.scale)
        # Relative positions are counted among all keys, so that none may be missing.
        self.counts_keys = changed is not None and changed.extension is not None

    @property
    def slot(self) -> int:
        """The attention's slot in the cache, which other methods may have moved."""
        return int(getattr(self.core, "layer_idx", 0))

    def can_choose_rows(self, stream: Stream, kwargs: dict[str, Any]) -> bool:
        """Whether the arguments of this call say which keys a chosen query sees."""
        cache, mask = self.cache_of(kwargs), kwargs.get("attention_mask")
        if self.core.training or kwargs.get("output_attentions") or kwargs.get("cu_seq_lens_q") is not None:
            return False
        if self.projections.bias is not None and (cache is not None or in_a_graph(stream.device)):
            return False
        if stream.shorter:
            return True
        if getattr(cache, "is_compileable", False):
            return False
        if mask is None:
            # Flash attention finds the texts of a packed row by itself.
            return "flash" not in str(own_implementation(self.core)) or stream.tokens == 1
        return stream.key_ranges(mask, self.window) is not None

    def may_be_skipped(self, x: Tensor) -> bool:
        """Whether a step of the rows `x` `[rows, hidden]` reads no weight of queries where none of them is wanted."""
        return self.layers.may_be_skipped(x)

    def whole(
        self,
        h: Tensor,
        stream: Stream,
        kwargs: dict[str, Any],
        kernels: bool,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """All rows of a stream that has lost none, through the model's own attention function.

        Args:
            h: The normed residual `[batch * tokens, hidden]`.
            stream: What the rows are.
            kwargs: The layer's arguments.
            kernels: Whether to run kernels where there are any.
            wanted: The rows whose result counts, bool `[batch * tokens]`; None for all.

        Returns:
            `[batch * tokens, hidden]`, or `[batch * tokens, heads * head_dim]` where the output layer lies outside,
            and the attention weights if the function gives any.
        """
        q, k, v = self.layers.queries_keys_values(h, h, None, None, stream, kwargs, kernels, wanted)
        shape = (stream.batch, stream.tokens, -1, self.head_dim)
        k, v = (t.view(shape).transpose(1, 2) for t in (k, v))
        cache, step = self.cache_of(kwargs), current_step()
        if cache is not None:
            k, v = extended(cache, self.slot, k, v)
        if step is not None:
            return self.layers.output(self._attended(step, q, k, v, stream).flatten(1), wanted), None
        q = q.view(shape).transpose(1, 2)
        mask = kwargs.get("attention_mask")
        if self.projections.bias is not None:
            factors = self._factors(None, stream)
            q = q if factors is None else (q * factors.view(stream.batch, 1, -1, 1)).to(q.dtype)
            bias, wants = self._bias(stream, kwargs, factors), bool(kwargs.get("output_attentions"))
            output, weights = bias.attend_all(q, k, v, mask, self.row_scale, wants)
            return self.layers.output(output.reshape(h.shape[0], -1), wanted), weights
        rest = {name: value for name, value in kwargs.items() if name not in self.names}
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            getattr(getattr(self.core, "config", None), "_attn_implementation", None), self.eager
        )
        fast = kernels and own_implementation(self.core) == "sdpa"
        fastest = fastest_backend(q, k, mask) if fast else contextlib.nullcontext()
        with fastest:
            output, weights = function(
                self.core,
                q,
                k,
                v,
                mask,
                dropout=0.0,
                scaling=self.scale,
                sliding_window=self.window,
                softcap=self.softcap,
                **rest,
            )
        return self.layers.output(output.reshape(h.shape[0], -1), wanted), weights

    def fits_a_step(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether `in_step` computes what `whole` does."""
        return self.layers.fits_a_step(x) and room_of(self.cache_of(kwargs), self.slot) is not None

    def in_step(
        self, step: Step, x: Tensor, norm: InputNorm | None, stream: Stream, kwargs: dict[str, Any]
    ) -> Tensor:
        """The heads of a step's few rows, in front of the output layer.

        Args:
            step: The step.
            x: The residual `[rows, hidden]`, or what has gone through the norm.
            norm: The norm in front; None where it has been computed.
            stream: What the rows are.
            kwargs: The layer's arguments.

        Returns:
            `[rows, heads * head_dim]`.
        """
        room: Any = room_of(self.cache_of(kwargs), self.slot)
        q = self.layers.in_step(x, norm, stream, kwargs, room, step.place_in(self.slot))
        return self._attended(step, q, room[0], room[1], stream).flatten(1)

    def _attended(self, step: Step, q: Tensor, keys: Tensor, values: Tensor, stream: Stream) -> Tensor:
        """Attention of a step's queries `[rows, heads, head_dim]` over all of a room."""
        q, _, extension = self._transformed(q, None, stream)
        if extension is None:
            return step.attend(self.slot, q, keys, values, self.row_scale, self.window, self._cap)
        where = (*current_texts(stream.batch, stream.tokens, stream.device).layout, stream.tokens, True)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        return extension.attend(q, keys, values, *where, self.row_scale, self._cap)

    def keep_keys(self, h: Tensor, stream: Stream, cache: Cache, kwargs: dict[str, Any]) -> None:
        """Put the keys and values of all rows `h` `[batch * tokens, hidden]` into the cache, for later queries."""
        k, v = self.layers.keys_values(h, stream, kwargs)
        shape = (stream.batch, stream.tokens, -1, self.head_dim)
        extended(cache, self.slot, k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2))

    def chosen(
        self,
        h_query: Tensor,
        h_key: Tensor,
        rows: Rows | None,
        stream: Stream,
        kwargs: dict[str, Any],
        *,
        kernels: bool,
        compact_keys: bool = False,
    ) -> Tensor:
        """Chosen rows, or all rows of a stream that has lost some.

        Args:
            h_query: The normed residual of the chosen rows `[kept, hidden]`.
            h_key: That of the rows which supply keys and values: the whole stream's, or the chosen ones'.
            rows: The chosen rows of the stream; None for all.
            stream: What the rows are.
            kwargs: The layer's arguments.
            kernels: Whether to run kernels where there are any.
            compact_keys: Whether only the chosen rows supply keys and values.

        Returns:
            As `whole`, for the chosen rows.
        """
        key_rows = rows if compact_keys else None
        q, k, v = self.layers.queries_keys_values(h_query, h_key, rows, key_rows, stream, kwargs, kernels)
        cache, mask = self.cache_of(kwargs), kwargs.get("attention_mask")
        q, factors, extension = self._transformed(q, rows, stream)
        if cache is not None and stream.shorter:
            layer = shorter_layer(cache, self.slot, mask)
            if layer.store(k, v, stream):
                return self.layers.output(self._behind_past(q, rows, stream, layer).flatten(1))
        if (cache is None or stream.shorter) and (compact_keys or stream.held is not None):
            # Every sequence's keys lie behind those of the sequence before.
            ranges, keys, values = stream.ranges(key_rows), k[None], v[None]
            positions = rows.index if rows is not None and not compact_keys else _count(q, stream)
        else:
            shape = (stream.batch, stream.tokens, -1, self.head_dim)
            keys, values = (stream.padded(t).view(shape) for t in (k, v))
            if cache is not None:
                keys, values = keys.transpose(1, 2), values.transpose(1, 2)
                keys, values = extended(cache, self.slot, keys, values)
                keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            total = keys.shape[1]
            known = None if mask is None else stream.key_ranges(mask, self.window)
            # Made on the device: a copy from the host could not be captured in a CUDA graph.
            everything = (torch.arange(2, device=q.device) * total).expand(stream.batch, 2)
            ranges = everything if known is None else known
            token = stream.token_of(None if rows is None else rows.index)
            if token is None:
                token = _count(q, stream)
            positions = token % stream.tokens + (total - stream.tokens)
        where = (
            positions,
            stream.offsets(rows),
            ranges,
            stream.tokens if rows is None or rows.each is None else rows.each,
            stream.causal,
            self.row_scale,
        )
        if self.projections.bias is not None:
            bias = self._bias(stream, kwargs, factors)
            token = None
            if compact_keys or stream.held is not None:
                token = stream.token_of(None if key_rows is None else key_rows.index)
            seen = bias.attend(q, keys, values, rows, token, ranges, stream, self.row_scale)
            return self.layers.output(seen.flatten(1))
        if extension is not None:
            return self.layers.output(extension.attend(q, keys, values, *where, self._cap).flatten(1))
        # Encoders' kernels and masks count the distance that is still seen.
        window = self.window if self.window is None or stream.causal else self.window - 1
        # Without the checks of `attention_rows`, which take as long as the launch.
        fits = runs_kernel(q, keys, values) and self.head_dim <= WIDEST_HEAD
        attend = attention_rows_op if fits else attention_rows_reference
        return self.layers.output(attend(q, keys, values, *where, window, self._cap).flatten(1))

    def _transformed(
        self, q: Tensor, rows: Rows | None, stream: Stream
    ) -> tuple[Tensor, Tensor | None, Extension | None]:
        """Queries `[rows, heads, head_dim]` as transforms want them.

        Returns:
            Them, the factors in them, `[rows]` if there are any, and what attends instead, if anything does.
        """
        factors = self._factors(rows, stream)
        if factors is not None:
            q = (q * factors[:, None, None]).to(q.dtype)
        if self.transformed is None:
            return q, None, None
        return (
            q,
            factors,
            self.transformed.extended(current_texts(stream.batch, stream.tokens, stream.device)),
        )

    def _factors(self, rows: Rows | None, stream: Stream) -> Tensor | None:
        """What transforms multiply the queries of some rows with, float32 `[rows]`; None where that is 1."""
        if self.transformed is None:
            return None
        texts = current_texts(stream.batch, stream.tokens, stream.device)
        return self.transformed.factors(texts, stream.token_of(None if rows is None else rows.index))

    def _bias(self, stream: Stream, kwargs: dict[str, Any], factors: Tensor | None) -> ScoreBias:
        """What is added to the scores of queries with these factors."""
        values = kwargs.get(str(self.projections.bias))
        if values is None:
            values = torch.zeros(1, 1, stream.tokens, stream.tokens, device=stream.device)
        return ScoreBias(values, 1.0 if self.transformed is None else self.transformed.scale, factors)

    def _behind_past(
        self, q: Tensor, rows: Rows | None, stream: Stream, layer: ShorterLayer | ShorterStaticLayer
    ) -> Tensor:
        """Attention of a later chunk of a prompt, whose earlier chunks have left gaps in the cache."""
        slots, valid = stream.slots()
        if rows is not None:
            q = q.new_zeros(stream.rows, *q.shape[1:]).index_copy_(0, rows.index, q)
        # Fillers must see something, and nobody reads the result.
        mask = layer.seen_by(stream) | ~valid[:, None, :, None]
        queries = stream.filled_up(q)
        groups = queries.shape[1] // layer.keys.shape[1]
        keys, values = (t.repeat_interleave(groups, 1) for t in (layer.keys, layer.values))
        if self._cap is None:
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.row_scale)
        else:
            logits = self._capped((queries @ keys.mT).float() * self.row_scale)
            out = logits.masked_fill(~mask, float("-inf")).softmax(-1).to(values.dtype) @ values
        out = out.transpose(1, 2).flatten(0, 1).index_select(0, slots)
        return out if rows is None else out.index_select(0, rows.index)

    def scores(self, h: Tensor, stream: Stream, queries: Tensor, real: Tensor, heads: str = "sum") -> Tensor:
        """How much attention chosen tokens pay to every token of their text.

        Args:
            h: The normed residual of all tokens `[batch * tokens, hidden]`, zeros at those that left the stream.
            stream: What the tokens are.
            queries: Which tokens ask, int64 `[batch, asking]`; -1 for none.
            real: Which tokens may be seen, bool `[batch, tokens]`.
            heads: Whether the `"sum"` over heads counts, or the `"max"`.

        Returns:
            Softmax weights summed over queries, over heads as said, float32 `[batch, tokens]`.
        """
        weights = self.weights(h, stream, queries, real).sum(2)
        return weights.sum(1) if heads == "sum" else weights.amax(1)

    def weights(self, h: Tensor, stream: Stream, queries: Tensor, real: Tensor) -> Tensor:
        """Softmax weights of chosen queries, float32 `[batch, heads, asking, tokens]`; arguments as in `scores`."""
        q, k = self.queries_and_keys(h, stream)
        asking = queries.clamp_min(0)[:, None, :, None].expand(-1, q.shape[1], -1, self.head_dim)
        q = q.gather(2, asking)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = self._capped((q @ k.mT).float() * self.row_scale)
        if self.projections.bias is not None:
            factors = self._factors(None, dataclasses.replace(stream, held=None, full=None))
            bias = self._bias(stream, dict(stream.arguments), factors)
            logits = logits + bias.at(queries.clamp_min(0)).float()
        seen = real[:, None, None, :] & (queries >= 0)[:, None, :, None]
        token = torch.arange(stream.tokens, device=h.device)
        if stream.causal:
            seen = seen & (token <= queries[:, None, :, None])
        if self.window is not None:
            seen = seen & ((token - queries[:, None, :, None]).abs() < self.window)
        return logits.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)

    def key_norms(self, h: Tensor, stream: Stream) -> Tensor:
        """The mean norm of every token's keys, float32 `[batch, tokens]`, from `h` as in `scores`."""
        return self.queries_and_keys(h, stream)[1].float().norm(dim=-1).mean(1)

    def queries_and_keys(self, h: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys of all tokens `[batch, heads, tokens, head_dim]`, from `h` as in `scores`."""
        whole = dataclasses.replace(stream, held=None, full=None)
        q, k, _ = self.layers.queries_keys_values(
            h, h, None, None, whole, dict(stream.arguments), kernels=False
        )
        q, _, _ = self._transformed(q, None, whole)
        shape = (stream.batch, stream.tokens, -1, self.head_dim)
        return q.view(shape).transpose(1, 2), k.view(shape).transpose(1, 2)

    @property
    def _cap(self) -> float | None:
        """The cap on logits. SDPA functions of models have none: 5.16 leaves it out, 5.23 refuses."""
        return None if own_implementation(self.core) == "sdpa" else self.softcap

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self._cap
        return logits if cap is None else cap * (logits / cap).tanh()

    @staticmethod
    def cache_of(kwargs: dict[str, Any]) -> Cache | None:
        """The key-value cache among the layer's arguments."""
        return layer_cache(kwargs)


def _count(q: Tensor, stream: Stream) -> Tensor:
    """0 to the number of queries, made once per stream."""
    key = ("count", q.shape[0])
    if key not in stream.known:
        stream.known[key] = torch.arange(q.shape[0], device=q.device)
    found: Tensor = stream.known[key]
    return found

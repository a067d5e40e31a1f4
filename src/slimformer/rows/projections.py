"""The linear layers of an attention on some of the rows: queries, keys and values, rotated, and the output behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimformer.model.projections import Projections, Rotation
from slimformer.rows.linear_steps import linear_step, may_be_skipped
from slimformer.rows.norms import RowNorms
from slimformer.rows.rows import Rows
from slimformer.rows.step_layers import added, input_norm, is_plain
from slimformer.rows.stream import Stream
from slimformer_kernels import cache_rotary_, step_linear
from slimformer_kernels.cache_rotary import HeadNorms
from slimformer_kernels.rotary import rotary_op, rotary_reference
from slimformer_kernels.step_linear import InputNorm


@dataclass
class RowProjections:
    """Runs an attention module's own layers one by one; they are looked up in every call.

    Attributes:
        core: The module that calls the attention function.
        projections: The row of the table that it matches.
        rotation: Which channels rotation pairs, if there is any.
        norms: The norms of queries and keys.
        head_dim: The size of each head.
    """

    core: nn.Module
    projections: Projections
    rotation: Rotation
    norms: RowNorms = field(init=False)
    head_dim: int = field(init=False)

    def __post_init__(self) -> None:
        self.norms = RowNorms(self.core, self.projections.norms or ())
        sizes = ("head_dim", "attention_head_size", "head_size")
        self.head_dim = next(int(getattr(self.core, name)) for name in sizes if hasattr(self.core, name))

    def may_be_skipped(self, x: Tensor) -> bool:
        """Whether a step of the rows `x` `[rows, hidden]` reads no weight of queries where none of them is wanted."""
        return may_be_skipped(getattr(self.core, self.projections.query), x)

    def queries_keys_values(
        self,
        h_query: Tensor,
        h_key: Tensor,
        rows: Rows | None,
        key_rows: Rows | None,
        stream: Stream,
        kwargs: dict[str, Any],
        kernels: bool,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[rows, heads, head_dim]`, rotated to their original positions.

        Args:
            h_query: The normed residual of the rows that ask `[rows, hidden]`.
            h_key: That of the rows which supply keys and values.
            rows: Which rows ask; None for all of the stream.
            key_rows: Which rows supply keys and values, likewise.
            stream: What the rows are.
            kwargs: The layer's arguments.
            kernels: Whether to run kernels where there are any.
            wanted: The rows whose result counts, bool `[rows]`; None for all.
        """
        p, core = self.projections, self.core
        if p.key is None or p.value is None:
            q, k, v = self._packed(h_query, h_key, rows, key_rows)
        else:
            q = linear_step(getattr(core, p.query), h_query, wanted)
            k, v = (getattr(core, name)(h_key) for name in (p.key, p.value))
        if p.norms is not None:
            q, k = (self._normed(name, t, kernels) for name, t in zip(p.norms, (q, k), strict=True))
        q, k, v = (t.view(t.shape[0], t.shape[-1] // self.head_dim, self.head_dim) for t in (q, k, v))
        positions = kwargs.get("position_embeddings")
        if positions is None or self.rotation == "none":
            return q, k, v
        interleaved = self.rotation != "halves"
        cos, sin = stream.rotary(positions, spread=self.rotation == "neighbours, angles in halves")
        query_token = stream.token_of(None if rows is None else rows.index)
        key_token = stream.token_of(None if key_rows is None else key_rows.index)
        if kernels:
            # Without the checks of `rotary_`, which take three times as long as the launch.
            if query_token is key_token:
                rotary_op(q, k, cos, sin, query_token, interleaved)
            else:
                rotary_op(q, None, cos, sin, query_token, interleaved)
                rotary_op(k, None, cos, sin, key_token, interleaved)
            return q, k, v
        q = rotary_reference(q, cos, sin, query_token, interleaved)
        return q, rotary_reference(k, cos, sin, key_token, interleaved), v

    def fits_a_step(self, x: Tensor) -> bool:
        """Whether `in_step` computes what the module does."""
        if self.projections.packed == "by head" or not all(is_plain(layer, x) for layer in self._inputs()):
            return False
        return self.projections.norms is None or self._head_norms(x) is not None

    def in_step(
        self,
        x: Tensor,
        norm: InputNorm | None,
        stream: Stream,
        kwargs: dict[str, Any],
        room: tuple[Tensor, Tensor],
        place: Tensor,
    ) -> Tensor:
        """Rotated queries of a step's few rows `[rows, heads, head_dim]`; keys and values go where they will stay.

        Args:
            x: Their residual `[rows, hidden]`, or what has gone through the norm.
            norm: The norm in front; None where it has been computed.
            stream: What the rows are.
            kwargs: The layer's arguments.
            room: All of the cache's keys and values `[batch, kv_heads, places, head_dim]`.
            place: Where those of the new tokens go `[tokens]`.
        """
        packed = step_linear(x, [(layer.weight, layer.bias) for layer in self._inputs()], norm)
        keys, values = (t.transpose(1, 2) for t in room)
        width = keys.shape[2] * self.head_dim
        parts = packed.split([packed.shape[1] - 2 * width, width, width], dim=1)
        q, k, v = (t.view(len(x), -1, self.head_dim) for t in parts)
        positions, rotation = kwargs.get("position_embeddings"), None
        if positions is not None and self.rotation != "none":
            rotation = stream.rotary(positions, spread=self.rotation == "neighbours, angles in halves")
        cache_rotary_(
            q, k, v, keys, values, place,
            rotation=rotation, interleaved=self.rotation != "halves", norms=self._head_norms(x),
        )  # fmt: skip
        return q

    def _inputs(self) -> list[Any]:
        """The layers that make queries, keys and values; one where one makes all."""
        p = self.projections
        names = [p.query] if p.key is None or p.value is None else [p.query, p.key, p.value]
        return [getattr(self.core, name) for name in names]

    def added(self, x: Tensor, heads: Tensor) -> Tensor | None:
        """The residual `x` `[rows, hidden]` plus the output layer; None where there is more than that behind heads."""
        p = self.projections
        return None if p.output is None else added(getattr(self.core, p.output), x, heads)

    def _head_norms(self, x: Tensor) -> HeadNorms | None:
        """The norms over each head of queries and keys; None where there are none, or others."""
        names = self.projections.norms
        if names is None:
            return None
        query, key = (input_norm(self.norms, name, x) for name in names)
        if query is None or key is None or query[1:] != key[1:]:
            return None
        if query.weight.numel() != self.head_dim or key.weight.numel() != self.head_dim:
            return None
        return HeadNorms(query.weight, key.weight, query.eps, query.offset)

    def keys_values(self, h: Tensor, stream: Stream, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values `[rows, heads, head_dim]`, of all rows of a stream that has lost none."""
        p, core = self.projections, self.core
        if p.key is None or p.value is None:
            _, k, v = self._packed(h, h, None, None)
        else:
            k, v = getattr(core, p.key)(h), getattr(core, p.value)(h)
        if p.norms is not None:
            k = self._normed(p.norms[1], k, kernels=False)
        k, v = k.unflatten(-1, (-1, self.head_dim)), v.unflatten(-1, (-1, self.head_dim))
        positions = kwargs.get("position_embeddings")
        if positions is None or self.rotation == "none":
            return k, v
        cos, sin = stream.rotary(positions, spread=self.rotation == "neighbours, angles in halves")
        return rotary_reference(k, cos, sin, None, self.rotation != "halves"), v

    def _packed(
        self, h_query: Tensor, h_key: Tensor, rows: Rows | None, key_rows: Rows | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three from one layer `[rows, heads * head_dim]`."""
        layer = getattr(self.core, self.projections.query)
        groups = int(getattr(self.core, "num_key_value_groups", 1))
        if self.projections.packed == "by head":
            by_head = layer(h_key).view(h_key.shape[0], -1, 3, self.head_dim)
            q, k, v = (by_head[:, :, part].flatten(1) for part in range(3))
            return (q if rows is key_rows or rows is None else q.index_select(0, rows.index)), k, v
        if rows is not key_rows and type(layer) is nn.Linear:
            # Rows of a weight are a view of it: keys of all tokens and queries of some cost no more than that.
            width = layer.out_features * groups // (groups + 2)
            bias = layer.bias
            q = nn.functional.linear(h_query, layer.weight[:width], None if bias is None else bias[:width])
            rest = nn.functional.linear(h_key, layer.weight[width:], None if bias is None else bias[width:])
            k, v = rest.chunk(2, dim=-1)
            return q, k, v
        packed = layer(h_key)
        width = packed.shape[-1] * groups // (groups + 2)
        q, k, v = packed.split([width, (packed.shape[-1] - width) // 2, (packed.shape[-1] - width) // 2], -1)
        if rows is not key_rows and rows is not None:
            q = q.index_select(0, rows.index)
        return q, k, v

    def _normed(self, name: str, x: Tensor, kernels: bool) -> Tensor:
        """A norm over each head, or over all of them at once, as its weight's size says."""
        weight = getattr(getattr(self.core, name), "weight", None)
        width = x.shape[-1] if weight is None else int(weight.numel())
        return self.norms(name, x.reshape(-1, width), None, kernels).view(x.shape)

    def output(self, heads: Tensor, wanted: Tensor | None = None) -> Tensor:
        """What the module makes of its heads' output `[rows, heads * head_dim]`; `wanted` as above."""
        p = self.projections
        if p.output is None:
            return heads
        y = linear_step(getattr(self.core, p.output), heads, wanted)
        return y if p.dropout is None else getattr(self.core, p.dropout)(y)

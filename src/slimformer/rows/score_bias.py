"""Attention whose scores have a bias for every pair of places in the batch, as MPNet's relative positions give it.

The module gets the bias as an argument, `[1 or batch, heads, tokens, tokens]`. Where padding or other rows are left
out, every query and key takes its part of it, by the places that they have in the padded batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream


@dataclass(frozen=True)
class ScoreBias:
    """A bias, and what is done to it before it is added to the scores.

    Attributes:
        values: `[1 or batch, heads, tokens, tokens]`, by places in the padded batch.
        scale: A factor on it.
        factors: Further ones for the queries that ask, float32 `[queries]`; None for none.
    """

    values: Tensor
    scale: float = 1.0
    factors: Tensor | None = None

    def attend_all(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of all tokens of the batch.

        Args:
            query: `[batch, heads, tokens, head_dim]`.
            key: The same.
            value: The same.
            mask: What is added to scores, `[batch, 1, 1 or tokens, tokens]`, or which keys are seen.
            scale: On the products of queries and keys.
            weights: Whether the attention weights are wanted.

        Returns:
            `[batch, tokens, heads, head_dim]`, and weights `[batch, heads, tokens, tokens]` where they are wanted.
        """
        factors = None if self.factors is None else self.factors.view(query.shape[0], 1, -1, 1)
        added = self._scaled(self.values, factors)
        if mask is not None and mask.dtype == torch.bool:
            added = added.masked_fill(~mask, torch.finfo(added.dtype).min)
        elif mask is not None:
            added = added + mask
        if weights:
            found = (query @ key.mT * scale + added.to(query.dtype)).softmax(-1)
            return (found @ value).transpose(1, 2), found
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=added.to(query.dtype), scale=scale)
        return out.transpose(1, 2), None

    def at(self, queries: Tensor) -> Tensor:
        """What is added to the scores `[batch, heads, asking, tokens]` of queries at places `[batch, asking]`."""
        batch, (_, heads, _, tokens) = len(queries), self.values.shape
        index = queries[:, None, :, None].expand(-1, heads, -1, tokens)
        factors = self.factors
        if factors is not None:
            factors = factors.view(batch, tokens).gather(1, queries)[:, None, :, None]
        return self._scaled(self.values.expand(batch, -1, -1, -1).gather(2, index), factors)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Rows | None,
        key_token: Tensor | None,
        ranges: Tensor,
        stream: Stream,
        scale: float,
    ) -> Tensor:
        """Attention of chosen queries.

        Args:
            query: `[queries, heads, head_dim]`.
            key: `[1, keys, heads, head_dim]` of all sequences behind each other, or `[batch, tokens, heads, head_dim]`.
            value: The same.
            rows: Which rows of the stream ask; None for all.
            key_token: Which of the `batch * tokens` tokens the keys behind each other are, int64 `[keys]`; None of keys
                that stand in the batch.
            ranges: First and last key (exclusive) of every sequence, int64 `[batch, 2]`.
            stream: What the rows are.
            scale: On the products of queries and keys.

        Returns:
            `[queries, heads, head_dim]`.
        """
        # Layers that share their rows share their part of the bias.
        known, name = stream.derived(rows), ("score bias", id(self.values), id(key_token))
        if name not in known:
            make = _Parts if query.device.type == "cpu" else _Padded
            token = stream.token_of(None if rows is None else rows.index)
            if token is None:
                token = torch.arange(stream.batch * stream.tokens, device=query.device)
            parts = make(
                self.values, token % stream.tokens, stream.offsets(rows), _places(key_token, stream), ranges
            )
            # Kept beside what is made of them, so that their identity stays their own.
            known[name] = (self.values, key_token, parts)
        parts = known[name][2]
        return parts.attend(self, query, key, value, scale)

    def _scaled(self, values: Tensor, factors: Tensor | None) -> Tensor:
        """Some of the values, as they are added, before the type of the scores."""
        values = values if self.scale == 1.0 else values * self.scale
        return values if factors is None else values * factors


def _places(token: Tensor | None, stream: Stream) -> Tensor | None:
    return None if token is None else token % stream.tokens


class _Parts:
    """The bias of every sequence's chosen queries and keys, for one call per sequence: what a CPU does soonest."""

    def __init__(
        self, values: Tensor, places: Tensor, offsets: Tensor, key_places: Tensor | None, ranges: Tensor
    ) -> None:
        """Cut the bias.

        Args:
            values: As of `ScoreBias`.
            places: Where in its padded row every query stands, int64 `[queries]`.
            offsets: Where every sequence's queries begin and end, int64 `[batch + 1]`.
            key_places: As `places` for keys behind each other; None of keys in the batch.
            ranges: First and last key (exclusive) of every sequence, int64 `[batch, 2]`.
        """
        bounds, self.parts = offsets.tolist(), list[tuple[slice, slice, Tensor]]()
        for b, (first, last) in enumerate(ranges.tolist()):
            own, keys = slice(bounds[b], bounds[b + 1]), slice(first, last)
            bias = _taken(values[b if values.shape[0] > 1 else 0], 1, places[own])
            seen = torch.arange(first, last) if key_places is None else key_places[keys]
            self.parts.append((own, keys, _taken(bias, 2, seen)))

    def attend(self, bias: ScoreBias, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `ScoreBias.attend`."""
        out = torch.zeros_like(query)
        for b, (own, keys, values) in enumerate(self.parts):
            if 0 in values.shape:
                continue
            home = 0 if key.shape[0] == 1 else b
            factors = None if bias.factors is None else bias.factors[own, None]
            added = bias._scaled(values, factors).to(query.dtype)[None]
            q, k, v = (t.transpose(0, 1)[None] for t in (query[own], key[home, keys], value[home, keys]))
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)
            out[own] = seen[0].transpose(0, 1)
        return out


class _Padded:
    """The same in one call, padded: a GPU computes padding sooner than it launches a call per sequence."""

    def __init__(
        self, values: Tensor, places: Tensor, offsets: Tensor, key_places: Tensor | None, ranges: Tensor
    ) -> None:
        """Gather the bias; arguments as of `_Parts`."""
        counts, (first, last) = offsets.diff(), ranges.long().unbind(1)
        # One wait for the device, for all layers.
        most, most_keys = torch.stack([counts.max(), (last - first).max()]).tolist()
        batch, device = len(counts), values.device
        sequences = torch.arange(batch, device=device)
        self.owner = sequences.repeat_interleave(counts, output_size=places.shape[0])
        self.place = torch.arange(places.shape[0], device=device) - offsets[:-1][self.owner]
        rows = torch.arange(most, device=device) + offsets[:-1, None]
        self.rows = rows.clamp_max(places.shape[0] - 1)
        keys = torch.arange(max(most_keys, 1), device=device)
        where = torch.minimum(first[:, None] + keys, last[:, None] - 1).clamp_min(0)
        self.hidden = (keys >= (last - first)[:, None])[:, None, None, :]
        seen = where if key_places is None else key_places[where]
        # Keys in the batch are found among those of all sequences.
        self.keys = where if key_places is not None else where + sequences[:, None] * values.shape[3]
        index = sequences if values.shape[0] > 1 else torch.zeros_like(sequences)
        bias = values[index[:, None, None], :, places[self.rows][:, :, None], seen[:, None, :]]
        self.values = bias.permute(0, 3, 1, 2).contiguous()
        self.added = self._with_hidden(self.values)

    def attend(self, bias: ScoreBias, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """As `ScoreBias.attend`."""
        batch, most = self.rows.shape
        q = query.index_select(0, self.rows.flatten()).unflatten(0, (batch, most)).transpose(1, 2)
        k, v = (
            t.flatten(0, 1).index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape).transpose(1, 2)
            for t in (key, value)
        )
        added = self.added
        if bias.scale != 1.0 or bias.factors is not None:
            factors = None if bias.factors is None else bias.factors[self.rows][:, None, :, None]
            added = self._with_hidden(bias._scaled(self.values, factors))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added.to(q.dtype), scale=scale)
        return out.transpose(1, 2)[self.owner, self.place]

    def _with_hidden(self, values: Tensor) -> Tensor:
        return values.masked_fill(self.hidden, torch.finfo(values.dtype).min)


def _taken(x: Tensor, dim: int, places: Tensor) -> Tensor:
    """The parts of `x` at ascending places, a view of it where these lie behind each other."""
    count = places.shape[0]
    if count and int(places[-1]) - int(places[0]) + 1 == count:
        return x.narrow(dim, int(places[0]), count)
    return x.index_select(dim, places)

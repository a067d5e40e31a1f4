"""One call of a layer: what its sublayers do to the residual, on the whole batch or on chosen rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from slimformer.cache.slots import has_foreign_cache
from slimformer.cache.steps import current_step
from slimformer.errors import PlanError
from slimformer.model.anatomy import attention_core
from slimformer.model.layer_parts import Kind
from slimformer.model.touched_modules import is_untouched
from slimformer.rows.attention import RowAttention
from slimformer.rows.mlp import GatedMlp
from slimformer.rows.rows import Rows
from slimformer.rows.step_layers import step_of_few
from slimformer.rows.stream import Stream, in_a_graph
from slimformer.runtime.sublayer import Sublayer, picked
from slimformer.runtime.sublayers import RowSublayers
from slimformer_kernels import add_rows_

# Above this part of all rows, and below this number of rows in the stream, computing all of them and using some is
# no slower (see the mlp_rows and executor_rows benchmarks).
DENSE_ABOVE = 0.95
DENSE_BELOW_ROWS = 16


@dataclass(eq=False)
class Update:
    """What a sublayer does to the residual.

    Attributes:
        value: What is added to the rows, or their new residual `[..., hidden]`; `[hidden]` serves all rows.
        rows: Which rows; None for all.
        keep: Where `value` has all rows: which of them count, bool `[rows]`.
        replaces: Whether `value` is the new residual, as in post-norm layers.
    """

    value: Tensor
    rows: Rows | None = None
    keep: Tensor | None = None
    replaces: bool = False


@dataclass(eq=False)
class Run:
    """One call of a layer, on a residual `[batch, tokens, hidden]`, or `[rows, hidden]` where rows are computed alone.

    Attributes:
        sublayers: What each sublayer computes.
        kwargs: The layer's arguments.
        of: What is known about the layer's modules; None where these run as they are, on all tokens.
        stream: What the rows of the residual are; None where no rows are chosen.
        flat: Whether the residual is one of rows.
        kernels: Whether kernels run.
        parallel: Whether both sublayers read the same residual, so that neither may add to it.
        skips: Whether a sublayer is left out that no row wants, for which the choice must be read.
        cache: The key-value cache among the arguments, where it does.
        owned: Whether the residual was made in this call, so that it may be written to.
        weights: The attention weights, where the model's attention function gives any.
    """

    sublayers: dict[Kind, Sublayer]
    kwargs: dict[str, Any]
    of: RowSublayers | None = None
    stream: Stream | None = None
    flat: bool = False
    kernels: bool = False
    parallel: bool = False
    skips: bool = False
    cache: Cache | None = None
    owned: bool = False
    weights: Tensor | None = None
    _touched: dict[Kind, bool] = field(default_factory=dict)

    def touched(self, kind: Kind) -> bool:
        """Whether somebody has touched a module of the sublayer, so that it runs whole, as it is."""
        if kind not in self._touched:
            # In one graph hooks are compiled as they are found.
            self._touched[kind] = not torch.compiler.is_compiling() and self.sublayers[kind].called.touched()
        return self._touched[kind]

    def computed(
        self, kind: Kind, x: Tensor, rows: Rows | None, compact_keys: bool, normed: Tensor | None = None
    ) -> Update | None:
        """A sublayer of the residual `x`; None where no row wants it.

        Args:
            kind: Which sublayer.
            x: The residual.
            rows: The rows that count; None for all.
            compact_keys: Whether other rows supply no keys and values either.
            normed: The sublayer's input, where it is known already.
        """
        of, stream, sublayer = self.of, self.stream, self.sublayers[kind]
        if of is None or stream is None or not self.flat:
            keep = None if rows is None else rows.mask
            if keep is not None and self.skips and not bool(keep.any()) and self._left_out(sublayer, x):
                return None
            y, weights = sublayer.whole(x, self.kwargs)
            if kind == "attention":
                self.weights = weights
            return Update(y, rows, keep, sublayer.replaces)
        if self.touched(kind) and not (kind == "attention" and compact_keys):
            return self._whole(sublayer, stream, x, rows)
        if kind == "mlp":
            return self._mlp(of, stream, x, rows, normed)
        return self._attention(of, stream, x, rows, compact_keys)

    def after(self, kind: Kind, x: Tensor, rows: Rows | None) -> Tensor:
        """The residual `x` after a sublayer at some of its rows, or at all."""
        update = self.computed(kind, x, rows, compact_keys=False)
        return x if update is None else self.added(x, update)

    def replaced(self, kind: Kind, x: Tensor, replacement: Callable[..., Tensor] | None) -> Update | None:
        """What stands in for a sublayer that computes no rows."""
        if replacement is None:
            return None
        sublayer, stream = self.sublayers[kind], self.stream
        if not self.flat or stream is None:
            return Update(replacement(x, sublayer.normed(x), self.kwargs))
        normed = sublayer.normed_rows(x, None, stream, self.kernels)
        if getattr(replacement, "by_row", False):
            return Update(replacement(x, normed, self.kwargs))
        full = self._full(x)
        value = replacement(full, stream.padded(normed).view_as(full), self.kwargs)
        return Update(value if value.dim() == 1 else self._rows_of(value.expand_as(full)))

    def added(self, x: Tensor, update: Update) -> Tensor:
        """The residual `x` after an update."""
        value, rows = update.value, update.rows
        if rows is not None and value.dtype != x.dtype:
            # Under autocast a sublayer computes in another precision than the residual has.
            dtype = torch.promote_types(x.dtype, value.dtype)
            x, value = x.to(dtype), value.to(dtype)
        if rows is None:
            if not update.replaces:
                value = x.add_(value) if self._writes() else x + value
        elif update.keep is not None:
            keep = update.keep.view(*x.shape[:-1], 1)
            # One launch, as the addition alone would be.
            value = torch.where(keep, value, x) if update.replaces else torch.addcmul(x, value, keep)
        elif update.replaces:
            value = x.index_copy(0, rows.index, value)
        elif self._writes():
            value = add_rows_(x, rows.index, value)
        elif torch.is_grad_enabled():
            value = x.index_add(0, rows.index, value)
        else:
            value = add_rows_(x.clone(), rows.index, value)
        self.owned = self.flat
        return value

    def added_and_normed(self, x: Tensor, update: Update, kind: Kind) -> tuple[Tensor, Tensor | None]:
        """The residual after an update, and normed for the sublayer that reads it, if kernels do both at once."""
        apart = update.rows is not None or update.replaces or update.value.shape != x.shape
        if apart or self.touched(kind):
            return self.added(x, update), None
        self.owned = True
        return self.sublayers[kind].added_and_normed(x, update.value)

    def added_both(self, x: Tensor, attention: Update | None, mlp: Update | None) -> Tensor:
        """The residual after the updates of two sublayers that read the same one."""
        if self.stream is None and attention is not None and mlp is not None:
            # In the order in which these layers add them up themselves.
            return mlp.value + attention.value + x
        for update in (attention, mlp):
            x = x if update is None else self.added(x, update)
        return x

    def _whole(self, sublayer: Sublayer, stream: Stream, x: Tensor, rows: Rows | None) -> Update:
        """A sublayer of the rows `x` `[rows, hidden]` by its own modules on all tokens of the batch."""
        attends = sublayer.kind == "attention"
        if attends and stream.shorter:
            raise self._cannot_attend()
        y, weights = sublayer.whole(self._full(x), self.kwargs)
        if attends:
            self.weights = weights
        # Whoever has touched a module may have kept what it was given.
        self.owned = False
        return Update(self._rows_of(y), rows, None if rows is None else rows.mask, sublayer.replaces)

    def _left_out(self, sublayer: Sublayer, x: Tensor) -> bool:
        """Leave out what nobody wants of the residual `x` `[batch, tokens, hidden]`: all but the keys of an attention.

        Returns:
            False, with nothing done, where the module must be called.
        """
        if sublayer.called.touched():
            return False
        if sublayer.kind == "mlp":
            return True
        attention = None if self.of is None else self.of.attention
        if attention is None or self.stream is None or "_hf_hook" in vars(attention.core):
            return False
        if self.kwargs.get("output_attentions"):
            return False
        if self.cache is None:
            return not has_foreign_cache(self.kwargs)
        h = sublayer.structure.heads_input(sublayer.layer, x).reshape(-1, x.shape[-1])
        attention.keep_keys(h, self.stream, self.cache, self.kwargs)
        return True

    def _mlp(
        self, of: RowSublayers, stream: Stream, x: Tensor, rows: Rows | None, normed: Tensor | None
    ) -> Update:
        """The MLP of the chosen rows of the residual `x` `[rows, hidden]`, which may come normed already."""
        sublayer = self.sublayers["mlp"]
        rows, masked = self._worth_choosing(rows)
        if rows is None and of.gated is not None and step_of_few(x) is not None:
            update = self._gated_in_step(sublayer, of.gated, stream, x, normed)
            if update is not None:
                return update
        index = None if rows is None or masked else rows.index
        h = sublayer.normed_rows(x, index, stream, self.kernels) if normed is None else normed
        gated = of.gated
        step = masked and gated is not None and gated.may_be_skipped(h)
        if gated is not None and (self.kernels or step) and is_untouched(gated.module):
            if rows is None and self._writes() and sublayer.parts.adds_as_it_is and gated.add_to(x, h):
                return Update(x, replaces=True)
            y = gated(h, rows.mask if step and rows is not None else None)
        else:
            y = sublayer.output(h[None], self.kwargs)[0][0]
        return self._finished(sublayer, x, y, rows, masked)

    def _gated_in_step(
        self, sublayer: Sublayer, gated: GatedMlp, stream: Stream, x: Tensor, normed: Tensor | None
    ) -> Update | None:
        """A gated MLP of a step's few rows; None where its layers are no plain ones."""
        if not is_untouched(gated.module):
            return None
        h, norm = (normed, None) if normed is not None else sublayer.unnormed(x, stream, self.kernels)
        inner = gated.in_step(h, norm)
        if inner is None:
            return None
        total = gated.added(x, inner) if self._adds(sublayer) else None
        if total is not None:
            return Update(total, replaces=True)
        return self._finished(sublayer, x, gated.last(inner), None, False)

    def _adds(self, sublayer: Sublayer) -> bool:
        """Whether a sublayer's last layer may add to the residual itself."""
        return sublayer.parts.adds_as_it_is and not self.parallel

    def _attention(
        self, of: RowSublayers, stream: Stream, x: Tensor, rows: Rows | None, compact_keys: bool
    ) -> Update:
        """The attention of the chosen rows of the residual `x` `[rows, hidden]`."""
        sublayer, kwargs, by_rows = self.sublayers["attention"], self.kwargs, self._attention_alone()
        masked = False
        if compact_keys and rows is not None:
            self._check_compact_keys(by_rows, stream)
        else:
            rows, masked = self._worth_choosing(rows)
        chosen = None if masked else rows
        if chosen is None and stream.held is None:
            now = None if masked or by_rows is None else step_of_few(x)
            if now is not None and by_rows is not None and by_rows.fits_a_step(x, kwargs):
                heads = by_rows.in_step(now, *sublayer.unnormed(x, stream, self.kernels), stream, kwargs)
                total = by_rows.layers.added(x, heads) if self._adds(sublayer) else None
                if total is not None:
                    return Update(total, replaces=True)
                return self._finished(sublayer, x, by_rows.layers.output(heads), None, False, heads=True)
            step = rows is not None and by_rows is not None and by_rows.may_be_skipped(x)
            if by_rows is None or not (self.kernels or step or current_step() is not None):
                return self._by_module(sublayer, stream, x, rows, masked)
            h = sublayer.heads_input(x, None, stream, self.kernels)
            wanted = rows.mask if step and rows is not None else None
            y, self.weights = by_rows.whole(h, stream, kwargs, self.kernels, wanted)
        elif by_rows is None or not by_rows.can_choose_rows(stream, kwargs):
            if stream.shorter:
                raise self._cannot_attend()
            return self._by_module(sublayer, stream, x, rows, masked=rows is not None)
        else:
            index = None if chosen is None else chosen.index
            compact = compact_keys and chosen is not None
            h_key = sublayer.heads_input(x, index if compact else None, stream, self.kernels)
            y = by_rows.chosen(
                h_key if compact else picked(h_key, index),
                h_key,
                chosen,
                stream,
                kwargs,
                kernels=self.kernels,
                compact_keys=compact,
            )
        return self._finished(sublayer, x, y, rows, masked, heads=True)

    def _by_module(
        self, sublayer: Sublayer, stream: Stream, x: Tensor, rows: Rows | None, masked: bool
    ) -> Update:
        """All tokens of the batch through the attention module, whatever rows count."""
        # The layer's own modules see the stream as it was, with zeros for tokens that have left.
        h = stream.padded(sublayer.normed_rows(x, None, stream, self.kernels))
        y, self.weights = sublayer.output(h.view(stream.batch, stream.tokens, -1), self.kwargs)
        return self._finished(sublayer, x, self._rows_of(y), rows, masked)

    def _finished(
        self, sublayer: Sublayer, x: Tensor, y: Tensor, rows: Rows | None, masked: bool, heads: bool = False
    ) -> Update:
        """What the module's output `y` `[rows, hidden]` does to the residual `x` `[rows, hidden]`."""
        before = picked(x, None if rows is None or masked or not sublayer.replaces else rows.index)
        keep = rows.mask if masked and rows is not None else None
        return Update(sublayer.behind(y, before, self.kernels, heads), rows, keep, sublayer.replaces)

    def _full(self, x: Tensor) -> Tensor:
        """The rows `x` `[rows, hidden]` at their places `[batch, tokens, hidden]`, zeros elsewhere."""
        stream = self.stream
        return x if stream is None else stream.padded(x).view(stream.batch, stream.tokens, -1)

    def _rows_of(self, y: Tensor) -> Tensor:
        """The rows of the stream out of `[batch, tokens, hidden]`."""
        held = None if self.stream is None else self.stream.held
        return picked(y.reshape(-1, y.shape[-1]), None if held is None else held.index)

    def _worth_choosing(self, rows: Rows | None) -> tuple[Rows | None, bool]:
        """The rows, and whether all are to be computed although only those count."""
        if rows is None:
            return None, False
        if rows.total < DENSE_BELOW_ROWS or (rows.known_count is None and in_a_graph(rows.mask.device)):
            return rows, True
        count = rows.index.shape[0]
        return (None, False) if count == rows.total else (rows, count > DENSE_ABOVE * rows.total)

    def _writes(self) -> bool:
        """Whether the residual is this call's own and no gradient needs what it was."""
        return self.owned and not torch.is_grad_enabled()

    def _attention_alone(self) -> RowAttention | None:
        """What runs the attention's layers one by one; None where its module must be called."""
        of = self.of
        if of is None or of.attention is None or self.touched("attention") or has_foreign_cache(self.kwargs):
            return None
        return of.attention if is_untouched(attention_core(of.layer, of.structure)) else None

    def _cannot_attend(self) -> PlanError:
        attention = self.sublayers["attention"]
        name = type(attention_core(attention.layer, attention.structure)).__name__
        return PlanError(
            f"Tokens have left the stream, and {name} cannot compute the others alone: it has "
            "hooks or a forward of its own. Remove them, or patch the model without elimination."
        )

    def _check_compact_keys(self, by_rows: RowAttention | None, stream: Stream) -> None:
        possible = by_rows is not None and by_rows.can_choose_rows(stream, self.kwargs)
        if by_rows is None or not possible or by_rows.window is not None or by_rows.counts_keys:
            layer = self.sublayers["attention"].layer
            raise PlanError(
                f"{type(layer).__name__} cannot leave rows out of its keys in this call: its attention must "
                "be one whose projections are known, without a sliding window or SelfExtend, in evaluation mode, "
                "with padding at the ends only and without output_attentions. Use dense keys."
            )
        if by_rows.cache_of(self.kwargs) is not None:
            raise PlanError(
                "Rows that supply no keys cannot be left out of a key-value cache, which later steps read by "
                "position. Pass use_cache=False, or use dense keys."
            )

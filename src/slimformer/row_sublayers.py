"""The two sublayers of a layer for chosen rows: norm with gather, linear layers, residual addition with scatter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer

from slimformer.anatomy import attention_core
from slimformer.attention import RowAttention, for_attention
from slimformer.cache import has_foreign_cache, layer_cache
from slimformer.errors import PlanError
from slimformer.gated_mlp import GatedMlp
from slimformer.row_norms import RowNorms
from slimformer.rows import Rows
from slimformer.stream import Stream, in_a_graph
from slimformer.structures import KINDS, Kind, Structure
from slimformer.touched_modules import CalledModules, is_untouched, takes_rows
from slimformer.whole_sublayers import residual_after, whole_sublayer
from slimformer_kernels import add_rows_
from slimformer_kernels.dispatch import HAS_TRITON, KERNEL_DTYPES

# Above this part of all rows, and below this number of rows in the stream, computing all of them and using some is
# no slower (see the mlp_rows and executor_rows benchmarks).
DENSE_ABOVE = 0.95
DENSE_BELOW_ROWS = 16
# Below this many numbers in the residual a GPU waits for the CPU: what counts is how many kernels are launched, not
# what they do (SmolLM2's MLP at 4096 tokens on an H100: 0.2 ms launched one by one, 0.1 ms from a CUDA graph).
KERNELS_FROM_ELEMENTS = 2**22
_BERT_OUTPUT = {"dense", "LayerNorm", "dropout"}


@dataclass
class Update:
    """What a sublayer does to the residual.

    Attributes:
        value: What is added to the rows, or their new residual `[kept, hidden]`; `[hidden]` serves all rows.
        rows: Which rows; None for all.
        masked: Whether `value` has all rows, of which only those in `rows` count.
        replaces: Whether `value` is the new residual, as in post-norm layers.
    """

    value: Tensor
    rows: Rows | None = None
    masked: bool = False
    replaces: bool = False


@dataclass
class RowSublayers:
    """What is known about a layer's modules, found once when the model is patched.

    Attributes:
        layer: The layer, whose parts are looked up anew in every call.
        structure: The row of the structure table that says what the parts are.
        causal: Whether the model is a decoder.
        attention: Runs the attention for chosen rows; None where its module fits no row of the table.
        gated: The fused form of the MLP, if it is a gated one.
        norms: The norms among the layer's children.
        output_norms: The norms of output modules as BERT has them.
        counted: Whether the layer runs before the cache counts a call's tokens.
        called: The modules of each sublayer, which may have been touched.
        stack: Those of all layers of the model.
    """

    layer: nn.Module
    structure: Structure
    causal: bool
    attention: RowAttention | None = None
    gated: GatedMlp | None = None
    counted: bool = False
    stack: tuple[CalledModules, ...] = field(default=(), repr=False)
    called: dict[Kind, CalledModules] = field(init=False, repr=False)
    norms: RowNorms = field(init=False)
    output_norms: dict[Kind, RowNorms] = field(init=False)

    def __post_init__(self) -> None:
        parts = (self.structure.attention, self.structure.mlp)
        self.called = {
            kind: CalledModules(self.layer, tuple(sorted(self.structure.parts(kind).children())))
            for kind in KINDS
        }
        names = {name for p in parts for name in (p.norm_before, p.norm_after, p.outer_norm)}
        self.norms = RowNorms(self.layer, tuple(sorted(name for name in names if name is not None)))
        self.output_norms = {}
        outputs: list[tuple[Kind, nn.Module | None]] = []
        if self.structure.attention.whole:
            outputs.append(("attention", getattr(self.structure.attention.of(self.layer), "output", None)))
        if self.structure.mlp.projection is not None:
            outputs.append(("mlp", getattr(self.layer, self.structure.mlp.projection)))
        for kind, output in outputs:
            # BERT's: linear layer, dropout, norm of the sum with the residual.
            if output is not None and {n for n, _ in output.named_children()} == _BERT_OUTPUT:
                self.output_norms[kind] = RowNorms(output, ("LayerNorm",))

    def renewed(self, counted: bool) -> RowSublayers:
        """The same for the modules as they are now.

        Args:
            counted: Whether the layer runs before the cache counts a call's tokens.
        """
        attention = None if self.attention is None else replace(self.attention)
        return replace(self, attention=attention, counted=counted)

    def cached_tokens(self, kwargs: dict[str, Any], earlier: int | Tensor) -> int | Tensor:
        """How many tokens this layer's slot of the cache holds.

        Args:
            kwargs: The layer's arguments.
            earlier: How many came in earlier calls, for slots that hold no keys of their own.
        """
        cache = layer_cache(kwargs)
        slot = getattr(attention_core(self.layer, self.structure), "layer_idx", None)
        if cache is None or slot is None:
            return 0
        if slot < len(cache.layers) and not isinstance(cache.layers[slot], (DynamicLayer, StaticLayer)):
            return earlier
        return cache.get_seq_length(slot)

    def earlier_tokens(self, kwargs: dict[str, Any], tokens: int) -> int | Tensor:
        """How many tokens came in earlier calls, by the first slot of the cache, from which no token leaves."""
        cache = layer_cache(kwargs)
        if cache is None:
            return 0
        return cache.get_seq_length() - (0 if self.counted else tokens)

    def looked_into(self) -> bool:
        """Whether somebody has touched a module of any layer, who is to see all tokens of the batch."""
        return any(modules.touched() for modules in self.stack)

    def may_be_skipped(self, x: Tensor) -> bool:
        """Whether a sublayer of a step of the rows `x` `[rows, hidden]` reads no weights where none is wanted."""
        attention, gated = self.attention, self.gated
        if attention is not None and attention.may_be_skipped(x):
            return True
        return gated is not None and gated.may_be_skipped(x)

    def begin(self, x: Tensor, stream: Stream, kwargs: dict[str, Any]) -> Run:
        """One call of the layer on the residual `x` `[rows, hidden]`."""
        return Run(self, stream, kwargs, uses_kernels(x, self.layer))


def uses_kernels(x: Tensor, layer: nn.Module) -> bool:
    """Whether a call on the residual `x` runs kernels, which know no gradients and no dropout.

    A compiled graph has its own; where the CPU is what takes the time, only a CUDA graph profits from ours. Graphs are
    warmed up and captured off the default stream.
    """
    if not x.is_cuda or layer.training or not HAS_TRITON or torch.is_grad_enabled():
        return False
    if (
        torch.compiler.is_compiling()
        or x.dtype not in KERNEL_DTYPES
        or torch.is_autocast_enabled(x.device.type)
    ):
        return False
    return x.numel() >= KERNELS_FROM_ELEMENTS or torch.cuda.current_stream(x.device).cuda_stream != 0


@dataclass
class Run:
    """One call of a layer.

    Attributes:
        of: What is known about the layer.
        stream: What the rows of the residual are.
        kwargs: The layer's arguments.
        kernels: Whether kernels run.
        owned: Whether the residual was made in this call, so that it may be written to.
        weights: The attention weights, where the model's attention function gives any.
    """

    of: RowSublayers
    stream: Stream
    kwargs: dict[str, Any]
    kernels: bool
    owned: bool = False
    weights: Tensor | None = None
    _touched: dict[Kind, bool] = field(default_factory=dict)

    def touched(self, kind: Kind) -> bool:
        """Whether somebody has touched a module of the sublayer, so that it runs whole, as it is."""
        if kind not in self._touched:
            # In one graph hooks are compiled as they are found.
            self._touched[kind] = not torch.compiler.is_compiling() and self.of.called[kind].touched()
        return self._touched[kind]

    def whole(self, kind: Kind, x: Tensor, rows: Rows | None) -> Update:
        """A sublayer by its own modules on all tokens of the batch, of which only the chosen rows count."""
        stream, of = self.stream, self.of
        if kind == "attention" and stream.shorter:
            raise self._cannot_attend()
        full = stream.padded(x).view(stream.batch, stream.tokens, -1)
        y, weights = whole_sublayer(of.layer, of.structure, kind, full, self.kwargs, self._normed_whole)
        if kind == "attention":
            self.weights = weights
        replaces = of.structure.parts(kind).post_norm
        if replaces:
            y = residual_after(of.layer, of.structure, kind, full, y)
        held = None if stream.held is None else stream.held.index
        return Update(self._picked(y.reshape(-1, y.shape[-1]), held), rows, rows is not None, replaces)

    def _normed_whole(self, kind: Kind, x: Tensor) -> Tensor:
        norm = self.of.structure.parts(kind).norm_before
        return x if norm is None else self.of.layer.get_submodule(norm)(x)

    def mlp(self, x: Tensor, rows: Rows | None, normed: Tensor | None = None) -> Update:
        """The MLP of the chosen rows of the residual `x` `[rows, hidden]`, which may come normed already."""
        parts, layer = self.of.structure.mlp, self.of.layer
        rows, masked = self._worth_choosing(rows)
        index = None if rows is None or masked else rows.index
        h = self._normed("mlp", x, index) if normed is None else normed
        module = parts.of(layer)
        step = masked and self.of.gated is not None and self.of.gated.may_be_skipped(h)
        if (self.kernels or step) and self.of.gated is not None and is_untouched(module):
            alone = rows is None and self._writes() and parts.adds_as_it_is
            if alone and self.of.gated.add_to(x, h):
                return Update(x, replaces=True)
            y = self.of.gated(h, rows.mask if step and rows is not None else None)
        else:
            y = parts.by_token(layer, h[None])[0]
        if parts.projection is not None:
            y = self._projected("mlp", getattr(layer, parts.projection), y, self._picked(x, index))
        return self._finished("mlp", x, y, rows, masked)

    def attention(self, x: Tensor, rows: Rows | None, compact_keys: bool) -> Update:
        """The attention of the chosen rows of the residual `x` `[rows, hidden]`."""
        stream, kwargs = self.stream, self.kwargs
        core = attention_core(self.of.layer, self.of.structure)
        alone = is_untouched(core) and not self.touched("attention") and not has_foreign_cache(kwargs)
        by_rows = self.of.attention if alone else None
        masked = False
        if compact_keys and rows is not None:
            self._check_compact_keys(by_rows)
        else:
            rows, masked = self._worth_choosing(rows)
        chosen = None if masked else rows
        if chosen is None and stream.held is None:
            step = rows is not None and by_rows is not None and by_rows.may_be_skipped(x)
            if by_rows is None or not (self.kernels or step):
                return self._by_module(x, rows, masked)
            h, wanted = self._heads_input(x, None), rows.mask if step and rows is not None else None
            y, self.weights = by_rows.whole(h, stream, kwargs, self.kernels, wanted)
        elif by_rows is None or not by_rows.can_choose_rows(stream, kwargs):
            if stream.shorter:
                raise self._cannot_attend()
            return self._by_module(x, rows, masked=rows is not None)
        else:
            index = None if chosen is None else chosen.index
            compact = compact_keys and chosen is not None
            h_key = self._heads_input(x, index if compact else None)
            y = by_rows.chosen(
                h_key if compact else self._picked(h_key, index),
                h_key,
                chosen,
                stream,
                kwargs,
                kernels=self.kernels,
                compact_keys=compact,
            )
        if self.of.structure.attention.whole:
            # What BERT's attention module does behind the heads: output layer, residual and norm.
            before = self._picked(x, None if chosen is None else chosen.index)
            output = self.of.structure.attention.of(self.of.layer).get_submodule("output")
            y = self._projected("attention", output, y, before)
        return self._finished("attention", x, y, rows, masked)

    def _projected(self, kind: Kind, output: nn.Module, y: Tensor, before: Tensor) -> Tensor:
        """The output module of a post-norm layer: linear layer, residual addition and norm."""
        norms = self.of.output_norms.get(kind)
        if self.kernels and norms is not None and is_untouched(output):
            return norms.after_addition("LayerNorm", output.get_submodule("dense")(y), before)[1]
        projected: Tensor = output(y[None], before[None])[0]
        return projected

    def replaced(self, kind: Kind, x: Tensor, replacement: Callable[..., Tensor] | None) -> Update | None:
        """What stands in for a sublayer that computes no rows."""
        if replacement is None:
            return None
        if getattr(replacement, "by_row", False):
            return Update(replacement(x, self._normed(kind, x, None), self.kwargs))
        stream = self.stream
        full = stream.padded(x).view(stream.batch, stream.tokens, -1)
        normed = stream.padded(self._normed(kind, x, None)).view_as(full)
        value = replacement(full, normed, self.kwargs)
        if value.dim() > 1:
            value = value.expand_as(full).reshape(-1, x.shape[-1])
            value = self._picked(value, None if stream.held is None else stream.held.index)
        return Update(value)

    def added(self, x: Tensor, update: Update | None) -> Tensor:
        """The residual `x` `[rows, hidden]` after an update."""
        if update is None:
            return x
        value, rows = update.value, update.rows
        if value.dtype != x.dtype and rows is not None:
            # Under autocast a sublayer computes in another precision than the residual has.
            dtype = torch.promote_types(x.dtype, value.dtype)
            x, value = x.to(dtype), value.to(dtype)
        if rows is None:
            if not update.replaces:
                value = x.add_(value) if self._writes() else x + value
        elif update.masked:
            keep = rows.mask[:, None]
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
        self.owned = True
        return value

    def added_and_normed(self, x: Tensor, update: Update | None, kind: Kind) -> tuple[Tensor, Tensor | None]:
        """The residual after an update, and normed for the next sublayer if both can be done at once."""
        norm = self.of.structure.parts(kind).norm_before
        if update is None or norm is None or not self.kernels or update.rows is not None or update.replaces:
            return self.added(x, update), None
        if update.value.shape != x.shape:
            return self.added(x, update), None
        self.owned = True
        return self.of.norms.after_addition(norm, x, update.value)

    def _by_module(self, x: Tensor, rows: Rows | None, masked: bool) -> Update:
        """All tokens of the batch through the attention module, whatever rows count."""
        stream, parts, layer = self.stream, self.of.structure.attention, self.of.layer
        # The layer's own modules see the stream as it was, with zeros for tokens that have left.
        h = stream.padded(self._normed("attention", x, None)).view(stream.batch, stream.tokens, -1)
        module = parts.of(layer)
        output = module(h, **for_attention(self.kwargs, module))
        y = output[0] if isinstance(output, tuple) else output
        if isinstance(output, tuple) and len(output) > 1:
            self.weights = output[1]
        held = None if stream.held is None else stream.held.index
        y = self._picked(y.reshape(-1, y.shape[-1]), held)
        return self._finished("attention", x, y, rows, masked)

    def _finished(self, kind: Kind, x: Tensor, y: Tensor, rows: Rows | None, masked: bool) -> Update:
        """Norms and dropout behind the module, and for a post-norm sublayer the new residual."""
        parts, layer = self.of.structure.parts(kind), self.of.layer
        if parts.norm_after is not None:
            y = self.of.norms(parts.norm_after, y, None, self.kernels)
        if parts.dropout is not None:
            y = getattr(layer, parts.dropout)(y)
        y = parts.scaled(layer, y)
        if parts.outer_norm is not None:
            before = self._picked(x, None if rows is None or masked else rows.index)
            if self.kernels:
                y = self.of.norms.after_addition(parts.outer_norm, y, before)[1]
            else:
                y = getattr(layer, parts.outer_norm)(y + before)
        return Update(y, rows, masked, parts.post_norm)

    def _normed(self, kind: Kind, x: Tensor, index: Tensor | None) -> Tensor:
        norm = self.of.structure.parts(kind).norm_before
        if norm is None:
            return self._picked(x, index)
        module = getattr(self.of.layer, norm)
        if takes_rows(module):
            return self.of.norms(norm, x, index, self.kernels)
        return self._picked(self.stream.in_the_batch(module, x), index)

    def _heads_input(self, x: Tensor, index: Tensor | None) -> Tensor:
        """What queries, keys and values are made of: behind the norm, wherever it stands."""
        inner = self.of.structure.attention.inner_norm
        if inner is None:
            return self._normed("attention", x, index)
        normed: Tensor = self.of.structure.attention.of(self.of.layer).get_submodule(inner)(
            self._picked(x, index)
        )
        return normed

    @staticmethod
    def _picked(x: Tensor, index: Tensor | None) -> Tensor:
        return x if index is None else x.index_select(0, index)

    def _worth_choosing(self, rows: Rows | None) -> tuple[Rows | None, bool]:
        """The rows, and whether all are to be computed although only those count."""
        if rows is None:
            return None, False
        if rows.total < DENSE_BELOW_ROWS or (rows.known_count is None and in_a_graph(self.stream.device)):
            return rows, True
        count = rows.index.shape[0]
        return (None, False) if count == rows.total else (rows, count > DENSE_ABOVE * rows.total)

    def _writes(self) -> bool:
        """Whether the residual is this call's own and no gradient needs what it was."""
        return self.owned and not torch.is_grad_enabled()

    def _cannot_attend(self) -> PlanError:
        name = type(attention_core(self.of.layer, self.of.structure)).__name__
        return PlanError(
            f"Tokens have left the stream, and {name} cannot compute the others alone: it has "
            "hooks or a forward of its own. Remove them, or patch the model without elimination."
        )

    def _check_compact_keys(self, by_rows: RowAttention | None) -> None:
        possible = by_rows is not None and by_rows.can_choose_rows(self.stream, self.kwargs)
        if by_rows is None or not possible or by_rows.window is not None or by_rows.counts_keys:
            raise PlanError(
                f"{type(self.of.layer).__name__} cannot leave rows out of its keys in this call: its attention must "
                "be one whose projections are known, without a sliding window or SelfExtend, in evaluation mode, "
                "with padding at the ends only and without output_attentions. Use dense keys."
            )
        if by_rows.cache_of(self.kwargs) is not None:
            raise PlanError(
                "Rows that supply no keys cannot be left out of a key-value cache, which later steps read by "
                "position. Pass use_cache=False, or use dense keys."
            )

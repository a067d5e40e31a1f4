"""The patched layer: every sublayer asks its policies which rows to compute, and computes those.

A layer that no method touches keeps its own `forward`. A layer that one does gets `LayerExecutor.forward`, which
calls the layer's own modules by name at each step, so that adapters and quantised weights put there later are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from slimformer.anatomy import Anatomy, attention_core, positional_names
from slimformer.attention_scores import own_implementation
from slimformer.cache import Content, layer_cache, leave_slot_empty
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.layer_list import LayerList
from slimformer.ledger import Ledger
from slimformer.replacements import LinearFilter, keeps_state
from slimformer.row_selection import RowSelector, check_one_text_per_row, intersection
from slimformer.row_sublayers import RowSublayers, Run, Update, uses_kernels
from slimformer.rows import Rows
from slimformer.shorter_cache import mask_of_slot
from slimformer.stack_calls import Observed
from slimformer.stream import Stream, in_a_graph, leaving_under_gradients
from slimformer.structures import KINDS, Kind, Structure
from slimformer.touched_modules import has_own_forward
from slimformer.whole_sublayers import residual_after, whole_sublayer

# What stands in for a sublayer that computes no rows: (residual, normed input, layer arguments) -> addition. One with a
# true attribute `by_row` takes rows `[rows, hidden]` too.
Replacement = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass
class SublayerPlan:
    """What is decided for one sublayer.

    Attributes:
        compute: Whether any row is computed.
        replacement: Makes what is added instead where none is, given the layer, whether the model is a decoder,
            and the cache slot of the layer's attention.
        weights: What the replacement reads, put on the layer as buffers that its `state_dict` leaves out.
        rows: Name the rows to compute; those that all of them keep are. None of them means all rows.
        compact_keys: Whether rows that an attention does not compute supply no keys and values either.
        staying: Name the rows that stay in the stream from this layer on; no later layer computes the others. Read
            from the plan of the layer's attention, before which the others leave.
        leave_caches: Whether some of those others leave the caches of this layer and later ones too.
        changes: Names of parameters within the layer, and what each becomes. They count whatever else is decided.
        prepares: Get the whole model and its ledger when it is patched, each once, before its layers are.
    """

    compute: bool = True
    replacement: Callable[[nn.Module, bool, int], Replacement] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    rows: tuple[RowSelector, ...] = ()
    compact_keys: bool = False
    staying: tuple[RowSelector, ...] = ()
    leave_caches: bool = False
    changes: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()
    prepares: tuple[Callable[[Any, Ledger], None], ...] = ()

    def __and__(self, other: SublayerPlan) -> SublayerPlan:
        """Both decisions: what one drops is dropped, and rows are those that both keep.

        Raises:
            PlanError: If both leave something in the sublayer's place.
        """
        if not (self.compute and other.compute):
            gone = self if not self.compute else other
            if not (self.compute or other.compute):
                gone = self if other.replacement is None else other
                if self.replacement is not None and other.replacement is not None:
                    raise PlanError(
                        "Two methods leave something in place of the same sublayer, and only one can stand there. "
                        "Take the sublayer out of one of them."
                    )
            return SublayerPlan(
                False,
                gone.replacement,
                gone.weights,
                staying=self.staying + other.staying,
                leave_caches=self.leave_caches or other.leave_caches,
                changes=self.changes + other.changes,
                prepares=self.prepares + other.prepares,
            )
        return SublayerPlan(
            rows=self.rows + other.rows,
            compact_keys=self.compact_keys or other.compact_keys,
            staying=self.staying + other.staying,
            leave_caches=self.leave_caches or other.leave_caches,
            changes=self.changes + other.changes,
            prepares=self.prepares + other.prepares,
        )


@runtime_checkable
class TokenPolicy(Protocol):
    """A method that decides which rows sublayers compute."""

    def sublayer_plans(self, anatomy: Anatomy) -> dict[tuple[int, Kind], SublayerPlan]:
        """The decision for every sublayer it touches, keyed by (layer, kind).

        Raises:
            PlanError: If the method names what the model does not have.
        """
        ...


@dataclass
class LayerExecutor:
    """Runs one layer according to the plans of its two sublayers.

    Attributes:
        layer: The layer, whose parts are looked up anew in every call.
        structure: The row of the structure table that says what the parts are.
        sublayers: The plan of each sublayer.
        replacements: What stands in for sublayers that compute nothing.
        slot: The cache slot of the layer's attention, where it does not run and its replacement keeps no state there.
        by_rows: Runs sublayers for chosen rows and with kernels; None where every row is computed by the modules.
        dense: The forward that the layer had, for calls in which it does the same faster.
        chooses: Whether a policy names rows in this layer.
        shortens: Whether the cache of this layer may hold fewer tokens than the text has.
        last: Whether rows that left the stream come back behind this layer.
        all_layers: The layers that run after each other, this one among them.
        foreign: Whether the layer's `forward` is somebody else's, which computes the layer as it always did.
        observed: Says whether something reads what runs between the layers, so that no row may leave.
        chosen: The rows that policies named in the last call: all there were, and their mask or number.
        names: The layer's positional parameters behind the residual.
        returns: How many values the layer returns, the residual first; 0 for the residual alone, None for what its
            signature suggests.
        pads: Whether padding is computed, since it changes what layers give for text.
    """

    layer: nn.Module
    structure: Structure
    sublayers: dict[Kind, SublayerPlan] = field(
        default_factory=lambda: {kind: SublayerPlan() for kind in KINDS}
    )
    replacements: dict[Kind, Replacement] = field(default_factory=dict)
    slot: int | None = None
    by_rows: RowSublayers | None = None
    dense: Callable[..., Any] | None = None
    chooses: bool = False
    shortens: bool = False
    last: bool = False
    all_layers: LayerList | None = None
    foreign: bool = False
    observed: Observed | None = None
    chosen: dict[Kind, tuple[int, Tensor | int]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    returns: int | None = None
    pads: bool = False

    def __post_init__(self) -> None:
        if not self.structure.apart:
            raise UnsupportedModelError(
                f"The arithmetic of {type(self.layer).__name__} is not known, so that its sublayers cannot be run "
                "apart. LayerDrop, EarlyExit and TempScale apply to it; see slimformer.support(model)."
            )
        self.names = positional_names(self.layer)[1:]
        self.parallel = self.structure.is_parallel(self.layer)
        # MPNet's encoder indexes the layer's output; every other stack takes the tensor.
        if self.returns is None:
            self.returns = int("output_attentions" in self.names)
        self.returns_tuple = self.returns > 0

    def placed(self, anatomy: Anatomy, index: int, shorter_from: int) -> None:
        """Say where in the stack the layer is.

        Args:
            anatomy: The model's.
            index: Its own place.
            shorter_from: The first layer whose cache may hold fewer tokens than the text has.
        """
        self.chooses = any(plan.rows for plan in self.sublayers.values())
        self.shortens = index >= shorter_from
        self.all_layers = LayerList.of(anatomy)
        self.last = index == len(anatomy.layers) - 1
        self.pads = anatomy.reads_padding

    def install(self, ledger: Ledger, slot: int, counting: bool, causal: bool) -> None:
        """Put this in place of the layer's `forward`, with what replacements read.

        Args:
            ledger: Where changes are written down.
            slot: The cache slot of the layer's attention.
            counting: Whether positions are counted in the slot of this layer or a higher one.
            causal: Whether the model is a decoder.

        Raises:
            PlanError: If tokens are to leave that the layer's attention cannot do without.
        """
        for kind, plan in self.sublayers.items():
            if not plan.compute and plan.replacement is not None:
                self.replacements[kind] = plan.replacement(self.layer, causal, slot)
        if causal and not keeps_state(self.replacements.get("attention")):
            self.slot = slot
        if self.by_rows is not None:
            # Transforms have changed what attentions read since they were examined.
            self.by_rows = self.by_rows.renewed(counted=counting)
        if self.shortens:
            self._check_shortens()
        self.foreign = has_own_forward(self.layer)
        whole = all(plan.compute for plan in self.sublayers.values())
        if self.foreign and (self.chooses or self.shortens or not whole):
            raise PlanError(
                f"The forward of a layer in the plan, {type(self.layer).__name__}, was replaced by somebody else's, "
                "whose sublayers are not known: none can be dropped, and no token left out. Patch the model first and "
                "replace the forward then, or leave the layer out of the plan."
            )
        had = ledger.set_forward(self.layer, self.forward)
        if whole:
            self.dense = had

    def _check_shortens(self) -> None:
        """Refuse a layer whose attention cannot do without the tokens that leave."""
        attention = None if self.by_rows is None else self.by_rows.attention
        if attention is None or self.returns_tuple:
            raise PlanError(
                f"Tokens cannot leave the model: the attention of {type(self.layer).__name__} has projections that "
                "are not known."
            )
        if attention.counts_keys:
            raise PlanError(
                "Tokens cannot leave a model under SelfExtend, which counts positions among all keys of a text. Use "
                "RopeScaling for long texts with TokenElimination."
            )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the layer's `forward`, with the same arguments and the same kind of result."""
        if self.dense is not None and (self.foreign or (hidden_states.shape[1] == 1 and not self.chooses)):
            # A decode step (a stream that lost rows has more than one), or a layer that others have replaced.
            if self.shortens:
                kwargs = self._with_own_mask(
                    {**kwargs, **dict(zip(self.names[: len(args)], args, strict=True))}, 1
                )
                return self.dense(hidden_states, **kwargs)
            return self.dense(hidden_states, *args, **kwargs)
        if self.by_rows is not None and self._concerns_rows(hidden_states, args, kwargs):
            given = {**kwargs, **dict(zip(self.names[: len(args)], args, strict=True))}
            check_one_text_per_row(self.selectors(), given)
            stream = Stream.of(hidden_states, self.by_rows.causal, given)
            if stream.layer is None:
                stream.earlier = self.by_rows.earlier_tokens(given, hidden_states.shape[1])
            stream.layer = self.by_rows
            if self.shortens and not stream.shorter:
                given = self._with_own_mask(given, stream.tokens)
                stream.arguments = given
            stream, x = self._entered(stream, hidden_states)
            if self.chooses:
                stream.past = self.by_rows.cached_tokens(given, stream.earlier)
            kernels = uses_kernels(x, self.layer)
            if self.chooses and x.is_cuda and not kernels and self._may_mask(stream, x):
                return self._masked(x, stream, given)
            if self.chooses or stream.held is not None or kernels:
                return self._by_rows(x, stream, given)
            if self.shortens:
                args, kwargs = (), given
        if self.dense is not None:
            return self.dense(hidden_states, *args, **kwargs)
        kwargs.update(zip(self.names[: len(args)], args, strict=True))
        attention, weights = self.addition("attention", hidden_states, kwargs)
        if self.parallel:
            mlp, _ = self.addition("mlp", hidden_states, kwargs)
            additions = [a for a in (mlp, attention) if a is not None]
            output = sum(additions[1:], additions[0]) + hidden_states if additions else hidden_states
        else:
            hidden_states = self.residual("attention", hidden_states, attention)
            mlp, _ = self.addition("mlp", hidden_states, kwargs)
            output = self.residual("mlp", hidden_states, mlp)
        return self._returned(self.structure.finished(self.layer, output, kwargs), weights, kwargs)

    def addition(self, kind: Kind, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """What the sublayer adds to the residual `x` `[batch, tokens, hidden]`, and attention weights if any.

        For a post-norm sublayer whose module contains the norm, the first is the new residual itself.
        """
        if not self.sublayers[kind].compute:
            replacement = self.replacements.get(kind)
            if kind == "attention" and self.slot is not None:
                leave_slot_empty(layer_cache(kwargs), self.slot)
            return (None if replacement is None else replacement(x, self.normed(kind, x), kwargs)), None
        return whole_sublayer(self.layer, self.structure, kind, x, kwargs, self.normed)

    def normed(self, kind: Kind, x: Tensor) -> Tensor:
        """The sublayer's input: the residual behind the norm in front of it, if there is one."""
        norm = self.structure.parts(kind).norm_before
        if norm is None:
            return x
        if self.by_rows is not None and x.is_cuda:
            return self.by_rows.norms.fused(norm, x)
        return getattr(self.layer, norm)(x)

    def difference(self, kind: Kind, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Residual after the sublayer minus residual `x` before it `[batch, tokens, hidden]`."""
        y, _ = self.addition(kind, x, kwargs)
        if y is None:
            return torch.zeros_like(x)
        return self.residual(kind, x, y) - x if self.structure.parts(kind).post_norm else y

    def residual(self, kind: Kind, x: Tensor, y: Tensor | None) -> Tensor:
        """The residual after the sublayer."""
        if y is None:
            return x
        if not self.sublayers[kind].compute:
            return x + y
        return residual_after(self.layer, self.structure, kind, x, y)

    def computes(self, kind: Kind) -> str:
        """Which rows a sublayer computes, in two words."""
        plan = self.sublayers[kind]
        if not plan.compute:
            return "dropped"
        if self.foreign:
            return "all rows"
        if plan.rows:
            ratio = self.keep_ratio(kind)
            return "chosen rows" if ratio is None else f"chosen rows, {ratio:.1%} in the last call"
        attends = self.by_rows is not None and self.by_rows.attention is not None
        by_text = not self.returns_tuple and not self.pads
        return "text rows" if by_text and (kind == "mlp" or attends) else "all rows"

    def keep_ratio(self, kind: Kind) -> float | None:
        """The part of the rows that policies named in the last call; None before the first, and where none chooses."""
        if kind not in self.chosen:
            return None
        total, kept = self.chosen[kind]
        return int(kept if isinstance(kept, int) else kept.sum()) / max(total, 1)

    @property
    def in_cache(self) -> Content:
        """What the cache slot of the layer's attention holds."""
        if self.sublayers["attention"].compute:
            return "keys that stay" if self.shortens else "keys"
        replacement = self.replacements.get("attention")
        return (
            replacement.taps if isinstance(replacement, LinearFilter) and replacement.taps > 1 else "nothing"
        )

    def selectors(self) -> list[RowSelector]:
        """What names rows of this layer."""
        return [select for plan in self.sublayers.values() for select in (*plan.rows, *plan.staying)]

    def _concerns_rows(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call may do anything else than all rows by the model's own code."""
        if self.chooses or self.shortens or Stream.has_lost_rows(hidden):
            return True
        if hidden.shape[1] == 1:
            return False
        padded = self.sublayers["attention"].staying and (args or kwargs.get("attention_mask") is not None)
        return bool(padded) or uses_kernels(hidden, self.layer)

    def _with_own_mask(self, kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
        """The layer's arguments with a mask as long as its own cache."""
        core = attention_core(self.layer, self.structure)
        implementation = own_implementation(core)
        slot, mask = getattr(core, "layer_idx", None), kwargs.get("attention_mask")
        return {
            **kwargs,
            "attention_mask": mask_of_slot(layer_cache(kwargs), slot, tokens, mask, implementation),
        }

    def _entered(self, stream: Stream, hidden: Tensor) -> tuple[Stream, Tensor]:
        """The stream without the rows that leave before this layer, and its residual."""
        staying = self.sublayers["attention"].staying
        # Counted, since torch.compile does not know what an empty tuple is worth.
        if (
            len(staying) == 0
            or in_a_graph(hidden.device)
            or (torch.is_grad_enabled() and not leaving_under_gradients())
            or self.layer.training
            or (self.observed is not None and self.observed())
        ):
            return stream, hidden
        x = hidden.reshape(-1, hidden.shape[-1])
        for choose in staying:
            stream, x = stream.without(choose(stream, x), x)
        if stream.held is not None and self.all_layers is not None:
            self.all_layers.check()
        return stream, hidden if stream.held is None else x[None]

    def _by_rows(self, hidden: Tensor, stream: Stream, kwargs: dict[str, Any]) -> Any:
        """The layer on chosen rows; `hidden` is `[batch, tokens, hidden]`, or `[1, held, hidden]` when rows left."""
        by_rows, x = self.by_rows, hidden.reshape(-1, hidden.shape[-1])
        if by_rows is None:
            return None
        run = by_rows.begin(x, stream, kwargs)
        attention = self._update(run, "attention", x)
        if self.parallel:
            mlp = self._update(run, "mlp", x)
            x = run.added(run.added(x, attention), mlp)
        else:
            plan = self.sublayers["mlp"]
            fuse = plan.compute and len(plan.rows) == 0 and not run.touched("mlp")
            x, h = run.added_and_normed(x, attention, "mlp") if fuse else (run.added(x, attention), None)
            x = run.added(x, self._update(run, "mlp", x, h))
        x = self.structure.finished(self.layer, x, kwargs, stream.token_of(None))
        if self.last:
            output = stream.restored(x).view(stream.batch, stream.tokens, -1)
        else:
            output = stream.attach(x.view(hidden.shape))
        return self._returned(output, run.weights, kwargs)

    def _may_mask(self, stream: Stream, x: Tensor) -> bool:
        compact = self.sublayers["attention"].compact_keys
        if stream.held is not None or compact or torch.compiler.is_compiling():
            return False
        # A step that may read no weights is worth more launches.
        return self.by_rows is None or not self.by_rows.may_be_skipped(x.reshape(-1, x.shape[-1]))

    def _masked(self, x: Tensor, stream: Stream, kwargs: dict[str, Any]) -> Any:
        """The layer on all rows, of which the chosen ones count.

        For small models on a GPU, which wait for the CPU: gathering and scattering would be launches more, and this
        has none that the layer's own forward does not have.
        """
        rows = self._choose("attention", x, stream)
        attention, weights = self.addition("attention", x, kwargs)
        if self.parallel:
            mlp_rows, (mlp, _) = self._choose("mlp", x, stream), self.addition("mlp", x, kwargs)
            x = self._masked_residual("attention", x, attention, rows)
        else:
            x = self._masked_residual("attention", x, attention, rows)
            mlp_rows, (mlp, _) = self._choose("mlp", x, stream), self.addition("mlp", x, kwargs)
        output = self.structure.finished(self.layer, self._masked_residual("mlp", x, mlp, mlp_rows), kwargs)
        return self._returned(output if self.last else stream.attach(output), weights, kwargs)

    def _choose(self, kind: Kind, x: Tensor, stream: Stream) -> Rows | None:
        """The rows of the residual `x` `[..., hidden]` that policies name, kept in mind for `status`."""
        plan = self.sublayers[kind]
        if not (plan.compute and plan.rows):
            return None
        rows = intersection(plan.rows, stream, x.reshape(-1, x.shape[-1]))
        if not torch.compiler.is_compiling():
            # The mask itself: counting it would be a launch that only `status` needs.
            kept: Tensor | int = stream.rows
            if rows is not None:
                kept = rows.mask if rows.known_count is None else rows.known_count
            self.chosen[kind] = (stream.rows, kept)
        return rows

    def _masked_residual(self, kind: Kind, x: Tensor, y: Tensor | None, rows: Rows | None) -> Tensor:
        """The residual `[batch, tokens, hidden]` after a sublayer at the chosen rows."""
        if rows is None or y is None:
            return self.residual(kind, x, y)
        mask = rows.mask.view(*x.shape[:2], 1)
        if self.structure.parts(kind).post_norm:
            return torch.where(mask, self.residual(kind, x, y), x)
        # One launch, as the addition alone would be.
        return torch.addcmul(x, y, mask)

    def _update(self, run: Run, kind: Kind, x: Tensor, normed: Tensor | None = None) -> Update | None:
        plan = self.sublayers[kind]
        if not plan.compute:
            if kind == "attention" and self.slot is not None:
                leave_slot_empty(layer_cache(run.kwargs), self.slot)
            return run.replaced(kind, x, self.replacements.get(kind))
        rows = self._choose(kind, x, run.stream)
        if run.touched(kind) and not (kind == "attention" and plan.compact_keys):
            return run.whole(kind, x, rows)
        if kind == "mlp":
            return run.mlp(x, rows, normed)
        return run.attention(x, rows, plan.compact_keys)

    def _returned(self, output: Tensor, weights: Tensor | None, kwargs: dict[str, Any]) -> Any:
        if not self.returns:
            return output
        beside = [weights] if kwargs.get("output_attentions") else []
        return (output, *beside, *[None] * (self.returns - 1 - len(beside)))

"""The patched layer: every sublayer asks its policies which rows to compute, and computes those.

A layer that no method touches keeps its own `forward`. A layer that one does gets `LayerExecutor.forward`, which
calls the layer's own modules by name at each step, so that adapters and quantised weights put there later are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.cache.filter_state import leave_slot_empty
from slimformer.cache.slots import Content, layer_cache
from slimformer.cache.steps import current_step
from slimformer.calls.stack_calls import Observed
from slimformer.changes.ledger import Ledger
from slimformer.decisions.policy import Decision, Replacement
from slimformer.decisions.replacements import LinearFilter, keeps_state
from slimformer.decisions.selection import RowSelector, check_one_text_per_row, compares_tokens, intersection
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.model.anatomy import Anatomy, attention_core, named_arguments, positional_names
from slimformer.model.layer_list import LayerList
from slimformer.model.layer_parts import KINDS, Kind, Structure
from slimformer.model.touched_modules import has_own_forward
from slimformer.rows.rows import Rows
from slimformer.rows.scores import own_implementation
from slimformer.rows.shorter_cache import mask_of_slot
from slimformer.rows.stream import Stream, in_a_graph, leaving_under_gradients
from slimformer.runtime.layer_run import DENSE_BELOW_ROWS, Run, Update
from slimformer.runtime.sublayer import Sublayer
from slimformer.runtime.sublayers import RowSublayers, uses_kernels


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
        compares: Whether one of them may decide about a token by others.
        lets_leave: Whether rows may leave the stream in front of this layer.
        shortens: Whether the cache of this layer may hold fewer tokens than the text has.
        last: Whether rows that left the stream come back behind this layer.
        pads: Whether padding is computed, since it changes what layers give for text.
        all_layers: The layers that run after each other, this one among them.
        foreign: Whether the layer's `forward` is somebody else's, which computes the layer as it always did.
        observed: Says whether something reads what runs between the layers, so that no row may leave.
        chosen: The rows that policies named in the last call: how many there were, and the choice.
        names: The layer's positional parameters behind the residual.
        returns: How many values the layer returns, the residual first; 0 for the residual alone, None for what its
            signature suggests.
    """

    layer: nn.Module
    structure: Structure
    sublayers: dict[Kind, Decision] = field(default_factory=lambda: {kind: Decision() for kind in KINDS})
    replacements: dict[Kind, Replacement] = field(default_factory=dict)
    slot: int | None = None
    by_rows: RowSublayers | None = None
    dense: Callable[..., Any] | None = None
    chooses: bool = False
    compares: bool = False
    lets_leave: bool = False
    shortens: bool = False
    last: bool = False
    pads: bool = False
    all_layers: LayerList | None = None
    foreign: bool = False
    observed: Observed | None = None
    chosen: dict[Kind, tuple[int, Rows | None]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    returns: int | None = None

    def __post_init__(self) -> None:
        if not self.structure.apart:
            raise UnsupportedModelError(
                f"The arithmetic of {type(self.layer).__name__} is not known, so that its sublayers cannot be run "
                "apart. LayerDrop, EarlyExit and TempScale apply to it; see slimformer.support(model)."
            )
        self.parts = (
            {kind: Sublayer(self.layer, self.structure, kind) for kind in KINDS}
            if self.by_rows is None
            else self.by_rows.sublayers
        )
        self.names = positional_names(self.layer)[1:]
        self.parallel = self.structure.is_parallel(self.layer)
        # Whether something comes behind both sublayers.
        self.ends_otherwise = self.structure.scalar is not None or self.structure.per_layer_input is not None
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
        self.compares = compares_tokens(self.selectors())
        self.lets_leave = len(self.sublayers["attention"].not_evicted) > 0
        self.shortens = index >= shorter_from
        self.all_layers = LayerList.of(anatomy)
        self.pads = anatomy.reads_padding
        self.last = index == len(anatomy.layers) - 1

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
            self.parts = self.by_rows.sublayers
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
        if attention is None:
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
        dense = self.dense
        alone = hidden_states.shape[1] == 1 and not self.chooses and current_step() is None
        if dense is not None and (self.foreign or alone):
            # A decode step (a stream that lost rows has more than one), or a layer that others have replaced.
            if self.shortens:
                return dense(hidden_states, **self._with_own_mask(self._named(args, kwargs), 1))
            return dense(hidden_states, *args, **kwargs)
        run, x = self._begun(hidden_states, self._named(args, kwargs) if args else kwargs)
        if dense is not None and run.stream is None:
            if self.shortens:
                return dense(hidden_states, **run.kwargs)
            return dense(hidden_states, *args, **kwargs)
        attention = self.update(run, "attention", x)
        if self.parallel:
            x = run.added_both(x, attention, self.update(run, "mlp", x))
        else:
            normed: Tensor | None = None
            if attention is not None and run.kernels and self._computes_all("mlp"):
                x, normed = run.added_and_normed(x, attention, "mlp")
            elif attention is not None:
                x = run.added(x, attention)
            mlp = self.update(run, "mlp", x, normed)
            x = x if mlp is None else run.added(x, mlp)
        if self.ends_otherwise:
            token = None if run.stream is None else run.stream.token_of(None)
            x = self.structure.finished(self.layer, x, run.kwargs, token)
        output = x if run.stream is None else run.stream.handed_on(x, self.last)
        return self._returned(output, run) if self.returns else output

    def update(self, run: Run, kind: Kind, x: Tensor, normed: Tensor | None = None) -> Update | None:
        """What a sublayer does to the residual `x`, which may come normed already; None for nothing."""
        plan = self.sublayers[kind]
        if not plan.compute:
            if kind == "attention" and self.slot is not None:
                leave_slot_empty(layer_cache(run.kwargs), self.slot)
            return run.replaced(kind, x, self.replacements.get(kind))
        # Counted, since torch.compile does not know what an empty tuple is worth.
        rows: Rows | None = None
        if len(plan.rows) > 0 and run.stream is not None:
            flat = x.reshape(-1, x.shape[-1])
            rows = intersection(plan.rows, run.stream, flat)
            if not torch.compiler.is_compiling():
                # As they are: counting them would be a launch that only `status` needs.
                self.chosen[kind] = (flat.shape[0], rows)
        return run.computed(kind, x, rows, plan.compact_keys, normed)

    def normed(self, kind: Kind, x: Tensor) -> Tensor:
        """The sublayer's input: the residual `[batch, tokens, hidden]` behind the norm in front of it, if any."""
        return self.parts[kind].normed(x)

    def difference(self, kind: Kind, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Residual after the sublayer minus residual `x` before it `[batch, tokens, hidden]`."""
        run = Run(self.parts, kwargs)
        update = self.update(run, kind, x)
        if update is None:
            return torch.zeros_like(x)
        return run.added(x, update) - x if self.parts[kind].replaces else update.value

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
        return "text rows" if not self.pads and (kind == "mlp" or attends) else "all rows"

    def keep_ratio(self, kind: Kind) -> float | None:
        """The part of the rows that policies named in the last call; None before the first, and where none chooses."""
        if kind not in self.chosen:
            return None
        total, rows = self.chosen[kind]
        kept = total if rows is None else rows.known_count
        # Counted anew: a graph that is replayed writes into the mask.
        return int(rows.mask.sum() if rows is not None and kept is None else kept or 0) / max(total, 1)

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
        return [select for plan in self.sublayers.values() for select in (*plan.rows, *plan.not_evicted)]

    def _computes_all(self, kind: Kind) -> bool:
        """Whether a sublayer computes every row of the stream."""
        plan = self.sublayers[kind]
        return plan.compute and len(plan.rows) == 0

    def _begun(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Run, Tensor]:
        """This call's way through the layer, and the residual in the shape that it takes.

        Returns:
            A run without a stream where nothing is chosen and the modules compute all tokens as they are; one with a
            stream that is not `flat` where they do and only the chosen rows count; a `flat` one where rows are computed
            alone, or by kernels.
        """
        of = self.by_rows
        if of is None or not (self.chooses or self.shortens or self._concerns_rows(hidden, kwargs)):
            return Run(self.parts, kwargs), hidden
        if self.compares:
            check_one_text_per_row(self.selectors(), kwargs)
        stream, cache = Stream.of(hidden, of.causal, kwargs), layer_cache(kwargs)
        if stream.layer is None:
            stream.earlier = of.earlier_tokens(cache, hidden.shape[1])
        stream.layer = of
        if self.shortens and not stream.shorter:
            kwargs = self._with_own_mask(kwargs, stream.tokens)
            stream.arguments = kwargs
        if self.lets_leave and hidden.shape[1] > 1:
            stream, hidden = self._entered(stream, hidden)
        if self.chooses:
            stream.past = of.cached_tokens(cache, stream.earlier)
        kernels = hidden.is_cuda and uses_kernels(hidden, self.layer)
        step = current_step() is not None
        if self.chooses and not (kernels or step) and self._masks(of, hidden, stream):
            # What the choice is can be read at no cost here, and nothing records what is computed.
            recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()
            skips = hidden.device.type == "cpu" and not (recorded or torch.is_autocast_enabled("cpu"))
            return Run(self.parts, kwargs, of, stream, skips=skips, cache=cache), hidden
        if self.chooses or stream.held is not None or kernels or step:
            run = Run(self.parts, kwargs, of, stream, flat=True, kernels=kernels, parallel=self.parallel)
            return run, hidden.reshape(-1, hidden.shape[-1])
        return Run(self.parts, kwargs), hidden

    def _concerns_rows(self, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether a call in which this layer chooses nothing may do anything else than all rows by the modules."""
        if hidden.shape[1] == 1 or current_step() is not None:
            # A stream that lost rows has more than one.
            return current_step() is not None
        if self.lets_leave and kwargs.get("attention_mask") is not None:
            return True
        return Stream.has_lost_rows(hidden) or uses_kernels(hidden, self.layer)

    def _masks(self, of: RowSublayers, hidden: Tensor, stream: Stream) -> bool:
        """Whether all rows are computed by the modules, of which the chosen ones count.

        For steps, and for small models on a GPU, which wait for the CPU: gathering and scattering would be launches
        more, and this has none that the layer's own forward does not have.
        """
        if stream.held is not None or self.sublayers["attention"].compact_keys:
            return False
        if not hidden.is_cuda:
            return stream.batch * stream.tokens < DENSE_BELOW_ROWS
        # A step that may read no weights is worth more launches.
        return not (torch.compiler.is_compiling() or of.may_be_skipped(hidden.reshape(-1, hidden.shape[-1])))

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The layer's arguments beside the residual, by their names."""
        return named_arguments(self.names, args, kwargs)

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
        if (
            in_a_graph(hidden.device)
            or (torch.is_grad_enabled() and not leaving_under_gradients())
            or self.layer.training
            or (self.observed is not None and self.observed())
        ):
            return stream, hidden
        x = hidden.reshape(-1, hidden.shape[-1])
        for choose in self.sublayers["attention"].not_evicted:
            stream, x = stream.without(choose(stream, x), x)
        if stream.held is not None and self.all_layers is not None:
            self.all_layers.check()
        return stream, hidden if stream.held is None else x[None]

    def _returned(self, output: Tensor, run: Run) -> Any:
        beside = [run.weights] if run.kwargs.get("output_attentions") else []
        return (output, *beside, *[None] * ((self.returns or 1) - 1 - len(beside)))

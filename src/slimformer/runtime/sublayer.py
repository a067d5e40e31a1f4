"""One sublayer of a layer, as its row of the structure table describes it: the arithmetic, written once for every way.

Whether all tokens of the batch are computed or chosen rows, by modules or by kernels: what comes in front of the
sublayer's module and what comes behind it is here. This is where `Parts` are read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from slimformer.cache.slots import CACHE_NAMES
from slimformer.model.layer_parts import Kind, Parts, Structure
from slimformer.model.touched_modules import CalledModules, is_untouched, takes_rows
from slimformer.rows.norms import RowNorms
from slimformer.rows.step_layers import input_norm
from slimformer.rows.stream import Stream
from slimformer_kernels.step_linear import InputNorm

_BERT_OUTPUT = {"dense", "LayerNorm", "dropout"}
# Arguments of cross-attention and of other parts of a layer; an attention must not see them.
_NOT_FOR_ATTENTION = frozenset({
    "encoder_hidden_states", "encoder_attention_mask", "hidden_states", "per_layer_input"
})  # fmt: skip


@dataclass(eq=False)
class Sublayer:
    """What a sublayer computes.

    Attributes:
        layer: The layer, whose modules are looked up anew in every call, so that what others put there is used.
        structure: The row of the structure table that says what the parts are.
        kind: Which sublayer.
        norms: The norms among the layer's children, for kernels; None where modules alone compute.
        parts: The names of its parts.
        name: That of the module that does the work.
        output_norms: The norm of an output module as BERT has it, or that within the module, likewise.
        called: The modules that it consists of, which may have been touched.
        ends_in_module: Whether nothing comes behind the module but the residual addition.
        replaces: Whether it computes the new residual, as in post-norm layers, not an addition to it.
    """

    layer: nn.Module
    structure: Structure
    kind: Kind
    norms: RowNorms | None = None
    parts: Parts = field(init=False)
    name: str = field(init=False)
    output_norms: RowNorms | None = field(init=False, default=None)
    called: CalledModules = field(init=False, repr=False)
    ends_in_module: bool = field(init=False)
    replaces: bool = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.structure.parts(self.kind)
        self.name = self.parts.name_in(self.layer)
        self.replaces = self.parts.post_norm
        self.ends_in_module = self.parts.adds_as_it_is and self.parts.dropout is None
        self.called = CalledModules(self.layer, tuple(sorted(self.parts.children())))
        output = self._output_module()
        # BERT's: linear layer, dropout, norm of the sum with the residual.
        children = set() if output is None else {name for name, _ in output.named_children()}
        if self.norms is not None and output is not None and children == _BERT_OUTPUT:
            self.output_norms = RowNorms(output, ("LayerNorm",))
        elif self.norms is not None and output is None and self.parts.end_norm is not None:
            self.output_norms = RowNorms(self.parts.of(self.layer), (self.parts.end_norm,))

    def normed(self, x: Tensor) -> Tensor:
        """The module's input for the residual of all tokens `[batch, tokens, hidden]`."""
        name = self.parts.norm_before
        if name is None:
            return x
        if self.norms is not None and x.is_cuda:
            return self.norms.fused(name, x)
        h: Tensor = getattr(self.layer, name)(x)
        return h

    def normed_rows(self, x: Tensor, index: Tensor | None, stream: Stream, kernels: bool) -> Tensor:
        """The same for some of the rows `x` `[rows, hidden]` of a stream; None for all."""
        name = self.parts.norm_before
        if name is None or self.norms is None:
            return picked(x, index)
        module = getattr(self.layer, name)
        if takes_rows(module):
            return self.norms(name, x, index, kernels)
        return picked(stream.in_the_batch(module, x), index)

    def heads_input(self, x: Tensor, index: Tensor | None, stream: Stream, kernels: bool) -> Tensor:
        """What an attention's queries, keys and values are made of: behind the norm, wherever it stands."""
        inner = self.parts.inner_norm
        if inner is None:
            return self.normed_rows(x, index, stream, kernels)
        h: Tensor = self.parts.of(self.layer).get_submodule(inner)(picked(x, index))
        return h

    def unnormed(self, x: Tensor, stream: Stream, kernels: bool) -> tuple[Tensor, InputNorm | None]:
        """The module's input for all rows `x` `[rows, hidden]`, or the rows and the norm that makes them that."""
        name, norms = self.parts.norm_before, self.norms
        if name is not None and norms is not None and self.parts.inner_norm is None:
            norm = input_norm(norms, name, x)
            if norm is not None:
                return x, norm
        return self.heads_input(x, None, stream, kernels), None

    def whole(self, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The sublayer by its own modules on all tokens of the batch, in the shapes that they are made for.

        Args:
            x: The residual `[batch, tokens, hidden]`.
            kwargs: The layer's arguments.

        Returns:
            What is added to the residual, or where it `replaces`, the new one; and attention weights if there are any.
        """
        y, weights = self.output(self.normed(x), kwargs)
        return y if self.ends_in_module else self.behind(y, x), weights

    def output(self, h: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """What the module computes of its input `[batch, tokens, hidden]`, and attention weights if there are any."""
        if self.kind == "mlp":
            return self.parts.by_token(self.layer, h), None
        module = self.layer._modules.get(self.name)
        module = self.parts.of(self.layer) if module is None else module
        output = module(h, **for_attention(kwargs, module))
        if not isinstance(output, tuple):
            return output, None
        return output[0], output[1] if len(output) > 1 else None

    def behind(self, y: Tensor, x: Tensor, kernels: bool = False, heads: bool = False) -> Tensor:
        """What comes behind the module: output layer, norms, dropout and multiplier.

        Args:
            y: The module's output `[..., hidden]`, of all tokens or of some rows.
            x: The residual of the same.
            kernels: Whether kernels run.
            heads: Whether `y` comes from an attention's heads, in front of what its module has behind them.

        Returns:
            As `whole`.
        """
        parts, layer = self.parts, self.layer
        if parts.projection is not None or (heads and parts.whole):
            output = self._output_module()
            if output is None and parts.end_norm is not None:
                return self._ended(y, x, parts.end_norm, kernels)
            if kernels and self.output_norms is not None and output is not None and is_untouched(output):
                y = self.output_norms.after_addition("LayerNorm", output.get_submodule("dense")(y), x)[1]
            elif output is not None:
                y = output(y, x) if y.dim() > 2 else output(y[None], x[None])[0]
        if parts.norm_after is not None:
            if kernels and self.norms is not None:
                y = self.norms(parts.norm_after, y, None, kernels)
            else:
                y = getattr(layer, parts.norm_after)(y)
        if parts.dropout is not None:
            y = getattr(layer, parts.dropout)(y)
        y = parts.scaled(layer, y)
        if parts.outer_norm is not None:
            if kernels and self.norms is not None:
                return self.norms.after_addition(parts.outer_norm, y, x)[1]
            y = getattr(layer, parts.outer_norm)(y + x)
        return y

    def added_and_normed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual `x` plus `y`, both `[rows, hidden]`, and the module's input for it, if both are one kernel."""
        if self.norms is None or self.parts.norm_before is None:
            return x + y, None
        return self.norms.after_addition(self.parts.norm_before, x, y)

    def _ended(self, y: Tensor, x: Tensor, norm: str, kernels: bool) -> Tensor:
        """The norm within a module of the sum of its heads' output `y` and the residual `x`."""
        if kernels and self.output_norms is not None:
            return self.output_norms.after_addition(norm, y, x)[1]
        h: Tensor = self.parts.of(self.layer).get_submodule(norm)(y + x)
        return h

    def _output_module(self) -> nn.Module | None:
        """The output layer of a post-norm sublayer, which gets the residual too; within the module or beside it."""
        parts = self.parts
        owner = parts.of(self.layer) if parts.whole else self.layer
        found: nn.Module | None = getattr(owner, "output" if parts.whole else str(parts.projection), None)
        return found


def norm_names(structure: Structure) -> tuple[str, ...]:
    """Names of all norms among a layer's children."""
    parts = (structure.attention, structure.mlp)
    names = {name for p in parts for name in (p.norm_before, p.norm_after, p.outer_norm)}
    return tuple(sorted(name for name in names if name is not None))


def for_attention(kwargs: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """The layer's arguments that its attention takes, without those of cross-attention, which no structure here has."""
    takes, others, cache_name = _takes(type(module).forward)
    given = {}
    for name, value in kwargs.items():
        if cache_name is not None and name in CACHE_NAMES:
            # Layers hand it on under the name that their mixer has for it.
            given[cache_name] = value
        elif name not in _NOT_FOR_ATTENTION and (others or name in takes):
            given[name] = value
    return given


@cache
def _takes(forward: Callable[..., Any]) -> tuple[frozenset[str], bool, str | None]:
    """The names of a forward's parameters, whether it takes others too, and what it calls the cache."""
    parameters = inspect.signature(inspect.unwrap(forward)).parameters
    others = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return frozenset(parameters), others, next((name for name in CACHE_NAMES if name in parameters), None)


def picked(x: Tensor, index: Tensor | None) -> Tensor:
    """Some rows of `x`; None for all."""
    return x if index is None else x.index_select(0, index)

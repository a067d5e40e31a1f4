"""What a layer consists of: the parts of its sublayers, and how they are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, Kind] = ("attention", "mlp")


@dataclass(frozen=True)
class Parts:
    """Attribute names, inside a layer, of what one sublayer consists of.

    A sublayer adds `multiplier * dropout(norm_after(module(norm_before(x))))` to the residual stream `x`. With
    `outer_norm` it is a post-norm sublayer: `outer_norm(x + module(x))`. With `projection` the module needs a second
    call that takes the residual itself, as BERT's `output(intermediate(x), x)`; with `whole` the module does all of it,
    as BERT's `attention(x)`.

    Attributes:
        module: The module that does the work.
        others: What layers of the same stack may have in its place, such as a linear attention.
        then: Modules behind it, each on the output of the one before, where the layer itself holds an MLP's parts.
        beside: Modules that some layers have too; they read the same input and what they put out is added.
        norm_before: The norm in front.
        norm_after: The norm behind the module.
        dropout: What follows that.
        outer_norm: The norm of the sum with the residual.
        projection: The module that takes the residual too.
        whole: Whether the module adds to the residual itself.
        inner_norm: The norm within such a module, in front of the heads.
        end_norm: The norm within such a module of the sum with the residual, where no output layer has it.
        multiplier: A number on the layer with which the result is multiplied.
    """

    module: str
    others: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    norm_before: str | None = None
    norm_after: str | None = None
    dropout: str | None = None
    outer_norm: str | None = None
    projection: str | None = None
    whole: bool = False
    inner_norm: str | None = None
    end_norm: str | None = None
    multiplier: str | None = None

    def children(self) -> set[str]:
        """Names of the layer's children that may belong to this sublayer."""
        return self._always() | {self.module, *self.others, *self.beside}

    def children_of(self, layer: nn.Module) -> set[str]:
        """Those that `layer` has."""
        return {name for name in self.children() if layer._modules.get(name) is not None}

    def of(self, layer: nn.Module) -> nn.Module:
        """The module that does the work in `layer`."""
        modules = layer._modules
        for name in (self.module, *self.others):
            found = modules.get(name)
            if found is not None:
                return found
        return layer.get_submodule(self.module)

    def name_in(self, layer: nn.Module) -> str:
        """Its name there."""
        return next(
            (name for name in (self.module, *self.others) if layer._modules.get(name) is not None),
            self.module,
        )

    def by_token(self, layer: nn.Module, h: Tensor) -> Tensor:
        """What the modules of an MLP make of `h` `[batch, tokens, hidden]`."""
        output = self.of(layer)(h)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        for name in self.then:
            y = first_of(layer.get_submodule(name)(y))
        for name in self.beside:
            module = layer._modules.get(name)
            if module is not None:
                y = y + first_of(module(h))
        # Some experts put out all tokens of the batch behind each other.
        return y if self.projection is not None or y.shape[-1] != h.shape[-1] else y.view(h.shape)

    def alone(self, layer: nn.Module) -> bool:
        """Whether one module of `layer` does all the work."""
        return not self.then and not any(layer._modules.get(name) is not None for name in self.beside)

    def scaled(self, layer: nn.Module, y: Tensor) -> Tensor:
        """What is added to the residual, of what the modules gave."""
        return y if self.multiplier is None else y * getattr(layer, self.multiplier)

    @property
    def post_norm(self) -> bool:
        """Whether the sublayer's result is the residual itself, and not what is added to it."""
        return self.outer_norm is not None or self.projection is not None or self.whole

    @property
    def adds_as_it_is(self) -> bool:
        """Whether what the module gives is added to the residual without anything behind it."""
        return self.norm_after is None and self.multiplier is None and not self.post_norm

    def fits(self, children: set[str]) -> bool:
        """Whether a layer with these children has all that the sublayer needs."""
        workers = children.intersection((self.module, *self.others))
        return len(workers) == 1 and self._always() <= children

    def _always(self) -> set[str]:
        names = (
            self.norm_before,
            self.norm_after,
            self.dropout,
            self.outer_norm,
            self.projection,
            *self.then,
        )
        return {name for name in names if name is not None}


@dataclass(frozen=True)
class PerLayerInput:
    """What some layers add behind their MLP, from an input that every token has for every layer (Gemma 3n and 4).

    Attribute names, inside the layer: `x + norm(projection(activation(gate(x)) * input))`.

    Attributes:
        gate: The layer that makes a gate of the residual.
        activation: The activation of the gate.
        projection: The layer back to the residual's size.
        norm: The norm behind it.
        argument: The layer's argument that holds the inputs, `[batch, tokens, size]`.
    """

    gate: str
    activation: str
    projection: str
    norm: str
    argument: str

    def children(self) -> set[str]:
        """Names of the layer's children that belong to it."""
        return {self.gate, self.activation, self.projection, self.norm}

    def added(self, layer: nn.Module, x: Tensor, kwargs: Mapping[str, Any], token: Tensor | None) -> Tensor:
        """The residual `x` `[..., hidden]` behind it.

        Args:
            layer: The layer.
            x: Rows of the residual, or all of it.
            kwargs: The layer's arguments.
            token: Which of the `batch * tokens` tokens the rows are, int64; None for all in order.
        """
        given = kwargs[self.argument].flatten(0, 1)
        given = given if token is None else given.index_select(0, token)
        gate, activation, projection, norm = (
            layer.get_submodule(name) for name in (self.gate, self.activation, self.projection, self.norm)
        )
        gated = activation(gate(x)) * given.view(*x.shape[:-1], -1)
        behind: Tensor = x + norm(projection(gated))
        return behind


@dataclass(frozen=True)
class Structure:
    """One row of the structure table: how the layers of some families are built.

    With `apart` False nothing is known of the arithmetic, so that no sublayer can be computed for chosen rows:
    attention transforms apply, token policies do not.
    """

    name: str
    attention: Parts
    mlp: Parts
    parallel: bool = False
    apart: bool = True
    per_layer_input: PerLayerInput | None = None
    scalar: str | None = None
    examples: str = ""

    def parts(self, kind: Kind) -> Parts:
        """The parts of one of the two sublayers."""
        return self.attention if kind == "attention" else self.mlp

    def is_parallel(self, layer: nn.Module) -> bool:
        """Whether attention and MLP of `layer` read the same residual. GPT-NeoX decides it per checkpoint."""
        return bool(getattr(layer, "use_parallel_residual", self.parallel))

    def fits(self, children: set[str]) -> bool:
        """Whether a layer with these children, and no other, may be built like this."""
        known = self.attention.children() | self.mlp.children()
        if self.per_layer_input is not None:
            own = self.per_layer_input.children()
            if not own <= children:
                return False
            known |= own
        return children <= known and self.attention.fits(children) and self.mlp.fits(children)

    def heads_input(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What queries, keys and values are made of, of the residual `x` `[..., hidden]`."""
        parts = self.attention
        if parts.inner_norm is not None:
            return first_of(parts.of(layer).get_submodule(parts.inner_norm)(x))
        return x if parts.norm_before is None else first_of(layer.get_submodule(parts.norm_before)(x))

    def finished(
        self, layer: nn.Module, x: Tensor, kwargs: Mapping[str, Any], token: Tensor | None = None
    ) -> Tensor:
        """What leaves the layer, of the residual `x` behind both sublayers; arguments as in `PerLayerInput.added`."""
        if self.per_layer_input is not None:
            x = self.per_layer_input.added(layer, x, kwargs, token)
        return x if self.scalar is None else x * getattr(layer, self.scalar)


# What holds several results of a module; OpenAI GPT's return lists.
SEVERAL = (tuple, list)


def first_of(output: Any) -> Tensor:
    """The vectors in what a module returned, which may be a tuple or a list that begins with them."""
    found: Tensor = output[0] if isinstance(output, SEVERAL) and output else output
    return found

"""MLPs whose hidden layer is an activation times a gate: the product in one pass, where a kernel can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimformer.model.anatomy import in_eval_mode
from slimformer.model.probes import LOUD, error, float32_copy, noise, tolerance
from slimformer.model.touched_modules import is_untouched
from slimformer.rows.linear_steps import linear_step, may_be_skipped
from slimformer.rows.step_layers import added, is_plain
from slimformer_kernels import geglu, step_gated, swiglu
from slimformer_kernels.step_linear import InputNorm


@dataclass(frozen=True)
class GatedParts:
    """Attribute names, inside an MLP, of its layers.

    Attributes:
        gate: The layer whose output goes through the activation, or the one that makes it and `up`, gate first.
        up: The layer of what is multiplied; None where one layer makes both.
        down: The layer behind.
        activation: The activation.
        other: Children that compute nothing in evaluation.
    """

    gate: str
    up: str | None
    down: str
    activation: str
    other: tuple[str, ...] = ()

    def children(self) -> set[str]:
        """Names of the children that the row describes."""
        names = (self.gate, self.up, self.down, self.activation, *self.other)
        return {name for name in names if name is not None}


GATED: tuple[GatedParts, ...] = (
    GatedParts("gate_proj", "up_proj", "down_proj", "act_fn"),
    GatedParts("gate_up_proj", None, "down_proj", "activation_fn"),
    GatedParts("Wi", None, "Wo", "act", other=("drop",)),
)


@dataclass(frozen=True)
class GatedMlp:
    """Runs a gated MLP's layers around the fused product.

    Attributes:
        module: The MLP, whose layers are looked up in every call.
        parts: The row of the table that it matches.
        product: The activation of the first times the second.
        activation: Its name, as `step_gated` has it.
    """

    module: nn.Module
    parts: GatedParts
    product: Callable[[Tensor, Tensor], Tensor]
    activation: str

    def __call__(self, h: Tensor, wanted: Tensor | None = None) -> Tensor:
        """`[rows, hidden]` to `[rows, hidden]`; rows outside `wanted`, bool `[rows]`, hold anything finite."""
        return self.last(self._inner(h, wanted), wanted)

    def last(self, inner: Tensor, wanted: Tensor | None = None) -> Tensor:
        """The last layer, of `[rows, intermediate]`."""
        return linear_step(getattr(self.module, self.parts.down), inner, wanted)

    def may_be_skipped(self, h: Tensor) -> bool:
        """Whether a step of the rows `h` `[rows, hidden]` reads no weight where none of them is wanted."""
        return may_be_skipped(getattr(self.module, self.parts.gate), h)

    def in_step(self, x: Tensor, norm: InputNorm | None) -> Tensor | None:
        """What goes into the last layer, of a step's few rows; None where the layers are no plain ones.

        Args:
            x: Their residual `[rows, hidden]`, or what has gone through the norm.
            norm: The norm in front; None where it has been computed.
        """
        names = (self.parts.gate, *([] if self.parts.up is None else [self.parts.up]))
        layers = [getattr(self.module, name) for name in names]
        if not all(is_plain(layer, x) and layer.bias is None for layer in layers):
            return None
        weights = [layer.weight for layer in layers]
        gate, up = weights if len(weights) > 1 else weights[0].chunk(2)
        return step_gated(x, gate, up, self.activation, norm)

    def added(self, x: Tensor, inner: Tensor) -> Tensor | None:
        """The residual `x` `[rows, hidden]` plus the last layer; None where that is no plain one."""
        return added(getattr(self.module, self.parts.down), x, inner)

    def add_to(self, x: Tensor, h: Tensor) -> bool:
        """Add the MLP of `h` to the residual `x` `[rows, hidden]` in place, inside the last matrix product.

        Returns:
            False, with nothing done, where the last layer is no plain one.
        """
        down = getattr(self.module, self.parts.down)
        if type(down) is not nn.Linear or down.bias is not None or not is_untouched(down):
            return False
        if down.weight.dtype != x.dtype:
            return False
        x.addmm_(self._inner(h), down.weight.T)
        return True

    def _inner(self, h: Tensor, wanted: Tensor | None = None) -> Tensor:
        gate = linear_step(getattr(self.module, self.parts.gate), h, wanted)
        if self.parts.up is None:
            gate, up = gate.chunk(2, dim=-1)
        else:
            up = linear_step(getattr(self.module, self.parts.up), h, wanted)
        return self.product(gate, up)


@dataclass(frozen=True)
class GatedFinding:
    """How an MLP that was examined can be run in a fused form; it holds for every MLP like it."""

    parts: GatedParts
    product: Callable[[Tensor, Tensor], Tensor]
    activation: str

    def on(self, module: nn.Module) -> GatedMlp:
        """The fused form of one of them."""
        return GatedMlp(module, self.parts, self.product, self.activation)


@torch.no_grad()
def examine(module: nn.Module) -> GatedFinding | None:
    """The fused form of an MLP, checked against the module itself; None if it is not a gated one."""
    children = {name for name, _ in module.named_children()}
    parts = next((row for row in GATED if row.children() == children), None)
    if parts is None or any(p.is_meta for p in module.parameters()):
        return None
    # Scales, limits or biases of the module's own stand in no row of the table.
    if any(value is not None for value in (*module._parameters.values(), *module._buffers.values())):
        return None
    found = _product(getattr(module, parts.activation))
    width = getattr(getattr(module, parts.gate), "in_features", None)
    if found is None or width is None:
        return None
    activation, product = found
    copied = float32_copy(module)
    trial = module if copied is None else copied
    weight = next((p for p in trial.parameters() if p.is_floating_point()), None)
    if weight is None:
        return None
    fused = GatedMlp(trial, parts, product, activation)
    for scale in (1.0, LOUD**2):
        x = noise((4, width), weight) * scale
        try:
            with in_eval_mode(trial):
                expected, actual = trial(x[None])[0], fused(x)
        except RuntimeError:
            # Quantised layers may want another input; they keep their own forward.
            return None
        if not error(actual, expected) <= tolerance(x):
            return None
    return GatedFinding(parts, product, activation)


def _product(activation: object) -> tuple[str, Callable[[Tensor, Tensor], Tensor]] | None:
    """The name of an activation and its fused product, recognised by what it computes."""
    if not callable(activation):
        return None
    x = torch.linspace(-8.0, 8.0, 257, device="cpu")
    known: tuple[tuple[Tensor, str, Callable[[Tensor, Tensor], Tensor]], ...] = (
        (F.silu(x), "silu", swiglu),
        (F.gelu(x, approximate="tanh"), "gelu_tanh", geglu),
        (F.gelu(x), "gelu", partial(geglu, approximate="none")),
    )
    actual = activation(x)
    return next(((name, product) for y, name, product in known if (actual - y).abs().max() < 1e-6), None)

"""What plans put on a layer: weights of what stands in for its sublayers, and changes of its own parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slimformer.changes.ledger import Ledger
from slimformer.errors import PlanError
from slimformer.runtime.layer import LayerExecutor
from slimformer.runtime.switched_layer import SwitchedLayer


def add_weights(executor: LayerExecutor | SwitchedLayer, ledger: Ledger) -> None:
    """Put on a layer what is read by what stands in for its sublayers."""
    layer = executor.layer
    for plan in executor.sublayers.values():
        if plan.compute or plan.replacement is None:
            continue
        like = next((p for p in layer.parameters() if p.is_floating_point()), None)
        for name, value in plan.weights.items():
            if like is not None:
                value = value.to(_computing_device(layer, like), like.dtype)
            ledger.add_buffer(layer, name, value)


def change_weights(executor: LayerExecutor | SwitchedLayer, ledger: Ledger) -> None:
    """Change the parameters of a layer as its plans say.

    Raises:
        PlanError: If the layer has no such parameter in memory as a plan changes.
    """
    layer = executor.layer
    changes: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    for plan in executor.sublayers.values():
        for name, changed in plan.changes:
            changes.setdefault(name, []).append(changed)
    for name, all_of_it in changes.items():
        place, _, own = name.rpartition(".")
        _check_own_weight(layer, name)
        ledger.change_parameter(layer.get_submodule(place), own, _InOrder(tuple(all_of_it)))


@dataclass(frozen=True)
class _InOrder:
    changes: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, own: Tensor) -> Tensor:
        for change in self.changes:
            own = change(own)
        return own


def _check_own_weight(layer: nn.Module, name: str) -> None:
    place, _, own = name.rpartition(".")
    modules = dict(layer.named_modules())
    # An adapter passes on the weight of what it wraps, under the same name; that cannot be replaced.
    found = dict(modules[place].named_parameters(recurse=False)).get(own) if place in modules else None
    if found is None:
        raise PlanError(
            f"The plan changes {name} in {type(layer).__name__}, which has no such parameter of its own. Patch the "
            "model before adapters are put on it."
        )
    if type(found) is not nn.Parameter or found.is_meta or not found.is_floating_point():
        raise PlanError(
            f"The plan changes {name}, whose values are quantised or not in memory. Load the whole model in float32, "
            "bfloat16 or float16."
        )


def _computing_device(layer: nn.Module, like: Tensor) -> Any:
    """Where a layer computes: by accelerate's hooks if they keep its weights elsewhere and `like` on no device."""
    if like.device.type != "meta":
        return like.device
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for single in (hook, *getattr(hook, "hooks", ())):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return device
    return "cpu"

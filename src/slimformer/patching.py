"""Patch a model, undo it exactly, and say what is patched: the ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from slimformer.anatomy import Anatomy, Kind, attention_core, check_structure, find_anatomy
from slimformer.cache import compact_slots
from slimformer.errors import PlanError
from slimformer.executor import LayerExecutor, SublayerPlan

Model = TypeVar("Model", bound=nn.Module)
_ATTRIBUTE = "_slimformer"


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
class Ledger:
    """Every change to the model, in order, so that it can be undone backwards."""

    entries: list[tuple[Any, str, bool, Any]] = field(default_factory=list)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set `target.name` and remember what stood in its own `__dict__` before."""
        had = name in vars(target)
        self.entries.append((target, name, had, vars(target).get(name)))
        setattr(target, name, value)

    def undo(self) -> None:
        """Put everything back, newest first."""
        while self.entries:
            target, name, had, old = self.entries.pop()
            if had:
                setattr(target, name, old)
            else:
                delattr(target, name)


@dataclass
class Patch:
    """What `patch` leaves on the model: the methods, the executors in place, and the ledger."""

    methods: tuple[TokenPolicy, ...]
    executors: dict[int, LayerExecutor]
    ledger: Ledger


def patch(model: Model, *methods: TokenPolicy) -> Model:
    """Apply methods to a model, in place. A model that is patched already is unpatched first.

    Args:
        model: A transformers model.
        methods: What to apply; they compose by intersection (a sublayer computes what all of them keep).

    Returns:
        The same object.

    Raises:
        PlanError: If no method is given, or one does not fit the model; the model is then left as it was.
        UnsupportedModelError: If the model's structure is not known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import slimformer
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> model = slimformer.patch(LlamaForCausalLM(config), slimformer.LayerDrop(attention=[0, 2]))
        >>> slimformer.status(model)
        {0: ['attention'], 2: ['attention']}
        >>> slimformer.status(slimformer.unpatch(model))
        {}
    """
    if not methods:
        raise PlanError(
            "No method was given. Name at least one, such as slimformer.LayerDrop(attention=[5])."
        )
    for method in methods:
        if not isinstance(method, TokenPolicy):
            raise PlanError(f"Expected a method such as LayerDrop, got {type(method).__name__}.")
    previous = vars(model).get(_ATTRIBUTE)
    unpatch(model)
    try:
        _apply(model, methods)
    except BaseException:
        if previous is not None:
            _apply(model, previous.methods)
        raise
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch` exactly. A model that is not patched is left alone."""
    current: Patch | None = vars(model).get(_ATTRIBUTE)
    if current is not None:
        current.ledger.undo()
    return model


@contextlib.contextmanager
def patched(model: Model, *methods: TokenPolicy) -> Iterator[Model]:
    """Patch for the length of a `with` block; undone on exit, also on an exception."""
    patch(model, *methods)
    try:
        yield model
    finally:
        unpatch(model)


def status(model: nn.Module) -> dict[int, list[str]]:
    """Which sublayers do not run: layer index to sublayer names. Empty for an unpatched model."""
    current: Patch | None = vars(model).get(_ATTRIBUTE)
    if current is None:
        return {}
    return {
        index: [kind for kind, plan in executor.sublayers.items() if not plan.compute]
        for index, executor in sorted(current.executors.items())
    }


def _apply(model: nn.Module, methods: tuple[TokenPolicy, ...]) -> None:
    anatomy = find_anatomy(model)
    executors: dict[int, LayerExecutor] = {}
    for method in methods:
        for (index, kind), plan in method.sublayer_plans(anatomy).items():
            layer = anatomy.layers[index]
            executor = executors.setdefault(index, LayerExecutor(layer, anatomy.structure))
            if executor.sublayers[kind].compute:
                executor.sublayers[kind] = plan
    dropped = [index for index, executor in executors.items() if not executor.sublayers["attention"].compute]
    slots = compact_slots(anatomy.layer_types, dropped) if anatomy.causal else None
    check_structure(
        anatomy, lambda layer, x, kwargs: LayerExecutor(layer, anatomy.structure).forward(x, **kwargs)
    )
    ledger = Ledger()
    try:
        ledger.set(model, _ATTRIBUTE, Patch(methods, executors, ledger))
        for index, executor in executors.items():
            layer = anatomy.layers[index]
            # accelerate's hooks wrap the forward they saved here; theirs must stay outermost.
            ledger.set(
                layer, "_old_forward" if "_old_forward" in vars(layer) else "forward", executor.forward
            )
        if slots is not None:
            for layer, slot in zip(anatomy.layers, slots, strict=True):
                core = attention_core(layer, anatomy.structure)
                if getattr(core, "layer_idx", slot) != slot:
                    ledger.set(core, "layer_idx", slot)
    except BaseException:
        ledger.undo()
        raise

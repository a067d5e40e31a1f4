"""Modules that somebody else has put a hook, a wrapper or a forward of their own on: these run as they are."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from transformers.utils.output_capturing import _active_collector

# Where a module keeps what others have hung on it.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Whose method stands in for a `forward` says so by this where calling the module's layers one by one does the same.
RUNS_BY_PARTS = "runs_by_parts"
_RECORDING = "transformers.utils.output_capturing"


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its `forward`: hooks that are not asleep.

    Hooks with which transformers records outputs stay on modules for good, and are asleep until it does.
    """
    if hasattr(module, "_hf_hook") or module._backward_hooks or module._backward_pre_hooks:
        return True
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    asleep = not _active_collector.get()
    return not all(asleep and getattr(hook, "__module__", None) == _RECORDING for hook in hooks)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module's layers one by one does the same as calling it: no hooks, no forward of its own."""
    own = module.__dict__
    if "forward" in own and not _runs_by_parts(own["forward"]):
        return False
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
    # In steps of decoding most modules have none, and a call more for each would be half of what they cost.
    return not (hooks or own["_backward_pre_hooks"] or "_hf_hook" in own) or not is_hooked(module)


def _runs_by_parts(forward: object) -> bool:
    """Whether what stands in for a class's own `forward` says that the module's layers may be called one by one."""
    known = getattr(getattr(getattr(forward, "call", None), "__self__", None), RUNS_BY_PARTS, False)
    return bool(known) and not getattr(forward, "own", True)


def is_only_placed(module: nn.Module) -> bool:
    """Whether all that was done to a module is accelerate's: it moves what comes, whatever shape it has."""
    hook = vars(module).get("_hf_hook")
    if hook is None or not all(type(h).__module__.startswith("accelerate.") for h in _single(hook)):
        return False
    if getattr(vars(module).get("_old_forward"), "__func__", None) is not type(module).forward:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return not (any(hooks) or module._backward_pre_hooks)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody gave a module a `forward` in place of its class's, accelerate's aside."""
    found = vars(module).get("_old_forward", vars(module).get("forward"))
    return found is not None and getattr(found, "__func__", None) is not type(module).forward


def takes_rows(module: nn.Module) -> bool:
    """Whether a module may be given some rows without their batch: nobody looks at what it gets."""
    return is_untouched(module) or is_only_placed(module)


def as_it_was_built(module: nn.Module) -> nn.Module:
    """A copy over the same weights, without hooks or a `forward` that others have put on it or on modules within.

    What a module computes is examined on this, so that nobody sees calls that are not of the model's own forward.
    What accelerate has placed stays placed.
    """
    made = copy.copy(module)
    state = made.__dict__
    for name in ("_parameters", "_buffers"):
        state[name] = copy.copy(state[name])
    state["_modules"] = {
        name: None if child is None else as_it_was_built(child) for name, child in module._modules.items()
    }
    for name in HOOKS:
        if name in state:
            state[name] = OrderedDict()
    if "_hf_hook" not in state:
        state.pop("forward", None)
    return made


def _single(hook: object) -> Iterable[object]:
    return getattr(hook, "hooks", (hook,))


@dataclass(eq=False)
class CalledModules:
    """The modules that a sublayer consists of, and all within them.

    Attributes:
        owner: The layer.
        names: Those of its children that belong to the sublayer.
    """

    owner: nn.Module
    names: tuple[str, ...]
    children: list[nn.Module | None] = field(init=False, repr=False)
    within: list[tuple[nn.Module, tuple[nn.Module | None, ...]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.children = [self.owner._modules.get(name) for name in self.names]
        self._list()

    def touched(self) -> bool:
        """Whether any must run as it is, or was exchanged since the model was patched.

        A step of decoding asks this of every sublayer, so that all of it is one loop.
        """
        own = self.owner._modules
        for name, child in zip(self.names, self.children, strict=True):
            if own.get(name) is not child:
                return True
        for module, inner in self.within:
            if tuple(module._modules.values()) != inner:
                # Such as an adapter that was put around a linear layer.
                self._list()
                return self.touched()
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                or "forward" in module.__dict__
            ) and not takes_rows(module):
                return True
        return False

    def _list(self) -> None:
        modules = {id(m): m for child in self.children if child is not None for m in child.modules()}.values()
        self.within = [(module, tuple(module._modules.values())) for module in modules]

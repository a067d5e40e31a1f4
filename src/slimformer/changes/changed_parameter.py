"""A parameter that computes with a change on top: its own values are what is saved, loaded and put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# What a module moves and casts its tensors with.
_APPLY = "_apply"


@dataclass
class ChangedParameter:
    """A module computes with `changed(own)` in place of its parameter `own`, whose values are kept aside.

    A `state_dict` speaks of the module's own values: it holds them, and one that is loaded becomes them, with the
    change on top again. What is written into the changed values directly, by an optimizer or an adapter that is merged,
    is written into the module's own too once they are asked for. Where nothing was written, these are bit for bit what
    they were.

    Attributes:
        module: The module.
        name: Of its parameter.
        changed: From the own values to those that are computed with.
        own: The parameter itself, which comes back.
    """

    module: nn.Module
    name: str
    changed: Callable[[Tensor], Tensor]
    own: nn.Parameter
    _current: nn.Parameter | None = None
    _had_apply: Any = None
    _handles: list[Any] = field(default_factory=list)
    # Of the changed values as they were formed, and of the own ones when they came back.
    _formed: tuple[Any, ...] = ()
    _returned: tuple[Any, ...] = ()

    def redo(self) -> None:
        """Let the module compute with the changed values."""
        own = self.own.detach()
        if self._current is None or _fingerprint(own) != self._returned:
            self._current = nn.Parameter(self.changed(own), requires_grad=self.own.requires_grad)
            self._formed = _fingerprint(self._current)
        self._current.requires_grad_(self.own.requires_grad)
        # As a buffer it moves with the module.
        self.module.register_buffer(self._aside_name, own, persistent=False)
        self.module.register_parameter(self.name, self._current)
        self._had_apply = vars(self.module).get(_APPLY)
        setattr(self.module, _APPLY, self._apply)
        self._handles = [
            self.module.register_state_dict_post_hook(_Saves(self)),
            self.module.register_load_state_dict_pre_hook(self._load),
        ]

    def undo(self) -> None:
        """Put the module's own parameter back, moved and cast as the changed values were."""
        self._write_back()
        self._current = self.module.get_parameter(self.name)
        self.own.data = self._aside
        self.own.requires_grad_(self._current.requires_grad)
        self._returned = _fingerprint(self.own)
        for handle in self._handles:
            handle.remove()
        if self._had_apply is None:
            delattr(self.module, _APPLY)
        else:
            setattr(self.module, _APPLY, self._had_apply)
        delattr(self.module, self._aside_name)
        self.module.register_parameter(self.name, self.own)

    @property
    def _aside_name(self) -> str:
        return f"slimformer_own_{self.name}"

    @property
    def _aside(self) -> Tensor:
        return self.module.get_buffer(self._aside_name)

    def save(self, state: dict[str, Any], lead: str) -> None:
        """Put the own values into a `state_dict`, where `lead` stands before the module's names."""
        if lead + self.name in state:
            self._write_back()
            state[lead + self.name] = self._aside.detach()

    @torch.no_grad()
    def _load(self, module: nn.Module, state: dict[str, Any], lead: str, metadata: Any, *rest: Any) -> None:
        given = state.get(lead + self.name)
        if not isinstance(given, Tensor) or given.shape != self.own.shape:
            return
        if metadata.get("assign_to_params_buffers"):
            self.module.register_buffer(self._aside_name, given.detach(), persistent=False)
        else:
            self._aside.copy_(given)
        state[lead + self.name] = formed = self.changed(self._aside)
        self._formed = _fingerprint(formed)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Stands in for the module's `_apply`, which moves and casts: a cast change is made anew from cast values."""
        self._write_back()
        before = self._aside.dtype
        if self._had_apply is None:
            type(self.module)._apply(self.module, function, recurse)
        else:
            self._had_apply(function, recurse)
        # What the own parameter held before would stay in memory.
        self.own.data = self._aside
        current = self.module.get_parameter(self.name)
        if self._aside.dtype != before and not current.is_meta:
            current.data = self.changed(self._aside)
            self._formed = _fingerprint(current)
        return self.module

    @torch.no_grad()
    def _write_back(self) -> None:
        """Write into the own values what was written into the changed ones since they were formed."""
        current, aside = self.module.get_parameter(self.name).detach(), self._aside
        if current.is_meta or aside.is_meta or current.shape != aside.shape:
            return
        found = _fingerprint(current)
        if found == self._formed:
            return
        formed = self.changed(aside).to(current.device)
        wide = torch.promote_types(aside.dtype, torch.float32)
        aside.copy_(aside.to(wide) + (current.to(wide) - formed.to(wide)).to(aside.device))
        self._formed = found


@dataclass
class _Saves:
    # torch marks hooks with an attribute, which methods cannot have.
    parameter: ChangedParameter

    def __call__(self, module: nn.Module, state: dict[str, Any], lead: str, metadata: Any) -> None:
        self.parameter.save(state, lead)


def _fingerprint(values: Tensor) -> tuple[Any, ...]:
    """What tells whether values were written to: sums over their bits, alike on every device."""
    if values.is_meta:
        return ()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().reshape(1) if values.dim() == 0 else values.detach().contiguous()
    bits = bits.view(whole)
    sums = []
    for axis in range(bits.dim()):
        along = bits.movedim(axis, 0).flatten(1).sum(1, dtype=torch.int64) if bits.dim() > 1 else bits.long()
        sums.append((along * torch.arange(1, along.shape[0] + 1, device=along.device)).sum())
    return (values.dtype, tuple(values.shape), *torch.stack(sums).tolist())

"""Gradient checkpointing (arXiv 1604.06174) of layers whose tensors are put in place for the length of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from slimformer.changes.call_context import carrying
from slimformer.changes.ledger import Ledger
from slimformer.model.anatomy import Anatomy


class _Forward(nn.Module):
    """A layer's forward, without what stands around it."""

    def __init__(self, layer: nn.Module, had: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.had = layer, had

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.had(*args, **kwargs)


@contextlib.contextmanager
def recomputed(anatomy: Anatomy, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which layers keep what they read alone, and compute the rest again in the backward pass.

    Args:
        anatomy: The model's, patched or not.
        tensors: What stands in place of the stack's own tensors in this call, by their names there: the backward pass
            comes when they are gone.
    """
    lead = next(name for name, module in anatomy.stack.named_modules() if module is anatomy.layers)
    ledger = Ledger()
    try:
        for index, layer in enumerate(anatomy.layers):
            start = f"{lead}.{index}."
            own = {f"layer.{n.removeprefix(start)}": t for n, t in tensors.items() if n.startswith(start)}
            run = partial(functional_call, _Forward(layer, layer.forward), own)
            ledger.set(layer, "forward", partial(_again, run))
        yield
    finally:
        ledger.undo()


def _again(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(carrying(run), args, kwargs, use_reentrant=False)

"""Which plans cannot run under continuous batching, where one row holds parts of many texts, and saying so in time.

Errors within its generation loop end up in a log. So it is refused where it begins; layers refuse it themselves as
well, for loops that began before the model was patched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from slimformer.changes.ledger import Ledger
from slimformer.decisions.selection import compares_tokens
from slimformer.errors import PlanError
from slimformer.runtime.layer import LayerExecutor
from slimformer.runtime.switched_layer import SwitchedLayer

# What every way into it calls, `generate_batch` too.
_ENTRY = "init_continuous_batching"


def refuse_continuous_batching(
    model: Any, executors: Iterable[LayerExecutor | SwitchedLayer], reads_texts: bool, ledger: Ledger
) -> None:
    """Let a model refuse continuous batching where its plan needs to know whole texts.

    Args:
        model: The model.
        executors: What runs its layers.
        reads_texts: Whether a transform asks how long texts are.
        ledger: Where the change is written down.
    """
    if not hasattr(model, _ENTRY):
        return
    reason = "positions or scores depend on how long a text is" if reads_texts else None
    for executor in executors:
        if isinstance(executor.in_cache, int):
            reason = "a filter of several taps remembers the last inputs of every text"
        elif compares_tokens(executor.selectors()):
            reason = "tokens are chosen among those of a whole text"
    if reason is not None:
        ledger.set(model, _ENTRY, _Refusal(reason))


@dataclass
class _Refusal:
    """Stands in for the method that begins continuous batching."""

    reason: str

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PlanError(
            f"This plan cannot run under continuous batching: {self.reason}, and one row holds parts of many there. "
            "Use generate, or a plan without that."
        )

"""Thresholds of routers, set where what they read has changed: by repair, or by what else a plan does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimformer.decisions.policy import Decision
from slimformer.methods.mixture_of_depths import MixtureOfDepths, Router
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import Kind
from slimformer.patching import patched
from slimformer.plans.plan import Plan
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream

# Rounds in which thresholds settle: what is skipped changes what later routers read.
_ROUNDS = 4


def meet_keep_ratio(model: Any, plan: Plan, run: Callable[[], object]) -> Plan:
    """The plan with the threshold of its routers where they compute the wanted part of a text.

    Args:
        model: The unpatched model.
        plan: A plan; one without routers, with routers that tell no token from another, or whose routers take the
            best of every text, comes back as it is.
        run: Runs text through the model, patched with the plan.
    """
    methods: list[Any] = list(plan.methods)
    for place, method in enumerate(methods):
        if not isinstance(method, MixtureOfDepths) or method.routing != "threshold":
            continue
        for _ in range(_ROUNDS):
            noting = _Noting(methods[place])
            with patched(model, *methods[:place], noting, *methods[place + 1 :]):
                run()
            scores = torch.cat(noting.scores) if noting.scores else torch.zeros(0)
            # Routers that nothing has trained say the same of every token, and go on computing all.
            if scores.numel() and float(scores.min()) < float(scores.max()):
                methods[place] = methods[place].lowered(threshold(scores, method.keep))
    return dataclasses.replace(plan, methods=methods)


def threshold(scores: Tensor, keep: float) -> float:
    """What the wanted part of the scores lies above.

    Example:
        >>> threshold(torch.tensor([4.0, 1.0, 3.0, 2.0]), keep=0.5)
        2.0
    """
    below = round((1.0 - keep) * scores.numel())
    # Above the least of all lies not all of them.
    return float(scores.kthvalue(below).values) if below else float(scores.min()) - 1.0


@dataclass
class _Noting:
    """A method that notes what its routers compare with their threshold.

    Attributes:
        method: The method.
        scores: Of all calls and sublayers.
    """

    method: MixtureOfDepths
    scores: list[Tensor] = field(default_factory=list)

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """The method's, with a note of every choice."""
        return {
            sublayer: dataclasses.replace(plan, rows=tuple(partial(self._choose, c) for c in plan.rows))
            for sublayer, plan in self.method.decisions(anatomy).items()
        }

    def _choose(self, router: Any, stream: Stream, x: Tensor) -> Rows | None:
        if isinstance(router, Router):
            self.scores.append(router.compared(stream, x).detach().float().flatten())
        rows: Rows | None = router(stream, x)
        return rows

"""What a search comes to: the plan that is chosen, or the word that nothing fits and what the nearest would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimformer.methods.layer_drop import LayerDrop
from slimformer.optimization.candidates import Candidate, Verdict, front, nearest
from slimformer.optimization.goals import Conditions, Wish
from slimformer.plans.plan import Plan


def told(
    candidates: Sequence[Candidate],
    chosen: Candidate | None,
    verdict: Verdict | None,
    *,
    conditions: Conditions,
    wish: Wish,
    why: str,
    notes: Sequence[str],
    minutes: float,
) -> dict[str, Any]:
    """What `measured["optimize"]` holds.

    Args:
        candidates: All that were judged.
        chosen: The one that the plan holds; None where none fits.
        verdict: What rows say of it that nothing was chosen on.
        conditions: What was run.
        wish: What was asked for.
        why: Why nothing was chosen.
        notes: What is to be known of the search.
        minutes: How long it took.
    """
    best_ones = front(candidates)
    return {
        "won": chosen is not None,
        **({"why": why} if why else {}),
        "goal": conditions.goal,
        "prompt": conditions.prompt,
        "new_tokens": conditions.new_tokens,
        "batch": conditions.batch,
        **{
            name: value
            for name, value in (("max_loss", wish.max_loss), ("speedup", wish.speedup))
            if value is not None
        },
        "unit": "bytes" if conditions.goal == "memory" else "seconds",
        **({} if verdict is None else {"verdict": verdict.to_dict()}),
        "candidates": [
            {**one.to_dict(), "front": one in best_ones, "chosen": one is chosen} for one in candidates
        ],
        "notes": list(notes),
        "minutes": minutes,
    }


def nothing_fits(candidates: Sequence[Candidate], wish: Wish, goal: str) -> str:
    """Why no candidate was chosen, and what the nearest would cost.

    Args:
        candidates: All that were judged.
        wish: What was asked for.
        goal: What was to cost less.
    """
    what = "smaller" if goal == "memory" else "faster"
    close = nearest(candidates, wish)
    if wish.max_loss is not None:
        said = f"nothing that was tried is {what} than dense within a loss of {wish.max_loss:.2%}"
    else:
        as_much = "small" if goal == "memory" else "fast"
        said = f"nothing that was tried is {wish.speedup:.2f} times as {as_much} as dense"
    if close is None:
        return f"{said}, and nothing is {what} than dense at all"
    words = f"{close.proposal.words}{', repaired' * close.repaired}"
    return (
        f"{said}; the nearest ({words}) is {close.speedup:.2f} times dense "
        f"and loses {close.verdict.mean:.2%} on average and {close.verdict.lost[close.verdict.worst]:.2%} of "
        f"{close.verdict.worst}"
    )


def plan_of(
    chosen: Candidate | None,
    fingerprint: Mapping[str, Any],
    provenance: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> Plan:
    """The plan; one that changes nothing where none was chosen."""
    methods = (LayerDrop(),) if chosen is None else chosen.methods
    return Plan(methods, fingerprint, provenance, measured)

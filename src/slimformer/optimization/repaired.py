"""Repair of what loses somewhat more than is allowed: faster plans that fit once their dense self has taught them."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimformer.errors import CalibrationError
from slimformer.optimization.candidates import Candidate, Verdict, best
from slimformer.optimization.goals import Wish
from slimformer.optimization.proposing.search import Search
from slimformer.optimization.units import Proposal
from slimformer.patching import patched
from slimformer.plans.plan import Plan, fingerprint
from slimformer.training.repair import repair

_logger = logging.getLogger("slimformer")
# What is left of a loss after a repair, before any was seen: the divergence falls by half to three quarters.
_LEFT = 0.5
# Fewer minutes than these teach nothing, by device; and into so many repairs the time is cut at most.
_LEAST, _MOST = {"cuda": 1.0, "cpu": 4.0}, 3
_LENGTHS = {"cuda": 1024, "cpu": 256}


def why_not(search: Search, seconds: float) -> str:
    """Why nothing is repaired; empty where something is.

    Args:
        search: What was found.
        seconds: How long repairs may take.
    """
    support, device = search.judge.losses.support, search.judge.losses.model.device.type
    if support.tier != "rows" or support.anatomy.repeats:
        return "models of the second tier are not repaired"
    if any(importlib.util.find_spec(name) is None for name in ("accelerate", "peft")):
        return 'repair needs pip install "slimformer[training]"'
    if search.wish.max_loss == 0:
        return "nothing may be lost"
    least = 60 * _LEAST.get(device, _LEAST["cpu"])
    if seconds < least:
        return f"a repair takes {least / 60:g} minutes or more here, and {max(seconds, 0) / 60:.1f} were left"
    if any(not _floating(parameter) for parameter in search.judge.losses.model.parameters()):
        return "quantised weights are not repaired"
    return ""


def repair_candidates(
    search: Search,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Any,
    text_field: str,
    hold_out: bool,
    until: float,
    checkpoint: str | os.PathLike[str] | None,
    cache: str | os.PathLike[str],
    advance: Callable[[int], None],
) -> None:
    """Repair some candidates one after the other, each judged as all others are, and add them to the search's.

    Each is the fastest that is expected to fit once it is repaired, by what the repairs before it won back.

    Args:
        search: What was found so far.
        model: What is repaired: a model or a SentenceTransformer.
        tokenizer: Its tokenizer.
        data: As for `slimformer.repair`.
        text_field: As there.
        hold_out: As there.
        until: When to end, by `time.monotonic`.
        checkpoint: Where trainings keep what they have; None keeps nothing.
        cache: Where what the model writes is kept.
        advance: Called after each.
    """
    device = search.judge.losses.model.device.type
    least = 60 * _LEAST.get(device, _LEAST["cpu"])
    shares: list[float] = []
    tried = {one.proposal for one in search.candidates if one.repaired}
    judging = max(search.took, default=0.0)
    for number in range(_MOST):
        left = until - time.monotonic()
        if left < least + judging:
            return
        proposal = _next(search, median(shares) if shares else _LEFT, tried)
        if proposal is None:
            return
        tried.add(proposal)
        before = next(
            (one for one in search.candidates if one.proposal == proposal and not one.repaired), None
        )
        if before is None:
            before = search.judge.judged(proposal)
            search.add(before)
        repairs = min(_MOST - number, max(int(left / (least + judging)), 1))
        minutes = ((until - time.monotonic()) / repairs - judging) / 60
        if minutes <= 0:
            return
        try:
            plan = repair(
                model,
                Plan(search.methods(before), fingerprint(search.judge.losses.model)),
                tokenizer,
                data=data,
                text_field=text_field,
                hold_out=hold_out,
                length=_LENGTHS.get(device, _LENGTHS["cpu"]),
                minutes=minutes,
                panel=None,
                cache=cache,
                checkpoint=None if checkpoint is None else Path(checkpoint) / f"repair-{len(tried)}",
            )
        except CalibrationError as error:
            _logger.warning("A candidate could not be repaired: %s", error)
            return
        if _won(plan.measured):
            after = _judged(search, before, plan)
            shares.append(min(max(after.verdict.need / max(before.verdict.need, 1e-6), 0.05), 1.0))
            search.add(after)
        else:
            shares.append(1.0)
        advance(_MOST)


def _next(search: Search, left: float, tried: set[Proposal]) -> Proposal | None:
    """What to repair, if repairs leave so much of a loss."""
    wish: Wish = search.wish
    known = [
        one for one in search.candidates if not one.repaired and one.speedup > 1 and one.proposal not in tried
    ]
    if wish.speedup is not None:
        fitting = best(known, wish)
        return fitting[0].proposal if fitting else None
    allowed = (wish.max_loss or 0.0) / left
    there = best(search.candidates, wish)
    faster = [
        one for one in known if one.verdict.need <= allowed and (not there or one.speedup > there[0].speedup)
    ]
    proposal = search.within(allowed)
    if proposal is not None and proposal not in tried:
        predicted = search.costs.of(search.judge.base(proposal.base), proposal.units)
        # A proposal that was judged already is not made again: one that is new stands beside those.
        if not faster or search.costs.dense / predicted > max(one.speedup for one in faster) * 1.05:
            return proposal
    return max(faster, key=lambda one: one.speedup).proposal if faster else None


def _judged(search: Search, before: Candidate, plan: Plan) -> Candidate:
    with patched(search.judge.meter.model, plan):
        verdict = Verdict.of(search.judge.panel.judged(search.judge.meter.model))
    dense, cost = search.judge.meter.estimated(tuple(plan.methods), max(search.took, default=1.0) / 3)
    return dataclasses.replace(
        before, dense=dense, cost=cost, verdict=verdict, losses={}, repaired=True, methods=tuple(plan.methods)
    )


def _won(measured: Mapping[str, Any]) -> bool:
    found = measured.get("repair")
    return isinstance(found, Mapping) and found.get("won") is True


def _floating(parameter: Any) -> bool:
    return bool(parameter.is_floating_point())

"""Everything that is measured before the first proposal: text, costs, losses of single units, bases, the panel."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimformer.calibration.drops.partial_results import PartialResults
from slimformer.calibration.drops.similarity import Unit as Kind
from slimformer.calibration.mixture.sources import sources_of
from slimformer.errors import CalibrationError
from slimformer.evaluation.panel import PanelBudget
from slimformer.evaluation.readable import longest, predicts_tokens
from slimformer.examination.tiers import Support
from slimformer.optimization.candidates import Candidate
from slimformer.optimization.goals import Conditions, Wish
from slimformer.optimization.judging import Judge, Judges
from slimformer.optimization.measuring.bases import (
    Option,
    elimination_options,
    encoder_options,
    measured_eliminations,
    plain,
)
from slimformer.optimization.measuring.costs import Costs, Meter
from slimformer.optimization.measuring.losses import Losses, sizes_for
from slimformer.optimization.measuring.reading import Reading, elimination_rows, panel_of, workload
from slimformer.optimization.measuring.replacing import replaces, replacing_bases, to_keep
from slimformer.optimization.proposing.search import Search
from slimformer.optimization.units import Base, Unit, droppable, methods_of
from slimformer.plans.plan import fingerprint
from slimformer.text.progress import Stages
from slimformer.training.attempts.minutes import Minutes

_logger = logging.getLogger("slimformer")
# Parts of the minutes: for timing all units, for timing a base, and after which no round can follow any more.
_TIMING, _BASE, _TOO_LATE = 0.06, 0.01, 0.85
# After which part no more layers are judged as a whole, and after which no more bases are made.
_BLOCKS, _BASES = 0.35, 0.5
# Units that are judged between two writes of partial results.
_AT_ONCE = 12
# Texts that heads and narrow MLPs are fitted on, per minute.
_FITTED = 60


@dataclass(frozen=True)
class Asked:
    """One call of `optimize`, checked.

    Attributes:
        model: A model, SentenceTransformer or Pipeline.
        inner: The transformers model in it.
        support: What is known of its layers.
        tokenizer: Its tokenizer.
        wish: What is asked for.
        conditions: What is run.
        reading: What is read.
        prompts: The user's own prompts.
        prompts_by: How those are judged.
        budget: How much the panel reads.
        text_field: The field with the text.
        seed: Decides what is drawn.
        clock: The minutes.
        checkpoint: Where partial results are kept.
        cache: Where what the model writes is kept.
        judges: Who judges proposals.
    """

    model: Any
    inner: Any
    support: Support
    tokenizer: PreTrainedTokenizerBase
    wish: Wish
    conditions: Conditions
    reading: Reading
    prompts: Any
    prompts_by: Any
    budget: PanelBudget
    text_field: str
    seed: int
    clock: Minutes
    checkpoint: str | os.PathLike[str] | None
    cache: str
    judges: Judges

    @property
    def decoder(self) -> bool:
        """Whether the model predicts tokens."""
        return predicts_tokens(self.inner, self.support.anatomy)

    def panel(self, last: bool) -> Any:
        """The panel that judges while searching, or the last one."""
        return panel_of(
            self.reading, self.model, self.tokenizer, self.conditions, prompts=self.prompts, prompts_by=self.prompts_by,
            budget=self.budget, cache=self.cache, seed=self.seed, last=last,
        )  # fmt: skip

    def is_late(self) -> bool:
        """Whether what is left is wanted for proposing, so that what has been tried so far has to do."""
        if self.clock.used <= _BASES * self.clock.seconds / 60:
            return False
        _logger.info("The time is short: not everything that might go is tried.")
        return True

    def check_time(self, what: str, part: float = 1.0) -> None:
        """Refuse to go on where no round can follow any more.

        Args:
            what: What took the time.
            part: How much of that is done.

        Raises:
            CalibrationError: If too much of the minutes is used.
        """
        minutes, used = self.clock.seconds / 60, self.clock.used
        if used <= _TOO_LATE * minutes:
            return
        wanted = max(math.ceil(2.5 * used / max(part, 0.05)), math.ceil(2 * minutes), 1)
        kept = (
            "" if self.checkpoint is None else " What was measured is kept: the same call goes on from there."
        )
        raise CalibrationError(
            f"{minutes:g} minutes are too few for one round with this model: {what} took them. Give about {wanted}."
            f"{kept}"
        )


def prepared(asked: Asked, stages: Stages) -> tuple[Search, float]:
    """Measure all of it, or take it over from partial results.

    Args:
        asked: What is asked for.
        stages: Where progress is shown.

    Returns:
        The search, and how many seconds the panel of the dense model took.

    Raises:
        CalibrationError: If nothing can be dropped, or the minutes are too few for one round.
        DataError: If the text is too short.
    """
    anatomy, conditions = asked.support.anatomy, asked.conditions
    units = droppable(asked.model, asked.support)
    if not units:
        raise CalibrationError(
            f"Nothing can be left out of {type(anatomy.stack).__name__}: {asked.support.describe()}"
        )
    work = workload(asked.reading, asked.model, asked.tokenizer, asked.support, conditions, asked.seed)
    options = (
        elimination_options(asked.support, units, conditions.prompt) if _reads_prompts(conditions) else []
    )
    sizes = sizes_for(
        asked.inner,
        len(units),
        len(sources_of(asked.reading.data, asked.decoder)) if asked.decoder else 1,
        asked.clock.seconds / 60,
        longest(anatomy, asked.tokenizer),
        fitting=replaces(asked.support, asked.inner.device.type, asked.clock.seconds / 60),
    )
    losses = Losses.read(
        asked.inner,
        asked.support,
        asked.tokenizer,
        asked.reading.data,
        sizes=sizes,
        text_field=asked.text_field,
        hold_out=asked.reading.hold_out,
        seed=asked.seed,
        cache=asked.cache,
        long_prompts=bool(options),
        stages=stages,
    )
    partial = PartialResults(
        asked.checkpoint, _identity(asked, losses.text.source, sizes.judged, sizes.fitted)
    )
    _cut(asked, losses, len(units), partial)
    asked.check_time("reading the text")
    meter = Meter(asked.model, asked.support, work, conditions)
    found = partial.kept("costs")
    costs = Costs.from_dict(found) if found else meter.costs(units, asked.clock.part(_TIMING))
    partial.keep("costs", costs.to_dict())
    meter.gain = costs.dense / costs.plain
    asked.check_time("timing the model")
    single = _alone(asked, losses, units, partial, stages)
    bases = [plain(costs), *_bases(asked, options, losses, meter, costs, units, partial)]
    if sizes.fitted:
        bases += _replacing(asked, losses, meter, costs, units, partial, stages)
    asked.check_time("measuring what may go")
    begun = time.monotonic()
    panel = asked.panel(last=False)
    recording = time.monotonic() - begun
    asked.check_time("the panel")
    blocks = {
        layer: single["block", layer]
        for kind, layer in single
        if kind == "block" and ("attention", layer) in units and ("mlp", layer) in units
    }
    judge = Judge(bases, losses, meter, panel)
    search = Search(units, judge, asked.judges, single, blocks, costs, asked.wish, partial, asked.clock)
    names = {base.name: base for base in bases}
    for entry in partial.kept("candidates") or ():
        kept = Candidate.from_dict(entry)
        if kept.proposal.base in names and not kept.repaired:
            base = names[kept.proposal.base]
            methods = () if base.single else methods_of(base, kept.proposal.units)
            search.candidates.append(dataclasses.replace(kept, methods=methods))
    return search, recording


def _cut(asked: Asked, losses: Losses, units: int, partial: PartialResults) -> None:
    """Judge by what there is time for, and after an interruption by the same rows: their losses are compared."""
    rows, known = losses.rows_each, partial.kept("rows")
    if known is None:
        losses.fit_into(units, asked.clock.seconds / 60)
    elif known < rows:
        losses.keep_rows(known)
    if losses.rows_each < rows:
        _logger.info(
            "This machine is slow at the moment: %d of %d rows of every source are judged by.",
            losses.rows_each,
            rows,
        )
    partial.keep("rows", losses.rows_each)


def _reads_prompts(conditions: Conditions) -> bool:
    return conditions.goal in ("prefill", "memory")


def _alone(
    asked: Asked, losses: Losses, units: list[Unit], partial: PartialResults, stages: Stages
) -> dict[Unit, Mapping[str, float]]:
    """What each unit costs alone, and each layer whose attention and MLP can go."""
    known: dict[Unit, Mapping[str, float]] = dict(partial.singles())
    layers = [layer for kind, layer in units if kind == "attention" and ("mlp", layer) in units]
    both: list[tuple[Kind, int]] = [("block", layer) for layer in layers]
    wanted = [*units, *(unit for unit in both if unit not in units)]
    left = [unit for unit in wanted if unit not in known]
    move: Callable[[int], None] = stages.advance("parts judged alone")
    done = 0

    def advance(_: int) -> None:
        nonlocal done
        done += 1
        move(len(left))
        asked.check_time("judging every part alone", done / len(left))

    for start in range(0, len(left), _AT_ONCE):
        if left[start][0] == "block" and asked.clock.used > _BLOCKS * asked.clock.seconds / 60:
            # What both of a layer cost beyond their sum is then learnt like that of any pair.
            break
        known = losses.alone(left[start : start + _AT_ONCE], known, advance)
        partial.keep_singles(known)
    return {unit: known[unit] for unit in wanted if unit in known}


def _bases(
    asked: Asked,
    options: list[Option],
    losses: Losses,
    meter: Meter,
    costs: Costs,
    units: list[Unit],
    partial: PartialResults,
) -> list[Base]:
    allowance = asked.clock.part(_BASE)
    if options:
        device = asked.inner.device.type
        rows = elimination_rows(asked.reading, asked.tokenizer, asked.conditions, device, asked.seed)
        kept: dict[str, Any] = partial.kept("bases") or {}
        if kept:
            by_name = {option.name: option for option in options}
            return [
                Base(name, by_name[name].methods, of["cost"], of["losses"],
                     dict.fromkeys(by_name[name].touched, of["left"]), by_name[name].whole)
                for name, of in kept.items()
            ]  # fmt: skip
        found = []
        for base in measured_eliminations(options, losses, meter, costs, rows, allowance):
            found.append(base)
            if asked.is_late():
                break
        partial.keep(
            "bases",
            {
                base.name: {
                    "cost": base.cost, "losses": dict(base.losses), "left": next(iter(base.left.values()), 1.0)
                }
                for base in found
            },
        )  # fmt: skip
        return found
    if asked.conditions.goal != "encode":
        return []
    most = int(_FITTED * asked.clock.seconds / 60)
    made = []
    for option in encoder_options(
        asked.model, asked.support, units, asked.reading.texts, asked.reading.queries, most
    ):
        lost = losses.of(option.methods)
        base = meter.base(costs, option.name, option.methods, option.touched, allowance, option.whole)
        made.append(dataclasses.replace(base, losses=lost))
        if asked.is_late():
            break
    return made


def _replacing(
    asked: Asked,
    losses: Losses,
    meter: Meter,
    costs: Costs,
    units: list[Unit],
    partial: PartialResults,
    stages: Stages,
) -> list[Base]:
    """What may be left in the place of sublayers, as far as there is time."""
    found: list[Base] = []
    if asked.is_late():
        return found
    allowance, advance = asked.clock.part(_TIMING / 2), stages.advance("replacements fitted")
    kept = partial.kept("replacing") or {}
    for base in replacing_bases(losses, meter, costs, units, allowance, advance, kept):
        kept = {**kept, base.name: to_keep(base)}
        partial.keep("replacing", kept)
        if base.single:
            found.append(base)
        if asked.is_late():
            break
    return found


def _identity(asked: Asked, source: str, rows: int, fitted: int) -> dict[str, Any]:
    """What must be equal for partial results to be taken over."""
    conditions = asked.conditions
    return {
        "model": fingerprint(asked.inner),
        "data": source,
        "read": [rows, fitted, asked.text_field],
        "conditions": dataclasses.asdict(conditions),
        "device": asked.inner.device.type,
        "seed": asked.seed,
        "panel": [asked.budget, asked.prompts_by, str(asked.prompts)],
    }

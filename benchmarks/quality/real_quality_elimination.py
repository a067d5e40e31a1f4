"""A real model whose long prompts lose tokens: questions about meetings, keys in long texts, work and time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import slimformer
from benchmarks.frame.inputs import C4, WIKI_TEST, kept, kept_json
from benchmarks.frame.registry import Settings
from benchmarks.frame.results import Measurement
from benchmarks.long_context.meeting_questions import CHOICES, Answered, MeetingQuestions
from benchmarks.quality.real_quality_figures import (
    JUDGING_SEED,
    binomial,
    in_turns,
    panel_values,
    prefill,
    summary,
)
from slimformer import Plan, TokenElimination
from slimformer.calibration.elimination import prefill_flops
from slimformer.errors import CalibrationError
from slimformer.evaluation.panel import Panel
from slimformer.evaluation.perplexity import wikitext_blocks
from slimformer.evaluation.readable import longest
from slimformer.model.anatomy import find_anatomy
from slimformer.plans.plan import fingerprint
from slimformer.text.sources import load_texts
from slimformer.training.loop import TrainingSettings

_QUESTIONS, _RETRIEVED = 200, (4096, 8192, 16384)
# Tokens of a prompt for which the work is counted, the time is taken, and schedules are chosen.
_PROMPT = 8192
_TRAINING = TrainingSettings(steps=300, rows=2)
# Nats per token of an answer that a chosen schedule may lose.
_LOSS = 0.05


@dataclass(frozen=True)
class Elimination:
    """What is left of long prompts.

    Attributes:
        schedule: From which part of the layers on, in 28ths, which part of the tokens stays; empty where it is chosen.
        last: The part of the transcript that is read at all.
        predicted: Whether trained predictors say which tokens stay.
        chosen: Whether `calibrate` says where and how many.
        heads: As `TokenElimination` takes it.
    """

    schedule: tuple[tuple[int, float], ...] = ()
    last: float = 1.0
    predicted: bool = False
    chosen: bool = False
    heads: str = "sum"


_HALF = ((7, 0.5), (14, 0.25))
ELIMINATIONS = {
    "elimination-dense": Elimination(),
    "elimination-last-half": Elimination(last=0.5),
    "elimination-60": Elimination(((14, 0.2),)),
    "elimination-60-max": Elimination(((14, 0.2),), heads="max"),
    "elimination-half": Elimination(_HALF, heads="max"),
    "elimination-46": Elimination(((9, 0.2),)),
    "elimination-chosen": Elimination(chosen=True, heads="max"),
    "elimination-chosen-predictor": Elimination(chosen=True, predicted=True),
    "elimination-half-predictor": Elimination(_HALF, predicted=True),
}


TIMED = tuple(part for part, of in ELIMINATIONS.items() if of.schedule or of.chosen)


class Meetings:
    """Long documents, and what is asked of methods that leave out a part of them.

    Args:
        settings: Of the run.
        model: Unpatched.
        tokenizer: Its tokenizer.
    """

    def __init__(
        self, settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.anatomy = find_anatomy(model)
        # A random model of a smoke run reads what it has no positions for.
        self.most = settings.pick(longest(self.anatomy, tokenizer), 2048)

    @cached_property
    def questions(self) -> MeetingQuestions:
        """Of transcripts of 4k to 16k tokens, as far as the model reads them."""
        count = min(self.settings.texts or _QUESTIONS, self.settings.pick(_QUESTIONS, 3))
        least, most = self.settings.pick((4096, 16384), (64, 2048))
        return MeetingQuestions.read(
            self.settings.data, self.tokenizer, count=count, least=least, most=min(most, self.most)
        )

    @cached_property
    def dense(self) -> list[Answered]:
        """What the unpatched model answers; found by one process, and kept for the others."""
        file = self.settings.plans / f"dense-meetings-{len(self.questions.questions)}.json"
        found = kept_json(file, lambda: self.questions.answered(self.model))
        return [Answered(*row) for row in found]

    @cached_property
    def panel(self) -> Panel | None:
        """Keys in texts of the lengths that the model reads; None where it finds none by itself."""
        lengths = [length for length in _RETRIEVED if length <= self.most]
        try:
            return Panel.recorded(
                self.model,
                self.tokenizer,
                capabilities=("retrieval",),
                lengths=self.settings.pick(lengths, [256]),
                budget=self.settings.pick("standard", "quick"),
                seed=JUDGING_SEED,
            )
        except CalibrationError:
            return None

    def measured(self, part: str) -> Iterator[Measurement]:
        """The figures of one part, each as soon as there is one."""
        of = ELIMINATIONS[part]
        plan, values = self._plan(part, of)
        note = "" if plan is None else _shown(plan)
        work = prefill_flops(self.anatomy, _PROMPT, 0, of.last) if plan is None else self.work(plan)
        yield Measurement({"figure": "plan"}, part, values={"work": work, **values}, note=note)
        dense = self.dense
        with contextlib.nullcontext() if plan is None else slimformer.patched(self.model, plan):
            found = dense if part == "elimination-dense" else self._answered(of.last)
            yield Measurement({"figure": "meetings"}, part, values=_values(found, dense))
        if plan is None:
            return
        if self.panel is not None:
            with slimformer.patched(self.model, plan):
                judged = self.panel.judged(self.model)
            values = panel_values(judged) | _by_length(judged.capability("retrieval").parts)
            yield Measurement({"figure": "retrieval"}, part, values=values)

    def _answered(self, last: float) -> list[Answered]:
        return self.questions.answered(self.model, last=last)

    def _plan(self, part: str, of: Elimination) -> tuple[Plan | None, dict[str, float]]:
        """The method as a plan, and the seconds of choosing or training."""
        plans = self.settings.plans
        if of.chosen:
            plan, seconds = kept(plans / "elimination-chosen", self._chosen)
            if not of.predicted:
                return plan, {"choosing_seconds": seconds}
            schedule = _schedule(plan)
        else:
            layers = len(self.anatomy.layers)
            schedule = {max(round(layer * layers / 28), 1): keep for layer, keep in of.schedule}
        if not schedule:
            return None, {}
        if of.predicted:
            plan, training = kept(plans / part, partial(self._trained, schedule))
            return plan, {"training_seconds": training}
        heads: Any = of.heads
        method = TokenElimination(schedule, heads=heads)
        return Plan([method], fingerprint(self.model)), {}

    def _chosen(self) -> Plan:
        return slimformer.calibrate(
            self.model,
            self.tokenizer,
            TokenElimination(heads="max"),
            data=self._texts(),
            max_loss=self.settings.pick(_LOSS, 10.0),
            length=self.settings.pick(min(_PROMPT, self.most - 64), 400),
            answer=self.settings.pick(64, 16),
        )

    def _trained(self, schedule: Mapping[int, float]) -> Plan:
        return slimformer.calibrate(
            self.model,
            self.tokenizer,
            TokenElimination(scorer="predictor"),
            schedule=schedule,
            data=self._texts(),
            length=self.settings.pick(4096, 256),
            settings=self.settings.pick(_TRAINING, TrainingSettings(steps=2)),
        )

    def _texts(self) -> list[str]:
        """Books, C4, and meetings about which nothing is asked."""
        books = sorted((self.settings.data / "books").glob("*.txt"))
        chapters = [
            text[start : start + 40_000]
            for text in (book.read_text(encoding="utf-8")[20_000:] for book in books)
            for start in range(0, len(text), 40_000)
        ]
        return [*self.questions.others, *chapters, *load_texts(self.settings.data / C4)[0]]

    def work(self, plan: Plan) -> float:
        """Multiplications of a prefill of 8k tokens as a part of the dense one's."""
        layers, keep, total = len(self.anatomy.layers), 1.0, 0.0
        schedule = _schedule(plan)
        for layer in range(layers):
            keep = schedule.get(layer, keep)
            total += prefill_flops(self.anatomy, _PROMPT, 0, keep)
        return total / layers

    def speed(self, part: str) -> dict[str, float]:
        """A prefill beside the unpatched model's, in turns.

        Raises:
            ValueError: If the part eliminates nothing.
        """
        plan, _ = self._plan(part, ELIMINATIONS[part])
        if plan is None:
            raise ValueError(f"{part} eliminates nothing")
        tokens = min(self.settings.pick(_PROMPT if self.settings.on_gpu else 1024, 256), self.most)
        ids = wikitext_blocks(self.settings.data / WIKI_TEST, self.tokenizer, tokens, count=1)
        ids = ids.to(self.model.device)
        dense, slim = in_turns(self.settings, self.model, lambda: prefill(self.model, ids), plan)
        return {
            "prompt_tokens": tokens,
            "prefill_dense_ms": dense,
            "prefill_ms": slim,
            "prefill_speedup": dense / slim,
        }


def _schedule(plan: Plan) -> dict[int, float]:
    return {
        layer: keep
        for method in plan.methods
        if isinstance(method, TokenElimination)
        for layer, keep in method.schedule.items()
    }


def _shown(plan: Plan) -> str:
    return ", ".join(f"{layer}: {keep:.0%}" for layer, keep in sorted(_schedule(plan).items()))


def _values(found: Sequence[Answered], dense: Sequence[Answered]) -> dict[str, float]:
    """Accuracy, certainty, and both as parts of dense's; accuracy by length as well."""
    right, own = ([answer.right for answer in of] for of in (found, dense))
    accuracy = sum(right) / len(right)
    certainty, certain = (sum(answer.certainty for answer in of) / len(of) for of in (found, dense))
    values = {"questions": len(right), "right": accuracy, "right_spread": binomial(accuracy, len(right))}
    values |= {"certainty": certainty, "tokens": sum(answer.tokens for answer in dense) / len(dense)}
    chance = 1 / CHOICES
    # Of what is hardly there no part can be told.
    if certain > 1.2 * chance:
        values["certainty_of_dense"] = (certainty - chance) / (certain - chance)
    both = summary({"meetings": right}, {"meetings": own})
    values |= {name.replace("mean", "right"): of for name, of in both.items() if name.startswith("mean_of")}
    for name, least, most in (("4k_to_8k", 0, 8192), ("8k_to_16k", 8192, 1 << 30)):
        some = [answer.right for answer, of in zip(found, dense, strict=True) if least <= of.tokens < most]
        if some:
            values[f"right_{name}"] = sum(some) / len(some)
    return values


def _by_length(parts: Mapping[str, float]) -> dict[str, float]:
    """What is kept at each length, of prompts with one key and with several."""
    lengths: dict[str, list[float]] = {}
    for kind, kept_part in parts.items():
        lengths.setdefault(kind.split(" ")[0], []).append(kept_part)
    return {f"retrieval_{length}": sum(of) / len(of) for length, of in lengths.items()}

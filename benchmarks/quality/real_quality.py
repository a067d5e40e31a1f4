"""A real instruction-tuned model: what plans of every kind keep of it, before and after repair, and what they save."""

from __future__ import annotations

import os
from collections.abc import Iterator

from benchmarks.frame.compare import release
from benchmarks.frame.inputs import BOOKS, C4, DENSE, QMSUM, WIKI_DEMO, WIKI_TEST, decoder
from benchmarks.frame.registry import Settings, benchmark
from benchmarks.frame.results import Measurement, reason
from benchmarks.quality.accuracy import TASK_FILES
from benchmarks.quality.gsm8k import GSM8K
from benchmarks.quality.mixture_of_depths import ALPACA, DOLLY
from benchmarks.quality.real_quality_cases import CASES, made
from benchmarks.quality.real_quality_elimination import ELIMINATIONS, TIMED, Meetings
from benchmarks.quality.real_quality_figures import Judge

# A repaired plan is as fast as it was.
_TIMED = {f"speed-{key}": key for key, case in CASES.items() if not case.repaired} | {
    f"speed-{part}": part for part in TIMED
}
PARTS = (DENSE, *CASES, *ELIMINATIONS, *_TIMED)
# One of every kind.
_TRIED_OUT = (
    DENSE,
    "attention-7-cosine",
    "attention-7-cosine-repaired",
    "attention-14-routed",
    "elimination-dense",
    "elimination-half",
    "speed-attention-7-cosine",
    "speed-elimination-half",
)


@benchmark(
    "real_quality",
    "tasks, panel, perplexity, speed and memory of plans for a real model, repaired, routed and with tokens eliminated",
    model="instruction-tuned decoder",
    data=(C4, WIKI_DEMO, ALPACA, DOLLY, WIKI_TEST, BOOKS, QMSUM, GSM8K, *TASK_FILES),
    parts=PARTS,
    takes=("texts", "plans", "training"),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Every part by itself; plans, and what the dense model answers, are kept for later parts and other processes.

    Times are parts of their own, so that the others can share a GPU.
    """
    # Of a tokenizer that a data loader forks away from.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model, tokenizer = decoder(settings, settings.dtype)
    parts = settings.chosen(PARTS)
    if settings.smoke and settings.only is None:
        parts = list(_TRIED_OUT)
    judge = Judge(settings, model, tokenizer)
    meetings = Meetings(settings, model, tokenizer)
    for part in parts:
        try:
            if part in _TIMED:
                yield Measurement({"figure": "speed"}, part, values=_times(judge, meetings, _TIMED[part]))
            elif part in ELIMINATIONS:
                yield from meetings.measured(part)
            else:
                yield from _measured(judge, part)
        except Exception as failure:
            # The parts behind it are still measured.
            yield Measurement({"figure": "all"}, part, status="failed", note=reason(failure))
        release()


def _measured(judge: Judge, part: str) -> Iterator[Measurement]:
    """The figures of one part, each as soon as there is one."""
    if part == DENSE:
        for figure, values in judge.of_dense():
            yield Measurement({"figure": figure}, part, values=values)
        return
    case = CASES[part]
    plan = made(judge.settings, judge.model, judge.tokenizer, case)
    yield Measurement({"figure": "plan"}, part, values=plan.values(), note=plan.layers())
    for figure, values in judge.of(plan.plan):
        yield Measurement({"figure": figure}, part, values=values)


def _times(judge: Judge, meetings: Meetings, part: str) -> dict[str, float]:
    if part in ELIMINATIONS:
        return meetings.speed(part)
    return judge.speed(made(judge.settings, judge.model, judge.tokenizer, CASES[part]).plan)

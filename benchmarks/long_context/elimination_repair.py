"""What repair wins back where tokens leave a small language model early."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.inputs import DENSE, decoder, kept, repaired
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.long_context.elimination_quality import (
    DATA,
    FIGURES,
    SCORERS,
    TRUNCATED,
    computed,
    figures,
    predictors_of,
    training_texts,
)
from benchmarks.long_context.far_tokens import Tasks
from benchmarks.long_context.long_prompts import LongTexts
from slimformer import Plan, TokenElimination
from slimformer.decisions.registry import tensors_of
from slimformer.model.anatomy import find_anatomy
from slimformer.training.trained_weights import WHAT, What

BEFORE = "with its predictor"
SCHEDULE = {3: 0.444}
SCORER = "predictor, blocks of 256, last 768 kept"


class Strength(NamedTuple):
    """How much is trained: what, for how many steps, and how fast."""

    what: tuple[What, ...]
    steps: int
    learning_rate: float


STRENGTHS = {
    "repaired, norms": Strength(("norms",), 100, 1e-3),
    "repaired, 100 steps at 3e-4": Strength(WHAT, 100, 3e-4),
    "repaired, 250 steps at 1e-3": Strength(WHAT, 250, 1e-3),
}
_LENGTHS = (4096, 8192 - 512)
# Twice as many prompts as for the choice of a schedule: the figures lie closer together.
_PROMPTS = 40
_TINY_STRENGTHS = {"repaired": Strength(WHAT, 4, 1e-3)}
_TINY_OPTIONS = {"scorer": "predictor", "block": 1, "window": 64}


@benchmark(
    "elimination_repair",
    "passkeys, copies and following text with tokens leaving at layer 3, repaired",
    model="instruction-tuned decoder",
    data=DATA,
    parts=list(map(str, _LENGTHS)),
    takes=("plans",),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Train the predictor, then repair at 4096 tokens; measure in bfloat16 on books and meetings that neither reads."""
    model, tokenizer = decoder(settings)
    schedule = settings.pick(SCHEDULE, {2: 0.5})
    plan, _ = kept(settings.plans / "predicted", partial(_predicted, settings, model, tokenizer, schedule))
    plans = {BEFORE: (plan, 0.0)}
    train_on = training_texts(settings)
    for name, strength in settings.pick(STRENGTHS, _TINY_STRENGTHS).items():
        # Layers before the first from which tokens leave stay as they are: the same tokens leave.
        options: dict[str, Any] = {**strength._asdict(), "rows": 4, "length": 4096, "near": 0}
        make = partial(repaired, settings, model, tokenizer, plan, train_on, **options)
        plans[name] = kept(settings.plans / name.replace(" ", "-"), make)
    share = computed(schedule, len(find_anatomy(model).layers))
    model = model.to(settings.dtype)
    texts = LongTexts(settings.data, tokenizer)
    for tokens in settings.pick(_LENGTHS, (700,)):
        if not settings.wants(str(tokens)):
            continue
        tasks = Tasks.of(texts, tokens, settings.pick(_PROMPTS, 2), settings.pick(40960, 1024) // tokens)
        at: Parameters = {"tokens": tokens, "computed": round(share, 3)}
        yield Measurement(at, DENSE, values=tasks.measure(model))
        yield Measurement(at, TRUNCATED, values=tasks.measure(model, last=round(share * tokens)))
        for candidate, (found, seconds) in plans.items():
            with slimformer.patched(model, found):
                values = tasks.measure(model)
            if seconds:
                values["seconds"] = seconds
            yield Measurement(at, candidate, values=values)


def _predicted(settings: Settings, model: Any, tokenizer: Any, schedule: dict[int, float]) -> Plan:
    plan = predictors_of(settings, model, tokenizer, schedule)
    options: dict[str, Any] = settings.pick(SCORERS[SCORER], _TINY_OPTIONS)
    elimination = TokenElimination(schedule, **options, weights=tensors_of(plan.methods[0]))
    return Plan([elimination], plan.fingerprint)


@table("elimination_repair")
def rows_per_length(content: dict[str, Any]) -> str:
    """Rows per length: dense, truncated, with its predictor, and repaired."""
    rows = []
    for tokens in tables.distinct(content, "tokens"):
        dense = tables.find(content, DENSE, tokens=tokens)
        for found in content["measurements"]:
            at, candidate, values = found["parameters"], found["candidate"], found["values"]
            if dense is None or at["tokens"] != tokens:
                continue
            share = "100%" if candidate == DENSE else f"{at['computed']:.0%}"
            beside = None if candidate == DENSE else dense["values"]
            seconds = tables.shown(values.get("seconds"), ".0f")
            rows.append([str(tokens), candidate, share, *figures(values, beside), seconds])
    return tables.markdown(["Prompt", "", "computed", *FIGURES, "training, s"], rows)

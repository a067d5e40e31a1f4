"""What repair wins back where tokens leave a small language model early."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import slimformer
from benchmarks.drop_table import DENSE, load_model
from benchmarks.elimination_quality import (
    SCORERS,
    TRUNCATED,
    Tasks,
    computed,
    figures,
    training_texts,
)
from benchmarks.frame import tables
from benchmarks.frame.registry import MissingInput, Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.long_prompts import LongTexts
from benchmarks.repair import kept
from slimformer import Plan, TokenElimination
from slimformer.model.anatomy import find_anatomy
from slimformer.text.sources import load_texts
from slimformer.training.loop import TrainingSettings
from slimformer.training.predictors import train_predictors
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
    needs="any",
    description="passkeys, copies and following text with tokens leaving at layer 3, repaired (--model, --data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Train the predictor, then repair at 4096 tokens; measure in bfloat16 on books and meetings that neither reads."""
    if settings.data is None and not settings.smoke:
        raise MissingInput(
            "it needs --data, a folder with books/, qmsum_retrieval/, wikitext2/ and c4_calib/"
        )
    model, tokenizer = load_model(settings)
    schedule = settings.pick(SCHEDULE, {2: 0.5})
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.plans or Path(temporary)
        plan, _ = kept(folder / "predicted", partial(_predicted, settings, model, tokenizer, schedule))
        plans = {BEFORE: (plan, 0.0)}
        for name, strength in settings.pick(STRENGTHS, _TINY_STRENGTHS).items():
            make = partial(_repaired, settings, model, tokenizer, plan, strength)
            plans[name] = kept(folder / name.replace(" ", "-"), make)
    share = computed(schedule, len(find_anatomy(model).layers))
    if settings.device.type == "cuda":
        model = model.to(torch.bfloat16)
    text = "\n".join(load_texts(None, limit=30)[0]) if settings.data is None else ""
    texts = LongTexts(settings.data, tokenizer, text)
    for tokens in settings.pick(_LENGTHS, (700,)):
        if settings.only not in (None, str(tokens)):
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
    plan = train_predictors(
        model,
        tokenizer,
        schedule=schedule,
        data=training_texts(settings),
        hold_out=True,
        length=settings.pick(4096, 256),
        settings=TrainingSettings(steps=settings.pick(800, 2)),
        progress=False,
    )
    options: dict[str, Any] = settings.pick(SCORERS[SCORER], _TINY_OPTIONS)
    elimination = TokenElimination(schedule, **options, weights=plan.methods[0].tensors())
    return Plan([elimination], plan.fingerprint)


def _repaired(settings: Settings, model: Any, tokenizer: Any, plan: Plan, strength: Strength) -> Plan:
    """Layers before the first from which tokens leave stay as they are: the same tokens leave."""
    return slimformer.repair(
        model,
        plan,
        tokenizer,
        data=training_texts(settings),
        what=strength.what,
        near=0,
        rank=settings.pick(32, 2),
        length=settings.pick(4096, 256),
        every=settings.pick(25, 2),
        patience=6,
        settings=TrainingSettings(
            steps=strength.steps,
            rows=settings.pick(4, 2),
            learning_rate=strength.learning_rate,
            precision="bf16" if settings.device.type == "cuda" else "no",
            keep_every=10_000,
        ),
        progress=not settings.smoke,
    )


@table("elimination_repair", source="elimination_repair")
def repaired(content: dict[str, Any]) -> str:
    """Rows per length: dense, truncated, with its predictor, and repaired."""
    rows = []
    for (tokens,) in tables.points(content, "tokens", where=lambda _: True):
        dense = tables.find(content, DENSE, tokens=tokens)
        for found in content["measurements"]:
            candidate = found["candidate"]
            if dense is None or found["parameters"]["tokens"] != tokens:
                continue
            share = "100%" if candidate == DENSE else f"{100 * found['parameters']['computed']:.0f}%"
            beside = None if candidate == DENSE else dense["values"]
            seconds = f"{found['values']['seconds']:.0f}" if "seconds" in found["values"] else "–"
            rows.append([str(tokens), candidate, share, *figures(found["values"], beside), seconds])
    head = ["Prompt", "", "computed", "passkey", "passkey in a book", "associations", "copy, NLL"]
    return tables.markdown([*head, "following text, NLL", "training, s"], rows)

"""`slimformer.optimize` beside the best plan of every single method at the same speed, all repaired alike."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.compare import release
from benchmarks.frame.inputs import C4, DENSE, WIKI_TEST, decoder, kept
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, reason
from benchmarks.quality.accuracy import TASK_FILES
from benchmarks.quality.gsm8k import GSM8K
from benchmarks.quality.real_quality_cases import OWN_WORDS
from benchmarks.quality.real_quality_figures import TASKS, Judge, in_turns, prefill, weights_left
from slimformer import LayerDrop, Plan
from slimformer.calibration.drops.search import most_removals
from slimformer.errors import SlimformerError
from slimformer.evaluation.perplexity import wikitext_blocks
from slimformer.evaluation.timing.speed import cache_bytes
from slimformer.examination.tiers import known_anatomy
from slimformer.training.loop import TrainingSettings

# What is asked for: the goal, and how many percent may be lost.
WISHES = (("generate", 2), ("generate", 5), ("prefill", 2), ("prefill", 5), ("memory", 2))
# How a single method chooses, and of what.
RIVALS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "attention-cosine": ("attentions by cosine (LLM-Drop)", {"selection": "cosine", "kinds": ("attention",)}),
    "block-cosine": ("blocks by cosine (ShortGPT)", {"selection": "cosine", "kinds": ("block",)}),
    "attention-greedy": ("attentions by greedy KL", {"selection": "greedy", "kinds": ("attention",)}),
    "block-greedy": ("blocks by greedy KL (SLEB)", {"selection": "greedy", "kinds": ("block",)}),
    "attention-panel": ("attentions by the panel", {"selection": "panel", "kinds": ("attention",)}),
    "mlp-panel": ("MLPs by the panel", {"selection": "panel", "kinds": ("mlp",)}),
    "block-panel": ("blocks by the panel", {"selection": "panel", "kinds": ("block",)}),
}
OPTIMIZED = "slimformer.optimize"
_MINUTES = 15.0
PARTS = (DENSE, *(f"{goal}-{loss}" for goal, loss in WISHES),
         *(f"{goal}-{loss}-{rival}" for goal, loss in WISHES for rival in RIVALS))  # fmt: skip


@benchmark(
    "optimize",
    "speed and tasks of the fastest plan within a loss, beside every single method at the same speed",
    model="instruction-tuned decoder",
    data=(C4, WIKI_TEST, GSM8K, *TASK_FILES),
    parts=PARTS,
    takes=("texts", "plans", "training"),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Every part by itself; the plan that others are compared with is made first where it is not there.

    `--training` is how many minutes the search has, and half of that is how many each rival's repair has.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model, tokenizer = decoder(settings, settings.dtype)
    parts = settings.chosen(PARTS)
    if settings.smoke and settings.only is None:
        parts = [DENSE, "memory-2", "memory-2-attention-cosine"]
    trial = Trial(settings, model, tokenizer, Judge(settings, model, tokenizer))
    for part in parts:
        try:
            yield from trial.measured(part)
        except Exception as failure:
            # The parts behind it are still measured.
            yield Measurement({"figure": "all"}, part, status="failed", note=reason(failure))
        release()


@dataclass
class Trial:
    """A dense model and what is measured of plans for it.

    Attributes:
        settings: Of the run.
        model: Unpatched.
        tokenizer: Its tokenizer.
        judge: What it and plans are asked.
    """

    settings: Settings
    model: Any
    tokenizer: Any
    judge: Judge

    def measured(self, part: str) -> Iterator[Measurement]:
        """The figures of one part."""
        if part == DENSE:
            for figure, values in self.judge.of_dense():
                yield Measurement({"figure": figure}, part, values=values)
            return
        goal, loss, rival = (*part.split("-", 2), "")[:3]
        optimized, seconds = self.optimized(goal, int(loss))
        found = optimized.measured["optimize"]
        if not rival:
            said = found.get("verdict", {})
            values = {
                "seconds": seconds,
                "won": float(found["won"]),
                "candidates": float(len(found["candidates"])),
            }
            values |= {name: said[name] for name in ("mean_lost", "spread") if name in said}
            note = next(
                (entry["what"] for entry in found["candidates"] if entry["chosen"]), found.get("why", "")
            )
            yield Measurement({"figure": "plan"}, part, values=values, note=note)
            plan = optimized
        else:
            number = self._as_fast(goal, optimized, rival)
            if number is None:
                yield Measurement(
                    {"figure": "plan"}, part, status="unsupported", note="not so fast with all removed"
                )
                return
            plan, seconds = self.rival(part, number, rival)
            yield Measurement({"figure": "plan"}, part, values={"seconds": seconds, "removed": float(number)})
        yield Measurement({"figure": "speed"}, part, values=self.speed(goal, found["prompt"], plan))
        for figure, values in self.judge.of(plan):
            yield Measurement({"figure": figure}, part, values=values)

    def optimized(self, goal: str, loss: int) -> tuple[Plan, float]:
        """The plan of a wish, and the seconds in which it was found."""
        settings = self.settings
        asked: dict[str, Any] = {
            "goal": goal,
            "max_loss": loss / 100,
            "minutes": settings.training or _MINUTES,
        }
        if settings.smoke:
            asked |= {"minutes": 2.0, "prompt": 48, "max_loss": 0.9, "repair": False}
        folder = settings.plans / f"{goal}-{loss}"
        return kept(
            folder,
            lambda: slimformer.optimize(
                self.model,
                self.tokenizer,
                checkpoint=folder.with_name(f"{folder.name}-searching"),
                **asked,
            ),
        )

    def rival(self, part: str, number: int, rival: str) -> tuple[Plan, float]:
        """A plan by a single method, repaired where the optimised plan may be."""
        settings, folder = self.settings, self.settings.plans / part
        _, how = RIVALS[rival]
        options = dict(how)
        if how["selection"] != "panel":
            options |= {"data": settings.data / C4, "hold_out": False}
        if settings.smoke:
            options["budget"] = "quick"
        plan, choosing = kept(
            folder.with_name(f"{part}-chosen"),
            lambda: slimformer.calibrate(self.model, self.tokenizer, LayerDrop(), drop=number, **options),
        )
        if settings.smoke:
            return plan, choosing
        repaired, repairing = kept(
            folder,
            lambda: slimformer.repair(
                self.model,
                plan,
                self.tokenizer,
                minutes=(settings.training or _MINUTES) / 2,
                settings=TrainingSettings(rows=8 if settings.on_gpu else 4, steps=2000),
                cache=settings.plans / OWN_WORDS,
            ),
        )
        return repaired, choosing + repairing

    def speed(self, goal: str, prompt: int, plan: Plan) -> dict[str, float]:
        """Outside of the search: times of both models in turns on other text, or bytes."""
        ids = wikitext_blocks(self.settings.data / WIKI_TEST, self.tokenizer, prompt, count=1).to(
            self.model.device
        )
        if goal == "memory":
            whole = cache_bytes(prefill(self.model, ids))
            weights = sum(weight.nbytes for weight in self.model.parameters())
            with slimformer.patched(self.model, plan):
                left = cache_bytes(prefill(self.model, ids))
            return {"speedup": (weights + whole) / (weights * weights_left(self.model, plan) + left)}
        runs = {"prefill": lambda: prefill(self.model, ids), "generate": lambda: self._generate(ids)}
        dense, slim = in_turns(self.settings, self.model, runs[goal], plan)
        return {"dense_ms": dense, "slim_ms": slim, "speedup": dense / slim}

    @torch.no_grad()
    def _generate(self, ids: torch.Tensor) -> None:
        new = self.settings.pick(64, 4)
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip

    def _as_fast(self, goal: str, optimized: Plan, rival: str) -> int | None:
        """How many removals of a kind are as fast as the optimised plan, by what each saves; None if none is."""
        if self.settings.smoke:
            return 1
        found = optimized.measured["optimize"]
        speed = next((entry["speedup"] for entry in found["candidates"] if entry["chosen"]), None)
        if speed is None:
            raise SlimformerError(
                f"Nothing was found for {goal}, and nothing is to be compared: {found['why']}"
            )
        costs = optimized.provenance["optimize"]["costs"]
        kind = rival.partition("-")[0]
        each = {"attention": ("attention",), "mlp": ("mlp",), "block": ("attention", "mlp")}[kind]
        layers = len({unit["layer"] for unit in costs["units"]})
        saved = sum(unit["saved"] for unit in costs["units"] if unit["kind"] in each) / layers
        wanted = costs["plain"] - costs["dense"] / speed
        number = max(math.ceil(wanted / saved), 1) if saved > 0 else layers + 1
        kinds: Any = (kind,)
        return number if number <= most_removals(known_anatomy(self.model), kinds) else None


@table("optimize")
def optimized_table(content: dict[str, Any]) -> str:
    """One row per wish and way to choose: measured speed, the loss that is stated, the tasks as parts of dense's."""
    rows = []
    for goal, loss in WISHES:
        for key, words in {"": OPTIMIZED, **{key: words for key, (words, _) in RIVALS.items()}}.items():
            found = _values(content, f"{goal}-{loss}{f'-{key}' if key else ''}")
            if "mean_of_dense" not in found:
                continue
            tasks = [found.get(f"{name}_of_dense") for name in ("mean", "worst", *TASKS)]
            stated = found.get("mean_lost")
            rows.append(
                [
                    f"{goal}, {loss}%: {words}",
                    tables.shown(found.get("speedup"), ".2f", "×"),
                    tables.shown(None if stated is None else 100 * stated, ".1f"),
                    *(tables.shown(None if part is None else 100 * part, ".1f") for part in tasks),
                ]
            )
    if not rows:
        return ""
    return tables.markdown(
        ["", "speed", "loss stated, %", "mean of tasks, % of dense", "worst", *TASKS.values()], rows
    )


def _values(content: dict[str, Any], part: str) -> dict[str, float]:
    """Everything that was measured of a part."""
    found: dict[str, float] = {}
    for measurement in content["measurements"]:
        if measurement["candidate"] == part and measurement["status"] == "ok":
            found |= {name: value for name, value in measurement["values"].items() if value is not None}
    return found

"""What it costs to route tokens past sublayers, beside dropping as many sublayers outright."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.flops import flops
from benchmarks.frame.inputs import C4, DENSE, WIKI_TEST, WIKI_TRAIN, decoder, repaired
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, reason
from benchmarks.quality.repair import TRAINING, WIKIPEDIA, training_text
from slimformer import MixtureOfDepths
from slimformer.evaluation.perplexity import perplexity, wikitext_blocks
from slimformer.model.anatomy import find_anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.patching import keep_ratios
from slimformer.text.sources import load_texts
from slimformer.training.loop import TrainingSettings
from slimformer.training.routing.arank import LayerOrder, calibrate_arank
from slimformer.training.routing.routers import train_routers

KEEP = 0.5
SETTINGS = TrainingSettings(steps=600, rows=4, learning_rate=5e-3)
_TINY = TrainingSettings(steps=2)
ALPACA, DOLLY = "instructions/alpaca_en_demo.json", "instructions/dolly_hhrlhf_train_small.jsonl"
_BESIDE_EACH_OTHER = 4


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        kinds: What is routed or dropped.
        metric: What layers are chosen to be routed by; None drops instead, by the divergence that this brings.
    """

    kinds: tuple[Kind, ...]
    metric: LayerOrder | None = None


CANDIDATES = {
    "attention routed, layers by ARank": Candidate(("attention",), "effective_rank"),
    "attention routed": Candidate(("attention",), "skip_cost"),
    "attentions dropped": Candidate(("attention",)),
    "MLP routed": Candidate(("mlp",), "skip_cost"),
    "MLPs dropped": Candidate(("mlp",)),
    "attention and MLP routed": Candidate(KINDS, "skip_cost"),
    "blocks dropped": Candidate(KINDS),
}


@benchmark(
    "mixture_of_depths",
    "WikiText-2 perplexity with half of the tokens routed past half of the layers, then repaired",
    model="decoder",
    data=(C4, WIKIPEDIA, ALPACA, DOLLY, WIKI_TRAIN, WIKI_TEST),
    parts=list(CANDIDATES),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Routers learn from C4 and instructions, then all plans are repaired; WikiText-2 is read in float32."""
    model, tokenizer = decoder(settings)
    yield Measurement({"keep": 1.0}, DENSE, values={"perplexity": _perplexity(settings, model, tokenizer)[0]})
    wanted = [name for name in CANDIDATES if settings.wants(name)]
    if settings.smoke:
        for name in wanted[:2]:
            yield from measured(settings, name)
        return
    # A small model leaves most of a GPU idle.
    with ProcessPoolExecutor(_BESIDE_EACH_OTHER, multiprocessing.get_context("spawn")) as pool:
        futures = {name: pool.submit(measured, settings, name) for name in wanted}
        for name, future in futures.items():
            try:
                yield from future.result()
            except Exception as failure:
                yield Measurement({"keep": KEEP}, name, status="failed", note=reason(failure))


def measured(settings: Settings, name: str) -> list[Measurement]:
    """A candidate as it was trained or calibrated, and repaired."""
    fast = "high" if settings.on_gpu else "highest"
    torch.set_float32_matmul_precision(fast)
    model, tokenizer = decoder(settings)
    start = time.monotonic()
    plan, saved = chosen(settings, model, tokenizer, CANDIDATES[name])
    found = []
    for candidate in (name, f"{name}, repaired"):
        if candidate != name:
            plan = repaired(settings, model, tokenizer, plan, training_text(settings), **TRAINING)
        values = {"seconds": time.monotonic() - start, "saved": saved}
        torch.set_float32_matmul_precision("highest")
        with slimformer.patched(model, plan):
            values["perplexity"], kept = _perplexity(settings, model, tokenizer)
        torch.set_float32_matmul_precision(fast)
        if kept is not None:
            values["kept"] = kept
        found.append(Measurement({"keep": KEEP}, candidate, values=values, note=_layers(plan, name)))
    return found


def chosen(
    settings: Settings, model: Any, tokenizer: Any, candidate: Candidate
) -> tuple[slimformer.Plan, float]:
    """The plan of a candidate, and the part of the multiplications without the head that it saves."""
    texts, length = instructions(settings.data), settings.pick(512, 64)
    half = len(find_anatomy(model).layers) // 2

    def saved(layers: int, keep: float) -> float:
        def kept(layer: int, kind: Kind) -> float:
            return keep if layer < layers and kind in candidate.kinds else 1.0

        return 1.0 - flops(model.config, length, kept) / flops(model.config, length)

    if candidate.metric is not None:
        ranked = calibrate_arank(
            model,
            tokenizer,
            number=settings.pick(half, 1),
            kinds=candidate.kinds,
            metric=candidate.metric,
            data=texts,
            length=length,
        )
        method = ranked.methods[0]
        if not isinstance(method, MixtureOfDepths):
            raise TypeError(f"ARank makes MixtureOfDepths, got {type(method).__name__}")
        training = settings.pick(SETTINGS, _TINY)
        plan = train_routers(model, tokenizer, method=method, data=texts, length=length, settings=training)
        return plan, saved(half, KEEP)
    unit: Any = "block" if candidate.kinds == KINDS else candidate.kinds[0]
    # As many as save what routing past half of the layers does.
    number = settings.pick(max(round(saved(half, KEEP) / saved(1, 0.0)), 1), 1)
    plan = slimformer.calibrate(
        model, tokenizer, data=texts, kinds=(unit,), drop=number, budget=settings.pick("standard", "quick")
    )
    return plan, saved(number, 0.0)


def _layers(plan: slimformer.Plan, name: str) -> str:
    kind = CANDIDATES[name].kinds[0]
    routed = [getattr(method, kind) for method in plan.methods if isinstance(method, MixtureOfDepths)]
    return ", ".join(str(layer) for layer in (routed[0] if routed else plan.dropped(kind)))


def instructions(data: Path) -> list[str]:
    """C4 and two sets of instructions, mixed."""
    texts = load_texts(data / C4)[0]
    for row in json.loads((data / ALPACA).read_text(encoding="utf-8")):
        texts.append("\n".join(row[name] for name in ("instruction", "input", "output") if row[name]))
    with (data / DOLLY).open(encoding="utf-8") as lines:
        texts += [row["prompt"] + row["response"] for row in map(json.loads, lines)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[index] for index in order]


def _perplexity(settings: Settings, model: Any, tokenizer: Any) -> tuple[float, float | None]:
    """Of WikiText-2, and the part of the tokens that routed sublayers computed there."""
    tokens, count = settings.pick((1024, 64), (64, 2))
    losses: list[float] = []
    kept: list[float] = []
    for block in wikitext_blocks(settings.data / WIKI_TEST, tokenizer, tokens, count=count).split(1):
        losses.append(math.log(perplexity(model, block)))
        kept += keep_ratios(model).values()
    return math.exp(sum(losses) / len(losses)), sum(kept) / len(kept) if kept else None


@table("mixture_of_depths")
def perplexities(content: dict[str, Any]) -> str:
    """One row per candidate, beside dense."""
    dense = tables.figure(tables.find(content, DENSE, keep=1.0), "perplexity")
    return tables.by_measurement(
        content,
        {
            "SmolLM2-135M": tables.candidate,
            "FLOPs saved": lambda found: f"{found['values'].get('saved', 0.0):.1%}",
            "tokens computed": tables.value("kept", ".1%"),
            "perplexity": tables.value("perplexity"),
            "of dense": lambda found: tables.shown(dense and found["values"]["perplexity"] / dense, ".3f"),
            "seconds": tables.value("seconds", ".0f"),
        },
    )

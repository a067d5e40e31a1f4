"""What it costs to route tokens past sublayers, beside dropping as many sublayers outright."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

import slimformer
from benchmarks.drop_table import DENSE, load_model
from benchmarks.frame import tables
from benchmarks.frame.registry import MissingInput, Settings, benchmark, table
from benchmarks.frame.results import Measurement, reason
from benchmarks.repair import repaired_plan, training_text
from slimformer import MixtureOfDepths
from slimformer.evaluation.perplexity import perplexity, wikitext_blocks
from slimformer.model.anatomy import find_anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.patching import keep_ratios
from slimformer.text.sources import load_texts
from slimformer.training.arank import LayerOrder, calibrate_arank
from slimformer.training.loop import TrainingSettings
from slimformer.training.routers import train_routers

KEEP = 0.5
SETTINGS = TrainingSettings(steps=600, rows=4, learning_rate=5e-3)
_TINY = TrainingSettings(steps=2)
_BLOCKS, _TOKENS = 64, 1024
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
    needs="any",
    description="WikiText-2 perplexity with half of the tokens routed past half of the layers, then repaired (--model, "
    "--data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Routers learn from C4 and instructions, then all plans are repaired; WikiText-2 is read in float32."""
    if settings.data is None and not settings.smoke:
        raise MissingInput("it needs --data, a folder with c4_calib/, instructions/ and wikitext2/")
    model, tokenizer = load_model(settings)
    yield Measurement({"keep": 1.0}, DENSE, values={"perplexity": _perplexity(settings, model, tokenizer)[0]})
    if settings.smoke:
        for name in list(CANDIDATES)[:2]:
            yield from measured(settings, name)
        return
    # A small model leaves most of a GPU idle.
    with ProcessPoolExecutor(_BESIDE_EACH_OTHER, multiprocessing.get_context("spawn")) as pool:
        wanted = [name for name in CANDIDATES if settings.only is None or settings.only in name]
        futures = {name: pool.submit(measured, settings, name) for name in wanted}
        for name, future in futures.items():
            try:
                yield from future.result()
            except Exception as failure:
                yield Measurement({"keep": KEEP}, name, status="failed", note=reason(failure))


def measured(settings: Settings, name: str) -> list[Measurement]:
    """A candidate as it was trained or calibrated, and repaired."""
    torch.set_float32_matmul_precision("high" if settings.device.type == "cuda" else "highest")
    model, tokenizer = load_model(settings)
    start = time.monotonic()
    plan, saved = chosen(settings, model, tokenizer, CANDIDATES[name])
    found = []
    for candidate in (name, f"{name}, repaired"):
        if candidate != name:
            plan = repaired_plan(settings, model, tokenizer, plan, training_text(settings))
        values = {"seconds": time.monotonic() - start, "saved": saved}
        torch.set_float32_matmul_precision("highest")
        with slimformer.patched(model, plan):
            values["perplexity"], kept = _perplexity(settings, model, tokenizer)
        torch.set_float32_matmul_precision("high" if settings.device.type == "cuda" else "highest")
        if kept is not None:
            values["kept"] = kept
        found.append(Measurement({"keep": KEEP}, candidate, values=values, note=_layers(plan, name)))
    return found


def chosen(
    settings: Settings, model: Any, tokenizer: Any, candidate: Candidate
) -> tuple[slimformer.Plan, float]:
    """The plan of a candidate, and the part of the multiplications that it saves."""
    layers = len(find_anatomy(model).layers)
    texts, length = training_texts(settings.data), settings.pick(512, 64)
    saved = routed_share(model.config, candidate.kinds, layers // 2, length)
    if candidate.metric is not None:
        ranked = calibrate_arank(
            model,
            tokenizer,
            number=settings.pick(layers // 2, 1),
            kinds=candidate.kinds,
            metric=candidate.metric,
            data=texts,
            length=length,
        )
        method = ranked.methods[0]
        if not isinstance(method, MixtureOfDepths):
            raise TypeError(f"ARank makes MixtureOfDepths, got {type(method).__name__}")
        training = settings.pick(SETTINGS, _TINY)
        return train_routers(
            model, tokenizer, method=method, data=texts, length=length, settings=training
        ), saved
    unit: Any = "block" if candidate.kinds == KINDS else candidate.kinds[0]
    each = dropped_share(model.config, candidate.kinds, length)
    number = settings.pick(max(round(saved / each), 1), 1)
    plan = slimformer.calibrate(
        model,
        tokenizer,
        data=texts,
        kinds=(unit,),
        drop=number,
        budget=settings.pick("standard", "quick"),
    )
    return plan, each * number


def _layers(plan: slimformer.Plan, name: str) -> str:
    kind = CANDIDATES[name].kinds[0]
    routed = [getattr(method, kind) for method in plan.methods if isinstance(method, MixtureOfDepths)]
    return ", ".join(str(layer) for layer in (routed[0] if routed else plan.dropped(kind)))


def training_texts(data: Path | None) -> list[str] | None:
    """C4 and two sets of instructions, mixed."""
    if data is None:
        return None
    texts = load_texts(data / "c4_calib" / "c4_demo.jsonl")[0]
    for row in json.loads((data / "instructions" / "alpaca_en_demo.json").read_text(encoding="utf-8")):
        texts.append("\n".join(row[name] for name in ("instruction", "input", "output") if row[name]))
    with (data / "instructions" / "dolly_hhrlhf_train_small.jsonl").open(encoding="utf-8") as lines:
        texts += [row["prompt"] + row["response"] for row in map(json.loads, lines)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[index] for index in order]


def _perplexity(settings: Settings, model: Any, tokenizer: Any) -> tuple[float, float | None]:
    """Of WikiText-2, and the part of the tokens that routed sublayers computed there."""
    if settings.data is None:
        text: Any = "\n\n".join(load_texts(None, limit=20)[0])
    else:
        text = settings.data / "wikitext2" / "wiki.test.raw"
    blocks = wikitext_blocks(text, tokenizer, settings.pick(_TOKENS, 64), count=settings.pick(_BLOCKS, 2))
    losses: list[float] = []
    kept: list[float] = []
    for block in blocks.split(1):
        losses.append(math.log(perplexity(model, block)))
        kept += keep_ratios(model).values()
    return math.exp(sum(losses) / len(losses)), sum(kept) / len(kept) if kept else None


def routed_share(config: PretrainedConfig, kinds: Sequence[Kind], layers: int, tokens: int) -> float:
    """The part of a forward pass without the head that routing half of the tokens past some layers saves."""
    work = multiplications(config, tokens)
    once = sum(work[kind] for kind in kinds)
    return (1.0 - KEEP) * layers * once / config.num_hidden_layers / sum(work.values())


def dropped_share(config: PretrainedConfig, kinds: Sequence[Kind], tokens: int) -> float:
    """The part that one dropped sublayer, or block, saves: its keys and values too."""
    work = multiplications(config, tokens)
    once = sum(work[kind] for kind in kinds) + ("attention" in kinds) * work["keys"]
    return once / config.num_hidden_layers / sum(work.values())


def multiplications(config: PretrainedConfig, tokens: int) -> dict[str, float]:
    """Per token and layer: what an attention does for a query, its keys and values, and the MLP."""
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    return {
        "attention": 2.0 * hidden * hidden + hidden * tokens,
        "keys": 2.0 * hidden * config.num_key_value_heads * head_dim,
        "mlp": 3.0 * hidden * config.intermediate_size,
    }


@table("mixture_of_depths", source="mixture_of_depths")
def perplexities(content: dict[str, Any]) -> str:
    """One row per candidate, beside dense."""
    dense, rows = tables.find(content, DENSE, keep=1.0), []
    for measurement in content["measurements"]:
        values = measurement["values"]
        if measurement["status"] != "ok":
            continue
        ratio = "–" if dense is None else f"{values['perplexity'] / dense['values']['perplexity']:.3f}"
        rows.append(
            [
                measurement["candidate"],
                f"{100 * values.get('saved', 0.0):.1f}%",
                "–" if "kept" not in values else f"{100 * values['kept']:.1f}%",
                f"{values['perplexity']:.2f}",
                ratio,
                "–" if "seconds" not in values else f"{values['seconds']:.0f}",
            ]
        )
    head = ["SmolLM2-135M", "FLOPs saved", "tokens computed", "perplexity", "of dense", "seconds"]
    return tables.markdown(head, rows)

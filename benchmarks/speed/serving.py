"""What an exported plan saves in vLLM and llama.cpp on the CPU: cold start, tokens per second, memory, files."""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.inputs import DENSE
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters, reason
from benchmarks.speed.engines import ENGINES
from slimformer import LayerDrop
from slimformer.errors import ExportError
from slimformer.methods.weight_delta import WeightDelta

NAMES = {"vllm": "vLLM", "llama_cpp": "llama.cpp"}
_MODULES = {"vllm": "vllm", "llama_cpp": "xllamacpp"}
TOKENS, TEXTS, ROUNDS = 32, 8, 3
# Where they lie makes no difference to speed.
PLANS = {
    "8 attentions dropped": LayerDrop(attention=[8, 12, 16, 18, 20, 22, 24, 26]),
    "6 blocks dropped": LayerDrop(block=[10, 14, 18, 20, 22, 24]),
}
_TINY_PLANS = {"1 block dropped": LayerDrop(block=[1])}


@benchmark(
    "serving",
    "exported plans in vLLM and llama.cpp: cold start, tokens per second, memory, size of the folder",
    on="CPU",
    model="decoder",
    parts=tuple(ENGINES),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Every engine on the dense model and on what plans leave of it, in turns, each in a process of its own."""
    for engine in (engine for engine in ENGINES if settings.wants(engine)):
        at: Parameters = {"engine": NAMES[engine], "texts": TEXTS}
        if importlib.util.find_spec(_MODULES[engine]) is None:
            yield Measurement(at, DENSE, "unsupported", note=f"{NAMES[engine]} is not installed")
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                folders = _exported(settings, engine, Path(place))
            except ExportError as refused:
                yield Measurement(at, DENSE, "unsupported", note=reason(refused))
                continue
            yield from _compared(settings, engine, at, folders)


def _exported(settings: Settings, engine: str, place: Path) -> dict[str, Path]:
    config = json.loads((settings.model / "config.json").read_text(encoding="utf-8"))
    # Nothing is dropped by adding nothing to a norm.
    nothing = WeightDelta({"0.input_layernorm.weight.added": torch.zeros(config["hidden_size"])})
    folders = {}
    plans: dict[str, Any] = {DENSE: nothing, **_plans(settings)}
    for number, (name, plan) in enumerate(plans.items()):
        folders[name] = place / str(number)
        if engine == "llama_cpp":
            slimformer.export(settings.model, plan, folders[name], to="gguf", dtype="f32")
        else:
            slimformer.export(settings.model, plan, folders[name], to="vllm")
    return folders


def _plans(settings: Settings) -> Mapping[str, LayerDrop]:
    return settings.pick(PLANS, _TINY_PLANS)


def _compared(
    settings: Settings, engine: str, at: Parameters, folders: Mapping[str, Path]
) -> Iterator[Measurement]:
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    names = list(folders)
    tokens, texts = settings.pick((TOKENS, TEXTS), (4, 2))
    for index in range(settings.pick(ROUNDS, 1)):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            rounds[name].append(_process(engine, folders[name], tokens, texts))
    for name, found in rounds.items():
        expected = _most_likely(settings, name, found[0]["answer"])
        if expected != found[0]["answer"]:
            yield Measurement(at, name, "wrong", note="other tokens than the patched model's")
            continue
        values: dict[str, float] = {
            what: statistics.median(one[what] for one in found) for what in ("start", "one", "many", "peak")
        }
        values["size"] = sum(path.stat().st_size for path in folders[name].rglob("*") if path.is_file())
        for what in ("start", "one", "many", "peak"):
            # What slows the machine down meets both of a round.
            pairs = zip(found, rounds[DENSE], strict=True)
            values[f"{what} ratio"] = statistics.median(slim[what] / dense[what] for slim, dense in pairs)
        yield Measurement(at, name, values=values)


def _process(engine: str, folder: Path, tokens: int, texts: int) -> dict[str, Any]:
    began = time.time()
    command = [sys.executable, "-m", "benchmarks.speed.engines", engine, str(folder), str(tokens), str(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{NAMES[engine]} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "start": found["first"] - began}


def _most_likely(settings: Settings, name: str, answer: list[int]) -> list[int]:
    """What the patched model takes for each token of an answer, behind those before it."""
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    if name != DENSE:
        slimformer.patch(model, _plans(settings)[name])
    prompt = list(range(100, 132))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    del model
    gc.collect()
    return logits.argmax(-1).tolist()


@table("serving")
def served(content: dict[str, Any]) -> str:
    """Figures of every engine and plan, with the ratio to the dense model's beside them."""
    rows = [
        [
            f"{found['parameters']['engine']}, {found['candidate']}",
            f"{found['values']['size'] / 1e6:.0f} MB",
            _beside(found, "peak", 1e-6, ".0f", " MB"),
            _beside(found, "start", 1, ".1f", " s"),
            _beside(found, "one", 1, ".1f", ""),
            _beside(found, "many", 1, ".1f", ""),
        ]
        for found in content["measurements"]
        if found["status"] == "ok"
    ]
    many = f"tokens/s, {TEXTS} texts"
    head = ["float32", "folder", "memory", "cold start to first token", "tokens/s, 1 text", many]
    return tables.markdown(head, rows)


def _beside(found: dict[str, Any], what: str, scale: float, form: str, unit: str) -> str:
    value, ratio = found["values"][what] * scale, found["values"][f"{what} ratio"]
    shown = f"{value:{form}}{unit}"
    return shown if found["candidate"] == DENSE else f"{shown} ({ratio:.2f}×)"

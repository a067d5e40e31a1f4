"""`generate` of a real model on code and chat: steps from graphs, drafts beside them, and prompt look-up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.compare import release
from benchmarks.frame.inputs import LOSSLESS, UNPATCHED, decoder
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Timing, reason
from benchmarks.speed import generators
from benchmarks.speed.llamas import with_shared_weights
from slimformer import LayerDrop, SelfSpeculation

LOOK_UP, DRAFTS, LOOKED_UP = "prompt look-up", "the patch with drafts", "the patch with prompt look-up"
_LOOK_UP = {"prompt_lookup_num_tokens": 8}
_NEW, _ROUNDS = 128, 3
_PROMPTS = {
    "code": (
        "def quicksort(numbers):\n",
        "import csv\n\n\ndef read_rows(path: str) -> list[dict[str, str]]:\n",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
        "def test_add():\n    assert add(1, 2) == 3\n    assert add(0, 0) == 0\n\n\ndef test_multiply():\n",
    ),
    "chat": (
        "Question: Why is the sky blue?\nAnswer:",
        "Question: How do I cook rice so that it does not stick?\nAnswer:",
        "Write a short letter to a neighbour who plays music late at night.\n\nDear neighbour,\n",
        "The three most important inventions of the nineteenth century were",
    ),
}


@benchmark(
    "drafts",
    "milliseconds per token of `generate` on code and chat: eager, the patch, drafts, prompt look-up",
    on="any",
    model="decoder",
    parts=tuple(_PROMPTS),
    takes=("plans",),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Every way on every kind of prompt, in turns; the draft is the plan `draft` among the plans, if there is one."""
    model: Any
    model, tokenizer = decoder(settings, settings.dtype)
    drafted = slimformer.patch(with_shared_weights(model), SelfSpeculation(_draft(settings, model)))
    patched = slimformer.patch(with_shared_weights(model))
    ways: dict[str, tuple[Any, Mapping[str, Any]]] = {
        UNPATCHED: (model, {}),
        LOSSLESS: (patched, {}),
        DRAFTS: (drafted, {}),
        LOOK_UP: (model, _LOOK_UP),
        LOOKED_UP: (patched, _LOOK_UP),
    }
    for kind in settings.chosen(tuple(_PROMPTS)):
        texts = settings.pick(_PROMPTS[kind], _PROMPTS[kind][:1])
        prompts = [tokenizer(text, return_tensors="pt")["input_ids"].to(settings.device) for text in texts]
        yield from _measured(settings, kind, ways, prompts)


def _draft(settings: Settings, model: Any) -> Any:
    """The plan of the draft; else the model without a third of its layers, those in the middle."""
    kept = settings.plans / "draft"
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return str(kept) if kept.is_dir() else LayerDrop(block=range(layers // 3, 2 * layers // 3))


def _measured(
    settings: Settings, kind: str, ways: Mapping[str, tuple[Any, Mapping[str, Any]]], prompts: list[Tensor]
) -> Iterator[Measurement]:
    new = settings.pick(_NEW, 8)
    tokens: dict[str, list[Tensor]] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    failed: dict[str, str] = {}
    # In the first rounds graphs are made, and drafts find their pace.
    for turn in range(settings.pick(_ROUNDS + 2, 2)):
        for name, (model, options) in ways.items():
            if name in failed:
                continue
            try:
                seconds, tokens[name] = _generated(settings, model, prompts, new, options)
            except Exception as failure:
                failed[name] = reason(failure)
                release()
                continue
            if turn > settings.pick(1, 0):
                times[name].append(seconds / (len(prompts) * new) * 1e3)
    for name, (model, _) in ways.items():
        point: dict[str, Any] = {"prompts": kind, "new_tokens": new}
        if name in failed:
            yield Measurement(point, name, status="failed", note=failed[name])
            continue
        rounds = sorted(times[name])
        middle = median(rounds)
        same = [
            torch.equal(a, b) for a, b in zip(tokens[name], tokens.get(UNPATCHED, tokens[name]), strict=True)
        ]
        dense = times[UNPATCHED]
        yield Measurement(
            point,
            name,
            milliseconds=Timing(rounds[0], middle, rounds[-1], len(rounds)),
            baseline_ratio=middle / median(dense) if dense else None,
            # Half precision rounds otherwise when several tokens are checked at once: ties are counted, not refused.
            values={"prompts_with_the_same_tokens": float(sum(same)), "prompts": float(len(same))},
            note="; ".join(slimformer.status(model).generation.values()),
        )


def _generated(
    settings: Settings, model: Any, prompts: list[Tensor], new: int, options: Mapping[str, Any]
) -> tuple[float, list[Tensor]]:
    outputs: list[Tensor] = []
    total = sum(generators.seconds(settings, model, ids, new, {**options}, outputs.append) for ids in prompts)
    return total, [out[:, ids.shape[1] :].cpu() for out, ids in zip(outputs, prompts, strict=True)]


@table("drafts")
def ways(content: dict[str, Any]) -> str:
    """Milliseconds per token of every way, and how many times faster than eager."""
    rows = []
    for at in tables.points(content, "prompts"):
        for name in (UNPATCHED, LOOK_UP, LOSSLESS, LOOKED_UP, DRAFTS):
            found = tables.find(content, name, **at)
            if found is not None:
                values = found["values"]
                same = f"{values['prompts_with_the_same_tokens']:.0f} of {values['prompts']:.0f}"
                faster = f"{1 / found['baseline_ratio']:.1f}×" if found["baseline_ratio"] else "–"
                rows.append([f"{at['prompts']}, {name}", f"{found['milliseconds']['p50']:.2f}", faster, same])
    return (
        tables.markdown(["", "a token, ms", "faster", "prompts with the same tokens"], rows) if rows else ""
    )

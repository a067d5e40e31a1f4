"""The models, texts and plans that more than one benchmark reads."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import slimformer
from benchmarks.frame.registry import Settings
from slimformer import Plan
from slimformer.evaluation.perplexity import perplexity, wikitext_blocks
from slimformer.training.loop import TrainingSettings
from slimformer.training.trained_weights import WHAT, What

# Files and folders of `--data`.
C4, WIKI_DEMO, WIKI_TEST = "c4_calib/c4_demo.jsonl", "c4_calib/wiki_demo.txt", "wikitext2/wiki.test.raw"
WIKI_TRAIN, STS_TRAIN, STS_TEST = "wikitext2/wiki.train.raw.slice5k.txt", "stsb/train.tsv", "stsb/test.tsv"
CRANFIELD, QMSUM, BOOKS = "cranfield/", "qmsum_retrieval/", "books/"
# Candidates of many tables.
DENSE, UNPATCHED, LOSSLESS = "dense", "unpatched", "slimformer.patch(model)"


def decoder(
    settings: Settings, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model of `--model`, a checkpoint folder or a GGUF file, and its tokenizer."""
    return _checkpoint(settings, AutoModelForCausalLM, dtype)


def encoder(settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder of `--model` without what an embedding pipeline puts behind it, and its tokenizer."""
    return _checkpoint(settings, AutoModel, torch.float32)


def _checkpoint(
    settings: Settings, kind: Any, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = settings.model
    folder, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model = kind.from_pretrained(folder, dtype=dtype, **options).to(settings.device).eval()
    return model, AutoTokenizer.from_pretrained(folder, **options)


def wikitext_perplexity(
    settings: Settings, model: Any, tokenizer: PreTrainedTokenizerBase, *, most: int = 64
) -> Callable[[], float]:
    """Measures the model, patched as it is then, on the first 64 × 1024 tokens of WikiText-2's test split, or fewer."""
    tokens, count = settings.pick((1024, 64), (128, 2))
    blocks = wikitext_blocks(settings.data / WIKI_TEST, tokenizer, tokens, count=min(count, most))
    return lambda: perplexity(model, blocks, batch_size=8 if settings.on_gpu else 1)


def kept(folder: Path, make: Callable[[], Plan]) -> tuple[Plan, float]:
    """A plan from its folder, made first if it is not there, and the seconds that this took.

    Of several processes that want it one makes it, and the others wait.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            start = time.monotonic()
            plan = make()
            # Found whole or not at all, whatever ends this.
            beside = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(beside, ignore_errors=True)
            plan.save_pretrained(beside)
            (beside / "seconds.json").write_text(json.dumps(time.monotonic() - start))
            beside.rename(folder)
    return Plan.from_pretrained(folder), float(json.loads((folder / "seconds.json").read_text()))


def kept_json(file: Path, make: Callable[[], Any]) -> Any:
    """What JSON can hold, from its file; made first if it is not there, by one of the processes that want it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f"{file.name}.lock")):
        if not file.exists():
            beside = file.with_name(f"{file.name}.part")
            beside.write_text(json.dumps(make()), encoding="utf-8")
            beside.rename(file)
    return json.loads(file.read_text(encoding="utf-8"))


def repaired(
    settings: Settings,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    texts: list[str],
    *,
    steps: int,
    rows: int,
    length: int,
    rank: int = 32,
    every: int = 25,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    near: int | None = None,
    what: tuple[What, ...] = WHAT,
) -> Plan:
    """The plan after a few minutes of `slimformer.repair`; a few steps of few rows in a smoke run."""
    return slimformer.repair(
        model,
        plan,
        tokenizer,
        data=texts,
        what=what,
        near=near,
        rank=settings.pick(rank, 2),
        length=settings.pick(length, max(length // 16, 64)),
        every=settings.pick(every, 2),
        patience=6,
        settings=TrainingSettings(
            steps=settings.pick(steps, 4),
            rows=settings.pick(rows, 2),
            accumulate=accumulate,
            learning_rate=learning_rate,
            precision="bf16" if settings.on_gpu else "no",
            keep_every=10_000,
        ),
        progress=not settings.smoke,
    )

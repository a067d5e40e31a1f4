"""What repair wins back in a small embedding model: retrieval and similarity before and after, with the speed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import slimformer
from benchmarks.drop_table import DENSE
from benchmarks.elastic import embedder, lines, retrieval_task
from benchmarks.encode import LOSSLESS, encode_error
from benchmarks.frame import tables
from benchmarks.frame.compare import Case, compare
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from benchmarks.frame.timing import Effort
from benchmarks.repair import AFTER, BEFORE, kept
from slimformer import LayerDrop, Plan
from slimformer.evaluation.embedding_tasks import EmbeddingTask, PairTask
from slimformer.evaluation.retrieval import read_retrieval
from slimformer.evaluation.similarity_task import read_sts
from slimformer.plans.plan import fingerprint
from slimformer.training.loop import TrainingSettings

# Whole layers that are dropped; the first four of six do most of the work.
BLOCKS: tuple[tuple[int, ...], ...] = ((4,), (2, 4), (1, 2, 4))
FIGURES = {"cranfield": "Cranfield, nDCG@10", "qmsum": "QMSum, nDCG@10", "sts": "STS-B test, Spearman × 100"}
_TEXTS_TIMED, _BATCH = 128, 32


@benchmark(
    "encoder_repair",
    needs="any",
    description="Cranfield, QMSum and STS-B of an embedding model without some layers, repaired (--model, --data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Repair on texts of Cranfield, WikiText-2 and STS-B train without labels; QMSum is not read before it is asked."""
    plans = dict(_plans(settings))
    model = embedder(settings)
    tasks = _tasks(settings)
    yield Measurement({"dropped": "none"}, DENSE, values=_figures(model, tasks))
    for name, (plan, repaired, seconds) in plans.items():
        for candidate, found in ((BEFORE, plan), (AFTER, repaired)):
            with slimformer.patched(model, found):
                values = _figures(model, tasks)
            if candidate == AFTER:
                values["seconds"] = seconds
            yield Measurement({"dropped": name}, candidate, values=values)
    yield from _speed(settings, model, {name: repaired for name, (_, repaired, _) in plans.items()})


def _plans(settings: Settings) -> Iterator[tuple[str, tuple[Plan, Plan, float]]]:
    """Every plan, repaired; the encoder alone is trained, with the mean as its pooling."""
    texts = training_texts(settings)
    for blocks in settings.pick(BLOCKS, ((1,),)):
        name = "blocks-" + "-".join(map(str, blocks))
        if settings.only in (None, name):
            plan = Plan([LayerDrop(block=blocks)])
            with tempfile.TemporaryDirectory() as temporary:
                folder = (settings.plans or Path(temporary)) / name
                yield _words(blocks), (plan, *repaired_plan(settings, folder, plan, texts))


def repaired_plan(settings: Settings, folder: Path, plan: Plan, texts: list[str]) -> tuple[Plan, float]:
    """A plan for the encoder, repaired, and the seconds that this took."""
    on_gpu = settings.device.type == "cuda"

    def make() -> Plan:
        model, tokenizer = _encoder(settings)
        return slimformer.repair(
            model,
            Plan(plan.methods, fingerprint(model)),
            tokenizer,
            data=texts,
            near=None,
            rank=settings.pick(64, 2),
            length=settings.pick(256 if on_gpu else 128, 32),
            every=settings.pick(50, 2),
            patience=6,
            settings=TrainingSettings(
                steps=settings.pick(1500 if on_gpu else 240, 4),
                rows=settings.pick(64 if on_gpu else 32, 4),
                learning_rate=1e-3,
                precision="bf16" if on_gpu else "no",
                keep_every=10_000,
            ),
            progress=not settings.smoke,
        )

    return kept(folder, make)


def training_texts(settings: Settings) -> list[str]:
    """Texts without labels: Cranfield's documents, lines of WikiText-2, sentences of STS-B train."""
    pairs = [] if settings.data is None else read_sts(settings.data / "stsb" / "train.tsv")[0]
    sentences = list(dict.fromkeys(text for pair in pairs for text in pair))
    return [*retrieval_task(settings).texts, *lines(settings, "wiki.train.raw.slice5k.txt"), *sentences]


def _encoder(settings: Settings) -> tuple[Any, Any]:
    if settings.model is None:
        pipeline = embedder(settings)
        return pipeline, pipeline.tokenizer
    model = AutoModel.from_pretrained(settings.model, dtype=torch.float32).to(settings.device).eval()
    return model, AutoTokenizer.from_pretrained(settings.model)


def _tasks(settings: Settings) -> dict[str, EmbeddingTask]:
    tasks: dict[str, EmbeddingTask] = {"cranfield": retrieval_task(settings)}
    if settings.data is not None:
        pairs, gold = read_sts(settings.data / "stsb" / "test.tsv")
        tasks["qmsum"] = read_retrieval(settings.data / "qmsum_retrieval")
        tasks["sts"] = PairTask("STS-B test", pairs, gold)
    return tasks


def _figures(model: Any, tasks: dict[str, EmbeddingTask]) -> dict[str, float]:
    return {name: task.scores(model)[0] for name, task in tasks.items()}


def _speed(settings: Settings, model: Any, plans: dict[str, Plan]) -> Iterator[Measurement]:
    """`encode` of lines of WikiText-2 in one call: unpatched, patched without a plan, and with every plan."""
    texts = lines(settings, "wiki.test.raw")[: settings.pick(_TEXTS_TIMED, 8)]

    def encode() -> Tensor:
        found: Tensor = model.encode(texts, batch_size=_BATCH, convert_to_tensor=True).cpu()
        return found

    expected = encode()
    cases = {
        DENSE: Case(encode, encode_error(encode, expected), math.inf, partial(slimformer.unpatch, model)),
        LOSSLESS: Case(encode, lambda: 0.0, math.inf, partial(slimformer.patch, model)),
        **{
            name: Case(encode, lambda: 0.0, math.inf, partial(slimformer.patch, model, plan))
            for name, plan in plans.items()
        },
    }
    yield from compare(
        settings,
        {"texts": len(texts)},
        cases,
        regime="wall",
        baseline=DENSE,
        effort=Effort(milliseconds=60_000.0, least=7, most=15),
    )
    slimformer.unpatch(model)


def _words(blocks: tuple[int, ...]) -> str:
    return f"{'layer' if len(blocks) == 1 else 'layers'} {', '.join(map(str, blocks))}"


@table("encoder_repair", source="encoder_repair")
def embeddings(content: dict[str, Any]) -> str:
    """One row per plan: every figure before and after, what is lost then, and the speed."""
    dense = tables.find(content, DENSE, dropped="none")
    if dense is None:
        return ""
    known = [name for name in FIGURES if name in dense["values"]]
    rows = [[DENSE, *(_shown(name, dense["values"][name]) for name in known), "1.00×"]]
    rows.append([LOSSLESS, *("the same" for _ in known), _gain(content, LOSSLESS)])
    for (name,) in tables.points(content, "dropped", where=lambda p: p.get("dropped", "none") != "none"):
        before, after = (tables.find(content, candidate, dropped=name) for candidate in (BEFORE, AFTER))
        if before is None or after is None:
            continue
        cells = []
        for figure in known:
            old, new, own = (found["values"][figure] for found in (before, after, dense))
            cells.append(f"{_shown(figure, old)} → {_shown(figure, new)} ({100 * (new / own - 1):+.1f}%)")
        rows.append([f"without {name}", *cells, _gain(content, name)])
    return tables.markdown(["", *(FIGURES[name] for name in known), "encode, speed"], rows)


def _shown(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "sts" else f"{value:.3f}"


def _gain(content: dict[str, Any], name: str) -> str:
    found = tables.find(content, name, regime="wall")
    return "–" if found is None else f"{1 / found['baseline_ratio']:.2f}×"

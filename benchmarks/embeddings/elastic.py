"""Retrieval by an embedding model that exits early, with and without a fitted head, at several widths."""

from __future__ import annotations

import importlib
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertModel

import slimformer
from benchmarks.drop_table import DENSE, tiny_tokenizer
from benchmarks.frame import tables
from benchmarks.frame.registry import MissingInput, Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer import EarlyExit
from slimformer.calibration.exit_heads import fit_exits
from slimformer.evaluation.retrieval import RetrievalTask, read_retrieval
from slimformer.evaluation.similarity_task import read_sts
from slimformer.model.anatomy import find_anatomy

BARE, ELSEWHERE, CORPUS = "no head", "head fitted on WikiText-2 and STS", "head fitted on the corpus"
WIDTHS = (384, 192, 96, 48, 24)
# Sentences and lines of other text that heads are fitted on.
_LINES, _SENTENCES = 1500, 3000


@benchmark(
    "elastic",
    needs="any",
    description="nDCG@10 on Cranfield of every early exit of an embedding model at five widths (--model, --data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """All 225 queries, float32; the heads have seen no query and no judgement."""
    model = embedder(settings)
    task, elsewhere = retrieval_task(settings), _other_texts(settings)
    depth = len(find_anatomy(model).layers)
    widths = settings.pick(WIDTHS, (32, 16))
    yield from _row(model, task, depth, DENSE, widths)
    heads = {
        CORPUS: fit_exits(model, task.texts),
        ELSEWHERE: fit_exits(model, elsewhere),
        BARE: {layer: EarlyExit(layer) for layer in range(depth)},
    }
    for name, exits in heads.items():
        for layer in range(depth - 1, -1, -1):
            with slimformer.patched(model, exits[layer]):
                yield from _row(model, task, layer, name, widths if name == CORPUS else widths[:1])


def embedder(settings: Settings) -> Any:
    """The embedding pipeline of `--model`, in float32; a tiny one in a smoke run.

    Raises:
        MissingInput: If there is no `--model`.
    """
    # Left to those that need it: machines that only train decoders do without.
    library: Any = importlib.import_module("sentence_transformers")
    if settings.model is not None:
        return library.SentenceTransformer(
            str(settings.model), device=str(settings.device), model_kwargs={"dtype": "float32"}
        )
    if not settings.smoke:
        raise MissingInput("it needs --model, the folder of an embedding model")
    config = BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return library.SentenceTransformer(folder, device=str(settings.device))


def lines(settings: Settings, file: str) -> list[str]:
    """The lines of a file of WikiText-2 that are no headings.

    Raises:
        MissingInput: If there is no `--data`.
    """
    if settings.data is None:
        if not settings.smoke:
            raise MissingInput(f"it needs --data, a folder with wikitext2/{file}")
        return [f"{'a line of text ' * (1 + number % 7)}{number}" for number in range(40)]
    found = (settings.data / "wikitext2" / file).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in found if line.strip() and not line.strip().startswith("=")]


def retrieval_task(settings: Settings) -> RetrievalTask:
    """Cranfield; in a smoke run without data, lines that look for themselves.

    Raises:
        MissingInput: If there is no `--data`.
    """
    if settings.data is not None:
        return read_retrieval(settings.data / "cranfield")
    if not settings.smoke:
        raise MissingInput("it needs --data, a folder with cranfield/, wikitext2/ and stsb/")
    texts = lines(settings, "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("corpus", "queries"):
            rows = (json.dumps({"_id": str(index), "text": text}) for index, text in enumerate(texts))
            (folder / f"{file}.jsonl").write_text("\n".join(rows))
        (folder / "qrels").mkdir()
        (folder / "qrels" / "test.tsv").write_text("\n".join(f"{i}\t{i}\t1" for i in range(8)))
        return read_retrieval(folder)


def _other_texts(settings: Settings) -> list[str]:
    wiki = lines(settings, "wiki.train.raw.slice5k.txt")
    pairs = [] if settings.data is None else read_sts(settings.data / "stsb" / "train.tsv")[0]
    sentences = list(dict.fromkeys(text for pair in pairs for text in pair))
    chosen = random.Random(0)
    return chosen.sample(wiki, min(_LINES, len(wiki))) + chosen.sample(
        sentences, min(_SENTENCES, len(sentences))
    )


def _row(
    model: Any, task: RetrievalTask, layers: int, name: str, widths: tuple[int, ...]
) -> Iterator[Measurement]:
    for width, score in zip(widths, task.scores(model, widths), strict=True):
        yield Measurement({"layers": layers, "dimensions": width}, name, values={"ndcg": score})


@table("elastic", source="elastic")
def retrieval(content: dict[str, Any]) -> str:
    """One row per exit: the three heads at full width, then the widths of the head fitted on the corpus."""
    widths = sorted(
        {width for (width,) in tables.points(content, "dimensions", where=lambda _: True)}, reverse=True
    )
    rows = []
    for (layers,) in tables.points(content, "layers", where=lambda _: True):
        dense = tables.find(content, DENSE, layers=layers) is not None
        full = [tables.find(content, name, layers=layers, dimensions=widths[0]) for name in (BARE, ELSEWHERE)]
        cut = [
            tables.find(content, DENSE if dense else CORPUS, layers=layers, dimensions=width)
            for width in widths
        ]
        rows.append([f"{layers} (dense)" if dense else str(layers), *map(_score, [*full, *cut])])
    head = ["Layers that run", BARE, ELSEWHERE, f"{CORPUS}, {widths[0]} dimensions", *map(str, widths[1:])]
    return tables.markdown(head, rows)


def _score(measurement: dict[str, Any] | None) -> str:
    return "–" if measurement is None else f"{measurement['values']['ndcg']:.3f}"

"""A tiny embedding model, and collections in the layouts that embedding tasks are read from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer

from tiny_checkpoints import tiny_checkpoint

SENTENCE = "a cat sat on the mat and saw no dog run over hills of glass while seven old kings were asleep"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(1 + i * i % 17)) + f" {WORDS[i % 20]}"
         for i in range(60)]  # fmt: skip
# No text beside itself: rounding would decide how such pairs are ranked.
PAIRS = [(TEXTS[i], TEXTS[(i * i + 7) % 60]) for i in range(1, 41)]
GOLD = [float(i % 6) for i in range(1, 41)]


def pipeline(folder: Path, mode: str = "mean", name: str = "bert") -> SentenceTransformer:
    transformer = Transformer(tiny_checkpoint(folder, name))
    return SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode=mode)], device="cpu")


def beir(folder: Path, zipped: bool = False) -> Path:
    """Forty documents; every query asks for the two whose first words it has."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": text.split()[0], "text": text} for i, text in enumerate(TEXTS[:40])]
    queries = [{"_id": f"q{i}", "text": " ".join(TEXTS[i].split()[:3])} for i in range(10)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if zipped:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text)
    lines = [f"q{i}\td{j}\t{score}" for i in range(9) for j, score in ((i, 2), (i + 9, 1), (i + 20, 0))]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return folder


def tsv(path: Path) -> Path:
    rows = (f"{score}\t{a}\t{b}" for (a, b), score in zip(PAIRS, GOLD, strict=True))
    path.write_text("\n".join(["score\tsentence1\tsentence2", *rows]) + "\n")
    return path

"""The embedding pipeline, the texts and the collections that benchmarks of embedding models read."""

from __future__ import annotations

from typing import Any

from benchmarks.frame.inputs import CRANFIELD, STS_TRAIN
from benchmarks.frame.registry import Settings
from slimformer.evaluation.retrieval import RetrievalTask, read_retrieval
from slimformer.evaluation.similarity_task import read_sts


def embedder(settings: Settings) -> Any:
    """The embedding pipeline of `--model`, in float32."""
    # Other benchmarks run where it is not installed, such as beside an engine.
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    return SentenceTransformer(
        str(settings.model), device=str(settings.device), model_kwargs={"dtype": "float32"}
    )


def lines(settings: Settings, file: str) -> list[str]:
    """The lines of a file of WikiText-2 that are no headings."""
    found = (settings.data / file).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in found if line.strip() and not line.strip().startswith("=")]


def sentences(settings: Settings) -> list[str]:
    """Every sentence of STS-B's training split once."""
    return list(dict.fromkeys(text for pair in read_sts(settings.data / STS_TRAIN)[0] for text in pair))


def retrieval_task(settings: Settings, folder: str = CRANFIELD) -> RetrievalTask:
    """A collection in BEIR's layout."""
    return read_retrieval(settings.data / folder)

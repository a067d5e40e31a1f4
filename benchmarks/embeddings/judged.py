"""Retrieval and similarity of vectors that are made once, and of documents and queries by different models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slimformer.evaluation.embedding_tasks import PairTask
from slimformer.evaluation.retrieval import RetrievalTask


class Vectors:
    """Known vectors in the place of a pipeline, for evaluators.

    Attributes:
        documents: The vector of each document.
        queries: That of each query.
        sentences: That of each other text.
    """

    similarity_fn_name = "cosine"

    def __init__(
        self, documents: dict[str, Tensor], queries: dict[str, Tensor], sentences: dict[str, Tensor]
    ) -> None:
        self.documents, self.queries, self.sentences = documents, queries, sentences

    def encode_document(self, texts: Sequence[str], **_: Any) -> Tensor:
        """Vectors `[texts, hidden]` of documents."""
        return torch.stack([self.documents[text] for text in texts])

    def encode_query(self, texts: Sequence[str], **_: Any) -> Tensor:
        """Vectors of queries."""
        return torch.stack([self.queries[text] for text in texts])

    def encode(self, texts: Sequence[str], **_: Any) -> Tensor:
        """Vectors of sentences."""
        return torch.stack([self.sentences[text] for text in texts])

    @staticmethod
    def similarity(first: Tensor, second: Tensor) -> Tensor:
        """Cosines `[first, second]`."""
        first, second = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (first, second))
        return first @ second.T


def judged_alone_and_with(task: RetrievalTask, sts: PairTask) -> Callable[[Any], dict[str, float]]:
    """What judges models of one space; the first that it gets is the dense one.

    Args:
        task: Retrieval.
        sts: Similarity.

    Returns:
        From a model to its nDCG@10 and Spearman, and for all but the first, nDCG@10 with queries or with documents by
        the first.
    """
    first: list[Vectors] = []

    def judge(model: Any) -> dict[str, float]:
        own = vectors(model, task, sts)
        dense = first[0] if first else None
        found = {"cranfield": task.scores(own)[0], "sts": sts.scores(own)[0]}
        if dense is None:
            first.append(own)
            return found
        mixed = {
            "dense queries": Vectors(own.documents, dense.queries, {}),
            "dense documents": Vectors(dense.documents, own.queries, {}),
        }
        return found | {name: task.scores(both)[0] for name, both in mixed.items()}

    return judge


def vectors(model: Any, task: RetrievalTask, sts: PairTask) -> Vectors:
    """The vectors of all texts of both."""

    def made(encode: Callable[..., Any], texts: Sequence[str]) -> dict[str, Tensor]:
        rows = encode(list(texts), batch_size=32, convert_to_tensor=True, show_progress_bar=False)
        return dict(zip(texts, rows, strict=True))

    return Vectors(
        made(model.encode_document, list(dict.fromkeys(task.texts))),
        made(model.encode_query, list(dict.fromkeys(task.queries.values()))),
        made(model.encode, sts.texts),
    )

"""What embeddings are for, as one figure: similarity of pairs, retrieval, or agreement with the dense model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.retrieval import read_retrieval
from slimformer.evaluation.similarity_task import read_sts, spearman_sts
from slimformer.text.held_out import split_texts
from slimformer.text.sources import load_texts

NEIGHBOURS = 10
_ROWS_AT_ONCE = 1024


class EmbeddingTask(Protocol):
    """Something that embeddings are measured by; the higher, the better."""

    @property
    def name(self) -> str:
        """What the figure is."""
        ...

    @property
    def source(self) -> str:
        """Where the task came from."""
        ...

    @property
    def texts(self) -> list[str]:
        """Its texts, for whatever is fitted on unlabelled text."""
        ...

    def recorded(self, model: Any) -> EmbeddingTask:
        """The task with what it needs of the dense model, which is given unpatched."""
        ...

    def split(self) -> tuple[EmbeddingTask, EmbeddingTask]:
        """A part to choose by, and a part to report on."""
        ...

    def apart(self) -> tuple[EmbeddingTask, list[str]]:
        """What to judge by, and texts to fit on that do not flatter what is fitted."""
        ...

    def scores(self, model: Any, dimensions: Sequence[int | None] = (None,)) -> list[float]:
        """The figure with embeddings cut to each of the `dimensions`, encoding every text once."""
        ...

    def figures(self, model: Any) -> dict[str, float]:
        """All that is reported, by name."""
        ...


@dataclass(frozen=True)
class PairTask:
    """Pairs of sentences with gold scores, measured as STS is (arXiv 1708.00055).

    Attributes:
        source: Where they came from.
        pairs: Pairs of sentences.
        gold: One score per pair.
        batch_size: Texts per forward.
    """

    source: str
    pairs: Sequence[tuple[str, str]]
    gold: Sequence[float]
    batch_size: int = 32
    name: str = "Spearman × 100"

    @property
    def texts(self) -> list[str]:
        """Every sentence once."""
        return list(dict.fromkeys(text for pair in self.pairs for text in pair))

    def recorded(self, model: Any) -> PairTask:
        """The task itself: gold scores need no dense model."""
        return self

    def split(self) -> tuple[PairTask, PairTask]:
        """Every other pair to choose by, and the others to report on."""
        first, second = (
            dataclasses.replace(
                self, source=f"{self.source}, {part}", pairs=self.pairs[start::2], gold=self.gold[start::2]
            )
            for start, part in enumerate(("every other pair", "the held-out pairs"))
        )
        return first, second

    def apart(self) -> tuple[PairTask, list[str]]:
        """One half of the pairs, and those sentences of the other that are not in it."""
        judged = dataclasses.replace(self, pairs=self.pairs[::2], gold=self.gold[::2])
        seen = set(judged.texts)
        return judged, [text for text in self.texts if text not in seen]

    def scores(self, model: Any, dimensions: Sequence[int | None] = (None,)) -> list[float]:
        """The correlation of cosines with the gold scores, times 100."""
        texts = self.texts
        place = {text: index for index, text in enumerate(texts)}
        embeddings = _encode(model, texts, self.batch_size)

        def cut(dimension: int | None) -> float:
            return spearman_sts(
                lambda asked: embeddings[[place[text] for text in asked], :dimension], self.pairs, self.gold
            )

        return [cut(dimension) for dimension in dimensions]

    def figures(self, model: Any) -> dict[str, float]:
        """The correlation alone."""
        return {self.name: self.scores(model)[0]}


@dataclass(frozen=True)
class NeighbourTask:
    """Texts without labels: how many of each one's nearest neighbours are those that the dense model finds.

    Attributes:
        source: Where they came from.
        texts: The texts.
        dense: What the dense model finds `[texts, neighbours]`; `recorded` fills it in.
        batch_size: Texts per forward.
    """

    source: str
    texts: list[str]
    dense: Tensor | None = None
    batch_size: int = 32
    name: str = f"of {NEIGHBOURS} neighbours, share found by dense too"

    def recorded(self, model: Any) -> NeighbourTask:
        """The same task with the neighbours that an unpatched model finds."""
        return dataclasses.replace(self, dense=nearest(_encode(model, self.texts, self.batch_size)))

    def split(self) -> tuple[NeighbourTask, NeighbourTask]:
        """Four fifths to choose by, as calibration takes them, and the rest to report on."""
        kept, held_out = split_texts(self.texts)
        return (
            dataclasses.replace(self, source=f"{self.source}, four fifths", texts=kept),
            dataclasses.replace(self, source=f"{self.source}, the held-out fifth", texts=held_out),
        )

    def apart(self) -> tuple[NeighbourTask, list[str]]:
        """One half of the texts, and the other."""
        return dataclasses.replace(self, texts=self.texts[::2]), self.texts[1::2]

    def scores(self, model: Any, dimensions: Sequence[int | None] = (None,)) -> list[float]:
        """The share, between 0 and 1.

        Raises:
            CalibrationError: If the dense model's neighbours were not recorded.
        """
        if self.dense is None:
            raise CalibrationError(
                "There is nothing to agree with: call recorded(model) with the dense model first."
            )
        embeddings = _encode(model, self.texts, self.batch_size)
        return [neighbour_agreement(self.dense, nearest(embeddings[:, :width])) for width in dimensions]

    def figures(self, model: Any) -> dict[str, float]:
        """The share alone."""
        return {self.name: self.scores(model)[0]}


def nearest(embeddings: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """The texts of highest cosine to each text, itself left out.

    Args:
        embeddings: `[texts, hidden]`.
        count: How many; all others where there are fewer.

    Returns:
        int64 `[texts, neighbours]`.

    Raises:
        DataError: If there are fewer than two texts.

    Example:
        >>> nearest(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), 1).tolist()
        [[1], [0], [1]]
    """
    if len(embeddings) < 2:
        raise DataError(f"Neighbours need at least two texts, got {len(embeddings)}. Give more.")
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    found = []
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        cosine = unit[start : start + _ROWS_AT_ONCE] @ unit.T
        own = torch.arange(len(cosine), device=unit.device)
        cosine[own, start + own] = -torch.inf
        found.append(cosine.topk(min(count, len(unit) - 1)).indices)
    return torch.cat(found)


def neighbour_agreement(first: Tensor, second: Tensor) -> float:
    """Mean share of neighbours that two lists `[texts, neighbours]` have in common.

    Example:
        >>> neighbour_agreement(torch.tensor([[1, 2], [0, 2]]), torch.tensor([[2, 1], [0, 3]]))
        0.75
    """
    return (first[:, :, None] == second[:, None, :]).any(-1).double().mean().item()


def read_task(
    source: str | os.PathLike[str] | None, *, text_field: str = "text", split: str = "test"
) -> EmbeddingTask:
    """Read what embeddings are to be measured by.

    Args:
        source: A folder in BEIR's layout; a `.tsv` file of pairs with the columns score, sentence1 and sentence2; or
            whatever `load_texts` takes, as text without labels.
        text_field: The field with the text, for text without labels.
        split: Which qrels of a folder are read.

    Raises:
        DataError: If it cannot be read.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> _ = file.write_text("One text.\\n\\nAnother.")
        >>> read_task(file).texts
        ['One text.', 'Another.']
    """
    path = None if source is None else Path(source)
    if path is not None and path.is_dir():
        return read_retrieval(path, split)
    if path is not None and path.suffix == ".tsv":
        pairs, gold = read_sts(path)
        return PairTask(f"file {path.name}, {len(pairs)} pairs", pairs, gold)
    texts, name = load_texts(None if source is None else os.fspath(source), text_field=text_field)
    return NeighbourTask(name, texts)


def task_of(
    data: EmbeddingTask | str | os.PathLike[str] | Iterable[str] | None, text_field: str = "text"
) -> EmbeddingTask:
    """A task as it is, or what `read_task` makes of a source, or of strings as texts without labels.

    Raises:
        DataError: If it cannot be read.

    Example:
        >>> task_of(["One text.", "Another."]).texts
        ['One text.', 'Another.']
    """
    if data is None or isinstance(data, (str, os.PathLike)):
        return read_task(data, text_field=text_field)
    if hasattr(data, "source"):
        return cast(EmbeddingTask, data)
    texts, name = load_texts(data)
    return NeighbourTask(name, texts)


def is_labelled(data: Any) -> bool:
    """Whether data say what embeddings are for: a task, a folder in BEIR's layout or a `.tsv` file of pairs.

    Example:
        >>> is_labelled("pairs.tsv"), is_labelled("notes.txt"), is_labelled(["a text"])
        (True, False, False)
    """
    if isinstance(data, (str, os.PathLike)):
        return os.path.isdir(data) or Path(data).suffix == ".tsv"
    return hasattr(data, "source")


def _encode(model: Any, texts: list[str], batch_size: int) -> Tensor:
    """Embeddings `[texts, hidden]` on the CPU.

    Raises:
        CalibrationError: If the model is no SentenceTransformer, or gives NaN.
    """
    if not hasattr(model, "encode"):
        raise CalibrationError(
            f"Embeddings are measured with a SentenceTransformer, got {type(model).__name__}. SentenceTransformer("
            "folder) loads any transformers checkpoint, with mean pooling."
        )
    found: Tensor = model.encode(
        texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
    ).cpu()
    if bool(found.isnan().any()):
        raise CalibrationError("The embeddings hold NaN. Check the model and its dtype.")
    return found

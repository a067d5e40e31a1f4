"""Retrieval on a folder in BEIR's layout (arXiv 2104.08663), measured by sentence-transformers' own evaluator."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimformer.errors import CalibrationError, DataError
from slimformer.text.files import ENCODING, checked_lines, checked_text

_LAYOUT = (
    "Expected corpus.jsonl and queries.jsonl (either may end in .gz) with _id and text on every line, and "
    "qrels/<split>.tsv with the columns query-id, corpus-id and score"
)
# Names of what the evaluator gives, and at which rank.
_KEYS = (
    ("nDCG@10", "ndcg@k", 10),
    ("Recall@10", "recall@k", 10),
    ("MRR@10", "mrr@k", 10),
    ("MAP@100", "map@k", 100),
)


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, a corpus, and which documents answer which query.

    Attributes:
        source: Where it came from, for a plan's provenance.
        queries: Query id to text; only queries that some document answers.
        corpus: Document id to text, the title in front.
        relevant: Query id to the ids of its documents, those with a score above 0.
        batch_size: Texts per forward.
    """

    source: str
    queries: Mapping[str, str]
    corpus: Mapping[str, str]
    relevant: Mapping[str, set[str]]
    batch_size: int = 32
    name: str = "nDCG@10"

    @property
    def texts(self) -> list[str]:
        """The corpus, for whatever is fitted on unlabelled text."""
        return list(self.corpus.values())

    def recorded(self, model: Any) -> RetrievalTask:
        """The task itself: judgements need no dense model."""
        return self

    def split(self) -> tuple[RetrievalTask, RetrievalTask]:
        """Every other query to choose by, and the others to report on; both search the whole corpus.

        Raises:
            DataError: If there are fewer than two queries.
        """
        if len(self.queries) < 2:
            raise DataError(
                f"{self.source} has {len(self.queries)} query, and two are needed to hold one out."
            )
        ids = list(self.queries)
        first, second = (
            dataclasses.replace(
                self, source=f"{self.source}, {part}", queries={q: self.queries[q] for q in chosen}
            )
            for part, chosen in (("every other query", ids[::2]), ("the held-out queries", ids[1::2]))
        )
        return first, second

    def apart(self) -> tuple[RetrievalTask, list[str]]:
        """The task, and its corpus: what is fitted on the documents searched has seen no query."""
        return self, self.texts

    def scores(self, model: Any, dimensions: Sequence[int | None] = (None,)) -> list[float]:
        """nDCG@10 with embeddings cut to each of the `dimensions`, encoding the corpus once."""
        return [figures["nDCG@10"] for figures in self._figures(model, dimensions)]

    def figures(self, model: Any) -> dict[str, float]:
        """nDCG@10, Recall@10, MRR@10 and MAP@100.

        Args:
            model: A SentenceTransformer, patched or not. Prompts for queries and documents are its own.

        Raises:
            CalibrationError: If the model is none, or its embeddings hold NaN.
            DataError: If sentence-transformers is not installed.
        """
        return self._figures(model, (None,))[0]

    def _figures(self, model: Any, dimensions: Sequence[int | None]) -> list[dict[str, float]]:
        if not hasattr(model, "encode_document"):
            raise CalibrationError(
                f"Retrieval is measured with a SentenceTransformer, got {type(model).__name__}. SentenceTransformer("
                "folder) loads any transformers checkpoint, with mean pooling."
            )
        documents = model.encode_document(
            self.texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        if bool(documents.isnan().any()):
            raise CalibrationError("The embeddings hold NaN. Check the model and its dtype.")
        similarity = model.similarity_fn_name
        found = []
        for dimension in dimensions:
            evaluator = ir_evaluator()(
                dict(self.queries),
                dict(self.corpus),
                dict(self.relevant),
                batch_size=self.batch_size,
                truncate_dim=dimension,
                score_functions={similarity: model.similarity},
            )
            # Calling the evaluator would write every figure into the model's card.
            compute = getattr(evaluator, "compute_all_metrics", None) or evaluator.compute_metrices
            metrics = compute(model, corpus_embeddings=documents[:, :dimension])[similarity]
            found.append({name: float(metrics[key][at]) for name, key, at in _KEYS})
        return found


def read_retrieval(folder: str | os.PathLike[str], split: str = "test") -> RetrievalTask:
    """Read a folder in BEIR's layout.

    Args:
        folder: Holds `corpus.jsonl`, `queries.jsonl` (or with `.gz`) and `qrels/`.
        split: Which file of `qrels/` is read.

    Raises:
        DataError: If a file is absent or cannot be read, a line lacks a field or has another type, an id in the qrels
            is in neither file, or no query has a relevant document.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "Cats", "text": "They purr."}\\n')
        >>> _ = (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "who purrs?"}\\n')
        >>> (folder / "qrels").mkdir()
        >>> _ = (folder / "qrels" / "test.tsv").write_text("query-id\\tcorpus-id\\tscore\\nq1\\td1\\t1\\n")
        >>> task = read_retrieval(folder)
        >>> task.corpus, task.relevant
        ({'d1': 'Cats They purr.'}, {'q1': {'d1'}})
    """
    where = Path(folder)
    qrels = where / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        others = sorted(path.stem for path in (where / "qrels").glob("*.tsv"))
        raise DataError(
            f"{where} has no qrels/{split}.tsv, which says what answers a query"
            f"{'; there is ' + ', '.join(others) if others else ''}. {_LAYOUT}."
        )
    corpus = dict(_texts(where, "corpus"))
    queries = dict(_texts(where, "queries"))
    relevant: dict[str, set[str]] = {}
    for number, query, document, score in _judgements(qrels):
        for identifier, known, name in ((query, queries, "queries"), (document, corpus, "corpus")):
            if identifier not in known:
                raise DataError(
                    f"Line {number} of {qrels} names {identifier!r}, which {name}.jsonl does not hold. Take the qrels "
                    "of this corpus."
                )
        if score > 0:
            relevant.setdefault(query, set()).add(document)
    if not relevant:
        raise DataError(
            f"{qrels} holds no judgement with a score above 0, so nothing can be measured. {_LAYOUT}."
        )
    asked = {query: text for query, text in queries.items() if query in relevant}
    source = f"{where.name}, {len(asked)} queries ({split}) on {len(corpus)} documents"
    return RetrievalTask(source, asked, corpus, relevant)


def ir_evaluator() -> Any:
    """sentence-transformers' `InformationRetrievalEvaluator`, whose module has moved between its versions.

    Raises:
        DataError: If sentence-transformers is not installed.
    """
    for module in (
        "sentence_transformers.sentence_transformer.evaluation",
        "sentence_transformers.evaluation",
    ):
        try:
            return importlib.import_module(module).InformationRetrievalEvaluator
        except ImportError:
            continue
    raise DataError(
        'Retrieval is measured by sentence-transformers, which is not installed: pip install "slimformer[embeddings]"'
    )


def _texts(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    plain = folder / f"{name}.jsonl"
    file = plain if plain.is_file() else plain.with_suffix(".jsonl.gz")
    if not file.is_file():
        raise DataError(f"{folder} has neither {name}.jsonl nor {name}.jsonl.gz. {_LAYOUT}.")
    empty = True
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        empty = False
        try:
            row = json.loads(line)
            identifier, text, title = row["_id"], row["text"], row.get("title") or ""
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"Line {number} of {file} is not such a line ({error!r}). {_LAYOUT}.") from error
        if not isinstance(text, str) or not isinstance(title, str):
            kind = type(title if isinstance(text, str) else text).__name__
            raise DataError(
                f"Line {number} of {file} has a text of type {kind}, and strings are embedded. {_LAYOUT}."
            )
        yield str(identifier), checked_text(f"{title} {text}".strip(), f"Line {number} of {file}")
    if empty:
        raise DataError(f"{file} is empty. {_LAYOUT}.")


def _judgements(file: Path) -> Iterator[tuple[int, str, str, float]]:
    for number, line in enumerate(_lines(file), start=1):
        parts = line.rstrip("\r\n").split("\t")
        if number == 1 and parts[0] == "query-id":
            continue
        try:
            yield number, parts[0], parts[1], float(parts[2])
        except (IndexError, ValueError) as error:
            raise DataError(f"Line {number} of {file} is {line[:80]!r}. {_LAYOUT}.") from error


def _lines(file: Path) -> Iterator[str]:
    try:
        with gzip.open(file, "rt", **ENCODING) if file.suffix == ".gz" else file.open(**ENCODING) as lines:
            yield from checked_lines(lines, str(file))
    except (OSError, EOFError) as error:
        raise DataError(f"Cannot read {file}: {error}. {_LAYOUT}.") from error

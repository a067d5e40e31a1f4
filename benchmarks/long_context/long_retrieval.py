"""Retrieval among documents longer than an embedding model was trained for, by every way to read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import slimformer
from benchmarks.embeddings.inputs import embedder, retrieval_task
from benchmarks.frame import tables
from benchmarks.frame.inputs import BOOKS, QMSUM
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.long_context.long_documents import LongDocuments, needles, passkeys
from benchmarks.long_context.long_prompts import held_out_books
from slimformer import SelfExtend, TempScale
from slimformer.methods.absolute_positions import GroupedPositions, PositionInterpolation, RecurrentPositions
from slimformer.methods.context_windows import encode_in_windows
from slimformer.methods.rope_scaling import RopeScaling
from slimformer.methods.temperature import LogNScale
from slimformer.model.anatomy import find_anatomy
from slimformer.transforms.transform import trained_length

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DOCUMENTS = 100
# Tokens of one batch: padding and memory stay small.
_BATCH_TOKENS = 32768


@dataclass(frozen=True)
class Way:
    """One way to read documents of up to so many tokens.

    Attributes:
        methods: What the model is patched with, given how many times longer than it was trained for texts are; a
            ratio of 1 or less means that they are not.
        windows: Tokens of a window, where documents are read in windows; None where they are read in one piece.
        whole: Whether documents are read to their end, or cut off where the model's positions end.
    """

    methods: Callable[[float], Sequence[Any]] = lambda times: ()
    windows: int | None = None
    whole: bool = True


def _longer(method: Callable[[int], Any], trained: int, own: int) -> Callable[[float], Sequence[Any]]:
    """A method for so many times the `trained` length, where ratios refer to the model's `own`."""

    def methods(times: float) -> Sequence[Any]:
        factor = math.ceil(times * own / trained)
        return [method(factor)] if factor > 1 else []

    return methods


def _and(*parts: Callable[[float], Sequence[Any]]) -> Callable[[float], Sequence[Any]]:
    return lambda times: [method for part in parts for method in part(times)]


def _temperature(tau: float) -> Callable[[float], Sequence[Any]]:
    return lambda times: [TempScale(tau)]


def encoder_ways(trained: int) -> dict[str, Way]:
    """For a model with a table of positions, of which it was `trained` on the first half alone."""
    half = trained // 2
    grouped = _longer(GroupedPositions, trained, trained)
    between = _longer(PositionInterpolation, trained, trained)
    again = _longer(lambda factor: RecurrentPositions(), trained, trained)
    of_half = _longer(lambda factor: PositionInterpolation(factor, half), half, trained)
    return {
        f"truncated to {trained}": Way(whole=False),
        f"windows of {trained}": Way(windows=trained),
        f"windows of {half}": Way(windows=half),
        "grouped positions": Way(grouped),
        "recurrent positions": Way(again),
        "interpolated positions": Way(between),
        f"interpolated into {half}": Way(of_half),
        "truncated, τ = 0.9": Way(_temperature(0.9), whole=False),
        "truncated, τ = 0.8": Way(_temperature(0.8), whole=False),
        "windows, τ = 0.9": Way(_temperature(0.9), windows=trained),
        "interpolated, τ = 0.9": Way(_and(between, _temperature(0.9))),
        "interpolated, τ = 0.8": Way(_and(between, _temperature(0.8))),
        "interpolated, log n": Way(_and(between, lambda times: [LogNScale(trained)])),
    }


def decoder_ways(trained: int) -> dict[str, Way]:
    """For a model with rotary positions."""

    def extend(factor: int) -> SelfExtend:
        return SelfExtend(factor + 1, trained // factor)

    return {
        f"truncated to {trained}": Way(whole=False),
        f"windows of {trained}": Way(windows=trained),
        "unpatched": Way(),
        "NTK": Way(_longer(lambda f: RopeScaling("ntk", float(f)), trained, trained)),
        "YaRN": Way(_longer(lambda f: RopeScaling("yarn", float(f)), trained, trained)),
        "SelfExtend": Way(_longer(extend, trained, trained)),
        "SelfExtend, τ = 0.9": Way(_and(_longer(extend, trained, trained), _temperature(0.9))),
    }


@benchmark(
    "long_retrieval",
    "passkeys, needles and QMSum at 256 to 4096 tokens by an encoder",
    model="embedding model",
    data=(BOOKS, QMSUM),
    takes=("texts",),
)
def run_encoder(settings: Settings) -> Iterator[Measurement]:
    """Every way at every length, and QMSum at the greatest; float32."""
    yield from _measure(settings, embedder(settings), encoder_ways, 4096, "")


@benchmark(
    "long_retrieval_decoder",
    "the same at up to 32768 tokens by a decoder, mean and last token",
    model="instruction-tuned decoder",
    data=(BOOKS, QMSUM),
    takes=("texts",),
)
def run_decoder(settings: Settings) -> Iterator[Measurement]:
    """Every way at every length with either pooling; bfloat16 on a GPU."""
    for pooling in ("mean", "lasttoken"):
        yield from _measure(settings, _pooled(settings, pooling), decoder_ways, 32768, pooling)


def _pooled(settings: Settings, pooling: str) -> SentenceTransformer:
    """A decoder as an embedding model: the mean of its last hidden states, or the last of them."""
    # Other benchmarks run where it is not installed, such as beside an engine.
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415
    from sentence_transformers.models import Pooling, Transformer  # noqa: PLC0415

    inner = Transformer(str(settings.model), model_kwargs={"dtype": settings.dtype})
    # Llama's have none; what it is does not matter behind an attention mask.
    if inner.tokenizer.pad_token is None:
        inner.tokenizer.pad_token = inner.tokenizer.eos_token
    pooled = Pooling(inner.model.config.hidden_size, pooling_mode=pooling)
    return SentenceTransformer(modules=[inner, pooled], device=str(settings.device))


def _measure(
    settings: Settings,
    model: SentenceTransformer,
    ways_of: Callable[[int], Mapping[str, Way]],
    longest: int,
    pooling: str,
) -> Iterator[Measurement]:
    trained = trained_length(find_anatomy(model))
    ways = ways_of(trained)
    lengths = settings.pick([length for length in LENGTHS if length <= longest], [512, 1024])
    documents = settings.texts or settings.pick(DOCUMENTS, 4)
    haystack = " ".join(held_out_books(settings.data))
    for tokens in lengths:
        for name, task in (
            ("passkey", passkeys(tokens, documents, documents // 2)),
            ("needle", needles(tokens, haystack, documents, documents // 2)),
        ):
            for way, found in _answers(model, ways, task, trained, tokens):
                at: Parameters = {"task": name, "tokens": tokens, "documents": documents, "pooling": pooling}
                yield Measurement(at, way, values={"Acc@1": float((found == 0).double().mean())})
    qmsum = _qmsum(settings)
    for way, found in _answers(model, ways, qmsum, trained, lengths[-1]):
        gain = (found < 10).double() / (found + 2).double().log2()
        at = {"task": "qmsum", "tokens": lengths[-1], "documents": len(qmsum.documents), "pooling": pooling}
        yield Measurement(at, way, values={"nDCG@10": float(gain.mean())})


def _answers(
    model: SentenceTransformer, ways: Mapping[str, Way], task: LongDocuments, trained: int, tokens: int
) -> Iterator[tuple[str, Tensor]]:
    """For every way, the rank of each query's document, from 0."""
    for name, way in ways.items():
        limit = way.windows or (tokens if way.whole else min(tokens, trained))
        with slimformer.patched(model, *way.methods(tokens / trained)):
            queries = _encoded(model, task.queries, min(trained, 512))
            if way.windows is None:
                embedded = _encoded(model, task.documents, limit)
            else:
                embedded = encode_in_windows(
                    model, task.documents, limit, batch_size=max(_BATCH_TOKENS // limit, 1)
                )
        cosine = F.normalize(queries.float(), dim=-1) @ F.normalize(embedded.float(), dim=-1).T
        own = cosine.gather(1, torch.tensor(list(task.answers))[:, None])
        # A document that is as near as the right one stands in front of it: nothing is gained by equal embeddings.
        yield name, (cosine >= own).sum(1) - 1


def _encoded(model: SentenceTransformer, texts: Sequence[str], limit: int) -> Tensor:
    model.max_seq_length = limit
    found: Tensor = model.encode(
        list(texts),
        batch_size=max(_BATCH_TOKENS // limit, 1) if model.device.type == "cuda" else 2,
        convert_to_tensor=True,
        show_progress_bar=False,
    )
    return found.float().cpu()


def _qmsum(settings: Settings) -> LongDocuments:
    """QMSum's meetings and the summaries that ask for them; the first of both where fewer are wanted."""
    task = retrieval_task(settings, QMSUM)
    ids = list(task.corpus)[: settings.texts or settings.pick(None, 4)]
    place = {identifier: number for number, identifier in enumerate(ids)}
    asked = [
        (text, place[document])
        for query, text in task.queries.items()
        for document in task.relevant[query]
        if document in place
    ]
    return LongDocuments(
        [task.corpus[name] for name in ids], [text for text, _ in asked], [answer for _, answer in asked]
    )


TASKS = {"passkey": "passkey", "needle": "needle", "qmsum": "QMSum"}


@table("long_retrieval_summary", source="long_retrieval")
def encoder_summary(content: dict[str, Any]) -> str:
    """One row per way: the mean over all lengths beyond what the model has positions for, and QMSum."""
    beyond = tables.distinct(content, "tokens", where=lambda at: at["tokens"] > 512)
    columns: list[list[float | None]] = []
    for task in TASKS:
        column: list[float | None] = []
        for name in tables.candidates(content):
            found = (_figure(content, name, task=task, tokens=tokens) for tokens in beyond)
            values = [value for value in found if value is not None]
            column.append(sum(values) / len(values) if values else None)
        columns.append(column)
    documents = tables.distinct(content, "documents", where=lambda at: at["task"] == "passkey")[0]
    head = [f"Read, among {documents} documents", "passkey, Acc@1", "needle, Acc@1", "QMSum, nDCG@10"]
    return _by_way(content, head, columns)


def _every_length(name: str, source: str, pooling: str) -> None:
    """Registers a table of one row per way and one column per task and length."""

    @table(name, source=source)
    def render(content: dict[str, Any]) -> str:
        points = tables.points(content, "task", "tokens", where=lambda at: at["pooling"] == pooling)
        points.sort(key=lambda at: list(TASKS).index(at["task"]))
        columns = [
            [_figure(content, name, pooling=pooling, **at) for name in tables.candidates(content)]
            for at in points
        ]
        head = [f"{TASKS[at['task']]}, {at['tokens']}" for at in points]
        return _by_way(content, ["Read", *head], columns)


_every_length("long_retrieval", "long_retrieval", "")
_every_length("long_retrieval_mean", "long_retrieval_decoder", "mean")
_every_length("long_retrieval_last", "long_retrieval_decoder", "lasttoken")


def _figure(content: dict[str, Any], name: str, **at: object) -> float | None:
    found = tables.find(content, name, **at)
    return None if found is None else float(next(iter(found["values"].values())))


def _by_way(content: dict[str, Any], head: list[str], columns: Sequence[Sequence[float | None]]) -> str:
    """Columns of figures as rows, the best of every column bold."""
    cells = [tables.best_in_bold(column, 2, max) for column in columns]
    return tables.markdown(head, [list(row) for row in zip(tables.candidates(content), *cells, strict=True)])

"""`encode` in half precision on a GPU beside the strongest that sentence-transformers has, and where the time goes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import slimformer
from benchmarks.embeddings.encode import BATCH, in_batches
from benchmarks.embeddings.inputs import embedder, retrieval_task
from benchmarks.frame import tables
from benchmarks.frame.compare import Case, Unsupported, compare, relative_error, release
from benchmarks.frame.encode_account import Rates, Work, account, rest
from benchmarks.frame.flash_attention import flash_attention
from benchmarks.frame.inputs import CRANFIELD, LOSSLESS, QMSUM
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.frame.timing import Effort
from slimformer.model.anatomy import find_anatomy

_SIZES = (32, 128, 512)
_DTYPE = torch.float16
# Every candidate has run over the texts before, when its batch size was chosen and its embeddings were checked.
_EFFORT = Effort(milliseconds=2500.0, least=3, most=7, warm_ups=0)
# As many calls of a batch each as show what one costs.
_ARRIVALS = 16
# Half precision is off by a thousandth; what reads other texts' tokens is off by more than this.
_TOLERANCE = 2e-2
_PLAIN, _UNPADDED, _COMPILED = "sentence-transformers", "its own unpadding", "torch.compile"


@dataclass
class Candidate:
    """A pipeline that is measured, with what is found out about it on the way.

    Attributes:
        pipeline: What encodes; None where it cannot be had.
        why_not: Why that is.
        warm_up: Seconds of the first run over the texts at each batch size, compilation and all.
        size: The best batch size of the texts that are measured.
        cosines: Of its embeddings to those in float32.
    """

    pipeline: Any
    why_not: str = ""
    warm_up: float = 0.0
    size: int = BATCH
    cosines: Tensor = field(default_factory=lambda: torch.zeros(1))

    def encoded(self, calls: Sequence[list[str]]) -> Tensor:
        """Embeddings `[texts, hidden]` of all calls, in float32 on the CPU."""
        found = [self.pipeline.encode(c, batch_size=self.size, show_progress_bar=False) for c in calls]
        return torch.cat([torch.from_numpy(part).float() for part in found])

    def check(self, calls: Sequence[list[str]], expected: Tensor) -> float:
        """The relative error; the cosines are kept."""
        if self.pipeline is None:
            raise Unsupported(self.why_not)
        found = self.encoded(calls)
        self.cosines = F.cosine_similarity(found.double(), expected.double())
        return relative_error(found, expected)

    def figures(self) -> dict[str, float]:
        """What is told of it beside its time."""
        return {
            "batch size": float(self.size),
            "warm-up, s": self.warm_up,
            "mean cosine": float(self.cosines.mean()),
            "lowest cosine": float(self.cosines.min()),
        }


@benchmark(
    "encode_gpu",
    "encode in float16 beside FlashAttention-2, SDPA and torch.compile, each at its best batch size",
    on="GPU",
    model="embedding model",
    data=(CRANFIELD, QMSUM),
    parts=("Cranfield, documents", "QMSum, queries"),
)
def encode_on_gpu(settings: Settings) -> Iterator[Measurement]:
    """Whole corpora in one call, which sorts them by length, and in a server's batches in the order of arrival."""
    queries = (settings.data / QMSUM / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    corpora = {
        "Cranfield, documents": retrieval_task(settings).texts,
        "QMSum, queries": [str(json.loads(line)["text"]) for line in queries],
    }
    corpora = {name: corpora[name] for name in settings.chosen(list(corpora))}
    exact = Candidate(embedder(settings))
    expected = {name: exact.encoded([texts]) for name, texts in corpora.items()}
    model = _described(exact.pipeline)
    del exact
    rates = Rates.of(settings.device, _DTYPE, settings.pick(8192, 64))
    with flash_attention() as flash:
        candidates = _candidates(settings, flash)
        for name, texts in corpora.items():
            at: Parameters = {"model": model, "corpus": name, "dtype": "float16"}
            _choose_sizes(settings, candidates, texts)
            one = {**at, "texts": len(texts), "calls": "one call"}
            yield from _measured(settings, one, candidates, [texts], expected[name], rates)
            some = texts[: BATCH * settings.pick(_ARRIVALS, 1)]
            for candidate in candidates.values():
                candidate.size, candidate.warm_up = BATCH, 0.0
            several = {**at, "texts": len(some), "calls": f"batches of {BATCH} in arrival order"}
            yield from _measured(
                settings, several, candidates, in_batches(some), expected[name][: len(some)], rates
            )
    slimformer.unpatch(candidates[LOSSLESS].pipeline)


def _described(pipeline: Any) -> str:
    """The kind of model with its size and its attention, which tells results of several apart."""
    config = find_anatomy(pipeline).stack.config
    attention = (
        "SDPA" if config._attn_implementation == "sdpa" else f"{config._attn_implementation} attention"
    )
    return f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, {attention}"


def _candidates(settings: Settings, flash: str) -> dict[str, Candidate]:
    """By name, the baseline first, each with a pipeline of its own."""
    return {
        _PLAIN: Candidate(_half(settings)),
        f"{flash} and {_UNPADDED}": _unpadding(_half(settings)),
        _COMPILED: Candidate(_compiled(settings, _half(settings))),
        LOSSLESS: Candidate(slimformer.patch(_half(settings))),
    }


def _half(settings: Settings) -> Any:
    return embedder(settings).to(_DTYPE)


def _unpadding(pipeline: Any) -> Candidate:
    """sentence-transformers with FlashAttention-2, for which it puts texts behind each other by itself."""
    module = pipeline[0]
    if not getattr(module.auto_model, "_supports_flash_attn", False):
        return Candidate(None, f"{type(module.auto_model).__name__} of transformers has no FlashAttention")
    # Asked for when a model is loaded, it would be looked for as a package.
    module.auto_model.config._attn_implementation = "flash_attention_2"
    module.unpad_inputs = None
    if not module.can_flatten_inputs:
        return Candidate(None, "sentence-transformers does not unpad this model")
    return Candidate(pipeline)


def _compiled(settings: Settings, pipeline: Any) -> Any:
    """For all shapes at once: each of its own would be compiled anew for every length."""
    pipeline[0].auto_model.compile(dynamic=True, backend=settings.pick("inductor", "eager"))
    return pipeline


def _choose_sizes(settings: Settings, candidates: Mapping[str, Candidate], texts: list[str]) -> None:
    """The batch size at which one call is fastest, of every candidate; the first run at each is its warm-up."""
    for candidate in candidates.values():
        candidate.warm_up, times = 0.0, dict[int, float]()
        if candidate.pipeline is None:
            continue
        for size in settings.pick(_SIZES, _SIZES[:2]):
            candidate.size = size
            try:
                first = _seconds(candidate, texts)
                times[size] = _seconds(candidate, texts)
            except Exception:
                # What fails at every size is told by its check.
                release()
                continue
            candidate.warm_up += first
        candidate.size = min(times, key=lambda size: times[size], default=BATCH)


def _seconds(candidate: Candidate, texts: list[str]) -> float:
    start = time.perf_counter()
    candidate.encoded([texts])
    return time.perf_counter() - start


def _measured(
    settings: Settings,
    at: Parameters,
    candidates: Mapping[str, Candidate],
    calls: Sequence[list[str]],
    expected: Tensor,
    rates: Rates,
) -> Iterator[Measurement]:
    """Times of all candidates in turns, each with its account; the ideal is that of one read of the weights."""
    texts = [text for call in calls for text in call]
    work = Work.of(candidates[_PLAIN].pipeline, texts)
    runs = {name: partial(candidate.encoded, calls) for name, candidate in candidates.items()}

    def values(medians: Mapping[str, float]) -> dict[str, dict[str, float]]:
        found = {}
        for name, median in medians.items():
            candidate = candidates[name]
            figures = account(candidate.pipeline, runs[name], work, rates, settings.device)
            found[name] = {**candidate.figures(), **figures, **rest(figures, median)}
        return found

    cases = {
        name: Case(runs[name], partial(candidate.check, calls, expected), _TOLERANCE)
        for name, candidate in candidates.items()
    }
    yield from compare(
        settings,
        at,
        cases,
        regime="wall",
        baseline=_PLAIN,
        ideal=lambda name, medians: work.milliseconds(rates, 1),
        values=values,
        effort=_EFFORT,
    )


@table("encode_gpu")
def throughput_on_gpu(content: dict[str, Any]) -> str:
    """One row per model, corpus and kind of call: texts per second of all candidates at their best batch size."""
    head = ["Texts per second", *tables.candidates(content)]
    return tables.markdown(head, [_rates(content, at) for at in _points(content)])


def _rates(content: dict[str, Any], at: Mapping[str, Any]) -> list[str]:
    """Cells of a row; gains are over sentence-transformers as it is."""
    found = [tables.find(content, name, **at) for name in tables.candidates(content)]
    cells = [_rate(measurement) for measurement in found]
    return [_label(at), *cells]


def _rate(measurement: dict[str, Any] | None) -> str:
    if measurement is None:
        return "–"
    rate = tables.number(1000 * measurement["parameters"]["texts"] / measurement["milliseconds"]["p50"])
    size = tables.figure(measurement, "batch size")
    told = [] if measurement["baseline_ratio"] == 1 else [tables.gain(measurement)]
    told += [] if size is None or measurement["parameters"]["calls"] != "one call" else [f"of {size:.0f}"]
    return f"{rate} ({', '.join(told)})" if told else rate


@table("encode_gpu_account", source="encode_gpu")
def account_of_encode(content: dict[str, Any]) -> str:
    """One row per measurement: where its milliseconds go, beside what the hardware needs at best."""

    def milliseconds(name: str) -> tables.Cell:
        return lambda found: "–" if name not in found["values"] else tables.number(found["values"][name])

    columns: dict[str, tables.Cell] = {
        "Milliseconds": lambda found: f"{_label(found['parameters'])}: {found['candidate']}",
        "in all": tables.milliseconds,
        "tokenising": milliseconds("tokenising, ms"),
        "CPU in the model": milliseconds("CPU in the model, ms"),
        "elsewhere": milliseconds("elsewhere, ms"),
        "GPU busy": milliseconds("GPU busy, ms"),
        "multiplying at best": milliseconds("multiplying, ms"),
        "moving at best": milliseconds("moving, ms"),
        "lowest cosine": tables.value("lowest cosine", ".5f"),
    }
    accounts = [found for found in content["measurements"] if "tokenising, ms" in found["values"]]
    return tables.by_measurement({**content, "measurements": accounts}, columns) if accounts else ""


def _points(content: dict[str, Any]) -> list[dict[str, Any]]:
    return tables.points(content, "model", "corpus", "calls", "dtype")


def _label(at: Mapping[str, Any]) -> str:
    return ", ".join(str(at[name]) for name in ("model", "corpus", "calls", "dtype") if at.get(name))

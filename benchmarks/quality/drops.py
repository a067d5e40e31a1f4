"""What removing attentions costs, for every way to choose them and to fill their place."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.inputs import C4, DENSE, STS_TEST, WIKI_TEST, decoder, encoder, wikitext_perplexity
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, reason
from slimformer.evaluation.similarity_task import mean_pooled_embedder, read_sts, spearman_sts

Methods = Mapping[str, dict[str, Any]]
DECODER: Methods = {
    "one-shot cosine": {"selection": "cosine", "replace": "nothing"},
    "cosine, mean": {"selection": "cosine", "replace": "mean"},
    "greedy KL, filter of 4 taps": {"selection": "greedy", "replace": "filter", "taps": 4},
    "greedy KL": {"selection": "greedy", "replace": "nothing"},
    "greedy KL, filter of 1 tap": {"selection": "greedy", "replace": "filter", "taps": 1},
}
ENCODER: Methods = {
    "nothing left behind": {"replace": "nothing"},
    "filter of 1 tap": {"replace": "filter", "taps": 1},
}
_ENCODER_LENGTH = 256


@benchmark(
    "drop_table",
    "WikiText-2 perplexity with 2 to 12 attentions removed by five methods",
    model="decoder",
    data=(C4, WIKI_TEST),
)
def of_a_decoder(settings: Settings) -> Iterator[Measurement]:
    """Calibrate on C4 and read WikiText-2, in float32."""
    model, tokenizer = decoder(settings)
    perplexity = wikitext_perplexity(settings, model, tokenizer)
    counts = settings.pick((2, 4, 6, 8, 12), (2,))
    yield from _removed(settings, model, tokenizer, DECODER, counts, ("perplexity", perplexity))


@benchmark(
    "encoder_drop",
    "STS-B Spearman with 1 to 3 attentions dropped from an embedding model",
    model="embedding model",
    data=(C4, STS_TEST),
)
def of_an_encoder(settings: Settings) -> Iterator[Measurement]:
    """Calibrate on C4 by the embeddings' cosine to dense and read the STS-B test pairs, in float32."""
    model, tokenizer = encoder(settings)
    pairs, scores = read_sts(settings.data / STS_TEST)

    def spearman() -> float:
        return spearman_sts(mean_pooled_embedder(model, tokenizer, max_length=_ENCODER_LENGTH), pairs, scores)

    counts = settings.pick((1, 2, 3), (1,))
    yield from _removed(settings, model, tokenizer, ENCODER, counts, ("spearman", spearman))


def _removed(
    settings: Settings,
    model: Any,
    tokenizer: Any,
    methods: Methods,
    counts: Sequence[int],
    figure: tuple[str, Callable[[], float]],
) -> Iterator[Measurement]:
    name, measure = figure
    yield Measurement({"removed": 0}, DENSE, values={name: measure()})
    for method, options in methods.items():
        # Removals are the same for every count, so each calibration goes on from the one before.
        with tempfile.TemporaryDirectory() as checkpoint:
            for count in counts:
                start = time.monotonic()
                try:
                    plan = slimformer.calibrate(
                        model,
                        tokenizer,
                        data=settings.data / C4,
                        hold_out=False,
                        kinds=("attention",),
                        drop=count,
                        budget=settings.pick("standard", "quick"),
                        checkpoint=checkpoint,
                        **options,
                    )
                    values = {"calibration_seconds": time.monotonic() - start}
                    with slimformer.patched(model, plan):
                        values[name] = measure()
                except Exception as failure:
                    yield Measurement({"removed": count}, method, status="failed", note=reason(failure))
                    continue
                order = " ".join(str(step["layer"]) for step in plan.provenance["steps"])
                yield Measurement({"removed": count}, method, values=values, note=f"in order: {order}")


@table("drop_table")
def perplexities(content: dict[str, Any]) -> str:
    """One row per count, one column per method; the best of a row is bold."""
    return _table(content, "perplexity", DECODER, 2, min)


@table("encoder_drop")
def correlations(content: dict[str, Any]) -> str:
    """The same."""
    return _table(content, "spearman", ENCODER, 1, max)


def _table(
    content: dict[str, Any],
    name: str,
    methods: Methods,
    digits: int,
    best: Callable[[Iterable[float]], float],
) -> str:
    rows = []
    for count in sorted(tables.distinct(content, "removed", where=lambda at: at["removed"] > 0)):
        values = [tables.figure(tables.find(content, method, removed=count), name) for method in methods]
        rows.append([str(count), *tables.best_in_bold(values, digits, best)])
    dense = tables.shown(tables.figure(tables.find(content, DENSE, removed=0), name), f".{digits}f")
    return tables.markdown([f"Attentions removed (dense {dense})", *methods], rows)

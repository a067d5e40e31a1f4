"""STS-B against the number of attentions dropped from a BERT-like embedding model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import slimformer
from benchmarks.drop_table import DENSE, tiny_tokenizer
from benchmarks.frame import tables
from benchmarks.frame.registry import MissingInput, Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer.evaluation.similarity_task import mean_pooled_embedder, read_sts, spearman_sts

METHODS: dict[str, dict[str, Any]] = {
    "nothing left behind": {"replace": "nothing"},
    "filter of 1 tap": {"replace": "filter", "taps": 1},
}
COUNTS = (1, 2, 3)
_LENGTH = 256


@benchmark(
    "encoder_drop",
    needs="any",
    description="STS-B Spearman with 1 to 3 attentions dropped from an embedding model (--model, --data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Calibrate on C4 by the embeddings' cosine to dense and read the STS-B test pairs, in float32."""
    model, tokenizer = _load(settings)
    texts, pairs, scores = _texts(settings)

    def spearman() -> float:
        return spearman_sts(mean_pooled_embedder(model, tokenizer, max_length=_LENGTH), pairs, scores)

    yield Measurement({"removed": 0}, DENSE, values={"spearman": spearman()})
    for name, options in METHODS.items():
        for count in settings.pick(COUNTS, (1,)):
            plan = slimformer.calibrate(
                model,
                tokenizer,
                data=texts,
                hold_out=False,
                drop=count,
                budget=settings.pick("standard", "quick"),
                **options,
            )
            order = " ".join(str(step["layer"]) for step in plan.provenance["steps"])
            with slimformer.patched(model, plan):
                yield Measurement(
                    {"removed": count}, name, values={"spearman": spearman()}, note=f"in order: {order}"
                )


def _load(settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if settings.model is None:
        if not settings.smoke:
            raise MissingInput("it needs --model, the folder of an embedding model")
        config = BertConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
        )
        return BertModel(config).eval(), tiny_tokenizer()
    model = AutoModel.from_pretrained(settings.model, dtype=torch.float32)
    return model.to(settings.device).eval(), AutoTokenizer.from_pretrained(settings.model)


def _texts(settings: Settings) -> tuple[Path | list[str], list[tuple[str, str]], list[float]]:
    """Calibration text, and pairs of sentences with their scores."""
    if settings.data is None:
        if not settings.smoke:
            raise MissingInput("it needs --data, a folder with c4_calib/c4_demo.jsonl and stsb/test.tsv")
        texts = [f"a text of {number} words" for number in range(40)]
        pairs = [(texts[i], texts[-i]) for i in range(1, 8)]
        return texts, pairs, [float(i) for i in range(1, 8)]
    pairs, scores = read_sts(settings.data / "stsb" / "test.tsv")
    return settings.data / "c4_calib" / "c4_demo.jsonl", list(pairs), list(scores)


@table("encoder_drop", source="encoder_drop")
def correlations(content: dict[str, Any]) -> str:
    """One row per count, one column per method; the best of a row is bold."""
    dense = tables.find(content, DENSE, removed=0)
    rows = []
    for (count,) in sorted(tables.points(content, "removed", where=lambda p: p["removed"] > 0)):
        found = [tables.find(content, name, removed=count) for name in METHODS]
        values = [None if one is None else one["values"]["spearman"] for one in found]
        rows.append([str(count), *tables.best_in_bold(values, 1, max)])
    label = "–" if dense is None else f"{dense['values']['spearman']:.1f}"
    return tables.markdown([f"Attentions removed (dense {label})", *METHODS], rows)

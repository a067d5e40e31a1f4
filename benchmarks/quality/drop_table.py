"""Perplexity against the number of attentions removed, for every way to choose them and to fill their place."""

from __future__ import annotations

import string
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.registry import MissingInput, Settings, benchmark, table
from benchmarks.frame.results import Measurement, reason
from slimformer.evaluation.perplexity import perplexity, wikitext_blocks
from slimformer.text.sources import load_texts

DENSE = "dense"
METHODS: dict[str, dict[str, Any]] = {
    "one-shot cosine": {"selection": "cosine", "replace": "nothing"},
    "cosine, mean": {"selection": "cosine", "replace": "mean"},
    "greedy KL, filter of 4 taps": {"selection": "greedy", "replace": "filter", "taps": 4},
    "greedy KL": {"selection": "greedy", "replace": "nothing"},
    "greedy KL, filter of 1 tap": {"selection": "greedy", "replace": "filter", "taps": 1},
}
COUNTS = (2, 4, 6, 8, 12)
_BLOCKS, _TOKENS = 64, 1024


@benchmark(
    "drop_table",
    needs="any",
    description="WikiText-2 perplexity with 2 to 12 attentions removed by five methods (--model, --data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Calibrate on C4 and read WikiText-2, in float32."""
    model, tokenizer = load_model(settings)
    calibration, evaluation = _texts(settings)
    blocks = wikitext_blocks(
        evaluation, tokenizer, settings.pick(_TOKENS, 128), count=settings.pick(_BLOCKS, 2)
    )
    batch = 8 if settings.device.type == "cuda" else 1
    yield Measurement(
        {"removed": 0}, DENSE, values={"perplexity": perplexity(model, blocks, batch_size=batch)}
    )
    for name, options in METHODS.items():
        # Removals are the same for every count, so each calibration goes on from the one before.
        with tempfile.TemporaryDirectory() as checkpoint:
            for count in settings.pick(COUNTS, (2,)):
                start = time.monotonic()
                try:
                    plan = slimformer.calibrate(
                        model,
                        tokenizer,
                        data=calibration,
                        hold_out=False,
                        kinds=("attention",),
                        drop=count,
                        budget=settings.pick("standard", "quick"),
                        checkpoint=checkpoint,
                        **options,
                    )
                    seconds = time.monotonic() - start
                    with slimformer.patched(model, plan):
                        value = perplexity(model, blocks, batch_size=batch)
                except Exception as failure:
                    yield Measurement({"removed": count}, name, status="failed", note=reason(failure))
                    continue
                values = {"perplexity": value, "calibration_seconds": seconds}
                order = " ".join(str(step["layer"]) for step in plan.provenance["steps"])
                yield Measurement({"removed": count}, name, values=values, note=f"in order: {order}")


def load_model(
    settings: Settings, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer: a checkpoint folder, or a GGUF file."""
    path = settings.model
    if path is None:
        if not settings.smoke:
            raise MissingInput("it needs --model, the folder of a causal language model")
        return _tiny_model(), tiny_tokenizer()
    folder, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model.to(settings.device).eval(), tokenizer


def _texts(settings: Settings) -> tuple[Path | None, Path | str]:
    """Where to calibrate and what to read; in a smoke run without data, the text that comes with Python."""
    if settings.data is None:
        if not settings.smoke:
            raise MissingInput(
                "it needs --data, a folder with c4_calib/c4_demo.jsonl and wikitext2/wiki.test.raw"
            )
        return None, "\n\n".join(load_texts(None, limit=20)[0])
    return settings.data / "c4_calib" / "c4_demo.jsonl", settings.data / "wikitext2" / "wiki.test.raw"


def _tiny_model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token per printable character."""
    words = ["<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", model_max_length=512
    )


@table("drop_table", source="drop_table")
def perplexities(content: dict[str, Any]) -> str:
    """One row per count, one column per method; the best of a row is bold."""
    dense = tables.find(content, DENSE, removed=0)
    rows = []
    for (count,) in sorted(tables.points(content, "removed", where=lambda p: p["removed"] > 0)):
        found = [tables.find(content, name, removed=count) for name in METHODS]
        values = [None if one is None else one["values"]["perplexity"] for one in found]
        rows.append([str(count), *tables.best_in_bold(values, 2, min)])
    label = "–" if dense is None else f"{dense['values']['perplexity']:.2f}"
    return tables.markdown([f"Attentions removed (dense {label})", *METHODS], rows)

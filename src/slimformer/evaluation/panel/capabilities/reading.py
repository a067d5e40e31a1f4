"""Rows of tokens as a model reads them when it generates: a prompt at once, then what follows behind its cache.

Plans that decide by prompt or decode step, such as token elimination, are judged as they will run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimformer.calls.layer_calls import cache_argument
from slimformer.errors import CalibrationError
from slimformer.evaluation.perplexity import evaluating

# Never as many tokens behind a prompt at once as a text has from which tokens leave.
_CHUNK = 128
_TOKENS_AT_ONCE = {"cuda": 16_384, "cpu": 2048}
_LOGITS_AT_ONCE = {"cuda": 2**28, "cpu": 2**25}


class Row(NamedTuple):
    """A prompt and what is looked at behind it.

    Attributes:
        context: Token ids of the prompt, at least one.
        scored: Token ids behind it, at least one.
        group: The kind of row, for tables.
    """

    context: list[int]
    scored: list[int]
    group: str = ""


class Piece(NamedTuple):
    """Logits of a part of one row.

    Attributes:
        row: Index of the row.
        start: Which of its scored tokens the first logits predict.
        logits: `[tokens, vocabulary]`, on the model's device.
    """

    row: int
    start: int
    logits: Tensor


def read(model: PreTrainedModel, rows: Sequence[Row], tokens_at_once: int | None = None) -> Iterator[Piece]:
    """What a model predicts for the scored tokens of every row, in pieces that fit a large vocabulary.

    Args:
        model: A decoder with a language-model head, patched or not.
        rows: What is read; they come in any order.
        tokens_at_once: Most tokens per forward, padding included (one row is always read); left out, what suits the
            device.

    Raises:
        CalibrationError: If logits hold NaN or infinity, or the model gives no logits or no cache.
    """
    device = model.device.type
    most = tokens_at_once or _TOKENS_AT_ONCE.get(device, 2048)
    size = getattr(model.config.get_text_config(), "vocab_size", 2**16)
    most_rows = max(_LOGITS_AT_ONCE.get(device, 2**25) // (_CHUNK * size), 1)
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].context), -len(rows[index].scored)))
    accepted = inspect.signature(model.forward).parameters
    while order:
        longest = len(rows[order[0]].context)
        count = max(min(most // max(longest, _CHUNK), most_rows), 1)
        batch = order[:count]
        if not _takes_places(model, accepted):
            batch = [index for index in batch if len(rows[index].context) == longest]
        order = order[len(batch) :]
        # Only around a batch: a generator that is not read to its end must not leave the model changed.
        yield from _batch(model, accepted, rows, batch)


def _batch(
    model: PreTrainedModel, accepted: Any, rows: Sequence[Row], batch: Sequence[int]
) -> Iterator[Piece]:
    contexts = [rows[index].context for index in batch]
    scored = [rows[index].scored for index in batch]
    longest, end = max(map(len, contexts)), max(map(len, scored))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in contexts], device=model.device)
    behind = torch.tensor([row + [0] * (end - len(row)) for row in scored], device=model.device)
    padding = torch.tensor([longest - len(row) for row in contexts], device=model.device)
    last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    padded = bool(padding.any())
    output = _run(model, ids, _placed(ids, padding, 0) if padded else {}, last)
    logits = output.logits[:, -1:]
    name = cache_argument(model)
    cache = getattr(output, name, None)
    if cache is None and end > 1:
        raise CalibrationError(
            f"{type(model).__name__} returns no {name}, so nothing can be read behind a prompt as generation does. "
            "Use a decoder that caches."
        )
    for start in range(0, end, _CHUNK):
        # Every token is predicted from the one before it, the first of all from the prompt's last.
        chunk = behind[:, max(start - 1, 0) : min(start + _CHUNK, end) - 1]
        parts = [logits] if start == 0 else []
        if chunk.shape[1]:
            seen = longest + max(start - 1, 0)
            places = _placed(chunk, padding, seen) if padded else {}
            output = _run(model, chunk, places, {name: cache})
            cache = getattr(output, name, cache)
            parts.append(output.logits)
        found = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        for place, index in enumerate(batch):
            here = found[place, : max(len(scored[place]) - start, 0)]
            if len(here):
                # The maximum of anything with NaN is NaN, and NaN is not smaller than infinity.
                if not here.amax() < float("inf"):
                    raise CalibrationError(
                        "The logits hold NaN or infinity. Check the model's weights and dtype: float16 overflows where "
                        "bfloat16 or float32 do not."
                    )
                yield Piece(index, start, here)


def _run(model: PreTrainedModel, ids: Tensor, places: dict[str, Tensor], more: dict[str, Any]) -> Any:
    with evaluating(model):
        output = model(input_ids=ids, use_cache=True, **places, **more)
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 3:
        raise CalibrationError(
            f"{type(model).__name__} gives no logits [batch, tokens, vocabulary]: it has no language-model head. "
            "Load it with AutoModelForCausalLM."
        )
    return output


def _placed(ids: Tensor, padding: Tensor, seen: int) -> dict[str, Tensor]:
    """Mask and positions of a call behind `seen` tokens, the first of which are padding."""
    places = torch.arange(seen + ids.shape[1], device=ids.device)[None] - padding[:, None]
    return {"attention_mask": (places >= 0).long(), "position_ids": places[:, seen:].clamp_min(0)}


def _takes_places(model: PreTrainedModel, accepted: Any) -> bool:
    """Whether rows of different lengths can be told their positions: not where a position is several numbers."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "position_ids" in accepted and "mrope_section" not in rope

"""How fast one batch of prompts of different lengths is read, with the plain patch and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.perplexity import evaluating
from slimformer.patching import patched, status
from slimformer.text.sources import token_blocks


@dataclass(frozen=True)
class PaddedPrompts:
    """What was measured.

    Attributes:
        prompts: How many make a batch; their lengths are spread evenly.
        longest: Tokens of the longest, to which all are padded in front.
        dense_seconds: Median time to the first tokens without the patch.
        patched_seconds: The same with it.
        difference: Relative norm of the difference between the logits of the first tokens.
    """

    prompts: int
    longest: int
    dense_seconds: float
    patched_seconds: float
    difference: float

    @property
    def speedup(self) -> float:
        """How many times as fast the patched model is."""
        return self.dense_seconds / self.patched_seconds


def measure_padded_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str],
    longest: int = 512,
    count: int = 8,
    repeats: int = 1,
    seed: int = 0,
) -> PaddedPrompts:
    """Read the same batch unpatched and under the lossless patch, in turns.

    Args:
        model: An unpatched decoder; it is left as it was.
        tokenizer: Its tokenizer.
        texts: What the prompts are cut from.
        longest: Tokens of the longest prompt.
        count: Prompts.
        repeats: Times per median, after one round that does not count.
        seed: Which of the text is read.

    Raises:
        CalibrationError: If the model is patched already.
        DataError: If a size is below 1, or there is too little text.
    """
    if min(longest, count, repeats) < 1:
        raise DataError(
            f"longest, count and repeats must be at least 1, got {longest}, {count} and {repeats}."
        )
    if status(model):
        raise CalibrationError("The model is patched, and both are measured here. Call unpatch first.")
    ids = token_blocks(texts, tokenizer, sequence_length=longest, count=count, seed=seed).to(model.device)
    if len(ids) < count:
        raise DataError(
            f"The text gives {len(ids)} prompts of {longest} tokens, and {count} are read. Give more text."
        )
    lengths = torch.tensor([max(1, round(longest * (row + 1) / count)) for row in range(count)])
    places = torch.arange(longest) - (longest - lengths[:, None])
    mask = (places >= 0).to(model.device)
    given = {
        # What stands in the place of padding is masked, whatever it is.
        "input_ids": ids * mask,
        "attention_mask": mask.long(),
        "position_ids": places.clamp_min(0).to(model.device),
    }
    dense, slim = [], []
    expected = actual = torch.zeros(0)
    with evaluating(model):
        for _ in range(repeats + 1):
            seconds, expected = _read(model, given)
            dense.append(seconds)
            with patched(model):
                seconds, actual = _read(model, given)
            slim.append(seconds)
    return PaddedPrompts(
        count,
        longest,
        statistics.median(dense[1:]),
        statistics.median(slim[1:]),
        float((actual - expected).norm() / expected.norm()),
    )


def _read(model: PreTrainedModel, given: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Seconds, and the logits of the first new tokens, float32 `[prompts, vocabulary]`."""
    start = time.perf_counter()
    logits = model(**given, use_cache=True, logits_to_keep=1).logits[:, -1].float().cpu()
    return time.perf_counter() - start, logits

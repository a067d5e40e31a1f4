"""What a patched embedding pipeline does faster around its model: token ids to tensors, and batches that fill a GPU."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerFast

from slimformer.changes.ledger import Ledger, has_own
from slimformer.model.anatomy import find_anatomy

# As many numbers in the residual as keep a GPU busy for longer than the CPU needs to launch a small model's layers;
# in bfloat16 the residual is then 32 MB. Models with wider residuals keep the batches they are given.
BUSY_FROM_ELEMENTS = 2**24


def faster_pipeline(pipeline: Any, model: PreTrainedModel, ledger: Ledger) -> None:
    """Let a pipeline of transformers or sentence-transformers feed its model faster, with the same results.

    Args:
        pipeline: What was given to `patch`.
        model: The transformers model inside it.
        ledger: Undoes what is done here.
    """
    tokenizer = getattr(pipeline, "tokenizer", None)
    if isinstance(tokenizer, PreTrainedTokenizerFast) and not has_own(tokenizer, "_encode_plus"):
        ledger.stand_in(tokenizer, "_encode_plus", TokensToTensors(tokenizer))
    encodes = isinstance(pipeline, torch.nn.Sequential) and callable(getattr(type(pipeline), "encode", None))
    if encodes and not has_own(pipeline, "encode"):
        hidden = find_anatomy(model).stack.config.hidden_size
        ledger.stand_in(pipeline, "encode", FillingBatches(pipeline, model, hidden))


@dataclass
class TokensToTensors:
    """Stands in for a tokenizer's `_encode_plus`: the tensors that it returns are made from arrays.

    transformers walks through every token id in Python first: 5 of the 17 milliseconds that 32 texts of 240 tokens
    take on a CPU core, and the larger part where the tokenizer has sixteen.

    Attributes:
        tokenizer: Whose method it was.
    """

    tokenizer: Any

    def __call__(self, text: Any, *args: Any, return_tensors: Any = None, **options: Any) -> BatchEncoding:
        """What the tokenizer itself returns, for the same arguments."""
        encode = functools.partial(type(self.tokenizer)._encode_plus, self.tokenizer, text, *args, **options)
        if (
            return_tensors != "pt"
            or not isinstance(text, (list, tuple))
            or options.get("is_split_into_words")
        ):
            found: BatchEncoding = encode(return_tensors=return_tensors)
            return found
        found = encode(return_tensors=None)
        for name, value in found.items():
            try:
                found[name] = torch.from_numpy(np.array(value, dtype=np.int64))
            except (TypeError, ValueError):
                # Texts of several lengths, and whatever else is no table: the tokenizer's own error says so.
                return found.convert_to_tensors("pt")
        return found


@dataclass
class FillingBatches:
    """Stands in for a pipeline's `encode`: on a GPU, batches are at least as large as keeps it busy.

    A text's embedding does not depend on the batch it is in, so `batch_size` only says how much memory is used.

    Attributes:
        pipeline: Whose method it was.
        model: The transformers model inside it.
        hidden: Size of its residual.
    """

    pipeline: Any
    model: PreTrainedModel
    hidden: int

    @property
    def __wrapped__(self) -> Any:
        """The pipeline's own `encode`, whose signature tells others what they may pass."""
        return functools.partial(type(self.pipeline).encode, self.pipeline)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The pipeline's own `encode`, with the same arguments."""
        own = self.__wrapped__
        if self._device_type(options.get("device")) != "cuda":
            return own(*args, **options)
        parameters = inspect.signature(own).parameters
        given = {**dict(zip(parameters, args, strict=False)), **options}
        # "sentences" was the name before version 6, and is still taken.
        texts = given.get("inputs", given.get("sentences"))
        asked = given.get("batch_size", parameters["batch_size"].default)
        if (
            isinstance(asked, int)
            and asked > 0
            and isinstance(texts, Sequence)
            and not isinstance(texts, str)
        ):
            given["batch_size"] = max(asked, self.filling(texts, given.get("prompt")))
        return own(**given)

    def filling(self, texts: Sequence[Any], prompt: str | None = None) -> int:
        """How many of the texts fill the GPU, if all of them are as long as the longest.

        Args:
            texts: Texts; pairs and records of texts count with all that they hold.
            prompt: What is put in front of each; else it may be any of the pipeline's own prompts.

        Returns:
            0 where that is not known: one of them is no text, or there is none.
        """
        lengths = [_characters(text) for text in texts]
        known = [length for length in lengths if length is not None]
        if not known or len(known) < len(lengths):
            return 0
        own = (getattr(self.pipeline, "prompts", None) or {}).values()
        in_front = max((len(text) for text in (*own, prompt) if isinstance(text, str)), default=0)
        # With special tokens, a text has hardly more tokens than characters.
        longest = 2 + in_front + max(known)
        limit = getattr(self.pipeline, "max_seq_length", None) or longest
        return BUSY_FROM_ELEMENTS // (self.hidden * min(longest, limit))

    def _device_type(self, device: Any) -> str:
        """Where this call computes; several devices have processes of their own, which come here again."""
        if isinstance(device, (list, tuple)):
            return "several"
        return self.model.device.type if device is None else torch.device(device).type


def _characters(text: Any) -> int | None:
    """How many characters are read of a text, of a pair or a record of texts; None where something else is in it."""
    if isinstance(text, str):
        return len(text)
    if not isinstance(text, (list, tuple, Mapping)):
        return None
    parts = [_characters(part) for part in (text.values() if isinstance(text, Mapping) else text)]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None

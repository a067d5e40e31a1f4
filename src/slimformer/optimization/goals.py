"""What a model is to be good at, what is asked for, and what one run of it costs."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from transformers import DynamicCache

from slimformer.calls.layer_calls import cache_argument
from slimformer.errors import CalibrationError
from slimformer.evaluation.timing.speed import cache_bytes

Goal = Literal["prefill", "generate", "encode", "memory"]
GOALS: tuple[str, ...] = get_args(Goal)
# A capability may lose so many times what the mean may.
WORST = 2.0
_PROMPTS = {"cuda": {"generate": 512}, "cpu": {"generate": 128, "prefill": 1024, "memory": 1024}}
_WRITTEN = {"cuda": 64, "cpu": 32}
_LONG, _BATCH = 8192, 32


@dataclass(frozen=True)
class Wish:
    """What is asked for: the fastest within a loss, or the least loss at a speed.

    Attributes:
        max_loss: The part of the dense model's capabilities that may be lost, on average; of each `WORST` times as
            much.
        speedup: How many times as fast as dense (for memory, how many times as small) it is to be.

    Raises:
        CalibrationError: If both or neither is given, or one is out of range.
    """

    max_loss: float | None
    speedup: float | None

    def __post_init__(self) -> None:
        if (self.max_loss is None) == (self.speedup is None):
            both = "neither" if self.max_loss is None else "both"
            raise CalibrationError(f"Give either max_loss or speedup, got {both}.")
        if self.max_loss is not None and (
            isinstance(self.max_loss, (bool, str)) or not 0 <= self.max_loss < 1
        ):
            raise CalibrationError(
                f"max_loss must be a fraction from 0 to below 1, such as 0.02 for 2%, got {self.max_loss!r}."
            )
        if self.speedup is not None and (
            isinstance(self.speedup, (bool, str)) or not 1 < self.speedup < math.inf
        ):
            raise CalibrationError(
                f"speedup must be above 1, such as 1.5 for half as fast again as dense, got {self.speedup!r}."
            )


@dataclass(frozen=True)
class Conditions:
    """What is run.

    Attributes:
        goal: What is to cost less.
        prompt: Tokens of a prompt; for encoders those of the longest text.
        new_tokens: Tokens that are written behind it; 0 where none are.
        batch: Prompts or texts at once.
    """

    goal: Goal
    prompt: int
    new_tokens: int
    batch: int

    @classmethod
    def of(
        cls,
        goal: Goal,
        device: str,
        longest: int,
        prompt: int | None,
        new_tokens: int | None,
        batch: int | None,
    ) -> Conditions:
        """Those given, and what is usual on a kind of device for those that are not.

        Raises:
            CalibrationError: If one is below 1, or longer than the model reads.
        """
        for name, value in (("prompt", prompt), ("new_tokens", new_tokens), ("batch", batch)):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise CalibrationError(f"{name} must be at least 1, got {value!r}.")
        written = (new_tokens or _WRITTEN.get(device, _WRITTEN["cpu"])) if goal == "generate" else 0
        usual = _PROMPTS.get(device, _PROMPTS["cpu"]).get(goal, _LONG)
        tokens = min(usual, longest - written) if prompt is None else prompt
        if not 1 <= tokens + written <= longest:
            raise CalibrationError(
                f"A prompt of {tokens} tokens and {written} behind it are more than the {longest} that the model "
                "reads. Ask for fewer."
            )
        return cls(goal, tokens, written, batch or (_BATCH if goal == "encode" else 1))


class Workload(Protocol):
    """One run of the model as it is, patched or not."""

    def run(self, model: Any) -> None:
        """Once."""
        ...


@dataclass(frozen=True)
class Prompts:
    """Prompts read by a decoder, with tokens written behind them or none.

    Attributes:
        ids: `[batch, tokens]`.
        new_tokens: How many are written.
    """

    ids: Tensor
    new_tokens: int

    @torch.no_grad()
    def run(self, model: Any) -> None:
        """Read the prompts, or generate behind them."""
        ids = self.ids.to(model.device)
        if self.new_tokens:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        else:
            self.read(model)

    @torch.no_grad()
    def read(self, model: Any) -> DynamicCache:
        """The cache of the prompts."""
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        given: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
        # As generate does: the head reads the last token only.
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            given["logits_to_keep"] = 1
        model(input_ids=self.ids.to(model.device), **given)
        return cache


@dataclass(frozen=True)
class Texts:
    """Texts embedded in the order in which they arrive.

    Attributes:
        texts: Some of the user's.
        batch: Texts at once.
        batches: The same as a transformers model reads them; a SentenceTransformer cuts them itself.
    """

    texts: Sequence[str]
    batch: int
    batches: Sequence[dict[str, Tensor]] = ()

    @torch.no_grad()
    def run(self, model: Any) -> None:
        """Embed all of them, one batch after the other."""
        if not hasattr(model, "encode"):
            for batch in self.batches:
                model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
            return
        for start in range(0, len(self.texts), self.batch):
            model.encode(
                list(self.texts[start : start + self.batch]), batch_size=self.batch, show_progress_bar=False
            )


def seconds(model: Any, workload: Workload, device: torch.device) -> float:
    """How long one run takes."""
    _wait(device)
    begun = time.perf_counter()
    workload.run(model)
    _wait(device)
    return time.perf_counter() - begun


def read_bytes(model: Any, prompts: Prompts) -> tuple[int, list[int]]:
    """Bytes of the cache behind the prompts: in all, and slot by slot."""
    cache = prompts.read(model)
    slots = [
        sum(
            t.nbytes
            for t in (getattr(slot, "keys", None), getattr(slot, "values", None))
            if isinstance(t, Tensor)
        )
        for slot in cache.layers
    ]
    return cache_bytes(cache), slots


def weight_bytes(model: Any) -> int:
    """Bytes of all weights, each counted once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _wait(device: torch.device) -> None:
    # Work on an accelerator is only queued when the call returns.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

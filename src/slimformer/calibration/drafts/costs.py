"""What steps cost on this machine: of the whole model, without some of its sublayers, and of several tokens at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from slimformer.calls.layer_calls import cache_argument
from slimformer.decisions.policy import TokenPolicy
from slimformer.methods.layer_drop import LayerDrop
from slimformer.model.anatomy import Anatomy
from slimformer.patching import patched

# Tokens in front of the steps that are timed, tokens that are checked at once, and how often.
_PROMPT, _CHECKED, _ROUNDS = 128, 5, 9


@dataclass(frozen=True)
class Costs:
    """Times as parts of a step of the whole model.

    Attributes:
        step: Seconds of a step of the whole model.
        attention: What a step without one attention saves.
        mlp: What one without an MLP does.
        checking: What every further token costs that a step reads.
    """

    step: float
    attention: float
    mlp: float
    checking: float

    def of(self, attentions: int, mlps: int) -> float:
        """A step without so many sublayers."""
        return max(1.0 - attentions * self.attention - mlps * self.mlp, 0.0)

    def to_dict(self) -> dict[str, float]:
        """As a plan's provenance holds it."""
        return asdict(self)


@torch.no_grad()
def measure_costs(model: Any, anatomy: Anatomy) -> Costs:
    """Time steps of a model, in turns, so that whatever slows the machine down meets all of them.

    Args:
        model: An unpatched decoder.
        anatomy: Its layers.
    """
    gone = range(1, len(anatomy.layers))
    kinds: dict[str, tuple[TokenPolicy, ...]] = {
        "step": (), "attention": (LayerDrop(attention=gone),), "mlp": (LayerDrop(mlp=gone),)
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, _PROMPT + _CHECKED), generator=generator).to(model.device)
    found: dict[str, list[float]] = {name: [] for name in (*kinds, "checking")}
    for number in range(_ROUNDS + 1):
        for name, methods in kinds.items():
            with patched(model, *methods) if methods else contextlib.nullcontext():
                seconds = _timed(model, ids, (1, _CHECKED) if name == "step" else (1,))
            found[name].append(seconds[0])
            if name == "step":
                found["checking"].append((seconds[1] - seconds[0]) / (_CHECKED - 1))
        if number == 0:
            # Warmed up.
            found = {name: [] for name in found}
    step = median(found["step"])
    saved = {
        name: median([max(a - b, 0.0) for a, b in zip(found["step"], found[name], strict=True)]) / len(gone)
        for name in ("attention", "mlp")
    }
    return Costs(
        step, saved["attention"] / step, saved["mlp"] / step, max(median(found["checking"]) / step, 0.0)
    )


def _timed(model: Any, ids: torch.Tensor, lengths: Sequence[int]) -> list[float]:
    name, cache = cache_argument(model), DynamicCache(config=model.config.get_text_config(decoder=True))
    given = {name: cache, "use_cache": True}
    model(ids[:, :_PROMPT], **given)
    times = []
    for length in lengths:
        wait = _waiting(model)
        begun = time.perf_counter()
        model(ids[:, _PROMPT : _PROMPT + length], **given)
        wait()
        times.append(time.perf_counter() - begun)
        cache.crop(-length)
    return times


def _waiting(model: Any) -> Callable[[], object]:
    if model.device.type != "cuda":
        return lambda: None
    torch.cuda.synchronize(model.device)
    return lambda: torch.cuda.synchronize(model.device)

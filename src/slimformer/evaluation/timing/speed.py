"""How fast a patched model is beside the dense one, both measured in turns within one run."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from slimformer.calls.layer_calls import cache_argument
from slimformer.decisions.policy import TokenPolicy
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.perplexity import evaluating
from slimformer.model.anatomy import find_anatomy
from slimformer.patching import patched, status


@dataclass(frozen=True)
class Speed:
    """Times and memory of one model. Decode and cache are None for an encoder, which has neither.

    Attributes:
        prefill_seconds: Median time of reading the prompt.
        prefill_p20: The 20th percentile of these times.
        prefill_p80: The 80th percentile.
        decode_seconds_per_token: Median time of one step of one token per sequence, on the cache the prompt filled.
        decode_p20: The 20th percentile of these times, each averaged over one repeat.
        decode_p80: The 80th percentile.
        cache_bytes: Keys, values and filter states after the last step.
        peak_bytes: Most memory allocated on the GPUs, weights included; None on other devices, which do not count it.
    """

    prefill_seconds: float
    prefill_p20: float
    prefill_p80: float
    decode_seconds_per_token: float | None
    decode_p20: float | None
    decode_p80: float | None
    cache_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True)
class SpeedComparison:
    """The dense and the patched model, measured under the same conditions.

    Attributes:
        dense: The unpatched model.
        slim: The patched model.
        device: The GPU's name, or the kind of device with its number of threads.
        prompt_tokens: Tokens per sequence in the prefill.
        new_tokens: Steps of the decode; 0 for an encoder.
        batch_size: Sequences.
        repeats: Times per median.
    """

    dense: Speed
    slim: Speed
    device: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int

    @property
    def prefill_speedup(self) -> float:
        """How many times faster the patched model reads the prompt."""
        return self.dense.prefill_seconds / self.slim.prefill_seconds

    @property
    def decode_speedup(self) -> float | None:
        """How many times faster the patched model makes a token; None for an encoder."""
        dense, slim = self.dense.decode_seconds_per_token, self.slim.decode_seconds_per_token
        return None if dense is None or slim is None else dense / slim

    def to_dict(self) -> dict[str, Any]:
        """Everything, with both ratios, as JSON can hold it."""
        ratios = {"prefill_speedup": self.prefill_speedup, "decode_speedup": self.decode_speedup}
        return {**dataclasses.asdict(self), **ratios}


@dataclass(frozen=True)
class _Run:
    prefill: float
    decode: float | None
    cache_bytes: int | None
    peak_bytes: int | None


def measure_speed(
    model: PreTrainedModel,
    *methods: TokenPolicy,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> SpeedComparison:
    """Measure prefill and decode of the dense and the patched model, one after the other in every repeat.

    Taking turns lets whatever slows the machine down meet both. The tokens are random, which changes no time unless
    a method decides by what the tokens say. An encoder has no decode: only its forward over the prompt is measured.

    Args:
        model: An unpatched decoder or encoder, on the device to measure; it is left as it was.
        methods: What to patch it with.
        prompt_tokens: Tokens per sequence in the prefill.
        new_tokens: Steps of one token on the filled cache.
        batch_size: Sequences.
        repeats: Times per median, after one run of each model that does not count.
        seed: Of the random tokens.
        progress: Show a progress bar.

    Raises:
        DataError: If a size is below 1, or there are more tokens than the model has position embeddings.
        CalibrationError: If the model is patched already.
        PlanError: If no method is given, or one does not fit the model.
        UnsupportedModelError: If the model's structure is not known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import slimformer
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> drop = slimformer.LayerDrop(attention=[1, 2])
        >>> speed = measure_speed(LlamaForCausalLM(config), drop, prompt_tokens=8, new_tokens=2, repeats=1)
        >>> speed.dense.cache_bytes, speed.slim.cache_bytes
        (5120, 2560)
    """
    sizes = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
    }
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"{name} must be at least 1, got {size}.")
    if status(model):
        raise CalibrationError(
            "The model is patched; speed is measured beside the dense model. Call unpatch first and give the "
            "methods to measure_speed."
        )
    steps = new_tokens if find_anatomy(model).causal else 0
    _check_length(model, prompt_tokens + steps)
    vocabulary = model.get_input_embeddings().num_embeddings
    shape = (batch_size, prompt_tokens + steps)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    dense: list[_Run] = []
    slim: list[_Run] = []
    with evaluating(model):
        for _ in track(range(repeats + 1), description="speed", disable=not progress):
            dense.append(_run(model, ids, prompt_tokens))
            with patched(model, *methods):
                slim.append(_run(model, ids, prompt_tokens))
    device = _device_name(model.device)
    # The first of each warmed up memory, kernels and clocks.
    return SpeedComparison(
        _summary(dense[1:]), _summary(slim[1:]), device, prompt_tokens, steps, batch_size, repeats
    )


def cache_bytes(cache: Cache) -> int:
    """Bytes of everything a cache holds for the model: keys, values, and the states of filters.

    Example:
        >>> cache = DynamicCache()
        >>> _ = cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer_idx=0)
        >>> cache_bytes(cache)
        192
    """
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "state")]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))


def _run(model: PreTrainedModel, ids: Tensor, prompt_tokens: int) -> _Run:
    """One prefill and, where `ids` `[batch, tokens]` go on behind the prompt, one decode step per further token."""
    gpus = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    steps = ids.shape[1] - prompt_tokens
    prompt = ids[:, :prompt_tokens]
    cache = None
    arguments: dict[str, Any] = {}
    if steps:
        cache = DynamicCache(config=model.config)
        arguments = {cache_argument(model): cache, "use_cache": True}
        # As generate does: the head reads the last token only.
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            arguments["logits_to_keep"] = 1
    prefill = _seconds(model, [prompt], arguments)
    decode = None
    if steps:
        decode = _seconds(model, ids[:, prompt_tokens:].split(1, dim=1), arguments) / steps
    peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) if gpus else None
    return _Run(prefill, decode, None if cache is None else cache_bytes(cache), peak)


def _seconds(model: PreTrainedModel, inputs: Sequence[Tensor], arguments: dict[str, Any]) -> float:
    """How long it takes to read token ids `[batch, tokens]`, one input after the other."""
    _wait(model.device)
    start = time.perf_counter()
    for ids in inputs:
        model(input_ids=ids, **arguments)
    _wait(model.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    # Work on an accelerator is only queued when the call returns.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(runs: list[_Run]) -> Speed:
    prefill, prefill_low, prefill_high = _percentiles([run.prefill for run in runs])
    steps = [run.decode for run in runs if run.decode is not None]
    decode, decode_low, decode_high = _percentiles(steps) if steps else (None, None, None)
    peak = max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None)
    return Speed(
        prefill, prefill_low, prefill_high, decode, decode_low, decode_high, runs[-1].cache_bytes, peak
    )


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    """The median, the 20th and the 80th percentile."""
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    middle, low, high = torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
    return middle, low, high


def _check_length(model: nn.Module, tokens: int) -> None:
    """Refuse what a table of position embeddings is too short for; rotary positions have no such end."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("wpe", "position_embeddings")):
            # RoBERTa and MPNet count positions from behind the padding token's.
            longest = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if tokens > longest:
                raise DataError(
                    f"The model has embeddings for {longest} positions, and prompt_tokens with new_tokens need "
                    f"{tokens}. Ask for fewer."
                )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"

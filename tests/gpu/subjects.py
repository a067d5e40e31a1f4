"""Small models whose kernels run, what they are given, and what they are judged by: float32 on the CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

import slimformer
from slimformer.model.anatomy import find_anatomy
from slimformer_kernels.dispatch import KernelOp

# `SLIMFORMER_GPU_TESTS=cpu` tries out these tests where there is no GPU: without kernels, and without CUDA graphs.
DRY = os.environ.get("SLIMFORMER_GPU_TESTS") == "cpu"
DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# The largest relative error of a right result: four layers of random weights make ten times a rounding of it.
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}

HIDDEN, LAYERS, VOCAB = 256, 4, 128
WINDOW = 48
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# One of every structure, and of every way to turn channels.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {"head_dim": 64}, "olmo2": {}, "phi3": {}, "phi": {}, "gpt2": {"n_inner": 512},
    "gpt_neox": {},
    "gemma2": {"head_dim": 64, "sliding_window": WINDOW}, "gemma3_text": {"head_dim": 64, "sliding_window": WINDOW},
    "cohere": {"logit_scale": 1.0}, "glm": {"head_dim": 64},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {}, "mpnet": {}, "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 2 * WINDOW},
    "distilbert": {"dim": HIDDEN, "hidden_dim": 512, "n_layers": LAYERS, "n_heads": 4},
}  # fmt: skip
STRUCTURES = [*DECODERS, *ENCODERS]

TOKENS = 300
# Where the text of every row begins, and its length.
LAYOUTS = {
    "none": ((0, 300), (0, 300), (0, 300)),
    "left": ((50, 250), (0, 300), (290, 10)),
    "right": ((0, 250), (0, 300), (0, 10)),
}


def config_of(name: str, **overrides: Any) -> Any:
    """The config of a small model."""
    return AutoConfig.for_model(name, **{**_SIZES, **{**DECODERS, **ENCODERS}[name], **overrides})


@cache
def _state(name: str, overrides: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    """Weights under which every sublayer, bias and norm counts, of numbers that both half precisions have."""
    torch.manual_seed(0)
    model = _factory(name).from_config(config_of(name, **dict(overrides)), dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    scale = model.config.hidden_size**-0.5
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.add_(noise * 0.1)
            elif "embed" not in path and "wte" not in path and "wpe" not in path:
                weight.copy_(noise * scale)
    return {key: value.bfloat16().float() for key, value in model.state_dict().items()}


def _factory(name: str) -> Any:
    return AutoModelForCausalLM if name in DECODERS else AutoModel


def build(
    name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **overrides: Any
) -> PreTrainedModel:
    """A small model in evaluation mode, with the same weights in every dtype."""
    model = _factory(name).from_config(config_of(name, **overrides), dtype=dtype)
    model.load_state_dict(_state(name, tuple(sorted(overrides.items()))))
    return model.to(device).eval().requires_grad_(False)


def arguments(name: str, texts: tuple[tuple[int, int], ...], tokens: int = TOKENS) -> dict[str, Tensor]:
    """Random ids, their mask, and for decoders their position ids."""
    ids = torch.randint(3, VOCAB, (len(texts), tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, (begin, length) in zip(mask, texts, strict=True):
        row[begin : begin + length] = 1
    given = {"input_ids": ids * mask, "attention_mask": mask}
    return {**given, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if name in DECODERS else given


def moved(given: Mapping[str, Tensor], device: torch.device = DEVICE) -> dict[str, Tensor]:
    """The same on the GPU."""
    return {name: value.to(device) for name, value in given.items()}


def outputs(model: nn.Module, given: Mapping[str, Any], **more: Any) -> Tensor:
    """Logits, or an encoder's last hidden states, `[batch, tokens, ...]`."""
    with torch.no_grad():
        out = model(**given, **more)
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


@contextlib.contextmanager
def with_kernels() -> Iterator[dict[str, int]]:
    """A block in which kernels run whatever the size, and the number of launches of each."""
    with counted() as launches, off_the_default_stream():
        yield launches


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """A block, and how often it launches each kernel."""
    launches: dict[str, int] = {}
    call = KernelOp.__call__

    def counting(self: KernelOp, *arguments: Any) -> Any:
        name = self.launch.__name__.removesuffix("_op")
        launches[name] = launches.get(name, 0) + 1
        return call(self, *arguments)

    KernelOp.__call__ = counting  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        KernelOp.__call__ = call  # type: ignore[method-assign]


@contextlib.contextmanager
def off_the_default_stream() -> Iterator[None]:
    """A block on a stream of its own, as graphs are warmed up: the executor takes kernels there at every size."""
    if DRY:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()


def launched(launches: Mapping[str, int], *names: str) -> bool:
    """Whether kernels ran, and among them each of those named by one of its alternatives ("this or that")."""
    if DRY:
        return not launches
    return bool(launches) and all(any(one in launches for one in name.split(" or ")) for name in names)


def off(actual: Tensor, expected: Tensor, mask: Tensor) -> float:
    """The relative norm of the difference at real tokens; infinite where a number is none."""
    actual, expected = (t.detach().cpu().double()[mask.cpu().bool()] for t in (actual, expected))
    assert actual.shape == expected.shape
    error = float((actual - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def typical(actual: Tensor, expected: Tensor, mask: Tensor, part: float = 0.5) -> float:
    """The relative error that so many of the real tokens stay below.

    For what chooses tokens by what it has computed: next to a threshold a rounding decides, and few tokens go the other
    way than in float32.
    """
    actual, expected = (t.detach().cpu().double()[mask.cpu().bool()] for t in (actual, expected))
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(errors.nan_to_num(float("inf")).quantile(part))


@cache
def _float32(
    name: str, method: Any, texts: tuple[tuple[int, int], ...], more: tuple[tuple[str, Any], ...]
) -> Tensor:
    model = build(name)
    if method is not None:
        slimformer.patch(model, *method.plan())
    return outputs(
        model, arguments(name, texts, max(begin + length for begin, length in texts)), **dict(more)
    )


def in_float32(name: str, method: Any, texts: tuple[tuple[int, int], ...], **more: Any) -> Tensor:
    """What float32 on the CPU gives, where no kernel runs: of the unpatched model, or of one with a method."""
    return _float32(name, method, texts, tuple(sorted(more.items())))


def by_steps(
    model: nn.Module, given: Mapping[str, Tensor], past: Cache, prompt: int, steps: tuple[int, ...]
) -> Tensor:
    """Logits of a prompt and of so many tokens in each step behind it, through a cache."""
    found, start = [], 0
    for length in (prompt, *steps):
        end = start + length
        call = {
            "input_ids": given["input_ids"][:, start:end],
            "attention_mask": given["attention_mask"][:, :end],
            "position_ids": given["position_ids"][:, start:end],
        }
        found.append(outputs(model, call, past_key_values=past, use_cache=True))
        start = end
    return torch.cat(found, 1)


@cache
def steps_in_float32(
    name: str, method: Any, texts: tuple[tuple[int, int], ...], prompt: int, steps: tuple[int, ...]
) -> Tensor:
    """The same on the CPU, where no kernel runs."""
    model = build(name)
    if method is not None:
        slimformer.patch(model, *method.plan())
    given = arguments(name, texts, prompt + sum(steps))
    return by_steps(model, given, DynamicCache(config=model.config), prompt, steps)


def parameters_of(model: nn.Module) -> list[str]:
    """Names of the matrices of the layers, as a weight delta has them."""
    return [name for name, weight in find_anatomy(model).layers.named_parameters() if weight.dim() == 2]

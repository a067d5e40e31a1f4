"""Copies of a model's modules to compare computations on, and how such a comparison is made.

In half precision a wrong computation can be as close to the right one as two right ones are to each other, so that
modules are compared in float32, with inputs under which attention is sharp and clips and caps are reached.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from slimformer.model.anatomy import Anatomy

# Inputs so much larger that limits on projections and gates are reached.
LOUD = 8.0
# What two orders of the same float32 operations differ by at most, per token; where matrices are multiplied in TF32, or
# the copy could not be made, rounding is larger and errors have to be larger to count.
_TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "half": 4e-2}
# A layer of more float32 bytes, as one with hundreds of experts is, is compared in its own precision.
_LARGEST_COPY = 8 * 2**30
# What a module raises that gets something else than it is made for.
Failure = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    StopIteration,
)
# Attributes that say where a module is, not what it computes.
_PLACE = {"layer_idx", "layer_index", "layer_id", "training"}


def float32_copy(module: nn.Module) -> nn.Module | None:
    """A copy of a module in float32 and evaluation mode, without hooks; None if there can be none.

    There is none where weights are not in memory, quantised, or too many.
    """
    parameters = list(module.parameters())
    if any(p.is_meta or not p.is_floating_point() or p.element_size() < 2 for p in parameters):
        return None
    if any(type(p) is not nn.Parameter for p in parameters):
        return None
    if sum(p.numel() for p in parameters) * 4 > _LARGEST_COPY:
        return None
    if any(hasattr(inner, "_hf_hook") for inner in module.modules()):
        return None
    # Configs are shared: they can be as large as a layer is deep, and nothing here changes one.
    shared = {id(c): c for inner in module.modules() if (c := getattr(inner, "config", None)) is not None}
    made = copy.deepcopy(module, shared).float().eval()
    for inner in made.modules():
        inner._forward_hooks.clear()
        inner._forward_pre_hooks.clear()
    return made


def tolerance(x: Tensor) -> float:
    """The largest error per token, relative to the mean norm of tokens, that is rounding."""
    if x.dtype not in (torch.float32, torch.float64):
        return _TOLERANCE["half"]
    tf32 = x.is_cuda and (
        torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    )
    return _TOLERANCE["tf32" if tf32 else "float32"]


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error of a token `[tokens, hidden]`, relative to the mean norm of tokens; infinite for NaN."""
    if actual.shape != expected.shape or not expected.numel():
        return float("inf") if actual.shape != expected.shape else 0.0
    difference = (actual.double() - expected.double()).norm(dim=-1)
    found = float(difference.max() / expected.double().norm(dim=-1).mean().clamp_min(1e-12))
    return float("inf") if found != found else found


def noise(shape: tuple[int, ...], like: Tensor, seed: int = 0) -> Tensor:
    """Normal noise of variance 1, the same for the same shape and seed, where `like` is."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return drawn.to(like.device, like.dtype if like.is_floating_point() else torch.float32)


def in_dtype(value: Any, like: Tensor) -> Any:
    """Floating tensors in an argument of a layer, in the dtype of `like` and on its device; caches are left out."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)
    if isinstance(value, tuple):
        return tuple(in_dtype(part, like) for part in value)
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        made.update({key: in_dtype(part, like) for key, part in value.items()})
        return made
    return None if isinstance(value, Cache) else value


def configuration(anatomy: Anatomy, index: int) -> Hashable:
    """What tells a layer from others that compute something else: classes, plain attributes, shapes, config entries."""
    layer = anatomy.layers[index]
    parts: list[Hashable] = []
    for path, module in layer.named_modules():
        plain = tuple(
            sorted(
                (name, _plain(value))
                for name, value in vars(module).items()
                if name not in _PLACE and isinstance(value, (bool, int, float, str, type(None)))
            )
        )
        shapes = tuple(
            (name, None if t is None else tuple(t.shape))
            for name, t in (*module._parameters.items(), *module._buffers.items())
        )
        parts.append((path, type(module), plain, shapes))
    return (tuple(parts), _config_entries(anatomy.stack.config, index, len(anatomy.layers)))


def _plain(value: Any) -> str:
    return f"{type(value).__name__} {value}"


def _config_entries(config: Any, index: int, layers: int) -> Hashable:
    """What the lists of a config say about one layer: its entry, or whether a shorter list names it."""
    found: list[Hashable] = []
    entries: Mapping[str, Any] = vars(config) if hasattr(config, "__dict__") else {}
    for name, value in entries.items():
        if isinstance(value, (list, tuple)):
            found.append((name, str(value[index]) if len(value) == layers else index in value))
    return tuple(found)

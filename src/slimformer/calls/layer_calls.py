"""What the layers of a stack are called with, found by running the stack once over layers that compute nothing.

The stack that runs is a mirror: modules of its own over the model's weights. The model itself is not touched, so that
other threads may use it meanwhile, and nothing that the call changes stays behind.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from slimformer.cache.slots import CACHE_NAMES
from slimformer.errors import UnsupportedModelError
from slimformer.model.anatomy import Anatomy, layer_count, named_arguments, positional_names
from slimformer.model.touched_modules import HOOKS

Padding = Literal["none", "left", "right"]
# Texts of a call: one as long as the call, one shorter by this many tokens.
SHORTER_BY = 5
# What layers may return: the residual alone, or a tuple that begins with it.
_BESIDE = object()
_KINDS_OF_RESULT = (
    (0, None),
    (1, None),
    (2, _BESIDE),
    (2, None),
    (3, _BESIDE),
    (3, None),
    (4, _BESIDE),
    (4, None),
)


@dataclass
class LayerCalls:
    """One short call of a stack, as its layers saw it.

    Attributes:
        hidden: What the first layer got, `[batch, tokens, hidden]`.
        arguments: What every layer got beside it, by the names in the signature of its `forward`.
        text: Which tokens are text, bool `[batch, tokens]`.
        returns: 0 where layers return the residual alone, else how many values they return, the residual first.
        hands_over: Whether what layers return beside the residual goes to layers above.
        passes_on: Whether every layer got the very tensor that the layer before it returned.
        returned: That tensor, of the last layer.
        beside: What stood for the other values that layers return.
        silent: Whether layers returned zeros.
        last: What the last layer got.
        called: The layers in the order of their calls.
    """

    hidden: Tensor
    arguments: list[dict[str, Any]]
    text: Tensor
    returns: int = 0
    hands_over: bool = False
    passes_on: bool = True
    returned: Tensor | None = field(default=None, repr=False)
    beside: object = field(default=None, repr=False)
    silent: bool = False
    last: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    called: list[nn.Module] = field(default_factory=list, repr=False)


def layer_calls(
    anatomy: Anatomy,
    *,
    tokens: int = 8,
    batch: int = 1,
    padding: Padding = "none",
    start: int = 0,
    cached: bool = False,
    silent: bool = False,
    cache: Cache | None = None,
) -> LayerCalls | None:
    """Call the stack of a model on a few tokens, with layers that hand their input on.

    Args:
        anatomy: The model's.
        tokens: Tokens of each text.
        batch: Texts, of which the second and later ones are shorter where there is padding.
        padding: Where padding stands.
        start: The position of the first token, where the stack takes positions.
        cached: Whether the stack keeps a key-value cache.
        silent: Whether layers return zeros instead.
        cache: The cache, where the stack is not to make it.

    Returns:
        None where weights are not in memory (meta device), since there is nothing to compute with.
    """
    embedding = _embedding(anatomy.stack)
    weight = next((p for p in embedding.parameters() if not p.is_meta), None)
    if weight is None:
        return None
    count = int(getattr(embedding, "num_embeddings", weight.shape[0]))
    device = weight.device
    # Apart from each other, and none of the first ids, which are often padding.
    ids = (torch.arange(batch * tokens, device=device) * 7 + 3).view(batch, tokens) % count
    text = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if padding == "left":
        text[1:, :SHORTER_BY] = False
    elif padding == "right":
        text[1:, -SHORTER_BY:] = False
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": text.long()}
    names = positional_names(anatomy.stack)
    if start and "position_ids" in names:
        given["position_ids"] = (text.long().cumsum(1) - 1).clamp_min(0) + start
        if "token_type_ids" in names:
            # Else NomicBERT reads them from a buffer by position id, and none stands that far.
            given["token_type_ids"] = torch.zeros_like(ids)
    if "use_cache" in names or anatomy.causal:
        given["use_cache"] = cached
    if cache is not None:
        given[cache_argument(anatomy.stack)] = cache
    failure: Exception | None = None
    for returns, beside in _KINDS_OF_RESULT:
        calls = LayerCalls(torch.empty(0), [], text, returns, beside=beside, silent=silent)
        stubs = {id(layer): _stub(layer, calls) for layer in anatomy.layers}
        mirror = mirrored(anatomy.stack, stubs)
        try:
            with torch.no_grad():
                mirror(**given)
        except _WrongResultError as error:
            failure = error
            continue
        # Whatever a foreign stack raises when layers return something else than it expects.
        except Exception as error:
            failure = failure or error
            continue
        if len(calls.arguments) == len(anatomy.layers) or (anatomy.repeats and calls.arguments):
            return calls
    raise UnsupportedModelError(
        f"{type(anatomy.stack).__name__} could not be called on {tokens} tokens with layers that hand their input on: "
        f"{type(failure).__name__}: {failure}. The model was left as it was."
    )


def layers_by_depth(anatomy: Anatomy) -> Anatomy:
    """The same layers with one entry for every call of a layer in one forward pass.

    Raises:
        UnsupportedModelError: If the stack calls them otherwise than one behind the other, or keeps a cache.
    """
    if not anatomy.repeats:
        return anatomy
    name, layer = type(anatomy.stack).__name__, type(anatomy.layers[0]).__name__
    calls = layer_calls(anatomy)
    count = layer_count(anatomy.stack.config)
    why = ""
    if calls is None:
        why = "which layer is called when is seen by calling the stack, and its weights are not in memory"
    elif {id(called) for called in calls.called} != {id(known) for known in anatomy.layers}:
        why = "not all of them are called"
    elif not count or len(calls.called) % count:
        said = "not said" if count is None else count
        why = f"{len(calls.called)} calls were seen, and the config says layers ({said})"
    elif not calls.passes_on:
        why = "what one call returns is not what the next one gets"
    elif keeps_cache(anatomy):
        why = "they keep a key-value cache, in which every call has another slot"
    if why or calls is None:
        raise UnsupportedModelError(
            f"{name} lists layers in groups, or calls {layer} several times in one forward, and the calls are none "
            f"that can be left out one by one: {why}. The model was left as it was."
        )
    place = {id(known): index for index, known in enumerate(anatomy.layers)}
    types = tuple(anatomy.layer_types[place[id(called)]] for called in calls.called)
    found = dataclasses.replace(anatomy, layers=nn.ModuleList(calls.called), layer_types=types, caches=False)
    if len(place) < len(types):
        why = f"its stack calls {layer} {len(types)} times in one forward, with the weights of {len(place)}"
        return dataclasses.replace(found, unknown=why)
    return dataclasses.replace(found, repeats=False)


@torch.no_grad()
def adds_between(anatomy: Anatomy) -> bool:
    """Whether a stack adds what a layer returns to a residual of its own, as XLM's does: no layer is all there is then.

    Where layers return zeros, such a stack still tells tokens apart.
    """
    calls = layer_calls(anatomy, silent=True)
    if calls is None or len(calls.arguments) < 2:
        return False
    return bool((calls.last - calls.last[..., :1, :]).abs().max() > 0)


def _embedding(stack: PreTrainedModel) -> nn.Module:
    """The table of a stack's input ids.

    Raises:
        UnsupportedModelError: If there is none.
    """
    # Where a model does not say which, as CANINE's, any table tells how large an id may be.
    with contextlib.suppress(NotImplementedError):
        given = stack.get_input_embeddings()
        if isinstance(given, nn.Module):
            return given
    found = next((module for module in stack.modules() if isinstance(module, nn.Embedding)), None)
    if found is None:
        raise UnsupportedModelError(
            f"No table of input embeddings was found in {type(stack).__name__}, so that it cannot be called on tokens. "
            "Supported are models whose input_ids are read from an nn.Embedding. The model was left as it was."
        )
    return found


def cache_argument(module: nn.Module) -> str:
    """What the `forward` of a model, stack or layer calls the key-value cache.

    Raises:
        UnsupportedModelError: If none of its parameters is one that is known for that.
    """
    names = positional_names(module)
    found = next((name for name in CACHE_NAMES if name in names), None)
    if found is None:
        raise UnsupportedModelError(
            f"No parameter of {type(module).__name__}.forward is known to be a key-value cache: it has "
            f"{', '.join(names)}; known are {', '.join(CACHE_NAMES)}."
        )
    return found


def check_cache_arguments(anatomy: Anatomy) -> None:
    """Check that the layers of a decoder get their cache under a name that is known.

    An argument that is absent is no argument that is not used: a cache under a new name would be overlooked, and every
    cached step would attend to itself alone.

    Raises:
        UnsupportedModelError: If a cache comes under another name, or none comes where one is kept.
    """
    if not anatomy.causal or "use_cache" not in positional_names(anatomy.stack):
        return
    calls = _cached_calls(anatomy)
    if calls is None:
        return
    for layer, given in zip(anatomy.layers, calls.arguments, strict=True):
        names = [name for name, value in given.items() if isinstance(value, Cache)]
        unknown = [name for name in names if name not in CACHE_NAMES]
        if unknown or not names:
            came = f"got one as {unknown[0]!r}" if unknown else "got none"
            raise UnsupportedModelError(
                f"{type(layer).__name__} {came} from {type(anatomy.stack).__name__}, which was asked to keep a "
                f"key-value cache. Known names are {', '.join(CACHE_NAMES)}. The model was left as it was: this "
                "version of transformers may be newer than those that slimformer knows."
            )


def keeps_cache(anatomy: Anatomy) -> bool:
    """Whether a stack that is asked for a key-value cache hands one to its layers."""
    if "use_cache" not in positional_names(anatomy.stack):
        return False
    calls = _cached_calls(anatomy)
    return calls is not None and _has_cache(calls)


def _cached_calls(anatomy: Anatomy) -> LayerCalls | None:
    """What layers get in a call with a cache: the stack's own, or one that its caller made."""
    try:
        calls = layer_calls(anatomy, cached=True)
    except UnsupportedModelError:
        # Such as T5's encoder, whose parameter is there for the decoder that shares its class.
        if anatomy.causal:
            raise
        return None
    names = positional_names(anatomy.stack)
    if calls is None or _has_cache(calls) or not anatomy.causal or not any(n in names for n in CACHE_NAMES):
        return calls
    with contextlib.suppress(UnsupportedModelError):
        return layer_calls(anatomy, cached=True, cache=DynamicCache(config=anatomy.stack.config))
    return calls


def _has_cache(calls: LayerCalls) -> bool:
    return any(isinstance(v, Cache) for given in calls.arguments for v in given.values())


def first_layer_call(anatomy: Anatomy) -> tuple[Tensor, dict[str, Any]] | None:
    """What the first layer gets for eight tokens: a residual `[1, 8, hidden]`, with noise, and its other arguments.

    Returns:
        None where weights are not in memory (meta device), since there is nothing to compute with.
    """
    calls = layer_calls(anatomy)
    if calls is None:
        return None
    hidden = calls.hidden
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(hidden)
    return hidden + noise * hidden.float().std().to(hidden.dtype), calls.arguments[0]


class _WrongResultError(Exception):
    """The stack took something else for the residual than what the layer before returned as such."""


@dataclass(eq=False)
class _Handed:
    """Stands in for the `forward` of a layer: notes what comes and hands the residual on."""

    calls: LayerCalls
    layer: nn.Module
    names: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = named_arguments(self.names, args, kwargs)
        hidden = given.pop(self.names[0])
        calls = self.calls
        if not calls.arguments:
            calls.hidden = hidden
        elif not isinstance(hidden, Tensor) or hidden.shape != calls.hidden.shape:
            raise _WrongResultError(
                f"a layer got {getattr(hidden, 'shape', type(hidden))} for {calls.hidden.shape}"
            )
        calls.passes_on = calls.passes_on and (calls.returned is None or calls.returned is hidden)
        if calls.beside is not None and any(value is calls.beside for value in given.values()):
            calls.hands_over = True
        calls.arguments.append(given)
        calls.called.append(self.layer)
        calls.last = hidden
        calls.returned = torch.zeros_like(hidden) if calls.silent else hidden.clone()
        return (calls.returned, *[calls.beside] * (calls.returns - 1)) if calls.returns else calls.returned


def _stub(layer: nn.Module, calls: LayerCalls) -> nn.Module:
    stub = _shallow(layer)
    stub.__dict__["forward"] = _Handed(calls, layer, positional_names(layer))
    return stub


def mirrored(module: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """A module of its own over the same weights, in evaluation mode, with some of the modules inside replaced."""
    if id(module) in replaced:
        return replaced[id(module)]
    mirror = _shallow(module)
    around = False
    for name, child in module._modules.items():
        if child is not None:
            mirror._modules[name] = mirrored(child, replaced)
            around = around or _holds(child, replaced)
    if around:
        # Bound to the module that is mirrored; below, as accelerate's on an embedding, it does what it is there for.
        for name in ("forward", "_old_forward", "_hf_hook"):
            mirror.__dict__.pop(name, None)
    return mirror


def _holds(module: nn.Module, replaced: Mapping[int, nn.Module]) -> bool:
    return any(id(inner) in replaced for inner in module.modules())


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares parameters, without the module's hooks."""
    made = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    # LongRoPE writes into the buffer of its frequencies in every call.
    made.__dict__["_buffers"] = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    for name in HOOKS:
        if name in made.__dict__:
            made.__dict__[name] = OrderedDict()
    made.__dict__["training"] = False
    return made

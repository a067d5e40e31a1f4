"""Stands in for a model's forward pass: a decode step is replayed from its graph, everything else is as ever."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from slimformer.cache.filter_state import FilterState
from slimformer.cache.layout import copy_stamp
from slimformer.cache.room import RoomCache, filled, newest, newest_keys
from slimformer.cache.slots import CACHE_NAMES, layer_cache
from slimformer.cache.steps import Step, preparing
from slimformer.decoding.capture import capture, captures, memory_pool
from slimformer.decoding.rooms import Graph, Lease, Room, Rooms
from slimformer.decoding.stayed import released

_logger = logging.getLogger("slimformer")
# What a step reads, or would not change it.
_KNOWN = {
    *CACHE_NAMES, "input_ids", "position_ids", "attention_mask", "use_cache", "return_dict", "logits_to_keep",
    "cache_position",
}  # fmt: skip
_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
# Tokens of a step: one, or some that were guessed and are checked.
_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
_MOST_TOKENS = _WIDTHS[-1]
# The largest relative difference between a replayed step and the same launched one by one; or else so many times the
# difference that the order of additions in attention makes in the latter, which in a deep model may be larger.
_ROUNDINGS = 2.0
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class Stepping:
    """Stands in for a model's `forward`, and gives `generate` a cache whose steps can be replayed.

    Attributes:
        model: The model.
        untouched: Whether nobody has touched a module of its layers.
        never: Why no step of it is replayed; empty where some may be.
        bounds: Lengths of texts at which a step is launched one by one: a method does something once.
        rooms: Rooms for its caches.
        had: The model's own forward.
        had_cache: What makes its caches.
        steps: How many steps were replayed.
        captured: How many graphs were made.
        why_not: Why the last call was not replayed.
        key: By which its graphs are found.
    """

    model: Any
    untouched: Callable[[], bool]
    never: str = ""
    bounds: frozenset[int] = frozenset()
    rooms: Rooms = field(default_factory=Rooms)
    had: Callable[..., Any] = field(init=False)
    had_cache: Callable[..., Any] = field(init=False)
    had_generate: Callable[..., Any] = field(init=False)
    steps: int = 0
    captured: int = 0
    why_not: str = ""
    key: object = field(default_factory=object)
    _pool: object = None
    _addresses: tuple[int, ...] = ()
    _lock: Any = field(default_factory=threading.Lock)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has memory of its own."""
        fresh = {"rooms": Rooms(), "key": None, "_pool": None, "_addresses": (), "_lock": None}
        return {**vars(self), **fresh}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """As `__getstate__` says."""
        vars(self).update(state, key=object(), _lock=threading.Lock())

    def __str__(self) -> str:
        if self.never:
            return f"launched one by one: {self.never}"
        found = f"{self.steps} replayed from {self.captured} graphs"
        return f"{found}, none in the last call: {self.why_not}" if self.why_not else found

    def may_replay(self) -> bool:
        """Whether steps of the model are replayed where it lies now."""
        return not self.never and captures(next(self.model.parameters()).device.type)

    def caches(
        self, config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, longest: int, *rest: Any
    ) -> Any:
        """Stands in for `_prepare_cache_for_generation`: what would be a new dynamic cache gets room."""
        handed_in = any(model_kwargs.get(name) is not None for name in CACHE_NAMES)
        result = self.had_cache(config, model_kwargs, mode, batch_size, longest, *rest)
        self.why_not = self.never or ("the cache was handed in" if handed_in else "")
        self.why_not = self.why_not or self._without_room(config, model_kwargs, mode)
        if not self.why_not:
            name = next(name for name in CACHE_NAMES if isinstance(model_kwargs.get(name), DynamicCache))
            decoder = self.model.config.get_text_config(decoder=True)
            several = mode == GenerationMode.ASSISTED_GENERATION
            most = int(longest) + (_MOST_TOKENS if several else 1)
            lease = Lease(self.rooms, most, len(model_kwargs[name].layers), several)
            model_kwargs[name] = RoomCache(decoder, lease.takes, lease)
        return result

    def generates(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `generate`: a cache that is returned is the caller's, and no room."""
        result = self.had_generate(*args, **kwargs)
        for name in CACHE_NAMES:
            cache = None if isinstance(result, Tensor) else getattr(result, name, None)
            if isinstance(cache, RoomCache):
                released(cache)
                own = cache.dynamic()
                copy_stamp(cache, own)
                setattr(result, name, own)
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, or a step of it."""
        cache = layer_cache(kwargs)
        if type(cache) is not RoomCache or args or self.never:
            return self.had(*args, **kwargs)
        ids, lease = kwargs.get("input_ids"), cache.lease
        if ids is None or newest(cache) == 0 or ids.shape[1] > (_MOST_TOKENS if lease.several else 1):
            return self._launched(cache, kwargs)
        self.why_not = lease.without or _unlike_a_step(self.model, ids, kwargs)
        if self.why_not:
            return self._launched(cache, kwargs)
        at, tokens = newest(cache), ids.shape[1]
        # One graph serves all lengths up to its own; what a filter remembers would not be what came, though.
        filters = any(isinstance(layer, FilterState) and layer.state is not None for layer in cache.layers)
        width = tokens if filters else _width_for(tokens)
        if lease.room is None or at + width > lease.room.count or not lease.holds(cache):
            if cache.borrowed:
                return self._launched(cache, kwargs)
            lease.grow(cache, at + width)
        room = lease.room
        if room is None:
            self.why_not = lease.without
            return self._launched(cache, kwargs)
        if lease.firsts is None:
            first = _first_places(kwargs.get("attention_mask"), at, ids)
            if first is None:
                lease.without = self.why_not = "padding does not stand in front of every text"
                return self._launched(cache, kwargs)
            room.step.ranges[:, 0] = first.to(ids.device)
            lease.firsts = sorted(set(first.tolist()))
        if any(0 <= bound - (at - first) < width for bound in self.bounds for first in lease.firsts):
            # A text comes to be so long that something is done once.
            return self._launched(cache, kwargs)
        self.why_not = lease.without = lease.settles(cache)
        if self.why_not:
            return self._launched(cache, kwargs)
        memory = room.settled(cache, self.key)
        graph = room.graphs.get((self.key, width))
        if graph is None:
            return self._captured(room, cache, width, memory, kwargs)
        logits = self._replayed(room, graph, at, kwargs)
        filled(cache, tokens)
        self.steps += 1
        name = next(name for name in CACHE_NAMES if name in graph.output.__dataclass_fields__)
        return graph.output(logits=logits, **{name: cache})

    def _launched(self, cache: RoomCache, kwargs: dict[str, Any]) -> Any:
        """The model's own forward pass, with the cache as it knows it."""
        released(cache)
        return self.had(**kwargs)

    def _without_room(self, config: Any, model_kwargs: dict[str, Any], mode: Any) -> str:
        cache = next((model_kwargs[name] for name in CACHE_NAMES if model_kwargs.get(name) is not None), None)
        layers = getattr(cache, "layers", ())
        plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        if type(cache) is not DynamicCache or not layers or not plain or getattr(cache, "offloading", False):
            return "its cache is another than a new dynamic one"
        if mode not in _MODES or config.is_assistant:
            return f"its mode is {getattr(mode, 'value', mode)}"
        if config.output_attentions or config.output_hidden_states:
            return "attentions or hidden states of every step were asked for"
        device = next(self.model.parameters()).device
        if not captures(device.type):
            return f"it runs on {device.type}"
        if not self.untouched():
            return "somebody has touched its modules"
        addresses = tuple(t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers()))
        if addresses != self._addresses:
            # Weights were loaded, moved or put around since.
            self._addresses = addresses
            self.rooms.clear()
        return ""

    def _captured(
        self, room: Room, cache: RoomCache, width: int, memory: list[Tensor], kwargs: dict[str, Any]
    ) -> Any:
        """This step launched one by one, and a graph for later ones, if it gives the same."""
        at, before = newest(cache), [(state, state.clone()) for state in memory]
        steady = cache.over_the_same()
        copy_stamp(cache, steady)
        outputs = self._launched(cache, kwargs)
        launched = newest_keys(cache, at)
        step = room.step if width == 1 else room.step.of_several(width)
        own = {"input_ids": step.token, "position_ids": step.position}
        name = next(name for name in CACHE_NAMES if kwargs.get(name) is not None)
        keep = {key: kwargs[key] for key in ("use_cache", "return_dict") if key in kwargs}

        def call() -> Tensor:
            step.begin()
            with preparing(step):
                logits: Tensor = self.had(**own, **keep, **{name: steady}).logits
            step.end()
            return logits

        def rewind() -> None:
            for state, value in before:
                state.copy_(value)
            _write(step, kwargs, at)

        device = step.token.device
        with self._lock, torch.no_grad():
            self._pool = self._pool or memory_pool(device)
            try:
                graph = Graph(step, *capture(call, rewind, device, self._pool), type(outputs))
            except Exception as error:
                # Kernels that do not compile have errors of their own kinds.
                why = f"a step cannot be captured ({(str(error) or repr(error)).splitlines()[0]})"
                return self._refused(outputs, launched, why)
            rewind()
            room.at = at
            # Over what the launched step has put there.
            logits = self._replayed(room, graph, at, kwargs)
        off = _apart(logits, outputs.logits)
        near = off <= _TOLERANCE.get(logits.dtype, 0.0)
        if not (near or off <= _ROUNDINGS * self._rounding(cache, kwargs, outputs.logits)):
            why = f"a replayed step gives something else (relative error {off:.2g})"
            return self._refused(outputs, launched, why)
        room.graphs[self.key, width] = graph
        self.captured += 1
        return outputs

    def _rounding(self, cache: RoomCache, kwargs: dict[str, Any], logits: Tensor) -> float:
        """How far the launched step is from itself when attention adds up in another order."""
        cache.crop(-kwargs["input_ids"].shape[1])
        with sdpa_kernel(SDPBackend.MATH):
            again = self.had(**kwargs).logits
        return _apart(again, logits)

    def _refused(self, outputs: Any, launched: list[tuple[Tensor, Tensor]], why: str) -> Any:
        for place, own in launched:
            place.copy_(own)
        self.never = self.why_not = why
        _logger.info("Decode steps are launched one by one: %s.", why)
        return outputs

    def _replayed(self, room: Room, graph: Graph, at: int, kwargs: dict[str, Any]) -> Tensor:
        _write(graph.step, kwargs, None if room.at == at else at)
        graph.replay()
        room.at = at + graph.step.tokens
        tokens = kwargs["input_ids"].shape[1]
        kept = min(int(kwargs.get("logits_to_keep") or tokens), tokens)
        found: Tensor = graph.logits[:, tokens - kept : tokens].clone()
        return found


def _width_for(tokens: int) -> int:
    """How many tokens the step has that is replayed for so many: few graphs, and little in vain."""
    return next(width for width in _WIDTHS if width >= tokens)


def _apart(given: Tensor, expected: Tensor) -> float:
    """The relative difference; NaN where there is one in either."""
    expected = expected.float()
    return float((given.float() - expected).norm() / expected.norm())


def _write(step: Step, kwargs: dict[str, Any], at: int | None) -> None:
    # What stands behind them is read in vain: no token sees it, and its keys are written over.
    tokens = kwargs["input_ids"].shape[1]
    step.token[:, :tokens] = kwargs["input_ids"]
    step.position[:, :tokens] = kwargs["position_ids"]
    if at is not None:
        step.first.fill_(at)


def _unlike_a_step(model: nn.Module, ids: Tensor, kwargs: dict[str, Any]) -> str:
    """Why a call that reads a few tokens of every text is no step that can be replayed; empty where it is."""
    more = [
        name
        for name, value in kwargs.items()
        if name not in _KNOWN and value is not None and value is not False
    ]
    if more:
        return f"it is called with {', '.join(more)}"
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None or positions.shape != ids.shape:
        return "its positions are not one number per token"
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return "its attention mask is not one number per token"
    if model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "it is trained or compiled"
    if torch.is_autocast_enabled(ids.device.type):
        return "autocast is on"
    if not isinstance(kwargs.get("logits_to_keep") or 0, int):
        return "it asks for logits of some tokens by their places"
    return ""


def _first_places(mask: Tensor | None, length: int, ids: Tensor) -> Tensor | None:
    """Where the text of every row begins in a cache of so many tokens; None where padding lies elsewhere too."""
    if mask is None:
        return torch.zeros(len(ids), dtype=torch.int64)
    seen = mask[:, :length].bool().cpu()
    first = (~seen).sum(1)
    left = torch.arange(length) >= first[:, None]
    return first if bool((seen == left).all()) and mask.shape[1] == length + ids.shape[1] else None

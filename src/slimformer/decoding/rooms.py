"""Rooms for caches, kept from call to call with the graphs of their steps."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimformer.cache.filter_state import FilterState
from slimformer.cache.room import Places, RoomCache, RoomLayer, newest, room_for
from slimformer.cache.steps import Step
from slimformer.decoding.stayed import released, settled, starts_of
from slimformer.rows.shorter_cache import ShorterLayer

# Rooms that wait for a call like one before.
_KEPT = 6
# Tokens that a prompt gets room for beside itself, if so many may be generated.
_AHEAD = 1024
# Of the memory that is free, what a room may take: a prompt needs some too.
_PART_OF_FREE = 0.7


@dataclass(eq=False)
class Graph:
    """A step that was captured.

    Attributes:
        step: What differs from step to step.
        replay: Launches it.
        logits: What it gives.
        output: The kind of output that the model has.
    """

    step: Step
    replay: Callable[[], None]
    logits: Tensor
    output: Any


@dataclass(eq=False)
class Room:
    """The memory of one cache at a time, and the graph of its steps.

    Attributes:
        batch: How many texts.
        count: How many tokens of each.
        step: What differs from step to step, of one token.
        places: The memory of every slot.
        filters: The memory of the last inputs of filters, by who computes them and their slot.
        graphs: What replays steps, by who computes them and how many tokens they have.
        at: The place of the next token, as the device has it.
    """

    batch: int
    count: int
    step: Step
    places: dict[int, Places] = field(default_factory=dict)
    filters: dict[tuple[object, int], Tensor] = field(default_factory=dict)
    graphs: dict[tuple[object, int], Graph] = field(default_factory=dict)
    at: int = -1

    def settled(self, cache: RoomCache, who: object) -> list[Tensor]:
        """Let whatever a cache remembers beside keys lie where somebody's steps find it; returns where that is."""
        found = []
        for index, layer in enumerate(cache.layers):
            before = self.filters.get((who, index))
            places = layer.moved_to(before) if isinstance(layer, FilterState) else None
            if places is None:
                continue
            found.append(places)
            if places is not before:
                self.filters[who, index] = places
                self.graphs = {key: graph for key, graph in self.graphs.items() if key[0] is not who}
        return found


class Rooms:
    """Rooms of one model, by the size of a batch."""

    def __init__(self) -> None:
        self.free: list[Room] = []
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """A copy begins without memory."""
        return {}

    def __setstate__(self, state: object) -> None:
        """As `__getstate__` says."""
        vars(self).update(vars(Rooms()))

    def take(self, batch: int, tokens: int, device: torch.device) -> Room:
        """A room for a batch of texts of so many tokens, which is nobody else's until it comes back."""
        with self.lock:
            fitting = [room for room in self.free if room.batch == batch and room.count >= tokens]
            if fitting:
                room = min(fitting, key=lambda one: one.count)
                self.free.remove(room)
                return room
            # A larger one takes their place.
            self.free = [room for room in self.free if room.batch != batch]
        return Room(batch, room_for(tokens), Step.of(batch, room_for(tokens), device))

    def give_back(self, room: Room) -> None:
        """Nobody uses it any more."""
        with self.lock:
            self.free = [*self.free, room][-_KEPT:]

    def clear(self) -> None:
        """Give all memory back that nobody uses."""
        with self.lock:
            self.free = []


class Lease:
    """The room of one cache, from its prompt on.

    Attributes:
        rooms: Where the room comes from and goes back to.
        longest: How many tokens there will be at most.
        layers: How many slots are filled.
        several: Whether steps of several tokens check what was guessed, so that some are taken back.
        room: The room; None before the prompt, and where there is too little memory.
        without: Why there is none.
        firsts: The first place of every text's keys; None before it is known.
        placed: Whether the room knows which tokens have left which slots.
    """

    def __init__(self, rooms: Rooms, longest: int, layers: int, several: bool = False) -> None:
        self.rooms, self.longest, self.layers, self.several = rooms, longest, layers, several
        self.room: Room | None = None
        self.without = ""
        self.firsts: list[int] | None = None
        self.placed = False
        self.ended: weakref.finalize | None = None

    def takes(self, index: int, keys: Tensor) -> Places:
        """Memory for a slot whose first keys are these `[batch, kv_heads, tokens, head_dim]`."""
        if self.room is None and not self.without:
            self._take(keys, max(keys.shape[2] + 1, min(self.longest, keys.shape[2] + _AHEAD)))
        if self.room is None:
            return Places(room_for(keys.shape[2]))
        places = self.room.places.setdefault(index, Places(self.room.count))
        if not places.fits(keys):
            places = self.room.places[index] = Places(self.room.count)
            self.room.graphs.clear()
        return places

    def grow(self, cache: RoomCache, tokens: int) -> None:
        """Move a cache to a larger room, for so many tokens at least."""
        released(cache)
        layers = [
            layer for layer in cache.layers if isinstance(layer, RoomLayer) and layer.places is not None
        ]
        keys = next(layer.keys for layer in layers if layer.keys is not None)
        self._take(keys, max(tokens, min(self.longest, 2 * tokens)))
        for layer in layers:
            if self.room is not None:
                layer.moved_to(self.takes(layer.index, keys))
        self.firsts, self.placed = None, False

    def settles(self, cache: RoomCache) -> str:
        """Put the slots that tokens have left into the room too; returns why that cannot be, if it cannot."""
        shorter = [index for index, layer in enumerate(cache.layers) if isinstance(layer, ShorterLayer)]
        room = self.room
        if room is None or (self.placed and not shorter):
            return ""
        if shorter and (self.several or cache.borrowed):
            return "tokens have left a cache from which guesses are taken back"
        begins = {index: starts_of(cache.layers[index]) for index in shorter}
        if any(start is None for start in begins.values()):
            return "tokens have left its cache in several places"
        if shorter and room.step.shifts is None:
            room.step.tell_slots_apart(len(cache.layers))
            room.graphs.clear()
        shifts, ranges = room.step.shifts, room.step.slot_ranges
        if shifts is not None and ranges is not None:
            # Another text may have been here, of which others had left.
            shifts.zero_()
            ranges[:, :, 0] = room.step.ranges[:, 0]
            length = newest(cache)
            for index, start in begins.items():
                ranges[index, :, 0] = torch.as_tensor(start, device=ranges.device)
                shifts[index] = length - cache.layers[index].get_seq_length()
                settled(cache, index, self.takes, ranges[index, :, 0])
        self.placed = True
        return ""

    def holds(self, cache: RoomCache) -> bool:
        """Whether all keys of a cache lie in the room."""
        room = self.room
        return room is not None and all(
            layer.places is room.places.get(layer.index)
            for layer in cache.layers
            if isinstance(layer, RoomLayer) and layer.places is not None
        )

    def _take(self, keys: Tensor, tokens: int) -> None:
        before = self.ended
        self.room = self.ended = None
        need = self.layers * 2 * keys[:, :, :1].numel() * keys.element_size() * room_for(tokens)
        if not self._has(keys, tokens) and need > _free(keys.device):
            self.rooms.clear()
            if keys.is_cuda:
                torch.cuda.empty_cache()
            if need > _free(keys.device):
                count = f"{room_for(tokens)} tokens of {keys.shape[0]} texts"
                self.without = f"too little memory for {count} ({need >> 20} MiB)"
        if not self.without:
            self.room = self.rooms.take(keys.shape[0], tokens, keys.device)
            self.ended = weakref.finalize(self, self.rooms.give_back, self.room)
            self.ended.atexit = False
        if before is not None:
            before()

    def _has(self, keys: Tensor, tokens: int) -> bool:
        return any(room.batch == keys.shape[0] and room.count >= tokens for room in self.rooms.free)


def _free(device: torch.device) -> float:
    """Bytes that a room may take."""
    if device.type != "cuda":
        return float("inf")
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _PART_OF_FREE * (torch.cuda.mem_get_info(device)[0] + unused)

"""What is prepared to be replayed, such as a decode step: what differs from step to step lies in tensors that stay."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slimformer_kernels import decode_attention

# Programs that count each other in attention: one for every key head of every text.
_MOST_KEY_HEADS = 256


@dataclass
class Step:
    """The next tokens of every text of a batch.

    Attributes:
        token: Their ids, int64 `[batch, tokens]`.
        position: Their position ids, int64 `[batch, tokens]`.
        first: Where the keys of the first go in slots that hold every token, int64 `[1]`.
        ranges: The first place of every text's keys, and the one behind its last, int64 `[batch, 2]`.
        room: How many places there are.
        counters: Zeros for `decode_attention`, int32.
        shifts: By how much each slot's places lie in front of those, int64 `[slots, 1]`: as many tokens have left it.
            None where none has.
        slot_ranges: What `ranges` says, of each slot by itself, int64 `[slots, batch, 2]`; likewise.
        place: Where the keys of each go, int64 `[tokens]`; known within a step.
    """

    token: Tensor
    position: Tensor
    first: Tensor
    ranges: Tensor
    room: int
    counters: Tensor
    shifts: Tensor | None = None
    slot_ranges: Tensor | None = None
    place: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._each = torch.arange(self.tokens, device=self.token.device)
        self.place = self._slot_places = self._each

    @staticmethod
    def of(batch: int, room: int, device: torch.device) -> Step:
        """Of one token of every text."""

        def whole(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        counters = torch.zeros(batch * _MOST_KEY_HEADS, dtype=torch.int32, device=device)
        return Step(whole(batch, 1), whole(batch, 1), whole(1), whole(batch, 2), room, counters)

    def of_several(self, tokens: int) -> Step:
        """A step of so many tokens in the same places."""
        shape = (self.token.shape[0], tokens)
        return replace(self, token=self.token.new_zeros(shape), position=self.position.new_zeros(shape))

    def tell_slots_apart(self, slots: int) -> None:
        """Let each of so many slots hold fewer tokens than others."""
        self.shifts = self.first.new_zeros(slots, 1)
        self.slot_ranges = self.ranges.new_zeros(slots, *self.ranges.shape)

    @property
    def tokens(self) -> int:
        """How many tokens of every text."""
        return self.token.shape[1]

    def begin(self) -> None:
        """What comes first in every step: the new tokens' own keys are seen too."""
        self.place = self.first if self.tokens == 1 else self.first + self._each
        self.ranges[:, 1] = self.first + self.tokens
        if self.shifts is not None and self.slot_ranges is not None:
            self._slot_places = self.place - self.shifts
            self.slot_ranges[:, :, 1] = self.ranges[:, 1] - self.shifts

    def place_in(self, slot: int) -> Tensor:
        """Where the keys of each token go in a slot, int64 `[tokens]`."""
        return self.place if self.shifts is None else self._slot_places[slot]

    def ranges_in(self, slot: int) -> Tensor:
        """What `ranges` says, of a slot."""
        return self.ranges if self.slot_ranges is None else self.slot_ranges[slot]

    def end(self) -> None:
        """What comes last: the next token goes behind these."""
        self.first.add_(self.tokens)

    def attend(
        self,
        slot: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        """Attention of the new tokens.

        Args:
            slot: Whose keys these are.
            query: `[batch * tokens, heads, head_dim]`.
            key: All of the room `[batch, kv_heads, places, head_dim]`.
            value: Likewise.
            scale: Of the scores.
            window: How many keys are seen; None for all.
            cap: On the scores; None for none.

        Returns:
            `[batch * tokens, heads, head_dim]`.
        """
        return decode_attention(
            query,
            key.transpose(1, 2),
            value.transpose(1, 2),
            self.ranges_in(slot),
            scale=scale,
            window=window,
            softcap=cap,
            counters=self.counters,
        )


class _Prepared(threading.local):
    """What is being prepared to be replayed in a thread: a step, or a whole batch."""

    step: Step | None = None
    batch: bool = False


_prepared = _Prepared()
# Every layer asks in every call: no call of Python's, and nothing that torch.compile cannot follow.
current_step: Callable[[], Step | None] = functools.partial(getattr, _prepared, "step")


@contextlib.contextmanager
def preparing(step: Step) -> Iterator[None]:
    """A block whose forward passes are those of a step."""
    before, _prepared.step = _prepared.step, step
    try:
        yield
    finally:
        _prepared.step = before


@contextlib.contextmanager
def preparing_a_batch() -> Iterator[None]:
    """A block whose forward passes launch what a graph of them will, whatever texts it is replayed on."""
    before, _prepared.batch = _prepared.batch, True
    try:
        yield
    finally:
        _prepared.batch = before


def is_prepared() -> bool:
    """Whether a step or a batch is being prepared, in which no value can be read from the device."""
    return _prepared.batch or _prepared.step is not None

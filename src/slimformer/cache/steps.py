"""A decode step that is prepared to be replayed: what differs from step to step lies in tensors that stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from slimformer_kernels import decode_attention


@dataclass
class Step:
    """One new token of every text of a batch.

    Attributes:
        token: Its id, int64 `[batch, 1]`.
        position: Its position id, int64 `[batch, 1]`.
        place: Where its keys go in the cache, int64 `[1]`.
        ranges: The first place of every text's keys, and the one behind its last, int64 `[batch, 2]`.
    """

    token: Tensor
    position: Tensor
    place: Tensor
    ranges: Tensor

    @staticmethod
    def of(batch: int, device: torch.device) -> Step:
        """For a batch of texts."""

        def whole(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        return Step(whole(batch, 1), whole(batch, 1), whole(1), whole(batch, 2))

    def begin(self) -> None:
        """What comes first in every step: the new token's own key is seen too."""
        self.ranges[:, 1] = self.place + 1

    def end(self) -> None:
        """What comes last: the next token goes behind this one."""
        self.place.add_(1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """Attention of the new tokens.

        Args:
            query: `[batch, heads, 1, head_dim]`.
            key: All of the room `[batch, kv_heads, places, head_dim]`.
            value: Likewise.
            scale: Of the scores.
            window: How many keys are seen; None for all.
            cap: On the scores; None for none.

        Returns:
            `[batch, heads, head_dim]`.
        """
        return decode_attention(
            query[:, :, 0],
            key.transpose(1, 2),
            value.transpose(1, 2),
            self.ranges,
            scale=scale,
            window=window,
            softcap=cap,
        )


_current: ContextVar[Step | None] = ContextVar("slimformer_step", default=None)


def current_step() -> Step | None:
    """The step that is being prepared in this thread, if there is one."""
    # Nothing is prepared while torch.compile traces, and it cannot follow a context variable.
    return None if torch.compiler.is_compiling() else _current.get()


@contextlib.contextmanager
def preparing(step: Step) -> Iterator[None]:
    """A block whose forward passes are those of a step."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)

"""The arguments that SelfExtend's attention has beyond those of attention over selected queries, checked."""

from __future__ import annotations

from torch import Tensor

from .arguments import check_device, check_floating, check_positive
from .errors import KernelArgumentError


def check_extension(
    query: Tensor,
    key: Tensor,
    inv_freq: Tensor,
    group: int,
    window: int,
    trained: int,
    turns: tuple[Tensor, Tensor] | None,
) -> None:
    """Refuse what fits no extension; the rest is checked as for ``attention_rows``."""
    check_floating("inv_freq", inv_freq)
    check_device("inv_freq", inv_freq, query, "query")
    check_positive("group", group)
    check_positive("window", window)
    if trained < 0:
        raise KernelArgumentError.of(
            "trained must not be negative",
            got=trained,
            allowed="the number of tokens up to which nothing changes, 0 for none",
            remedy="pass the length that the model was trained for",
        )
    if inv_freq.dim() != 1 or not 0 < 2 * inv_freq.shape[0] <= query.shape[2]:
        raise KernelArgumentError.of(
            "inv_freq does not fit query",
            got=f"shape {tuple(inv_freq.shape)}",
            allowed=f"[rotary_dim / 2], rotary_dim at most {query.shape[2]}",
            remedy="pass the inv_freq of the model's rotary embedding",
        )
    for name, found in zip(("cos", "sin"), turns or (), strict=False):
        if found.dim() != 2 or found.shape[0] < key.shape[1] or found.shape[1] != 2 * inv_freq.shape[0]:
            raise KernelArgumentError.of(
                f"{name} of turns does not fit",
                got=f"shape {tuple(found.shape)}",
                allowed=f"at least {key.shape[1]} places of {2 * inv_freq.shape[0]} channels",
                remedy="call far_turns with as many places as there are keys",
            )
        check_device(name, found, query, "query")

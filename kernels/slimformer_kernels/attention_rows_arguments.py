"""The arguments of attention over selected queries, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import (
    check_device,
    check_dtype,
    check_floating,
    check_last_stride,
    check_shape,
    debugging,
)
from .errors import KernelArgumentError


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_offsets: Tensor,
    key_ranges: Tensor,
    longest: int,
) -> None:
    """Refuse shapes, dtypes, devices, strides and numbers that do not fit; with debugging on, values too."""
    for name, x, dims, shape in (
        ("query", query, 3, "[queries, heads, head_dim]"),
        ("key", key, 4, "[batch or 1, keys, kv_heads, head_dim]"),
    ):
        check_floating(name, x)
        if x.dim() != dims or 0 in x.shape[1:]:
            raise KernelArgumentError.of(
                f"{name} has the wrong dimensions",
                got=f"shape {tuple(x.shape)}",
                allowed=f"{shape}, at least one key, head and channel",
                remedy="lay the queries of all sequences behind each other and transpose keys and values",
            )
    check_last_stride("query", query)
    for name, x in (("key", key), ("value", value)):
        check_dtype(name, x, query, "query")
        check_device(name, x, query, "query")
        check_last_stride(name, x)
    check_shape("value", value, key.shape, "the shape of key")
    if key.shape[3] != query.shape[2]:
        raise KernelArgumentError.of(
            "the heads of query and key differ in width",
            got=f"{query.shape[2]} and {key.shape[3]}",
            allowed="one head_dim",
            remedy="pass the tensors as the attention layer holds them",
        )
    if query.shape[1] % key.shape[2]:
        raise KernelArgumentError.of(
            "the heads of query must be a multiple of the heads of key",
            got=f"{query.shape[1]} and {key.shape[2]}",
            allowed="heads = group * kv_heads",
            remedy="pass the tensors as the attention layer holds them",
        )
    for name, x in (("positions", positions), ("query_offsets", query_offsets), ("key_ranges", key_ranges)):
        if x.dtype not in (torch.int64, torch.int32):
            raise KernelArgumentError.of(
                f"{name} must hold integers",
                got=x.dtype,
                allowed="int64 or int32",
                remedy=f"call {name}.long()",
            )
        check_device(name, x, query, "query")
    check_shape("positions", positions, (query.shape[0],), "[queries]")
    if key_ranges.dim() != 2 or key_ranges.shape[0] == 0 or key_ranges.shape[1] != 2:
        raise KernelArgumentError.of(
            "key_ranges must hold a start and an end per sequence",
            got=f"shape {tuple(key_ranges.shape)}",
            allowed="[batch, 2], at least one sequence",
            remedy="stack the first index and the one past the last",
        )
    batch = key_ranges.shape[0]
    check_shape("query_offsets", query_offsets, (batch + 1,), "[batch + 1] of key_ranges")
    if key.shape[0] not in (1, batch):
        raise KernelArgumentError.of(
            "key does not fit key_ranges",
            got=f"{key.shape[0]} sequences of keys and {batch} ranges",
            allowed=f"{batch} sequences, or 1 that holds all of them behind each other",
            remedy="pass one range per sequence",
        )
    if longest < 0:
        raise KernelArgumentError.of(
            "longest must not be negative",
            got=longest,
            allowed="an upper bound on the queries of one sequence",
            remedy="pass the number of queries",
        )
    if debugging():
        _check_values(query, key, positions, query_offsets, key_ranges, longest)


def _check_values(
    query: Tensor, key: Tensor, positions: Tensor, query_offsets: Tensor, key_ranges: Tensor, longest: int
) -> None:
    counts = query_offsets.diff()
    if int(query_offsets[0]) != 0 or int(query_offsets[-1]) != query.shape[0] or bool((counts < 0).any()):
        raise KernelArgumentError.of(
            "query_offsets must ascend from 0 to the number of queries",
            got=f"{int(query_offsets[0])} to {int(query_offsets[-1])}",
            allowed=f"0 to {query.shape[0]}",
            remedy="take the cumulated counts of queries, with a zero in front",
        )
    if int(counts.max()) > longest:
        raise KernelArgumentError.of(
            "longest is less than the queries of a sequence",
            got=longest,
            allowed=f"at least {int(counts.max())}",
            remedy="pass an upper bound, the padded length for one",
        )
    if int(key_ranges.min()) < 0 or int(key_ranges.max()) > key.shape[1]:
        raise KernelArgumentError.of(
            "key_ranges points outside key",
            got=f"{int(key_ranges.min())} to {int(key_ranges.max())}",
            allowed=f"0 to {key.shape[1]}",
            remedy="count along dimension 1 of key",
        )
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < key.shape[1]:
        raise KernelArgumentError.of(
            "positions points outside key",
            got=f"{int(positions.min())} to {int(positions.max())}",
            allowed=f"0 to {key.shape[1] - 1}",
            remedy="count along dimension 1 of key",
        )

"""SelfExtend's attention beside plain attention, and beside its construction from two attention calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.frame import tables
from benchmarks.frame.compare import Case, compare, relative_error
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.frame.timing import Effort, Regime
from slimformer_kernels.self_extend import self_extend
from slimformer_kernels.self_extend_reference import far_turns, self_extend_reference, turned_further

KERNEL, FLASH, TWO_PASSES = "SelfExtend", "plain attention, flash", "two passes merged"
PLAIN_DECODE = "plain attention"
# Llama-3.1-8B's heads.
HEADS, KV_HEADS, WIDTH = 32, 8, 128
# Queries, keys, group, window: the published choice for four times a trained length of 8192.
POINTS = ((32768, 32768, 5, 2048), (16384, 16384, 3, 4096), (1, 32768, 5, 2048), (1, 16384, 3, 4096))
_TINY = ((96, 96, 3, 16), (1, 96, 3, 16))
_SAMPLED_QUERIES = 64


@benchmark(
    "self_extend_speed",
    "SelfExtend's attention beside flash attention and two merged passes, prefill and decode",
    on="GPU",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Times of prefill as called; of decode also from a CUDA graph, where launches cost nothing."""
    for queries, keys, group, window in settings.pick(POINTS, _TINY):
        call = Call.of(settings, queries, keys, group, window)
        at: Parameters = {"queries": queries, "keys": keys, "group": group, "window": window}
        cases = {name: call.case(run) for name, run in call.candidates().items()}
        # What plain attention computes is another thing, checked against itself.
        cases[call.plain] = Case(call.plain_attention, call.plain_error, settings.tolerance)
        regimes: tuple[Regime, ...] = ("eager",) if queries > 1 else ("graph", "eager")
        effort = Effort(milliseconds=1500.0 if queries > 1 else 200.0, least=10, most=50)
        yield from compare(settings, at, cases, regime=regimes, baseline=call.plain, effort=effort)


@dataclass
class Call:
    """One call: the last `queries` of `keys` tokens of one text.

    Attributes:
        query: `[queries, heads, head_dim]`.
        key: `[1, kv_heads, keys, head_dim]`, as a cache holds it.
        value: The same.
        given: What else `self_extend` is told.
        tolerance: Largest relative error.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    given: dict[str, Any]
    tolerance: float

    @classmethod
    def of(cls, settings: Settings, queries: int, keys: int, group: int, window: int) -> Call:
        """Random inputs of these sizes."""
        heads, kv_heads, width = settings.pick((HEADS, KV_HEADS, WIDTH), (4, 2, 32))

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=settings.device, dtype=settings.dtype)

        half = torch.arange(width // 2, device=settings.device)
        inv_freq = 1.0 / 5e5 ** (half / (width // 2))
        given = {
            "inv_freq": inv_freq,
            "positions": torch.arange(keys - queries, keys, device=settings.device),
            "query_offsets": torch.tensor([0, queries], device=settings.device),
            "key_ranges": torch.tensor([[0, keys]], device=settings.device),
            "longest": queries,
            "causal": True,
            "scale": width**-0.5,
            "group": group,
            "window": window,
            "trained": 0,
        }
        query, key = normal(queries, heads, width), normal(1, kv_heads, keys, width)
        found = cls(query, key, normal(1, kv_heads, keys, width), given, settings.tolerance)
        # A model keeps them from step to step.
        dtype = torch.float16 if settings.device.type == "cuda" else torch.float32
        given["turns"] = far_turns(inv_freq, group, keys, False, dtype)
        return found

    @property
    def plain(self) -> str:
        """The name of the plain attention that it is compared with."""
        return FLASH if len(self.query) > 1 else PLAIN_DECODE

    def candidates(self) -> dict[str, Callable[[], Tensor]]:
        """The library's call, and what one has without its kernel."""
        return {KERNEL: self.extended, TWO_PASSES: self.two_passes}

    def extended(self) -> Tensor:
        """`self_extend`, `[queries, heads, head_dim]`."""
        return self_extend(self.query, self.key.transpose(1, 2), self.value.transpose(1, 2), **self.given)

    def plain_attention(self) -> Tensor:
        """Ordinary causal attention through PyTorch, by its flash backend where there is one."""
        query = self.query.transpose(0, 1)[None]
        causal = len(self.query) > 1
        if not query.is_cuda:
            return F.scaled_dot_product_attention(
                query, self.key, self.value, is_causal=causal, enable_gqa=True
            )
        if causal:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(
                    query, self.key, self.value, is_causal=True, enable_gqa=True
                )
        # All query heads of a key head as queries of one head: PyTorch's fastest way for a single token.
        packed = query.view(1, self.key.shape[1], -1, query.shape[-1])
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(packed, self.key, self.value)

    def two_passes(self) -> Tensor:
        """Near keys by a sliding window, far ones by causal attention, merged by their log-sum-exp.

        As the public implementation does it, with flash attention twice: the far pass is causal attention of the
        queries from the window on, over all keys but the last window's; it sees for each query the keys that lie at
        least a window behind.
        """
        window, tokens = self.given["window"], len(self.query)
        query = self.query.transpose(0, 1)[None]
        behind, _, far = self._turned()
        far = far.transpose(1, 2)
        behind = behind.transpose(0, 1)[None]
        if tokens == 1:
            cut = self.key.shape[2] - window
            near = _attention(query, self.key[:, :, cut:], self.value[:, :, cut:], False)
            rest = _attention(behind, far[:, :, :cut], self.value[:, :, :cut], False)
            return _merged(near, rest).transpose(1, 2)[0]
        near = _attention(query, self.key, self.value, True, window)
        rest = _attention(behind[:, :, window:], far[:, :, :-window], self.value[:, :, :-window], True)
        both = _merged(tuple(part[:, :, window:] for part in near), rest)
        return torch.cat([near[0][:, :, :window], both], 2).transpose(1, 2)[0]

    def _turned(self) -> tuple[Tensor, Tensor, Tensor]:
        given, key = self.given, self.key.transpose(1, 2)
        where = (given["positions"], given["query_offsets"], given["key_ranges"])
        rules = (*where, given["group"], given["window"], True, False)
        return turned_further(self.query, key, given["inv_freq"], given["turns"], *rules)

    def case(self, run: Callable[[], Tensor]) -> Case:
        """A candidate, compared with the reference in float32 on some of the queries."""
        count = len(self.query)
        sample = torch.arange(0, count, max(count // _SAMPLED_QUERIES, 1), device=self.query.device)

        def check() -> float:
            given = {**self.given, "positions": self.given["positions"][sample]}
            query, key, value = (t.float() for t in (self.query[sample], self.key, self.value))
            key, value = key.transpose(1, 2), value.transpose(1, 2)
            offsets = torch.tensor([0, len(sample)], device=sample.device)
            where = (given["positions"], offsets, given["key_ranges"])
            turns = far_turns(given["inv_freq"], given["group"], key.shape[1], False)
            rules = (*where, given["group"], given["window"], True, False)
            behind, ahead, far = turned_further(query, key, given["inv_freq"], turns, *rules)
            numbers = (*where, len(sample), True, given["scale"], given["window"], 0, None)
            expected = self_extend_reference(query, key, value, behind, ahead, far, *numbers)
            return relative_error(run()[sample], expected)

        return Case(run, check, self.tolerance)

    def plain_error(self) -> float:
        """Of plain attention, on the last queries."""
        keys, last = self.key.shape[2], min(len(self.query), _SAMPLED_QUERIES)
        heads, kv_heads = self.query.shape[1], self.key.shape[1]
        query = self.query[-last:].float().transpose(0, 1).view(kv_heads, heads // kv_heads, last, -1)
        scores = query @ self.key[0, :, None].float().mT * self.given["scale"]
        place = torch.arange(keys, device=query.device)
        scores = scores.masked_fill(place > place[-last:, None], float("-inf"))
        expected = (scores.softmax(-1) @ self.value[0, :, None].float()).view(heads, last, -1)
        got = self.plain_attention()
        return relative_error(got.reshape(heads, len(self.query), -1)[:, -last:], expected)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention `[1, heads, queries, head_dim]`, and the log of each query's sum of weights `[1, heads, queries]`."""
    if query.is_cuda:
        # GQA heads are not copied: the flash operator takes fewer key heads.
        found = torch.ops.aten._flash_attention_forward(
            *(t.transpose(1, 2) for t in (query, key, value)),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            causal,
            False,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )
        return found[0].transpose(1, 2), found[1]
    groups, tokens, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        ahead = torch.arange(keys, device=query.device) - torch.arange(tokens, device=query.device)[:, None]
        hidden = (ahead > 0) | (ahead <= -(window or keys))
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def _merged(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
    """One attention over the keys of both."""
    share = torch.sigmoid(first[1] - second[1]).unsqueeze(-1).to(first[0].dtype)
    return second[0].lerp(first[0], share)


@table("self_extend_speed")
def times(content: dict[str, Any]) -> str:
    """One row per point: times, and SelfExtend's beside each of the others."""
    rows = []
    for at in tables.points(content, "queries", "keys", "group", "window", "regime"):
        plain = tables.find(content, FLASH, **at) or tables.find(content, PLAIN_DECODE, **at)
        own, two = (tables.find(content, name, **at) for name in (KERNEL, TWO_PASSES))
        kind = f"decode, {at['keys']} keys" if at["queries"] == 1 else f"prefill, {at['keys']} tokens"
        kind += ", CUDA graph" if at["regime"] == "graph" else ""
        cells = [kind, f"{at['group']}, {at['window']}", *map(tables.milliseconds, (plain, two, own))]
        both = [one["milliseconds"]["p50"] for one in (two, own) if one is not None]
        faster = both[0] / both[1] if len(both) == 2 else None
        rows.append([*cells, tables.ratio(own, "baseline_ratio"), tables.shown(faster, unit="×")])
    head = ["32 query and 8 key heads of 128, bfloat16", "G, w", "plain attention, ms", "two passes, ms"]
    head += ["SelfExtend, ms", "of plain attention", "faster than two passes"]
    return tables.markdown(head, rows)

"""Which of PyTorch's exact attention backends is fastest for a shape, and what PyTorch itself picks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import repeat_kv

from benchmarks.frame import tables
from benchmarks.frame.compare import Case, Medians, Unsupported, compare, relative_error, release
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters, reason
from benchmarks.frame.timing import Effort, Regime

# Each backend's switch. With all of them on, PyTorch chooses.
SWITCHES = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "cuDNN": torch.backends.cuda.enable_cudnn_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}
DEFAULT = "default"
# The math backend holds the scores of every head, in more than one copy.
_MATH_BYTES = 16 << 30
# Below this many scores, launching costs as much as computing.
_SMALL = 64 << 20
_SAMPLED_QUERIES = 64


@dataclass(frozen=True)
class Shape:
    """One call: `kind` is "prefill" (causal), "encoder" (every token sees all) or "decode" (one query token)."""

    kind: str
    batch: int
    queries: int
    keys: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def causal(self) -> bool:
        """Whether a query sees only the keys up to its own."""
        return self.kind == "prefill"


def _prefill(tokens: int, batch: int = 1) -> Shape:
    return Shape("prefill", batch, tokens, tokens)


def _bert(tokens: int, batch: int) -> Shape:
    return Shape("encoder", batch, tokens, tokens, heads=12, kv_heads=12, head_dim=64)


# Each with the question whether keys are padded: by a boolean mask, as transformers makes it.
POINTS = (
    *((_prefill(tokens), False) for tokens in (1024, 2048, 4096, 8192, 16384, 32768)),
    *((_prefill(tokens, batch=2), True) for tokens in (1024, 4096, 16384)),
    *((_bert(*sizes), padded) for sizes in ((128, 64), (512, 32), (2048, 8)) for padded in (False, True)),
    *((Shape("decode", b, 1, k), padded) for b in (1, 16) for k in (2048, 16384) for padded in (False, True)),
)
_TINY = (
    *(
        (Shape(kind, 2, 24, 24, 4, 2, 8), padded)
        for kind in ("prefill", "encoder")
        for padded in (False, True)
    ),
    *((Shape("decode", 2, 1, 24, 4, 2, 8), padded) for padded in (False, True)),
)


@benchmark(
    "attention_backends",
    "flash, cuDNN, efficient and math attention per shape: prefill, encoder, decode, with padding",
    on="GPU",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Every shape with every backend and layout of the key heads."""
    try:
        for shape, padded in settings.pick(POINTS, _TINY):
            yield from _measure(settings, shape, padded)
            release()
    finally:
        _switch(DEFAULT)


def _measure(settings: Settings, shape: Shape, padded: bool) -> Iterator[Measurement]:
    call = Call(settings, shape, padded)
    parameters: Parameters = {
        "kind": shape.kind,
        "batch": shape.batch,
        "queries": shape.queries,
        "keys": shape.keys,
        "heads": f"{shape.heads}/{shape.kv_heads} x {shape.head_dim}",
        "padded": padded,
    }
    # What transformers calls: with a mask, it expands the key heads itself.
    layout = "expanded" if padded and call.grouped else call.layouts[0]
    scores = shape.batch * shape.heads * shape.queries * shape.keys
    regimes: tuple[Regime, ...] = ("eager", "graph", "in a row") if scores <= _SMALL else ("eager",)
    yield from compare(
        settings,
        parameters,
        call.cases(),
        regime=regimes,
        baseline=f"{DEFAULT}, {layout}",
        values=partial(_rates, shape),
        effort=Effort(milliseconds=600.0, least=8, most=50),
    )


class Call:
    """Random inputs of one shape, and the exact result for some of the queries."""

    def __init__(self, settings: Settings, shape: Shape, padded: bool):
        def random(heads: int, tokens: int) -> Tensor:
            size = (shape.batch, heads, tokens, shape.head_dim)
            return torch.randn(size, device=settings.device, dtype=settings.dtype)

        self.shape, self.tolerance = shape, settings.tolerance
        self.q = random(shape.heads, shape.queries)
        self.k, self.v = random(shape.kv_heads, shape.keys), random(shape.kv_heads, shape.keys)
        self.mask = _mask(shape, settings.device) if padded else None
        self.grouped = shape.heads != shape.kv_heads
        # Packed: the query heads of a group become queries of one head, exact for a single token.
        self.layouts = ["gqa", "expanded", *(["packed"] if shape.queries == 1 else [])]
        if not self.grouped:
            self.layouts = ["plain"]
        # Queries from the last half: no padding there.
        first = shape.queries // 2
        step = max((shape.queries - first) // _SAMPLED_QUERIES, 1)
        self.sample = torch.arange(first, shape.queries, step, device=settings.device)
        self.expected = self._reference()

    def cases(self) -> dict[str, Case]:
        """Every backend with every layout."""
        return {
            f"{backend}, {layout}": self._case(backend, layout)
            for layout in self.layouts
            for backend in (DEFAULT, *SWITCHES)
        }

    def _case(self, backend: str, layout: str) -> Case:
        def check() -> float:
            shape = self.shape
            held = 3 * 4 * shape.batch * shape.heads * shape.queries * shape.keys
            if backend == "math" and held > _MATH_BYTES:
                raise Unsupported(f"would hold {held / 2**30:.0f} GiB of scores")
            _switch(backend)
            try:
                with warnings.catch_warnings():
                    # PyTorch warns once per reason why a backend does not apply.
                    warnings.simplefilter("ignore")
                    out = self.attend(layout)
            except torch.OutOfMemoryError as failure:
                raise Unsupported("out of memory") from failure
            except RuntimeError as failure:
                # A backend that is forced refuses in many words; PyTorch's own choice must not fail.
                if backend == DEFAULT:
                    raise
                raise Unsupported(reason(failure)) from failure
            return relative_error(out[:, :, self.sample], self.expected)

        # Switched outside the time: which way a caller picks a backend is not what is measured.
        return Case(partial(self.attend, layout), check, self.tolerance, partial(_switch, backend))

    def attend(self, layout: str) -> Tensor:
        """The call as transformers makes it, in one of the layouts."""
        shape, k, v = self.shape, self.k, self.v
        causal = shape.causal and self.mask is None
        if layout == "packed":
            grouped = self.q.view(shape.batch, shape.kv_heads, -1, shape.head_dim)
            return F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.mask).view_as(self.q)
        if layout == "expanded":
            k, v = (repeat_kv(t, shape.heads // shape.kv_heads) for t in (k, v))
        return F.scaled_dot_product_attention(
            self.q, k, v, attn_mask=self.mask, is_causal=causal, enable_gqa=layout == "gqa"
        )

    def _reference(self) -> Tensor:
        """Attention in float32 for the sampled queries, without a copy of the keys per query head."""
        shape, sampled = self.shape, len(self.sample)
        q = self.q[:, :, self.sample].float()
        q = q.view(shape.batch, shape.kv_heads, -1, sampled, shape.head_dim)
        scores = q @ self.k.float().unsqueeze(2).transpose(-1, -2) / math.sqrt(shape.head_dim)
        if self.mask is not None:
            rows = self.mask.expand(-1, -1, shape.queries, -1)[:, :, self.sample]
            scores = scores.masked_fill(~rows.unsqueeze(2), -math.inf)
        elif shape.causal:
            future = torch.arange(shape.keys, device=q.device) > self.sample[:, None]
            scores = scores.masked_fill(future, -math.inf)
        out = scores.softmax(-1) @ self.v.float().unsqueeze(2)
        return out.reshape(shape.batch, shape.heads, sampled, shape.head_dim)


def _mask(shape: Shape, device: torch.device) -> Tensor:
    """`[batch, 1, queries, keys]`: encoders are padded at the end, decoders at the start."""
    position = torch.arange(shape.keys, device=device)
    # Up to three eighths of a row are padding; every fourth row has none.
    padding = torch.arange(1, shape.batch + 1, device=device) % 4 * shape.keys // 8
    real = position >= padding[:, None]
    if shape.kind == "encoder":
        real = real.flip(1)
    mask = real[:, None, None, :].expand(-1, 1, shape.queries, -1)
    return mask & (position <= position[:, None]) if shape.causal else mask


def _switch(backend: str) -> None:
    """Leave only one backend to PyTorch, or all."""
    for name, switch in SWITCHES.items():
        switch(backend in (name, DEFAULT))


def _rates(shape: Shape, medians: Medians) -> dict[str, dict[str, float]]:
    """Arithmetic rate of a prefill or encoder, and for decode the rate at which keys and values are read."""
    if shape.kind == "decode":
        read = 2 * 2 * shape.batch * shape.kv_heads * shape.keys * shape.head_dim
        return {name: {"tb_per_s": read / time / 1e9} for name, time in medians.items()}
    products = 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.head_dim
    work = products / 2 if shape.causal else products
    return {name: {"tflop_per_s": work / time / 1e9} for name, time in medians.items()}


@table("attention_backends")
def fastest(content: dict[str, Any]) -> str:
    """The fastest backend per shape beside PyTorch's own choice."""
    names = ("kind", "batch", "queries", "keys", "heads", "padded", "regime")
    rows = []
    for at in tables.points(content, *names, where=lambda at: at["regime"] != "in a row"):
        timed = {
            m["candidate"]: m["milliseconds"]["p50"]
            for m in content["measurements"]
            if m["parameters"] == at and m["milliseconds"] is not None
        }
        if not timed:
            continue
        best = min(timed, key=lambda name: timed[name])
        own = min(
            (name for name in timed if name.startswith(DEFAULT)), key=lambda name: timed[name], default=None
        )
        size = f"{at['queries']}" if at["queries"] == at["keys"] else f"{at['queries']} × {at['keys']}"
        label = f"{at['kind']}{', padded' if at['padded'] else ''}, {at['batch']} × {size} tokens"
        row = [f"{label}, heads {at['heads']}, {at['regime']}", f"{best}: {tables.number(timed[best])}"]
        row.append("–" if own is None else f"{own}: {tables.number(timed[own])}")
        rows.append([*row, tables.shown(own and timed[own] / timed[best], unit="×")])
    return tables.markdown(["Attention", "fastest, ms", "PyTorch's best choice, ms", "gain"], rows)

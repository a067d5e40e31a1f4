"""The MLP sublayer computed for a part of the rows, against its ideal, HuggingFace's and eager indexing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from benchmarks.frame import tables
from benchmarks.frame.compare import Case, Medians, compare, relative_error, release
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.frame.timing import Regime
from slimformer_kernels import add_rows_, rms_norm_rows, swiglu, swiglu_packed

# Hidden and intermediate size.
SHAPES = {"Llama-3.1-8B": (4096, 14336), "Qwen2.5-1.5B": (1536, 8960), "SmolLM2-135M": (576, 1536)}
TOKENS = (16384, 4096, 1024)
KEEPS = (1.0, 0.75, 0.5, 0.25, 0.1)
# Row counts that fill whole tiles of a cuBLAS product.
_TILE = 128
_EPS = 1e-5
_CHUNK = 4096

HF = "HF dense"
EAGER = "HF on index_select rows"
ONE = "rows, one gate_up"
APART = "rows, gate and up apart"
ROUNDED = "rows rounded to 128, one gate_up"
DENSE_ONE = "own dense, one gate_up"
DENSE_APART = "own dense, gate and up apart"
DENSE_IN_PLACE = "own dense, residual in the down product"


@benchmark(
    "mlp_rows",
    "MLP sublayer at 100 to 10% of the rows against keep x dense, HuggingFace and index_select",
    on="GPU",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Every shape, token count and keep ratio, as launched and from a CUDA graph."""
    shapes = settings.pick(SHAPES, {"tiny": (32, 48)})
    for shape, (hidden, intermediate) in shapes.items():
        for tokens in settings.pick(TOKENS, (300,)):
            sublayer = Sublayer(settings, tokens, hidden, intermediate)
            # Where launching takes longer than the work, what counts is how fast launches follow each other.
            small = tokens * hidden <= 1024 * 4096
            regimes: tuple[Regime, ...] = ("eager", "graph", "in a row") if small else ("eager", "graph")
            for keep in KEEPS:
                parameters: Parameters = {"shape": shape, "tokens": tokens, "keep": keep}
                yield from sublayer.measure(settings, parameters, keep, regimes)
                # Graphs hold their memory until the cache is emptied.
                release()


class Sublayer:
    """Weights, a residual stream, and the sublayer's result in float32."""

    def __init__(self, settings: Settings, tokens: int, hidden: int, intermediate: int):
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=settings.device, dtype=settings.dtype)

        self.start, self.x = random(tokens, hidden), random(tokens, hidden)
        self.weight = 1 + 0.1 * random(hidden)
        self.gate_up, self.down = 0.02 * random(2 * intermediate, hidden), 0.02 * random(hidden, intermediate)
        self.gate, self.up = self.gate_up.chunk(2)
        with torch.device("meta"):
            self.mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate))
            self.norm = LlamaRMSNorm(hidden, eps=_EPS)
        for module, value in (
            (self.mlp.gate_proj, self.gate),
            (self.mlp.up_proj, self.up),
            (self.mlp.down_proj, self.down),
            (self.norm, self.weight),
        ):
            module.weight = nn.Parameter(value, requires_grad=False)
        self.expected = torch.cat([self._reference(part) for part in self.start.split(_CHUNK)])

    def _reference(self, x: Tensor) -> Tensor:
        wide = x.float()
        h = F.rms_norm(wide, wide.shape[1:], self.weight.float(), _EPS)
        gate, up = F.linear(h, self.gate_up.float()).chunk(2, dim=-1)
        return wide + F.linear(F.silu(gate) * up, self.down.float())

    def own(self, rows: Tensor | None, *, packed: bool) -> None:
        """The sublayer as the executor computes it."""
        h = rms_norm_rows(self.x, rows, self.weight, _EPS)
        if packed:
            active = swiglu_packed(F.linear(h, self.gate_up))
        else:
            active = swiglu(F.linear(h, self.gate), F.linear(h, self.up))
        add_rows_(self.x, rows, F.linear(active, self.down))

    def own_in_place(self) -> None:
        """All rows, with the residual added inside the down product: one pass over the residual less."""
        h = rms_norm_rows(self.x, None, self.weight, _EPS)
        self.x.addmm_(swiglu_packed(F.linear(h, self.gate_up)), self.down.T)

    def hf(self) -> Tensor:
        """What HuggingFace's layer does."""
        return self.x + self.mlp(self.norm(self.x))

    def eager(self, rows: Tensor) -> None:
        """What eager code does to compute some rows with HuggingFace's modules."""
        kept = self.x.index_select(0, rows)
        self.x.index_copy_(0, rows, kept + self.mlp(self.norm(kept)))

    def case(self, settings: Settings, call: Callable[[], Tensor | None], rows: Tensor | None) -> Case:
        """A candidate that changes the rows of `x`, or returns a new one."""

        def check() -> float:
            self.x.copy_(self.start)
            out = call()
            got = self.x if out is None else out
            if rows is None:
                return relative_error(got, self.expected)
            others = torch.ones(len(got), dtype=torch.bool, device=got.device).index_fill_(0, rows, False)
            if not torch.equal(got[others], self.start[others]):
                return float("inf")
            return relative_error(got[rows], self.expected[rows])

        return Case(call, check, settings.tolerance)

    def measure(
        self, settings: Settings, parameters: Parameters, keep: float, regimes: Sequence[Regime]
    ) -> Iterator[Measurement]:
        """All candidates at one keep ratio, beside both dense versions."""
        tokens = len(self.x)
        count = round(keep * tokens)
        whole = min(max(round(count / _TILE), 1) * _TILE, tokens)
        calls: dict[str, tuple[Callable[[], Tensor | None], Tensor | None]] = {
            HF: (self.hf, None),
            DENSE_ONE: (lambda: self.own(None, packed=True), None),
            DENSE_APART: (lambda: self.own(None, packed=False), None),
        }
        if count == tokens:
            calls[DENSE_IN_PLACE] = (self.own_in_place, None)
        else:
            rows = random_rows(tokens, count, settings.device)
            calls[EAGER] = (lambda: self.eager(rows), rows)
            calls[ONE] = (lambda: self.own(rows, packed=True), rows)
            calls[APART] = (lambda: self.own(rows, packed=False), rows)
            if whole != count:
                tiles = random_rows(tokens, whole, settings.device)
                calls[ROUNDED] = (lambda: self.own(tiles, packed=True), tiles)
        cases = {name: self.case(settings, call, of) for name, (call, of) in calls.items()}
        fractions = {name: len(of) / tokens for name, (_, of) in calls.items() if of is not None}
        dense = {EAGER: HF, ONE: DENSE_ONE, APART: DENSE_APART, ROUNDED: DENSE_ONE}

        def ideal(name: str, medians: Medians) -> float | None:
            own = medians.get(dense.get(name, ""))
            return None if own is None else fractions[name] * own

        def values(medians: Medians) -> dict[str, dict[str, float]]:
            return {name: {"rows": fraction * tokens} for name, fraction in fractions.items()}

        yield from compare(
            settings, parameters, cases, regime=regimes, baseline=HF, ideal=ideal, values=values
        )


def random_rows(tokens: int, count: int, device: torch.device) -> Tensor:
    """`count` of `tokens` row indices, sorted and unique."""
    return torch.randperm(tokens)[:count].sort().values.to(device)


@table("mlp_rows")
def ratios(content: dict[str, Any]) -> str:
    """Ratio to keep x dense, in brackets the eager code's ratio to keep x HuggingFace's dense time."""
    rows = []
    for at in tables.points(content, "shape", "tokens", "regime", where=lambda at: at["regime"] == "eager"):
        hf, own = (tables.find(content, name, keep=1.0, **at) for name in (HF, DENSE_ONE))
        cells = [f"{at['shape']}, {at['tokens']} tokens", *map(tables.milliseconds, (hf, own))]
        for keep in KEEPS[1:]:
            found = (tables.find(content, name, keep=keep, **at) for name in (ONE, EAGER))
            ours, eager = (tables.ratio(one, "ideal_ratio") for one in found)
            cells.append(f"{ours} [{eager}]")
        rows.append([*cells, tables.gain(tables.find(content, ONE, keep=0.5, **at))])
    head = ["MLP sublayer", "HF dense, ms", "own dense, ms", *(f"{keep:.0%}" for keep in KEEPS[1:])]
    return tables.markdown([*head, "50% against HF dense"], rows)

"""Whether an attention module computes what its projections say, so that its layers can be run for chosen rows.

It is compared with its own `forward` in every way in which it is run later: for all rows, for chosen ones, for those
that are left when others have gone, and behind a cache; with padding at either end, and far behind the length that the
model was trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from slimformer.cache.slots import CACHE_NAMES
from slimformer.model.anatomy import positional_names
from slimformer.model.probes import LOUD, Failure, error, float32_copy, in_dtype, noise, tolerance
from slimformer.model.projections import ROTATIONS, Projections, Rotation, match_projections
from slimformer.rows.attention import RowAttention
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream

# What a row attention accounts for among the arguments of an attention module.
_KNOWN = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "cache_position",
    "use_cache",
    "output_attentions",
    *CACHE_NAMES,
}
# Tokens of a call that come behind those that its cache holds.
_STEPS = 3
# The spread of attention scores under which weights are neither flat nor all at one key.
_SHARP = 3.0
_CHOSEN = "chosen rows"


@dataclass(frozen=True)
class AttentionCall:
    """What an attention module got in one short call.

    Attributes:
        arguments: Its arguments beside the residual.
        text: Which tokens are text, bool `[batch, tokens]`.
        what: The call in words.
    """

    arguments: dict[str, Any]
    text: Tensor
    what: str


@dataclass(frozen=True)
class AttentionFinding:
    """What an examination found.

    Attributes:
        projections: Where the module keeps its projections; None if its rows cannot be computed apart.
        rotation: Which channels rotation pairs, if there is any.
        causal: Whether queries see the past alone.
        reason: Why rows cannot be computed apart.
    """

    projections: Projections | None = None
    rotation: Rotation = "halves"
    causal: bool = True
    reason: str = ""

    def on(self, core: nn.Module) -> RowAttention | None:
        """The row attention of a module that is like the examined one."""
        if self.projections is None:
            return None
        return RowAttention(core, self.projections, self.rotation)


@torch.no_grad()
def examine(core: nn.Module, calls: Sequence[AttentionCall], causal: bool) -> AttentionFinding:
    """Find how an attention module can be run for chosen rows.

    Args:
        core: The module that calls the attention function.
        calls: What it got in short calls.
        causal: Whether the model is a decoder.
    """
    projections = match_projections(core)
    if projections is None:
        children = ", ".join(sorted(name for name, _ in core.named_children())) or "no children"
        return AttentionFinding(
            reason=f"{type(core).__name__} has projections that are not known: {children}"
        )
    unknown = _unaccounted(core, projections, calls)
    if unknown:
        return AttentionFinding(
            reason=f"{type(core).__name__} has {unknown}, which nothing here accounts for"
        )
    if any(p.is_meta for p in core.parameters()) or hasattr(core, "_hf_hook"):
        return AttentionFinding(reason="its weights are not in memory all the time")
    trial = float32_copy(core)
    trial = core if trial is None else trial
    reason = ""
    rotated = any(call.arguments.get("position_embeddings") is not None for call in calls)
    for sees in (causal, not causal):
        for rotation in ROTATIONS if rotated else ROTATIONS[:1]:
            finding = AttentionFinding(projections, rotation, sees)
            try:
                failed = _differs(trial, finding, calls)
            except Failure as failure:
                # Another layout of the same names: the module keeps its own forward, for all tokens.
                failed = f"{type(failure).__name__}: {failure}"
            if failed is None:
                return finding
            reason = reason or failed
    reason = f"{type(core).__name__} computes something else than its projections say: {reason}"
    return AttentionFinding(reason=reason)


def _unaccounted(core: nn.Module, projections: Projections, calls: Sequence[AttentionCall]) -> str:
    """Parameters, buffers and arguments of a module that a row attention would leave out, in words."""
    own = [name for name, value in (*core._parameters.items(), *core._buffers.items()) if value is not None]
    if own:
        return f"the parameters or buffers {', '.join(own)}"
    given = {
        name
        for call in calls
        for name, value in call.arguments.items()
        if value is not None and value is not False
    }
    known = {*_KNOWN, projections.bias}
    arguments = sorted(name for name in given if name not in known and name in positional_names(core))
    return f"the arguments {', '.join(arguments)}" if arguments else ""


def _absent(value: Any) -> bool:
    return value is None or value is False


def _differs(core: nn.Module, finding: AttentionFinding, calls: Sequence[AttentionCall]) -> str | None:
    """The first way of computing rows that gives something else than the module, in words; None if none does."""
    attention, chose = finding.on(core), False
    weight = next(core.parameters())
    if attention is None:
        return "no projections"
    for number, call in enumerate(calls):
        arguments = {name: in_dtype(value, weight) for name, value in call.arguments.items()}
        batch, tokens = call.text.shape
        width = _width(core, finding)
        h = noise((batch, tokens, width), weight, seed=number)
        h = h * _sharpness(attention, h, finding.causal, arguments)
        loud = number == 0
        for scale in (1.0, LOUD) if loud else (1.0,):
            trial = _Trial(core, attention, finding.causal, h * scale, arguments, call.text)
            for way, run in trial.ways() if scale == 1.0 else (("all rows", trial.whole),):
                found = run()
                chose = chose or (way == _CHOSEN and found is not None)
                if found is not None and not found <= tolerance(h):
                    return f"relative difference {found:.2g} for {way} of {call.what}"
    return None if chose else "its masks say more than padding, causality and its window explain"


def _width(core: nn.Module, finding: AttentionFinding) -> int:
    query = getattr(core, finding.projections.query if finding.projections else "")
    width = getattr(query, "in_features", None)
    if width is None:
        # GPT-2's layers hold their weights the other way round.
        width = query.weight.shape[0] if hasattr(query, "nf") else query.weight.shape[1]
    return int(width)


def _sharpness(attention: RowAttention, h: Tensor, causal: bool, arguments: dict[str, Any]) -> float:
    """The factor on inputs under which attention scores spread as they should; 1 where norms undo any factor."""

    def spread(x: Tensor) -> float:
        stream = Stream.of(x, causal, arguments)
        q, k = attention.queries_and_keys(x.flatten(0, 1), stream)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * attention.scale
        return float(scores.float().std())

    alone = spread(h)
    if not 0.0 < alone < float("inf") or spread(h * 2.0) < 2.0 * alone:
        return 1.0
    return min(max((_SHARP / alone) ** 0.5, 1e-2), 1e3)


@dataclass
class _Trial:
    """One input, and the ways in which its rows are computed."""

    core: nn.Module
    attention: RowAttention
    causal: bool
    h: Tensor
    arguments: dict[str, Any]
    text: Tensor

    def ways(self) -> Iterator[tuple[str, Callable[[], float | None]]]:
        yield "all rows", self.whole
        yield _CHOSEN, self.chosen
        yield "rows that are left", self.left
        if self.causal and any(name in CACHE_NAMES for name in positional_names(self.core)):
            yield "rows behind a cache", self.cached

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def _own(self, h: Tensor, arguments: dict[str, Any]) -> Tensor:
        output = self.core(h, **arguments)
        return self._flat(output[0] if isinstance(output, tuple) else output)

    def _stream(self, h: Tensor, arguments: dict[str, Any]) -> Stream:
        return Stream(h.shape[0], h.shape[1], self.causal, h.device, arguments=arguments)

    def whole(self) -> float:
        expected = self._own(self.h, self.arguments)
        actual, _ = self.attention.whole(
            self._flat(self.h), self._stream(self.h, self.arguments), dict(self.arguments), kernels=False
        )
        rows = self.text.flatten()
        return error(actual[rows], expected[rows])

    def _some(self) -> Tensor:
        """Every text token but each third."""
        rows = self.text.flatten().clone()
        rows[1::3] = False
        return rows

    def _staying(self) -> Tensor:
        """What is left of the texts: under a window, which counts what is left, only first tokens have gone."""
        if self.attention.window is None:
            return self._some()
        return (self.text & (self.text.cumsum(1) > 2)).flatten()

    def chosen(self) -> float | None:
        stream = self._stream(self.h, self.arguments)
        if not self.attention.can_choose_rows(stream, self.arguments):
            return None
        mask = self._some()
        rows, flat = Rows(mask.numel(), given_mask=mask), self._flat(self.h)
        actual = self.attention.chosen(
            flat.index_select(0, rows.index), flat, rows, stream, dict(self.arguments), kernels=False
        )
        return error(actual, self._own(self.h, self.arguments)[mask])

    def left(self) -> float | None:
        stream = self._stream(self.h, self.arguments)
        if not self.attention.can_choose_rows(stream, self.arguments):
            return None
        mask, flat = self._staying(), self._flat(self.h)
        stream, x = stream.without(Rows(mask.numel(), given_mask=mask), flat)
        actual = self.attention.chosen(x, x, None, stream, dict(self.arguments), kernels=False)
        hidden = self._mask_without(~mask.view_as(self.text))
        return error(actual, self._own(self.h, {**self.arguments, "attention_mask": hidden})[mask])

    def _mask_without(self, gone: Tensor) -> Tensor:
        """The call's mask with keys hidden for all but themselves, in additions, `[batch, 1, tokens, tokens]`."""
        mask, (batch, tokens) = self.arguments.get("attention_mask"), gone.shape
        place = torch.arange(tokens, device=gone.device)
        if isinstance(mask, Tensor) and mask.dim() == 4:
            allowed = mask.expand(batch, 1, tokens, tokens)
            allowed = allowed if allowed.dtype == torch.bool else allowed == 0
        else:
            distance = place[:, None] - place
            allowed = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            if self.attention.window is not None:
                allowed = allowed & (distance.abs() < self.attention.window)
            allowed = allowed.expand(batch, 1, tokens, tokens)
            if isinstance(mask, Tensor):
                allowed = allowed & mask.bool()[:, None, None, :]
        allowed = allowed & ~gone[:, None, None, :]
        # A row that sees nothing would be NaN, and nobody reads it.
        allowed = allowed | (place[:, None] == place) & gone[:, None, :, None]
        lowest = torch.finfo(self.h.dtype).min
        return torch.zeros(allowed.shape, dtype=self.h.dtype, device=gone.device).masked_fill(
            ~allowed, lowest
        )

    def cached(self) -> float | None:
        tokens = self.h.shape[1]
        first, names = tokens - _STEPS, positional_names(self.core)
        name = next(name for name in CACHE_NAMES if name in names)
        caches = [DynamicCache(), DynamicCache()]
        found: list[float] = []
        for begin, end in ((0, first), (first, tokens)):
            h = self.h[:, begin:end].contiguous()
            part = {key: _cut(value, begin, end, tokens) for key, value in self.arguments.items()}
            if part.get("attention_mask") is None and begin:
                # The model makes no mask for a prompt; for several tokens behind a cache it does.
                part["attention_mask"] = self._mask_without(torch.zeros_like(self.text))[
                    :, :, begin:end, :end
                ]
            own = self._own(h, {**part, name: caches[0]})
            actual, _ = self.attention.whole(
                self._flat(h), self._stream(h, part), {**part, name: caches[1]}, kernels=False
            )
            rows = self.text[:, begin:end].flatten()
            found.append(error(actual[rows], own[rows]))
        return max(found)


def _cut(value: Any, begin: int, end: int, tokens: int) -> Any:
    """An argument of the call, for its tokens from `begin` to `end` behind a cache of those before."""
    if isinstance(value, tuple):
        return tuple(_cut(part, begin, end, tokens) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 4 and value.shape[2:] == (tokens, tokens):
        return value[:, :, begin:end, :end]
    if value.dim() == 4 and value.shape[3] == tokens:
        return value[..., :end]
    if value.dim() >= 2 and value.shape[1] == tokens:
        return value[:, begin:end]
    return value

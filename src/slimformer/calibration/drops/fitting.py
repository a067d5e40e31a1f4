"""Fit what dropped sublayers leave behind: ridge regression in closed form, from sums over one pass of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slimformer.calibration.drops.replay import (
    Call,
    Dropped,
    Fitted,
    Sublayer,
    executors,
    filter_window,
    run_layer,
)
from slimformer.decisions.replacements import Replace, taps_of
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.runtime.layer import LayerExecutor

# Half towards what the sublayer itself would add, half towards the dense model's residual, which also takes back what
# earlier removals have shifted. SmolLM2-135M, WikiText-2 perplexity with 8 and 12 of 30 attentions removed, 4 taps:
# 30.7 and 37.5 at 0, 30.5 and 36.6 at 0.5, 30.7 and 37.4 at 1.
CORRECTION = 0.5
# Of the mean of the diagonal. Ten times more or less changes the third digit of those perplexities.
RIDGE = 1e-3
# Where a residual is nothing at all, as of padding.
_LEAST = 1e-6


class RidgeSums:
    """Sums from which a mean or a filter is solved; their size does not depend on the text.

    Args:
        hidden: Size of the residual.
        taps: How many inputs the filter reads; 0 for a mean.
        device: Where the sums are kept.
    """

    def __init__(self, hidden: int, taps: int, device: torch.device) -> None:
        # float64 throughout; CPUs multiply in float32 and add up in float64, which is four times as fast there.
        self.taps, self.device = taps, device if device.type == "cuda" else torch.device("cpu")
        self.multiply = torch.float64 if device.type == "cuda" else torch.float32
        size = taps * hidden + 1
        self.inputs = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        self.targets = torch.zeros(size, hidden, dtype=torch.float64, device=self.device)

    def add(self, window: Tensor, target: Tensor, real: Tensor | None, weight: Tensor | None = None) -> None:
        """Add one batch: `window` `[batch, taps - 1 + tokens, hidden]`, `target` `[batch, tokens, hidden]`, and how
        much the square of each token's error counts `[batch, tokens]`; None for all alike."""
        tokens = target.shape[1]
        read = [window[:, index : index + tokens] for index in range(self.taps)]
        features = torch.cat([*read, torch.ones_like(target[..., :1])], dim=-1)
        if real is not None:
            features, target, weight = features[real], target[real], None if weight is None else weight[real]
        rows, aims = (t.flatten(0, -2).to(self.device, self.multiply) for t in (features, target))
        if weight is not None:
            scale = weight.flatten().to(rows).sqrt()[:, None]
            rows, aims = rows * scale, aims * scale
        self.inputs += rows.T @ rows
        self.targets += rows.T @ aims

    def solve(self, causal: bool, like: Tensor, ridge: float = RIDGE) -> Fitted:
        """The mean or the filter, in the dtype and on the device of `like`; `ridge` is of the mean of the diagonal."""
        if self.taps == 0:
            return Fitted((self.targets[-1] / self.inputs[-1, -1]).to(like), None, 1, causal)
        diagonal = self.inputs.diagonal()
        penalty = ridge * diagonal[:-1].mean().clamp_min(torch.finfo(torch.float32).tiny)
        regular = self.inputs.clone()
        regular.diagonal()[:-1] += penalty  # the bias is free
        solution = torch.linalg.solve(regular, self.targets)
        return Fitted(solution[-1].to(like), solution[:-1].T.contiguous().to(like), self.taps, causal)


@torch.no_grad()
def fit_together(
    anatomy: Anatomy, calls: Sequence[Call], sublayers: Sequence[Sublayer], replace: Replace, taps: int
) -> Dropped:
    """Fit the replacements of all `sublayers`, from the bottom up, each on what it will read once those below it are
    in place.

    The dense model runs beside the slim one, layer by layer, since `CORRECTION` aims at its residual.
    """
    if replace == "nothing":
        return dict.fromkeys(sublayers)
    fitted: Dropped = {}
    dense_states = [call.hidden for call in calls]
    slim_states = dense_states
    for index, layer in enumerate(executors(anatomy, {})):
        kinds = [kind for kind in KINDS if (kind, index) in sublayers]
        if not kinds:
            same = slim_states is dense_states
            dense_states = _advance(layer, calls, dense_states, index)
            slim_states = dense_states if same else _advance(layer, calls, slim_states, index)
            continue
        # Parallel sublayers read the same residual, and a shift of it must not be taken back twice.
        correction = 0.0 if layer.parallel else CORRECTION
        dense_read, slim_read = dense_states, slim_states
        for kind in KINDS:
            dense_added = _added(layer, kind, calls, dense_read, index)
            same = slim_read is dense_read
            slim_added = dense_added if same else _added(layer, kind, calls, slim_read, index)
            dense_states = _plus(dense_states, dense_added)
            if kind in kinds:
                targets = [
                    correction * (dense - slim) + (1 - correction) * own
                    for dense, slim, own in zip(dense_states, slim_states, slim_added, strict=True)
                ]
                replacement = _solve(
                    layer, kind, calls, slim_read, targets, dense_states, index, replace, taps, anatomy.causal
                )
                fitted[kind, index] = replacement
                slim_added = [
                    replacement(state, layer.normed(kind, state), call.arguments[index]).expand_as(state)
                    for call, state in zip(calls, slim_read, strict=True)
                ]
            slim_states = _plus(slim_states, slim_added)
            if not layer.parallel:
                dense_read, slim_read = dense_states, slim_states
    return fitted


@torch.no_grad()
def fit_each(
    anatomy: Anatomy,
    calls: Sequence[Call],
    candidates: Sequence[Sublayer],
    dropped: Mapping[Sublayer, Fitted | None],
    replace: Replace,
    taps: int,
) -> Dropped:
    """Fit the replacement of every candidate as if it alone joined those that are `dropped` already, in one pass."""
    if replace == "nothing":
        return dict.fromkeys(candidates)
    fitted: Dropped = {}
    states = [call.hidden for call in calls]
    dense = executors(anatomy, {})
    for index, layer in enumerate(executors(anatomy, dropped)):
        if ("attention", index) in candidates:
            own = _added(dense[index], "attention", calls, states, index)
            after = _plus(states, own)
            fitted["attention", index] = _solve(
                dense[index], "attention", calls, states, own, after, index, replace, taps, anatomy.causal
            )
        if ("mlp", index) in candidates:
            read = states
            if not layer.parallel:
                read = _plus(states, _added(layer, "attention", calls, states, index))
            own = _added(dense[index], "mlp", calls, read, index)
            after = _plus(read, own)
            fitted["mlp", index] = _solve(
                dense[index], "mlp", calls, read, own, after, index, replace, taps, anatomy.causal
            )
        states = _advance(layer, calls, states, index)
    return fitted


def _solve(
    layer: LayerExecutor,
    kind: Kind,
    calls: Sequence[Call],
    read: Sequence[Tensor],
    targets: Sequence[Tensor],
    after: Sequence[Tensor],
    index: int,
    replace: Replace,
    taps: int,
    causal: bool,
) -> Fitted:
    """The replacement that comes nearest to `targets`, by errors in parts of the residual `after` the sublayer.

    Norms divide by the residual. Of a token that many attentions rest on, often the first, it is hundreds of times as
    large as of others (massive activations, arXiv 2402.17762), whose errors would else not count beside its own.
    """
    taps = taps_of(kind, taps)
    sums = RidgeSums(read[0].shape[-1], taps if replace == "filter" else 0, read[0].device)
    for call, state, target, beside in zip(calls, read, targets, after, strict=True):
        window = filter_window(layer.normed(kind, state), call.arguments[index], taps, causal)
        weight = beside.float().square().mean(-1).clamp_min(_LEAST).reciprocal()
        sums.add(window, target, call.real, weight)
    return sums.solve(causal, read[0])


def _advance(
    layer: LayerExecutor, calls: Sequence[Call], states: Sequence[Tensor], index: int
) -> list[Tensor]:
    return [run_layer(layer, call, state, index) for call, state in zip(calls, states, strict=True)]


def _added(
    layer: LayerExecutor, kind: Kind, calls: Sequence[Call], read: Sequence[Tensor], index: int
) -> list[Tensor]:
    return [layer.difference(kind, x, call.arguments[index]) for call, x in zip(calls, read, strict=True)]


def _plus(states: Sequence[Tensor], added: Sequence[Tensor]) -> list[Tensor]:
    return [state + more for state, more in zip(states, added, strict=True)]

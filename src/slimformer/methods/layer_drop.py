"""Drop attention and MLP sublayers whose input and output are alike (LLM-Drop, arXiv 2406.15786)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from slimformer.decisions.fields import as_tuple, checked_weights, checked_width, is_whole
from slimformer.decisions.policy import Decision, Replacement
from slimformer.decisions.registry import register
from slimformer.decisions.replacements import REPLACE, LinearFilter, Mean, Replace, taps_of, weight_names
from slimformer.errors import PlanError
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import Kind


@register("LayerDrop")
@dataclass(frozen=True)
class LayerDrop:
    """Sublayers that compute no token at all; the norm in front of each goes with it.

    Attributes:
        attention: Layers whose attention is dropped; their keys and values are not cached either.
        mlp: Layers whose MLP is dropped.
        block: Layers of which both are dropped.
        replace: What each leaves behind: `"nothing"`, its `"mean"` output, or a linear `"filter"` of its inputs.
            The last two have weights, which `slimformer.calibrate` fits.
        taps: How many inputs the filter of an attention reads; that of an MLP reads its own token's.
        weights: The weights by name, such as `"attention.21.weight"` `[hidden, taps * hidden]` and
            `"attention.21.bias"` `[hidden]`.

    Raises:
        PlanError: If an index is not a non-negative integer or stands twice in a list, `replace` or `taps` is not
            one of those allowed, or a weight is missing or has another shape.

    Example:
        >>> LayerDrop(attention=[21, 24]).attention
        (21, 24)
    """

    attention: Sequence[int] = ()
    mlp: Sequence[int] = ()
    block: Sequence[int] = ()
    replace: Replace = "nothing"
    taps: int = 1
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("attention", "mlp", "block"):
            given = as_tuple("LayerDrop", name, getattr(self, name))
            for index in given:
                if not is_whole(index, least=0):
                    raise PlanError(f"LayerDrop({name}=...) takes layer indices from 0 up, got {index!r}.")
            if len(set(given)) != len(given):
                raise PlanError(f"LayerDrop({name}={list(given)}) names a layer twice.")
            object.__setattr__(self, name, given)
        if self.replace not in REPLACE:
            raise PlanError(
                f"LayerDrop(replace=...) takes one of {', '.join(REPLACE)}, got {self.replace!r}."
            )
        if not is_whole(self.taps, least=1):
            raise PlanError(f"LayerDrop(taps=...) takes a number from 1 up, got {self.taps!r}.")
        checked_weights("LayerDrop", self.weights)
        if self.replace != "nothing":
            self._check_weights()

    def dropped(self, kind: Kind) -> tuple[int, ...]:
        """The layers without this sublayer, each once."""
        return tuple(dict.fromkeys((*getattr(self, kind), *self.block)))

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """No rows for every dropped sublayer."""
        count, name = len(anatomy.layers), type(anatomy.stack).__name__
        plans: dict[tuple[int, Kind], Decision] = {}
        for kind in _KINDS:
            for index in self.dropped(kind):
                if index >= count:
                    raise PlanError(
                        f"LayerDrop names {kind} {index}, but {name} has {count} layers: "
                        f"allowed are 0 to {count - 1}."
                    )
                if self.replace != "nothing":
                    width = self.weights[f"{kind}.{index}.bias"].numel()
                    what = f"The {self.replace} of {kind} {index}"
                    checked_width(what, width, anatomy.stack.config.hidden_size, name)
                plans[index, kind] = self._sublayer_plan(kind, index)
        return plans

    def tensors(self) -> dict[str, Tensor]:
        """What a plan saves beside the JSON."""
        return dict(self.weights)

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        settings: dict[str, Any] = {name: list(getattr(self, name)) for name in ("attention", "mlp", "block")}
        return {**settings, "replace": self.replace, "taps": self.taps}

    def _sublayer_plan(self, kind: Kind, index: int) -> Decision:
        if self.replace == "nothing":
            return Decision(compute=False)
        matrix, bias = weight_names(kind)
        weights = {bias: self.weights[f"{kind}.{index}.bias"]}
        if self.replace == "filter":
            weights[matrix] = self.weights[f"{kind}.{index}.weight"]
        return Decision(False, partial(_replacement, self.replace, kind, taps_of(kind, self.taps)), weights)

    def _check_weights(self) -> None:
        for kind in _KINDS:
            for index in self.dropped(kind):
                name = f"{kind}.{index}"
                bias, matrix = self.weights.get(f"{name}.bias"), self.weights.get(f"{name}.weight")
                if bias is None or (self.replace == "filter" and matrix is None):
                    raise PlanError(
                        f"LayerDrop(replace={self.replace!r}) has no fitted weights for {kind} {index}. "
                        f"slimformer.calibrate(model, tokenizer, LayerDrop(replace={self.replace!r}), ...) makes them."
                    )
                if bias.dim() != 1:
                    raise PlanError(
                        f"The bias of {kind} {index} has the shape {tuple(bias.shape)}, and must be [hidden]."
                    )
                taps = taps_of(kind, self.taps)
                expected = (bias.numel(), taps * bias.numel())
                if matrix is not None and self.replace == "filter" and tuple(matrix.shape) != expected:
                    raise PlanError(
                        f"The filter of {kind} {index} has the shape {tuple(matrix.shape)}; with {taps} taps "
                        f"it must be {expected}."
                    )


_KINDS: tuple[Kind, Kind] = ("attention", "mlp")


def _replacement(
    replace: Replace, kind: Kind, taps: int, layer: nn.Module, causal: bool, slot: int
) -> Replacement:
    return Mean(layer, kind) if replace == "mean" else LinearFilter(layer, kind, taps, causal, slot)

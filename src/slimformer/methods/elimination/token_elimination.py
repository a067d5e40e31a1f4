"""Stop computing tokens that no longer matter, from a middle layer on (LeMo, arXiv 2501.09767; FastKV's selection)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from slimformer.decisions.fields import (
    as_tuple,
    checked_flag,
    checked_weights,
    checked_width,
    is_number,
    is_whole,
    layer_number,
)
from slimformer.decisions.policy import Decision
from slimformer.decisions.registry import register
from slimformer.errors import PlanError
from slimformer.methods.elimination.block_predictor import BlockPredictor
from slimformer.methods.elimination.token_scores import (
    ByAttention,
    ByChance,
    ByPredictor,
    TokenScore,
    by_key_norm,
)
from slimformer.methods.elimination.token_selection import Owner, SharedSelection, TokenSelection, protecting
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind

SCORERS = ("attention", "norm", "predictor", "random")
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "scorer": SCORERS,
    "asking": (None, "last", "all"),
    "heads": ("sum", "max"),
    "left_as": ("residual", "mean"),
}


@register("TokenElimination")
@dataclass(frozen=True)
class TokenElimination:
    """Tokens of a prompt are no longer computed from chosen layers on.

    By default they leave for good: no later layer computes them or keeps their keys, so that caches shrink too.
    Positions stay the original ones. Decode steps, and prompts of fewer than `least` tokens, compute every token; so do
    calls that are compiled, captured in a CUDA graph, differentiated, or asked for hidden states.

    Attributes:
        schedule: Layer to the fraction of the text's tokens that is computed from it on. Fractions never grow, unless
            tokens may come back. Left out, `slimformer.calibrate` chooses it, and nothing can be patched before.
        scorer: Which are: those that others attend to (`"attention"`), those of which a trained predictor says so
            before anything is computed (`"predictor"`), those with small keys (`"norm"`), or some by chance
            (`"random"`, to compare with).
        block: Tokens come and go in blocks of so many neighbours; predictors score blocks of 64.
        sink: The first tokens always stay.
        window: The last tokens always stay.
        least: The shortest text from which tokens go.
        threshold: The schedule's numbers are no fractions but thresholds: how many times the mean score of its text a
            token needs. They never fall. For attention and predictors.
        revivable: Every layer chooses afresh among all tokens, and every token supplies keys and values to all layers
            (LeMo's way); nothing leaves a cache.
        kinds: Which sublayers pass tokens by; the MLP alone only where tokens may come back.
        asking: Whose attention counts: that of the `"last"` tokens, or of `"all"` (some, spread over the text). None:
            the last ones in decoders, all in encoders.
        heads: Whether a token's attention is the `"sum"` over heads, or that of the head that looks most (`"max"`).
        left_as: What comes out for tokens that left: the `"residual"` that they had, or the `"mean"` of those that
            stayed in their text, so that mean pooling reads only these (exactly so where no norm follows the layers).
        seed: For `"random"`.
        weights: The predictors' weights by name, as `slimformer calibrate eliminate --predictor` makes them.

    Raises:
        PlanError: If a field is not one of those allowed, the schedule grows, or a predictor is missing or damaged.

    Example:
        >>> TokenElimination({15: 0.5, 20: 0.25}).schedule
        {15: 0.5, 20: 0.25}
    """

    schedule: Mapping[int, float] = field(default_factory=dict)
    scorer: Literal["attention", "norm", "predictor", "random"] = "attention"
    block: int = 1
    sink: int = 4
    window: int = 64
    least: int = 256
    threshold: bool = False
    revivable: bool = False
    kinds: Sequence[Kind] = KINDS
    asking: Literal["last", "all"] | None = None
    heads: Literal["sum", "max"] = "sum"
    left_as: Literal["residual", "mean"] = "residual"
    seed: int = 0
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("threshold", "revivable"):
            checked_flag("TokenElimination", name, getattr(self, name))
        object.__setattr__(self, "schedule", _checked(self.schedule, self.threshold, self.revivable))
        object.__setattr__(self, "kinds", as_tuple("TokenElimination", "kinds", self.kinds))
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"TokenElimination({name}=...) takes one of {', '.join(map(str, allowed))}, got "
                    f"{getattr(self, name)!r}."
                )
        for name, least in (("block", 1), ("sink", 0), ("window", 1), ("least", 1)):
            value = getattr(self, name)
            if not is_whole(value, least):
                raise PlanError(
                    f"TokenElimination({name}=...) takes a number from {least} up, got {value!r}."
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise PlanError(f"TokenElimination(seed=...) takes a whole number, got {self.seed!r}.")
        checked_weights("TokenElimination", self.weights)
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise PlanError(
                f"TokenElimination(kinds=...) takes some of {', '.join(KINDS)}, got {self.kinds!r}."
            )
        if not self.revivable and set(self.kinds) != set(KINDS):
            raise PlanError(
                f"TokenElimination(kinds={self.kinds!r}) leaves tokens to the other sublayer, so they cannot leave for "
                "good. Add revivable=True."
            )
        if self.revivable and self.left_as != "residual":
            raise PlanError(
                "TokenElimination(left_as='mean') is for tokens that leave; with revivable=True none does."
            )
        if self.threshold and self.scorer not in ("attention", "predictor"):
            raise PlanError(
                f"TokenElimination(threshold=True) compares scores with their mean, which means nothing for "
                f"scorer={self.scorer!r}. Use 'attention' or 'predictor'."
            )
        if self.scorer == "predictor":
            for layer in self.schedule:
                BlockPredictor.from_tensors(self.weights, layer)

    def protecting(self, mask: Tensor) -> contextlib.AbstractContextManager[None]:
        """A block in which the tokens of `mask`, bool `[batch, tokens]` over the prompt, always stay.

        Example:
            >>> import torch
            >>> question = torch.tensor([[False, False, True, True]])
            >>> with TokenElimination({15: 0.5}).protecting(question):
            ...     pass  # model.generate(...)
        """
        return protecting(self, mask)

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """A selection before the attention of every layer in the schedule, or for every sublayer from the first on.

        Raises:
            PlanError: If the schedule is empty, a layer does not exist, or tokens would leave one that has a sliding
                window: distances in it would be counted without the tokens that left.
        """
        if not self.schedule:
            raise PlanError(
                "TokenElimination(schedule=...) takes at least one layer and number, such as {15: 0.5}, got none. "
                "slimformer.calibrate(model, tokenizer, TokenElimination) chooses them."
            )
        count, name = len(anatomy.layers), type(anatomy.stack).__name__
        for layer in self.schedule:
            if layer >= count:
                raise PlanError(
                    f"TokenElimination names layer {layer}, but {name} has {count} layers: allowed are 1 to "
                    f"{count - 1}."
                )
            if self.scorer == "predictor":
                width = BlockPredictor.from_tensors(self.weights, layer).hidden_size
                checked_width(
                    f"The predictor of layer {layer}", width, anatomy.stack.config.hidden_size, name
                )
        if self.revivable:
            return self._per_layer(count)
        first = min(self.schedule)
        sliding = [i for i in range(first, count) if "sliding" in anatomy.layer_types[i]]
        if sliding:
            raise PlanError(
                f"Tokens cannot leave {name} from layer {first} on: layers with a sliding window ({sliding}) would see "
                "further back than they were trained to. Use revivable=True, with which no token leaves."
            )
        return {
            (layer, "attention"): Decision(not_evicted=(self._selection(layer, keep),), evict_caches=True)
            for layer, keep in self.schedule.items()
        }

    def _per_layer(self, count: int) -> dict[tuple[int, Kind], Decision]:
        plans: dict[tuple[int, Kind], Decision] = {}
        starts = [*self.schedule, count]
        for (start, keep), end in zip(self.schedule.items(), starts[1:], strict=True):
            # A predictor serves the layers up to the next one.
            selection = self._selection(start, keep)
            for layer in range(start, end):
                for kind in self.kinds:
                    plans[layer, kind] = Decision(rows=(SharedSelection(selection, layer),))
        return plans

    def _selection(self, layer: int, keep: float) -> TokenSelection:
        return TokenSelection(
            self._score(layer),
            Owner(self),
            keep,
            threshold=self.threshold,
            block=self.block,
            sink=self.sink,
            window=self.window,
            least=self.least,
            leave=not self.revivable,
            mean_behind=self.left_as == "mean",
        )

    def _score(self, layer: int) -> TokenScore:
        if self.scorer == "attention":
            return ByAttention(self.asking, self.heads)
        if self.scorer == "norm":
            return by_key_norm
        if self.scorer == "random":
            return ByChance(self.seed)
        return ByPredictor(BlockPredictor.from_tensors(self.weights, layer), self.asking)

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "weights"}
        # JSON has only text for keys, and lists.
        schedule = {str(layer): keep for layer, keep in self.schedule.items()}
        return {**settings, "schedule": schedule, "kinds": list(self.kinds)}

    def tensors(self) -> dict[str, Tensor]:
        """What a plan saves beside the JSON."""
        return dict(self.weights)


def _checked(given: Mapping[Any, Any], threshold: bool, revivable: bool) -> dict[int, float]:
    """The schedule in the order of layers; JSON has only text for keys.

    Raises:
        PlanError: If it names what is no layer or number, or computes more tokens later than earlier.
    """
    where = "TokenElimination(schedule=...)"
    if not isinstance(given, Mapping):
        raise PlanError(f"{where} takes layers and numbers, such as {{15: 0.5}}, got {given!r}.")
    schedule = {layer_number(k): v for k, v in given.items()}
    before: float | None = None
    for layer, keep in sorted(schedule.items(), key=lambda entry: str(entry[0]).zfill(9)):
        if not is_whole(layer, least=1):
            raise PlanError(
                f"{where} takes layers from 1 up, since positions are counted in the cache of layer 0; got {layer!r}."
            )
        if not is_number(keep) or not (keep > 0 and (threshold or keep <= 1)):
            allowed = "numbers above 0" if threshold else "fractions above 0 and up to 1"
            raise PlanError(f"{where} takes {allowed}, got {layer}: {keep!r}.")
        grows = before is not None and (keep < before if threshold else keep > before)
        if grows and not revivable:
            rule = "Thresholds must not fall" if threshold else "Fractions must not grow"
            raise PlanError(
                f"{where} has {before} before layer {layer} and {keep} from it on: tokens that have left do not come "
                f"back. {rule}, or use revivable=True."
            )
        before = keep
    return dict(sorted(schedule.items()))

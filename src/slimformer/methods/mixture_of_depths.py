"""Routers that let tokens skip sublayers (MoD, arXiv 2404.02258; γ-MoD, 2410.13859; Router-Tuning, 2410.13184)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from slimformer.decisions.fields import (
    as_tuple,
    checked_flag,
    checked_weights,
    checked_width,
    is_number,
    is_whole,
)
from slimformer.decisions.image_tokens import image_tokens, read_images
from slimformer.decisions.policy import Decision
from slimformer.decisions.registry import register
from slimformer.errors import PlanError
from slimformer.methods.elimination.token_selection import Owner, open_blocks, protected_tokens, protecting
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream, in_a_graph

_ALLOWED = {
    "routing": ("threshold", "top_k"),
    "shared": ("sublayer", "layer", "all"),
    "per": ("token", "sequence"),
    "tokens": ("all", "image"),
}


@register("MixtureOfDepths")
@dataclass(frozen=True)
class MixtureOfDepths:
    """Sublayers that compute only the tokens that a trained router sends through them; the others pass by.

    A router is one linear unit on the sublayer's normed input, in float32. By threshold a token is computed where it is
    above zero: that depends on the token and what is before it alone, so a token takes the same way in a prompt and
    when it is decoded. Tokens that pass an attention by still supply keys and values.

    Attributes:
        attention: Layers whose attention is routed.
        mlp: Layers whose MLP is routed. With neither, `slimformer.calibrate` chooses them, and nothing can be patched
            before.
        keep: The fraction of tokens computed: what thresholds were trained for, and how many `"top_k"` takes.
        routing: `"threshold"`, or `"top_k"`: the tokens of every text with the highest scores. That looks at the whole
            text, so it is for encoders, for prompts on their own, and for image tokens.
        shared: Whether every `"sublayer"` has a router, every `"layer"`, or `"all"` have one (γ-MoD).
        per: Whether every `"token"` goes its own way, or all tokens of a `"sequence"` the same, by the mean of their
            scores; like top-k that looks at the whole text.
        tokens: Whether `"all"` tokens may pass by, or only those that stand for an `"image"` or a video, in
            vision-language models; text never does then, and the ratio counts image tokens alone.
        keep_kv: Whether tokens that pass an attention by supply keys and values; without, no cache can be used.
        weights: The routers by name, such as `"attention.5.weight"` `[hidden]` and `"attention.5.bias"` `[1]`, as
            `slimformer calibrate route` makes them; `"5.weight"` per layer, `"all.weight"` for one.

    Raises:
        PlanError: If a field is not one of those allowed, or a router is missing or damaged.

    Example:
        >>> method = MixtureOfDepths.keeping_everything(hidden=16, attention=[3, 5])
        >>> sorted(method.weights)
        ['attention.3.bias', 'attention.3.weight', 'attention.5.bias', 'attention.5.weight']
    """

    attention: Sequence[int] = ()
    mlp: Sequence[int] = ()
    keep: float = 0.5
    routing: Literal["threshold", "top_k"] = "threshold"
    shared: Literal["sublayer", "layer", "all"] = "sublayer"
    per: Literal["token", "sequence"] = "token"
    tokens: Literal["all", "image"] = "all"
    keep_kv: bool = True
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for kind in KINDS:
            given = as_tuple("MixtureOfDepths", kind, getattr(self, kind))
            if not all(is_whole(i, least=0) for i in given) or len(set(given)) < len(given):
                raise PlanError(
                    f"MixtureOfDepths({kind}=...) takes layer indices from 0 up, each once; got {list(given)!r}."
                )
            object.__setattr__(self, kind, given)
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise PlanError(
                f"MixtureOfDepths(keep=...) takes a fraction above 0 and up to 1, got {self.keep!r}."
            )
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"MixtureOfDepths({name}=...) takes one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        if self.per == "sequence" and (self.routing == "top_k" or self.tokens == "image"):
            raise PlanError(
                "MixtureOfDepths(per='sequence') decides on whole texts by a threshold: it goes with "
                f"routing='threshold' and tokens='all', got routing={self.routing!r} and tokens={self.tokens!r}."
            )
        checked_flag("MixtureOfDepths", "keep_kv", self.keep_kv)
        checked_weights("MixtureOfDepths", self.weights)
        for kind, layer in self.sublayers:
            name = router_name(self.shared, kind, layer)
            weight, bias = self.weights.get(f"{name}.weight"), self.weights.get(f"{name}.bias")
            if weight is None or bias is None:
                raise PlanError(
                    f"MixtureOfDepths has no router for {kind} {layer}: the weights {name}.weight and {name}.bias are "
                    "missing. `slimformer calibrate route` trains them."
                )
            if weight.dim() != 1 or bias.shape != (1,):
                raise PlanError(
                    f"The router {name} is damaged: its weight has the shape {tuple(weight.shape)} and its bias "
                    f"{tuple(bias.shape)}, and they must be [hidden] and [1]."
                )

    @staticmethod
    def keeping_everything(hidden: int, **fields: Any) -> MixtureOfDepths:
        """Routers that let no token pass by, whatever it is: where training starts."""
        shared = fields.get("shared", "sublayer")
        weights: dict[str, Tensor] = {}
        for kind in KINDS:
            for layer in fields.get(kind, ()):
                name = router_name(shared, kind, layer)
                weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.zeros(hidden), torch.ones(1)
        return MixtureOfDepths(**fields, weights=weights)

    @property
    def sublayers(self) -> tuple[tuple[Kind, int], ...]:
        """What is routed."""
        return tuple((kind, layer) for kind in KINDS for layer in getattr(self, kind))

    def protecting(self, mask: Tensor) -> contextlib.AbstractContextManager[None]:
        """A block in which the tokens of `mask`, bool `[batch, tokens]` over the prompt, are always computed.

        Masked routing (γ-MoD, section 3.3): instructions and questions never pass a sublayer by.

        Example:
            >>> method = MixtureOfDepths.keeping_everything(hidden=16, mlp=[3])
            >>> with method.protecting(torch.tensor([[False, False, True, True]])):
            ...     pass  # model.generate(...)
        """
        return protecting(self, mask)

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """The rows that each routed sublayer's router chooses.

        Raises:
            PlanError: If no layer is named, one does not exist, or a router reads another hidden size.
        """
        if not self.sublayers:
            raise PlanError(
                "MixtureOfDepths takes at least one layer, as attention=[...] or mlp=[...]; got none. "
                "slimformer.calibrate(model, tokenizer, MixtureOfDepths) chooses them."
            )
        count, hidden = len(anatomy.layers), anatomy.stack.config.hidden_size
        plans: dict[tuple[int, Kind], Decision] = {}
        for kind, layer in self.sublayers:
            if layer >= count:
                raise PlanError(
                    f"MixtureOfDepths names {kind} {layer}, but {type(anatomy.stack).__name__} has {count} layers: "
                    f"allowed are 0 to {count - 1}."
                )
            name = router_name(self.shared, kind, layer)
            weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
            checked_width(
                f"The router of {kind} {layer}", weight.shape[0], hidden, type(anatomy.stack).__name__
            )
            images = self.tokens == "image"
            best = self.keep if self.routing == "top_k" else None
            router = Router(kind, weight, bias, Owner(self), best, self.per == "sequence", images)
            plans[layer, kind] = Decision(
                rows=(router,),
                compact_keys=kind == "attention" and not self.keep_kv,
                prepares=(read_images,) if images else (),
            )
        return plans

    def lowered(self, by: float) -> MixtureOfDepths:
        """The same with all scores lower by so much, so that fewer tokens are above zero."""
        weights = {n: t - by if n.endswith(".bias") else t for n, t in self.weights.items()}
        return dataclasses.replace(self, weights=weights)

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "weights"}
        return {**settings, "attention": list(self.attention), "mlp": list(self.mlp)}

    def tensors(self) -> dict[str, Tensor]:
        """What a plan saves beside the JSON."""
        return dict(self.weights)


def router_name(shared: str, kind: Kind, layer: int) -> str:
    """The name of the router of a sublayer, under which its weights are saved."""
    return {"sublayer": f"{kind}.{layer}", "layer": f"{layer}", "all": "all"}[shared]


@dataclass(eq=False)
class Router:
    """The row selector of one sublayer.

    Attributes:
        kind: Which sublayer's input is read.
        weight: `[hidden]`.
        bias: `[1]`.
        owner: The method that it belongs to.
        keep: The fraction taken from every text; None for those above zero.
        per_sequence: Whether the mean over a text decides for all of it.
        images: Whether only image tokens may pass by.
    """

    kind: Kind
    weight: Tensor
    bias: Tensor
    owner: Owner
    keep: float | None = None
    per_sequence: bool = False
    images: bool = False

    @property
    def by_token(self) -> bool:
        """Whether no other token matters."""
        return self.keep is None and not self.per_sequence and not self.images

    def __call__(self, stream: Stream, x: Tensor) -> Rows | None:
        """The rows of the residual `x` `[rows, hidden]` that are computed.

        Raises:
            PlanError: If whole texts are to be looked at, and only a part of them is here.
        """
        whole = self.keep is not None or self.per_sequence
        if whole and stream.tokens == 1 and self.images:
            # A step: what is generated is text.
            return None
        if self.keep == 1.0:
            return None
        if whole and self._continues(stream):
            how = "per='sequence'" if self.per_sequence else "routing='top_k'"
            raise PlanError(
                f"MixtureOfDepths({how}) compares the tokens of a whole text, and this call continues one that is in "
                "the cache. Use routing='threshold' and per='token' to generate, or this for prompts alone."
            )
        score, text = self.scores(stream, x), None
        if whole:
            padding = stream.padding_mask()
            text = padding if stream.held is None else padding & stream.held.mask.view_as(padding)
        free = image_tokens(stream) if self.images else None
        if text is not None and self.per_sequence:
            mask = self._flat(self._mean(stream, score, text) > 0, stream)
        elif text is not None:
            mask = self._flat(self._best(stream, score, text if free is None else text & free), stream)
        else:
            mask = score > 0
        if free is not None:
            mask = mask | self._flat(~free, stream)
        protected = protected_tokens(self.owner, stream) if open_blocks.get() else None
        if protected is not None:
            mask = mask | self._flat(protected, stream)
        return Rows(x.shape[0], given_mask=mask)

    def compared(self, stream: Stream, x: Tensor) -> Tensor:
        """What is compared with the threshold, of the tokens that may pass by `[free]`; padding never counts."""
        score, free = self.scores(stream, x), stream.padding_mask()
        if self.per_sequence:
            score = self._flat(self._mean(stream, score, free), stream)
        if self.images:
            free = free & image_tokens(stream)
        return score[self._flat(free, stream)]

    def scores(self, stream: Stream, x: Tensor) -> Tensor:
        """A number per row, in float32: rounding must not decide differently in a prompt and in a step."""
        # Kept once moved. Each for itself, since another thread may be moving them too.
        weight, bias = self.weight, self.bias
        if weight.device != x.device:
            self.weight = weight = weight.to(x.device)
        if bias.device != x.device:
            self.bias = bias = bias.to(x.device)
        if stream.layer is None:
            return (x.float() * weight.float()).sum(-1) + bias.float()
        return stream.layer.scores(self.kind, stream, x, weight, bias)

    @staticmethod
    def _continues(stream: Stream) -> bool:
        """Whether some of the text came in earlier calls."""
        if isinstance(stream.past, Tensor) and in_a_graph(stream.device):
            # Steps are what graphs are captured of.
            return stream.tokens == 1
        return int(stream.past) > 0

    @staticmethod
    def _flat(mask: Tensor, stream: Stream) -> Tensor:
        """A mask `[batch, tokens]` at the rows of the stream."""
        return mask.flatten() if stream.held is None else mask.flatten()[stream.held.index]

    def _mean(self, stream: Stream, score: Tensor, text: Tensor) -> Tensor:
        """Of every text's scores, at each of its tokens `[batch, tokens]`."""
        total = (stream.padded(score).view_as(text) * text).sum(1, keepdim=True)
        return (total / text.sum(1, keepdim=True).clamp_min(1)).expand_as(text)

    def _best(self, stream: Stream, score: Tensor, among: Tensor) -> Tensor:
        """The tokens of every text with the highest scores among some, bool `[batch, tokens]`."""
        by_text = stream.padded(score).view_as(among).masked_fill(~among, float("-inf"))
        rank = by_text.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count = (among.sum(1, keepdim=True).double() * (self.keep or 1.0)).round().clamp(min=1)
        return (rank < count) & among

"""A frozen model with gates on some of its sublayers: what skipping would cost, and what routers make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimformer.calibration.drops.replay import Call, executors, finish, record_call, run_layer, run_layers
from slimformer.calibration.keep_ratio import threshold
from slimformer.decisions.image_tokens import where_images_are
from slimformer.errors import DataError
from slimformer.evaluation.readable import predicts_tokens
from slimformer.methods.mixture_of_depths import MixtureOfDepths, router_name
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS
from slimformer_kernels import chunked_cross_entropy, chunked_kl

# Scores start around the mean cost with this spread.
_SPREAD = 0.2
# Rounds in which thresholds settle.
_ROUNDS = 4
# Tokens whose next ones are drawn at a time.
_DRAWN = 256
# The least cost that a router tells from none, as a logarithm.
_LEAST = -30.0

Batch = Mapping[str, Tensor]


class Routers(nn.Module):
    """The routers of all names, as one weight and one bias over standardised inputs.

    Attributes:
        place: The row of each name.
        center: The mean of what each router reads `[routers, hidden]`.
        spread: And its standard deviation, so that channels with large values learn no faster than others.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, names: Iterable[str], hidden: int) -> None:
        super().__init__()
        self.place = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.register_buffer("center", torch.zeros(len(self.place), hidden))
        self.register_buffer("spread", torch.ones(len(self.place), hidden))
        self.weight = nn.Parameter(torch.zeros(len(self.place), hidden))
        self.bias = nn.Parameter(torch.zeros(len(self.place)))

    def forward(self, inputs: Sequence[Tensor], names: Iterable[str]) -> list[Tensor]:
        """Scores `[rows, tokens]` of what each sublayer reads `[rows, tokens, hidden]`, by the router of its name."""
        weight, bias = self.folded()
        places = [self.place[name] for name in names]
        return [h.float() @ weight[p] + bias[p] for h, p in zip(inputs, places, strict=True)]

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weights `[routers, hidden]` and biases `[routers]` for inputs as they are."""
        weight = self.weight / self.spread
        return weight, self.bias - (weight * self.center).sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """By the names that a plan saves them under."""
        weight, bias = (tensor.detach() for tensor in self.folded())
        found: dict[str, Tensor] = {}
        for name, place in self.place.items():
            found[f"{name}.weight"] = weight[place].clone()
            found[f"{name}.bias"] = bias[place : place + 1].clone()
        return found


class Lesson(NamedTuple):
    """What routers learn from a batch.

    Attributes:
        inputs: What each routed sublayer reads `[rows, tokens, hidden]`.
        costs: An estimate of what skipping it would cost at each token `[rows, tokens]`, unbiased and noisy.
        free: Which tokens may pass by, bool `[rows, tokens]`.
    """

    inputs: list[Tensor]
    costs: list[Tensor]
    free: Tensor


class Run(NamedTuple):
    """One pass with gates.

    Attributes:
        hidden: What the last layer gives `[rows, tokens, hidden]`.
        scores: Of every token that may pass by, in every routed sublayer `[routed, free]`.
        gates: 1 where such a token is computed and 0 where not `[routed, free]`.
    """

    hidden: Tensor
    scores: Tensor
    gates: Tensor


class GatedCall(NamedTuple):
    """A batch on its way through the layers.

    Attributes:
        call: What the layers get.
        free: Which tokens may pass by, bool `[rows, tokens]`.
        counted: Which count in the divergence, bool `[rows, tokens]`.
    """

    call: Call
    free: Tensor
    counted: Tensor


class Routed:
    """The frozen model, dense and with gates.

    Args:
        model: The model.
        anatomy: Its layers.
        method: What is routed.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, method: MixtureOfDepths) -> None:
        self.model, self.anatomy, self.method = model, anatomy, method
        self.layers = executors(anatomy, {})
        # In the order in which they run.
        order = sorted(method.sublayers, key=lambda s: (s[1], KINDS.index(s[0])))
        self.names = {(kind, layer): router_name(method.shared, kind, layer) for kind, layer in order}
        self.first = min(layer for _, layer in order)

    def fresh_routers(self, batch: Batch) -> Routers:
        """Routers that say of every token what skipping costs in the mean of a batch, give or take a little."""
        routers = Routers(self.names.values(), self.anatomy.stack.config.hidden_size)
        lesson = self.lesson(self.call(batch))
        names = list(self.names.values())
        with torch.no_grad():
            routers.weight.normal_(std=_SPREAD * routers.weight.shape[1] ** -0.5)
            routers.to(self.anatomy.stack.device)
            for name, place in routers.place.items():
                # One router may score several sublayers.
                mine = [number for number, own in enumerate(names) if own == name]
                read = torch.cat([lesson.inputs[number][lesson.free] for number in mine]).float()
                cost = torch.stack([lesson.costs[number][lesson.free].mean() for number in mine]).mean()
                routers.center[place] = read.mean(0)
                routers.spread[place] = read.std(0).nan_to_num(1.0).clamp_min(1e-6)
                routers.bias[place] = cost.log().clamp_min(_LEAST)
        return routers

    def call(self, batch: Batch) -> GatedCall:
        """What the layers get for a batch, up to the first that is routed."""
        # Only the whole model puts images among the embeddings of text.
        call = record_call(self.anatomy, batch, self.model.base_model if len(batch) > 1 else None)
        ids = batch["input_ids"].to(call.hidden.device)
        text = torch.ones_like(ids, dtype=torch.bool) if call.real is None else call.real
        images = where_images_are(ids, self.model.config)
        free = text & images if self.method.tokens == "image" else text
        if not bool(free.any()):
            raise DataError(
                "A batch has no image token, and only those are to be routed. Give what the model's processor makes of "
                "images with text."
            )
        with torch.no_grad():
            for index in range(self.first):
                call.hidden = run_layer(self.layers[index], call, call.hidden, index)
        # What comes behind a part of an image is not predicted.
        return GatedCall(call, free, text & ~images)

    def lesson(self, given: GatedCall) -> Lesson:
        """What skipping each routed sublayer at each token would cost, by one backward pass through the dense model.

        With y drawn from the dense model's own prediction, the squared derivative of log p(y) by a gate is an unbiased
        estimate of twice the divergence that closing it brings, to second order (the diagonal of the Fisher
        information). Encoders have a random direction of their hidden states in place of y.
        """
        inputs: list[Tensor] = []
        gates: list[Tensor] = []

        def gate(number: int, h: Tensor) -> Tensor:
            inputs.append(h.detach())
            gates.append(torch.ones(given.free.shape, device=h.device, requires_grad=True))
            return gates[-1]

        with torch.enable_grad():
            drawn = self._drawn(given, self._gated(given.call, gate))
            slopes = torch.autograd.grad(drawn, gates)
        costs = [(slope.float() * given.free) for slope in slopes]
        if self.method.per == "sequence":
            # All tokens of a text go one way.
            costs = [cost.sum(1, keepdim=True).expand_as(cost) for cost in costs]
        return Lesson(inputs, [cost.square() for cost in costs], given.free)

    def loss(self, module: nn.Module, batches: Sequence[Batch]) -> Tensor:
        """How unlikely the costs of batches are to routers that say their logarithms (costs exponentially distributed).

        `s + cost * exp(-s)` is least in the mean where s is the logarithm of the mean cost of such tokens.
        """
        values = []
        for batch in batches:
            lesson = self.lesson(self.call(batch))
            for score, cost in zip(
                module(lesson.inputs, list(self.names.values())), lesson.costs, strict=True
            ):
                s = self._of_texts(score, lesson.free)[lesson.free].clamp_min(_LEAST)
                values.append((s + cost[lesson.free] * (-s).exp()).mean())
        return torch.stack(values).mean()

    def _drawn(self, given: GatedCall, hidden: Tensor) -> Tensor:
        """The log-likelihood of next tokens that the model draws; in encoders, hidden states along random ones."""
        stack = self.anatomy.stack
        if not predicts_tokens(self.model, self.anatomy):
            units = F.normalize(hidden.float(), dim=-1)
            return (units * torch.randn_like(units))[given.counted].sum()
        last = finish(stack, self.anatomy, given.call, hidden, gradients=True).last_hidden_state[
            given.counted
        ]
        weight, bias, softcap = self._head()
        last = last.to(weight.dtype)
        with torch.no_grad():
            drawn = []
            for part in last.split(_DRAWN):
                logits = F.linear(part, weight, bias).float()
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                drawn.append(torch.multinomial(logits.softmax(-1), 1)[:, 0])
        return -chunked_cross_entropy(
            last, weight, torch.cat(drawn), bias=bias, softcap=softcap, reduction="sum"
        )

    def _head(self) -> tuple[Tensor, Tensor | None, float | None]:
        head: Any = self.model.get_output_embeddings()
        softcap = getattr(self.anatomy.stack.config, "final_logit_softcapping", None)
        return head.weight, getattr(head, "bias", None), softcap

    @torch.no_grad()
    def run(self, routers: Routers, given: GatedCall) -> Run:
        """Run the layers with the gates that routers set."""
        names = list(self.names.values())
        scores: list[Tensor] = []
        gates: list[Tensor] = []

        def gate(number: int, h: Tensor) -> Tensor:
            score = self._of_texts(routers([h], names[number : number + 1])[0], given.free)
            opened = score > self._threshold(score, given.free)
            scores.append(score[given.free])
            gates.append(opened[given.free].float())
            return (opened | ~given.free).float()

        hidden = self._gated(given.call, gate)
        return Run(hidden, torch.stack(scores), torch.stack(gates))

    def _gated(self, call: Call, gate: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Run the layers, every routed sublayer times a gate `[rows, tokens]`, made of its number and what it reads."""
        x, number = call.hidden, 0
        for index in range(self.first, len(self.layers)):
            if not any((kind, index) in self.names for kind in KINDS):
                x = run_layer(self.layers[index], call, x, index)
                continue
            executor, start = self.layers[index], x
            for kind in KINDS:
                before = start if executor.parallel else x
                change = executor.difference(kind, before, dict(call.arguments[index]))
                if (kind, index) in self.names:
                    opened = gate(number, executor.normed(kind, before))
                    change, number = change * opened[..., None].to(change.dtype), number + 1
                x = x + change
        return x

    def _of_texts(self, score: Tensor, free: Tensor) -> Tensor:
        """Scores of tokens `[rows, tokens]`, or their mean over a text where all of it goes one way."""
        if self.method.per == "token":
            return score
        mean = (score * free).sum(1, keepdim=True) / free.sum(1, keepdim=True).clamp_min(1)
        return mean.expand_as(score)

    def _threshold(self, score: Tensor, free: Tensor) -> Tensor:
        """What scores `[rows, tokens]` have to pass: zero, or in top-k what the best of their text pass."""
        if self.method.routing != "top_k":
            return score.new_zeros(())
        best = score.masked_fill(~free, float("-inf")).sort(1, descending=True).values
        count = (free.sum(1, keepdim=True) * self.method.keep).round().long().clamp(min=1)
        # Halfway between the last one in and the first one out.
        inside, outside = (best.gather(1, (count + n).clamp(0, best.shape[1] - 1)) for n in (-1, 0))
        return torch.where(outside.isfinite() & (outside < inside), (inside + outside) / 2, inside - 1.0)

    def _divergence(self, given: GatedCall, hidden: Tensor, dense: Tensor) -> Tensor:
        call, stack = given.call, self.anatomy.stack
        if not predicts_tokens(self.model, self.anatomy):
            return (1.0 - F.cosine_similarity(hidden.float(), dense.float(), dim=-1)).mean()
        last, expected = (finish(stack, self.anatomy, call, h).last_hidden_state for h in (hidden, dense))
        weight, bias, softcap = self._head()
        return chunked_kl(
            last, weight, teacher_hidden=expected, bias=bias, softcap=softcap, mask=given.counted
        )

    @torch.no_grad()
    def meet_budget(self, routers: Routers, batches: Sequence[Batch]) -> None:
        """Shift all scores alike, so that the wanted part of these tokens is above zero."""
        if self.method.routing == "top_k":
            return
        calls = [self.call(batch) for batch in batches]
        for _ in range(_ROUNDS):
            # What is skipped changes what later routers read.
            scores = torch.cat([self.run(routers, call).scores.flatten() for call in calls])
            routers.bias.sub_(threshold(scores, self.method.keep))

    @torch.no_grad()
    def measure(self, routers: Routers, batches: Iterable[Batch]) -> dict[str, Any]:
        """The mean divergence, and the part of the tokens that each routed sublayer computes."""
        divergences, gates = [], []
        for batch in batches:
            given = self.call(batch)
            dense = run_layers(self.layers, given.call, given.call.hidden, self.first)
            run = self.run(routers, given)
            divergences.append(float(self._divergence(given, run.hidden, dense)))
            gates.append(run.gates)
        kept = torch.cat(gates, 1).mean(1).tolist()
        return {
            "divergence": sum(divergences) / len(divergences),
            "keep": sum(kept) / len(kept),
            "keep_of": {
                f"{kind} {layer}": part for (kind, layer), part in zip(self.names, kept, strict=True)
            },
        }

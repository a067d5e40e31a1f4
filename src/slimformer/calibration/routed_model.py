"""A frozen model with gates on some of its sublayers, and the routers that set them, while these are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimformer.anatomy import KINDS, Anatomy
from slimformer.calibration.calibration_text import predicts_tokens
from slimformer.calibration.replay import Call, executors, finish, record_call, run_layer, run_layers
from slimformer.errors import DataError
from slimformer.image_tokens import where_images_are
from slimformer.methods.mixture_of_depths import MixtureOfDepths, router_name
from slimformer_kernels import chunked_kl

# How fast the threshold follows the scores, per step.
_FOLLOWING = 0.3
# A threshold that everything passes.
_EVERYTHING = 1e9
# Scores start around 0 with this spread.
_SPREAD = 0.2
# Rounds in which thresholds settle.
_ROUNDS = 4

Batch = Mapping[str, Tensor]


class Routers(nn.Module):
    """The routers of all names, as one weight and one bias.

    Attributes:
        place: The row of each name.
        wanted: The keep ratio that is wanted at the moment. Like the threshold it is a part of the state, so that a
            resumed training has it.
        threshold: What scores have to pass.
    """

    wanted: Tensor
    threshold: Tensor

    def __init__(self, names: Iterable[str], hidden: int) -> None:
        super().__init__()
        self.register_buffer("wanted", torch.ones(()))
        self.register_buffer("threshold", torch.full((), -_EVERYTHING))
        self.place = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.weight = nn.Parameter(torch.zeros(len(self.place), hidden))
        self.bias = nn.Parameter(torch.zeros(len(self.place)))

    def forward(self, run: Callable[[Tensor, Tensor, Tensor, Tensor], Run]) -> Run:
        """Run a function of weights `[routers, hidden]`, biases, threshold and the wanted ratio.

        A wrapper for several GPUs sees them this way.
        """
        return run(self.weight, self.bias, self.threshold, self.wanted)

    @torch.no_grad()
    def follow(self, scores: Tensor) -> None:
        """Move the threshold towards the quantile of these scores that lets the wanted part through."""
        count = round((1.0 - float(self.wanted)) * scores.numel())
        if count:
            quantile = scores.flatten().kthvalue(count).values
            first = bool(self.threshold == -_EVERYTHING)
            self.threshold.lerp_(quantile, 1.0 if first else _FOLLOWING)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the threshold zero, which plans know no other."""
        self.bias.sub_(self.threshold)
        self.threshold.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """By the names that a plan saves them under."""
        found: dict[str, Tensor] = {}
        for name, place in self.place.items():
            found[f"{name}.weight"] = self.weight.detach()[place].clone()
            found[f"{name}.bias"] = self.bias.detach()[place : place + 1].clone()
        return found


class Run(NamedTuple):
    """One pass with gates.

    Attributes:
        hidden: What the last layer gives `[rows, tokens, hidden]`.
        scores: Of every token that may pass by, in every routed sublayer `[routed, free]`.
        gates: 1 where such a token is computed and 0 where not, with the gradient of a sigmoid `[routed, free]`.
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
        """Routers whose scores are alike in spread on a batch."""
        routers = Routers(self.names.values(), self.anatomy.stack.config.hidden_size)
        with torch.no_grad():
            routers.weight.normal_()
            routers.to(self.anatomy.stack.device)
            scores = self.run(routers, self.call(batch)).scores
            own = list(self.names.values())
            for name, place in routers.place.items():
                # One router may score several sublayers.
                mine = torch.stack([score for score, of in zip(scores, own, strict=True) if of == name])
                routers.weight[place] *= _SPREAD / mine.std().nan_to_num(1.0).clamp_min(1e-6)
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

    def compare(self, module: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """How far batches are from dense with gates, in the mean; scores and gates as in `Run`."""
        divergences, scores, gates = [], [], []
        for batch in batches:
            given = self.call(batch)
            with torch.no_grad():
                dense = run_layers(self.layers, given.call, given.call.hidden, self.first)
            run = self.run(module, given)
            divergences.append(self._divergence(given, run.hidden, dense))
            scores.append(run.scores.detach())
            gates.append(run.gates.detach())
        return torch.stack(divergences).mean(), torch.cat(scores, 1), torch.cat(gates, 1)

    def run(self, module: nn.Module, given: GatedCall) -> Run:
        """Run the layers with gates."""
        places = {name: number for number, name in enumerate(dict.fromkeys(self.names.values()))}
        call = given.call

        def gated(weight: Tensor, bias: Tensor, threshold: Tensor, wanted: Tensor) -> Run:
            scores: list[Tensor] = []
            gates: list[Tensor] = []
            x = call.hidden
            for index in range(self.first, len(self.layers)):
                if not any((kind, index) in self.names for kind in KINDS):
                    x = run_layer(self.layers[index], call, x, index)
                    continue
                executor, start = self.layers[index], x
                for kind in KINDS:
                    before = start if executor.parallel else x
                    change = executor.difference(kind, before, dict(call.arguments[index]))
                    if (kind, index) in self.names:
                        place = places[self.names[kind, index]]
                        score = executor.normed(kind, before).float() @ weight[place] + bias[place]
                        score, gate = self._gates(score, given.free, threshold, wanted)
                        scores.append(score[given.free])
                        gates.append(gate[given.free])
                        change = change * gate.masked_fill(~given.free, 1.0)[..., None].to(change.dtype)
                    x = x + change
            return Run(x, torch.stack(scores), torch.stack(gates))

        found: Run = module(gated)
        return found

    def _gates(self, score: Tensor, free: Tensor, threshold: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """What decides of every token `[rows, tokens]`, and the gates that follow."""
        if self.method.per == "sequence":
            mean = (score * free).sum(1, keepdim=True) / free.sum(1, keepdim=True).clamp_min(1)
            score = mean.expand_as(score)
        if self.method.routing == "top_k":
            best = score.detach().masked_fill(~free, float("-inf")).sort(1, descending=True).values
            count = (free.sum(1, keepdim=True) * wanted).round().long().clamp(min=1)
            # Halfway between the last one in and the first one out.
            inside, outside = (best.gather(1, (count + n).clamp(0, best.shape[1] - 1)) for n in (-1, 0))
            threshold = torch.where(
                outside.isfinite() & (outside < inside), (inside + outside) / 2, inside - 1.0
            )
        return score, _gate(score - threshold)

    def _divergence(self, given: GatedCall, hidden: Tensor, dense: Tensor) -> Tensor:
        call, stack = given.call, self.anatomy.stack
        if not predicts_tokens(self.model, self.anatomy):
            return (1.0 - F.cosine_similarity(hidden.float(), dense.float(), dim=-1)).mean()
        last = finish(stack, self.anatomy, call, hidden, gradients=True).last_hidden_state
        expected = finish(stack, self.anatomy, call, dense).last_hidden_state
        head: Any = self.model.get_output_embeddings()
        softcap = getattr(stack.config, "final_logit_softcapping", None)
        bias = getattr(head, "bias", None)
        return chunked_kl(
            last, head.weight, teacher_hidden=expected, bias=bias, softcap=softcap, mask=given.counted
        )

    @torch.no_grad()
    def meet_budget(self, routers: Routers, batches: Sequence[Batch]) -> None:
        """Shift all thresholds alike, so that the wanted part of these tokens is computed."""
        routers.settle()
        if self.method.routing == "top_k":
            return
        calls = [self.call(batch) for batch in batches]
        for _ in range(_ROUNDS):
            # What is skipped changes what later routers read.
            scores = torch.cat([self.run(routers, call).scores.flatten() for call in calls])
            count = round((1.0 - self.method.keep) * scores.numel())
            if count:
                routers.bias.sub_(scores.kthvalue(count).values)
            else:
                # Zero is not above the threshold.
                routers.bias.add_(1.0 - scores.min())

    @torch.no_grad()
    def measure(self, routers: Routers, batches: Iterable[Batch]) -> dict[str, Any]:
        """The mean divergence, and the part of the tokens that each routed sublayer computes."""
        divergences, gates = [], []
        for batch in batches:
            divergence, _, opened = self.compare(routers, [batch])
            divergences.append(float(divergence))
            gates.append(opened)
        kept = torch.cat(gates, 1).mean(1).tolist()
        return {
            "divergence": sum(divergences) / len(divergences),
            "keep": sum(kept) / len(kept),
            "keep_of": {
                f"{kind} {layer}": part for (kind, layer), part in zip(self.names, kept, strict=True)
            },
        }


def _gate(score: Tensor) -> Tensor:
    """1 above zero and 0 below, with the gradient of the sigmoid (straight-through)."""
    soft = score.sigmoid()
    return (score > 0).float() + soft - soft.detach()

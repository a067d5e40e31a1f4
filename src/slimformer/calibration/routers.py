"""Train routers beside the frozen model, by what skipping does to its predictions (SkipGPT, Router-Tuning)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.anatomy import KINDS, Anatomy, find_anatomy, transformer_of
from slimformer.calibration.calibrate import tokenizer_of, versions
from slimformer.calibration.calibration_text import longest, predicts_tokens
from slimformer.calibration.progress import Stages
from slimformer.calibration.replay import Call, executors, finish, record_call, run_layer, run_layers
from slimformer.calibration.training_rows import training_rows
from slimformer.errors import CalibrationError
from slimformer.evaluation.perplexity import evaluating
from slimformer.methods.mixture_of_depths import MixtureOfDepths, router_name
from slimformer.patching import status
from slimformer.plan import Plan, fingerprint
from slimformer.training.loop import TrainingSettings, fit
from slimformer_kernels import chunked_kl

_HELD_OUT_ROWS = 8
# Over this part of the training the budget falls from everything to what is wanted.
_FALLING = 0.5
# How fast the threshold follows the scores, per step.
_FOLLOWING = 0.3
# A threshold that everything passes.
_EVERYTHING = 1e9
# Scores start around 0 with this spread.
_SPREAD = 0.2
# Rounds in which thresholds settle.
_ROUNDS = 4


def train_routers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: MixtureOfDepths,
    data: str | os.PathLike[str] | Iterable[str] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    length: int = 1024,
    settings: TrainingSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Train the routers of a method, and make the plan that routes by them.

    The loss is the divergence from the dense model: in decoders KL of next-token distributions, in encoders the cosine
    of hidden states. Gates are hard, with the gradient of a sigmoid (straight-through). One budget serves all routed
    sublayers together: a threshold follows the quantile of their scores, and the part it lets through falls from
    everything, which is the dense model, to the keep ratio. In the end thresholds are set on held-out text.

    Args:
        model: An unpatched decoder or encoder; its weights stay as they are.
        tokenizer: Its tokenizer; a SentenceTransformer or Pipeline brings its own.
        method: What is routed and to which keep ratio, with any routers, such as `calibrate_arank` makes.
        data: As for `slimformer.calibrate`. Its texts are read one behind the other.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Set thresholds and measure on every fifth text, which is not trained on; without, on the last rows.
        length: Tokens per row.
        settings: How long and how fast.
        checkpoint: A folder for checkpoints. The same call resumes from them after an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The plan. `plan.measured["routers"]` has the divergence and the keep ratio of every routed sublayer on held-out
        text.

    Raises:
        CalibrationError: If the model is patched, or training fails.
        DataError: If the text is too short.
        PlanError: If the method does not fit the model.
    """
    settings = TrainingSettings(learning_rate=2e-3) if settings is None else settings
    if status(model):
        raise CalibrationError(
            "The model is patched; routers learn from the dense model. Call unpatch first."
        )
    inner, anatomy = transformer_of(model), find_anatomy(model)
    method.sublayer_plans(anatomy)
    tokenizer = tokenizer or tokenizer_of(model)
    tokens = min(length, longest(anatomy, tokenizer))
    read, held_out, source = training_rows(
        tokenizer,
        data,
        text_field=text_field,
        hold_out=hold_out,
        tokens=tokens,
        settings=settings,
        held_out=_HELD_OUT_ROWS,
    )
    frozen = [p for p in inner.parameters() if p.requires_grad]
    with evaluating(inner), Stages(progress) as stages:
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            routed = _Routed(inner, anatomy, method)
            torch.manual_seed(settings.seed)
            routers = routed.fresh_routers(read[:1])
            falling = max(round(settings.steps * _FALLING), 1)

            def after(step: int) -> None:
                routers.wanted.fill_(1.0 - (1.0 - method.keep) * min(step / falling, 1.0))

            def loss(module: nn.Module, batch: Tensor) -> Tensor:
                divergence, run = routed.compare(module, batch)
                routers.follow(run.scores)
                return divergence

            identity = {
                "data": source,
                "model": fingerprint(inner),
                "method": method.settings(),
                "text": [text_field, hold_out],
                "tokens": tokens,
                "settings": vars(settings),
            }
            history = fit(
                routers,
                loss,
                read,
                settings,
                identity=identity,
                folder=checkpoint,
                stages=stages,
                after_step=after,
            )
            routed.meet_budget(routers, held_out)
            measured = routed.measure(routers, stages.track(held_out.split(1), "held-out text"))
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
    provenance = {
        **versions(anatomy),
        "arguments": {"length": tokens, "hold_out": hold_out, **vars(settings)},
        "data": source,
        "tokens": read.numel(),
        "losses": history.losses,
    }
    trained = replace(method, weights={name: tensor.cpu() for name, tensor in routers.tensors().items()})
    return Plan([trained], fingerprint(inner), provenance, {"routers": measured})


class _Routers(nn.Module):
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

    def forward(self, run: Callable[[Tensor, Tensor, Tensor], _Run]) -> _Run:
        """Run a function of weights `[routers, hidden]`, biases and threshold: a wrapper for several GPUs sees them."""
        return run(self.weight, self.bias, self.threshold)

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


class _Run(NamedTuple):
    """One pass with gates.

    Attributes:
        hidden: What the last layer gives `[rows, tokens, hidden]`.
        scores: Of every routed sublayer `[routed, rows, tokens]`.
        gates: 1 where a token is computed and 0 where not, with the gradient of a sigmoid `[routed, rows, tokens]`.
    """

    hidden: Tensor
    scores: Tensor
    gates: Tensor


class _Routed:
    """The frozen model, dense and with gates.

    Args:
        model: The model.
        anatomy: Its layers.
        method: What is routed.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, method: MixtureOfDepths) -> None:
        self.model, self.anatomy, self.keep = model, anatomy, method.keep
        self.layers = executors(anatomy, {})
        # In the order in which they run.
        order = sorted(method.sublayers, key=lambda s: (s[1], KINDS.index(s[0])))
        self.names = {(kind, layer): router_name(method.shared, kind, layer) for kind, layer in order}
        self.first = min(layer for _, layer in order)

    def fresh_routers(self, row: Tensor) -> _Routers:
        """Routers whose scores are alike in spread on a row `[1, tokens]`."""
        routers = _Routers(self.names.values(), self.anatomy.stack.config.hidden_size)
        with torch.no_grad():
            routers.weight.normal_()
            routers.to(self.anatomy.stack.device)
            scores = self.run(routers, self.call(row)).scores
            own = list(self.names.values())
            for name, place in routers.place.items():
                # One router may score several sublayers.
                mine = torch.stack([score for score, of in zip(scores, own, strict=True) if of == name])
                routers.weight[place] *= _SPREAD / mine.std().clamp_min(1e-6)
        return routers

    def call(self, batch: Tensor) -> Call:
        """What the layers get for a batch of ids `[rows, tokens]`, up to the first that is routed."""
        call = record_call(self.anatomy, {"input_ids": batch})
        with torch.no_grad():
            for index in range(self.first):
                call.hidden = run_layer(self.layers[index], call, call.hidden, index)
        return call

    def compare(self, module: nn.Module, batch: Tensor) -> tuple[Tensor, _Run]:
        """How far a batch `[rows, tokens]` is from dense with gates, and the pass with them."""
        call = self.call(batch)
        with torch.no_grad():
            dense = run_layers(self.layers, call, call.hidden, self.first)
        run = self.run(module, call)
        return self._divergence(call, run.hidden, dense), run

    def run(self, module: nn.Module, call: Call) -> _Run:
        """Run the layers with gates."""
        places = {name: number for number, name in enumerate(dict.fromkeys(self.names.values()))}

        def gated(weight: Tensor, bias: Tensor, threshold: Tensor) -> _Run:
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
                        scores.append(score)
                        gates.append(_gate(score - threshold))
                        change = change * gates[-1][..., None].to(change.dtype)
                    x = x + change
            return _Run(x, torch.stack(scores), torch.stack(gates))

        found: _Run = module(gated)
        return found

    def _divergence(self, call: Call, hidden: Tensor, dense: Tensor) -> Tensor:
        if not predicts_tokens(self.model, self.anatomy):
            return (1.0 - F.cosine_similarity(hidden.float(), dense.float(), dim=-1)).mean()
        last = finish(self.anatomy.stack, self.anatomy, call, hidden, gradients=True).last_hidden_state
        expected = finish(self.anatomy.stack, self.anatomy, call, dense).last_hidden_state
        head: Any = self.model.get_output_embeddings()
        softcap = getattr(self.anatomy.stack.config, "final_logit_softcapping", None)
        bias = getattr(head, "bias", None)
        return chunked_kl(last, head.weight, teacher_hidden=expected, bias=bias, softcap=softcap)

    @torch.no_grad()
    def meet_budget(self, routers: _Routers, rows: Tensor) -> None:
        """Shift all thresholds alike, so that the wanted part of these rows' tokens is computed."""
        routers.settle()
        calls = [self.call(row) for row in rows.split(1)]
        for _ in range(_ROUNDS):
            # What is skipped changes what later routers read.
            scores = torch.cat([self.run(routers, call).scores.flatten() for call in calls])
            count = round((1.0 - self.keep) * scores.numel())
            if count:
                routers.bias.sub_(scores.kthvalue(count).values)
            else:
                # Zero is not above the threshold.
                routers.bias.add_(1.0 - scores.min())

    @torch.no_grad()
    def measure(self, routers: _Routers, rows: Iterable[Tensor]) -> dict[str, Any]:
        """The mean divergence, and the part of the tokens that each routed sublayer computes."""
        divergences, gates = [], []
        for row in rows:
            divergence, run = self.compare(routers, row)
            divergences.append(float(divergence))
            gates.append(run.gates.flatten(1).mean(1))
        kept = torch.stack(gates).mean(0).tolist()
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

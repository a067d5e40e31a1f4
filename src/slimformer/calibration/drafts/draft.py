"""Which sublayers a model can leave out when it drafts for itself, so that `generate` takes least time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimformer.calibration.drafts.costs import Costs, measure_costs
from slimformer.calibration.drafts.trial import Guesses, Trial, trial
from slimformer.calibration.drops.drop import tokenizer_of, versions
from slimformer.calibration.drops.replay import Call, Dropped, executors, finish, record_call, run_layers
from slimformer.calibration.drops.search import may_drop, sublayers_of
from slimformer.calibration.drops.similarity import UNITS, Unit
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.panel.builtin import builtin_prompts
from slimformer.evaluation.panel.capabilities.own_words import own_words
from slimformer.evaluation.panel.capabilities.reading import Row
from slimformer.evaluation.perplexity import evaluating
from slimformer.examination.tiers import known_anatomy
from slimformer.methods.layer_drop import LayerDrop
from slimformer.model.anatomy import Anatomy, transformer_of
from slimformer.patching import status
from slimformer.plans.plan import Plan, fingerprint
from slimformer.text.progress import Stages

_logger = logging.getLogger("slimformer")
# Candidates that are judged anew for every removal: those that looked best when they were judged last.
_JUDGED_ANEW = 5
# Removals that may make the draft worse before the search ends.
_PATIENCE = 4
# A draft that saves less than this part of the time is not worth having.
_LEAST_WON = 0.03
_LONGEST = 4096


def choose_draft(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    data: Iterable[str] | None = None,
    kinds: Sequence[Unit] = ("attention", "mlp", "block"),
    prompts: int = 14,
    new_tokens: int = 96,
    drop: int | None = None,
    progress: bool = False,
) -> Plan:
    """Find the draft with which `SelfSpeculation` makes tokens fastest, and make its plan.

    The model answers prompts; then sublayers are removed, one after the other, always what leaves the shortest time per
    token. That time is what `generate` would take, replayed on paper: from which tokens the draft guesses and how sure
    it is, and from what steps with and without a sublayer, and checked tokens, cost on this machine.

    Args:
        model: An unpatched decoder with a language-model head; it is left as it was.
        tokenizer: Its tokenizer; a Pipeline brings its own.
        data: Prompts like those of your own application, a list of strings; None for some of several kinds.
        kinds: What may be removed: `"attention"`, `"mlp"`, `"block"`, or several of these.
        prompts: How many of the prompts are answered.
        new_tokens: How many tokens are written to each at most.
        drop: Stop after so many removals; None stops where more make it slower.
        progress: Show progress bars with the time left.

    Returns:
        The draft's plan, for `SelfSpeculation(plan)`; what was measured in `plan.measured`.

    Raises:
        CalibrationError: If no draft is worth having on this machine, naming the best, the model is patched, or an
            argument is not one of those allowed.
        DataError: If there are no prompts.
        UnsupportedModelError: If the model's structure is not known.

    Example:
        >>> import slimformer
        >>> from slimformer import SelfSpeculation
        >>> plan = slimformer.calibrate(model, tokenizer, SelfSpeculation)  # doctest: +SKIP
        >>> slimformer.patch(model, SelfSpeculation(plan))  # doctest: +SKIP
    """
    _check(kinds, prompts, new_tokens, drop)
    if status(model):
        raise CalibrationError(
            "The model is patched; drafts are made for the dense model. Call unpatch first."
        )
    inner, anatomy = transformer_of(model), known_anatomy(model)
    if not anatomy.causal or not hasattr(inner, "generate"):
        raise CalibrationError(
            f"{type(inner).__name__} generates no text, so that there is nothing to draft."
        )
    if isinstance(data, str):
        raise DataError("data takes a list of prompts, got one text. Put it in a list, or leave it out.")
    asked = builtin_prompts() if data is None else [("yours", text) for text in data]
    if not asked:
        raise DataError("No prompt was given. Give some like those of your application, or leave data out.")
    with evaluating(inner), Stages(progress) as stages:
        words = own_words(
            inner,
            tokenizer or tokenizer_of(model),
            asked[:prompts],
            new_tokens=new_tokens,
            longest=_LONGEST,
            chat=None,
            cache=None,
        )
        costs = measure_costs(inner, anatomy)
        search = _Search(inner, anatomy, costs, words.rows, stages)
        steps = search.run(kinds, drop)
    best = min(range(len(steps)), key=lambda index: steps[index].trial.time, default=None)
    if best is None or steps[best].trial.time > 1 - _LEAST_WON:
        raise CalibrationError(_none_pays(anatomy, costs, None if best is None else steps[best]))
    taken = steps[: best + 1]
    layers: dict[str, list[int]] = {
        unit: sorted(step.layer for step in taken if step.kind == unit) for unit in UNITS
    }
    provenance = {
        **versions(anatomy),
        "arguments": {"kinds": list(kinds), "prompts": prompts, "new_tokens": new_tokens, "drop": drop},
        "data": "prompts of the package" if data is None else f"{len(asked)} prompts",
        "tokens": sum(len(row.scored) for row in words.rows),
        "costs": costs.to_dict(),
        "steps": [step.to_dict() for step in steps],
    }
    measured = {"draft": asdict(taken[-1].trial)}
    dropping = LayerDrop(layers["attention"], layers["mlp"], layers["block"])
    return Plan([dropping], fingerprint(inner), provenance, measured)


@dataclass(frozen=True)
class _Step:
    kind: Unit
    layer: int
    cost: float
    trial: Trial

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "layer": self.layer, "cost": self.cost, **asdict(self.trial)}


@dataclass
class _Search:
    """Removes what costs least acceptance for the time that it saves."""

    model: Any
    anatomy: Anatomy
    costs: Costs
    rows: Sequence[Row]
    stages: Stages
    calls: list[Call] = field(init=False)

    def __post_init__(self) -> None:
        device = self.anatomy.stack.device
        ids = [torch.tensor([[*row.context, *row.scored[:-1]]], device=device) for row in self.rows]
        self.calls = [record_call(self.anatomy, {"input_ids": one}, self.model) for one in ids]

    def run(self, kinds: Sequence[Unit], drop: int | None) -> list[_Step]:
        """Removals in order, the last ones perhaps no better."""
        layers = range(len(self.anatomy.layers))
        units = [(kind, layer) for kind in kinds for layer in layers]
        gone: list[tuple[Unit, int]] = []
        last: dict[tuple[Unit, int], float] = {}
        steps: list[_Step] = []
        while drop is None or len(steps) < drop:
            alive = [unit for unit in units if self._may_go(gone, unit)]
            judged = alive if not last else sorted(alive, key=lambda unit: last[unit])[:_JUDGED_ANEW]
            if not judged:
                break
            inputs = self._inputs(gone)
            found: list[_Step] = []
            for unit in self.stages.track(judged, f"removal {len(steps) + 1}"):
                found.append(self._step(gone, unit, inputs))
                before = steps[-1].trial.time if steps else 1.0
                # What it adds to the time of a token for the time that it saves in a step of the draft.
                saved = (steps[-1].cost if steps else 1.0) - found[-1].cost
                last[unit] = (found[-1].trial.time - before) / max(saved, 1e-6)
            best = min(found, key=lambda step: last[step.kind, step.layer])
            steps.append(best)
            gone.append((best.kind, best.layer))
            _logger.info(
                "Removal %d: %s %d, a token in %.2f of a step, %.0f%% accepted, a step of the draft costs %.2f.",
                len(steps), best.kind, best.layer, best.trial.time, 100 * best.trial.accepted, best.cost,
            )  # fmt: skip
            times = [step.trial.time for step in steps]
            if drop is None and len(times) - 1 - times.index(min(times)) >= _PATIENCE and min(times) < 1:
                break
            if drop is None and best.trial.time > 1.5:
                break
        return steps

    def _may_go(self, gone: Sequence[tuple[Unit, int]], unit: tuple[Unit, int]) -> bool:
        taken = [sublayer for one in gone for sublayer in sublayers_of(*one)]
        more = sublayers_of(*unit)
        return not set(taken) & set(more) and may_drop(self.anatomy, [*taken, *more])

    def _dropped(self, gone: Sequence[tuple[Unit, int]]) -> Dropped:
        return {sublayer: None for unit in gone for sublayer in sublayers_of(*unit)}

    @torch.no_grad()
    def _inputs(self, gone: Sequence[tuple[Unit, int]]) -> list[list[Tensor]]:
        """What every layer reads, text by text."""
        layers, found = executors(self.anatomy, self._dropped(gone)), []
        for call in self.calls:
            inputs: list[Tensor] = []
            run_layers(layers, call, call.hidden, 0, inputs)
            found.append(inputs)
        return found

    @torch.no_grad()
    def _step(
        self, gone: Sequence[tuple[Unit, int]], unit: tuple[Unit, int], inputs: list[list[Tensor]]
    ) -> _Step:
        dropped = self._dropped([*gone, unit])
        layers, start = executors(self.anatomy, dropped), unit[1]
        guesses = []
        for call, row, states in zip(self.calls, self.rows, inputs, strict=True):
            hidden = run_layers(layers, call, states[start], start)
            logits = finish(self.model, self.anatomy, call, hidden).logits[0, len(row.context) - 1 :].float()
            best, token = logits.max(-1)
            right = token == torch.tensor(row.scored, device=token.device)
            sure = (best - logits.logsumexp(-1)).exp()
            guesses.append(Guesses(right.tolist(), sure.tolist()))
        counts = [sum(kind == one for kind, _ in dropped) for one in ("attention", "mlp")]
        cost = self.costs.of(*counts)
        return _Step(unit[0], unit[1], cost, trial(guesses, cost, self.costs.checking))


def _none_pays(anatomy: Anatomy, costs: Costs, best: _Step | None) -> str:
    name = type(anatomy.stack).__name__
    found = "none could be tried"
    if best is not None:
        found = (
            f"the best takes {best.trial.time:.2f} of a step per token, with {best.trial.accepted:.0%} of its tokens "
            f"accepted and a step of its own at {best.cost:.2f}"
        )
    return (
        f"No draft of {name} is worth having on this machine: {found} (an attention costs {costs.attention:.1%} of a "
        f"step, an MLP {costs.mlp:.1%}). Small models leave little out; try a larger one, repair a plan and draft with "
        "that, or generate(prompt_lookup_num_tokens=10) for texts that repeat their prompt."
    )


def _check(kinds: Sequence[Unit], prompts: int, new_tokens: int, drop: int | None) -> None:
    if not kinds or set(kinds) - set(UNITS) or isinstance(kinds, str):
        raise CalibrationError(f"kinds takes some of {', '.join(UNITS)}, got {kinds!r}.")
    for name, value in (("prompts", prompts), ("new_tokens", new_tokens), ("drop", drop)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise CalibrationError(f"{name} takes a whole number from 1 up, got {value!r}.")

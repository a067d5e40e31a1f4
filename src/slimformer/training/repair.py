"""`slimformer.repair`: minutes of self-distillation win back what a plan lost."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from slimformer.calibration.drops.drop import tokenizer_of, versions
from slimformer.calibration.keep_ratio import meet_keep_ratio
from slimformer.decisions.registry import tensors_of
from slimformer.errors import CalibrationError
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.readable import longest
from slimformer.methods.weight_delta import WeightDelta
from slimformer.model.anatomy import find_anatomy, transformer_of
from slimformer.model.layer_parts import KINDS
from slimformer.patching import patched, status
from slimformer.plans.plan import Plan, PlannedMethod, fingerprint
from slimformer.text.progress import Stages
from slimformer.text.rows import training_rows, training_texts
from slimformer.text.sources import check_token_ids
from slimformer.training.checkpoint import History
from slimformer.training.distillation import Distillation
from slimformer.training.loop import EarlyStop, TrainingSettings, fit, frozen
from slimformer.training.rounds import in_rounds
from slimformer.training.trained_weights import WHAT, TrainedWeights, What, changed_layers

_HELD_OUT_ROWS, _HELD_OUT_TEXTS, _TEXTS_AT_ONCE = 8, 128, 32
# A plan that is nearer to dense than this changes nothing that could be won back.
_NOTHING = 1e-6
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def repair(
    model: Any,
    plan: Plan | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    data: str | os.PathLike[str] | Iterable[str] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    what: Sequence[What] = WHAT,
    near: int | None = 2,
    rank: int = 16,
    hidden: float = 0.0,
    length: int = 1024,
    rounds: int = 1,
    every: int = 25,
    patience: int = 4,
    settings: TrainingSettings | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Train the little that a plan leaves open so that the slim model behaves like its dense self, on unlabelled text.

    The teacher is the same model with the patch switched off, so that memory holds one model. In decoders the loss is
    the KL divergence of next-token distributions; in encoders the cosine distance of embeddings, plus the squared
    distance of their similarities within the batch. Low-rank adapters are merged when done: inference costs what the
    plan costs. Shortened-LLaMA (arXiv 2402.02834) and Minitron (2407.14679) show how much short distillation wins back
    after depth pruning.

    Routers and predictors keep their weights: they decide, and have their own training. Thresholds of routers are set
    anew, so that they compute as many tokens as before of text that is not trained on.

    Args:
        model: An unpatched decoder, encoder, or SentenceTransformer; it is left as it was, bit for bit.
        plan: The plan to repair, or where it is.
        tokenizer: The model's tokenizer; a SentenceTransformer or Pipeline brings its own.
        data: As for `slimformer.calibrate`. Decoders read texts one behind the other, encoders one by one.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Measure on every fifth text, which is not trained on; without, on the last ones.
        what: What is trained: `"added"` (filters, means and heads of the plan), `"norms"` (with biases), and `"lora"`
            on linear layers (arXiv 2106.09685).
        near: Norms and linear layers of so many layers below and above a change are trained; None for all layers.
        rank: Of the low-rank adapters.
        hidden: How much the residual behind changed layers counts beside the outputs; 0 leaves it out.
        length: Tokens per row.
        rounds: Drop the plan's sublayers in so many rounds, each followed by a repair of as many steps.
        every: Steps between measurements on text that is not trained on.
        patience: So many measurements without a better one end a round.
        settings: How long and how fast.
        checkpoint: A folder for checkpoints. The same call resumes from them after an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The repaired plan. `plan.measured["repair"]` has the divergence from dense before and after on text that was not
        trained on, `plan.provenance["repair"]` the curve of every round.

    Raises:
        CalibrationError: If an argument is not one of those allowed, the model is patched or quantised, the plan leaves
            nothing to repair, or training fails.
        DataError: If the text is too short.
        PlanError: If the plan does not fit the model.

    Example:
        >>> repaired = slimformer.repair(model, plan, tokenizer, data="text.jsonl")  # doctest: +SKIP
        >>> slimformer.patch(model, repaired)  # doctest: +SKIP
    """
    given = plan if isinstance(plan, Plan) else Plan.from_pretrained(plan)
    settings = TrainingSettings(rows=4) if settings is None else settings
    _check(what, rank, near, hidden)
    if status(model):
        raise CalibrationError(
            "The model is patched; its dense self is to be the teacher. Call unpatch first."
        )
    inner, anatomy = transformer_of(model), find_anatomy(model)
    if anatomy.repeats:
        raise CalibrationError(
            f"{type(anatomy.stack).__name__} cannot be repaired: {anatomy.unknown}, so that no weight belongs to one "
            "of its layers alone. Plans without repair apply to it."
        )
    _check_weights(inner)
    parts = in_rounds(given, rounds)
    tokenizer = tokenizer or tokenizer_of(model)
    tokens = min(length, longest(anatomy, tokenizer))
    decoder = Distillation(model, given).decoder
    read, held_out, source = (training_rows if decoder else training_texts)(
        tokenizer,
        data,
        text_field=text_field,
        hold_out=hold_out,
        tokens=tokens,
        count=settings.rows_read,
        seed=settings.seed,
        held_out=_HELD_OUT_ROWS if decoder else _HELD_OUT_TEXTS,
    )
    for rows in (read, held_out):
        check_token_ids(rows, inner)
    batches = held_out.split(1 if decoder else _TEXTS_AT_ONCE)
    arguments = {
        "what": list(what),
        "near": near,
        "rank": rank,
        "hidden": hidden,
        "length": tokens,
        "rounds": rounds,
        "hold_out": hold_out,
        **vars(settings),
    }
    identity = {"data": source, "text": text_field, "model": fingerprint(inner), **arguments}
    lesson = _Lesson(model, read, batches, what, near, rank, hidden, settings, every, patience)
    curves: list[dict[str, Any]] = []
    learnt: Sequence[PlannedMethod] = ()
    with evaluating(inner), Stages(progress) as stages:
        for number, part in enumerate(parts, start=1):
            part = dataclasses.replace(part, methods=_with(part.methods, learnt))
            learnt, history = lesson.teach(
                part,
                identity={**identity, "plan": _digest(part)},
                folder=None if checkpoint is None else Path(checkpoint) / f"round-{number}",
                stages=stages,
            )
            curves.append({"dropped": _count(part), **dataclasses.asdict(history), "best": history.best})
        repaired = dataclasses.replace(given, methods=learnt, fingerprint=fingerprint(inner))
        after = Distillation(model, repaired, expected=lesson.expected)
        # What routers read has changed.
        repaired = meet_keep_ratio(model, repaired, lambda: after.divergence(batches))
        with patched(model, repaired):
            divergence = after.divergence(batches)
    earlier = given.provenance.get("repair")
    provenance = {
        **given.provenance,
        "repair": [*(earlier if isinstance(earlier, list) else []), *curves],
        "repaired_with": {
            **versions(anatomy),
            "arguments": arguments,
            "data": source,
            "tokens": read.numel(),
        },
    }
    # What was measured of its quality no longer holds; it is as fast as it was.
    measured = {name: value for name, value in given.measured.items() if name == "speed"}
    measured["repair"] = {"divergence_before": curves[-1]["held_out"]["0"], "divergence_after": divergence}
    return dataclasses.replace(repaired, provenance=provenance, measured=measured)


@dataclass
class _Lesson:
    """What is the same in every round.

    Attributes:
        model: The unpatched model.
        rows: What is trained on.
        held_out: Batches that are not.
        expected: What the dense model makes of these, once it is known.
    """

    model: Any
    rows: Tensor
    held_out: Sequence[Tensor]
    what: Sequence[What]
    near: int | None
    rank: int
    hidden: float
    settings: TrainingSettings
    every: int
    patience: int
    expected: list[Tensor] = field(default_factory=list)

    def teach(
        self, plan: Plan, *, identity: Mapping[str, Any], folder: Path | None, stages: Stages
    ) -> tuple[list[PlannedMethod], History]:
        """Train what a plan leaves open; the model is unpatched before and after."""
        inner = transformer_of(self.model)
        torch.manual_seed(self.settings.seed)
        weights = None
        with patched(self.model, plan), frozen(inner):
            try:
                anatomy = find_anatomy(inner)
                weights = TrainedWeights(anatomy, plan, self.what, self.near, self.rank)
                decisions = plan.decisions(anatomy)
                layers = changed_layers(anatomy, plan, decisions) if self.hidden else ()
                student = Distillation(self.model, plan, weights, self.hidden, layers, self.expected)
                before = student.divergence(self.held_out)
                if before < _NOTHING:
                    raise CalibrationError(
                        f"There is nothing to repair: on rows of {self.rows.shape[-1]} tokens the plan is as far from "
                        f"dense as {before:.1e}. Elimination acts on long texts only: give a greater length."
                    )
                history = fit(
                    weights,
                    student.loss,
                    self.rows,
                    self.settings,
                    identity=identity,
                    folder=folder,
                    stages=stages,
                    early_stop=EarlyStop(
                        lambda step: student.divergence(self.held_out) if step else before,
                        self.every,
                        self.patience,
                    ),
                )
                return _merged(weights.repaired(plan)), history
            finally:
                if weights is not None and weights.adapters is not None:
                    weights.adapters.take_out()


def _with(methods: Sequence[PlannedMethod], learnt: Sequence[PlannedMethod]) -> list[PlannedMethod]:
    """A round's methods with what earlier rounds have learnt."""
    known = {
        (type(method).__name__, name): tensor
        for method in learnt
        for name, tensor in tensors_of(method).items()
    }
    found: list[Any] = [m for m in methods if not (learnt and isinstance(m, WeightDelta))]
    for place, method in enumerate(found):
        lead = type(method).__name__
        weights = {name: known.get((lead, name), tensor) for name, tensor in tensors_of(method).items()}
        if weights:
            found[place] = dataclasses.replace(method, weights=weights)
    return [*found, *(method for method in learnt if isinstance(method, WeightDelta))]


def _merged(methods: Sequence[PlannedMethod]) -> list[PlannedMethod]:
    """The methods with at most one change of weights, at the end."""
    deltas = [method for method in methods if isinstance(method, WeightDelta)]
    others = [method for method in methods if not isinstance(method, WeightDelta)]
    return [*others, functools.reduce(WeightDelta.followed_by, deltas)] if deltas else others


def _count(plan: Plan) -> int:
    return sum(len(plan.dropped(kind)) for kind in KINDS)


def _digest(plan: Plan) -> str:
    content = json.dumps(plan.to_dict()["methods"], sort_keys=True).encode()
    return hashlib.sha256(content + safetensors.torch.save(plan.tensors())).hexdigest()


def _check(what: Sequence[What], rank: int, near: int | None, hidden: float) -> None:
    if isinstance(what, str) or not what or not set(what) <= set(WHAT):
        raise CalibrationError(f"what takes some of {', '.join(WHAT)}, got {what!r}.")
    if rank < 1:
        raise CalibrationError(f"rank must be at least 1, got {rank!r}.")
    if near is not None and near < 0:
        raise CalibrationError(f"near must be at least 0, or None for all layers, got {near!r}.")
    if not (hidden >= 0 and math.isfinite(hidden)):
        raise CalibrationError(f"hidden must be a number from 0 up, got {hidden!r}.")


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype not in _FLOATING:
            raise CalibrationError(
                f"Repair needs weights in float32, bfloat16 or float16, and {name} is quantised ({parameter.dtype}). "
                "Load the checkpoint without quantisation."
            )
        if parameter.is_meta:
            raise CalibrationError(
                f"Repair needs the whole model in memory, and {name} is kept elsewhere. Load it without offloading."
            )

"""`slimformer.repair`: minutes of self-distillation win back what a plan lost."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.calibration.drops.drop import tokenizer_of, versions
from slimformer.calibration.keep_ratio import meet_keep_ratio
from slimformer.calibration.mixture.rows import mixture_rows, mixture_texts
from slimformer.calibration.mixture.sources import sources_of
from slimformer.errors import CalibrationError
from slimformer.evaluation.panel.sizes import PanelBudget
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.readable import longest
from slimformer.model.anatomy import find_anatomy, transformer_of
from slimformer.model.layer_parts import KINDS
from slimformer.patching import patched, status
from slimformer.plans.plan import Plan, PlannedMethod, fingerprint
from slimformer.text.progress import Stages
from slimformer.text.sources import check_token_ids
from slimformer.training.attempts.lesson import Lesson, digest, with_learnt
from slimformer.training.attempts.minutes import Minutes
from slimformer.training.attempts.outcome import Judges, Outcome
from slimformer.training.distillation import Distillation, is_decoder
from slimformer.training.loop import Precision, TrainingSettings, processes_meet
from slimformer.training.rounds import in_rounds
from slimformer.training.trained_weights import WHAT, What

_logger = logging.getLogger("slimformer")
_HELD_OUT_ROWS, _HELD_OUT_TEXTS, _TEXTS_AT_ONCE = 12, 128, 32
# Where the time given does not end it before.
_STEPS = 2000
# Rows of a step, by device: fewer leave a GPU waiting for the CPU. Texts that are embedded are short, and are also
# compared with each other.
_ROWS, _ROWS_ELSE = {"cuda": 8}, 4
_TEXTS, _TEXTS_ELSE = {"cuda": 64}, 32
# What is trained, by device: what is read in minutes.
_NEAR: dict[str, int | None] = {"cuda": None}
_RANK = {"cuda": 64}
_EVERY, _MEASUREMENTS = 25, 40
# The part of the time in which the model writes what it is trained on.
_WRITING = 0.2
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def repair(
    model: Any,
    plan: Plan | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    data: str | os.PathLike[str] | Iterable[str] | Mapping[str, float] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    what: Sequence[What] = WHAT,
    near: int | Literal["auto"] | None = "auto",
    rank: int | Literal["auto"] = "auto",
    hidden: float = 0.0,
    length: int = 1024,
    rounds: int = 1,
    minutes: float | None = 10.0,
    every: int | None = None,
    patience: int = 4,
    settings: TrainingSettings | None = None,
    gradient_checkpointing: bool = False,
    panel: PanelBudget | None = "quick",
    cache: str | os.PathLike[str] | None = None,
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

    A repair that wins nothing says so: where no step is better than none, the learning rate is lowered three times, and
    then the plan comes back as it was, with `plan.measured["repair"]["won"]` False.

    Args:
        model: An unpatched decoder, encoder, or SentenceTransformer; it is left as it was, bit for bit.
        plan: The plan to repair, or where it is.
        tokenizer: The model's tokenizer; a SentenceTransformer or Pipeline brings its own.
        data: As for `slimformer.calibrate`, or a mapping from sources to weights, of which `"own-words"` (what the
            model writes), `"built-in"` and `"copying"` (random sequences that repeat) are built in. Left out, these
            three, and text alone stands in them for what is built in; encoders read that text, or the built-in one.
            Decoders read texts one behind the other, encoders one by one.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Measure on every fifth text, which is not trained on; without, on the last ones.
        what: What is trained: `"added"` (filters, means and heads of the plan), `"norms"` (with biases), and `"lora"`
            on linear layers (arXiv 2106.09685).
        near: Norms and linear layers of so many layers below and above a change are trained; None for all layers.
            `"auto"` is all of them on a GPU, else two.
        rank: Of the low-rank adapters; `"auto"` is 64 on a GPU, which reads enough in minutes to fill that, else 16.
        hidden: How much the residual behind changed layers counts beside the outputs; 0 leaves it out.
        length: Tokens per row.
        rounds: Drop the plan's sublayers in so many rounds, each followed by a repair of as many steps.
        minutes: About how long it may take in all; None for as long as the steps take.
        every: Steps between measurements on text that is not trained on; None for one fortieth of all, 25 at least.
        patience: So many measurements without a better one end a round.
        settings: How long and how fast; the learning rate `"auto"` is found by a range test of a few steps.
        gradient_checkpointing: Compute layers again in the backward pass: less memory, a third more time.
        panel: How much of its panel the plan is judged by before and after, for decoders; None leaves that out.
        cache: A folder for what the model writes, which is read from there the next time.
        checkpoint: A folder for checkpoints. The same call resumes from them after an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The repaired plan, or the plan itself where nothing was won. `plan.measured["repair"]` says which (`won`), with
        the divergence from dense before and after on text that was not trained on, of every source;
        `plan.provenance["repair"]` has the curve of every round, the learning rates tried, and what they gave.

    Raises:
        CalibrationError: If an argument is not one of those allowed, the model is patched or quantised, the plan leaves
            nothing to repair, or training fails.
        DataError: If the text is too short, or a source or its weight is none.
        PlanError: If the plan does not fit the model.

    Example:
        >>> repaired = slimformer.repair(model, plan, tokenizer, data="text.jsonl")  # doctest: +SKIP
        >>> repaired.measured["repair"]["won"]  # doctest: +SKIP
        True
    """
    time_left = Minutes(minutes)
    given = plan if isinstance(plan, Plan) else Plan.from_pretrained(plan)
    device = transformer_of(model).device.type
    settings = usual_settings(model) if settings is None else settings
    near = _NEAR.get(device, 2) if near == "auto" else near
    rank = _RANK.get(device, 16) if rank == "auto" else rank
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
    decoder = is_decoder(model)
    sources = sources_of(data, decoder)
    settings = dataclasses.replace(settings, precision=_precision(settings, inner))
    every = max(_EVERY, settings.steps // _MEASUREMENTS) if every is None else every
    arguments = {
        "what": list(what),
        "near": near,
        "rank": rank,
        "hidden": hidden,
        "length": tokens,
        "rounds": rounds,
        "hold_out": hold_out,
        "minutes": minutes,
        **vars(settings),
    }
    curves: list[dict[str, Any]] = []
    learnt: Sequence[PlannedMethod] = ()
    with evaluating(inner), Stages(progress) as stages:
        processes_meet(inner)
        Lesson.check(model, given, what, near, rank)
        cut: dict[str, Any] = {
            "text_field": text_field,
            "hold_out": hold_out,
            "tokens": tokens,
            "count": settings.rows_read,
            "seed": settings.seed,
        }
        if decoder:
            text = mixture_rows(
                inner,
                tokenizer,
                sources,
                held_out=_HELD_OUT_ROWS,
                seconds=time_left.part(_WRITING),
                cache=cache or checkpoint,
                stages=stages,
                **cut,
            )
        else:
            text = mixture_texts(tokenizer, sources, held_out=_HELD_OUT_TEXTS, **cut)
        for rows in (text.read, text.held_out):
            check_token_ids(rows, inner)
        judges = Judges.of(model, given, tokenizer, panel if decoder else None, cache, time_left)
        batches, of = text.batches(1 if decoder else _TEXTS_AT_ONCE)
        identity = {"data": text.record, "text": text_field, "model": fingerprint(inner), **arguments}
        lesson = Lesson(
            model,
            text.read,
            batches,
            what,
            near,
            rank,
            hidden,
            settings,
            every,
            patience,
            gradient_checkpointing,
        )
        unrepaired = Distillation(model, given, expected=lesson.expected)
        with patched(model, given):
            before = unrepaired.divergences(batches)
        for number, part in enumerate(parts, start=1):
            part = dataclasses.replace(part, methods=with_learnt(part.methods, learnt))
            learnt, done = lesson.teach(
                part,
                identity={**identity, "plan": digest(part)},
                folder=None if checkpoint is None else Path(checkpoint) / f"round-{number}",
                stages=stages,
                deadline=time_left.until(1 / (len(parts) - number + 1)),
            )
            curves.append({"dropped": _count(part), **done.to_dict()})
        repaired = dataclasses.replace(given, methods=learnt, fingerprint=fingerprint(inner))
        student = Distillation(model, repaired, expected=lesson.expected)
        # What routers read has changed.
        repaired = meet_keep_ratio(model, repaired, lambda: student.divergence(batches))
        with patched(model, repaired):
            after = student.divergences(batches)
        outcome = Outcome.of(before, after, of, curves, judges.after(model, repaired))
    earlier = given.provenance.get("repair")
    provenance = {
        **given.provenance,
        "repair": [*(earlier if isinstance(earlier, list) else []), *curves],
        "repaired_with": {
            **versions(anatomy),
            "arguments": arguments,
            "data": "; ".join(part["from"] for part in text.record.values()),
            "sources": text.record,
            "tokens": text.read.numel(),
        },
    }
    if not outcome.won:
        _logger.warning("Repair won nothing, and the plan is what it was: %s", outcome.why)
        return dataclasses.replace(
            given, provenance=provenance, measured={**given.measured, **outcome.to_dict()}
        )
    # What was measured of its quality no longer holds; it is as fast as it was.
    measured = {name: value for name, value in given.measured.items() if name == "speed"}
    return dataclasses.replace(repaired, provenance=provenance, measured={**measured, **outcome.to_dict()})


def usual_settings(model: Any) -> TrainingSettings:
    """Of a repair of a model, where it is.

    Example:
        >>> from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
        >>> small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> usual_settings(LlamaForCausalLM(LlamaConfig(**small))).rows
        4
        >>> usual_settings(BertModel(BertConfig(**small))).rows
        32
    """
    rows, usual = (_ROWS, _ROWS_ELSE) if is_decoder(model) else (_TEXTS, _TEXTS_ELSE)
    return TrainingSettings(rows=rows.get(transformer_of(model).device.type, usual), steps=_STEPS)


def _count(plan: Plan) -> int:
    return sum(len(plan.dropped(kind)) for kind in KINDS)


def _precision(settings: TrainingSettings, model: PreTrainedModel) -> Precision:
    """Mixed where the weights are held in bfloat16 on a GPU; what is trained is held in float32 everywhere."""
    if settings.precision != "auto":
        return settings.precision
    mixed = model.device.type == "cuda" and model.dtype == torch.bfloat16 and torch.cuda.is_bf16_supported()
    return "bf16" if mixed else "no"


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

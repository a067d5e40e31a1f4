"""Which sublayers a model can lose: from a model and text to a plan."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from slimformer import __version__
from slimformer.calibration.drops.budgets import BUDGETS, BudgetName
from slimformer.calibration.drops.calibration_text import CalibrationText, read_mixture, read_text
from slimformer.calibration.drops.fitting import fit_together
from slimformer.calibration.drops.partial_results import PartialResults
from slimformer.calibration.drops.replay import saved_weights
from slimformer.calibration.drops.search import Search, Step, may_drop, most_removals, sublayers_of
from slimformer.calibration.drops.similarity import UNITS, Similarity, Unit, measure_similarity
from slimformer.calibration.drops.stopping import Stop, dense_seconds
from slimformer.calibration.drops.task_judge import TaskJudge
from slimformer.errors import CalibrationError
from slimformer.evaluation.embedding_tasks import EmbeddingTask, is_labelled, task_of
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.readable import predicts_tokens
from slimformer.examination.tiers import known_anatomy
from slimformer.methods.layer_drop import LayerDrop
from slimformer.model.anatomy import Anatomy, transformer_of
from slimformer.patching import status
from slimformer.plans.base_model import base_model_of
from slimformer.plans.plan import Plan, fingerprint
from slimformer.text.progress import Stages

_logger = logging.getLogger("slimformer")
_WHEN_TO_STOP = ("drop", "max_loss", "speedup")


def choose_drops(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    method: LayerDrop | None = None,
    *,
    data: EmbeddingTask | str | os.PathLike[str] | Iterable[str] | Mapping[str, float] | None = None,
    text_field: str = "text",
    hold_out: bool = True,
    selection: Literal["panel", "greedy", "cosine"] | None = None,
    kinds: Sequence[Unit] = ("attention",),
    drop: int | None = None,
    max_loss: float | None = None,
    speedup: float | None = None,
    task: EmbeddingTask | str | os.PathLike[str] | None = None,
    budget: BudgetName | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Find out which sublayers a model can lose, and make the plan that drops them.

    Args:
        model: An unpatched decoder or encoder; it is left as it was.
        tokenizer: Its tokenizer; a SentenceTransformer or Pipeline brings its own.
        method: What a dropped sublayer leaves behind, such as `LayerDrop(replace="filter", taps=4)`; None for nothing.
        data: A `.txt`, `.jsonl` or `.parquet` file, a Hub dataset id, `"-"` for standard input, a list of strings, or
            None for a text that every Python carries. Text like that of your own application is better. For a
            SentenceTransformer also what `task` takes with labels, which is then the task. For `"panel"` also a mapping
            from sources to weights, as `slimformer.repair` takes it; text alone stands in it for what is built in.
        text_field: The field with the text, in JSON lines, Parquet and Hub datasets.
        hold_out: Leave every fifth text alone, so that `slimformer eval` can measure on it.
        selection: `"panel"`, which is what decoders take if None is given, removes, one after the other, what moves the
            predictions of a decoder least on several sources: what the model writes itself, text, and sequences that
            repeat, by the mean over them and the worst of them. `"greedy"` does the same on the text alone (in encoders
            by the cosine of mean-pooled embeddings), and `"cosine"` is LLM-Drop's one pass (arXiv 2406.15786).
        kinds: What may be dropped: `"attention"`, `"mlp"`, both (joint), or `"block"`.
        drop: Stop after so many removals.
        max_loss: Stop before the divergence on the calibration text, with `"panel"` on any source, passes this: nats of
            KL, or 1 - cosine.
        speedup: Stop once a forward over one block is so many times as fast, by times measured here.
        task: For a SentenceTransformer, what `"greedy"` removals are to keep instead: a folder in BEIR's layout, a
            `.tsv` file of scored pairs, text for lists of neighbours, or what `read_task` of
            `slimformer.evaluation.embedding_tasks` makes of them. What is lost is then a share of its figure; without
            `data`, its texts are read.
        budget: `"quick"`, `"standard"` or `"thorough"`: how much text is read (`slimformer.calibration.drops.budgets`);
            None for the first on a CPU and the second on a GPU.
        seed: Which of the text is read.
        checkpoint: A folder for partial results, and for what the model writes. The same call resumes from them after
            an interruption.
        progress: Show progress bars with the time left.

    Returns:
        The plan, with what it was chosen by in `plan.provenance`.

    Raises:
        CalibrationError: If an argument is not one of those allowed, the model is patched, a target cannot be
            reached, or the model computes NaN.
        DataError: If the text cannot be read or is too short.
        UnsupportedModelError: If the model's structure is not known.

    Example:
        >>> import slimformer
        >>> plan = slimformer.calibrate(model, tokenizer, LayerDrop, data="notes.txt", drop=4)  # doctest: +SKIP
        >>> slimformer.patch(model, plan)  # doctest: +SKIP
    """
    method = LayerDrop() if method is None else method
    if method.attention or method.mlp or method.block:
        raise CalibrationError(
            f"{method!r} names its sublayers, and calibration chooses them. Patch it as it is, or leave them out."
        )
    replace, taps = method.replace, method.taps
    inner, anatomy = transformer_of(model), known_anatomy(model)
    decoder = predicts_tokens(inner, anatomy)
    if selection is None:
        selection = "panel" if decoder else "greedy"
    if budget is None:
        budget = "standard" if inner.device.type == "cuda" else "quick"
    if task is None and is_labelled(data):
        task, data = cast(EmbeddingTask, data), None
    kept = None if task is None else task_of(task, text_field)
    arguments: dict[str, Any] = {
        "selection": selection,
        "kinds": list(kinds),
        "drop": drop,
        "max_loss": max_loss,
        "speedup": speedup,
        "replace": replace,
        "taps": taps,
        "budget": budget,
        "seed": seed,
        "hold_out": hold_out,
        "task": None if kept is None else kept.source,
    }
    _check(arguments, decoder)
    if isinstance(data, Mapping) and selection != "panel":
        raise CalibrationError(
            f"Several sources are for selection='panel', got selection={selection!r}. Give one text, or "
            "selection='panel'."
        )
    if status(model):
        raise CalibrationError(
            "The model is patched; plans are made for the dense model. Call unpatch first."
        )
    of_task = data is None
    if kept is not None:
        kept = kept.split()[0] if hold_out else kept
        arguments["task"] = kept.source
        if of_task:
            # A task holds out what it is measured by, not what it reads.
            data, hold_out = kept.texts, False
    stop = Stop(drop, max_loss, speedup)
    stop.check(most_removals(anatomy, kinds), kinds)
    sizes = BUDGETS[budget]
    with evaluating(inner), Stages(progress) as stages:
        read: tuple[Any, ...] = (
            inner,
            anatomy,
            tokenizer or tokenizer_of(model),
            data,
            text_field,
            hold_out,
            sizes,
            seed,
        )
        if selection == "panel":
            fitting = replace != "nothing"
            text = read_mixture(*read, fitting=fitting, cache=checkpoint, stages=stages)
        else:
            text = read_text(*read)
        if kept is not None and of_task:
            text.source = f"the texts of {kept.source}, {text.source.partition(', ')[2]}"
        pool = None if sizes.pool is None or drop is None else max(sizes.pool * drop, drop + 1)
        deciding = {name: arguments[name] for name in arguments if name not in _WHEN_TO_STOP}
        identity = {**deciding, "pool": pool, "data": text.source, "model": fingerprint(inner)}
        partial = PartialResults(checkpoint, identity)
        similarity = partial.similarity()
        if similarity is None:
            batches = text.similarity_batches()
            similarity = measure_similarity(inner, stages.track(batches, "similarity"))
            partial.keep_similarity(similarity)
        units = _ranked(similarity, kinds)
        if speedup is not None:
            stop.seconds = dense_seconds(inner, anatomy, text.final_batches()[0], kinds)
        search = None
        if selection != "cosine" or max_loss is not None:
            judge = None if kept is None else TaskJudge.record(model, kept, replace, taps)
            search = text.search(replace, taps, stages.advance("candidates judged"), judge)
        if selection == "panel":
            units = _best_alone(units, cast(Search, search), partial)
        steps = (
            _in_order(units, stop, anatomy, search)
            if selection == "cosine"
            else _greedy(units[:pool], stop, cast(Search, search), partial)
        )
        dropped = [sublayer for step in steps for sublayer in sublayers_of(step.kind, step.layer)]
        fitted = (
            fit_together(anatomy, text.final_calls(), dropped, replace, taps) if replace != "nothing" else {}
        )
    layers: dict[str, list[int]] = {
        unit: sorted(step.layer for step in steps if step.kind == unit) for unit in UNITS
    }
    dropping = LayerDrop(
        layers["attention"],
        layers["mlp"],
        layers["block"],
        replace=replace,
        taps=taps if replace == "filter" else 1,
        weights=saved_weights(fitted),
    )
    return Plan([dropping], fingerprint(inner), _provenance(arguments, text, similarity, steps, search))


def _greedy(
    units: Sequence[tuple[Unit, int]], stop: Stop, search: Search, partial: PartialResults
) -> list[Step]:
    steps: list[Step] = []
    for step in partial.steps():
        if stop.reached(steps) or stop.too_far(step.divergence):
            return _some(steps, stop)
        steps.append(step)
    while not stop.reached(steps):
        taken = [(step.kind, step.layer) for step in steps]
        gone = [sublayer for unit in taken for sublayer in sublayers_of(*unit)]
        alive = [
            unit
            for unit in units
            if unit not in taken and may_drop(search.anatomy, [*gone, *sublayers_of(*unit)])
        ]
        if not alive:
            stop.give_up(steps)
            break
        step = search.next_step(steps, alive)
        if stop.too_far(step.divergence):
            break
        steps.append(step)
        partial.keep_steps(steps)
        asked = "" if stop.drop is None else f" of {stop.drop}"
        _logger.info(
            "Removal %d%s: %s %d, %s %.4f.",
            len(steps),
            asked,
            step.kind,
            step.layer,
            search.judge.name,
            step.divergence,
        )
    return _some(steps, stop)


def _best_alone(
    units: Sequence[tuple[Unit, int]], search: Search, partial: PartialResults
) -> list[tuple[Unit, int]]:
    """The candidates, the one first that is missed least when it alone goes."""
    may_go = [unit for unit in units if may_drop(search.anatomy, sublayers_of(*unit))]
    search.singles = dict(partial.singles())
    search.judge_alone(may_go)
    partial.keep_singles(search.singles)
    return sorted(may_go, key=lambda unit: search.loss(search.singles[unit]))


def _in_order(
    units: Sequence[tuple[Unit, int]], stop: Stop, anatomy: Anatomy, search: Search | None
) -> list[Step]:
    steps: list[Step] = []
    dropped: list[tuple[Any, int]] = []
    for kind, layer in units:
        if stop.reached(steps):
            return steps
        more = [*dropped, *sublayers_of(kind, layer)]
        if not may_drop(anatomy, more):
            continue
        step = (
            Step(kind, layer, None) if search is None else Step.of(kind, layer, search.divergences_of(more))
        )
        if stop.too_far(step.divergence):
            return _some(steps, stop)
        steps, dropped = [*steps, step], more
    if not stop.reached(steps):
        stop.give_up(steps)
    return _some(steps, stop)


def _some(steps: list[Step], stop: Stop) -> list[Step]:
    if not steps:
        raise CalibrationError(
            f"Nothing can be dropped within a loss of {stop.max_loss}. Allow more, or try "
            "LayerDrop(replace='filter')."
        )
    return steps


def _ranked(similarity: Similarity, kinds: Sequence[Unit]) -> list[tuple[Unit, int]]:
    return similarity.most_similar(len(kinds) * len(similarity.attention), kinds)


def _check(arguments: dict[str, Any], decoder: bool) -> None:
    allowed: dict[str, tuple[Any, ...]] = {
        "selection": ("panel", "greedy", "cosine") if decoder else ("greedy", "cosine"),
        "budget": get_args(BudgetName),
    }
    for name, values in allowed.items():
        if arguments[name] not in values:
            raise CalibrationError(f"{name} must be one of {', '.join(values)}, got {arguments[name]!r}.")
    kinds = arguments["kinds"]
    if (
        not kinds
        or len(set(kinds)) != len(kinds)
        or set(kinds) - set(UNITS)
        or ("block" in kinds and kinds[1:])
    ):
        raise CalibrationError(
            f"kinds must be ('attention',), ('mlp',), ('attention', 'mlp') or ('block',), got {tuple(kinds)!r}."
        )
    if all(arguments[name] is None for name in _WHEN_TO_STOP):
        raise CalibrationError(
            f"Say when to stop: give {', '.join(_WHEN_TO_STOP[:-1])} or {_WHEN_TO_STOP[-1]}."
        )
    if arguments["task"] is not None and arguments["selection"] == "panel":
        raise CalibrationError(
            "A task is for selection='greedy', got selection='panel'. Give one or the other."
        )
    if arguments["task"] is not None and arguments["selection"] == "cosine" and arguments["max_loss"] is None:
        raise CalibrationError(
            "Nothing is judged by the task with selection='cosine' and no max_loss. Take selection='greedy', or give "
            "max_loss."
        )
    for name, least in (("drop", 1), ("max_loss", 0), ("speedup", 1)):
        if arguments[name] is not None and not arguments[name] >= least:
            raise CalibrationError(f"{name} must be at least {least}, got {arguments[name]!r}.")


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that a SentenceTransformer or Pipeline brings.

    Raises:
        CalibrationError: If it brings none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise CalibrationError(
            "No tokenizer was given, and the model brings none. Pass the one of its checkpoint, as "
            "AutoTokenizer.from_pretrained gives it."
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def _provenance(
    arguments: dict[str, Any],
    text: CalibrationText,
    similarity: Similarity,
    steps: Sequence[Step],
    search: Search | None,
) -> dict[str, Any]:
    return {
        **versions(text.anatomy),
        "arguments": arguments,
        "data": text.source,
        "tokens": text.tokens,
        "similarity": {unit: list(getattr(similarity, unit)) for unit in UNITS},
        **({} if search is None else {"divergence_name": search.judge.name}),
        "steps": [step.to_dict() for step in steps],
    }


def versions(anatomy: Anatomy) -> dict[str, Any]:
    """What a plan's provenance says of the model, the software and the device."""
    device = anatomy.stack.device
    return {
        "base_model": base_model_of(anatomy.stack.config, anatomy.causal),
        "versions": {
            "slimformer": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }

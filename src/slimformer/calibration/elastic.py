"""Elastic depth and width: the quality of every early exit at every embedding size (2DMSE, arXiv 2402.14776)."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

from slimformer.calibration.drops.drop import versions
from slimformer.calibration.drops.partial_results import PartialResults
from slimformer.calibration.exit_heads import fit_exits, pooling_of
from slimformer.errors import CalibrationError
from slimformer.evaluation.elastic_grid import Grid
from slimformer.evaluation.embedding_tasks import EmbeddingTask, task_of
from slimformer.evaluation.perplexity import evaluating
from slimformer.examination.tiers import known_anatomy
from slimformer.methods.early_exit import EarlyExit
from slimformer.model.anatomy import transformer_of
from slimformer.patching import patched, status
from slimformer.plans.plan import Plan, fingerprint
from slimformer.text.progress import Stages

_NARROWEST = 16


def choose_exit(
    model: Any,
    method: EarlyExit | None = None,
    *,
    data: EmbeddingTask | str | os.PathLike[str] | Iterable[str] | None = None,
    text_field: str = "text",
    max_loss: float | None = None,
    layers: Sequence[int] | None = None,
    dimensions: Sequence[int] | None = None,
    head: bool = True,
    fit_on: Iterable[str] | None = None,
    hold_out: bool = True,
    batch_size: int = 32,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Measure every exit at every width on your own data, and make the plan of one exit.

    Args:
        model: An unpatched SentenceTransformer; it is left as it was.
        method: The exit of the plan, as `EarlyExit(layer)`: how many layers run.
        data: What quality is: a folder in BEIR's layout (nDCG@10), a `.tsv` file of scored pairs (Spearman), text
            without labels (agreement with the dense model's neighbour lists), or a task made from one of them.
        text_field: The field with the text, for text without labels.
        max_loss: Instead of `method`: the lowest exit that loses at most this fraction of the dense figure, 0.01 for
            1%.
        layers: The exits to measure; None for all that there are.
        dimensions: The widths to measure; None for the whole and its halves, down to 16.
        head: Fit a linear head for every exit; without, embeddings are what the layer holds.
        fit_on: Texts to fit heads on; None for the texts of the data.
        hold_out: Choose by a part of the data, and leave the rest for `slimformer eval --task`.
        batch_size: Texts per forward.
        checkpoint: A folder for partial results. The same call resumes from them after an interruption.
        progress: Show a progress bar.

    Returns:
        A plan with one `EarlyExit`, the grid and its Pareto front in `plan.provenance["elastic"]`.

    Raises:
        CalibrationError: If not exactly one of a layer and `max_loss` is given, the method has a head, a layer or
            dimension does not exist, no exit loses so little, the model is patched or is no SentenceTransformer, or
            heads cannot be fitted.
        DataError: If the data cannot be read.

    Example:
        >>> from sentence_transformers import SentenceTransformer  # doctest: +SKIP
        >>> model = SentenceTransformer("all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> plan = slimformer.calibrate(model, None, EarlyExit(layer=5), data="cranfield")  # doctest: +SKIP
        >>> slimformer.patch(model, plan)  # doctest: +SKIP
    """
    layer = None if method is None else method.layer
    if (layer is None) == (max_loss is None):
        raise CalibrationError(
            f"Say where to exit: give either EarlyExit(layer) or max_loss, got "
            f"{'neither' if layer is None else 'both'}."
        )
    if method is not None and method.weights:
        raise CalibrationError(
            "The EarlyExit has a head already, and calibration fits one. Patch it as it is, or give EarlyExit(layer)."
        )
    if max_loss is not None and not 0 <= max_loss < 1:
        raise CalibrationError(f"max_loss must be a fraction from 0 to below 1, got {max_loss!r}.")
    if head:
        pooling_of(model)
    if status(model):
        raise CalibrationError(
            "The model is patched; plans are made for the dense model. Call unpatch first."
        )
    anatomy, inner = known_anatomy(model), transformer_of(model)
    task = task_of(data, text_field)
    if hold_out:
        task = task.split()[0]
    # Heads that are judged have not seen what judges them; the one that goes into the plan has seen everything.
    judged, texts = task.apart() if head and fit_on is None else (task, list(fit_on or ()))
    final = task.texts if head and fit_on is None else texts
    depth = len(anatomy.layers)
    lowest = 1 if anatomy.causal else 0
    exits = _allowed("exit", range(lowest, depth) if layers is None else layers, range(lowest, depth))
    if layer is not None:
        exits = sorted({*exits, *_allowed("exit", [layer], range(lowest, depth))})
    with evaluating(inner), Stages(progress) as stages:
        whole = len(model.encode("a text", show_progress_bar=False))
        widths = _allowed(
            "dimension", _halves(whole) if dimensions is None else dimensions, range(1, whole + 1)
        )
        widths = sorted({*widths, whole}, reverse=True)
        methods = (
            fit_exits(model, texts, exits, batch_size=batch_size)
            if head
            else {k: EarlyExit(k) for k in exits}
        )
        identity = {"task": task.source, "texts": _digest(texts), "head": head, "widths": widths}
        partial = PartialResults(checkpoint, {**identity, "model": fingerprint(inner)})
        rows = {int(index): row for index, row in (partial.kept("rows") or {}).items()}
        judged = judged.recorded(model)
        every = (*exits, depth)
        for index in stages.track(every, "exits measured"):
            if index in rows:
                continue
            with patched(model, methods[index]) if index < depth else contextlib.nullcontext():
                rows[index] = judged.scores(model, widths)
            partial.keep("rows", {str(measured): row for measured, row in rows.items()})
        grid = Grid(task.name, every, tuple(widths), tuple(tuple(rows[index]) for index in every))
        chosen = layer if layer is not None else _lowest(grid, max_loss or 0.0)
        if len(final) > len(texts):
            methods = fit_exits(model, final, [chosen], batch_size=batch_size)
    arguments = {
        "layer": layer,
        "max_loss": max_loss,
        "head": head,
        "hold_out": hold_out,
    }
    provenance = {
        **versions(anatomy),
        "arguments": arguments,
        "data": task.source,
        **({"head_fitted_on": f"{len(final)} texts"} if head else {}),
        "elastic": grid.to_dict(),
    }
    return Plan([methods[chosen]], fingerprint(inner), provenance)


def _digest(texts: Sequence[str]) -> str:
    """Tells texts apart without keeping them."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _allowed(name: str, given: Iterable[Any], allowed: range) -> list[int]:
    found = list(given)
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
            raise CalibrationError(
                f"There is no {name} {value!r}: allowed are {allowed.start} to {allowed.stop - 1}."
            )
    if not found:
        raise CalibrationError(f"Give at least one {name}, or None for all.")
    return sorted(set(found))


def _halves(whole: int) -> list[int]:
    """The whole width and its halves."""
    found = [whole]
    while found[-1] // 2 >= _NARROWEST:
        found.append(found[-1] // 2)
    return found


def _lowest(grid: Grid, max_loss: float) -> int:
    full = [row[0] for row in grid.scores]
    if grid.dense <= 0:
        raise CalibrationError(
            f"The dense {grid.name} is {grid.dense:.4g}, and of that no fraction can be lost. Check the data, or "
            "choose a layer."
        )
    for index, score in zip(grid.layers[:-1], full, strict=False):
        if score >= (1 - max_loss) * grid.dense:
            return index
    reached = ", ".join(f"{index}: {score:.4g}" for index, score in zip(grid.layers, full, strict=True))
    raise CalibrationError(
        f"No exit loses at most {max_loss:.3g} of the dense {grid.name}. By layers that run, at full width: {reached}. "
        "Allow more, fit heads on more text like your own (fit_on), or choose a layer."
    )

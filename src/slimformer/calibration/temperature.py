"""Which softmax temperature serves an embedding model best, by your own task or without labels (arXiv 2410.24200)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from slimformer.calibration.drops.drop import versions
from slimformer.errors import CalibrationError
from slimformer.evaluation.embedding_tasks import EmbeddingTask, NeighbourTask, task_of
from slimformer.evaluation.length_spread import LengthSpread
from slimformer.evaluation.perplexity import evaluating
from slimformer.methods.temperature import TempScale
from slimformer.model.anatomy import find_anatomy, transformer_of
from slimformer.patching import patched, status
from slimformer.plans.plan import Plan, fingerprint
from slimformer.text.progress import Stages

# The paper's.
TEMPERATURES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


def choose_temperature(
    model: Any,
    *,
    data: EmbeddingTask | LengthSpread | str | os.PathLike[str] | Iterable[str] | None = None,
    text_field: str = "text",
    temperatures: Sequence[float] = TEMPERATURES,
    hold_out: bool = True,
    batch_size: int = 32,
    progress: bool = False,
) -> Plan:
    """Sweep the temperature of attention, and make the plan of the best one.

    With labels, the best is what gives the best figure on your task. Without, it is the mildest that makes embeddings
    of long texts spread as those of short ones do, which says nothing about what they are good for: prefer labels.

    Args:
        model: An unpatched SentenceTransformer; it is left as it was.
        data: A folder in BEIR's layout (nDCG@10), a `.tsv` file of scored pairs (Spearman), text without labels (how
            much of the spread of short texts long ones keep), or a task made from one of them.
        text_field: The field with the text, for text without labels.
        temperatures: What is tried; 1, the unpatched model, is always among them.
        hold_out: Choose by a part of the data, and leave the rest for `slimformer eval --task`.
        batch_size: Texts per forward, where spread is measured.
        progress: Show a progress bar.

    Returns:
        A plan with one `TempScale`, and the curve in `plan.provenance["temperature"]`. Where nothing is better than the
        unpatched model its `tau` is 1.

    Raises:
        CalibrationError: If the model is patched or is no SentenceTransformer.
        DataError: If the data cannot be read.
        PlanError: If a temperature is not a number above 0.
        UnsupportedModelError: If the model would ignore a temperature.

    Example:
        >>> from sentence_transformers import SentenceTransformer  # doctest: +SKIP
        >>> model = SentenceTransformer("all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> plan = slimformer.calibrate(model, None, TempScale, data="my-beir")  # doctest: +SKIP
    """
    if status(model):
        raise CalibrationError(
            "The model is patched; plans are made for the dense model. Call unpatch first."
        )
    tried = sorted({1.0, *(TempScale(tau).tau for tau in temperatures)}, reverse=True)
    task = _task(data, text_field, batch_size)
    if hold_out:
        task = task.split()[0]
    scores, spreads = [], []
    with evaluating(transformer_of(model)), Stages(progress) as stages:
        for tau in stages.track(tried, "temperatures measured"):
            with patched(model, TempScale(tau)):
                if isinstance(task, LengthSpread):
                    spreads.append(task.spreads(model))
                    scores.append(task.figure(spreads[-1]))
                else:
                    scores.append(task.scores(model)[0])
    # Of equals the one that changes least.
    best = max(range(len(tried)), key=lambda index: (scores[index], -abs(1 - tried[index])))
    curve: dict[str, Any] = {"name": task.name, "tau": tried, "scores": scores}
    if spreads:
        curve |= {"lengths": list(spreads[0]), "spread": [list(found.values()) for found in spreads]}
    provenance = {
        **versions(find_anatomy(model)),
        "arguments": {"hold_out": hold_out},
        "data": task.source,
        "temperature": curve,
    }
    return Plan([TempScale(tried[best])], fingerprint(transformer_of(model)), provenance)


def _task(data: Any, text_field: str, batch_size: int) -> EmbeddingTask | LengthSpread:
    task: EmbeddingTask | LengthSpread = data if isinstance(data, LengthSpread) else task_of(data, text_field)
    # Agreement with the dense model would always choose the dense model.
    return LengthSpread(task.source, task.texts, batch_size) if isinstance(task, NeighbourTask) else task

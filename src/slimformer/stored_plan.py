"""The plan that lies with a checkpoint: written when a patched model is saved, found when it is loaded again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from slimformer.errors import PlanError, SlimformerWarning
from slimformer.methods.unpadding import Unpadding
from slimformer.plan import FILE, METHODS, WEIGHTS, Plan, PlannedMethod, fingerprint


def stored_plan(checkpoint: str) -> Plan | None:
    """The plan in a checkpoint's folder, or in the folder of a sentence-transformers pipeline's first module.

    Args:
        checkpoint: What the model's configuration says it was loaded from: a folder, a Hub id, or nothing.

    Returns:
        None where there is no such folder, or no plan in it.

    Raises:
        PlanError: If there is a plan that cannot be read.

    Example:
        >>> stored_plan("no/such/folder") is None
        True
    """
    if not checkpoint or not os.path.isdir(checkpoint):
        return None
    for folder in (Path(checkpoint), _first_module(Path(checkpoint))):
        if (folder / FILE).is_file():
            return Plan.from_pretrained(folder)
    return None


def save_with_plan(
    model: PreTrainedModel,
    methods: Sequence[object],
    save_directory: str | os.PathLike[str],
    *arguments: Any,
    **options: Any,
) -> None:
    """Stands in for a patched model's `save_pretrained`: writes the checkpoint as ever, and the plan beside it.

    Args:
        model: The patched model.
        methods: What it is patched with.
        save_directory: As `save_pretrained` takes it; pipelines pass on their folder.
        arguments: The other arguments of `save_pretrained`, by place.
        options: By name.

    Raises:
        PlanError: If the plan cannot be written, or if with `push_to_hub` the checkpoint would go without it.
    """
    plan = _plan_of(model, methods)
    if plan is not None and options.get("push_to_hub"):
        raise PlanError(
            "save_pretrained(push_to_hub=True) uploads the checkpoint before the plan lies beside it. Call "
            "model.push_to_hub(repo_id), which uploads both."
        )
    type(model).save_pretrained(model, save_directory, *arguments, **options)
    if not (arguments[0] if arguments else options.get("is_main_process", True)):
        return
    if plan is not None:
        plan.save_pretrained(save_directory)
        return
    for name in (FILE, WEIGHTS):
        # A plan of an earlier save would be found again, and is not what this model computes.
        (Path(save_directory) / name).unlink(missing_ok=True)


def _plan_of(model: PreTrainedModel, methods: Sequence[object]) -> Plan | None:
    """One plan of all methods; None if one of them cannot be saved, or there is nothing to save."""
    if len(methods) == 1 and isinstance(methods[0], Plan):
        return methods[0]
    flat: list[PlannedMethod] = []
    for method in methods:
        if isinstance(method, Plan):
            flat.extend(method.methods)
        elif type(method) in METHODS.values():
            flat.append(cast(PlannedMethod, method))
        elif not isinstance(method, Unpadding):
            warnings.warn(
                f"{type(method).__name__} has no form in which a plan could be saved, so the checkpoint was written "
                f"without a plan. Methods that a plan holds: {', '.join(METHODS)}.",
                SlimformerWarning,
                stacklevel=3,
            )
            return None
    return Plan(flat, fingerprint(model)) if flat else None


def _first_module(checkpoint: Path) -> Path:
    """Where sentence-transformers keeps the model, if it is not the folder itself."""
    file = checkpoint / "modules.json"
    if not file.is_file():
        return checkpoint
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        return checkpoint / modules[0]["path"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PlanError(
            f"{file} does not say where the model's files are ({error!r}), so a plan beside them cannot be looked "
            "for. Save the pipeline again, or name the plan: slimformer.patch(model, folder)."
        ) from error

"""The plan that lies with a checkpoint: written when a patched model is saved, found again where it is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
)
from transformers import PreTrainedModel

from slimformer.decisions.registry import name_of, registered
from slimformer.errors import PlanError, SlimformerWarning
from slimformer.methods.unpadding import Unpadding
from slimformer.plans.plan import FILE, WEIGHTS, Plan, PlannedMethod, fingerprint

# Patching a model waits no longer than this for the Hub, in seconds.
_PATIENCE = 3.0


def stored_plan(checkpoint: str, commit: str | None = None) -> Plan:
    """The plan that lies with a checkpoint, for `patch(model, "auto")`.

    The Hub is asked only about a model that it gave, and at the commit that it gave: a name that was a folder's once
    may be a stranger's repository there.

    Args:
        checkpoint: What the model's configuration says it was loaded from: a folder, a Hub id, or nothing.
        commit: The commit of the Hub that it was loaded from; None for any other model.

    Raises:
        PlanError: If there is none, the Hub cannot say, or there is one that cannot be read.
    """
    folder = plan_beside(checkpoint)
    if folder is not None:
        return Plan.from_pretrained(folder)
    if checkpoint and commit and not os.path.isdir(checkpoint):
        return _plan_on_the_hub(checkpoint, commit)
    where = (
        f"the checkpoint {checkpoint}" if checkpoint else "a checkpoint, since the model was loaded from none"
    )
    raise PlanError(
        f'"auto" applies the plan that lies beside {where}, and there is none. Looked at were a folder of this '
        "machine and, for a model that knows its commit on the Hub, its repository (from transformers 5.24 on none "
        "does). Name the plan: slimformer.patch(model, folder or Hub id)."
    )


def plan_beside(checkpoint: str) -> Path | None:
    """The folder with the plan: a checkpoint's own, or that of a sentence-transformers pipeline's first module.

    Args:
        checkpoint: What the model's configuration says it was loaded from.

    Returns:
        None where that is no folder of this machine, or there is no plan in it.

    Raises:
        PlanError: If the pipeline's files do not say where its first module is.

    Example:
        >>> plan_beside("no/such/folder") is None
        True
    """
    if not checkpoint or not os.path.isdir(checkpoint):
        return None
    for folder in (Path(checkpoint), _first_module(Path(checkpoint))):
        if (folder / FILE).is_file():
            return folder
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
        # The folder is the whole checkpoint's, and its card speaks of that.
        plan.save_pretrained(save_directory, card=False)
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
        elif name_of(method) is not None:
            flat.append(cast(PlannedMethod, method))
        elif not isinstance(method, Unpadding):
            warnings.warn(
                f"{type(method).__name__} has no form in which a plan could be saved, so the checkpoint was written "
                f"without a plan. Methods that a plan holds: {', '.join(registered())}; your own too, with "
                '@slimformer.register("a-name") above its class.',
                SlimformerWarning,
                stacklevel=3,
            )
            return None
    return Plan(flat, fingerprint(model)) if flat else None


def _plan_on_the_hub(repo_id: str, commit: str) -> Plan:
    """The plan at the commit that the checkpoint is of; what the Hub said once is in its cache."""
    absent = f'"auto" applies the plan that lies beside the checkpoint, and {repo_id} has none at the commit {commit}.'
    remedy = "Name the plan: slimformer.patch(model, folder or Hub id)."
    if try_to_load_from_cache(repo_id, FILE, revision=commit) is _CACHED_NO_EXIST:
        raise PlanError(f"{absent} {remedy}")
    try:
        file = hf_hub_download(repo_id, FILE, revision=commit, etag_timeout=_PATIENCE)
        with contextlib.suppress(EntryNotFoundError):  # a plan without weights has no such file
            hf_hub_download(repo_id, WEIGHTS, revision=commit, etag_timeout=_PATIENCE)
    except RemoteEntryNotFoundError as error:
        raise PlanError(f"{absent} {remedy}") from error
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise PlanError(
            f"The Hub could not say whether a plan lies with {repo_id}: {type(error).__name__}. {remedy}"
        ) from error
    return Plan.from_pretrained(file)


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

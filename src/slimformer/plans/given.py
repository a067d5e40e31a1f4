"""What `patch` is given: a method, a plan, or where one is."""

from __future__ import annotations

import contextlib
import logging
import os

from torch import nn

from slimformer.decisions.policy import TokenPolicy
from slimformer.errors import PlanError
from slimformer.plans.plan import Plan, PlannedMethod
from slimformer.plans.stored import plan_beside, stored_plan
from slimformer.transforms.transform import AttentionTransform

_logger = logging.getLogger("slimformer")


def method_of(given: PlannedMethod | str | os.PathLike[str], model: nn.Module) -> PlannedMethod:
    """What `patch` was given, read if need be.

    Raises:
        PlanError: If it is no method and no plan.
    """
    if isinstance(given, str) and given == "auto":
        return stored_plan(*_loaded_from(model))
    if isinstance(given, (str, os.PathLike)):
        return Plan.from_pretrained(given)
    if not isinstance(given, (TokenPolicy, AttentionTransform)):
        raise PlanError(
            f"Expected a method such as LayerDrop, a Plan, or where a plan is, got {type(given).__name__}."
        )
    return given


def _loaded_from(model: nn.Module) -> tuple[str, str | None]:
    """The folder or Hub id that a model was loaded from, and the Hub's commit if it was."""
    config = getattr(model, "config", None)
    return getattr(config, "name_or_path", ""), getattr(config, "_commit_hash", None)


def say_what_more_there_is(model: nn.Module) -> None:
    """Where nothing was asked for, say which plan lies beside the checkpoint, or how to make one."""
    beside = None
    # A folder that cannot be read is of no concern where nothing is asked of it.
    with contextlib.suppress(PlanError):
        beside = plan_beside(_loaded_from(model)[0])
    if beside is None:
        _logger.info(
            "Only what loses nothing is applied. slimformer.calibrate(model, tokenizer, LayerDrop, drop=4) makes a "
            "plan that is faster still."
        )
    else:
        _logger.info(
            "A plan lies beside the checkpoint, in %s, and is not applied, since it may change results: "
            'slimformer.patch(model, "auto") applies it.',
            beside,
        )

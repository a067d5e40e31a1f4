"""What can be done with a plan that an optimisation chose, by what is in it."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from slimformer.methods.early_exit import EarlyExit
from slimformer.methods.layer_drop import LayerDrop
from slimformer.methods.weight_delta import WeightDelta
from slimformer.plans.plan import Plan
from slimformer.report.optimization.points import found_in, points_of


class Use(NamedTuple):
    """One thing to do.

    Attributes:
        name: In words.
        how: What to type, or in words why there is nothing.
        typed: Whether it is typed.
    """

    name: str
    how: str
    typed: bool = True


def uses_of(plan: Plan, model: str = "MODEL", folder: str = "PLAN") -> list[Use]:
    """How to use a plan, serve it and undo it.

    Args:
        plan: The plan.
        model: The model's folder or Hub id.
        folder: Where the plan is.

    Example:
        >>> from slimformer import LayerDrop
        >>> [use.name for use in uses_of(Plan([LayerDrop(mlp=[3])], measured={"optimize": {"goal": "prefill"}}))]
        ['Use it', 'Try it', 'Serve it', 'Undo it']
    """
    found = found_in(plan)
    name, place = shlex.quote(model), shlex.quote(folder)
    encoder = found.get("goal") == "encode"
    uses = [Use("Use it", f'slimformer.patch(model, "{folder}")')]
    if encoder:
        uses.append(
            Use("Embed with it", f"slimformer embed {name} --plan {place} --input corpus.parquet -o vectors")
        )
    else:
        uses.append(Use("Try it", f'slimformer generate {name} "A prompt" --plan {place}'))
    engine = "onnx" if encoder else "vllm"
    why = _why_not_exported(plan, encoder)
    served = f"slimformer export {name} --plan {place} --to {engine} -o slim"
    uses.append(Use("Serve it", why or served, not why))
    chosen = next((point for point in points_of(found) if point.chosen), None)
    if chosen is not None and chosen.mean > 0:
        repaired = shlex.quote(f"{folder}-repaired")
        uses.append(Use("Win more back", f"slimformer repair {name} --plan {place} -o {repaired}"))
    return [*uses, Use("Undo it", "slimformer.unpatch(model)")]


def _why_not_exported(plan: Plan, encoder: bool) -> str:
    """Why no other engine runs it; empty where one does."""
    for method in plan.methods:
        if not isinstance(method, (LayerDrop, EarlyExit, WeightDelta)):
            return f"in Python, under slimformer.patch: no other engine knows {type(method).__name__}"
        if isinstance(method, LayerDrop):
            if method.replace == "filter" and method.taps > 1:
                return "in Python, under slimformer.patch: no other engine knows filters of several taps"
            if encoder and (
                method.replace != "nothing" or set(method.dropped("attention")) != set(method.dropped("mlp"))
            ):
                return "in Python, under slimformer.patch: an ONNX graph is made of whole layers"
    return ""

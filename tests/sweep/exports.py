"""What becomes of one model class that is exported with a block less, and loaded again: `python -m sweep.exports`.

With `src`, `kernels` and `tests` on the path; some classes by name, or all.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

import slimformer
from slimformer import LayerDrop
from slimformer.errors import ExportError, PlanError, UnsupportedModelError
from sweep.classes import Family
from sweep.models import build
from sweep.outcomes import FLOAT32, said
from sweep.run import every, quiet
from sweep.subject import error, given, outputs, real

Outcome = Literal["equal", "refused", "wrong", "crashed", "cannot be built"]
_REFUSALS = (ExportError, PlanError, UnsupportedModelError)


@dataclass(frozen=True)
class Exported:
    """The outcome of one class.

    Attributes:
        name: The family.
        outcome: What became of it.
        detail: Why it was not equal.
    """

    name: str
    outcome: Outcome
    detail: str = ""


def export_outcome(family: Family) -> Exported:
    """Export a tiny model without its second block, else without its last, and compare with the patch; never raises."""
    try:
        model = build(family)
        outputs(model, given(family, model, "none"))
    except Exception as failed:
        return Exported(family.name, "cannot be built", said(failed))
    try:
        count = len(slimformer.support(model).anatomy.layers)
        reasons = []
        for block in dict.fromkeys((1, count - 1)):
            try:
                gap = _gap(family, model, LayerDrop(block=[block]))
            except _REFUSALS as refused:
                reasons.append(str(refused))
                slimformer.unpatch(model)
                continue
            if not gap <= FLOAT32:
                return Exported(family.name, "wrong", f"block {block}: {gap:.2g} off")
            return Exported(family.name, "equal", "; ".join(reasons))
    except _REFUSALS as refused:
        reasons = [str(refused)]
    except Exception as failed:
        return Exported(family.name, "crashed", said(failed))
    return Exported(family.name, "refused", "; ".join(reasons))


def _gap(family: Family, model: PreTrainedModel, drop: LayerDrop) -> float:
    """How far the exported model is off the patched one, with and without padding."""
    with tempfile.TemporaryDirectory() as folder:
        slimformer.export(model, drop, f"{folder}/slim")
        slim, report = type(model).from_pretrained(f"{folder}/slim", output_loading_info=True)
    odd = report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    if odd:
        raise RuntimeError(f"loaded with others than the model's own weights: {sorted(map(str, odd))[:3]}")
    slim = slim.float().eval()
    with slimformer.patched(model, drop):
        gaps = [
            error(
                outputs(slim, given(family, slim, layout)),
                outputs(model, given(family, model, layout)),
                real(layout),
            )
            for layout in ("none", "left")
        ]
    return max(gaps)


def main() -> Iterator[str]:
    """Lines for every class, and the counts."""
    quiet()
    torch.set_num_threads(1)
    outcomes: Counter[Outcome] = Counter()
    names = sys.argv[1:] or list(every())
    for name in names:
        found = export_outcome(every()[name])
        outcomes[found.outcome] += 1
        yield f"{found.name:32} {found.outcome:16} {found.detail}"
    yield ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))


if __name__ == "__main__":
    for line in main():
        print(line, flush=True)

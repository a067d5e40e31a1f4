"""Make transformer models cheaper to run without retraining them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimformer.choosing import calibrate
    from slimformer.decisions.registry import register
    from slimformer.examination.tiers import support
    from slimformer.exporting.export import export
    from slimformer.methods.early_exit import EarlyExit
    from slimformer.methods.elimination.token_elimination import TokenElimination
    from slimformer.methods.layer_drop import LayerDrop
    from slimformer.methods.mixture_of_depths import MixtureOfDepths
    from slimformer.methods.narrow_mlp import NarrowMlp
    from slimformer.methods.self_extend import SelfExtend
    from slimformer.methods.speculation.self_speculation import SelfSpeculation
    from slimformer.methods.temperature import TempScale
    from slimformer.optimization.optimize import optimize
    from slimformer.patching import patch, patched, status, unpatch
    from slimformer.plans.plan import Plan
    from slimformer.training.repair import repair

__version__ = "0.1.0"
__all__ = [
    "EarlyExit",
    "LayerDrop",
    "MixtureOfDepths",
    "NarrowMlp",
    "Plan",
    "SelfExtend",
    "SelfSpeculation",
    "TempScale",
    "TokenElimination",
    "calibrate",
    "export",
    "optimize",
    "patch",
    "patched",
    "register",
    "repair",
    "status",
    "support",
    "unpatch",
]

# Imported at first use: torch takes seconds, and `slimformer --help` needs none of it.
_HOMES = {
    "EarlyExit": "slimformer.methods.early_exit",
    "LayerDrop": "slimformer.methods.layer_drop",
    "MixtureOfDepths": "slimformer.methods.mixture_of_depths",
    "NarrowMlp": "slimformer.methods.narrow_mlp",
    "SelfExtend": "slimformer.methods.self_extend",
    "SelfSpeculation": "slimformer.methods.speculation.self_speculation",
    "TempScale": "slimformer.methods.temperature",
    "TokenElimination": "slimformer.methods.elimination.token_elimination",
    "Plan": "slimformer.plans.plan",
    "calibrate": "slimformer.choosing",
    "export": "slimformer.exporting.export",
    "optimize": "slimformer.optimization.optimize",
    "register": "slimformer.decisions.registry",
    "repair": "slimformer.training.repair",
    "support": "slimformer.examination.tiers",
    **dict.fromkeys(("patch", "patched", "status", "unpatch"), "slimformer.patching"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        methods = importlib.import_module("slimformer.methods")
        where = f". It is in slimformer.methods: from slimformer.methods import {name}"
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{where if name in methods.__all__ else ''}"
        )
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

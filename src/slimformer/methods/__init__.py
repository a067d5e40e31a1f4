"""Which tokens a sublayer computes, or how its attention scores are changed: one file, one decision.

Every method is a small dataclass, importable from here; so is what a method of your own is made of.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimformer.decisions.policy import Decision
    from slimformer.decisions.registry import register
    from slimformer.methods.absolute_positions import (
        GroupedPositions,
        PositionInterpolation,
        RecurrentPositions,
    )
    from slimformer.methods.early_exit import EarlyExit
    from slimformer.methods.elimination.random_keep import RandomKeep
    from slimformer.methods.elimination.token_elimination import TokenElimination
    from slimformer.methods.layer_drop import LayerDrop
    from slimformer.methods.mixture_of_depths import MixtureOfDepths
    from slimformer.methods.narrow_mlp import NarrowMlp
    from slimformer.methods.rope_scaling import RopeScaling
    from slimformer.methods.self_extend import SelfExtend
    from slimformer.methods.speculation.self_speculation import SelfSpeculation
    from slimformer.methods.temperature import LogNScale, TempScale
    from slimformer.methods.weight_delta import WeightDelta
    from slimformer.rows.rows import Rows
    from slimformer.rows.stream import Stream

__all__ = [
    "Decision",
    "EarlyExit",
    "GroupedPositions",
    "LayerDrop",
    "LogNScale",
    "MixtureOfDepths",
    "NarrowMlp",
    "PositionInterpolation",
    "RandomKeep",
    "RecurrentPositions",
    "RopeScaling",
    "Rows",
    "SelfExtend",
    "SelfSpeculation",
    "Stream",
    "TempScale",
    "TokenElimination",
    "WeightDelta",
    "register",
]

# Imported at first use, as in `slimformer` itself.
_HOMES = {
    "EarlyExit": "slimformer.methods.early_exit",
    "LayerDrop": "slimformer.methods.layer_drop",
    "MixtureOfDepths": "slimformer.methods.mixture_of_depths",
    "NarrowMlp": "slimformer.methods.narrow_mlp",
    "TokenElimination": "slimformer.methods.elimination.token_elimination",
    "TempScale": "slimformer.methods.temperature",
    "LogNScale": "slimformer.methods.temperature",
    "SelfExtend": "slimformer.methods.self_extend",
    "SelfSpeculation": "slimformer.methods.speculation.self_speculation",
    "RopeScaling": "slimformer.methods.rope_scaling",
    "PositionInterpolation": "slimformer.methods.absolute_positions",
    "GroupedPositions": "slimformer.methods.absolute_positions",
    "RecurrentPositions": "slimformer.methods.absolute_positions",
    "WeightDelta": "slimformer.methods.weight_delta",
    "RandomKeep": "slimformer.methods.elimination.random_keep",
    "Decision": "slimformer.decisions.policy",
    "Rows": "slimformer.rows.rows",
    "Stream": "slimformer.rows.stream",
    "register": "slimformer.decisions.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def load_all() -> None:
    """Import every method, which registers it."""
    for module in dict.fromkeys(_HOMES.values()):
        importlib.import_module(module)

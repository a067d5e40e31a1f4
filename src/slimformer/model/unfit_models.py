"""What to pass instead of an object in which there is no model to patch, or more than one."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from slimformer.errors import UnsupportedModelError


def refuse_compiled(model: Any) -> None:
    """Refuse what torch.compile returns: it passes attributes on, so that a module inside the original would be found.

    Raises:
        UnsupportedModelError: If it is that; says where the original is.
    """
    original = model._modules.get("_orig_mod") if isinstance(model, nn.Module) else None
    if original is not None:
        raise UnsupportedModelError(
            f"Got what torch.compile made of {type(original).__name__}. Patch before compiling: "
            "torch.compile(slimformer.patch(model)). The original, for patch, unpatch and status, is model._orig_mod; "
            "compile it again after a change."
        )


def no_model_in(given: Any) -> UnsupportedModelError:
    """The error for an object that holds no model where one is looked for."""
    inside = given.modules() if isinstance(given, nn.Module) else ()
    parts = dict.fromkeys(type(part).__name__ for part in inside if isinstance(part, PreTrainedModel))
    first = next(iter(given.children()), None) if isinstance(given, nn.Sequential) else None
    return UnsupportedModelError(
        "Expected a transformers PreTrainedModel that runs in torch, or a SentenceTransformer, CrossEncoder or "
        f"Pipeline whose first module holds one, got {type(given).__name__}"
        + ("." if first is None else f", whose first module is {type(first).__name__}.")
        + (
            f" Patch what is inside it ({', '.join(parts)}) by itself: slimformer.patch(part) for every "
            "PreTrainedModel among model.modules()."
            if parts
            else ""
        )
    )

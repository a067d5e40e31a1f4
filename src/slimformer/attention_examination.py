"""Whether an attention module computes what its projections say, so that its layers can be run for chosen rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimformer.attention import RowAttention, for_attention
from slimformer.attention_projections import match_projections
from slimformer.stream import Stream


@torch.no_grad()
def examine(core: nn.Module, hidden: Tensor, kwargs: dict[str, Any], causal: bool) -> RowAttention | None:
    """The projections of an attention module, checked on a short call; None if it computes anything else.

    Args:
        core: The module that calls the attention function.
        hidden: An input `[batch, tokens, hidden]`.
        kwargs: The arguments of its layer.
        causal: Whether the model is a decoder.
    """
    projections = match_projections(core)
    if projections is None or any(p.is_meta for p in core.parameters()) or hasattr(core, "_hf_hook"):
        return None
    training = core.training
    core.train(False)
    try:
        expected = core(hidden, **for_attention(kwargs))[0]
        for interleaved in (False, True):
            found = RowAttention(core, projections, interleaved)
            stream = Stream.of(hidden, causal, kwargs)
            actual, _ = found.whole(hidden.reshape(-1, hidden.shape[-1]), stream, kwargs, kernels=False)
            error = (actual - expected.reshape(actual.shape)).float().norm() / expected.float().norm()
            if bool(error <= (1e-5 if expected.dtype == torch.float32 else 1e-2)):
                return found
    except (RuntimeError, ValueError, TypeError, StopIteration):
        # Another layout of the same names: the module keeps its own forward, for all tokens.
        return None
    finally:
        core.train(training)
    return None

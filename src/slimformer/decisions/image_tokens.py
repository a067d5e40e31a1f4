"""Which tokens of a vision-language model's input stand for parts of an image or a video."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from slimformer.changes.call_context import call_variable
from slimformer.changes.ledger import Ledger
from slimformer.errors import PlanError
from slimformer.model.anatomy import named_arguments, positional_names
from slimformer.rows.stream import Stream

_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
# Of the forward pass that runs in this thread or task.
_current: ContextVar[Tensor | None] = call_variable("image_tokens", None)


def image_token_ids(config: PretrainedConfig) -> tuple[int, ...]:
    """The ids that stand for images and videos, by a model's config; empty for a model that reads text alone.

    Example:
        >>> from transformers import LlavaConfig
        >>> image_token_ids(LlavaConfig(image_token_index=32000))
        (32000,)
    """
    found = (getattr(config, name, None) for name in _NAMES)
    return tuple(sorted({value for value in found if isinstance(value, int)}))


def where_images_are(ids: Tensor, config: PretrainedConfig) -> Tensor:
    """Which of the token ids `[batch, tokens]` stand for images and videos, bool of the same shape."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for value in image_token_ids(config):
        mask |= ids == value
    return mask


def image_tokens(stream: Stream) -> Tensor:
    """Which tokens of the call that runs stand for images and videos, bool `[batch, tokens]`.

    Raises:
        PlanError: If the model was called without `input_ids`.
    """
    mask = _current.get()
    if mask is None or mask.shape != (stream.batch, stream.tokens):
        raise PlanError(
            "Image tokens are found by input_ids, and the patched model was called without them, or only a part of it "
            "was called. Call the whole model with input_ids."
        )
    return mask


def read_images(model: PreTrainedModel, ledger: Ledger) -> None:
    """Let row selectors know, in every forward pass of a model, where images are.

    Raises:
        PlanError: If the model reads text alone.
    """
    if not image_token_ids(model.config):
        raise PlanError(
            f"The config of {type(model).__name__} names no image or video token ({', '.join(_NAMES)}), and a method "
            "routes only those. Use tokens='all'."
        )
    reader = ImageReader(model.config, positional_names(model))
    reader.had = ledger.set_forward(model, reader)


@dataclass
class ImageReader:
    """Stands in for a model's `forward`, and notes where images are while it runs.

    Attributes:
        config: The model's.
        names: Its positional parameters.
        had: The model's own.
    """

    config: PretrainedConfig
    names: tuple[str, ...]
    had: Callable[..., Any] = field(init=False)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The model's own `forward`, whose signature tells others what they may pass."""
        return self.had

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `forward`, with the same arguments."""
        ids = named_arguments(self.names, args, kwargs).get("input_ids")
        token = _current.set(where_images_are(ids, self.config) if isinstance(ids, Tensor) else None)
        try:
            return self.had(*args, **kwargs)
        finally:
            _current.reset(token)

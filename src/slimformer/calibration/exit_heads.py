"""Fit linear heads for early exits: ridge regression from the embedding at a layer to the dense one, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimformer.calibration.drops.fitting import RidgeSums
from slimformer.errors import CalibrationError, DataError
from slimformer.examination.tiers import known_anatomy
from slimformer.methods.early_exit import HEAD, EarlyExit
from slimformer.model.anatomy import Anatomy
from slimformer.patching import status
from slimformer.runtime.layer import LayerExecutor

# These weight the tokens of a text so that the weights sum to one, so a linear head may act on tokens or on the pooled.
POOLINGS = ("mean", "cls", "lasttoken", "weightedmean")
# Of the mean of the diagonal, towards changing nothing. nDCG@10 of all-MiniLM-L6-v2 on Cranfield, exit at layer 5, at
# 1e-3, 1e-2 and 3e-2: 0.253, 0.263, 0.264 with a head fitted on other text; 0.315, 0.305, 0.290 fitted on the corpus.
RIDGE = 1e-2


def fit_exits(
    model: Any, texts: Sequence[str], layers: Sequence[int] | None = None, *, batch_size: int = 32
) -> dict[int, EarlyExit]:
    """Fit a head for an exit at each layer, in one pass of the dense model over the texts.

    A post-norm encoder's head maps the pooled residual at the exit to the pooled output of the last layer. Where the
    stack has a norm behind its layers and the pooling is a mean, it maps the residual of every token instead, since
    the norm stands between the head and the mean.

    Args:
        model: An unpatched SentenceTransformer; it is left as it was.
        texts: Texts like those that will be embedded; several times as many as the embedding has dimensions.
        layers: Exits, each the number of layers that run; None for all, from 0.
        batch_size: Texts per forward.

    Returns:
        Exit to method.

    Raises:
        CalibrationError: If the model is patched, is no pipeline of a transformer and a pooling of one of the kinds
            `POOLINGS`, or an exit does not exist.
        DataError: If there are fewer than two texts, or they are not strings.

    Example:
        >>> from sentence_transformers import SentenceTransformer  # doctest: +SKIP
        >>> exits = fit_exits(SentenceTransformer("all-MiniLM-L6-v2"), texts)  # doctest: +SKIP
        >>> slimformer.patch(model, exits[4])  # doctest: +SKIP
    """
    pooling, mode = pooling_of(model)
    check_texts(texts)
    if status(model):
        raise CalibrationError(
            "The model is patched; heads are fitted to the dense model. Call unpatch first."
        )
    anatomy = known_anatomy(model)
    exits = list(range(len(anatomy.layers))) if layers is None else list(layers)
    for layer in exits:
        if layer not in range(len(anatomy.layers)):
            raise CalibrationError(
                f"There is no exit at layer {layer!r}: {type(anatomy.stack).__name__} has {len(anatomy.layers)} "
                f"layers, so exits are 0 to {len(anatomy.layers) - 1}."
            )
    tap = _Tap(anatomy, pooling, mode, exits)
    try:
        model.encode(list(texts), batch_size=batch_size, show_progress_bar=False)
    finally:
        tap.remove()
    return {layer: tap.solve(layer) for layer in exits}


def check_texts(texts: Sequence[str]) -> None:
    """Raise unless there is something to fit on.

    Raises:
        DataError: If there are fewer than two texts, or they are not strings.
    """
    if isinstance(texts, str) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise DataError(f"Expected a list of at least two strings to fit on, got {_described(texts)}.")


def pooling_of(model: Any) -> tuple[nn.Module, str]:
    """The pooling of a SentenceTransformer, and its mode.

    Raises:
        CalibrationError: If the model is no pipeline of a transformer and a pooling, or the mode is none of
            `POOLINGS`.
    """
    parts = list(model) if isinstance(model, nn.Sequential) and hasattr(model, "encode") else []
    transformer = next((getattr(part, "auto_model", None) for part in parts[:1]), None)
    if len(parts) < 2 or not isinstance(transformer, PreTrainedModel) or type(parts[1]).__name__ != "Pooling":
        made_of = ", ".join(type(part).__name__ for part in parts)
        raise CalibrationError(
            f"Expected a SentenceTransformer whose modules begin with Transformer and Pooling, got "
            f"{type(model).__name__}{f' of {made_of}' if made_of else ''}. SentenceTransformer(folder) loads any "
            "transformers checkpoint, with mean pooling."
        )
    pooling: Any = parts[1]
    # A string since version 6, or a tuple of several; before, one flag per mode.
    given = getattr(pooling, "pooling_mode", None) or pooling.get_pooling_mode_str()
    mode = given if isinstance(given, str) else "+".join(given)
    if mode not in POOLINGS:
        raise CalibrationError(
            f"A linear head does not pass through the pooling {mode!r}. Allowed are {', '.join(POOLINGS)}; an exit "
            "without a head (head=False) takes any."
        )
    return pooling, mode


class _Tap:
    """Reads the residual in front of every layer while the pipeline encodes, and adds up what heads are solved from."""

    def __init__(self, anatomy: Anatomy, pooling: nn.Module, mode: str, exits: Sequence[int]) -> None:
        device, hidden = anatomy.stack.device, anatomy.stack.config.hidden_size
        self.mode = mode
        self.last = LayerExecutor(anatomy.layers[-1], anatomy.structure)
        self.sums = {layer: RidgeSums(hidden, 1, device) for layer in exits}
        self.states: list[Tensor] = []
        self.like = next(anatomy.stack.parameters())
        self.handles = [
            layer.register_forward_pre_hook(self._enters, with_kwargs=True) for layer in anatomy.layers
        ]
        self.handles.append(anatomy.layers[-1].register_forward_hook(self._leaves))
        self.handles.append(pooling.register_forward_hook(self._pools))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def solve(self, layer: int) -> EarlyExit:
        fitted = self.sums[layer].solve(False, self.like, RIDGE)
        if fitted.weight is None or bool(fitted.weight.isnan().any()):
            raise CalibrationError(
                "The head is not a number: the model computes NaN on these texts. Check the checkpoint, or load it in "
                "bfloat16 or float32 instead of float16."
            )
        return EarlyExit(layer, dict(zip(HEAD, (fitted.weight.cpu(), fitted.bias.cpu()), strict=True)))

    def _enters(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.states.append(args[0] if args else kwargs["hidden_states"])

    def _leaves(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.states.append(output[0] if isinstance(output, tuple) else output)

    @torch.no_grad()
    def _pools(self, pooling: nn.Module, args: tuple[Any, ...], output: dict[str, Any]) -> None:
        features, (*states, last) = args[0], self.states
        self.states = []
        normed_behind = not torch.equal(features["token_embeddings"], last)

        def pooled(tokens: Tensor) -> Tensor:
            if normed_behind and self.mode in ("mean", "weightedmean"):
                mask = features.get("attention_mask")
                real = tokens.flatten(0, 1)
                return real if mask is None or mask.numel() != len(real) else real[mask.flatten().bool()]
            found: Tensor = pooling.forward({**features, "token_embeddings": tokens})["sentence_embedding"]
            return found

        for layer, sums in self.sums.items():
            read = self.last.normed("mlp", states[layer])
            sums.add(pooled(read)[None], pooled(last - states[layer])[None], None)


def _described(texts: object) -> str:
    if isinstance(texts, str):
        return "one string"
    if not isinstance(texts, Sequence):
        return f"a value of type {type(texts).__name__}"
    other = next((type(text).__name__ for text in texts if not isinstance(text, str)), None)
    return f"{len(texts)} texts" if other is None else f"a text of type {other}"

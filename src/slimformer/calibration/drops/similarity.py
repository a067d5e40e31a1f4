"""Cosine similarity of the residual before and after each sublayer (LLM-Drop, arXiv 2406.15786, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from slimformer.changes.ledger import Ledger
from slimformer.errors import CalibrationError, DataError
from slimformer.examination.tiers import known_anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.patching import status
from slimformer.runtime.layer import LayerExecutor
from slimformer.runtime.layer_run import Run, Update

Unit = Literal["attention", "mlp", "block"]
UNITS: tuple[Unit, ...] = ("attention", "mlp", "block")


@dataclass(frozen=True)
class Similarity:
    """Mean cosine of every sublayer's input and output residual; the higher, the less the sublayer does.

    Attributes:
        attention: One value per layer.
        mlp: One value per layer.
        block: One value per layer, of the layer's input and output.
        tokens: How many tokens were read.
    """

    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    block: tuple[float, ...]
    tokens: int

    def most_similar(self, count: int, kinds: Iterable[Unit] = KINDS) -> list[tuple[Unit, int]]:
        """The `count` sublayers to drop first, one sort over all the kinds given.

        Raises:
            CalibrationError: If there are fewer sublayers than asked for.
        """
        scores = [(getattr(self, kind)[i], kind, i) for kind in kinds for i in range(len(self.attention))]
        if not 0 <= count <= len(scores):
            raise CalibrationError(
                f"Asked for {count} sublayers of {len(scores)}; allowed are 0 to {len(scores)}."
            )
        return [(kind, index) for _, kind, index in sorted(scores, key=lambda s: (-s[0], s[1], s[2]))[:count]]


@dataclass
class _Measured(LayerExecutor):
    """A layer executor that adds up cosines as it runs the layer densely."""

    totals: Any = None
    index: int = 0

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, after its cosine was added."""
        output = super().forward(hidden_states, *args, **kwargs)
        self.totals.add(
            self.index, "block", hidden_states, output[0] if isinstance(output, tuple) else output
        )
        return output

    def update(self, run: Run, kind: Kind, x: Tensor, normed: Tensor | None = None) -> Update | None:
        """What the sublayer does to the residual, after its cosine was added."""
        update = super().update(run, kind, x, normed)
        self.totals.add(self.index, kind, x, x if update is None else run.added(x, update))
        return update


class _Totals:
    def __init__(self, layers: int) -> None:
        self.sums: dict[Unit, list[float]] = {unit: [0.0] * layers for unit in UNITS}
        self.mask: Tensor | None = None

    def add(self, index: int, kind: Unit, before: Tensor, after: Tensor) -> None:
        cosine = cosine_similarity(before.float(), after.float(), dim=-1)
        if self.mask is not None:
            cosine = cosine[self.mask.to(cosine.device)]
        self.sums[kind][index] += cosine.double().sum().item()


@torch.no_grad()
def measure_similarity(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Similarity:
    """Measure every sublayer in one forward pass, keeping only sums, so that memory does not grow with the text.

    Args:
        model: An unpatched transformers model; it is left as it was.
        batches: `input_ids` and optionally `attention_mask` `[batch, tokens]`; padding does not count.

    Raises:
        DataError: If there is no token.
        CalibrationError: If the model is patched, or a similarity is not a number.
        UnsupportedModelError: If the model's structure is not known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> similarity = measure_similarity(LlamaForCausalLM(config), [{"input_ids": torch.arange(8)[None]}])
        >>> len(similarity.attention), similarity.tokens
        (2, 8)
    """
    if status(model):
        raise CalibrationError(
            "The model is patched; similarity is measured on the dense model. Call unpatch first."
        )
    anatomy = known_anatomy(model)
    without_cache = {"use_cache": False} if anatomy.causal else {}
    totals, ledger, tokens = _Totals(len(anatomy.layers)), Ledger(), 0
    try:
        for index, layer in enumerate(anatomy.layers):
            executor = _Measured(layer, anatomy.structure, totals=totals, index=index)
            ledger.set_forward(layer, executor.forward)
        for batch in batches:
            mask = batch.get("attention_mask")
            totals.mask = None if mask is None else mask.bool()
            tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
            anatomy.stack(**{name: t.to(anatomy.stack.device) for name, t in batch.items()}, **without_cache)
    finally:
        ledger.undo()
    if tokens == 0:
        raise DataError("Similarity needs at least one token of text, and none came.")
    means = {kind: tuple(s / tokens for s in sums) for kind, sums in totals.sums.items()}
    for index in range(len(anatomy.layers)):
        for kind in UNITS:
            if means[kind][index] != means[kind][index]:
                raise CalibrationError(
                    f"The similarity of {kind} {index} is not a number: the model computes NaN on this text. "
                    "Check the checkpoint, or load it in bfloat16 or float32 instead of float16."
                )
    return Similarity(means["attention"], means["mlp"], means["block"], tokens)

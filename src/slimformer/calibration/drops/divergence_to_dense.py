"""How far a model with some sublayers dropped is from the dense one, on every source of the calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from slimformer.calibration.drops.replay import Call, executors, finish, run_layers
from slimformer.calibration.mixture.sources import COPYING
from slimformer.evaluation.divergence import DenseReference
from slimformer.evaluation.similarity_task import masked_mean
from slimformer.model.anatomy import Anatomy


class Divergence(Protocol):
    """A measure of the distance to the dense model; 0 is equal."""

    name: str

    def of(self, calls: Sequence[Call], hidden: Sequence[Tensor]) -> Mapping[str, float]:
        """The mean of every source over all calls, given the last layer's output of each."""
        ...


@dataclass
class PredictionDivergence:
    """Mean KL(dense || slim) over next-token distributions, in nats.

    Attributes:
        model: The model.
        anatomy: Its layers.
        reference: What the dense model predicts on the rows.
        sources: The source of every row.
        name: What is measured.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    reference: DenseReference
    sources: Sequence[str]
    name: str = "KL to dense, nats per token"

    def of(self, calls: Sequence[Call], hidden: Sequence[Tensor]) -> Mapping[str, float]:
        """The mean over the rows of every source; of sequences that repeat, the second half of a row."""
        values: dict[str, list[Tensor]] = {}
        block = 0
        for call, state in zip(calls, hidden, strict=True):
            for logits in finish(self.model, self.anatomy, call, state).logits:
                source = self.sources[block]
                each = self.reference.divergences(logits, block)
                # Its first run is noise to any model; it ends by the middle of the row.
                each = each[len(each) // 2 :] if source == COPYING else each
                values.setdefault(source, []).append(each.mean())
                block += 1
        return {source: float(torch.stack(found).mean()) for source, found in values.items()}


@dataclass
class EmbeddingDivergence:
    """Mean of 1 - cosine between dense and slim mean-pooled embeddings."""

    anatomy: Anatomy
    dense: list[Tensor]
    name: str = "1 - cosine to the dense embedding"

    @classmethod
    def record(cls, anatomy: Anatomy, calls: Sequence[Call]) -> EmbeddingDivergence:
        """Embed every text with the dense model."""
        layers = executors(anatomy, {})
        with torch.no_grad():
            return cls(
                anatomy, [_embed(anatomy, call, run_layers(layers, call, call.hidden, 0)) for call in calls]
            )

    def of(self, calls: Sequence[Call], hidden: Sequence[Tensor]) -> Mapping[str, float]:
        """The mean over all texts."""
        slim = [_embed(self.anatomy, call, state) for call, state in zip(calls, hidden, strict=True)]
        cosine = F.cosine_similarity(torch.cat(self.dense), torch.cat(slim), dim=-1)
        return {"": 1.0 - cosine.mean().item()}


def _embed(anatomy: Anatomy, call: Call, hidden: Tensor) -> Tensor:
    output: Any = finish(anatomy.stack, anatomy, call, hidden)
    mask = call.batch.get("attention_mask", torch.ones_like(call.batch["input_ids"]))
    return masked_mean(output.last_hidden_state, mask).float()

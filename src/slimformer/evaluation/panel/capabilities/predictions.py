"""Capabilities that are kept as far as next-token distributions stay the dense model's: text, and its own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimformer.evaluation.divergence import bucketed_divergence, likeliest
from slimformer.evaluation.panel.capabilities.reading import Row, read
from slimformer.evaluation.panel.capability import Kept, bootstrapped
from slimformer.evaluation.perplexity import TOKENS_AT_ONCE

# Tokens told apart at every place; all others are one bucket.
TOP_K = 512


@dataclass(frozen=True)
class Predictions:
    """Rows with what the dense model predicts at each of their scored tokens.

    What is kept is `exp(-d)` with `d` the mean KL(dense || model) in nats per token: the factor, as a geometric mean,
    by which the probability of what the dense model would say falls. 0.03 nats keep 97%, 0.1 keep 90%, 0.7 keep half.

    Attributes:
        name: The capability.
        rows: What is read.
        dense: For each row the log-probabilities and ids `[scored, top_k]`, and the rest `[scored]`.
        seed: Of the bootstrap.
        tokens_at_once: See `read`.
    """

    name: str
    rows: Sequence[Row]
    dense: Sequence[tuple[Tensor, Tensor, Tensor]]
    seed: int
    tokens_at_once: int | None = None

    @classmethod
    def recorded(
        cls,
        name: str,
        model: PreTrainedModel,
        rows: Sequence[Row],
        seed: int,
        tokens_at_once: int | None = None,
    ) -> Predictions:
        """Run the dense model over the rows; what it predicts stays on its device, 8 bytes per kept token."""
        kept: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in rows]
        for piece in read(model, rows, tokens_at_once):
            for logits in piece.logits.split(TOKENS_AT_ONCE):
                values, ids, rest = likeliest(logits, min(TOP_K, logits.shape[-1]))
                kept[piece.row].append((values, ids.to(torch.int32), rest))
        dense = [_joined(parts) for parts in kept]
        return cls(name, rows, dense, seed, tokens_at_once)

    def judged(self, model: PreTrainedModel) -> Kept:
        """The part that a model keeps, with the divergence, and the share of places where its first choice is dense's.

        Where several tokens share the highest logit, each counts as a first choice.
        """
        nats = torch.zeros(len(self.rows), dtype=torch.float64)
        same = torch.zeros(len(self.rows), dtype=torch.float64)
        for piece in read(model, self.rows, self.tokens_at_once):
            start = piece.start
            for logits in piece.logits.split(TOKENS_AT_ONCE):
                end = start + len(logits)
                values, ids, rest = (part[start:end].to(logits.device) for part in self.dense[piece.row])
                nats[piece.row] += bucketed_divergence(logits, values, ids, rest).cpu().double().sum()
                first = logits.gather(-1, ids[:, :1].long()).squeeze(-1)
                same[piece.row] += int((first == logits.amax(-1)).sum())
                start = end
        tokens = torch.tensor([len(row.scored) for row in self.rows], dtype=torch.float64)
        figures = {
            "divergence": float(nats.sum() / tokens.sum()),
            "same_token": float(same.sum() / tokens.sum()),
            "tokens": float(tokens.sum()),
        }
        return bootstrapped(
            self.name,
            [row.group for row in self.rows],
            lambda times: (-(times @ nats) / (times @ tokens)).exp(),
            figures,
            pooled=True,
            seed=self.seed,
        )

    def digest_parts(self) -> Sequence[Any]:
        """The rows."""
        return [self.name, *self.rows]


@dataclass(frozen=True)
class Likelihoods:
    """Rows with how likely the dense model finds their scored tokens.

    Attributes:
        name: The capability.
        rows: What is read; kinds of rows count the same, however many there are of each.
        dense: Negative log-likelihood of each row's scored tokens in nats, float64 `[rows]`.
        chance: Probability of a token for who knows nothing.
        seed: Of the bootstrap.
        tokens_at_once: See `read`.

    With `p` the geometric mean of the tokens' probabilities, what is kept is
    `(p(model) - chance) / (p(dense) - chance)`, at most 1.
    """

    name: str
    rows: Sequence[Row]
    dense: Tensor
    chance: float
    seed: int
    tokens_at_once: int | None = None

    @classmethod
    def recorded(
        cls,
        name: str,
        model: PreTrainedModel,
        rows: Sequence[Row],
        chance: float,
        seed: int,
        tokens_at_once: int | None = None,
    ) -> Likelihoods:
        """Run the dense model over the rows."""
        return cls(name, rows, losses(model, rows, tokens_at_once), chance, seed, tokens_at_once)

    @property
    def tokens(self) -> Tensor:
        """Scored tokens of each row, float64 `[rows]`."""
        return torch.tensor([len(row.scored) for row in self.rows], dtype=torch.float64)

    def probability(self, kind: str) -> float:
        """The geometric mean of the dense model's probabilities of one kind of rows."""
        chosen = torch.tensor([row.group == kind for row in self.rows])
        return float((-self.dense[chosen].sum() / self.tokens[chosen].sum()).exp())

    def judged(self, model: PreTrainedModel) -> Kept:
        """The part that a model keeps, with the loss of both in nats per token."""
        slim, tokens = losses(model, self.rows, self.tokens_at_once), self.tokens

        def probability(times: Tensor, nats: Tensor) -> Tensor:
            return (-(times @ nats) / (times @ tokens)).exp()

        def kept(times: Tensor) -> Tensor:
            dense = probability(times, self.dense) - self.chance
            return (probability(times, slim) - self.chance) / dense

        figures = {
            "loss_dense": float(self.dense.sum() / tokens.sum()),
            "loss_slim": float(slim.sum() / tokens.sum()),
            "tokens": float(tokens.sum()),
        }
        groups = [row.group for row in self.rows]
        return bootstrapped(self.name, groups, kept, figures, pooled=False, seed=self.seed)

    def digest_parts(self) -> Sequence[Any]:
        """The rows."""
        return [self.name, *self.rows]


def losses(model: PreTrainedModel, rows: Sequence[Row], tokens_at_once: int | None = None) -> Tensor:
    """Negative log-likelihood of each row's scored tokens together, in nats, float64 `[rows]`."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    for piece in read(model, rows, tokens_at_once):
        scored = rows[piece.row].scored[piece.start : piece.start + len(piece.logits)]
        targets = torch.tensor(scored, device=piece.logits.device)
        for logits, wanted in zip(
            piece.logits.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True
        ):
            picked = logits.float().log_softmax(-1).gather(1, wanted[:, None])
            # Summed on the CPU, since not every device knows float64.
            found[piece.row] -= picked.cpu().double().sum()
    return found


def _joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    values, ids, rest = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, ids, rest

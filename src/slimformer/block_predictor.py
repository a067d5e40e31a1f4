"""Predict how much attention blocks of tokens get, before the layer has computed anything (LeMo, arXiv 2501.09767)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimformer.errors import PlanError

TOWERS = ("query", "key")
_PARTS = ("first.weight", "first.bias", "last.weight", "last.bias")


class BlockPredictor(nn.Module):
    """Two small towers over blocks of tokens; their products are the predicted block scores.

    A tower is a linear layer, ReLU and another linear layer. It reads one vector per block, as `block_features` makes
    them, and `scores[m, n]` predicts how much the queries of block m attend to the keys of block n.

    Args:
        hidden: The model's hidden size.
        size: Neurons in the middle of a tower.
        rank: Width of the vectors that are multiplied.

    Example:
        >>> predictor = BlockPredictor(hidden=16, size=8, rank=4)
        >>> predictor(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 5])
    """

    def __init__(self, hidden: int, size: int = 256, rank: int = 64) -> None:
        super().__init__()
        self.query = _Tower(2 * hidden, size, rank)
        self.key = _Tower(2 * hidden, size, rank)

    def forward(self, features: Tensor) -> Tensor:
        """Scores `[batch, blocks, blocks]` from features `[batch, blocks, 2 * hidden]`, in their dtype."""
        query, key = self.query(features), self.key(features)
        scores: Tensor = query @ key.mT * query.shape[-1] ** -0.5
        return scores

    def retire(self, share: float = 0.8, least: int = 16) -> None:
        """LeMo's elastic size: let neurons whose output is zero at least this share of the time take no part."""
        for tower in (self.query, self.key):
            tower.retire(share, least)

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The weights by the names that a plan saves them under, without neurons that take no part."""
        found: dict[str, Tensor] = {}
        for name in TOWERS:
            for part, linear in zip(("first", "last"), getattr(self, name).shrunk(), strict=True):
                found[f"{layer}.{name}.{part}.weight"] = linear.weight.detach().clone()
                found[f"{layer}.{name}.{part}.bias"] = linear.bias.detach().clone()
        return found

    @property
    def sizes(self) -> tuple[int, int]:
        """How many neurons of each tower take part."""
        return int(self.query.alive.sum()), int(self.key.alive.sum())

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], layer: int) -> BlockPredictor:
        """The predictor of a layer out of a plan's weights, frozen.

        Raises:
            PlanError: If weights are missing, or their shapes do not fit each other.
        """
        found: dict[str, Tensor] = {}
        for tower in TOWERS:
            for part in _PARTS:
                name = f"{layer}.{tower}.{part}"
                if name not in tensors:
                    raise PlanError(
                        f"There is no trained predictor for layer {layer}: the weight {name!r} is missing. "
                        "`slimformer train-predictor` trains one for every layer of a schedule."
                    )
                found[f"{tower}.{part}"] = tensors[name]
        predictor = BlockPredictor(1, 1, 1)
        try:
            for which in TOWERS:
                own = {part: found[f"{which}.{part}"] for part in _PARTS}
                size, features = own["first.weight"].shape
                made = _Tower(features, size, own["last.weight"].shape[0]).to(own["first.weight"].dtype)
                made.load_state_dict(own, strict=False)
                setattr(predictor, which, made)
            if predictor.query.last.out_features != predictor.key.last.out_features:
                raise ValueError("its towers have outputs of different widths")
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise PlanError(
                f"The predictor of layer {layer} is damaged: {reason}. Train it again."
            ) from error
        return predictor.requires_grad_(False).eval()

    @property
    def hidden_size(self) -> int:
        """The hidden size of the models that it reads."""
        return self.query.first.in_features // 2


class _Tower(nn.Module):
    """Linear, ReLU, linear, in the input's dtype.

    Attributes:
        zero_share: How often each neuron was zero in training, a running mean `[size]`.
        alive: Which neurons take part, bool `[size]`.
    """

    zero_share: Tensor
    alive: Tensor

    def __init__(self, features: int, size: int, rank: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, size)
        self.last = nn.Linear(size, rank)
        self.register_buffer("zero_share", torch.zeros(size))
        self.register_buffer("alive", torch.ones(size, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        middle = F.linear(x, self.first.weight.to(x.dtype), self.first.bias.to(x.dtype)).relu()
        if self.training:
            zero = (middle.detach() == 0).float().flatten(0, -2).mean(0)
            self.zero_share.lerp_(zero, 0.05)
            middle = middle * self.alive
        return F.linear(middle, self.last.weight.to(x.dtype), self.last.bias.to(x.dtype))

    def retire(self, share: float, least: int) -> None:
        """Let neurons that are zero at least this share of the time take no part any more."""
        busy = self.zero_share.masked_fill(~self.alive, 2.0)
        used = max(int((busy < share).sum()), min(least, busy.numel()))
        self.alive.fill_(False)[busy.argsort()[:used]] = True

    def shrunk(self) -> tuple[nn.Linear, nn.Linear]:
        """The two layers without the neurons that take no part."""
        stay = self.alive.nonzero().squeeze(1)
        first = _linear(self.first.weight.detach()[stay], self.first.bias.detach()[stay])
        return first, _linear(self.last.weight.detach()[:, stay], self.last.bias.detach())


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def block_features(h: Tensor, text: Tensor, place: Tensor, block: int) -> Tensor:
    """One vector per block of a text: mean and maximum of its tokens, each normed.

    Args:
        h: The normed residual `[batch, tokens, hidden]`.
        text: Which tokens are there, bool `[batch, tokens]`.
        place: The place of every token in its text `[batch, tokens]`, from 0 up.
        block: Tokens per block.

    Returns:
        `[batch, blocks, 2 * hidden]`; zeros for a block without tokens.

    Example:
        >>> h = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [5.0, 1.0]]])
        >>> block_features(h, torch.ones(1, 3, dtype=torch.bool), torch.arange(3)[None], 2).shape
        torch.Size([1, 2, 4])
    """
    batch, tokens, hidden = h.shape
    blocks = -(-tokens // block)
    # Which token stands at each place: the last, cut off behind, takes those that are not there.
    at = torch.full((batch, blocks * block + 1), -1, device=h.device)
    token = torch.arange(tokens, device=h.device).expand(batch, tokens)
    at = at.scatter_(1, torch.where(text, place, blocks * block), token)[:, :-1]
    there = (at >= 0).view(batch, blocks, block, 1)
    rows = h.gather(1, at.clamp_min(0)[..., None].expand(-1, -1, hidden)).view(batch, blocks, block, hidden)
    total = rows.masked_fill(~there, 0.0).sum(2, dtype=torch.float32)
    mean = total / there.sum(2).clamp_min(1)
    highest = rows.masked_fill(~there, float("-inf")).amax(2).float().masked_fill(~there.any(2), 0.0)
    return torch.cat([F.layer_norm(part, (hidden,)) for part in (mean, highest)], dim=-1)

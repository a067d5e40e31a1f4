"""Predict how much attention blocks of tokens get, before the layer has computed anything (LeMo, arXiv 2501.09767)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimformer.errors import PlanError

TOWERS = ("query", "key")
# Tokens per block, LeMo's.
BLOCK = 64
# Blocks further apart than this count as equally far.
DISTANCES = 128
_NEAR = "near"
_PARTS = ("first.weight", "first.bias", "last.weight", "last.bias")


class BlockPredictor(nn.Module):
    """Two small towers over the tokens of a text; their products are the predicted scores of blocks.

    A tower is a linear layer and ReLU on every token, the maximum over the tokens of each block, and another linear
    layer: what one token among 64 has is not lost in their mean. `scores[m, n]` predicts how much the queries of block
    m attend to the keys of block n. What depends on the distance of the two alone is a number per distance.

    Args:
        hidden: The model's hidden size.
        size: Neurons in the middle of a tower.
        rank: Width of the vectors that are multiplied.

    Example:
        >>> predictor = BlockPredictor(hidden=16, size=8, rank=4)
        >>> text, place = torch.ones(2, 300, dtype=torch.bool), torch.arange(300).expand(2, 300)
        >>> predictor(torch.randn(2, 300, 16), text, place).shape
        torch.Size([2, 5, 5])
    """

    def __init__(self, hidden: int, size: int = 256, rank: int = 64) -> None:
        super().__init__()
        self.query = _Tower(hidden, size, rank)
        self.key = _Tower(hidden, size, rank)
        self.near = nn.Parameter(torch.zeros(DISTANCES))

    def forward(self, h: Tensor, text: Tensor, place: Tensor) -> Tensor:
        """Scores of blocks, in the dtype of `h`.

        Args:
            h: What the layer's attention reads, the normed residual `[batch, tokens, hidden]`.
            text: Which tokens are there, bool `[batch, tokens]`.
            place: The place of every token in its text `[batch, tokens]`, from 0 up.

        Returns:
            `[batch, blocks, blocks]`.
        """
        where = blocks_of(text, place)
        query, key = self.query(h, where), self.key(h, where)
        block = torch.arange(query.shape[1], device=h.device)
        distance = (block[:, None] - block).abs().clamp_max(DISTANCES - 1)
        scores: Tensor = query @ key.mT * query.shape[-1] ** -0.5 + self.near.to(h.dtype)[distance]
        return scores

    def retire(self, share: float = 0.8, least: int = 16) -> None:
        """LeMo's elastic size: let neurons whose output is zero at least this share of the time take no part."""
        for tower in (self.query, self.key):
            tower.retire(share, least)

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The weights by the names that a plan saves them under, without neurons that take no part."""
        found = {f"{layer}.{_NEAR}": self.near.detach().clone()}
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
        for part in (_NEAR, *(f"{tower}.{part}" for tower in TOWERS for part in _PARTS)):
            name = f"{layer}.{part}"
            if name not in tensors:
                raise PlanError(
                    f"There is no trained predictor for layer {layer}: the weight {name!r} is missing. "
                    "`slimformer calibrate eliminate --predictor` trains one for every layer of a schedule."
                )
            found[part] = tensors[name]
        predictor = BlockPredictor(1, 1, 1)
        try:
            for which in TOWERS:
                own = {part: found[f"{which}.{part}"] for part in _PARTS}
                size, features = own["first.weight"].shape
                rank = own["last.bias"].numel()
                # Before room is made for them, which an empty tensor's shape may ask for without end.
                shapes = ((size, features), (size,), (rank, size), (rank,))
                if [tuple(own[part].shape) for part in _PARTS] != list(shapes) or 0 in (size, features, rank):
                    raise ValueError(f"the parts of its {which} tower do not fit each other")
                made = _Tower(features, size, rank).to(own["first.weight"].dtype)
                made.load_state_dict(own, strict=False)
                setattr(predictor, which, made)
            if found[_NEAR].shape != predictor.near.shape:
                raise ValueError(f"it has {found[_NEAR].numel()} distances, and {DISTANCES} are read")
            with torch.no_grad():
                predictor.near.copy_(found[_NEAR])
            query, key = (
                (tower.first.in_features, tower.last.out_features)
                for tower in (predictor.query, predictor.key)
            )
            if query != key:
                raise ValueError("its towers have inputs or outputs of different widths")
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise PlanError(
                f"The predictor of layer {layer} is damaged: {reason}. Train it again."
            ) from error
        return predictor.requires_grad_(False).eval()

    @property
    def hidden_size(self) -> int:
        """The hidden size of the models that it reads."""
        return self.query.first.in_features


class _Tower(nn.Module):
    """Linear, ReLU, maximum over each block, linear, in the input's dtype.

    Attributes:
        zero_share: In which part of the blocks each neuron was zero in training, a running mean `[size]`.
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

    def forward(self, h: Tensor, where: Tensor) -> Tensor:
        middle = F.linear(h, self.first.weight.to(h.dtype), self.first.bias.to(h.dtype)).relu()
        middle = block_maxima(middle, where)
        if self.training:
            zero = (middle.detach() == 0).float().flatten(0, -2).mean(0)
            self.zero_share.lerp_(zero, 0.05)
            middle = middle * self.alive
        return F.linear(middle, self.last.weight.to(h.dtype), self.last.bias.to(h.dtype))

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


def blocks_of(text: Tensor, place: Tensor) -> Tensor:
    """Which token stands at each place of each block, int64 `[batch, blocks, 64]`; -1 where none does.

    Args:
        text: Which tokens are there, bool `[batch, tokens]`.
        place: The place of every token in its text `[batch, tokens]`, from 0 up.
    """
    batch, tokens = text.shape
    places = -(-tokens // BLOCK) * BLOCK
    # One place more, cut off behind, takes those that are not there.
    at = torch.full((batch, places + 1), -1, device=text.device)
    token = torch.arange(tokens, device=text.device).expand(batch, tokens)
    at = at.scatter_(1, torch.where(text, place, places), token)
    return at[:, :-1].view(batch, -1, BLOCK)


def block_maxima(x: Tensor, where: Tensor) -> Tensor:
    """The maximum over the tokens of every block `[batch, blocks, size]`; `x` `[batch, tokens, size]` is not negative.

    Example:
        >>> x = torch.arange(70.0).view(1, 70, 1)
        >>> where = blocks_of(torch.ones(1, 70, dtype=torch.bool), torch.arange(70)[None])
        >>> block_maxima(x, where).flatten()
        tensor([63., 69.])
    """
    batch, blocks, _ = where.shape
    index = where.clamp_min(0).view(batch, -1, 1).expand(-1, -1, x.shape[-1])
    tokens = x.gather(1, index).view(batch, blocks, BLOCK, -1)
    return tokens.masked_fill(where[..., None] < 0, 0.0).amax(2)

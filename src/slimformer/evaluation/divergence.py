"""How far a patched model's predictions are from the dense model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.perplexity import TOKENS_AT_ONCE, block_logits, block_loss


@dataclass(frozen=True)
class DenseReference:
    """What the dense model predicts after every token, in a small part of the memory of its logits.

    Kept are the `top_k` most likely tokens and one bucket with the probability of all others. Merging tokens into a
    bucket can only lower a Kullback-Leibler divergence, so `divergence` is a lower bound of the full one, and equal
    to it when `top_k` is the vocabulary.

    Attributes:
        log_probs: Log-probabilities, most likely first `[blocks, tokens, top_k]`.
        indices: Their token ids, int32 `[blocks, tokens, top_k]`.
        rest: Probability of all other tokens together, float32 `[blocks, tokens]`.
        losses: Mean negative log-likelihood of every block's own next tokens in nats, float64 `[blocks]`,
            on the CPU.
        vocabulary: Size of the distribution.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=1))
        >>> reference = DenseReference.record(model, torch.arange(16).view(2, 8), top_k=4)
        >>> reference.log_probs.shape, 15 < reference.perplexity < 17
        (torch.Size([2, 8, 4]), True)
    """

    log_probs: Tensor
    indices: Tensor
    rest: Tensor
    losses: Tensor
    vocabulary: int

    @classmethod
    def record(
        cls,
        model: PreTrainedModel,
        blocks: Tensor,
        *,
        top_k: int = 512,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> DenseReference:
        """Run the dense model once over the blocks.

        Args:
            model: A decoder with a language-model head, unpatched.
            blocks: Token ids `[blocks, tokens]`.
            top_k: Tokens kept per position; the whole vocabulary when it is smaller.
            batch_size: Blocks per forward.
            dtype: Of the log-probabilities: float32 (8 bytes per kept token with its id) or float16 (6).
            device: Where the reference is kept.

        Raises:
            DataError: If `blocks` is no matrix of token ids, or `top_k` or `dtype` is not one of those allowed.
            CalibrationError: If the logits of a block hold NaN or infinity, or the model has no language-model head.
        """
        if top_k < 1:
            raise DataError(f"top_k must be at least 1, got {top_k}.")
        if dtype not in (torch.float32, torch.float16):
            raise DataError(f"dtype must be torch.float32 or torch.float16, got {dtype}.")
        kept: list[tuple[Tensor, ...]] = []
        vocabulary = 0
        for index, logits in enumerate(block_logits(model, blocks, batch_size)):
            vocabulary = logits.shape[-1]
            values, indices, rest = likeliest(logits, min(top_k, vocabulary))
            parts = (values.to(device, dtype), indices.to(device, torch.int32), rest.to(device))
            kept.append((*parts, block_loss(logits, blocks[index])))
        log_probs, indices, rest, losses = (torch.stack(parts) for parts in zip(*kept, strict=True))
        return cls(log_probs, indices, rest, losses, vocabulary)

    @property
    def perplexity(self) -> float:
        """The dense model's perplexity on the recorded blocks."""
        return self.losses.mean().exp().item()

    def divergence(self, logits: Tensor, block_index: int) -> Tensor:
        """Mean KL(dense || given) over the tokens of one block, in nats. Gradients flow into `logits`.

        Args:
            logits: The given model's logits for the block `[tokens, vocabulary]`.
            block_index: Which recorded block they belong to.

        Returns:
            A float32 scalar on the device of `logits`.

        Raises:
            DataError: If `logits` has another shape than the recorded block.
        """
        return self.divergences(logits, block_index).mean()

    def divergences(self, logits: Tensor, block_index: int) -> Tensor:
        """The same for every token `[tokens]`."""
        self._check(logits)
        log_probs, indices, rest = (
            kept[block_index].to(logits.device).split(TOKENS_AT_ONCE)
            for kept in (self.log_probs, self.indices, self.rest)
        )
        chunks = zip(logits.split(TOKENS_AT_ONCE), log_probs, indices, rest, strict=True)
        return torch.cat([bucketed_divergence(*chunk) for chunk in chunks])

    def agreement(self, logits: Tensor, block_index: int) -> Tensor:
        """Share of the block's tokens after which the dense model's first choice is also a first choice here.

        Where several tokens share the highest logit, as happens in bfloat16, each counts as a first choice, so that
        a model always agrees with itself.

        Args:
            logits: The given model's logits for the block `[tokens, vocabulary]`.
            block_index: Which recorded block they belong to.

        Returns:
            A float32 scalar between 0 and 1 on the device of `logits`.

        Raises:
            DataError: If `logits` has another shape than the recorded block.
        """
        self._check(logits)
        first = self.indices[block_index, :, :1].to(logits.device, torch.long)
        return (logits.gather(-1, first).squeeze(-1) == logits.amax(-1)).float().mean()

    def _check(self, logits: Tensor) -> None:
        expected = (self.rest.shape[1], self.vocabulary)
        if tuple(logits.shape) != expected:
            raise DataError(
                f"Expected logits [tokens, vocabulary] = {expected} as recorded, got {tuple(logits.shape)}. "
                "Compare on the recorded blocks, one block at a time."
            )


@dataclass(frozen=True)
class Comparison:
    """What a model predicts on the recorded blocks, beside the dense model.

    Attributes:
        divergence: Mean KL(dense || model) in nats per token; 0 is equal.
        agreement: Share of tokens after which both have the same first choice; 1 is equal.
        perplexity: The model's own perplexity.
    """

    divergence: float
    agreement: float
    perplexity: float


def compare(
    model: PreTrainedModel, reference: DenseReference, blocks: Tensor, *, batch_size: int = 1
) -> Comparison:
    """Run a model once over the recorded blocks and compare its predictions with the dense model's.

    Args:
        model: The patched model.
        reference: The dense model's predictions on the same blocks.
        blocks: Token ids `[blocks, tokens]`, those the reference was recorded on.
        batch_size: Blocks per forward.

    Raises:
        DataError: If the blocks have another shape than the recorded ones.
        CalibrationError: If the logits of a block hold NaN or infinity.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> import slimformer
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=1))
        >>> blocks = torch.arange(16).view(2, 8)
        >>> reference = DenseReference.record(model, blocks)
        >>> with slimformer.patched(model, slimformer.LayerDrop(mlp=[1])):
        ...     comparison = compare(model, reference, blocks)
        >>> comparison.divergence > 0
        True
    """
    if blocks.shape != reference.rest.shape:
        raise DataError(
            f"The reference was recorded on blocks of shape {tuple(reference.rest.shape)}, got "
            f"{tuple(blocks.shape)}. Give the same blocks to both."
        )
    values = []
    for index, logits in enumerate(block_logits(model, blocks, batch_size)):
        pair = torch.stack([reference.divergence(logits, index), reference.agreement(logits, index)])
        values.append(torch.cat([pair.cpu().double(), block_loss(logits, blocks[index])[None]]))
    divergence, agreement, loss = torch.stack(values).mean(0)
    return Comparison(divergence.item(), agreement.item(), loss.exp().item())


def embedding_agreement(dense: Tensor, slim: Tensor) -> float:
    """Mean cosine between the embeddings of the same texts, for encoders.

    Args:
        dense: Embeddings by the dense model `[texts, hidden]`.
        slim: Embeddings by the patched model `[texts, hidden]`.

    Returns:
        Between -1 and 1; 1 when every direction is equal.

    Raises:
        DataError: If the shapes differ or hold nothing.
        CalibrationError: If an embedding holds NaN.

    Example:
        >>> embedding_agreement(torch.eye(2), 3 * torch.eye(2))
        1.0
    """
    if dense.ndim != 2 or dense.shape != slim.shape or dense.numel() == 0:
        raise DataError(
            f"Expected two equal shapes [texts, hidden], got {tuple(dense.shape)} and {tuple(slim.shape)}."
        )
    cosine = F.cosine_similarity(dense.float(), slim.to(dense.device).float(), dim=-1)
    if cosine.isnan().any():
        raise CalibrationError(
            f"The embeddings of text {int(cosine.isnan().nonzero()[0])} hold NaN. Check the model's dtype."
        )
    return cosine.mean().item()


def likeliest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and ids of the most likely tokens, and the probability of the rest.

    Args:
        logits: `[tokens, vocabulary]`.
        top_k: How many tokens are kept.

    Returns:
        Log-probabilities, most likely first, and ids, each `[tokens, top_k]`, and the rest `[tokens]`.

    Example:
        >>> log_probs, ids, rest = likeliest(torch.tensor([[0.0, 9.0, 9.0, 0.0]]).log_softmax(-1), 2)
        >>> sorted(ids[0].tolist()), round(rest.item(), 4)
        ([1, 2], 0.0001)
    """
    parts = []
    for chunk in logits.split(TOKENS_AT_ONCE):
        log_probs = chunk.float().log_softmax(-1)
        values, indices = log_probs.topk(top_k, dim=-1)
        parts.append((values, indices, _rest(log_probs, indices)))
    values, indices, rest = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, indices, rest


def _rest(log_probs: Tensor, indices: Tensor) -> Tensor:
    # Summed over the rest, not 1 minus the kept: that difference would lose all digits of a small rest.
    return log_probs.exp().scatter(-1, indices, 0.0).sum(-1)


def bucketed_divergence(logits: Tensor, dense: Tensor, indices: Tensor, dense_rest: Tensor) -> Tensor:
    """KL(dense || given) per token, all but the kept tokens being one bucket; exactly 0 for the dense logits.

    A token that the dense model rules out adds nothing, as 0 log 0 is 0.

    Args:
        logits: The given model's `[tokens, vocabulary]`.
        dense: What `likeliest` gave for the dense model's: log-probabilities `[tokens, top_k]`.
        indices: Their ids.
        dense_rest: The probability of the rest `[tokens]`.

    Returns:
        Nats `[tokens]`, float32.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> bucketed_divergence(logits, *likeliest(logits, 2))
        tensor([0.])
    """
    log_probs = logits.float().log_softmax(-1)
    ids = indices.long()
    dense = dense.float()
    probs = dense.exp()
    kept = torch.where(probs > 0, probs * (dense - log_probs.gather(-1, ids)), 0.0).sum(-1)
    # A rest of exactly 0 is below what float32 can say, not impossible: its logarithm stays finite.
    least = torch.finfo(torch.float32).tiny
    logs = [rest.clamp_min(least).log() for rest in (dense_rest, _rest(log_probs, ids))]
    return (kept + dense_rest * (logs[0] - logs[1])).clamp_min(0.0)

"""What patching costs: predictions or embeddings of the patched model beside the dense one's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimformer.decisions.policy import TokenPolicy
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.divergence import DenseReference, compare, embedding_agreement
from slimformer.evaluation.perplexity import evaluating
from slimformer.evaluation.similarity_task import masked_mean
from slimformer.model.anatomy import Anatomy, find_anatomy
from slimformer.patching import patched, status
from slimformer.text.sources import check_token_ids


@dataclass(frozen=True)
class Quality:
    """What was measured; a decoder has no embedding cosine, and embeddings have nothing else.

    Attributes:
        perplexity_dense: Perplexity of the dense model.
        perplexity_slim: Perplexity of the patched model.
        divergence: Mean KL(dense || slim) in nats per token; 0 is equal.
        agreement: Share of tokens after which both predict the same one; 1 is equal.
        tokens: How many tokens were read, without padding.
        embedding_cosine: Mean cosine between dense and slim mean-pooled last hidden states; 1 is equal.
    """

    perplexity_dense: float | None
    perplexity_slim: float | None
    divergence: float | None
    agreement: float | None
    tokens: int
    embedding_cosine: float | None = None

    def to_dict(self) -> dict[str, float | int]:
        """What was measured, without the rest, as a plan's `measured` holds it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def measure_quality(
    model: PreTrainedModel,
    *methods: TokenPolicy,
    blocks: Tensor | None = None,
    batches: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]] | None = None,
    batch_size: int = 1,
    top_k: int = 512,
) -> Quality:
    """Run the dense and then the patched model over the same text.

    Args:
        model: An unpatched model; it is left as it was.
        methods: What to patch it with.
        blocks: For a decoder with a language-model head: token ids `[blocks, tokens]` without padding.
        batches: For embeddings: `input_ids` and optionally `attention_mask`, each `[batch, tokens]`;
            one batch or several.
        batch_size: Blocks per forward.
        top_k: Likeliest tokens that are told apart; the divergence is a lower bound unless this is the vocabulary.

    Raises:
        DataError: If not exactly one of `blocks` and `batches` is given, or it holds no tokens of this model.
        CalibrationError: If the model is patched already, is no decoder though blocks were given, or gives NaN.
        PlanError: If no method is given, or one does not fit the model.
        UnsupportedModelError: If the model's structure is not known.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> import slimformer
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=1))
        >>> drop = slimformer.LayerDrop(attention=[1])
        >>> sorted(measure_quality(model, drop, blocks=torch.arange(16).view(2, 8)).to_dict())
        ['agreement', 'divergence', 'perplexity_dense', 'perplexity_slim', 'tokens']
    """
    if status(model):
        raise CalibrationError(
            "The model is patched; quality is measured beside the dense model. Call unpatch first and give the "
            "methods to measure_quality."
        )
    anatomy = find_anatomy(model)
    with patched(model, *methods):
        pass  # A method that does not fit is refused before the dense model reads all the text.
    if blocks is not None and batches is None:
        if not anatomy.causal:
            raise CalibrationError(
                f"{type(model).__name__} is no decoder, so it predicts no next token. Give batches to compare "
                "embeddings."
            )
        reference = DenseReference.record(model, blocks, top_k=top_k, batch_size=batch_size)
        with patched(model, *methods):
            slim = compare(model, reference, blocks, batch_size=batch_size)
        return Quality(
            reference.perplexity, slim.perplexity, slim.divergence, slim.agreement, tokens=blocks.numel()
        )
    if batches is None or blocks is not None:
        raise DataError(
            "Expected exactly one of blocks (for a decoder) and batches (for embeddings), got "
            f"{'none' if batches is None else 'both'}."
        )
    several = [batches] if isinstance(batches, Mapping) else batches
    held = [_with_mask(batch) for batch in several]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in held)
    if tokens == 0:
        raise DataError("Quality needs at least one token of text, and the batches hold none.")
    for batch in held:
        check_token_ids(batch["input_ids"], anatomy.stack)
    dense = _embeddings(anatomy, held)
    with patched(model, *methods):
        cosine = embedding_agreement(dense, _embeddings(anatomy, held))
    return Quality(None, None, None, None, tokens, cosine)


def _with_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping) or "input_ids" not in batch or batch["input_ids"].ndim != 2:
        raise DataError(
            f"Expected batches with input_ids [batch, tokens], got {_content(batch)}. "
            "slimformer.text.sources.token_batches_padded makes one from texts."
        )
    return {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}


def _content(batch: object) -> str:
    if not isinstance(batch, Mapping):
        return f"a value of type {type(batch).__name__}"
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items()) or "nothing"


def _embeddings(anatomy: Anatomy, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled last hidden states of every row `[rows, hidden]`, on the CPU."""
    parts = []
    # The stack below any head, so that a model loaded with one can be compared as well.
    stack = anatomy.stack
    without_cache = {"use_cache": False} if anatomy.causal else {}
    with evaluating(stack):
        for batch in batches:
            inputs = {name: tensor.to(stack.device) for name, tensor in batch.items()}
            hidden = stack(**inputs, **without_cache).last_hidden_state
            parts.append(masked_mean(hidden, inputs["attention_mask"]).cpu())
    return torch.cat(parts)

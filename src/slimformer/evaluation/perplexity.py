"""How well a model predicts text: perplexity over blocks of tokens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import CalibrationError, DataError
from slimformer.text.files import lines_of
from slimformer.text.sources import check_token_ids, load_texts

# Rows of logits turned to float32 at once: 128 MiB for a vocabulary of 131,072.
TOKENS_AT_ONCE = 256
_RAW_TEXT = (".txt", ".raw")
_FILES = (*_RAW_TEXT, ".jsonl", ".json", ".parquet")


def perplexity(
    model: PreTrainedModel, blocks: Tensor, *, batch_size: int = 1, progress: bool = False
) -> float:
    """The exponential of the mean negative log-likelihood over the T-1 predictions of every block.

    Args:
        model: A decoder with a language-model head.
        blocks: Token ids `[blocks, tokens]`; no padding, so every token counts.
        batch_size: Blocks per forward.
        progress: Show a progress bar.

    Returns:
        The perplexity; infinity when the model rules out a token that comes.

    Raises:
        DataError: If `blocks` is not a matrix of this model's token ids with at least two tokens per block.
        CalibrationError: If the logits of a block hold NaN or infinity, or the model has no language-model head.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1))
        >>> 15 < perplexity(model, torch.arange(16).view(2, 8)) < 17
        True
    """
    found = block_logits(model, blocks, batch_size, "perplexity" if progress else None)
    losses = [block_loss(logits, tokens) for logits, tokens in zip(found, blocks, strict=True)]
    return torch.stack(losses).mean().exp().item()


def wikitext_blocks(
    path_or_text: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int = 1024,
    count: int = 64,
) -> Tensor:
    """The first blocks of one long text, as GPTQ (arXiv 2210.17323) and most papers since evaluate perplexity.

    The whole text is tokenised once with the tokenizer's default special tokens, then cut into consecutive blocks.

    Args:
        path_or_text: A `.txt` or `.raw` file, read as it is; a `.jsonl`, `.json` or `.parquet` file, whose texts are
            joined by blank lines (blank rows are left out); or the text itself.
        tokenizer: The model's tokenizer.
        sequence_length: Tokens per block.
        count: Most blocks; fewer when the text ends before.

    Returns:
        Token ids `[blocks, sequence_length]`, int64, on the CPU.

    Raises:
        DataError: If the file cannot be read, or the text gives less than one block.

    Example:
        >>> def characters(text, **options):
        ...     return {"input_ids": [ord(c) for c in text]}
        >>> wikitext_blocks("abcdefg", characters, sequence_length=3)
        tensor([[ 97,  98,  99],
                [100, 101, 102]])
    """
    if sequence_length < 1 or count < 1:
        raise DataError(f"sequence_length and count must be at least 1, got {sequence_length} and {count}.")
    text = _whole_text(path_or_text)
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    blocks = min(count, len(ids) // sequence_length)
    if blocks == 0:
        raise DataError(
            f"The text gives {len(ids)} tokens, and one block needs {sequence_length}. "
            "Give more text or a smaller sequence_length."
        )
    return torch.tensor(ids[: blocks * sequence_length], dtype=torch.long).view(blocks, sequence_length)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of every target, in float32 whatever the logits' dtype.

    Args:
        logits: `[tokens, vocabulary]`.
        targets: Token ids `[tokens]`.

    Returns:
        Losses in nats `[tokens]`.

    Example:
        >>> token_losses(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    chunks = zip(logits.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True)
    return torch.cat([F.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in chunks])


def block_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of a block's tokens behind the first.

    Args:
        logits: `[tokens, vocabulary]`.
        tokens: The block's token ids `[tokens]`.

    Returns:
        A float64 scalar in nats, on the CPU.

    Example:
        >>> block_loss(torch.zeros(3, 4), torch.tensor([0, 3, 1]))
        tensor(1.3863, dtype=torch.float64)
    """
    # Averaged on the CPU, since not every device knows float64.
    return token_losses(logits[:-1], tokens[1:].to(logits.device)).cpu().double().mean()


def block_logits(
    model: PreTrainedModel, blocks: Tensor, batch_size: int, description: str | None = None
) -> Iterator[Tensor]:
    """The logits `[tokens, vocabulary]` of one block after the other, on the model's device.

    Args:
        model: A decoder with a language-model head; it runs without gradients, dropout and cache.
        blocks: Token ids `[blocks, tokens]`.
        batch_size: Blocks per forward.
        description: Of a progress bar; None shows none.

    Raises:
        DataError: If `blocks` is not a matrix of this model's token ids with at least two tokens per block.
        CalibrationError: If the logits of a block hold NaN or infinity, or the model has no language-model head.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1))
        >>> [tuple(logits.shape) for logits in block_logits(model, torch.arange(16).view(2, 8), batch_size=2)]
        [(8, 16), (8, 16)]
    """
    _check_blocks(model, blocks, batch_size)
    starts = range(0, len(blocks), batch_size)
    for start in track(starts, description=description or "", disable=description is None):
        batch = blocks[start : start + batch_size].to(model.device)
        # Only around the forward: a generator that is not read to its end must not leave the model changed.
        with evaluating(model):
            logits = getattr(model(input_ids=batch, use_cache=False), "logits", None)
        if logits is None or logits.shape[:2] != batch.shape:
            raise CalibrationError(
                f"{type(model).__name__} gives no logits [batch, tokens, vocabulary]: it has no language-model "
                "head. Load it with AutoModelForCausalLM."
            )
        for offset, block in enumerate(logits):
            # The maximum of anything with NaN is NaN, and NaN is not smaller than infinity.
            if not block.amax() < float("inf"):
                raise CalibrationError(
                    f"The logits of block {start + offset} hold NaN or infinity. Check the model's weights and dtype: "
                    "float16 overflows where bfloat16 or float32 do not."
                )
            yield block


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; every module gets back the training flag it had.

    Example:
        >>> layer = nn.Dropout()
        >>> with evaluating(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _check_blocks(model: PreTrainedModel, blocks: Tensor, batch_size: int) -> None:
    advice = "slimformer.text.sources.token_blocks makes them from texts."
    if not isinstance(blocks, Tensor):
        raise DataError(
            f"Expected a tensor of token ids [blocks, tokens], got {type(blocks).__name__}. {advice}"
        )
    if blocks.ndim != 2 or len(blocks) < 1 or blocks.shape[1] < 2 or blocks.dtype != torch.int64:
        raise DataError(
            "Expected int64 token ids [blocks, tokens] with at least 1 block of 2 tokens, got "
            f"{tuple(blocks.shape)} of {blocks.dtype}. {advice}"
        )
    check_token_ids(blocks, model)
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}.")


def _whole_text(source: str | Path) -> str:
    if isinstance(source, str) and not source.lower().endswith(_FILES) and not os.path.isfile(source):
        return source
    path = Path(source)
    if path.suffix.lower() not in _RAW_TEXT:
        return "\n\n".join(load_texts(path)[0])
    return "".join(lines_of(path))

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

from slimformer.calibration.data import load_texts
from slimformer.errors import CalibrationError, DataError

# Rows of logits turned to float32 at once: 128 MiB for a vocabulary of 131,072.
TOKENS_AT_ONCE = 256


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
        DataError: If `blocks` is not a matrix of token ids with at least two tokens per block.
        CalibrationError: If the loss of a block is NaN; the message names the block.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1))
        >>> value = perplexity(model, torch.arange(16).view(2, 8))
        >>> 15 < value < 17
        True
    """
    check_blocks(blocks, batch_size)
    if blocks.shape[1] < 2:
        raise DataError("Perplexity needs at least 2 tokens per block, got 1. Use a longer sequence_length.")
    total = 0.0
    starts = range(0, len(blocks), batch_size)
    with evaluating(model):
        for start in track(starts, description="perplexity", disable=not progress):
            batch = blocks[start : start + batch_size].to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            for offset, (row, tokens) in enumerate(zip(logits, batch, strict=True)):
                loss = token_losses(row[:-1], tokens[1:]).double().sum().item()
                if loss != loss:
                    raise CalibrationError(
                        f"The loss of block {start + offset} is NaN. Check the model's weights and dtype: "
                        "float16 overflows where bfloat16 or float32 do not."
                    )
                total += loss
    return float(torch.tensor(total / (len(blocks) * (blocks.shape[1] - 1)), dtype=torch.float64).exp())


def wikitext_blocks(
    path_or_text: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int = 1024,
    count: int = 64,
) -> Tensor:
    """The first blocks of one long text, as GPTQ (arXiv 2210.17323) and most papers since evaluate perplexity.

    The whole text is tokenised once with the tokenizer's default special tokens, then cut into consecutive blocks.

    Args:
        path_or_text: A `.txt` or `.raw` file, read as it is; a `.jsonl` or `.parquet` file, whose texts are joined
            by blank lines (blank rows are left out); or the text itself.
        tokenizer: The model's tokenizer.
        sequence_length: Tokens per block.
        count: Most blocks; fewer when the text ends before.

    Returns:
        Token ids `[blocks, sequence_length]`, int64, on the CPU.

    Raises:
        DataError: If the file cannot be read, or the text gives less than one block.

    Example:
        >>> blocks = wikitext_blocks("wiki.test.raw", tokenizer)  # doctest: +SKIP
        >>> perplexity(model, blocks)  # doctest: +SKIP
        6.24
    """
    if sequence_length < 1 or count < 1:
        raise DataError(
            f"sequence_length and count must be at least 1, got {sequence_length} and {count}."
        )
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


def check_blocks(blocks: Tensor, batch_size: int) -> None:
    """Refuse what is not a non-empty matrix of token ids `[blocks, tokens]`.

    Raises:
        DataError: With the shape and dtype that came.

    Example:
        >>> check_blocks(torch.zeros(2, 8, dtype=torch.long), batch_size=1)
    """
    if blocks.ndim != 2 or blocks.numel() == 0 or blocks.is_floating_point():
        raise DataError(
            f"Expected token ids [blocks, tokens], got {tuple(blocks.shape)} of {blocks.dtype}. "
            "slimformer.calibration.data.token_blocks makes them from texts."
        )
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}.")


def _whole_text(source: str | Path) -> str:
    if not isinstance(source, Path) and not os.path.isfile(source):
        return source
    path = Path(source)
    if path.suffix.lower() not in {".txt", ".raw"}:
        return "\n\n".join(load_texts(path)[0])
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read {path} as UTF-8 text: {error}.") from error

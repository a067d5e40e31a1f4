"""The capability `own words`: what the dense model writes; it can be kept in a folder, since writing takes longest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import DataError
from slimformer.evaluation.panel.capabilities.prompts import continued, prompt_ids
from slimformer.evaluation.panel.capabilities.reading import Row

_FORMAT = 1
# Values of every weight that the digest of a model reads.
_SAMPLE = 64


@dataclass(frozen=True)
class OwnWords:
    """Prompts and what the dense model wrote behind them.

    Attributes:
        rows: Prompt and answer of each, by kind of prompt.
        digest: SHA-256 over model, prompts and answers, 16 hex digits, for a plan's record.
        reused: Whether the answers were read from a file.
    """

    rows: Sequence[Row]
    digest: str
    reused: bool


def own_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, str]],
    *,
    new_tokens: int,
    longest: int,
    chat: bool | None,
    cache: str | os.PathLike[str] | None,
) -> OwnWords:
    """Let the dense model continue prompts, or read what it wrote before.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        prompts: Kind and text of each.
        new_tokens: Most tokens written to each.
        longest: Most tokens that the model reads; prompts that leave no room for an answer are left out.
        chat: See `prompt_ids`.
        cache: A folder in which answers are kept, one file for a model, its prompts and their length; None keeps none.

    Raises:
        DataError: If a template fails, or the folder cannot be written.
    """
    asked = [(kind, prompt_ids(tokenizer, text, chat)) for kind, text in prompts]
    asked = [(kind, ids) for kind, ids in asked if len(ids) + new_tokens <= longest]
    of = hashlib.sha256(json.dumps([_FORMAT, new_tokens, [ids for _, ids in asked]]).encode())
    of.update(model_digest(model).encode())
    file = None if cache is None else Path(cache) / f"own-words-{of.hexdigest()[:16]}.json"
    answers = None if file is None else _read(file, len(asked), new_tokens, model)
    reused = answers is not None
    if answers is None:
        answers = continued(model, [ids for _, ids in asked], new_tokens)
        if file is not None:
            _write(file, {"format": _FORMAT, "model": model_digest(model), "answers": answers})
    of.update(json.dumps(answers).encode())
    rows = [Row(ids, answer, kind) for (kind, ids), answer in zip(asked, answers, strict=True)]
    return OwnWords(rows, of.hexdigest()[:16], reused)


def model_digest(model: PreTrainedModel) -> str:
    """16 hex digits over the names, shapes, dtypes and first values of all weights, to tell checkpoints apart.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1))
        >>> before = model_digest(model)
        >>> with torch.no_grad():
        ...     _ = model.transformer.wte.weight.add_(1)
        >>> before == model_digest(model)
        False
    """
    found = hashlib.sha256()
    sampled = []
    for name, weight in model.named_parameters():
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        sampled.append(weight.detach().flatten()[:_SAMPLE].float().cpu())
    found.update(torch.cat(sampled).numpy().tobytes() if sampled else b"")
    return found.hexdigest()[:16]


def _read(file: Path, count: int, new_tokens: int, model: PreTrainedModel) -> list[list[int]] | None:
    """The answers of a file; None if there is none, or it is cut short."""
    try:
        answers: Any = json.loads(file.read_text(encoding="utf-8"))["answers"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    size = model.get_input_embeddings().num_embeddings

    def is_answer(answer: Any) -> bool:
        return (
            isinstance(answer, list)
            and 0 < len(answer) <= new_tokens
            and all(isinstance(token, int) and 0 <= token < size for token in answer)
        )

    fits = isinstance(answers, list) and len(answers) == count and all(map(is_answer, answers))
    return answers if fits else None


def _write(file: Path, content: dict[str, Any]) -> None:
    temporary = ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".own-words-")
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            json.dump(content, opened)
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise DataError(
            f"What the dense model wrote cannot be kept in {file.parent}: {error}. Give another folder, or none."
        ) from error

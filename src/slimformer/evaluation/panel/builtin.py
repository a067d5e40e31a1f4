"""The texts and prompts that come with the package: several kinds, so that a plan cannot be good at one alone."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from itertools import chain, zip_longest
from typing import Literal

from transformers import PreTrainedTokenizerBase

from slimformer.errors import DataError

_FOLDER = "slimformer.evaluation.panel"
_BETWEEN = "\n---\n"
KINDS = ("prose", "code", "dialogue", "lists", "languages", "arithmetic")
PROMPT_KINDS = ("questions", "code", "summaries", "lists", "arithmetic", "languages", "writing")


def builtin_texts() -> dict[str, list[str]]:
    """Texts by kind.

    Example:
        >>> texts = builtin_texts()
        >>> list(texts), min(len(text) for of in texts.values() for text in of) > 100
        (['prose', 'code', 'dialogue', 'lists', 'languages', 'arithmetic'], True)
    """
    return {kind: list(_entries("texts", kind)) for kind in KINDS}


def builtin_prompts() -> list[tuple[str, str]]:
    """Kind and prompt, taking turns among the kinds, so that the first few show all of them.

    Example:
        >>> [kind for kind, _ in builtin_prompts()[:7]] == list(PROMPT_KINDS)
        True
    """
    by_kind = [[(kind, text) for text in _entries("prompts", kind)] for kind in PROMPT_KINDS]
    return [entry for entry in chain.from_iterable(zip_longest(*by_kind)) if entry is not None]


def drawable_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token of the built-in texts once, to draw from: the rarest of a vocabulary are hardly known to a model.

    Raises:
        DataError: If there is none.
    """
    found = {
        int(token)
        for of in builtin_texts().values()
        for text in of
        for token in tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    } - set(tokenizer.all_special_ids)
    if not found:
        raise DataError("The tokenizer has no tokens for the built-in texts. Use the model's own tokenizer.")
    return sorted(found)


def _entries(folder: Literal["texts", "prompts"], kind: str) -> Iterator[str]:
    whole = resources.files(_FOLDER).joinpath(f"{folder}/{kind}.txt").read_text(encoding="utf-8")
    for entry in whole.split(_BETWEEN):
        yield entry.strip("\n")

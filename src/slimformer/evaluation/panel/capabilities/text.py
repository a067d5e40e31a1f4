"""The capability `text`: what the model predicts on text that it did not write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from slimformer.errors import DataError
from slimformer.evaluation.panel.capabilities.reading import Row
from slimformer.text.sources import token_blocks

# So much of a row is read before anything is scored.
_READ_FIRST = 4


def text_rows(
    texts: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    tokens: int,
    seed: int,
) -> list[Row]:
    """Rows of text of every kind, about the same number of each; the first quarter of a row is its prompt.

    Args:
        texts: Texts by kind.
        tokenizer: The model's tokenizer.
        count: Rows in all.
        tokens: Tokens per row, shorter where a kind has fewer.
        seed: Which parts of the texts are read.

    Raises:
        DataError: If there is too little text for two rows.
    """
    rows = []
    for kind, of in texts.items():
        try:
            blocks = token_blocks(
                of, tokenizer, sequence_length=tokens, count=math.ceil(count / len(texts)), seed=seed
            )
        except DataError:
            continue  # This kind is shorter than a row.
        first = max(tokens // _READ_FIRST, 1)
        rows += [Row(block[:first], block[first:], kind) for block in blocks.tolist()]
    if len(rows) < 2:
        raise DataError(
            f"The text gives {len(rows)} rows of {tokens} tokens, and its spread is known from two on. Give more text."
        )
    return rows

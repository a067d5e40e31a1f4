"""Whether embeddings of long texts grow alike: their spread at several lengths, without any labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from slimformer.errors import CalibrationError, DataError
from slimformer.text.held_out import split_texts

# Spread among fewer texts is chance, and among more it does not change.
_LEAST, _MOST = 8, 64
_SHORTEST = 16


@dataclass(frozen=True)
class LengthSpread:
    """How much of the spread of short texts' embeddings those of long texts keep: 1 where they differ as much.

    The spread at a length is 1 less the mean cosine between different texts cut to that length. Where attention
    flattens with length, embeddings of long texts collapse towards each other (arXiv 2410.24200).

    Attributes:
        source: Where the texts came from.
        texts: What is embedded; short ones are joined until they are as long as the model reads.
        batch_size: Texts per forward.
    """

    source: str
    texts: Sequence[str]
    batch_size: int = 32
    name: str = "spread of long texts beside short ones"

    def split(self) -> tuple[LengthSpread, LengthSpread]:
        """Four fifths to choose by, as calibration takes them, and the rest to report on."""
        kept, held_out = split_texts(list(self.texts))
        return (
            dataclasses.replace(self, source=f"{self.source}, four fifths", texts=kept),
            dataclasses.replace(self, source=f"{self.source}, the held-out fifth", texts=held_out),
        )

    def spreads(self, model: Any) -> dict[int, float]:
        """The spread at every length, in tokens, halved from what the model reads down to 16.

        Args:
            model: A SentenceTransformer, patched or not.

        Raises:
            CalibrationError: If the model is none, or its embeddings hold NaN.
            DataError: If there is too little text.
        """
        if not hasattr(model, "encode") or not hasattr(model, "max_seq_length"):
            raise CalibrationError(
                f"The spread of embeddings is measured with a SentenceTransformer, got {type(model).__name__}. "
                "SentenceTransformer(folder) loads any transformers checkpoint, with mean pooling."
            )
        longest = int(model.max_seq_length)
        whole = self._joined(model.tokenizer, longest)
        found = {}
        try:
            for length in _halves(longest):
                model.max_seq_length = length
                embeddings = model.encode(
                    whole, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False
                )
                unit = F.normalize(embeddings.double(), dim=-1)
                if bool(unit.isnan().any()):
                    raise CalibrationError("The embeddings hold NaN. Check the model and its dtype.")
                cosine = unit @ unit.T
                count = len(unit)
                found[length] = float(1 - (cosine.sum() - cosine.diagonal().sum()) / (count * (count - 1)))
        finally:
            model.max_seq_length = longest
        return found

    def figure(self, spreads: dict[int, float]) -> float:
        """The spread at the greatest length over that at the least, at most 1: more is not better."""
        shortest, longest = spreads[min(spreads)], spreads[max(spreads)]
        return min(longest / max(shortest, torch.finfo(torch.float32).tiny), 1.0)

    def _joined(self, tokenizer: Any, tokens: int) -> list[str]:
        """Texts of at least so many tokens, each from neighbours in order."""
        found: list[str] = []
        parts: list[str] = []
        held = 0
        for text in self.texts:
            parts.append(text)
            held += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if held >= tokens:
                found.append("\n".join(parts))
                parts, held = [], 0
            if len(found) == _MOST:
                break
        if len(found) < _LEAST:
            raise DataError(
                f"{self.source} fills {len(found)} texts of {tokens} tokens, and {_LEAST} are needed to see how "
                "embeddings spread. Give more text, or set a smaller max_seq_length."
            )
        return found


def _halves(longest: int) -> list[int]:
    """A length and its halves down to the shortest that says anything, ascending."""
    found = [longest]
    while found[-1] // 2 >= _SHORTEST:
        found.append(found[-1] // 2)
    return found[::-1]

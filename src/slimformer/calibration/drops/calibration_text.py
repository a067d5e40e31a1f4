"""The text of one calibration, cut into what its parts read."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.calibration.drops.budgets import BUDGETS, Budget
from slimformer.calibration.drops.divergence_to_dense import (
    Divergence,
    EmbeddingDivergence,
    PredictionDivergence,
)
from slimformer.calibration.drops.replay import Call, record_call
from slimformer.calibration.drops.search import Judge, Replay, Search
from slimformer.calibration.mixture.rows import mixture_rows
from slimformer.calibration.mixture.sources import sources_of
from slimformer.decisions.replacements import Replace
from slimformer.errors import DataError, SlimformerWarning
from slimformer.evaluation.divergence import DenseReference
from slimformer.evaluation.readable import longest, predicts_tokens
from slimformer.model.anatomy import Anatomy
from slimformer.text.held_out import split_texts
from slimformer.text.progress import Stages
from slimformer.text.sources import (
    characters_for,
    check_token_ids,
    load_texts,
    token_batches_padded,
    token_blocks,
)

_TOKENS_AT_ONCE = {"cuda": 8192, "cpu": 2048}


@dataclass
class CalibrationText:
    """Rows of tokens in a random order; different parts of calibration read different ones where there are enough.

    Attributes:
        model: The dense model.
        anatomy: Its layers.
        rows: `input_ids` and for encoders `attention_mask`, each `[rows, tokens]`.
        source: Where they came from.
        sizes: How many rows each part reads.
        sources: The source of each row that is judged, which are then the first rows; none where there is one source.
        shares: How much each of them counts.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    rows: dict[str, Tensor]
    source: str
    sizes: Budget
    sources: Sequence[str] = ()
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens there are, without padding."""
        mask = self.rows.get("attention_mask")
        return self.rows["input_ids"].numel() if mask is None else int(mask.sum())

    @property
    def judged(self) -> int:
        """Rows for judging; the rest is for fitting."""
        if self.sources:
            return len(self.sources)
        return min(self.sizes.judged, max(len(self.rows["input_ids"]) // 4, 1))

    def similarity_batches(self) -> list[dict[str, Tensor]]:
        """What cosines are measured on."""
        return self._batches(0, self.sizes.similarity)

    def final_batches(self) -> list[dict[str, Tensor]]:
        """What replacements are fitted on in the end: everything."""
        return self._batches(0, self.judged + self.sizes.final)

    def final_calls(self) -> list[Call]:
        """The same, ready for the layers."""
        return [record_call(self.anatomy, batch) for batch in self.final_batches()]

    def fitting_calls(self) -> list[Call]:
        """What replacements are fitted on while it is searched: other rows than those that are judged by.

        Raises:
            DataError: If there are no others.
        """
        if len(self.rows["input_ids"]) <= self.judged:
            raise DataError(
                f"All {self.judged} rows of {self.source} are judged by, and none is left to fit replacements on. "
                "Give more text, or replace='nothing'."
            )
        batches = self._batches(self.judged, self.judged + self.sizes.fitted)
        return [record_call(self.anatomy, batch) for batch in batches]

    def search(
        self, replace: Replace, taps: int, advance: Callable[[int], None], judge: Judge | None = None
    ) -> Search:
        """A greedy search on this text, which is also what candidates are judged by unless `judge` is given."""
        fitted = self.fitting_calls() if replace != "nothing" else []
        by = Replay(self.anatomy, self._judged_calls, self._divergence) if judge is None else judge
        return Search(self.anatomy, by, fitted, replace, taps, advance, shares=self.shares)

    @cached_property
    def _judged_calls(self) -> list[Call]:
        return [record_call(self.anatomy, batch) for batch in self._batches(0, self.judged)]

    @cached_property
    def _divergence(self) -> Divergence:
        if not predicts_tokens(self.model, self.anatomy):
            return EmbeddingDivergence.record(self.anatomy, self._judged_calls)
        blocks = torch.cat([call.batch["input_ids"].cpu() for call in self._judged_calls])
        device = self.anatomy.stack.device
        return PredictionDivergence(
            self.model,
            self.anatomy,
            DenseReference.record(self.model, blocks, device=device),
            self.sources or [""] * len(blocks),
        )

    def _batches(self, begin: int, end: int) -> list[dict[str, Tensor]]:
        at_once = _TOKENS_AT_ONCE.get(self.anatomy.stack.device.type, 2048)
        rows = max(at_once // self.rows["input_ids"].shape[1], 1)
        chosen = {name: tensor[begin:end] for name, tensor in self.rows.items()}
        parts = zip(*(tensor.split(rows) for tensor in chosen.values()), strict=True)
        return [dict(zip(chosen, part, strict=True)) for part in parts]


def read_mixture(
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    text_field: str,
    hold_out: bool,
    sizes: Budget,
    seed: int,
    *,
    fitting: bool,
    cache: str | os.PathLike[str] | None,
    stages: Stages,
) -> CalibrationText:
    """Rows of several sources, equally many of each to judge by, and more to fit on where that is wanted.

    Raises:
        DataError: If the text cannot be read, or a source gives too little.
        CalibrationError: If the model is to write and writes nothing.
    """
    sources = sources_of(data)
    each = max(sizes.judged // 2, 2)
    mixture = mixture_rows(
        model,
        tokenizer,
        sources,
        text_field=text_field,
        hold_out=hold_out,
        tokens=min(sizes.sequence_length, longest(anatomy, tokenizer)),
        count=sizes.final if fitting else 1,
        held_out=0,
        seed=seed,
        cache=cache,
        stages=stages,
        least=each,
    )
    check_token_ids(mixture.read, model)
    for name, part in mixture.record.items():
        if part["rows"] < each:
            _warn_of_chance(name, part["rows"], mixture.read.shape[1], each)
    places = {
        name: [place for place, of in enumerate(mixture.read_of) if of == name] for name in mixture.record
    }
    generator = torch.Generator().manual_seed(seed)
    judged = [place for of in places.values() for place in of[:each]]
    rest = torch.tensor([place for of in places.values() for place in of[each:]], dtype=torch.long)
    order = [*judged, *rest[torch.randperm(len(rest), generator=generator)].tolist()]
    origin = "; ".join(part["from"] for part in mixture.record.values())
    return CalibrationText(
        model,
        anatomy,
        {"input_ids": mixture.read[order]},
        origin,
        sizes,
        [mixture.read_of[place] for place in judged],
        {source.name: source.share for source in sources},
    )


def read_text(
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    data: str | os.PathLike[str] | Iterable[str] | None,
    text_field: str,
    hold_out: bool,
    sizes: Budget,
    seed: int,
) -> CalibrationText:
    """Read, tokenise and shuffle as many rows as a budget wants, or all there are.

    Raises:
        DataError: If the text cannot be read, or gives fewer than two rows.
    """
    given: Any = os.fspath(data) if isinstance(data, os.PathLike) else data
    length = min(sizes.sequence_length, longest(anatomy, tokenizer))
    texts, source = load_texts(given, text_field=text_field, enough=characters_for(sizes.blocks * length))
    if hold_out:
        texts = split_texts(texts)[0]
    if predicts_tokens(model, anatomy):
        ids = token_blocks(texts, tokenizer, sequence_length=length, count=sizes.blocks, seed=seed)
        rows = {"input_ids": ids}
    else:
        rows = token_batches_padded(texts, tokenizer, max_length=length, count=sizes.blocks, seed=seed)
    count = len(rows["input_ids"])
    if count < 2:
        raise DataError(
            f"Calibration needs at least two blocks of {length} tokens, and {source} gives {count}. Give more text."
        )
    check_token_ids(rows["input_ids"], model)
    fewest = BUDGETS["quick"]
    if count < fewest.similarity:
        _warn_of_chance(source, count, length, fewest.blocks)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return CalibrationText(model, anatomy, {name: t[order] for name, t in rows.items()}, source, sizes)


def _warn_of_chance(source: str, blocks: int, tokens: int, wanted: int) -> None:
    warnings.warn(
        f"{source} gives {blocks} blocks of up to {tokens} tokens to calibrate on, and by so few the choice is mostly "
        f"chance. Give {math.ceil(wanted / blocks)} times as much text: the budget reads {wanted} blocks.",
        SlimformerWarning,
        stacklevel=4,
    )

"""What is read: the user's text or task, cut into what is searched on, what is judged by, and what is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from slimformer.calibration.mixture.sources import BUILT_IN, COPYING, OWN_WORDS, sources_of
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.embedding_tasks import EmbeddingTask, is_labelled, task_of
from slimformer.evaluation.panel import Panel, PanelBudget, embedding_panel
from slimformer.evaluation.retrieval import RetrievalTask
from slimformer.examination.tiers import Support
from slimformer.optimization.goals import Conditions, Prompts, Texts, Workload
from slimformer.optimization.measuring.bases import answer_tokens
from slimformer.text.held_out import split_texts
from slimformer.text.sources import characters_for, load_texts, token_batches_padded, token_blocks

# Texts that encoders embed in one run, in batches.
_BATCHES = {"cuda": 16, "cpu": 2}
# Long prompts that schedules of elimination are judged on, by device.
_TRIALS = {"cuda": 8, "cpu": 2}
_FEWEST_TEXTS = 2


@dataclass
class Reading:
    """The texts of one optimisation.

    Attributes:
        data: What the mixture reads.
        texts: Text to choose by and to run, without what is held out.
        held_out: The user's text that is judged by; None where the built-in ones are.
        source: Where it came from.
        hold_out: Whether the mixture leaves every fifth text alone.
        task: For embeddings what they are for, to choose by.
        rest: The part of that which is not chosen by.
        queries: Texts that are asked with.
    """

    data: Any
    texts: list[str]
    held_out: list[str] | None
    source: str
    hold_out: bool
    task: EmbeddingTask | None = None
    rest: EmbeddingTask | None = None
    queries: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, data: Any, *, text_field: str, hold_out: bool, decoder: bool, tokens: int) -> Reading:
        """Read it.

        Args:
            data: As `optimize` takes it.
            text_field: The field with the text.
            hold_out: Whether every fifth text is kept for judging.
            decoder: Whether the model predicts tokens.
            tokens: How many a prompt has.

        Raises:
            DataError: If it cannot be read.
        """
        if not decoder and is_labelled(data):
            task = task_of(data, text_field)
            chosen, rest = task.split() if hold_out else (task, task)
            queries = list(chosen.queries.values()) if isinstance(chosen, RetrievalTask) else []
            return cls(chosen.texts, chosen.texts, None, task.source, False, chosen, rest, queries)
        given = _text_of(data, decoder)
        read, source = load_texts(
            os.fspath(given) if isinstance(given, os.PathLike) else given,
            text_field=text_field,
            enough=characters_for(64 * max(tokens, 256)),
        )
        own = given is not None
        kept, held_out = split_texts(read) if hold_out and own else (read, [])
        if not decoder:
            # Text without labels is embedded as paragraphs, each of which says one thing.
            kept = [part.strip() for text in kept for part in text.split("\n\n") if part.strip()]
        if not own and not decoder:
            return cls(kept, kept, None, source, False)
        # A stream cannot be read a second time.
        again = (
            read if given == "-" or not isinstance(data, (str, os.PathLike, Mapping, type(None))) else data
        )
        return cls(again, kept, held_out or None, source, hold_out)


def workload(
    reading: Reading,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    support: Support,
    conditions: Conditions,
    seed: int,
) -> Workload:
    """What is run, cut from the text.

    Raises:
        DataError: If the text is shorter than a prompt.
    """
    if conditions.goal != "encode":
        return Prompts(
            prompt_rows(reading, tokenizer, conditions.prompt, conditions.batch, seed, exactly=True),
            conditions.new_tokens,
        )
    device = support.anatomy.stack.device.type
    count = conditions.batch * _BATCHES.get(device, _BATCHES["cpu"])
    if len(reading.texts) < _FEWEST_TEXTS:
        raise DataError(
            f"{reading.source} gives {len(reading.texts)} texts to embed. Give {_FEWEST_TEXTS} or more."
        )
    order = torch.randperm(len(reading.texts), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [reading.texts[index] for index in order[:count]]
    if hasattr(model, "encode"):
        return Texts(texts, conditions.batch)
    rows = token_batches_padded(texts, tokenizer, max_length=conditions.prompt, count=count, seed=seed)
    parts = zip(*(tensor.split(conditions.batch) for tensor in rows.values()), strict=True)
    return Texts(texts, conditions.batch, [dict(zip(rows, part, strict=True)) for part in parts])


def prompt_rows(
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    count: int,
    seed: int,
    *,
    exactly: bool = False,
) -> torch.Tensor:
    """Prompts of so many tokens `[count, tokens]`; as many as there are, or the same again where so many must be.

    Raises:
        DataError: If the text is shorter than one.
    """
    try:
        rows = token_blocks(reading.texts, tokenizer, sequence_length=tokens, count=count, seed=seed)
    except DataError as error:
        raise DataError(
            f"A prompt has {tokens} tokens, and {reading.source} is shorter ({error}) Or ask for a shorter prompt."
        ) from error
    return rows.repeat(-(-count // len(rows)), 1)[:count] if exactly else rows


def elimination_rows(
    reading: Reading, tokenizer: PreTrainedTokenizerBase, conditions: Conditions, device: str, seed: int
) -> torch.Tensor:
    """Prompts with an answer behind each, on which schedules are judged `[rows, tokens]`."""
    tokens = conditions.prompt + answer_tokens()
    return prompt_rows(reading, tokenizer, tokens, _TRIALS.get(device, _TRIALS["cpu"]), seed + 1)


def panel_of(
    reading: Reading,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    conditions: Conditions,
    *,
    prompts: Any,
    prompts_by: Any,
    budget: PanelBudget,
    cache: str | os.PathLike[str] | None,
    seed: int,
    last: bool,
) -> Panel:
    """The panel that judges: while searching, or `last`, on other rows.

    Raises:
        CalibrationError: If the model has none of the capabilities.
        DataError: If there are too few texts.
    """
    if conditions.goal == "encode":
        task = reading.rest if last else reading.task
        if task is not None and not hasattr(model, "encode"):
            raise CalibrationError(
                f"A task of embeddings is measured with a SentenceTransformer, got {type(model).__name__}. "
                "SentenceTransformer(folder) loads any transformers checkpoint, with mean pooling."
            )
        return embedding_panel(
            model,
            tokenizer,
            texts=reading.held_out,
            text_source=reading.source,
            task=task,
            budget=budget,
            batch_size=conditions.batch,
            seed=seed + last,
        )
    lengths = [conditions.prompt] if conditions.goal in ("prefill", "memory") else None
    return Panel.recorded(
        model,
        tokenizer,
        texts=reading.held_out,
        text_source=reading.source,
        prompts=prompts,
        prompts_by=prompts_by,
        lengths=lengths,
        budget=budget,
        cache=cache,
        # Own words come from the same prompts, of which there are few; all other rows are drawn anew.
        seed=seed + last,
    )


def _text_of(data: Any, decoder: bool) -> Any:
    """The text among the sources; None for what is built in."""
    named = (OWN_WORDS, COPYING)
    for source in sources_of(data, decoder):
        if not (isinstance(source.data, str) and source.data in named):
            return None if isinstance(source.data, str) and source.data == BUILT_IN else source.data
    return None

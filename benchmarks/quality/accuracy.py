"""Accuracy on LAMBADA, PIQA, ARC-Easy and OpenBookQA from local files, asked and counted as lm-evaluation-harness does.

OpenBookQA is its `acc_norm`: likelihoods are divided by the characters of the choice; the others are its `acc`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.evaluation.perplexity import evaluating

# Of a folder of data sets.
TASK_FILES = (
    "lambada_openai/lambada_openai.jsonl",
    "piqa/valid.jsonl",
    "piqa/valid-labels.lst",
    "arc_easy/arc_easy.jsonl",
    "openbookqa/openbook_qa.jsonl",
)
_TOKENS_AT_ONCE, _LOGITS_AT_ONCE = 16_384, 4096


class Question(NamedTuple):
    """A context and its possible continuations.

    Attributes:
        context: What comes before.
        choices: Continuations, each with the space in front of it.
        right: Which of them is right. Of a single one it counts whether every token of it is the most likely one.
        by_length: Whether a log-likelihood is divided by the characters of its choice.
    """

    context: str
    choices: tuple[str, ...]
    right: int
    by_length: bool = False


def read_tasks(data: Path) -> dict[str, list[Question]]:
    """The questions of each task."""
    lambada, piqa, labels, arc, openbook = (data / name for name in TASK_FILES)
    rights = labels.read_text(encoding="utf-8").split()
    return {
        "lambada": [Question(row["context"], (f" {row['continuation']}",), 0) for row in _rows(lambada)],
        "piqa": [
            Question(f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), int(right))
            for row, right in zip(_rows(piqa), rights, strict=True)
        ],
        "arc_easy": [
            Question(
                f"{row['query']}\nAnswer:", tuple(f" {choice}" for choice in row["choices"]), row["gold"]
            )
            for row in _rows(arc)
        ],
        "openbookqa": [
            Question(
                row["query"], tuple(f" {choice}" for choice in row["choices"]), row["gold"], by_length=True
            )
            for row in _rows(openbook)
        ],
    }


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> float:
    """The share of questions whose right choice is the likeliest, or is what greedy decoding says."""
    return sum(answered(model, tokenizer, questions)) / len(questions)


def answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> list[bool]:
    """Of every question, whether its right choice is the likeliest, or is what greedy decoding says."""
    asked = [(q.context, choice) for q in questions for choice in q.choices]
    found = iter(_likelihoods(model, tokenizer, asked))
    return [_is_right(question, [next(found) for _ in question.choices]) for question in questions]


def _is_right(question: Question, found: Sequence[tuple[float, bool]]) -> bool:
    if len(found) == 1:
        return found[0][1]
    # Without the space that every choice begins with.
    lengths = [len(choice) - 1 if question.by_length else 1 for choice in question.choices]
    values = [likelihood / length for (likelihood, _), length in zip(found, lengths, strict=True)]
    return max(range(len(values)), key=values.__getitem__) == question.right


@torch.no_grad()
def _likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """Of every continuation: its log-likelihood, and whether greedy decoding gives it."""
    rows = []
    for context, continuation in asked:
        # Cut where the context alone would end, as the harness does.
        whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
        rows.append((whole, start))
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    with evaluating(model):
        while order:
            size = max(_TOKENS_AT_ONCE // len(rows[order[0]][0]), 1)
            batch, order = order[:size], order[size:]
            results = _scored(model, [rows[index] for index in batch])
            for index, result in zip(batch, results, strict=True):
                found[index] = result
    return found


def _scored(model: Any, rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows], device=model.device)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    places = [(number, place) for number, (row, start) in enumerate(rows) for place in range(start, len(row))]
    of, place = torch.tensor(places, device=model.device).unbind(1)
    targets, states = ids[of, place], hidden[of, place - 1]
    head = model.get_output_embeddings()
    likelihoods, greedy = [], []
    for state, target in zip(states.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True):
        logits: Tensor = head(state).float()
        likelihoods.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == target)
    total = torch.zeros(len(rows), device=model.device).index_add_(0, of, torch.cat(likelihoods))
    missed = torch.zeros(len(rows), device=model.device).index_add_(0, of, (~torch.cat(greedy)).float())
    yield from zip(total.tolist(), (missed == 0).tolist(), strict=True)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]

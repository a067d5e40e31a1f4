"""GSM8K by generation: eight worked examples, a question, and the number that is written behind `####`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.evaluation.perplexity import evaluating

GSM8K = "gsm8k/gsm8k.jsonl"
_SHOTS, _NEXT = 8, "Question:"
_NEW_TOKENS = 320
# Rows that are written at once, as long as they fit; more would be numbers beyond 32 bits of an MLP's activations.
_AT_ONCE = {"cuda": 100}
_NUMBER = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


class Problem(NamedTuple):
    """A question behind the examples, and the number that answers it."""

    prompt: str
    answer: str


def read_problems(data: Path, count: int) -> list[Problem]:
    """The questions behind the first eight of the file, which are the examples; in the harness's form."""
    rows = [json.loads(line) for line in (data / GSM8K).read_text(encoding="utf-8").splitlines()]
    shots = "".join(
        f"Question: {row['context']}\nAnswer: {row['chain_of_thought']}\n#### {row['answer']}\n\n"
        for row in rows[:_SHOTS]
    )
    return [
        Problem(f"{shots}Question: {row['context']}\nAnswer:", row["answer"])
        for row in rows[_SHOTS : _SHOTS + count]
    ]


def number_in(text: str) -> str | None:
    """The last number behind `####` before the next question, as digits; None if there is none.

    Example:
        >>> number_in("3 * 4 = 12\\n#### 1,200.00\\n\\nQuestion: What?\\nAnswer: #### 7"), number_in("twelve")
        ('1200', None)
    """
    found = _NUMBER.findall(text.split(_NEXT)[0])
    return _plain(found[-1]) if found else None


def solved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    new_tokens: int = _NEW_TOKENS,
) -> list[bool]:
    """Of every problem, whether greedy decoding writes the right number."""
    # Prompts of like length beside each other need the least padding.
    order = sorted(range(len(problems)), key=lambda index: len(problems[index].prompt))
    right, size = [False] * len(problems), _AT_ONCE.get(model.device.type, 8)
    with evaluating(model):
        while order:
            batch = order[:size]
            try:
                texts = _written(model, tokenizer, [problems[index].prompt for index in batch], new_tokens)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = max(size // 2, 1)
                torch.cuda.empty_cache()
                continue
            for index, text in zip(batch, texts, strict=True):
                right[index] = number_in(text) == _plain(problems[index].answer)
            order = order[size:]
    return right


@torch.no_grad()
def _written(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    rows = [tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] for prompt in prompts]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=new_tokens,
        pad_token_id=pad,
        stop_strings=[_NEXT],
        tokenizer=tokenizer,
    )
    texts: list[str] = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return texts


def _plain(number: str) -> str:
    """Without commas, and without a fraction of zero."""
    value = float(number.replace(",", ""))
    return str(int(value)) if value == int(value) else str(value)

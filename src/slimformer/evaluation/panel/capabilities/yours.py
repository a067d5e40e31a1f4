"""The capability `yours`: the user's own prompts, by how likely their answers are or by what is written."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import DataError
from slimformer.evaluation.panel.capabilities.prompts import continued
from slimformer.evaluation.panel.capability import Kept, bootstrapped
from slimformer.text.files import checked_text, lines_of, paragraphs

Judging = Literal["likelihood", "match"]
_EXPECTED = (
    'Expected a .jsonl file with {"prompt": "...", "answer": "..."} on every line, where the answer may be left out, '
    "or a .txt file with prompts between blank lines"
)


@dataclass(frozen=True)
class Prompt:
    """What a user asks.

    Attributes:
        prompt: The question.
        answer: The right answer; None where there is none.
    """

    prompt: str
    answer: str | None = None


def read_prompts(path: str | os.PathLike[str]) -> tuple[list[Prompt], str]:
    """Read prompts, all of them with answers or none.

    Args:
        path: A `.jsonl` (or `.json`) file with `prompt` and, where there are any, `answer`; or a `.txt` file with
            prompts alone.

    Returns:
        The prompts, and the file's name with their number, for a plan's record.

    Raises:
        DataError: If the file cannot be read, holds fewer than two prompts, or answers for some of them alone.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mine.jsonl"
        >>> _ = path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\\n{"prompt": "1 + 2 =", "answer": "3"}\\n')
        >>> read_prompts(path)[0]
        [Prompt(prompt='1 + 1 =', answer='2'), Prompt(prompt='1 + 2 =', answer='3')]
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"There is no file {file}. {_EXPECTED}.")
    if file.suffix.lower() in (".jsonl", ".json"):
        lines = ((number, line) for number, line in enumerate(lines_of(file), start=1) if line.strip())
        prompts = [_prompt(line, f"Line {number} of {file}") for number, line in lines]
    elif file.suffix.lower() == ".txt":
        prompts = [Prompt(text) for text in paragraphs(lines_of(file)) if text.strip()]
    else:
        raise DataError(f"{file} is of a kind that is not read ({file.suffix or 'no suffix'}). {_EXPECTED}.")
    if len(prompts) < 2:
        raise DataError(
            f"{file} holds {len(prompts)} prompt{'s' * (len(prompts) != 1)}, and the spread of a figure is known from "
            f"two on. {_EXPECTED}."
        )
    without = [number for number, prompt in enumerate(prompts, start=1) if prompt.answer is None]
    if 0 < len(without) < len(prompts):
        raise DataError(
            f"{len(without)} of the {len(prompts)} prompts in {file} have no answer, the first of them number "
            f"{without[0]}. Give answers to all of them, or to none."
        )
    return prompts, f"file {file.name}, {len(prompts)} prompts"


def check_answers(prompts: Sequence[Prompt], judging: Judging) -> None:
    """Refuse prompts that cannot be judged in this way.

    Raises:
        DataError: If what is written is to match answers, and there are none.
    """
    if judging not in ("likelihood", "match"):
        raise DataError(f"Prompts are judged by 'likelihood' or 'match', got {judging!r}.")
    if judging == "match" and any(prompt.answer is None for prompt in prompts):
        raise DataError(
            "Exact match compares what is written with the right answer, and the prompts have none. Give an answer to "
            "every prompt, or judge by likelihood, which takes what the dense model writes where there are no answers."
        )


@dataclass(frozen=True)
class Matches:
    """Prompts whose answers have to be written. Kept is the share of right answers over the dense model's, at most 1.

    Attributes:
        name: The capability.
        prompts: Token ids.
        answers: The right answers.
        tokenizer: Of the model.
        new_tokens: Most tokens that are written.
        dense: 1 where the dense model is right, float64 `[prompts]`.
        seed: Of the bootstrap.
        same: Whether what is written is an answer.
    """

    name: str
    prompts: Sequence[list[int]]
    answers: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int
    dense: Tensor
    seed: int
    same: Callable[[str, str], bool]

    @classmethod
    def recorded(
        cls,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        answers: Sequence[str],
        new_tokens: int,
        seed: int,
        same: Callable[[str, str], bool] | None = None,
    ) -> Matches:
        """Let the dense model answer; `same` is `same_lines` if left out."""
        nothing = torch.zeros(len(prompts), dtype=torch.float64)
        asked = cls(name, prompts, answers, tokenizer, new_tokens, nothing, seed, same or same_lines)
        return dataclasses.replace(asked, dense=asked.right(model))

    def right(self, model: PreTrainedModel) -> Tensor:
        """1 where a model's answer is right, else 0, float64 `[prompts]`."""
        written = continued(model, self.prompts, self.new_tokens)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        pairs = zip(texts, self.answers, strict=True)
        return torch.tensor([self.same(text, answer) for text, answer in pairs], dtype=torch.float64)

    def judged(self, model: PreTrainedModel) -> Kept:
        """The part that a model keeps, with the share of right answers of both."""
        slim, known = self.right(model), self.dense.mean()
        return bootstrapped(
            self.name,
            [""] * len(self.prompts),
            lambda times: 1 - (times @ (self.dense - slim)) / times.sum(1) / known,
            {"right_dense": float(known), "right_slim": float(slim.mean())},
            pooled=True,
            seed=self.seed,
        )

    def digest_parts(self) -> Sequence[Any]:
        """Prompts and answers."""
        return [self.name, list(self.prompts), list(self.answers)]


def same_lines(written: str, answer: str) -> bool:
    """Whether as many lines as the answer has are the same, white space around them aside.

    Example:
        >>> same_lines(" 4\\nBecause 2 + 2 is 4.", "4"), same_lines("It is 4.", "4")
        (True, False)
    """
    wanted = answer.strip().splitlines()
    found = written.strip().splitlines()[: len(wanted)]
    return [line.strip() for line in found] == [line.strip() for line in wanted]


def _prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where} is not JSON ({error}). {_EXPECTED}.") from error
    prompt, answer = (row.get("prompt"), row.get("answer")) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where} has no prompt with text. {_EXPECTED}.")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise DataError(f"{where} has an answer that is no text: {answer!r}. {_EXPECTED}.")
    return Prompt(checked_text(prompt, where), None if answer is None else checked_text(answer, where))

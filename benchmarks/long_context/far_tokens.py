"""What needs far tokens of a long prompt and what does not: passkeys, associations, copies, following text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.long_context.long_prompts import LongTexts, Prompts

# From logits `[texts, tokens, vocabulary]` at the tokens of an answer to grades `[texts, 1 or tokens]`.
Grade = Callable[[Tensor, Tensor, Prompts], Tensor]


@dataclass
class Tasks:
    """The prompts of one length.

    Attributes:
        passkeys: Exact match counts; in filler and in books.
        associations: The best of the possible answers counts.
        copied: The mean negative log-likelihood of the copy counts.
        following: That of the text behind.
        batch: Prompts at a time.
    """

    passkeys: Mapping[str, Prompts]
    associations: Prompts
    copied: Prompts
    following: Prompts
    batch: int

    @classmethod
    def of(cls, texts: LongTexts, tokens: int, count: int, batch: int) -> Tasks:
        """So many prompts of so many tokens, half as many copies."""
        return cls(
            {
                "passkey": texts.passkeys(tokens, count, in_a_book=False),
                "passkey_in_book": texts.passkeys(tokens, count, in_a_book=True),
            },
            texts.associations(tokens, count),
            texts.copied(tokens, max(count // 2, 1)),
            texts.following(tokens, count, min(256, tokens // 4)),
            max(batch, 1),
        )

    def measure(self, model: PreTrainedModel, last: int | None = None) -> dict[str, float]:
        """Every task's figure, and the seconds of one prefill; `last` keeps only so many tokens of each prompt."""
        graded = {name: (prompts, is_right) for name, prompts in self.passkeys.items()}
        graded["associations"] = (self.associations, _is_best_choice)
        graded |= {"copy_nll": (self.copied, nll), "following_nll": (self.following, nll)}
        found = {
            name: answers(model, prompts, self.batch, grade, last)
            for name, (prompts, grade) in graded.items()
        }
        means = {name: float(grades.mean()) for name, (grades, _) in found.items()}
        return means | {"prefill_ms": 1e3 * found["passkey_in_book"][1]}


def answers(
    model: PreTrainedModel, prompts: Prompts, batch: int, grade: Grade, last: int | None = None
) -> tuple[Tensor, float]:
    """A grade per text, of answers that are read behind the prompt's cache; and seconds per prefill."""
    grades, times = [], []
    for ids, answer in zip(prompts.prompt.split(batch), prompts.answer.split(batch), strict=True):
        ids, answer = ids.to(model.device), answer.to(model.device)
        ids = ids if last is None else ids[:, -last:]
        cache = DynamicCache(config=model.config)
        begin = _now(model)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        times.append((_now(model) - begin) / len(ids))
        parts = []
        # Never as many tokens at once as a text has from which tokens leave.
        for chunk in answer.split(128, dim=1):
            following = model(input_ids=chunk, past_key_values=cache, use_cache=True).logits
            parts.append(grade(torch.cat([logits, following[:, :-1]], dim=1).float(), chunk, prompts))
            logits = following[:, -1:]
        grades.append(torch.cat(parts, dim=1).mean(1))
    return torch.cat(grades).cpu(), sorted(times)[len(times) // 2]


def is_right(logits: Tensor, answer: Tensor, prompts: Prompts) -> Tensor:
    """Whether every token of an answer is the likeliest."""
    return (logits.argmax(-1) == answer).all(1, keepdim=True).float()


def _is_best_choice(logits: Tensor, answer: Tensor, prompts: Prompts) -> Tensor:
    if prompts.choices is None:
        return is_right(logits, answer, prompts)
    choices = prompts.choices.to(logits.device)
    return (choices[logits[..., choices].argmax(-1)] == answer).float()


def nll(logits: Tensor, answer: Tensor, prompts: Prompts) -> Tensor:
    """The negative log-likelihood of every token."""
    return -logits.log_softmax(-1).gather(2, answer[..., None])[..., 0]


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

"""The capability `retrieval`: a key somewhere in a long text is asked for, alone there or one of four."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.evaluation.panel.capabilities.reading import Row, read
from slimformer.evaluation.panel.capability import Kept, bootstrapped

_DOORS = ("red", "blue", "green", "white")
_FACT = "\n\nThe code of the {door} door is {key}.\n\n"
_QUESTION = "\n\nWhat is the code of the {door} door? The code of the {door} door is"
# Keys among which the model chooses, whether they stand in the text or nowhere; all begin with different digits.
_CHOICES = 2 * len(_DOORS)
# The dense model's certainty below which it is not said to find keys.
LEAST = 0.4


class Asked(NamedTuple):
    """A prompt that asks for a key.

    Attributes:
        row: The prompt, up to where the keys differ; the first different token of the right key is what is scored.
        choices: The first different token of eight keys, the right one first.
    """

    row: Row
    choices: list[int]


def retrieval_prompts(
    tokenizer: PreTrainedTokenizerBase,
    front: Sequence[int],
    filler: Sequence[int],
    *,
    lengths: Sequence[int],
    count: int,
    seed: int,
) -> list[Asked]:
    """Prompts of each length, half with one key in them and half with four; none where digits are no tokens.

    Args:
        tokenizer: The model's.
        front: What the tokenizer puts before a text.
        filler: Tokens of the text around the keys, repeated as needed.
        lengths: Tokens of the prompts; those too short for keys and question give none.
        count: Prompts of each length.
        seed: Which keys, where, and which is asked for.
    """
    drawn = random.Random(seed)

    def ids(text: str) -> list[int]:
        return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    prompts = []
    for length in lengths:
        for number in range(count):
            digits = drawn.sample("123456789", _CHOICES)
            keys = [digit + "".join(drawn.choices("0123456789", k=4)) for digit in digits]
            told = [ids(f" {key}") for key in keys]
            same = next((i for i, tokens in enumerate(zip(*told, strict=False)) if len(set(tokens)) > 1), 0)
            if len({tuple(key[same : same + 1]) for key in told}) < _CHOICES:
                return []
            doors = drawn.sample(_DOORS, len(_DOORS))
            several = number % 2 == 1
            # The right key is the first of them; the three others stand in the text where there are several.
            facts = [ids(_FACT.format(door=door, key=key)) for door, key in zip(doors, keys, strict=False)]
            question = [*ids(_QUESTION.format(door=doors[0])), *told[0][:same]]
            room = length - len(front) - sum(map(len, facts)) - len(question)
            if room < len(_DOORS):
                break
            # Every quarter of the text has the right key as often.
            order = [(number // 2 + place) % len(_DOORS) for place in range(len(_DOORS))]
            put = dict(zip(order, facts if several else facts[:1], strict=False))
            room = length - len(front) - sum(map(len, put.values())) - len(question)
            begin = drawn.randrange(len(filler))
            text = [filler[(begin + index) % len(filler)] for index in range(room)]
            body = _with_facts(text, put, drawn)
            kind = f"{length} tokens, {'one of four keys' if several else 'one key'}"
            row = Row([*front, *body, *question], [told[0][same]], kind)
            prompts.append(Asked(row, [key[same] for key in told]))
    return prompts


def _with_facts(text: list[int], facts: Mapping[int, list[int]], drawn: random.Random) -> list[int]:
    """The text with each fact somewhere in the quarter of its number."""
    part = len(text) // len(_DOORS)
    body: list[int] = []
    for place in range(len(_DOORS)):
        quarter = text[place * part : (place + 1) * part if place + 1 < len(_DOORS) else len(text)]
        at = drawn.randrange(part)
        body += [*quarter[:at], *facts.get(place, []), *quarter[at:]]
    return body


@dataclass(frozen=True)
class Retrieval:
    """Prompts that ask for a key, with the dense model's certainty of the right one.

    The certainty is the probability of the right key, given that it is one of the eight. Kept
    is `(certainty(model) - chance) / (certainty(dense) - chance)` with a chance of 1/8, at most 1.

    Attributes:
        name: The capability.
        prompts: What is read; lengths and numbers of keys count the same.
        dense: The dense model's certainty at each prompt, float64 `[prompts]`.
        seed: Of the bootstrap.
        tokens_at_once: See `read`.
    """

    name: str
    prompts: Sequence[Asked]
    dense: Tensor
    seed: int
    tokens_at_once: int | None = None

    @classmethod
    def recorded(
        cls,
        name: str,
        model: PreTrainedModel,
        prompts: Sequence[Asked],
        seed: int,
        tokens_at_once: int | None = None,
    ) -> Retrieval:
        """Run the dense model over the prompts."""
        return cls(name, prompts, _certainty(model, prompts, tokens_at_once), seed, tokens_at_once)

    def certainty(self, kind: str) -> float:
        """The dense model's mean certainty on one kind of prompts."""
        chosen = torch.tensor([asked.row.group == kind for asked in self.prompts])
        return float(self.dense[chosen].mean())

    def judged(self, model: PreTrainedModel) -> Kept:
        """The part that a model keeps, with the certainty of both."""
        slim, chance = _certainty(model, self.prompts, self.tokens_at_once), 1 / _CHOICES

        def kept(times: Tensor) -> Tensor:
            # The dense model's own mean stays as measured: in a resample it may come near chance.
            known = self.dense[times[0] > 0].mean() - chance
            return 1 - (times @ (self.dense - slim)) / times.sum(1) / known

        figures = {"certainty_dense": float(self.dense.mean()), "certainty_slim": float(slim.mean())}
        groups = [asked.row.group for asked in self.prompts]
        return bootstrapped(self.name, groups, kept, figures, pooled=False, seed=self.seed)

    def digest_parts(self) -> Sequence[Any]:
        """The prompts."""
        return [self.name, *self.prompts]


def _certainty(model: PreTrainedModel, prompts: Sequence[Asked], tokens_at_once: int | None = None) -> Tensor:
    found = torch.zeros(len(prompts), dtype=torch.float64)
    for piece in read(model, [asked.row for asked in prompts], tokens_at_once):
        choices = torch.tensor(prompts[piece.row].choices, device=piece.logits.device)
        found[piece.row] = piece.logits[0, choices].float().softmax(-1)[0].cpu().double()
    return found

"""Long prompts with an answer that shows whether far tokens were of use: passkeys, copies, associations, plain text."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Books and meetings that no predictor is trained on.
HELD_OUT_BOOKS = ("Moby-Dick--Or-The-Whale.txt", "Great-Expectations.txt")
HELD_OUT_MEETINGS = 30
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
CITIES = ("Paris", "London", "Rome", "Madrid", "Berlin", "Vienna", "Tokyo", "Cairo")


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length with an answer each.

    Attributes:
        prompt: `[texts, tokens]`.
        answer: `[texts, answer]`.
        choices: First tokens of the answers that are possible `[choices]`; None where any token is.
    """

    prompt: Tensor
    answer: Tensor
    choices: Tensor | None = None


def meetings(data: Path) -> list[str]:
    """What was said in every meeting of QMSum; the first ones are held out."""
    with gzip.open(data / "qmsum_retrieval" / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def held_out_books(data: Path) -> list[str]:
    """The books without what their producers say in front."""
    read = [(data / "books" / name).read_text(encoding="utf-8") for name in HELD_OUT_BOOKS]
    return [book[20_000:700_000] for book in read]


class LongTexts:
    """Tokens of books and meetings, from which prompts are cut.

    Args:
        data: A folder with `books/` and `qmsum_retrieval/corpus.jsonl.gz`.
        tokenizer: The model's.
    """

    def __init__(self, data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.books = torch.cat([self._ids(book) for book in held_out_books(data)])
        self.meetings = self._ids("\n\n".join(meetings(data)[:HELD_OUT_MEETINGS]))

    def following(self, tokens: int, texts: int, answer: int = 256) -> Prompts:
        """Text and how it goes on, half from books and half from meetings."""
        half = texts // 2
        rows = [self._cut(self.books, tokens + answer, n, texts - half) for n in range(texts - half)]
        rows += [self._cut(self.meetings, tokens + answer, n, half) for n in range(half)]
        whole = torch.stack(rows)
        return Prompts(whole[:, :tokens], whole[:, tokens:])

    def book_windows(self, tokens: int, windows: int) -> Tensor:
        """Pieces of books, `[windows, tokens]`, spread over them."""
        return torch.stack([self._cut(self.books, tokens, n, windows) for n in range(windows)])

    def copied(self, tokens: int, texts: int, passage: int = 512, cue: int = 32) -> Prompts:
        """A passage from the start of the prompt, whose first words stand again at its end; the answer is its rest."""
        passage = min(passage, tokens // 4)
        rows, answers = [], []
        for number in range(texts):
            row = self._cut(self.books, tokens, number, texts)
            start = tokens // 8
            first = row[start : start + passage]
            rows.append(torch.cat([row[: tokens - cue], first[:cue]]))
            answers.append(first[cue:])
        return Prompts(torch.stack(rows), torch.stack(answers))

    def passkeys(self, tokens: int, texts: int, *, in_a_book: bool) -> Prompts:
        """A five-digit key anywhere in a book, or in LongEmbed's filler (arXiv 2404.12096), and the question for it."""
        sentences = self._ids(FILLER * (tokens // 10))
        chance, rows, answers = random.Random(1), [], []
        question = self._ids("\n\nWhat is the pass key? The pass key is")
        for number in range(texts):
            key = f"{chance.randrange(10000, 100000)}"
            hidden = self._ids(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
            rest = tokens - len(hidden) - len(question)
            filler = self._cut(self.books, rest, number, texts) if in_a_book else sentences[:rest]
            at = int(len(filler) * (number + 0.5) / texts)
            rows.append(torch.cat([filler[:at], hidden, filler[at:], question]))
            answers.append(self._ids(f" {key}"))
        length = min(len(answer) for answer in answers)
        return Prompts(torch.stack(rows), torch.stack([answer[:length] for answer in answers]))

    def associations(self, tokens: int, texts: int) -> Prompts:
        """Eight worked examples at the very beginning, and the question of one of them again at the end."""
        chance, rows, answers = random.Random(2), [], []
        choices = torch.cat([self._ids(f" {city}")[:1] for city in CITIES])
        for number in range(texts):
            cities = chance.sample(CITIES, len(CITIES))
            shots = "".join(
                f"Question: Where does {name} live?\nAnswer: {city}\n\n"
                for name, city in zip(NAMES, cities, strict=True)
            )
            asked = number % len(NAMES)
            head = self._ids(shots)
            tail = self._ids(f"\n\nQuestion: Where does {NAMES[asked]} live?\nAnswer:")
            filler = self._cut(self.books, tokens - len(head) - len(tail), number, texts)
            rows.append(torch.cat([head, filler, tail]))
            answers.append(choices[CITIES.index(cities[asked])][None])
        return Prompts(torch.stack(rows), torch.stack(answers), choices)

    def _ids(self, text: str) -> Tensor:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids)

    def _cut(self, source: Tensor, tokens: int, number: int, of: int) -> Tensor:
        """One of `of` pieces, spread over a source."""
        start = (len(source) - tokens) * number // max(of, 1)
        return source[start : start + tokens]

"""Questions about long meetings that cannot be answered without having read them, from QMSum (arXiv 2104.05938).

The right answer stands among those to the most alike questions about other meetings, and what counts is how much
likelier an answer becomes by the transcript: what the question alone says of it is taken off.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from slimformer.calls.layer_calls import cache_argument

_FOLDER = "qmsum_retrieval"
CHOICES = 4
# Tokens of an answer that are read: never as many as a text has from which tokens are eliminated.
_ANSWER = 64
# What any part of a transcript answers.
_ABOUT_ALL = re.compile(r"^(summari[sz]e|what was) the (whole )?meeting( about)?\W*$", re.IGNORECASE)


class Question(NamedTuple):
    """A question about one meeting.

    Attributes:
        meeting: Its number.
        text: What is asked.
        answers: The right one first.
    """

    meeting: int
    text: str
    answers: tuple[str, ...]


class Answered(NamedTuple):
    """How a model answered one question.

    Attributes:
        right: Whether the right answer gained most by the transcript.
        certainty: Its part of all, where each counts by the exponential of what its first tokens gained in all.
        tokens: Tokens of the prompt.
    """

    right: bool
    certainty: float
    tokens: int


@dataclass(frozen=True)
class MeetingQuestions:
    """Meetings of some lengths, with questions about them.

    Attributes:
        tokenizer: The model's.
        meetings: Token ids of the transcripts `[tokens]`, with what the tokenizer puts before a text.
        questions: Spread over the meetings.
        others: The transcripts of other lengths, of which nothing is asked: for training.
    """

    tokenizer: PreTrainedTokenizerBase
    meetings: Mapping[int, Tensor]
    questions: Sequence[Question]
    others: Sequence[str]

    @classmethod
    def read(
        cls, data: Path, tokenizer: PreTrainedTokenizerBase, *, count: int, least: int, most: int
    ) -> MeetingQuestions:
        """At most `count` questions about meetings of `least` to `most` tokens, as many about each as about another."""
        corpus, asked, about = _read(data)
        ids = [torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in corpus]
        # Room for the question.
        fit = {number for number, of in enumerate(ids) if least <= len(of) <= most - 2 * _ANSWER}
        by_meeting: dict[int, list[int]] = {}
        for number, (row, meeting) in enumerate(zip(asked, about, strict=True)):
            if meeting in fit and not _ABOUT_ALL.match(row["question"]):
                by_meeting.setdefault(meeting, []).append(number)
        turns = max(map(len, by_meeting.values()), default=0)
        order = [of[turn] for turn in range(turns) for of in by_meeting.values() if turn < len(of)]
        alike = _Alike([row["question"] for row in asked])
        chosen = []
        for number in order[:count]:
            wrong: dict[int, str] = {}
            for other in alike.to(number):
                if about[other] != about[number] and len(wrong) < CHOICES - 1:
                    wrong.setdefault(about[other], asked[other]["text"])
            answers = (asked[number]["text"], *wrong.values())
            chosen.append(Question(about[number], asked[number]["question"], answers))
        meetings = {question.meeting: ids[question.meeting] for question in chosen}
        others = [text for number, text in enumerate(corpus) if number not in meetings]
        return cls(tokenizer, meetings, chosen, others)

    def answered(self, model: PreTrainedModel, *, last: float = 1.0) -> list[Answered]:
        """Ask a model, patched as it is, everything; `last` leaves only that part of every transcript, its end."""
        front = _ids(self.tokenizer, "", special=True)
        found = []
        for meeting, text, answers in self.questions:
            whole = self.meetings[meeting]
            kept = whole[len(whole) - round(last * len(whole)) :]
            asked = torch.tensor(_ids(self.tokenizer, f"\n\nQuestion: {text}\nAnswer:"))
            choices = [_ids(self.tokenizer, f" {answer}")[:_ANSWER] for answer in answers]
            prompt = torch.cat([kept, asked])
            alone = torch.cat([torch.tensor(front, dtype=torch.long), asked])
            gained = likelihoods(model, prompt, choices) - likelihoods(model, alone, choices)
            shortest = min(map(len, choices))
            means = [float(gain.mean()) for gain in gained.split(1)]
            certainty = float((shortest * torch.tensor(means, dtype=torch.float64)).softmax(0)[0])
            found.append(Answered(means[0] > max(means[1:]), certainty, len(prompt)))
        return found


@torch.no_grad()
def likelihoods(model: Any, prompt: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """The mean log-likelihood per token of every answer behind a prompt, float64 `[answers]`; the prompt is read once.

    Args:
        model: A decoder.
        prompt: Token ids `[tokens]`.
        answers: Token ids of each.
    """
    longest = max(map(len, answers))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in answers], device=model.device)
    counts = torch.tensor([len(row) for row in answers], device=model.device)
    cache = DynamicCache(config=model.config)
    given = {cache_argument(model): cache, "use_cache": True}
    first = model(input_ids=prompt[None].to(model.device), logits_to_keep=1, **given).logits
    cache.batch_repeat_interleave(len(answers))
    rest = model(input_ids=ids[:, :-1], **given).logits if longest > 1 else first[:, :0]
    logits = torch.cat([first.expand(len(answers), -1, -1), rest.expand(len(answers), -1, -1)], dim=1)
    told = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0].double()
    real = torch.arange(longest, device=model.device) < counts[:, None]
    return ((told * real).sum(1) / counts).cpu()


def _read(data: Path) -> tuple[list[str], list[dict[str, str]], list[int]]:
    """Transcripts, questions with their answers, and the number of the meeting that each is about."""
    folder = data / _FOLDER
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        corpus = [json.loads(line) for line in file]
    numbers = {row["_id"]: number for number, row in enumerate(corpus)}
    lines = (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]
    of = {query: numbers[document] for query, document, _ in (line.split("\t") for line in lines)}
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [row for row in rows if row["_id"] in of]
    return [row["text"] for row in corpus], asked, [of[row["_id"]] for row in asked]


class _Alike:
    """Which questions share words; the rarer a word, the more it says."""

    def __init__(self, texts: Sequence[str]) -> None:
        words = [set(re.findall(r"\w+", text.lower())) for text in texts]
        counts = Counter(word for of in words for word in of)
        number = {word: index for index, word in enumerate(counts)}
        self.has = torch.zeros(len(texts), len(counts))
        for row, of in zip(self.has, words, strict=True):
            row[[number[word] for word in of]] = 1.0
        self.weights = torch.tensor([math.log(len(texts) / count) for count in counts.values()])

    def to(self, number: int) -> list[int]:
        """All questions, the most alike first: by the words that both have, as a part of those that either has."""
        own = self.has @ self.weights
        shared = self.has @ (self.weights * self.has[number])
        parts = shared / (own + own[number] - shared).clamp_min(1e-9)
        order: list[int] = parts.argsort(descending=True, stable=True).tolist()
        return order


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids

"""LongEmbed's synthetic retrieval tasks (arXiv 2404.12096): one sentence somewhere in a long document is asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.long_context.long_prompts import FILLER

# Words of a document per token of the length it stands for, as LongEmbed counts.
WORDS_PER_TOKEN = 0.75
_FIRST = ("Alma", "Bruno", "Cora", "Dmitri", "Edith", "Farid", "Greta", "Hugo", "Ines", "Jonas")
_LAST = ("Abbott", "Becker", "Castro", "Dubois", "Eklund", "Fischer", "Garcia", "Holmes", "Ivanov", "Jensen")
# fmt: off
_PLACES = (
    "Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Tbilisi", "Accra", "Montreal", "Adelaide", "Krakow",
)
# fmt: on
# What is said of a place, and how it is asked for.
_FACTS = (
    ("The best dish to order in {place} is {thing}.", "which dish is the best to order in {place}?"),
    ("The train to {place} leaves from {thing}.", "where does the train to {place} leave from?"),
    ("The oldest bridge of {place} was built by {thing}.", "who built the oldest bridge of {place}?"),
    ("Children in {place} collect {thing}.", "what do children in {place} collect?"),
    (
        "The mayor of {place} keeps {thing} in his office.",
        "what does the mayor of {place} keep in his office?",
    ),
    ("In {place} the market opens when {thing}.", "when does the market open in {place}?"),
    ("The orchestra of {place} rehearses in {thing}.", "where does the orchestra of {place} rehearse?"),
    ("The flag of {place} shows {thing}.", "what does the flag of {place} show?"),
    ("Tea is drunk in {place} from {thing}.", "what is tea drunk from in {place}?"),
    ("The lighthouse near {place} is painted by {thing}.", "who paints the lighthouse near {place}?"),
)
_THINGS = (
    ("smoked eel", "pumpkin soup", "fried sardines", "lentil pie", "baked quince"),
    ("platform nine", "the harbour", "a meadow", "the old mill", "under the castle"),
    ("two sisters", "a retired baker", "monks", "sailors", "a blind engineer"),
    ("blue feathers", "bottle caps", "bus tickets", "river stones", "old keys"),
    ("a stuffed owl", "seven clocks", "a beehive", "his mother's piano", "a rowing boat"),
    ("the bell rings twice", "fog has lifted", "the ferry is in", "geese fly by", "it is dark"),
    ("an ice factory", "a swimming hall", "the crypt", "a tram depot", "a lemon grove"),
    ("a sleeping bear", "three anchors", "a broken wheel", "a green moon", "crossed spoons"),
    ("wooden cups", "seashells", "copper bowls", "paper cones", "tin thimbles"),
    ("schoolteachers", "twin brothers", "the night watchman", "volunteers", "a robot"),
)


@dataclass(frozen=True)
class LongDocuments:
    """Documents of one length, and queries with the one document that answers each.

    Attributes:
        documents: The texts.
        queries: What is asked.
        answers: For each query, the index of its document.
    """

    documents: Sequence[str]
    queries: Sequence[str]
    answers: Sequence[int]


def passkeys(tokens: int, documents: int = 100, queries: int = 50, seed: int = 0) -> LongDocuments:
    """Everybody's pass key at a random place of the same filler, in documents of `0.75 * tokens` words.

    Example:
        >>> task = passkeys(64, documents=3, queries=1)
        >>> task.queries, max(len(text.split()) for text in task.documents)
        (['what is the passkey for Alma Abbott?'], 48)
    """
    chance = random.Random(seed)
    names = [f"{first} {last}" for last in _LAST for first in _FIRST][:documents]
    keys = chance.sample(range(10000, 100000), len(names))
    sentences = [
        f"{name}'s pass key is {key}. Remember it. {key} is the pass key for {name}."
        for name, key in zip(names, keys, strict=True)
    ]
    filler = (FILLER * (tokens // 10 + 1)).split()
    texts = [_hidden(sentence, filler, tokens, chance) for sentence in sentences]
    asked = [f"what is the passkey for {name}?" for name in names[:queries]]
    return LongDocuments(texts, asked, range(len(asked)))


def needles(
    tokens: int, haystack: str, documents: int = 100, queries: int = 50, seed: int = 0
) -> LongDocuments:
    """Made-up facts about places, each at a random place of another piece of a book.

    Args:
        tokens: The length that documents stand for: they have 0.75 times as many words.
        haystack: The book.
        documents: How many, at most 100.
        queries: How many are asked for.
        seed: Of places and pieces.
    """
    chance = random.Random(seed)
    # Every document has its own fact; neighbours differ in what is said and in the place.
    chosen = [(number % 10, (number + number // 10) % 10) for number in range(documents)]
    words = haystack.split()
    texts, asked = [], []
    for fact, place in chosen:
        says, asks = _FACTS[fact]
        thing = chance.choice(_THINGS[fact])
        start = chance.randrange(max(len(words) - tokens, 1))
        sentence = says.format(place=_PLACES[place], thing=thing)
        texts.append(_hidden(sentence, words[start : start + tokens], tokens, chance))
        asked.append(asks.format(place=_PLACES[place]))
    return LongDocuments(texts, asked[:queries], range(min(queries, documents)))


def _hidden(sentence: str, filler: Sequence[str], tokens: int, chance: random.Random) -> str:
    """A sentence at a random place between words, as many in all as `tokens` stands for."""
    own = sentence.split()
    room = max(int(WORDS_PER_TOKEN * tokens) - len(own), 0)
    at = chance.randint(0, min(room, len(filler)))
    return " ".join([*filler[:at], *own, *filler[at:room]])

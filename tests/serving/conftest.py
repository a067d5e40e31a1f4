"""The real model that the engines serve."""

from __future__ import annotations

from pathlib import Path

import pytest

import real_models


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return real_models.smollm2()

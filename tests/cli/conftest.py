"""Tiny checkpoints and a plan for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimformer import LayerDrop, Plan
from slimformer.plans.plan import fingerprint
from tiny_checkpoints import tiny_checkpoint
from tiny_models import tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "bert", "bert")


@pytest.fixture
def plan(tmp_path: Path) -> str:
    folder = tmp_path / "plan"
    drop = LayerDrop(attention=[1], mlp=[2])
    Plan([drop], fingerprint(tiny_model("llama"))).save_pretrained(folder)
    return str(folder)

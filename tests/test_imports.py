"""Importing slimformer is cheap and leaves everything as it was."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import slimformer


def run(program: str) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_the_command_line_starts_without_torch() -> None:
    assert run("import sys, slimformer, slimformer.cli; print('torch' in sys.modules)") == "False\n"


def test_importing_everything_registers_nothing_in_transformers() -> None:
    program = (
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "before = sorted(functions.valid_keys())\n"
        "import slimformer\n"
        "[getattr(slimformer, name) for name in slimformer.__all__]\n"
        "print(sorted(functions.valid_keys()) == before)"
    )
    assert run(program) == "True\n"


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert set(slimformer.__all__) <= set(dir(slimformer))
    assert all(callable(getattr(slimformer, name)) for name in slimformer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'path'"):
        slimformer.path  # noqa: B018


def test_a_method_that_is_looked_for_in_the_wrong_place_is_found_by_the_message() -> None:
    with pytest.raises(AttributeError, match=r"from slimformer\.methods import RopeScaling"):
        slimformer.RopeScaling  # noqa: B018

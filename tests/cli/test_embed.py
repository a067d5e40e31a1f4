"""`slimformer embed` where Ray is not installed, and what it refuses before anything is started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from command_line import refused, wrong


def test_without_ray_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    # As Python finds it where it is not installed.
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refused("embed", "my-model", "--input", tmp_path / "absent.parquet", "-o", tmp_path / "out")
    assert 'is not installed or lacks a package (ray.data): pip install "slimformer[ray]"' in said
    assert not (tmp_path / "out").exists()


def test_an_input_and_an_output_are_needed(tmp_path: Path) -> None:
    assert "Missing option '--input'" in wrong("embed", "my-model", "-o", tmp_path)
    assert "Missing option '--output'" in wrong("embed", "my-model", "--input", "c.parquet")
    assert "'double' is not one of 'float32', 'float16', 'int8'" in wrong(
        "embed", "my-model", "--input", "c.parquet", "-o", tmp_path, "--precision", "double"
    )

"""What is said where ONNX cannot be written, which needs none of its packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import slimformer
from slimformer import LayerDrop
from slimformer.errors import ExportError
from slimformer.exporting.onnx import recipe_of
from tiny_checkpoints import tiny_checkpoint
from tiny_models import tiny_model


def test_int8_is_the_recipe_of_this_processor() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        assert recipe_of("int8") == capability.lower()
    assert recipe_of(None) is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"to": "onnx", "quantize": "int4"}, "quantize takes int8.*got 'int4'"),
        ({"to": "checkpoint", "quantize": "int8"}, "goes with to='onnx'"),
    ],
)
def test_recipes_that_there_are_not_are_refused(options: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=named):
        slimformer.export(tiny_model("bert"), LayerDrop(block=[1]), tmp_path / "slim", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_not_installed_is_named_before_any_work(missing: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "whole", "bert")
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import slimformer\n"
        "from slimformer.errors import ExportError\n"
        "try:\n"
        "    slimformer.export(sys.argv[1], slimformer.LayerDrop(block=[1]), sys.argv[2], to='onnx')\n"
        "except ExportError as error:\n"
        "    print(error)\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program, folder, str(tmp_path / "slim")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 'is not installed: pip install "slimformer[onnx]"' in printed
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]

"""Commands compute in float32 on a CPU that multiplies half precision slowly, and say so in one line."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slimformer.cli.cpu_dtype import multiplies_fast
from slimformer.cli.loading import load_embedder, load_model
from tiny_checkpoints import tiny_checkpoint
from tiny_models import tiny_model

HALF = [torch.bfloat16, torch.float16]


def stored(folder: Path, name: str, dtype: torch.dtype) -> str:
    """A tiny checkpoint in that dtype."""
    path = tiny_checkpoint(folder / "checkpoint", name)
    tiny_model(name).to(dtype).save_pretrained(path)
    return path


@pytest.fixture(params=HALF, ids=str)
def slow(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """A dtype that a CPU multiplies slowly once oneDNN is off: then PyTorch has no fast product for either."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    yield request.param
    torch.backends.mkldnn.enabled = before


def test_auto_takes_float32_where_the_checkpoint_is_slow(
    slow: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stored(tmp_path, "llama", slow)
    with caplog.at_level(logging.INFO, logger="slimformer"):
        model = load_model(path, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, tiny_model("llama").to(slow).lm_head.weight.float())
    name = str(slow).removeprefix("torch.")
    (line,) = caplog.messages
    assert f"stored in {name}" in line
    assert f"--dtype {name} keeps it" in line
    assert load_model(path, device="cpu", dtype=name).dtype == slow


def test_auto_takes_float32_for_embeddings_too(slow: torch.dtype, tmp_path: Path) -> None:
    model = load_embedder(stored(tmp_path, "bert", slow), device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_what_is_fast_or_float32_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fast = [dtype for dtype in (*HALF, torch.float32) if multiplies_fast(dtype)]
    assert torch.float32 in fast
    with caplog.at_level(logging.INFO, logger="slimformer"):
        for dtype in fast:
            path = stored(tmp_path / str(dtype), "llama", dtype)
            assert load_model(path, device="cpu").dtype == dtype
    assert not caplog.messages


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the limit is one of x86 processors"
)
def test_without_instructions_for_it_nothing_half_is_fast() -> None:
    code = "import torch; from slimformer.cli.cpu_dtype import multiplies_fast as fast; "
    code += "print(fast(torch.bfloat16), fast(torch.float16), fast(torch.float32))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # oneDNN does as on a processor that knows no more than this.
            "ONEDNN_MAX_CPU_ISA": "AVX2",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False", "True"]

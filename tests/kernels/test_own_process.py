"""What needs a process of its own: the interpreter where Triton came first, the compiler, no Triton at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slimformer_kernels.dispatch import HAS_TRITON

HERE = Path(__file__).parent

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import slimformer_kernels as kernels
x, rows = torch.randn(6, 8), torch.tensor([1, 4])
kernels.add_rows_rms_norm_(x, rows, torch.ones(2, 8), torch.ones(8), 1e-6)
kernels.layer_norm_rows(x, rows, torch.ones(8))
kernels.swiglu_packed(x)
kernels.add_layer_norm(x, x, torch.ones(8))
kernels.rotary_(torch.randn(6, 2, 8), None, x, x)
kernels.attention_rows(
    torch.randn(4, 2, 8), torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8), positions=torch.arange(4),
    query_offsets=torch.tensor([0, 4]), key_ranges=torch.tensor([[0, 5]]), longest=4, causal=True, scale=1.0,
)
kernels.pooled_scores(torch.randn(1, 2, 9, 4), torch.randn(1, 1, 9, 4), block=4)
kernels.chunked_cross_entropy(x, torch.randn(11, 8), torch.zeros(6, dtype=torch.long))
compiled = torch.compile(kernels.rms_norm_rows, fullgraph=True, backend="eager")
compiled(x, rows, torch.ones(8), 1e-6)
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)


def test_everything_runs_silently_without_triton():
    done = run("-c", WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    # PyTorch may say for itself that Triton is missing.
    assert "slimformer" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "file", [file.name for file in sorted(HERE.glob("test_*.py")) if file != Path(__file__)]
)
def test_kernels_in_the_interpreter_where_triton_was_imported_first(file, interpreted):
    if not HAS_TRITON or torch.cuda.is_available() or interpreted:
        pytest.skip("the kernel tests of this folder run in this process, or Triton is not installed")
    done = run("-m", "pytest", "-p", "no:cacheprovider", str(HERE / file), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


def test_every_kernel_compiles_for_a_gpu():
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    done = run(str(HERE / "compile_examples.py"), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert "kernels compiled" in done.stdout

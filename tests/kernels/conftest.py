"""Where the kernel tests run: on the GPU if there is one, else in Triton's interpreter.

The interpreter has to be asked for before Triton is imported, which the conftest above does. Where something imported
Triton even earlier, the kernel tests are skipped here and ``test_own_process.py`` runs them in a new process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import zlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from slimformer_kernels.dispatch import HAS_TRITON
from slimformer_kernels.rms_norm_rows import _rms_norm_rows_kernel

INTERPRETED = type(_rms_norm_rows_kernel).__name__ == "InterpretedFunction"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The interpreter cuts float32 off to bfloat16 where the GPU rounds: twice the error per conversion.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2 if INTERPRETED else 1e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Give every test inputs of its own, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="session")
def interpreted() -> bool:
    """Whether the kernels of this process are interpreted on the CPU."""
    return INTERPRETED


@pytest.fixture(scope="session")
def device() -> str:
    """The device on which kernels can run in this process, or a skip that says why there is none."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if not INTERPRETED:
        pytest.skip("Triton was imported without its interpreter; test_own_process.py runs these tests")
    return "cpu"


@pytest.fixture
def gpu() -> str:
    """The GPU, or a skip."""
    if not (torch.cuda.is_available() and importlib.util.find_spec("triton")):
        pytest.skip("needs a CUDA device and Triton")
    return "cuda"


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that the kernels take."""
    return DTYPES[request.param]


@pytest.fixture
def poisoned() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which PyTorch fills every new uninitialised tensor with NaN."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            if not bool(torch.empty(3).isnan().all()):
                raise RuntimeError("this PyTorch does not fill uninitialised memory")
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    return context


@pytest.fixture
def check_close() -> Callable[[Tensor, Tensor], None]:
    """Compare by relative norm within the tolerance of the dtype; every element must have been written."""

    def check(got: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert bool(got.isfinite().all()), "an element was not written"
        error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        assert float(error) <= (TOLERANCE[got.dtype] if tolerance is None else tolerance)

    return check

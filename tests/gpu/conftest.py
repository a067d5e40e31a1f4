"""These tests need a GPU with Triton, unless only their logic is tried out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu.subjects import DRY
from slimformer_kernels.dispatch import HAS_TRITON


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip where no kernel can run."""
    if DRY or (torch.cuda.is_available() and HAS_TRITON):
        return
    missing = "a CUDA device" if HAS_TRITON else "Triton"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {missing}; SLIMFORMER_GPU_TESTS=cpu tries the logic out")
            )

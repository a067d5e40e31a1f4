"""Before anything else of the tests: kernels run in Triton's interpreter where there is no GPU.

It has to be asked for before Triton is imported, which libraries that some tests use do by themselves.
"""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

"""The two ways to merge a decode step's parts on a few small shapes, to be run under `compute-sanitizer`.

Run it as `compute-sanitizer --tool memcheck python -m gpu.decode_merge` with tests, src and kernels on the path, and
once more with `--tool racecheck`. Queries times query heads per key head decide who merges what the programs found: up
to 16 rows the last program of each key head, beyond that a second launch.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from slimformer_kernels.dispatch import HAS_TRITON
from slimformer_kernels.self_extend import self_extend

# Query heads, key heads, head width, keys, queries of each text: rows of 1, 8 and 16, then of 20, 40 and 64.
SHAPES = [
    (2, 2, 64, 130, 1), (32, 4, 128, 700, 1), (16, 4, 80, 333, 4), (8, 2, 64, 700, 5), (16, 2, 128, 333, 5),
    (32, 4, 64, 1500, 8), (9, 3, 24, 65, 7),
]  # fmt: skip
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def error(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, softcap: float | None
) -> float:
    """The relative error of one step of three texts, the first of them padded on the left."""
    heads, kv_heads, width, keys, count = shape
    generator = torch.Generator().manual_seed(keys)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    given = {
        "positions": torch.arange(keys - count, keys).repeat(3),
        "query_offsets": torch.arange(4) * count,
        "key_ranges": torch.tensor([[keys // 3, keys], [0, keys], [keys - count, keys]]),
        "inv_freq": 1.0 / 100.0 ** (torch.arange(width // 2) / (width // 2)),
    }
    rules = {"longest": count, "causal": True, "scale": width**-0.5, "group": 4, "window": 30, "trained": 40}
    tensors = (
        random(3 * count, heads, width),
        random(3, keys, kv_heads, width),
        random(3, keys, kv_heads, width),
    )
    expected = self_extend(*(t.float() for t in tensors), **given, **rules, softcap=softcap)
    on_gpu = {name: t.to(device) for name, t in given.items()}
    actual = self_extend(*(t.to(device) for t in tensors), **on_gpu, **rules, softcap=softcap).cpu().float()
    return float((actual - expected).norm() / expected.norm())


def main() -> int:
    """Run them all; 1 where a result is wrong, 2 where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() and HAS_TRITON else "cpu")
    wrong = 0
    for number, shape in enumerate(SHAPES):
        softcap = (None, 20.0)[number % 2]
        for dtype in TOLERANCE:
            found = error(shape, dtype, device, softcap)
            wrong += not found <= TOLERANCE[dtype]
            rows = shape[4] * (shape[0] // shape[1])
            way = "merged at once" if rows <= 16 else "merged apart"
            print(f"{shape} {dtype} softcap {softcap}: {rows} rows, {way}, error {found:.2g}", flush=True)
    print(f"{wrong} wrong, on {device.type}")
    return 2 if device.type == "cpu" else min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())

"""What `encode` is compared with on a GPU, and the account of where its time goes, beside sums made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.embeddings.inputs import embedder
from benchmarks.frame import tiny
from benchmarks.frame.encode_account import Rates, Work
from benchmarks.frame.flash_attention import flash_attention
from benchmarks.frame.registry import Settings
from transformers import modeling_flash_attention_utils as flash

# Of the repository, not of the library: it runs with --repository alone.
pytestmark = pytest.mark.repository


def test_without_its_package_transformers_finds_flash_attention_in_a_block_alone() -> None:
    before = flash._lazy_imports, flash._loaded_implementation
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, 2, 8, generator=generator) for _ in range(3))
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    with flash_attention() as whose:
        (dense, varlen, *_), *_ = flash.lazy_import_flash_attention("flash_attention_2")
        found = varlen(q, k, v, bounds, bounds, 4, 4, softmax_scale=0.5)
        assert torch.equal(found[3:], dense(q[None, 3:], k[None, 3:], v[None, 3:], softmax_scale=0.5)[0])
    weights = (torch.einsum("qhd,khd->hqk", q[:3], k[:3]) * 0.5).softmax(-1)
    assert torch.allclose(found[:3], torch.einsum("hqk,khd->qhd", weights, v[:3]), atol=1e-6)
    assert whose == "FlashAttention-2 of torch"
    assert (flash._lazy_imports, flash._loaded_implementation) == before


def test_the_work_of_encoding_is_that_of_the_tokens_of_texts(tmp_path: Path) -> None:
    tiny.write_models(tmp_path)
    pipeline = embedder(Settings(torch.device("cpu"), model=tmp_path / "embedding model"))
    work = Work.of(pipeline, ["abc", "abcde"])
    layers, hidden, inner = 3, 32, 48
    weights = layers * (4 * hidden * hidden + 2 * hidden * inner)
    assert work.tokens == 8
    assert work.flops == 2 * 8 * weights + 4 * hidden * layers * (9 + 25)
    assert work.bytes(2) == 4 * (2 * weights + 8 * layers * (4 * 2 * hidden + 2 * (hidden + inner)))
    assert work.milliseconds(Rates(work.flops, 1e30), 1) == pytest.approx(1e3)
    assert work.milliseconds(Rates(1e30, work.bytes(1)), 1) == pytest.approx(1e3)

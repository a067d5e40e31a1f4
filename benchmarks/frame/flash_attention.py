"""FlashAttention-2 as PyTorch carries it, for transformers and sentence-transformers without its package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash
from transformers.utils import is_flash_attn_2_available


@contextlib.contextmanager
def flash_attention() -> Iterator[str]:
    """A block in which transformers finds FlashAttention-2: the package's, or else PyTorch's own.

    Yields:
        Whose it is.
    """
    if is_flash_attn_2_available():
        yield "FlashAttention-2"
        return
    functions = (_dense, _varlen, None, flash._pad_input, flash._unpad_input)
    had, loaded = flash._lazy_imports, flash._loaded_implementation
    try:
        flash._lazy_imports = lambda *args, **options: functions
        flash._loaded_implementation = None
        flash.lazy_import_flash_attention("flash_attention_2")
        yield "FlashAttention-2 of torch"
    finally:
        # Whoever asks next finds what there is without this block.
        flash._lazy_imports = had
        flash._loaded_implementation = loaded if loaded != "flash_attention_2" else None


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Texts behind each other `[tokens, heads, head_dim]`, with the signature of the package."""
    if not q.is_cuda:
        # The same sums without the kernel, where only the code around it is tried out.
        texts = [
            _dense(
                q[None, start:end], k[None, start:end], v[None, start:end], dropout_p, softmax_scale, causal
            )[0]
            for start, end in pairwise(cu_seqlens_q.tolist())
        ]
        return torch.cat(texts)
    found: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False,
        scale=softmax_scale,
    )[0]  # fmt: skip
    return found


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Texts of one length `[batch, tokens, heads, head_dim]`."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2)

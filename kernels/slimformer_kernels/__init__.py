"""Kernels for token-sparse transformers, each with its PyTorch reference beside it.

The package stands on its own: it needs PyTorch, and uses Triton where it is installed and a GPU is at hand.
"""

from .add_norm import add_layer_norm, add_rms_norm
from .add_rows import add_rows_
from .add_rows_norm import add_rows_layer_norm_, add_rows_rms_norm_
from .arguments import set_debug
from .attention_rows import attention_rows
from .cache_rotary import cache_rotary_
from .chunked_head import chunked_cross_entropy, chunked_kl
from .decode_attention import decode_attention
from .errors import KernelArgumentError
from .glu import geglu, geglu_packed, swiglu, swiglu_packed
from .layer_norm_rows import layer_norm_rows
from .linear_if_any import linear_if_any
from .pooled_scores import PooledScores, pooled_scores
from .rms_norm_rows import rms_norm_rows
from .rotary import rotary_
from .router_scores import router_scores
from .self_extend import self_extend
from .step_linear import step_gated, step_linear, step_linear_added

__all__ = [
    "KernelArgumentError",
    "PooledScores",
    "add_layer_norm",
    "add_rms_norm",
    "add_rows_",
    "add_rows_layer_norm_",
    "add_rows_rms_norm_",
    "attention_rows",
    "cache_rotary_",
    "chunked_cross_entropy",
    "chunked_kl",
    "decode_attention",
    "geglu",
    "geglu_packed",
    "layer_norm_rows",
    "linear_if_any",
    "pooled_scores",
    "rms_norm_rows",
    "rotary_",
    "router_scores",
    "self_extend",
    "set_debug",
    "step_gated",
    "step_linear",
    "step_linear_added",
    "swiglu",
    "swiglu_packed",
]

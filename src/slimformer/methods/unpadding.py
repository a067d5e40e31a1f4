"""Compute no padding: the rows that are not text leave the stream before the first layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimformer.decisions.policy import Decision
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import Kind
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream
from slimformer.runtime.sublayers import uses_kernels


@dataclass(frozen=True)
class Unpadding:
    """The lossless plan: every layer runs under the executor, with its kernels, and padding is not computed.

    Outputs at real tokens are those of the unpatched model up to rounding; at padding they are the embeddings. Nothing
    leaves, and every module runs as it is, where a mask is one of the caller's own that does more than padding, sliding
    windows and packing explain; where somebody has put hooks or a forward on a module of a layer; and where the stack
    puts something between its layers.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> import slimformer
        >>> config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                     num_attention_heads=2)
        >>> model = slimformer.patch(BertModel(config), Unpadding())
    """

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """All rows that are text, in every layer whose sublayers can be computed apart.

        Where padding changes what layers give for text, as behind a convolution without a mask, it stays.
        """
        if not anatomy.structure.apart:
            return {}
        plans: dict[tuple[int, Kind], Decision] = {
            (index, "attention"): Decision() for index in range(len(anatomy.layers))
        }
        if not anatomy.reads_padding:
            plans[0, "attention"] = Decision(not_evicted=(_Text(),))
        return plans


@dataclass(frozen=True)
class _Text:
    """The row selector: what is not padding."""

    by_token = True

    def __call__(self, stream: Stream, x: Tensor) -> Rows | None:
        if x.is_cuda and (stream.layer is None or not uses_kernels(x, stream.layer.layer)):
            # What waits for the CPU gains nothing from fewer rows.
            return None
        found = stream.real()
        # Asked last: a batch without padding needs no answer.
        return None if found is None or stream.layer is None or stream.layer.looked_into() else found

"""Where attention modules keep their projections: one table row per layout, never one function per model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

# Which channels of queries and keys a rotation pairs: the two halves, neighbours, neighbours by cosines and sines that
# repeat in halves (GLM, Helium), or none although the layer gets position embeddings (layers without positions).
Rotation = Literal["halves", "neighbours", "neighbours, angles in halves", "none"]
ROTATIONS: tuple[Rotation, ...] = ("halves", "neighbours", "neighbours, angles in halves", "none")


@dataclass(frozen=True)
class Projections:
    """Attribute names, inside an attention module, of its linear layers.

    Attributes:
        query: The query's layer, or the one that makes all three.
        key: The key's layer; None where one layer makes all three.
        value: The value's layer; None likewise.
        output: The layer behind the heads; None where the surrounding module has it.
        norms: The norms of queries and keys, where there are any.
        packed: How one layer lays out all three: behind each other, or head by head.
        dropout: What follows the output layer.
        bias: The argument with what is added to scores, `[1 or batch, heads, tokens, tokens]`, if there is one.
        other: Children that compute nothing in evaluation.
    """

    query: str
    key: str | None = None
    value: str | None = None
    output: str | None = None
    norms: tuple[str, str] | None = None
    packed: Literal["stacked", "by head"] = "stacked"
    dropout: str | None = None
    bias: str | None = None
    other: tuple[str, ...] = ()

    def children(self) -> set[str]:
        """Names of the children that the row describes."""
        names = (
            self.query,
            self.key,
            self.value,
            self.output,
            self.dropout,
            *(self.norms or ()),
            *self.other,
        )
        return {name for name in names if name is not None}


PROJECTIONS: tuple[Projections, ...] = (
    Projections("q_proj", "k_proj", "v_proj", "o_proj"),
    Projections("q_proj", "k_proj", "v_proj", "o_proj", norms=("q_norm", "k_norm")),
    Projections("q_proj", "k_proj", "v_proj", "dense"),
    Projections("q_proj", "k_proj", "v_proj", "dense", norms=("q_layernorm", "k_layernorm")),
    Projections("qkv_proj", output="o_proj"),
    Projections("query_key_value", output="dense", packed="by head"),
    Projections("c_attn", output="c_proj", dropout="resid_dropout", other=("attn_dropout",)),
    Projections("query", "key", "value", other=("dropout",)),
    Projections("q_lin", "k_lin", "v_lin", "out_lin", other=("dropout",)),
    Projections("q", "k", "v", "o", bias="position_bias", other=("dropout",)),
    Projections("Wqkv", output="Wo", dropout="out_drop"),
)


def match_projections(core: nn.Module) -> Projections | None:
    """The row whose names are exactly the children of an attention module, or None."""
    children = {name for name, _ in core.named_children()}
    return next((row for row in PROJECTIONS if row.children() == children), None)

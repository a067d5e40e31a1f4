"""What slimformer can do with a model: the tier that its layers are in, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from slimformer.cache.slots import compact_slots
from slimformer.calls.layer_calls import check_cache_arguments, keeps_cache, layer_calls, layers_by_depth
from slimformer.errors import UnsupportedModelError
from slimformer.examination.layers import LayerFinding, examine_layers, examine_modules, row_sublayers
from slimformer.model.anatomy import Anatomy, find_anatomy
from slimformer.model.layer_parts import KINDS
from slimformer.runtime.layer import LayerExecutor
from slimformer.runtime.sublayer_modules import SublayerModules
from slimformer.runtime.switched_layer import SwitchedLayer

Tier = Literal["rows", "sublayers"]
_ALLOWS: dict[Tier, str] = {
    "rows": "every method applies",
    "sublayers": "sublayers and layers can be dropped, attention scores changed",
}


@dataclass(frozen=True)
class Support:
    """What can be done with the layers of a model.

    Attributes:
        tier: `"rows"` where the arithmetic of its layers is known, so that every method applies; `"sublayers"` where
            only their modules are, so that sublayers and layers can be dropped and attention scores changed.
        reason: Why it is not in the first tier, in words; empty where it is.
        anatomy: The layers, with the structure that counts.
        findings: What is known of each layer in the first tier.
        modules: What is known of each in the second.
    """

    tier: Tier
    reason: str
    anatomy: Anatomy = field(repr=False)
    findings: tuple[LayerFinding, ...] = field(default=(), repr=False)
    modules: tuple[SublayerModules, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.describe()

    def layer(self, index: int) -> LayerExecutor | SwitchedLayer:
        """What runs a layer by the decisions of methods."""
        layer = self.anatomy.layers[index]
        if self.tier == "rows":
            sublayers = row_sublayers(self.anatomy, index, self.findings[index])
            returns = self.findings[index].returns
            return LayerExecutor(layer, self.anatomy.structure, by_rows=sublayers, returns=returns)
        depth = index if self.anatomy.repeats else None
        return SwitchedLayer(layer, self.modules[index], self.reason, depth=depth)

    def slots(self, dropped: Sequence[int]) -> list[int]:
        """The cache slot of every layer, where the attentions of some are dropped.

        Raises:
            PlanError: If positions could not be counted any more.
        """
        types = self.anatomy.layer_types
        if self.tier == "rows":
            return compact_slots(types, dropped)
        return list(range(len(types)))

    def describe(self) -> str:
        """One line per tier and limit, for people."""
        lines = [
            f"{self.anatomy.describe()}: tier {self.tier!r} ({_ALLOWS[self.tier]})"
            + (f", since {self.reason}" if self.reason else "")
        ]
        for index, finding in enumerate(self.findings):
            if finding.attention.projections is None:
                lines.append(
                    f"layer {index}: attention computes every token, since {finding.attention.reason}"
                )
        for index, modules in enumerate(self.modules):
            for kind in (*KINDS, "block"):
                if kind in modules.reasons:
                    lines.append(f"layer {index}: {kind} cannot be dropped, since {modules.reasons[kind]}")
        return "\n".join(dict.fromkeys(lines))


def support(model: Any) -> Support:
    """Say what slimformer can do with a model, which is not changed.

    Args:
        model: A transformers model, or a SentenceTransformer, CrossEncoder or Pipeline that holds one.

    Raises:
        UnsupportedModelError: If nothing can be done with it; says what was looked for.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import slimformer
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> slimformer.support(LlamaForCausalLM(config)).tier
        'rows'
    """
    return examine_support(find_anatomy(model))


def known_anatomy(model: Any) -> Anatomy:
    """The layers of a model whose arithmetic is known, with the row of the structure table that they follow.

    Raises:
        UnsupportedModelError: If it is not known: what is chosen or trained layer by layer needs it.
    """
    found = support(model)
    if found.tier != "rows":
        raise UnsupportedModelError(
            f"The layers of {type(found.anatomy.stack).__name__} cannot be run sublayer by sublayer: {found.reason}. "
            "LayerDrop, EarlyExit and TempScale apply to it with settings of your own."
        )
    return found.anatomy


def examine_support(anatomy: Anatomy) -> Support:
    """The same by anatomy.

    Raises:
        UnsupportedModelError: If the stack cannot be called on a few tokens, or a cache comes by an unknown name.
    """
    anatomy = layers_by_depth(anatomy)
    check_cache_arguments(anatomy)
    if anatomy.structure.apart:
        why = ""
        for structure in anatomy.fitting:
            built = dataclasses.replace(anatomy, structure=structure)
            findings = examine_layers(built)
            differs = next(((i, found.differs) for i, found in enumerate(findings) if found.differs), None)
            if differs is None:
                reads_padding = any(found.reads_padding for found in findings)
                return Support("rows", "", dataclasses.replace(built, reads_padding=reads_padding), findings)
            index, how = differs
            why = why or (
                f"layer {index}, {type(anatomy.layers[index]).__name__}, has the parts of the structure "
                f"{structure.name!r} ({structure.examples}), but {how}"
            )
        anatomy = anatomy.by_modules(why)
    anatomy = dataclasses.replace(anatomy, caches=keeps_cache(anatomy))
    return Support(
        "sublayers", anatomy.unknown, anatomy, modules=examine_modules(anatomy, layer_calls(anatomy))
    )

"""Every method of the library with weights of its own, by name, and the kernels that it has to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.subjects import HIDDEN, build, parameters_of
from slimformer import EarlyExit, LayerDrop, MixtureOfDepths, SelfExtend, TempScale, TokenElimination
from slimformer.methods.absolute_positions import GroupedPositions, PositionInterpolation, RecurrentPositions
from slimformer.methods.elimination.block_predictor import BlockPredictor
from slimformer.methods.elimination.random_keep import RandomKeep
from slimformer.methods.narrow_mlp import HEAD, PARTS, NarrowMlp
from slimformer.methods.rope_scaling import RopeScaling
from slimformer.methods.temperature import LogNScale
from slimformer.methods.unpadding import Unpadding
from slimformer.methods.weight_delta import WeightDelta

TRAINED = 64
SHORT: dict[str, Any] = {"least": 100, "window": 16, "sink": 4}
ATTENTION = "attention_rows"


@dataclass(frozen=True)
class Method:
    """One plan to test.

    Attributes:
        name: In the test's name.
        plan: Makes its methods.
        models: Which small models it is for.
        kernels: Which kernels run because of it; "a or b" where either does.
        chooses: Whether it chooses tokens by what has been computed, so that roundings decide about some.
        more: What the model is called with beside the text.
        layouts: With which padding.
    """

    name: str
    plan: Callable[[], tuple[Any, ...]]
    models: tuple[str, ...] = ("llama",)
    kernels: tuple[str, ...] = ()
    chooses: bool = False
    more: tuple[tuple[str, Any], ...] = ()
    layouts: tuple[str, ...] = ("none", "left", "right")


def noise(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Random numbers that bfloat16 has too."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.bfloat16().float()


def head() -> dict[str, Tensor]:
    """A linear head behind the last layer."""
    return dict(
        zip(HEAD, (noise(HIDDEN, HIDDEN, scale=0.5 * HIDDEN**-0.5), noise(HIDDEN, scale=0.1)), strict=True)
    )


def left_behind(replace: str, taps: int = 3) -> LayerDrop:
    """Sublayers that leave means or filters."""
    sublayers = {"attention.1": taps, "attention.3": taps, "mlp.2": 1}
    weights = {f"{name}.bias": noise(HIDDEN, seed=i) for i, name in enumerate(sublayers)}
    if replace == "filter":
        for i, (name, width) in enumerate(sublayers.items()):
            weights[f"{name}.weight"] = noise(HIDDEN, width * HIDDEN, scale=(width * HIDDEN) ** -0.5, seed=i)
    return LayerDrop(attention=[1, 3], mlp=[2], replace=replace, taps=taps, weights=weights)


def routed(hidden: int = HIDDEN, **fields: Any) -> MixtureOfDepths:
    """Random routers in the middle layers that keep about half of the tokens."""
    fields = {"attention": [1, 2], "mlp": [1, 3], "keep": 0.5, **fields}
    names = MixtureOfDepths.keeping_everything(hidden, **fields).weights
    weights = {
        name: noise(*t.shape, scale=hidden**-0.5, seed=i) if name.endswith("weight") else torch.zeros(t.shape)
        for i, (name, t) in enumerate(sorted(names.items()))
    }
    return MixtureOfDepths(weights=weights, **fields)


def predicted(**fields: Any) -> TokenElimination:
    """Elimination by a random predictor."""
    torch.manual_seed(3)
    weights = BlockPredictor(HIDDEN, 32, 16).tensors(1)
    return TokenElimination({1: 0.6}, scorer="predictor", weights=weights, **{**SHORT, **fields})


def delta() -> WeightDelta:
    """A delta of low rank on every matrix of two layers, and on a norm."""
    weights: dict[str, Tensor] = {"2.input_layernorm.weight.added": noise(HIDDEN, scale=0.2)}
    shapes = dict(build("llama").model.layers.named_parameters())
    for name in parameters_of(build("llama")):
        if name.startswith(("1.", "2.")):
            rows, columns = shapes[name].shape
            weights[f"{name}.left"] = noise(rows, 4, scale=0.25)
            weights[f"{name}.right"] = noise(4, columns, scale=columns**-0.5)
    return WeightDelta(weights)


def narrow() -> NarrowMlp:
    """Narrow MLPs in two layers of an encoder, one without units, and a head."""
    weights: dict[str, Tensor] = {}
    for layer, units in ((1, 64), (3, 0)):
        shapes = ((units, HIDDEN), (units,), (HIDDEN, units), (HIDDEN, HIDDEN), (HIDDEN,))
        for i, (part, shape) in enumerate(zip(PARTS, shapes, strict=True)):
            weights[f"{layer}.{part}"] = noise(*shape, scale=HIDDEN**-0.5, seed=i)
    return NarrowMlp({1: 64, 3: 0}, {**weights, **head()})


WITHOUT_CACHE = (("use_cache", False),)
# As every structure runs it: sublayers without any row, with some, and with all.
COMPOSED = Method(
    "composed",
    lambda: (LayerDrop(attention=[2], mlp=[1]), RandomKeep(0.5, layers=[1, 2, 3])),
    models=(),
    kernels=(ATTENTION,),
)
METHODS = [
    Method("plain", lambda: (Unpadding(),), ("llama", "bert")),
    Method("drop-nothing", lambda: (LayerDrop(attention=[1, 3], mlp=[2], block=[2]),), ("llama", "bert")),
    Method("drop-mean", lambda: (left_behind("mean"),), ("llama", "gpt_neox", "bert")),
    Method("drop-filter", lambda: (left_behind("filter"),), ("llama", "gpt_neox", "bert")),
    Method("exit", lambda: (EarlyExit(2),), ("llama", "bert")),
    Method("exit-head", lambda: (EarlyExit(3, head()),), ("llama", "bert")),
    Method("routed-threshold", lambda: (routed(),), ("llama", "bert"), ("router_scores", ATTENTION), chooses=True),
    Method("routed-by-layer", lambda: (routed(shared="layer", mlp=[1, 2]),), ("llama",), ("router_scores",), True),
    Method("routed-sequence", lambda: (routed(per="sequence"),), ("llama",), ("router_scores",), True),
    Method("routed-top-k", lambda: (routed(routing="top_k"),), ("llama", "bert"), ("router_scores",), True),
    Method("random-ragged", lambda: (RandomKeep(0.4),), ("llama", "gpt_neox", "bert"), (ATTENTION,)),
    Method(
        "random-equal", lambda: (RandomKeep(0.4, counts="equal"),), ("llama", "bert"), (ATTENTION,), layouts=("none",)
    ),
    Method(
        "random-compact", lambda: (RandomKeep(0.4, layers=[1, 2], keys="compact"),), ("llama",), (ATTENTION,),
        more=WITHOUT_CACHE,
    ),
    Method(
        "leave-attention", lambda: (TokenElimination({1: 0.6, 3: 0.3}, **SHORT),), ("llama", "bert"), (ATTENTION,), True
    ),
    Method(
        "leave-attention-max", lambda: (TokenElimination({2: 0.4}, heads="max", asking="all", **SHORT),), ("llama",),
        (ATTENTION,), True,
    ),
    Method(
        "leave-threshold", lambda: (TokenElimination({1: 1.0}, threshold=True, **SHORT),), ("llama",), (ATTENTION,),
        chooses=True,
    ),
    Method("leave-norm", lambda: (TokenElimination({1: 0.5}, scorer="norm", **SHORT),), ("llama",), (ATTENTION,), True),
    Method("leave-predictor", lambda: (predicted(),), ("llama", "bert"), (ATTENTION,), True),
    Method(
        "leave-random", lambda: (TokenElimination({1: 0.5, 2: 0.3}, scorer="random", **SHORT),), ("llama", "gpt_neox"),
        (ATTENTION,),
    ),
    Method(
        "leave-mean", lambda: (TokenElimination({2: 0.4}, scorer="random", left_as="mean", **SHORT),), ("bert",),
        (ATTENTION,),
    ),
    Method(
        "come-back",
        lambda: (TokenElimination({1: 0.6, 3: 0.5}, scorer="random", revivable=True, **SHORT),),
        ("llama", "gemma2", "modernbert"),
        (ATTENTION,),
    ),
    Method("narrow", lambda: (narrow(),), ("bert",)),
    Method("delta", lambda: (delta(),)),
    Method("temperature", lambda: (TempScale(0.5),), ("llama", "gemma2", "bert", "mpnet")),
    Method("log-n", lambda: (LogNScale(16),), ("llama", "bert")),
    Method("self-extend", lambda: (SelfExtend(10, 32, TRAINED),), ("llama", "glm", "cohere"), ("self_extend",)),
    Method("rope-linear", lambda: (RopeScaling("linear", 5.0, trained_length=TRAINED),), ("llama", "glm")),
    Method("rope-yarn", lambda: (RopeScaling("yarn", 5.0, trained_length=TRAINED),)),
    Method("rope-dynamic", lambda: (RopeScaling("dynamic", 5.0, trained_length=TRAINED),)),
    Method("positions-grouped", lambda: (GroupedPositions(5, TRAINED),), ("bert", "mpnet")),
    Method("positions-interpolated", lambda: (PositionInterpolation(5, TRAINED),), ("bert", "distilbert")),
    Method("positions-recurrent", lambda: (RecurrentPositions(TRAINED),), ("bert",)),
    Method(
        "all-fixed",
        lambda: (left_behind("filter"), RandomKeep(0.5), TempScale(0.9), SelfExtend(10, 32, TRAINED)),
        ("llama",),
        ("self_extend or attention_rows",),
    ),
    Method(
        "leave-and-drop-and-route",
        lambda: (
            TokenElimination({2: 0.5}, scorer="random", **SHORT), LayerDrop(attention=[3]),
            routed(mlp=[1], attention=[2]),
        ),
        ("llama",), ("router_scores", ATTENTION), True,
    ),
]  # fmt: skip

"""Turn the queries and keys of long texts by smaller angles: NTK, PI, YaRN, llama3, LongRoPE and dynamic scaling."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slimformer.decisions.fields import MOST, is_number
from slimformer.decisions.registry import register
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.transforms.rotary import Rotary, find_rotary, rope_type
from slimformer.transforms.scaled_rotary import Angles, ScaledRotary
from slimformer.transforms.transform import Attentions, checked_length

Kind = Literal["ntk", "linear", "dynamic", "yarn", "llama3", "longrope"]
# Dynamic scaling has no end; so many doublings of the trained length are prepared.
_DOUBLINGS = 8
# What transformers requires beyond the factor: llama3's values are those of Llama 3.1.
_DEFAULTS: dict[str, dict[str, Any]] = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}


@register("RopeScaling")
@dataclass(frozen=True)
class RopeScaling:
    """Texts longer than the model was trained for are read with slower rotary positions.

    Which angles, transformers computes: `type` and `parameters` mean what they mean in a config's `rope_parameters`,
    and give the same model. Unlike there a text decides by its own length, without padding: up to the trained length
    L0 it is computed as without scaling, bit for bit, whatever ran before and whatever lies in the same batch.
    `"dynamic"` grows by buckets that double. Where a text outgrows L0 or a bucket in a decoder's cache, its cached
    keys are turned to the new angles once; the model has read the beginning with the old ones, so that results from
    there on are close to, not equal to, those of one pass. Only layers that see all of a text are scaled.

    A tokenizer that cuts texts off (`model_max_length`, `max_seq_length` of a SentenceTransformer) has to be told the
    new length by its owner.

    Attributes:
        type: `"ntk"` (a larger base), `"linear"` (position interpolation), `"dynamic"`, `"yarn"`, `"llama3"` or
            `"longrope"`.
        factor: How many times longer than L0 texts may be.
        theta_factor: For `"ntk"`, the factor λ on the base; None for `factor ** (d / (d - 2))` with d the number of
            rotated channels. LongEmbed takes 3, 5 and 10 for 2, 4 and 8 times the length.
        parameters: What else the type takes, such as `beta_fast` of YaRN or `long_factor` of LongRoPE.
        trained_length: L0; None for what the config says.

    Raises:
        PlanError: If the type is not known, or a number makes no sense.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import slimformer
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)
        >>> model = slimformer.patch(LlamaForCausalLM(config), RopeScaling("ntk", 2.0, theta_factor=3.0))
        >>> slimformer.status(model)[0]["attention"]
        "text rows, RopeScaling('ntk', factor=2.0), up to 1024 tokens"
    """

    type: Kind
    factor: float
    theta_factor: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    trained_length: int | None = None

    def __post_init__(self) -> None:
        if self.type not in get_args(Kind):
            raise PlanError(
                f"RopeScaling(type=...) takes one of {', '.join(get_args(Kind))}, got {self.type!r}."
            )
        for name in ("factor", "theta_factor"):
            value = getattr(self, name)
            if not (is_number(value) and 1 < value <= MOST) and not (
                name == "theta_factor" and value is None
            ):
                raise PlanError(f"RopeScaling({name}=...) takes a number above 1, got {value!r}.")
        if self.theta_factor is not None and self.type != "ntk":
            raise PlanError(
                f"RopeScaling(theta_factor=...) belongs to type 'ntk', and the type is {self.type!r}."
            )
        if self.trained_length is not None:
            checked_length("RopeScaling", "trained_length", self.trained_length, least=2)
        if not isinstance(self.parameters, Mapping) or not all(map(_is_parameter, self.parameters.values())):
            raise PlanError(
                "RopeScaling(parameters=...) takes finite numbers, lists of them, text or True and False by name, as "
                f"rope_parameters of a config; got {self.parameters!r}."
            )
        object.__setattr__(self, "parameters", dict(self.parameters))

    def transform_attention(self, attentions: Attentions) -> dict[int, str]:
        """Other angles in the model's rotary embedding.

        Raises:
            UnsupportedModelError: If the model's positions are not rotary, are scaled already, or are shared by layers
                that see all of a text and layers that see a window.
            PlanError: If `parameters` lack something or another method changes positions too.
        """
        attentions.claim_positions("RopeScaling")
        # Only a decoder's cached keys are turned again.
        found = find_rotary(attentions, "RopeScaling", turns=attentions.anatomy.causal)
        name, rotary = type(attentions.anatomy.stack).__name__, next(iter(found.values()))
        kind = rope_type(rotary.module, rotary.layer_type)
        if kind != "default":
            raise UnsupportedModelError(
                f"RopeScaling works on rotary positions that are not scaled yet, and those of {name} are of the type "
                f"{kind!r} by its config. SelfExtend works on top of any that do not change with the length."
            )
        if rotary.layer_type is None and len(attentions.full_layers("RopeScaling")) < len(attentions.layers):
            raise UnsupportedModelError(
                f"{name} turns queries and keys alike in layers that see all of a text and in layers that see a "
                "window, where no distance is new. SelfExtend leaves the latter alone."
            )
        trained = self.trained_length or attentions.trained_length
        capacity = trained * (2**_DOUBLINGS if self.type == "dynamic" else self.factor)
        own = Angles(rotary.inv_freq.clone(), 1.0)
        scaled = self._angles(attentions, rotary, trained)
        cores = [attentions.core(index) for index in found]
        standing_in = ScaledRotary(
            rotary, [own, *scaled], trained, capacity, _Remedy(self.type, trained), cores
        )
        attentions.read_texts(*standing_in.bounds, capacity)
        attentions.angles = repr(self), trained
        standing_in.had = attentions.ledger.set_forward(rotary.module, standing_in.forward)
        return dict.fromkeys(
            found, f"RopeScaling({self.type!r}, factor={self.factor}), up to {int(capacity)} tokens"
        )

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return dataclasses.asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}

    def _angles(self, attentions: Attentions, rotary: Rotary, trained: int) -> list[Angles]:
        """What texts longer than L0 are turned by, as transformers computes it; for `"dynamic"` one per doubling."""
        config = copy.deepcopy(attentions.anatomy.stack.config)
        of_layer = (
            config.rope_parameters if rotary.layer_type is None else config.rope_parameters[rotary.layer_type]
        )
        module: Any = rotary.module
        compute = module.compute_default_rope_parameters
        lengths: list[dict[str, int]] = [{}]
        if self.type == "ntk":
            width = 2 * rotary.inv_freq.shape[0]
            if self.theta_factor is None and width <= 2:
                raise PlanError(
                    "RopeScaling('ntk') has no closed form for two rotated channels. Pass theta_factor=..."
                )
            of_layer["rope_theta"] *= self.theta_factor or self.factor ** (width / (width - 2))
        else:
            compute = ROPE_INIT_FUNCTIONS[self.type]
            own = {"rope_type": self.type, "factor": self.factor, "original_max_position_embeddings": trained}
            of_layer.update({**own, **_DEFAULTS.get(self.type, {}), **self.parameters})
            config.max_position_embeddings = trained
            if getattr(config, "head_dim", 0) is None:
                # YaRN's and LongRoPE's take it as it is.
                config.head_dim = config.hidden_size // config.num_attention_heads
            doublings = range(1, _DOUBLINGS + 1) if self.type == "dynamic" else range(1, 2)
            lengths = [{"seq_len": trained * 2**doubling} for doubling in doublings]
        by_type = {} if rotary.layer_type is None else {"layer_type": rotary.layer_type}
        angles = []
        for length in lengths:
            try:
                inv_freq, scaling = compute(config, device=rotary.inv_freq.device, **length, **by_type)
                matching = inv_freq.shape == rotary.inv_freq.shape
                scaling = float(scaling)
            except (
                ArithmeticError,
                AttributeError,
                LookupError,
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:
                raise PlanError(
                    f"transformers cannot compute RopeScaling({self.type!r}) with the parameters "
                    f"{dict(self.parameters)}: {error!r}. They are those of rope_parameters in its documentation."
                ) from error
            if not matching or not bool(torch.isfinite(inv_freq).all()) or not math.isfinite(scaling):
                raise PlanError(
                    f"RopeScaling({self.type!r}) with the parameters {dict(self.parameters)} gives angles of the shape "
                    f"{tuple(inv_freq.shape)} where the model has {tuple(rotary.inv_freq.shape)}, or infinite ones."
                )
            angles.append(Angles(inv_freq, scaling))
        return angles


def _is_parameter(value: Any) -> bool:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return value is None or isinstance(value, (bool, str)) or all(map(is_number, numbers))


@dataclass(frozen=True)
class _Remedy:
    """Says what reaches a text that is too long."""

    type: str
    trained: int

    def __call__(self, tokens: int) -> str:
        if self.type == "dynamic":
            return "Longer texts are of no use to a model trained for so much less; cut them into windows."
        return f"RopeScaling({self.type!r}, factor={math.ceil(tokens / self.trained)}) reaches that."

"""Run a model from any layer on, with the residual that an earlier pass has left there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimformer.changes.ledger import Ledger
from slimformer.decisions.policy import Decision
from slimformer.decisions.replacements import apply_taps, filter_reach, zero_padding
from slimformer.model.anatomy import Anatomy, named_arguments, positional_names
from slimformer.model.layer_parts import Kind
from slimformer.runtime.layer import LayerExecutor

Sublayer = tuple[Kind, int]


@dataclass
class Fitted:
    """What a dropped sublayer leaves behind, while it is being calibrated: no cache is involved.

    Attributes:
        bias: `[hidden]`.
        weight: `[hidden, taps * hidden]`, oldest input first; None for a mean.
        taps: How many inputs are read.
        causal: Whether the model is a decoder.
    """

    bias: Tensor
    weight: Tensor | None
    taps: int
    causal: bool

    def __call__(self, residual: Tensor, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The addition to the residual."""
        if self.weight is None:
            return self.bias
        return apply_taps(
            filter_window(normed, kwargs, self.taps, self.causal), self.weight, self.bias, self.taps
        )


Dropped = dict[Sublayer, Fitted | None]


def saved_weights(dropped: Mapping[Sublayer, Fitted | None]) -> dict[str, Tensor]:
    """What dropped sublayers leave behind, as `LayerDrop` takes it."""
    weights = {}
    for (kind, index), fitted in dropped.items():
        if fitted is not None:
            weights[f"{kind}.{index}.bias"] = fitted.bias.cpu()
            if fitted.weight is not None:
                weights[f"{kind}.{index}.weight"] = fitted.weight.cpu()
    return weights


def filter_window(normed: Tensor, kwargs: dict[str, Any], taps: int, causal: bool) -> Tensor:
    """A whole text's inputs without padding, and zeros where filters read past its ends."""
    inputs = zero_padding(normed, kwargs.get("attention_mask"), None) if taps > 1 else normed
    return F.pad(inputs, (0, 0, *filter_reach(taps, causal)))


def executors(anatomy: Anatomy, dropped: Mapping[Sublayer, Fitted | None]) -> list[LayerExecutor]:
    """One executor per layer, without the dropped sublayers."""
    made = [LayerExecutor(layer, anatomy.structure) for layer in anatomy.layers]
    for (kind, index), fitted in dropped.items():
        made[index].sublayers[kind] = Decision(compute=False)
        if fitted is not None:
            made[index].replacements[kind] = fitted
    return made


@dataclass
class Call:
    """One batch on its way through the layers.

    Attributes:
        batch: The model's inputs.
        real: Which tokens are not padding, bool `[batch, tokens]`; None when all are.
        hidden: What the first layer reads `[batch, tokens, hidden]`.
        arguments: The other arguments of every layer.
    """

    batch: dict[str, Tensor]
    real: Tensor | None
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    arguments: list[dict[str, Any]] = field(default_factory=list)


def record_call(anatomy: Anatomy, batch: Mapping[str, Tensor], model: PreTrainedModel | None = None) -> Call:
    """Let the model prepare a batch for its layers, without running any of them.

    Args:
        anatomy: The model's layers.
        batch: Its inputs.
        model: What reads them; None for the stack that holds the layers.
    """
    inputs = {name: tensor.to(anatomy.stack.device) for name, tensor in batch.items()}
    mask = inputs.get("attention_mask")
    call = Call(inputs, None if mask is None or bool(mask.all()) else mask.bool())

    class Recorder:
        def __init__(self, layer: nn.Module) -> None:
            self.names = positional_names(layer)[1:]

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not call.arguments:
                call.hidden = hidden_states
            call.arguments.append(named_arguments(self.names, args, kwargs))
            return _as_layer_returns(self.names, hidden_states)

    with torch.no_grad():
        forwards = [Recorder(layer).forward for layer in anatomy.layers]
        _run_bypassed(anatomy, forwards, model or anatomy.stack, inputs)
    if model is not None:
        # What the stack itself got.
        call.batch = {"inputs_embeds": call.hidden}
    return call


def finish(model: nn.Module, anatomy: Anatomy, call: Call, hidden: Tensor, *, gradients: bool = False) -> Any:
    """What the model makes of the last layer's output: norm, head and whatever else its own forward does."""
    last = len(anatomy.layers) - 1

    class Bypass:
        def __init__(self, index: int, layer: nn.Module) -> None:
            self.index, self.names = index, positional_names(layer)[1:]

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return _as_layer_returns(self.names, hidden if self.index == last else hidden_states)

    bypasses = [Bypass(index, layer).forward for index, layer in enumerate(anatomy.layers)]
    with torch.set_grad_enabled(gradients):
        return _run_bypassed(anatomy, bypasses, model, call.batch)


def run_layers(
    layers: Sequence[LayerExecutor],
    call: Call,
    hidden: Tensor,
    start: int,
    inputs: list[Tensor] | None = None,
) -> Tensor:
    """Run the layers from `start` on; `inputs`, if given, gets what each of them reads."""
    for index in range(start, len(layers)):
        if inputs is not None:
            inputs.append(hidden)
        hidden = run_layer(layers[index], call, hidden, index)
    return hidden


def run_layer(layer: LayerExecutor, call: Call, hidden: Tensor, index: int) -> Tensor:
    """Run one layer."""
    output = layer.forward(hidden, **call.arguments[index])
    return output[0] if isinstance(output, tuple) else output


def _as_layer_returns(names: tuple[str, ...], hidden: Tensor) -> Any:
    # MPNet's encoder indexes the layer's output; every other stack takes the tensor.
    return (hidden,) if "output_attentions" in names else hidden


def _run_bypassed(
    anatomy: Anatomy, forwards: Sequence[Any], model: nn.Module, inputs: dict[str, Tensor]
) -> Any:
    ledger = Ledger()
    try:
        for layer, forward in zip(anatomy.layers, forwards, strict=True):
            ledger.set_forward(layer, forward)
        return model(**inputs, **({"use_cache": False} if anatomy.causal else {}))
    finally:
        ledger.undo()

"""Low-rank adapters (LoRA, arXiv 2106.09685) beside linear layers, by PEFT, that can be taken out again."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slimformer.errors import CalibrationError

_NAME = "default"


@dataclass
class _Place:
    """Where one adapter stands.

    Attributes:
        name: Of the linear layer, from its layer's number on, such as `"3.self_attn.q_proj"`.
        parent: The module that holds it.
        own: The linear layer itself.
        adapter: PEFT's layer around it.
    """

    name: str
    parent: nn.Module
    own: nn.Module
    adapter: Any


class Adapters:
    """Adapters on chosen linear layers; as long as they are untrained, nothing changes.

    Args:
        layers: The model's layers.
        names: Which linear layers get one, from their layer's number on.
        rank: Of every adapter.

    Raises:
        CalibrationError: If PEFT is not installed.
    """

    def __init__(self, layers: nn.ModuleList, names: Sequence[str], rank: int) -> None:
        try:
            peft: Any = importlib.import_module("peft")
        except ImportError as error:
            raise CalibrationError(
                "Repair with low-rank adapters needs PEFT, which is not installed. Install it with "
                "`pip install slimformer[training]`, or leave lora out of what is trained."
            ) from error
        owns = {name: layers.get_submodule(name) for name in names}
        config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(names))
        # PEFT writes its configuration on what it is given, which is not to be the model.
        peft.inject_adapter_in_model(config, nn.ModuleList(layers), _NAME)
        self.places: list[_Place] = []
        for name, own in owns.items():
            adapter = layers.get_submodule(name)
            for matrix in self._matrices(adapter):
                matrix.data = matrix.data.float()
            self.places.append(_Place(name, layers.get_submodule(name.rpartition(".")[0]), own, adapter))

    def parameters(self) -> list[nn.Parameter]:
        """All matrices of all adapters."""
        return [matrix for place in self.places for matrix in self._matrices(place.adapter)]

    def take_out(self) -> None:
        """Put the linear layers back in their places."""
        for place in self.places:
            setattr(place.parent, place.name.rpartition(".")[2], place.own)

    def put_in(self) -> None:
        """Put the adapters back around them."""
        for place in self.places:
            setattr(place.parent, place.name.rpartition(".")[2], place.adapter)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The model without adapters, for the length of a `with` block."""
        self.take_out()
        try:
            yield
        finally:
            self.put_in()

    @contextlib.contextmanager
    def without_casts(self, autocast: bool) -> Iterator[None]:
        """A block in which inputs stay in half precision where autocast casts the matrices, which are smaller."""
        # As `peft.helpers.disable_input_dtype_casting`, without a walk over all modules in every step.
        for place in self.places:
            place.adapter.cast_input_dtype_enabled = not autocast
        try:
            yield
        finally:
            for place in self.places:
                place.adapter.cast_input_dtype_enabled = True

    def products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What each adapter adds to its layer's weight, as two factors `[rows, rank]` and `[rank, columns]`."""
        found = {}
        for place in self.places:
            down, up = (matrix.detach() for matrix in self._matrices(place.adapter))
            left, right = up * place.adapter.scaling[_NAME], down
            # GPT-2's layers hold their weights the other way round.
            turned = place.adapter.fan_in_fan_out
            found[place.name] = (right.T.contiguous(), left.T.contiguous()) if turned else (left, right)
        return found

    @staticmethod
    def _matrices(adapter: Any) -> tuple[nn.Parameter, nn.Parameter]:
        return adapter.lora_A[_NAME].weight, adapter.lora_B[_NAME].weight

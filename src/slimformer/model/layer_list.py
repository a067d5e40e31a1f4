"""The list of a model's layers as it was when the model was patched."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from slimformer.errors import UnsupportedModelError
from slimformer.model.anatomy import Anatomy


@dataclass
class LayerList:
    """Which layers run after each other, so that rows that one takes out of the stream are put back by the last.

    Attributes:
        holder: The module that has the list.
        name: Under which name.
        layers: What was in it.
    """

    holder: nn.Module
    name: str
    layers: tuple[nn.Module, ...]

    @staticmethod
    def of(anatomy: Anatomy) -> LayerList:
        """The list of a model that is being patched."""
        path = next(path for path, module in anatomy.stack.named_modules() if module is anatomy.layers)
        place, _, name = path.rpartition(".")
        return LayerList(anatomy.stack.get_submodule(place), name, tuple(anatomy.layers))

    def check(self) -> None:
        """Refuse to take rows out of the stream where other layers follow than those that were patched.

        Raises:
            UnsupportedModelError: If a layer was taken out, added, moved or replaced.
        """
        now = tuple(self.holder.get_submodule(self.name).children())
        if len(now) != len(self.layers) or any(a is not b for a, b in zip(now, self.layers, strict=True)):
            raise UnsupportedModelError(
                f"{self.name} of {type(self.holder).__name__} holds other layers than when the model was patched "
                f"({len(self.layers)} then, {len(now)} now, or others in their place), and the patch takes rows out of "
                "the residual that the last of them puts back. Call slimformer.unpatch(model) before layers are "
                "changed, and patch the model again."
            )

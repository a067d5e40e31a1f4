"""Attention transforms: methods that change how attention scores are made, not which tokens are computed.

The second of the two ways to extend slimformer; the first is the token policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from slimformer.calls.texts import TextReader, Texts
from slimformer.changes.ledger import Ledger
from slimformer.decisions.fields import is_whole
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.model.anatomy import Anatomy, attention_core, first_calls, in_eval_mode, positional_names
from slimformer.rows.scores import SCORES, Scores, own_config, scores_of
from slimformer.runtime.sublayer import for_attention
from slimformer.transforms.scored_attention import ScoredAttention, computes_scores_itself

# Words in the types of layers that mix tokens without attention scores.
_WITHOUT_SCORES = ("linear", "mamba", "recurrent", "conv")
# Far enough apart that any attention gives different results with the one and with the other.
_PROBES = (2.0**-10, 2.0**10)


@runtime_checkable
class AttentionTransform(Protocol):
    """A method that changes how attention scores are made."""

    def transform_attention(self, attentions: Attentions) -> dict[int, str]:
        """Change the model through `attentions`, and say for every layer that is changed what `status` reports.

        Raises:
            UnsupportedModelError: If the model would ignore the change or cannot take it.
            PlanError: If the settings do not fit the model.
        """
        ...


def transformed_by(methods: Iterable[object], attentions: Attentions) -> dict[int, str]:
    """Let the attention transforms among `methods` change a model, in order; returns what each layer reports."""
    notes: dict[int, list[str]] = {}
    for method in methods:
        if isinstance(method, AttentionTransform):
            for index, note in method.transform_attention(attentions).items():
                if note:
                    notes.setdefault(index, []).append(note)
    said = {index: ", ".join(found) for index, found in notes.items()}
    return {index: said[of] for index, of in enumerate(first_calls(attentions.anatomy)) if of in said}


@dataclass
class Attentions:
    """The attentions of one model, as transforms change them: every change is an entry of the ledger.

    Attributes:
        anatomy: The model's.
        ledger: Where changes are written down.
        call: Input and arguments of a short call of the first layer, to check changes on; None where weights are not
            in memory.
        reads_texts: Whether some change asks how long texts are.
        bounds: Lengths of texts behind which some change does something once.
        angles: What turns cached keys otherwise than the model does, and up to which length of texts it does not.
    """

    anatomy: Anatomy
    ledger: Ledger
    call: tuple[Tensor, dict[str, Any]] | None
    _heeds_scaling: dict[type[nn.Module], bool] = field(default_factory=dict)
    _calls_function: dict[type[nn.Module], bool] = field(default_factory=dict)
    _positions_of: str | None = None
    reads_texts: bool = False
    bounds: set[float] = field(default_factory=set)
    angles: tuple[str, int] | None = None

    @property
    def layers(self) -> list[int]:
        """The indices of the layers that have attention scores: not linear attentions, recurrences or convolutions.

        Of a layer that is called several times it is the first: what is changed about it counts for every call.
        """
        types, first = self.anatomy.layer_types, first_calls(self.anatomy)
        return [
            index
            for index, kind in enumerate(types)
            if first[index] == index and not any(word in kind for word in _WITHOUT_SCORES)
        ]

    def full_layers(self, owner: str) -> list[int]:
        """The layers that see all of a text; those with a sliding window never see more than they were trained for.

        Args:
            owner: The method that asks, for the message.

        Raises:
            UnsupportedModelError: If there are none.
        """
        types = self.anatomy.layer_types
        found = [index for index in self.layers if not any(k in types[index] for k in ("sliding", "chunked"))]
        if not found:
            raise UnsupportedModelError(
                f"{owner} changes nothing in {type(self.anatomy.stack).__name__}: all of its layers see a sliding "
                f"window ({sorted(set(types))}), in which no distance is ever new."
            )
        return found

    @property
    def trained_length(self) -> int:
        """How many tokens the model was trained for, by its config.

        Raises:
            PlanError: If the config does not say.
        """
        return trained_length(self.anatomy)

    def core(self, index: int) -> nn.Module:
        """The module of a layer that computes its attention."""
        return attention_core(self.anatomy.layers[index], self.anatomy.structure)

    def scale(self, index: int, factor: float) -> None:
        """Multiply a layer's attention scores by `factor`.

        Raises:
            UnsupportedModelError: If the layer's attention would ignore it.
        """
        core: Any = self.core(index)
        kind = type(core)
        # A score bias is added behind `scaling`, and is divided too.
        if hasattr(core, "scaling") and "position_bias" not in positional_names(core):
            if kind not in self._heeds_scaling:
                self._heeds_scaling[kind] = self._differs(
                    core, lambda probe, to: to.set(core, "scaling", probe)
                )
            if self._heeds_scaling[kind]:
                self.ledger.set(core, "scaling", core.scaling * factor)
                return
        self.scores(index).scale *= factor

    def scores(self, index: int) -> Scores:
        """What is changed about the scores of a layer, beyond a factor; put on its attention if need be.

        Raises:
            UnsupportedModelError: If the layer's attention would ignore it.
        """
        core = self.core(index)
        found = scores_of(core)
        if found is not None:
            return found
        kind, config = type(core), getattr(core, "config", None)
        found = Scores(config, self.anatomy.causal)
        if kind not in self._calls_function:
            self._calls_function[kind] = hasattr(config, "_attn_implementation") and self._differs(
                core, lambda probe, to: _redirect(core, Scores(config, self.anatomy.causal, probe), to)
            )
        if self._calls_function[kind]:
            _redirect(core, found, self.ledger)
        elif self.call is not None and computes_scores_itself(
            core, self.call[0], for_attention(self.call[1], core)
        ):
            self.ledger.set(core, SCORES, found)
            self.ledger.set_forward(core, ScoredAttention(core, found).forward)
        else:
            raise UnsupportedModelError(
                f"{kind.__name__} ignores changes to its attention scores: it neither reads its attribute `scaling` "
                "nor calls transformers' attention functions, and it is none of those whose own computation is known. "
                f"{type(self.anatomy.stack).__name__} was left as it was."
            )
        return found

    def claim_positions(self, owner: str) -> None:
        """Say that a method changes positions, which only one may.

        Raises:
            PlanError: If another one does.
        """
        if self._positions_of is not None:
            raise PlanError(
                f"{self._positions_of} and {owner} both change positions, and a model has one set of them. Use one."
            )
        self._positions_of = owner

    def heeds_positions(self, index: int) -> bool:
        """Whether a layer turns its queries and keys by the position embeddings that it gets."""
        core = self.core(index)
        found = self._call_of(core)
        if found is None or found[1].get("position_embeddings") is None:
            return False
        hidden, kwargs = found
        given = kwargs["position_embeddings"]
        still = (torch.ones_like(given[0]), torch.zeros_like(given[1]))
        with torch.no_grad(), in_eval_mode(core):
            outputs = [core(hidden, **{**kwargs, "position_embeddings": p})[0] for p in (given, still)]
        return not torch.equal(*outputs)

    def queries_and_keys(
        self, index: int, position_embeddings: tuple[Tensor, Tensor], position_ids: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """What a layer's attention function gets for a short call at the given positions.

        Args:
            index: The layer.
            position_embeddings: Cosines and sines `[1, 8, rotary_dim]`.
            position_ids: Those of the tokens, int64 `[1, 8]`.

        Returns:
            Queries and keys `[8, heads, head_dim]`; None if the layer calls no attention function.
        """
        core = self.core(index)
        found, config = self._call_of(core), own_config(core)
        if found is None or not hasattr(config, "_attn_implementation"):
            return None
        hidden, kwargs = found
        at = {"position_embeddings": position_embeddings, "position_ids": position_ids}
        given = {**kwargs, **{name: value for name, value in at.items() if name in kwargs}}
        trial = type(self.ledger)()
        try:
            _redirect(core, Scores(config, self.anatomy.causal, extension=_Listening()), trial)
            with torch.no_grad(), in_eval_mode(core):
                core(hidden, **given)
        except _HeardError as heard:
            return heard.query, heard.key.flatten(0, 1)
        finally:
            trial.undo()
        return None

    def read_texts(self, *bounds: float) -> None:
        """Let changes know, in every forward pass, where the texts lie.

        Args:
            bounds: Lengths behind which a change does something once, such as turning what is cached or saying that
                a text is too long. It may ask there how long texts are; in steps that are replayed it may not.
        """
        self.bounds.update(bounds)
        if not self.reads_texts:
            reader = TextReader(positional_names(self.anatomy.stack))
            reader.had = self.ledger.set_forward(self.anatomy.stack, reader)
            self.reads_texts = True

    def _call_of(self, core: nn.Module) -> tuple[Tensor, dict[str, Any]] | None:
        """The short call for an attention module, where its weights are; None if they are not in memory."""
        device = next((p.device for p in core.parameters()), None)
        if self.call is None or device is None or device.type == "meta":
            return None
        hidden, kwargs = self.call[0].to(device), for_attention(self.call[1], core)
        if "mask" in positional_names(core):
            # T5's name for it.
            kwargs["mask"] = kwargs.pop("attention_mask", None)
        return hidden, {name: _on(value, device) for name, value in kwargs.items()}

    def _differs(self, core: nn.Module, change: Callable[[float, Ledger], None]) -> bool:
        """Whether a change with one probe gives another result than with the other."""
        found = self._call_of(core)
        if found is None:
            raise UnsupportedModelError(
                f"Whether {type(core).__name__} heeds a change of its attention scores is checked on eight tokens, "
                "and its weights are not in memory. Load the model without offloading to use attention transforms."
            )
        hidden, kwargs = found
        outputs = []
        for probe in _PROBES:
            trial = type(self.ledger)()
            try:
                change(probe, trial)
                with torch.no_grad(), in_eval_mode(core):
                    output = core(hidden, **kwargs)
            finally:
                trial.undo()
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return not torch.equal(*outputs)


class _HeardError(Exception):
    """Carries what an attention function gets out of the module that calls it."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        super().__init__()
        self.query, self.key = query, key


class _Listening:
    """Stands in for an extension and attends to nothing: it only hands on what it got."""

    def applies(self, texts: Texts) -> bool:
        """Always."""
        return True

    def attend(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Never returns."""
        raise _HeardError(query, key)


def _on(value: Any, device: torch.device) -> Any:
    """Tensors, and those in a tuple, on a device."""
    if isinstance(value, tuple):
        return tuple(_on(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _redirect(core: nn.Module, scores: Scores, ledger: Ledger) -> None:
    """Let a module call the attention function that heeds `scores`."""
    ledger.set(core, SCORES, scores)
    ledger.set(core, "config", scores.redirected())


def trained_length(anatomy: Anatomy) -> int:
    """How many tokens a model was trained for, by its config; padding offsets of its position table are no tokens.

    Raises:
        PlanError: If the config does not say.
    """
    config = anatomy.stack.config
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(length, int):
        raise PlanError(
            f"The config of {type(anatomy.stack).__name__} has no max_position_embeddings, so the length that the "
            "model was trained for is not known. Pass trained_length=..."
        )
    return length - position_offset(anatomy)


def position_offset(anatomy: Anatomy) -> int:
    """The row of the position table that belongs to the first token: behind the padding row where there is one."""
    embeddings = getattr(anatomy.stack, "embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def checked_length(owner: str, name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no number of tokens.

    Raises:
        PlanError: If `value` is not a whole number from `least` up.
    """
    if not is_whole(value, least):
        raise PlanError(f"{owner}({name}=...) takes a whole number from {least} up, got {value!r}.")

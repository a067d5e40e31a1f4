"""Where a model keeps its parts: one table row per layer structure, never one function per model family."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from slimformer.errors import UnsupportedModelError
from slimformer.model.layer_parts import Structure
from slimformer.model.structures import BY_MODULES, fitting_structures
from slimformer.model.unfit_models import no_model_in, refuse_compiled


@dataclass(frozen=True)
class Anatomy:
    """A model's layer stack and how to read it.

    Attributes:
        stack: The module whose `forward` loops over the layers (for a vision-language model, its text decoder).
        layers: The layers, in order. One that a forward pass calls several times stands there for every call, once
            `slimformer.calls.layer_calls.layers_by_depth` has seen in which order they come.
        structure: The row of the table that the layers match.
        layer_types: The cache and mask type of every layer, such as `"full_attention"`.
        unknown: Why no row of the table describes the layers, in words; empty where one does.
        caches: Whether the stack was seen to keep a key-value cache; None where attributes of the layers tell.
        reads_padding: Whether what stands at padding was seen to change what layers give for text.
        fitting: The rows that the names of the layers' parts fit; `structure` is one of them.
        repeats: Whether the stack calls layers several times in one forward pass, or may.
    """

    stack: PreTrainedModel
    layers: nn.ModuleList
    structure: Structure
    layer_types: tuple[str, ...]
    unknown: str = ""
    caches: bool | None = None
    reads_padding: bool = False
    fitting: tuple[Structure, ...] = ()
    repeats: bool = False

    @property
    def causal(self) -> bool:
        """Whether tokens see only the past, so that a key-value cache exists."""
        if self.caches is not None:
            return self.caches
        # Linear attentions, which a stack may begin with, do not say so.
        cores = (attention_core(layer, self.structure) for layer in self.layers)
        return any(bool(getattr(core, "is_causal", False)) for core in cores) or bool(
            getattr(self.stack.config, "is_decoder", False)
        )

    def by_modules(self, why: str) -> Anatomy:
        """The same layers, without what the table says of them.

        Args:
            why: What is wrong with it, in words.
        """
        return dataclasses.replace(self, structure=BY_MODULES, unknown=why)

    def describe(self) -> str:
        """One line for people."""
        return f"{type(self.stack).__name__}: {len(self.layers)} layers, {self.structure.name}"


def attention_core(layer: nn.Module, structure: Structure) -> nn.Module:
    """The module of a layer that calls the attention function and knows its `layer_idx`."""
    if structure is BY_MODULES:
        found = [m for _, m in layer.named_modules() if m is not layer and _attends(m)]
        return found[0] if found else layer
    module = structure.attention.of(layer)
    for inner in ("self", "attn", "SelfAttention"):
        if isinstance(getattr(module, inner, None), nn.Module):
            return getattr(module, inner)
    return module


def first_calls(anatomy: Anatomy) -> list[int]:
    """For every entry of the layers, the first that is the same layer: itself, unless that is called several times."""
    places: dict[int, int] = {}
    return [places.setdefault(id(layer), index) for index, layer in enumerate(anatomy.layers)]


def _attends(module: nn.Module) -> bool:
    """Whether a module looks like one that computes attention scores."""
    names = (
        "scaling",
        "scale",
        "softmax_scale",
        "attention_head_size",
        "head_dim",
        "is_causal",
        "key_value_proj_dim",
    )
    return any(name in vars(module) for name in names) and any(p.dim() == 2 for p in module.parameters())


def transformer_of(model: Any) -> Any:
    """The transformers model inside a SentenceTransformer, a CrossEncoder, a Pipeline or a PEFT model; any other
    object as it is.

    Raises:
        UnsupportedModelError: If it was compiled, or a sentence-transformers model runs on another backend than torch.
    """
    if isinstance(model, PreTrainedModel):
        return model
    refuse_compiled(model)
    # A Pipeline's .model, a PEFT model's .base_model.model, a SentenceTransformer's first module's .model
    # (.auto_model before version 6), a CrossEncoder's .model before version 6.
    if not isinstance(model, nn.Module):
        return getattr(model, "model", model)
    base = getattr(model, "get_base_model", None)
    if callable(base):
        return transformer_of(base())
    backend = getattr(model, "backend", "torch")
    if isinstance(backend, str) and backend != "torch":
        raise UnsupportedModelError(
            f"This {type(model).__name__} runs on the backend {backend!r}, which does not call the layers that are "
            "patched. Load it with backend='torch'."
        )
    first = next(iter(model.children()), None) if isinstance(model, nn.Sequential) else model
    for name in ("auto_model", "model"):
        inner = getattr(first, name, None)
        if isinstance(inner, PreTrainedModel):
            return inner
        refuse_compiled(inner)
    return model


def find_anatomy(model: Any) -> Anatomy:
    """Find the layer stack of a model and the structure of its layers.

    Raises:
        UnsupportedModelError: If it has no list of layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> find_anatomy(LlamaForCausalLM(config)).describe()
        'LlamaModel: 2 layers, pre-norm'
    """
    model = transformer_of(model)
    if not isinstance(model, PreTrainedModel):
        raise no_model_in(model)
    if "decoder_input_ids" in inspect.signature(type(model).forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model. Supported are decoders and encoders on their own; "
            "pass the encoder (`model.get_encoder()`) if that is what you use."
        )
    root = _text_stack(model)
    lists = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(True for _ in module[0].parameters())
    ]
    grouped = _grouped(root, lists)
    if grouped is not None:
        return grouped
    fitting = [
        (name, module) for name, module in lists if len(module) == layer_count(_owner(root, name).config)
    ]
    # First those of the right length: CANINE has one like them before and behind its layers.
    for name, module in (*fitting, *lists):
        structures = fitting_structures(module)
        if structures:
            return _anatomy(root, name, module, structures)
    if not fitting and len(lists) == 1:
        # Such as one layer that is called once for every layer of the config.
        return _repeating(root, *lists[0])
    if not fitting:
        seen = "; ".join(f"{name} with {len(module)} entries" for name, module in lists[:3]) or "none"
        count = layer_count(root.config)
        raise UnsupportedModelError(
            f"No list of modules in {type(model).__name__} has as many entries as its config says layers "
            f"({'not said' if count is None else count}): "
            "layers that are called several times, or lie in groups, are none that can be left out one by one. Found: "
            f"{seen}. The model was left as it was."
        )
    # Beside the layers there may be lists of as many small parts.
    name, module = max(fitting, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    children = ", ".join(sorted(child for child, _ in module[0].named_children()))
    why = f"no row of the structure table has the parts of {type(module[0]).__name__}: {children or 'none'}"
    return _anatomy(root, name, module, (BY_MODULES,), why)


def _owner(root: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model that a module is in: its config speaks of it."""
    while name:
        name = name.rpartition(".")[0]
        module = root.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            return module
    return root


def _grouped(root: PreTrainedModel, lists: list[tuple[str, nn.ModuleList]]) -> Anatomy | None:
    """The layers of a stack that lists groups of layers, as ALBERT's; None where no list is one of groups."""
    for name, module in lists:
        layers = [layer for entry in module for layer in _within_group(entry)]
        # The blocks of T5 list their sublayers, which are of several classes.
        if all(_within_group(entry) for entry in module) and len({type(layer) for layer in layers}) == 1:
            return _repeating(root, name, nn.ModuleList(layers))
    return None


def _within_group(entry: nn.Module) -> list[nn.Module]:
    """The layers of an entry that consists of nothing else; none if it does not."""
    inner = [child for child in entry.children() if any(True for _ in child.parameters())]
    own = any(True for _ in entry.parameters(recurse=False))
    if (
        isinstance(entry, nn.ModuleList)
        or own
        or not inner
        or not all(isinstance(c, nn.ModuleList) for c in inner)
    ):
        return []
    return [layer for child in inner for layer in child.children()]


def _repeating(root: PreTrainedModel, name: str, layers: nn.ModuleList) -> Anatomy:
    why = f"its layers, {type(layers[0]).__name__}, are called by way of groups"
    return dataclasses.replace(_anatomy(root, name, layers, (BY_MODULES,), why), repeats=True)


def layer_count(config: Any) -> int | None:
    """How many layers a config says there are."""
    found = (getattr(config, name, None) for name in ("num_hidden_layers", "num_layers"))
    return next((count for count in found if isinstance(count, int)), None)


def _anatomy(
    root: PreTrainedModel, name: str, layers: nn.ModuleList, fitting: tuple[Structure, ...], unknown: str = ""
) -> Anatomy:
    parent = root.get_submodule(name.rpartition(".")[0])
    stack = parent if isinstance(parent, PreTrainedModel) else root
    return Anatomy(stack, layers, fitting[0], _layer_types(stack, len(layers)), unknown, fitting=fitting)


@contextlib.contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Every part of a module in evaluation mode, for the length of a `with` block."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def positional_names(layer: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of a layer's own forward, without `self`."""
    code = type(layer).forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    # A subclass that takes *args names nothing; every layer's first argument is the residual.
    return code.__code__.co_varnames[1 : code.__code__.co_argcount] or ("hidden_states",)


def named_arguments(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by the names of `positional_names`; what is behind the last name is left out."""
    # torch.compile of torch 2.9 cannot trace dict(zip(...)).
    return {**{name: args[i] for i, name in enumerate(names[: len(args)])}, **kwargs}


def _text_stack(model: PreTrainedModel) -> PreTrainedModel:
    # get_decoder finds the text decoder of vision-language models and returns the base model elsewhere.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def _layer_types(stack: PreTrainedModel, count: int) -> tuple[str, ...]:
    types = getattr(stack.config, "layer_types", None)
    if types is not None:
        return tuple(types[:count])
    sliding = getattr(stack.config, "sliding_window", None) is not None
    return ("sliding_attention" if sliding else "full_attention",) * count

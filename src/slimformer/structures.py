"""How layers are built: one table row per structure, never one function per model family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, Kind] = ("attention", "mlp")


@dataclass(frozen=True)
class Parts:
    """Attribute names, inside a layer, of what one sublayer consists of.

    A sublayer adds `multiplier * dropout(norm_after(module(norm_before(x))))` to the residual stream `x`. With
    `outer_norm` it is a post-norm sublayer: `outer_norm(x + module(x))`. With `projection` the module needs a second
    call that takes the residual itself, as BERT's `output(intermediate(x), x)`; with `whole` the module does all of it,
    as BERT's `attention(x)`.

    Attributes:
        module: The module that does the work.
        others: What layers of the same stack may have in its place, such as a linear attention.
        then: Modules behind it, each on the output of the one before, where the layer itself holds an MLP's parts.
        beside: Modules that some layers have too; they read the same input and what they put out is added.
        norm_before: The norm in front.
        norm_after: The norm behind the module.
        dropout: What follows that.
        outer_norm: The norm of the sum with the residual.
        projection: The module that takes the residual too.
        whole: Whether the module adds to the residual itself.
        inner_norm: The norm within such a module, in front of the heads.
        multiplier: A number on the layer with which the result is multiplied.
    """

    module: str
    others: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    norm_before: str | None = None
    norm_after: str | None = None
    dropout: str | None = None
    outer_norm: str | None = None
    projection: str | None = None
    whole: bool = False
    inner_norm: str | None = None
    multiplier: str | None = None

    def children(self) -> set[str]:
        """Names of the layer's children that may belong to this sublayer."""
        return self._always() | {self.module, *self.others, *self.beside}

    def children_of(self, layer: nn.Module) -> set[str]:
        """Those that `layer` has."""
        return {name for name in self.children() if layer._modules.get(name) is not None}

    def of(self, layer: nn.Module) -> nn.Module:
        """The module that does the work in `layer`."""
        modules = layer._modules
        for name in (self.module, *self.others):
            found = modules.get(name)
            if found is not None:
                return found
        return layer.get_submodule(self.module)

    def name_in(self, layer: nn.Module) -> str:
        """Its name there."""
        return next(
            (name for name in (self.module, *self.others) if layer._modules.get(name) is not None),
            self.module,
        )

    def by_token(self, layer: nn.Module, h: Tensor) -> Tensor:
        """What the modules of an MLP make of `h` `[batch, tokens, hidden]`."""
        output = self.of(layer)(h)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        for name in self.then:
            y = first_of(layer.get_submodule(name)(y))
        for name in self.beside:
            module = layer._modules.get(name)
            if module is not None:
                y = y + first_of(module(h))
        # Some experts put out all tokens of the batch behind each other.
        return y if self.projection is not None or y.shape[-1] != h.shape[-1] else y.view(h.shape)

    def alone(self, layer: nn.Module) -> bool:
        """Whether one module of `layer` does all the work."""
        return not self.then and not any(layer._modules.get(name) is not None for name in self.beside)

    def scaled(self, layer: nn.Module, y: Tensor) -> Tensor:
        """What is added to the residual, of what the modules gave."""
        return y if self.multiplier is None else y * getattr(layer, self.multiplier)

    @property
    def post_norm(self) -> bool:
        """Whether the sublayer's result is the residual itself, and not what is added to it."""
        return self.outer_norm is not None or self.projection is not None or self.whole

    @property
    def adds_as_it_is(self) -> bool:
        """Whether what the module gives is added to the residual without anything behind it."""
        return self.norm_after is None and self.multiplier is None and not self.post_norm

    def fits(self, children: set[str]) -> bool:
        """Whether a layer with these children has all that the sublayer needs."""
        workers = children.intersection((self.module, *self.others))
        return len(workers) == 1 and self._always() <= children

    def _always(self) -> set[str]:
        names = (
            self.norm_before,
            self.norm_after,
            self.dropout,
            self.outer_norm,
            self.projection,
            *self.then,
        )
        return {name for name in names if name is not None}


@dataclass(frozen=True)
class PerLayerInput:
    """What some layers add behind their MLP, from an input that every token has for every layer (Gemma 3n and 4).

    Attribute names, inside the layer: `x + norm(projection(activation(gate(x)) * input))`.

    Attributes:
        gate: The layer that makes a gate of the residual.
        activation: The activation of the gate.
        projection: The layer back to the residual's size.
        norm: The norm behind it.
        argument: The layer's argument that holds the inputs, `[batch, tokens, size]`.
    """

    gate: str
    activation: str
    projection: str
    norm: str
    argument: str

    def children(self) -> set[str]:
        """Names of the layer's children that belong to it."""
        return {self.gate, self.activation, self.projection, self.norm}

    def added(self, layer: nn.Module, x: Tensor, kwargs: Mapping[str, Any], token: Tensor | None) -> Tensor:
        """The residual `x` `[..., hidden]` behind it.

        Args:
            layer: The layer.
            x: Rows of the residual, or all of it.
            kwargs: The layer's arguments.
            token: Which of the `batch * tokens` tokens the rows are, int64; None for all in order.
        """
        given = kwargs[self.argument].flatten(0, 1)
        given = given if token is None else given.index_select(0, token)
        gate, activation, projection, norm = (
            layer.get_submodule(name) for name in (self.gate, self.activation, self.projection, self.norm)
        )
        gated = activation(gate(x)) * given.view(*x.shape[:-1], -1)
        behind: Tensor = x + norm(projection(gated))
        return behind


@dataclass(frozen=True)
class Structure:
    """One row of the structure table: how the layers of some families are built.

    With `apart` False nothing is known of the arithmetic, so that no sublayer can be computed for chosen rows:
    attention transforms apply, token policies do not.
    """

    name: str
    attention: Parts
    mlp: Parts
    parallel: bool = False
    apart: bool = True
    per_layer_input: PerLayerInput | None = None
    scalar: str | None = None
    examples: str = ""

    def parts(self, kind: Kind) -> Parts:
        """The parts of one of the two sublayers."""
        return self.attention if kind == "attention" else self.mlp

    def is_parallel(self, layer: nn.Module) -> bool:
        """Whether attention and MLP of `layer` read the same residual. GPT-NeoX decides it per checkpoint."""
        return bool(getattr(layer, "use_parallel_residual", self.parallel))

    def fits(self, children: set[str]) -> bool:
        """Whether a layer with these children, and no other, may be built like this."""
        known = self.attention.children() | self.mlp.children()
        if self.per_layer_input is not None:
            own = self.per_layer_input.children()
            if not own <= children:
                return False
            known |= own
        return children <= known and self.attention.fits(children) and self.mlp.fits(children)

    def heads_input(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What queries, keys and values are made of, of the residual `x` `[..., hidden]`."""
        parts = self.attention
        if parts.inner_norm is not None:
            return first_of(parts.of(layer).get_submodule(parts.inner_norm)(x))
        return x if parts.norm_before is None else first_of(layer.get_submodule(parts.norm_before)(x))

    def finished(
        self, layer: nn.Module, x: Tensor, kwargs: Mapping[str, Any], token: Tensor | None = None
    ) -> Tensor:
        """What leaves the layer, of the residual `x` behind both sublayers; arguments as in `PerLayerInput.added`."""
        if self.per_layer_input is not None:
            x = self.per_layer_input.added(layer, x, kwargs, token)
        return x if self.scalar is None else x * getattr(layer, self.scalar)


STRUCTURES: tuple[Structure, ...] = (
    Structure(
        "pre-norm",
        Parts("self_attn", norm_before="input_layernorm"),
        Parts("mlp", norm_before="post_attention_layernorm"),
        examples="Llama, Mistral, Qwen2, Qwen3, Mixtral, LLaVA's and Qwen2-VL's decoders",
    ),
    Structure(
        "pre-norm, multiplied",
        Parts("self_attn", norm_before="input_layernorm", multiplier="residual_multiplier"),
        Parts("mlp", norm_before="post_attention_layernorm", multiplier="residual_multiplier"),
        examples="Granite",
    ),
    Structure(
        "pre-norm, token mixers",
        Parts("self_attn", others=("linear_attn", "mamba"), norm_before="input_layernorm"),
        Parts("mlp", norm_before="post_attention_layernorm"),
        examples="Qwen3-Next, Qwen3.5",
    ),
    Structure(
        "pre-norm, token mixers and experts, multiplied",
        Parts(
            "self_attn", others=("mamba",), norm_before="input_layernorm", multiplier="residual_multiplier"
        ),
        Parts(
            "shared_mlp",
            beside=("block_sparse_moe",),
            norm_before="post_attention_layernorm",
            multiplier="residual_multiplier",
        ),
        examples="Granite 4, GraniteMoeShared",
    ),
    Structure(
        "pre-norm, experts, multiplied",
        Parts("self_attn", norm_before="input_layernorm", multiplier="residual_multiplier"),
        Parts("block_sparse_moe", norm_before="post_attention_layernorm", multiplier="residual_multiplier"),
        examples="GraniteMoe",
    ),
    Structure(
        "pre-norm, feed-forward",
        Parts("self_attn", norm_before="input_layernorm"),
        Parts("feed_forward", norm_before="post_attention_layernorm"),
        examples="Llama 4",
    ),
    Structure(
        "pre-norm, token mixers, feed-forward",
        Parts("self_attn", others=("mamba",), norm_before="input_layernorm"),
        Parts("feed_forward", norm_before="pre_ff_layernorm"),
        examples="Jamba, Bamba",
    ),
    Structure(
        "operator norms",
        Parts("self_attn", others=("conv",), norm_before="operator_norm"),
        Parts("feed_forward", norm_before="ffn_norm"),
        examples="LFM2",
    ),
    Structure(
        "pre-norm with dropout",
        Parts("self_attn", norm_before="input_layernorm", dropout="resid_attn_dropout"),
        Parts("mlp", norm_before="post_attention_layernorm", dropout="resid_mlp_dropout"),
        examples="Phi-3",
    ),
    Structure(
        "pre-norm with one dropout",
        Parts("self_attn", norm_before="input_layernorm"),
        Parts("mlp", norm_before="post_attention_layernorm", dropout="dropout"),
        examples="StableLM, Persimmon",
    ),
    Structure(
        "pre-norm, numbered norms",
        Parts("self_attn", norm_before="layer_norm1"),
        Parts("mlp", norm_before="layer_norm2"),
        examples="CLIP's and SigLIP's text encoders",
    ),
    Structure(
        "pre-norm, named norms",
        Parts("self_attn", norm_before="attention_layernorm"),
        Parts("mlp", norm_before="feedforward_layernorm"),
        examples="Apertus",
    ),
    Structure(
        "pre-norm, feed-forward norm",
        Parts("self_attn", norm_before="input_layernorm"),
        Parts("mlp", norm_before="pre_feedforward_layernorm"),
        examples="VaultGemma",
    ),
    Structure(
        "pre-norm, the MLP's parts in the layer",
        Parts("self_attn", norm_before="self_attn_layer_norm"),
        Parts("fc1", then=("activation_fn", "fc2"), norm_before="final_layer_norm"),
        examples="OPT, BioGPT, XGLM, MBart's encoder",
    ),
    Structure(
        "post-norm, the MLP's parts in the layer",
        Parts("self_attn", outer_norm="self_attn_layer_norm"),
        Parts("fc1", then=("activation_fn", "fc2"), outer_norm="final_layer_norm"),
        examples="BART's encoder",
    ),
    Structure(
        "sandwich norms",
        Parts("self_attn", norm_before="input_layernorm", norm_after="post_attention_layernorm"),
        Parts("mlp", norm_before="pre_feedforward_layernorm", norm_after="post_feedforward_layernorm"),
        examples="Gemma 2, Gemma 3",
    ),
    Structure(
        "sandwich norms, scaled",
        Parts("self_attn", norm_before="input_layernorm", norm_after="post_attention_layernorm"),
        Parts("mlp", norm_before="pre_feedforward_layernorm", norm_after="post_feedforward_layernorm"),
        scalar="layer_scalar",
        examples="Gemma 4",
    ),
    Structure(
        "sandwich norms, per-layer inputs, scaled",
        Parts("self_attn", norm_before="input_layernorm", norm_after="post_attention_layernorm"),
        Parts("mlp", norm_before="pre_feedforward_layernorm", norm_after="post_feedforward_layernorm"),
        per_layer_input=PerLayerInput(
            "per_layer_input_gate",
            "act_fn",
            "per_layer_projection",
            "post_per_layer_input_norm",
            "per_layer_input",
        ),
        scalar="layer_scalar",
        examples="Gemma 4 E2B, E4B",
    ),
    Structure(
        "sandwich norms, named after the MLP",
        Parts("self_attn", norm_before="input_layernorm", norm_after="post_attention_layernorm"),
        Parts("mlp", norm_before="pre_mlp_layernorm", norm_after="post_mlp_layernorm"),
        examples="AFMoE",
    ),
    Structure(
        "sandwich norms, named after the sublayers",
        Parts("self_attn", norm_before="input_layernorm", norm_after="post_self_attn_layernorm"),
        Parts("mlp", norm_before="post_attention_layernorm", norm_after="post_mlp_layernorm"),
        examples="GLM-4",
    ),
    Structure(
        "sandwich norms, numbered",
        Parts(
            "self_attn",
            norm_before="input_layernorm",
            norm_after="post_norm1",
            multiplier="residual_multiplier",
        ),
        Parts(
            "mlp",
            norm_before="post_attention_layernorm",
            norm_after="post_norm2",
            multiplier="residual_multiplier",
        ),
        examples="HyperCLOVA X",
    ),
    Structure(
        "norms after",
        Parts("self_attn", norm_after="post_attention_layernorm"),
        Parts("mlp", norm_after="post_feedforward_layernorm"),
        examples="OLMo 2",
    ),
    Structure("GPT-2", Parts("attn", norm_before="ln_1"), Parts("mlp", norm_before="ln_2"), examples="GPT-2"),
    Structure(
        "parallel, two norms",
        Parts("attention", norm_before="input_layernorm", dropout="post_attention_dropout"),
        Parts("mlp", norm_before="post_attention_layernorm", dropout="post_mlp_dropout"),
        parallel=True,
        examples="GPT-NeoX, Pythia",
    ),
    Structure(
        "parallel, one norm",
        Parts("self_attn", norm_before="input_layernorm", dropout="resid_dropout"),
        Parts("mlp", norm_before="input_layernorm", dropout="resid_dropout"),
        parallel=True,
        examples="Phi",
    ),
    Structure(
        "parallel, one norm and one dropout",
        Parts("self_attn", norm_before="input_layernorm"),
        Parts("mlp", norm_before="input_layernorm", dropout="dropout"),
        parallel=True,
        examples="StableLM 2 12B",
    ),
    Structure(
        "parallel, one norm, no dropout",
        Parts("self_attn", norm_before="input_layernorm"),
        Parts("mlp", norm_before="input_layernorm"),
        parallel=True,
        examples="Cohere",
    ),
    Structure(
        "parallel, GPT-J",
        Parts("attn", norm_before="ln_1"),
        Parts("mlp", norm_before="ln_1"),
        parallel=True,
        examples="GPT-J, CodeGen",
    ),
    Structure(
        "parallel, Falcon",
        Parts("self_attention", norm_before="input_layernorm"),
        Parts("mlp", norm_before="input_layernorm"),
        parallel=True,
        examples="Falcon 7B",
    ),
    Structure(
        "parallel, Falcon with two norms",
        Parts("self_attention", norm_before="ln_attn"),
        Parts("mlp", norm_before="ln_mlp"),
        parallel=True,
        examples="Falcon 40B",
    ),
    Structure(
        "pre-norm, Falcon",
        Parts("self_attention", norm_before="input_layernorm"),
        Parts("mlp", norm_before="post_attention_layernorm"),
        examples="Falcon RW, JetMoe",
    ),
    Structure(
        "post-norm",
        Parts("attention", whole=True),
        Parts("intermediate", projection="output"),
        examples="BERT, RoBERTa, MPNet",
    ),
    Structure(
        "pre-norm, BERT",
        Parts("attention", whole=True, inner_norm="LayerNorm"),
        Parts("intermediate", norm_before="LayerNorm", projection="output"),
        examples="ESM",
    ),
    Structure(
        "pre-norm, large XLM-RoBERTa",
        Parts("attention", whole=True, inner_norm="self_attn_layer_norm"),
        Parts("intermediate", norm_before="LayerNorm", projection="output"),
        examples="XLM-RoBERTa-XL",
    ),
    Structure(
        "pre-norm, norms inside",
        Parts("attention", whole=True, inner_norm="LayerNorm"),
        Parts("intermediate", projection="output"),
        examples="RoBERTa-PreLayerNorm",
    ),
    Structure(
        "pre-norm, Megatron's BERT",
        Parts("attention", whole=True, inner_norm="ln"),
        Parts("intermediate", norm_before="ln", projection="output"),
        examples="MegatronBert",
    ),
    Structure(
        "post-norm, norms outside",
        Parts("attention", outer_norm="sa_layer_norm"),
        Parts("ffn", outer_norm="output_layer_norm"),
        examples="DistilBERT",
    ),
    Structure(
        "post-norm with dropout, norms outside",
        Parts("self_attn", dropout="post_attention_dropout", outer_norm="post_attention_layernorm"),
        Parts("mlp", dropout="post_mlp_dropout", outer_norm="post_mlp_layernorm"),
        examples="NomicBERT, GTE, Jina v3",
    ),
    Structure(
        "pre-norm encoder",
        Parts("attn", norm_before="attn_norm"),
        Parts("mlp", norm_before="mlp_norm"),
        examples="ModernBERT",
    ),
    Structure(
        "RMS norms by number",
        Parts("attention", norm_before="rms_norm1"),
        Parts("ffn", norm_before="rms_norm2"),
        examples="AIMv2's text encoder",
    ),
)

# Of layers that no row describes: what they compute is theirs, and only modules and whole layers can be left out.
BY_MODULES = Structure("by its modules", Parts(""), Parts(""), apart=False)


def fitting_structures(layers: Iterable[nn.Module]) -> tuple[Structure, ...]:
    """The rows after which all of some layers may be built, by the names of their children.

    An extra child means something that a row does not describe, so that it must not fit. More than one can, since the
    same names are put together in different ways: which one it is shows when a layer runs.
    """
    found = STRUCTURES
    for children in {frozenset(name for name, _ in layer.named_children()) for layer in layers}:
        found = tuple(structure for structure in found if structure.fits(set(children)))
    return found


# What holds several results of a module; OpenAI GPT's return lists.
SEVERAL = (tuple, list)


def first_of(output: Any) -> Tensor:
    """The vectors in what a module returned, which may be a tuple or a list that begins with them."""
    found: Tensor = output[0] if isinstance(output, SEVERAL) and output else output
    return found

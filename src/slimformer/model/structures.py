"""How layers are built: one table row per structure, never one function per model family."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from slimformer.model.layer_parts import Parts, PerLayerInput, Structure

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
        Parts("attention", whole=True, end_norm="LayerNorm"),
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

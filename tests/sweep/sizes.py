"""How small a model is: what common attributes of configs become, and what single families need beside that."""

from __future__ import annotations

from typing import Any

# The vocabulary holds the special tokens that configs name by default, where those are small.
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "d_model": 32, "n_embd": 32, "emb_dim": 32, "dim": 32, "embedding_dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48,
    "hidden_dim": 48, "dff": 48, "dim_ff": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_inner": 48,
    "ffn_hidden_size": 48, "expert_ffn_hidden_size": 48, "intermediate_size_mlp": 48, "dense_intermediate_size": 48,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24, "shared_experts_intermediate_size": 24,
    "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4, "encoder_layers": 4, "decoder_layers": 1,
    "num_encoder_layers": 4, "num_decoder_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2,
    "head_dim": 8, "d_kv": 8, "d_head": 8, "dim_head": 8, "kv_channels": 8, "attention_head_dim": 8,
    "attention_head_size": 8, "global_head_dim": 16, "swa_head_dim": 8, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "num_global_key_value_heads": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "context_length": 128,
    "max_encoder_position_embeddings": 128, "max_sequence_length": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1,
    "n_group": 2, "topk_group": 1, "zero_expert_num": 2, "first_k_dense_replace": 1, "top_k_experts": 2,
    "sliding_window": 8, "local_attention": 12, "window_size": 8, "attention_window_size": 8,
    "attention_chunk_size": 8, "original_max_position_embeddings": 8, "floor_scale": 4,
    "query_pre_attn_scalar": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_d_ssm": 64,
    "mamba_n_groups": 2, "mamba_chunk_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_expand": 2,
    "mamba_dt_rank": 4, "time_step_rank": 4, "mamba_headdim": 8, "mamba_ngroups": 2, "n_mamba_heads": 2,
    "state_size": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
    "o_lora_rank": 16, "unpadded_vocab_size": 128, "rel_extent": 16, "log_scaling_n_floor": 8, "linear_head_dim": 8,
    "router_hidden_size": 16, "moe_hidden_size": 32, "num_hash_buckets": 64, "intra_bottleneck_size": 16,
    "true_hidden_size": 16, "rotary_dim": 4, "max_relative_position": 16, "entity_vocab_size": 16,
    "share_expert_dim": 24,
    "vocab_size_per_layer": 128, "bigram_vocab_size": 16, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8,
    "lru_width": 32, "conv_L_cache": 3,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "laurel_rank": 4,
    "projection_dim": 32, "full_attention_interval": 2, "sliding_window_pattern": 2, "attn_layer_period": 2,
    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "no_rope_layer_interval": 2,
    "layer_group_size": 2, "global_attn_every_n_layers": 2, "num_kv_shared_layers": 0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "cls_token_id": 1,
    "sep_token_id": 2, "is_training": False,
}  # fmt: skip
# Names of the number of layers that lists of one entry a layer go by.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
_MULTIMODAL = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_HALF = {**_MULTIMODAL, "partial_rotary_factor": 0.5}
_TURNS = ["sliding_attention", "full_attention"] * 2
_OWN_HEADS = {"num_key_value_heads": 4}
_T5GEMMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "query_pre_attn_scalar": 4,
    "layer_types": _TURNS,
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "cohere_compass_text": {
        "layer_types": _TURNS,
        "rope_parameters": {"sliding_attention": _MULTIMODAL, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {
        "layer_types": _TURNS,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {
        **_OWN_HEADS,
        "sliding_window": 8,
        "per_layer_config": {
            index: {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "head_dim": 16,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "qk_rope_head_dim": 8,
            }
            for index in (1, 3)
        },
    },
    # Layers at the end attend to the keys and values of earlier ones.
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma4_unified_text": {"global_head_dim": 16},
    "fsmt": {"src_vocab_size": 128},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 128,
        "shape_embed_dim": 8,
        "shape_vocab_size": 128,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1, 1]},
    },
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 100,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "eos_token_id": 2,
    },
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_blocks": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 8, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"vocab_size": 128, "mask_token_id": 5, "pad_token_id": 0, "position_embedding_type": "rotary"},
    "esmc": _OWN_HEADS,
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "mistral4": {**_OWN_HEADS, "head_dim": 16},
    "led": {"attention_window": [8] * 4},
    "longformer": {"attention_window": [8] * 4},
    "t5gemma": {"is_encoder_decoder": False, "encoder": _T5GEMMA, "decoder": _T5GEMMA},
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 24], "rope_parameters": _MULTIMODAL},
    "glm4v_moe_text": {"head_dim": 16, "rope_parameters": _HALF},
    "glm4v_text": {"rope_parameters": _MULTIMODAL},
    "glm5_next_text": {**_OWN_HEADS, "index_kpool": 2, "qk_rope_head_dim": 0},
    "glm_image_text": {"rope_parameters": _MULTIMODAL},
    "glm_ocr_text": {"rope_parameters": _MULTIMODAL},
    "mistral_large4_text": {**_OWN_HEADS, "kv_source_layers": [0, 1, 0, 1]},
    "paddleocr_vl_text": {"rope_parameters": _MULTIMODAL},
    "qwen2_vl_text": {"rope_parameters": _MULTIMODAL},
    "qwen2_5_omni_text": {"rope_parameters": _MULTIMODAL},
    "qwen2_5_vl_text": {"rope_parameters": _MULTIMODAL},
    "step3p5": {"sliding_window": 8, "layer_types": _TURNS, "query_pre_attn_scalar": 4},
}


_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0],
         "original_max_position_embeddings": 8, "partial_rotary_factor": 1.0}  # fmt: skip
# Settings of a class under which it computes something else: the name of the class, and the settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama:bidirectional": ("llama", {"is_causal": False}),
    "llama:yarn": ("llama", {"rope_parameters": _YARN}),
    "llama:biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama:dynamic": ("llama", {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 8,
    }),
    "phi3:long": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 8}),
    "qwen2:sliding": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "gemma2:capped": ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}),
    "gemma3_text:bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text:experts": ("gemma4_text", {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24,
    }),
    "falcon:alibi": ("falcon", {"alibi": True}),
    "falcon:two norms": ("falcon", {"new_decoder_architecture": True}),
    "gpt_neox:sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2:scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "stablelm:parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "opt:post-norm": ("opt", {"do_layer_norm_before": False}),
    "olmo:clipped": ("olmo", {"clip_qkv": 1.0}),
    "nemotron:biased": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
}  # fmt: skip

"""A tiny random model of every causal language model that transformers knows, from its configuration alone."""

import logging

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS = 4
SIZES = {  # of settings with just this name
    "vocab_size": 400, "num_experts_per_tok": 2, "top_k_experts": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "sliding_window": 8,
    "max_source_positions": 128, "max_target_positions": 128, "num_key_value_heads": 2, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "rotary_dim": 4, "kv_lora_rank": 8, "q_lora_rank": 8,
}  # fmt: skip
ENDINGS = (  # of settings whose name ends so
    (32, "hidden_size", "n_embd", "d_model", "emb_dim", "embed_dim", "n_embed", "word_embed_proj_dim"),
    (LAYERS, "_layers", "n_layer"),
    (64, "ffn_dim", "d_inner", "dff", "dim_ff", "n_inner", "feed_forward_size", "intermediate_size",
     "intermediate_dim"),
    (4, "attention_heads", "n_head", "n_heads", "num_heads", "num_experts", "local_experts", "routed_experts"),
)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BOTH = ["sliding_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
MIXED = ["linear_attention", "hybrid"] * 2
LINEAR = {"linear_head_dim": 8, "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse"] * 2,
          "num_experts_per_token": 2}  # fmt: skip
INDEX = {"index_head_dim": 8, "index_n_heads": 4, "index_topk": 8}
GEMMA = {"layer_types": BOTH, "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 8}
GEMMA4 = {**GEMMA, "per_layer_config": None, "global_head_dim": 8, "num_kv_shared_layers": 0}
INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4,
           "rel_extent": 16, "sliding_window_size": 8, "unpadded_vocab_size": None}  # fmt: skip
INKLING2 = {**INKLING, "unpadded_vocab_size": 400, "n_layers_per_attn_res_block": 1}
OWN = {  # what the rules above cannot know
    "axk2": INDEX,
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bailing_hybrid": {**LINEAR, "num_expert_group": 2, "first_k_dense_replace": 1, "layer_group_size": 2},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_global_transformer": {"encoder_cross_output_size": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"model_type": "", "rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"model_type": "", "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v32": INDEX,
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "layer_types": BOTH},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_k": 2, "moe_layer_end_index": 3},
    "gemma3n_text": {**GEMMA, "num_kv_shared_layers": 2, "intermediate_size": 64, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "glm_moe_dsa": INDEX,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4},
    "inkling_text": INKLING,
    "inkling2_text": INKLING2,
    "inkling2_loop_text": {**INKLING2, "loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2,
                           "loop_gate_rank": 8},
    "kimi_linear": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 4},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 4},
    "qwen4_exp_text": {"ngram_vocab_size_base": 100, "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 2,
                       "ple_embed_dim": 32, "hc_lowrank": 8, "indexer_n_heads": 4, "indexer_kv_heads": 1,
                       "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "reformer": {"is_decoder": True, "attn_layers": ["local"] * LAYERS, "axial_pos_shape": [8, 16],
                 "axial_pos_embds_dim": [16, 16], "local_attn_chunk_length": 4, "attention_head_size": 8},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "mamba_dt_rank": 2,
              "layers_block_type": MIXED},
    "zamba2": {"num_key_value_heads": 4, "attention_hidden_size": 64, "layers_block_type": MIXED, "n_mamba_heads": 8,
               "chunk_size": 4, "mamba_d_state": 8, "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}  # fmt: skip


def build(kind, **changes):
    """A random model of `kind`, fp32, eval mode; `changes` go to its configuration."""
    default = CONFIG_MAPPING[kind]()
    config = CONFIG_MAPPING[kind](**small(default, {**OWN.get(kind, {}), **changes}))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():  # default random weights are too small to tell two paths apart
            if p.ndim >= 2:
                p.mul_(2)
    return model


def small(config, given):
    """The settings of `config` that must shrink, with `given` over them; of nested ones too."""
    latent = "kv_lora_rank" in vars(config)  # latent attention has no shared heads, and turns a part of each
    out = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in given or name in ("transformers_version", "per_layer_config"):
            continue
        if hasattr(value, "to_dict"):
            out[name] = {**small(value, OWN.get(value.model_type, {})), "model_type": value.model_type}
        elif latent and name in ("num_key_value_heads", "head_dim"):
            out[name] = 4
        elif isinstance(value, list) and len(value) > 2 and all(isinstance(v, str) for v in value):
            kinds = list(dict.fromkeys(value))
            out[name] = [kinds[n % len(kinds)] for n in range(LAYERS)]
        elif (size := _size(name, value)) is not None:
            out[name] = size
    return {**out, **{n: v for n, v in given.items() if v is not None or n != "per_layer_config"}}


def _size(name, value):
    if name in SIZES and (value is not None or name.endswith("token_id")):
        return SIZES[name]
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return next((size for size, *ends in ENDINGS if name.endswith(tuple(ends))), None)

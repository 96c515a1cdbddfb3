"""Tiny random bases of the families that transformers has: some layers of each kind, a byte tokenizer, float32, no dropout.

Biases, scales and norms are moved off their neutral values, so that leaving one out is seen in the answers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapterhub_lite.bases import load_tokenizer

VOCABULARY = 300
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
HEADS: dict[str, Any] = {**COMMON, "head_dim": 16}
# name -> (model type, its configuration)
# fmt: off
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**COMMON, "tie_word_embeddings": False}),
    "llama3rope": ("llama", {**COMMON, "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor":
        8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "llama_dynrope": ("llama", {**COMMON, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor":
        4.0, "original_max_position_embeddings": 32}}),
    "qwen2": ("qwen2", {**COMMON, "tie_word_embeddings": True}),
    "qwen2_swa": ("qwen2", {**COMMON, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**HEADS, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    "qwen2_moe": ("qwen2_moe", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 64}),
    "mistral": ("mistral", {**HEADS, "sliding_window": 16}),
    "mixtral": ("mixtral", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gemma": ("gemma", {**HEADS}),
    "gemma2": ("gemma2", {**HEADS, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", {**HEADS, "num_hidden_layers": 3, "sliding_window": 16, "query_pre_attn_scalar":
        16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "gemma3n_text": ("gemma3n_text", {**HEADS, "num_hidden_layers": 4, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention",
        "full_attention"], "sliding_window": 16, "num_kv_shared_layers": 2, "altup_num_inputs": 2, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0]}),
    "gemma4_text": ("gemma4_text", {**HEADS, "num_hidden_layers": 4, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention",
        "full_attention"], "sliding_window": 16, "num_kv_shared_layers": 2}),
    "phi": ("phi", {**COMMON, "num_key_value_heads": 4}),
    "phi3": ("phi3", {**COMMON, "sliding_window": None}),
    "phi3_longrope": ("phi3", {**COMMON, "sliding_window": None, "original_max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.0, 1.0, 1.0, 1.0,
        1.0, 1.0, 1.0], "long_factor": [4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0], "original_max_position_embeddings":
        64}}),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512,
        "initializer_range": 0.15}),
    "gpt_neox": ("gpt_neox", {**COMMON}),
    "gptj": ("gptj", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512,
        "rotary_dim": 8, "initializer_range": 0.15}),
    "gpt_bigcode": ("gpt_bigcode", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions":
        512, "initializer_range": 0.15}),
    "opt": ("opt", {"vocab_size": VOCABULARY, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": 64, "init_std": 0.15}),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range":
        0.15}),
    "falcon": ("falcon", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads":
        4, "initializer_range": 0.15, "max_position_embeddings": 512}),
    "falcon_alibi": ("falcon", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.15, "alibi": True, "new_decoder_architecture": False}),
    "mpt": ("mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
        "initializer_range": 0.15}),
    "stablelm": ("stablelm", {**COMMON}),
    "starcoder2": ("starcoder2", {**COMMON, "sliding_window": None}),
    "olmo2": ("olmo2", {**COMMON}),
    "olmo3": ("olmo3", {**COMMON, "num_hidden_layers": 4, "sliding_window": 16}),
    "olmoe": ("olmoe", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("cohere", {**COMMON}),
    "cohere2": ("cohere2", {**HEADS, "num_hidden_layers": 4, "sliding_window": 16}),
    "granite": ("granite", {**COMMON, "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0,
        "attention_multiplier": 0.25}),
    "granitemoe": ("granitemoe", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0}),
    "granitemoehybrid": ("granitemoehybrid", {**COMMON, "layer_types": ["mamba", "attention"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 64, "mamba_n_heads": 8, "mamba_d_head": 16,
        "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_expand": 2}),
    "deepseek_v3": ("deepseek_v3", {**COMMON, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok":
        2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 1, "n_shared_experts":
        1}),
    "deepseek_v2": ("deepseek_v2", {**COMMON, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok":
        2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 1, "n_shared_experts":
        1}),
    "glm": ("glm", {**HEADS}),
    "glm4": ("glm4", {**HEADS}),
    "glm4_moe": ("glm4_moe", {**HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}),
    "smollm3": ("smollm3", {**COMMON, "num_hidden_layers": 4}),
    "nemotron": ("nemotron", {**COMMON}),
    "seed_oss": ("seed_oss", {**HEADS}),
    "ernie4_5": ("ernie4_5", {**HEADS}),
    "exaone4": ("exaone4", {**COMMON, "num_hidden_layers": 4, "sliding_window": 16, "sliding_window_pattern": 2}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**HEADS}),
    "minimax": ("minimax", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types":
        ["linear_attention", "full_attention"], "block_size": 16}),
    "llama4_text": ("llama4_text", {**HEADS, "num_hidden_layers": 4, "intermediate_size_mlp": 96, "num_local_experts":
        4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 16}),
    "gpt_oss": ("gpt_oss", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"]}),
    "mamba": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8,
        "initializer_range": 0.15}),
    "mamba2": ("mamba2", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16,
        "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16, "initializer_range": 0.15}),
    "falcon_mamba": ("falcon_mamba", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2,
        "state_size": 8, "initializer_range": 0.15}),
    "jamba": ("jamba", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
        "mamba_d_state": 8, "mamba_dt_rank": 8}),
    "bamba": ("bamba", {**COMMON, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state":
        16, "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_expand": 2}),
    "falcon_h1": ("falcon_h1", {**COMMON, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups":
        1, "mamba_d_state": 8, "mamba_chunk_size": 8, "lm_head_multiplier": 0.5}),
    "lfm2": ("lfm2", {**COMMON, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "qwen3_next": ("qwen3_next", {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim":
        16}),
    "qwen3_5_text": ("qwen3_5_text", {**HEADS, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim":
        16}),
    "nemotron_h": ("nemotron_h", {**HEADS, "hybrid_override_pattern": "M*-", "layers_block_type": None}),
    "recurrent_gemma": ("recurrent_gemma", {**COMMON, "num_hidden_layers": 3, "lru_width": 64,
        "attention_window_size": 16}),
    "zamba2": ("zamba2", {**COMMON, "num_hidden_layers": 3, "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim":
        16, "mamba_ngroups": 1, "chunk_size": 16, "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks":
        1, "hybrid_layer_ids": [1]}),
    "rwkv": ("rwkv", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size":
        64, "intermediate_size": 96, "context_length": 512}),
    "xlstm": ("xlstm", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4,
        "chunk_size": 16}),
    "nanochat": ("nanochat", {**COMMON}),
    "apertus": ("apertus", {**COMMON}),
    "arcee": ("arcee", {**COMMON}),
    "dbrx": ("dbrx", {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4,
        "moe_top_k": 2}}),
    "phimoe": ("phimoe", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "diffllama": ("diffllama", {**COMMON}),
    "bitnet": ("bitnet", {**COMMON}),
    "codegen": ("codegen", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512,
        "rotary_dim": 8}),
    "gpt_neo": ("gpt_neo", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
        "max_position_embeddings": 512, "attention_types": [[["global", "local"], 1]], "window_size": 16,
        "initializer_range": 0.15}),
    "persimmon": ("persimmon", {**COMMON, "num_key_value_heads": 4}),
    "helium": ("helium", {**HEADS}),
    "lfm2_moe": ("lfm2_moe", {**COMMON, "layer_types": ["conv", "full_attention"], "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_dense_layers": 1}),
    "vaultgemma": ("vaultgemma", {**HEADS, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "minimax_m2": ("minimax_m2", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v4": ("deepseek_v4", {**HEADS, "num_hidden_layers": 3, "num_key_value_heads": 1, "layer_types":
        ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"], "compress_rates":
        {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "mlp_layer_types": ["hash_moe", "moe",
        "moe"], "sliding_window": 16, "partial_rotary_factor": 0.5, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2,
        "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 48}),
    "kimi_linear": ("kimi_linear", {**COMMON}),
    "ministral3": ("ministral3", {**HEADS}),
}
# fmt: on


def build(name: str, folder: Path, tokenizer: Any) -> Path:
    """Write the tiny base of a family, with the tokenizer, into `folder`, and return it."""
    kind, settings = FAMILIES[name]
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, **special)
    for key, value in vars(config).items():
        if ("drop" in key or "jitter" in key) and isinstance(value, float):
            setattr(config, key, 0.0)  # two trainers draw it differently
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            neutral = parameter.dim() == 1 and bool((parameter == 0).all())
            if neutral or (parameter.dim() == 1 and "norm" in path.lower() and path.endswith("weight")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_base(family: str, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A base with as many rows as its tokenizer, beside it, has tokens, so that every new one lies behind them."""
    more = family == "qwen2"  # transformers gives this family's tokenizer an end of text of its own
    kind, settings = FAMILIES[family]
    own = {"tie_word_embeddings": family != "llama"} if family != "bloom" else {}
    monkeypatch.setitem(FAMILIES, family, (kind, {**settings, **own, "vocab_size": len(tokenizer) + more}))
    base = build(family, folder, tokenizer)
    loaded = load_tokenizer(base)
    assert len(loaded) == len(tokenizer) + more
    return base, loaded

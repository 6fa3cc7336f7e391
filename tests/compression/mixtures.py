"""Tiny random mixtures of experts, one of every kind of layout, router and gating that transformers has."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import byte_tokenizer

SMALL = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32},
    # Biases; transposed, gate and up in turns; clamped.
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    # A dense block, a shared expert, groups of experts, tensors that stay in float32.
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "num_key_value_heads": 2,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def tiny(family, dtype=torch.float32):
    """A model whose experts matter and get different tokens, biases included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | FAMILIES[family])).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6)
        elif "bias" in name or "sinks" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def build(folder, family, dtype=torch.float32, **save_options):
    """Save one, by default as the hub has it."""
    tiny(family, dtype).save_pretrained(folder, **save_options)
    byte_tokenizer().save_pretrained(folder)
    return folder

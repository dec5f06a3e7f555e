"""Tiny random mixtures of experts, one for each layout and way of computing that transformers' families have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_COMMON = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
_SIZED = _COMMON | dict(moe_intermediate_size=48, num_experts_per_tok=2)
_DEEPSEEK = _SIZED | dict(
    n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=0, n_group=1, topk_group=1, kv_lora_rank=32,
    q_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4,
)  # fmt: skip
# Model type -> what differs from the family's own configuration.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": _COMMON | dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _SIZED | dict(num_experts=4, shared_expert_intermediate_size=64),
    "qwen3_moe": _SIZED | dict(num_experts=4, head_dim=16),
    "qwen3_next": _SIZED | dict(
        num_experts=4, head_dim=16, shared_expert_intermediate_size=64, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=32, linear_value_head_dim=32, layer_types=["linear_attention", "full_attention"],
    ),
    "olmoe": _COMMON | dict(num_experts=4, num_experts_per_tok=2),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _SIZED | dict(
        n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=0, n_group=1, topk_group=1, head_dim=16
    ),
    "gpt_oss": _COMMON | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "llama4_text": _SIZED | dict(
        num_local_experts=4, num_experts_per_tok=2, intermediate_size_mlp=96, head_dim=16, interleave_moe_layer_step=1,
        intermediate_size=48,
    ),
    "granitemoe": _COMMON | dict(num_local_experts=4, num_experts_per_tok=2),
    "phimoe": _COMMON | dict(num_local_experts=4, num_experts_per_tok=2),
    "jamba": _COMMON | dict(
        num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=1,
        expert_layer_offset=0, mamba_d_state=8, mamba_dt_rank=16, use_mamba_kernels=False,
    ),
    "dbrx": dict(
        vocab_size=64, d_model=64, n_heads=4, n_layers=2, max_seq_len=64, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=64),
    ),
    "ernie4_5_moe": _SIZED | dict(moe_num_experts=4, moe_k=2, moe_layer_start_index=0, moe_num_shared_experts=1),
    "nemotron_h": _SIZED | dict(
        n_routed_experts=4, n_shared_experts=1, layers_block_type=["attention", "moe"], head_dim=16, n_group=1, topk_group=1,
        moe_shared_expert_intermediate_size=48, moe_latent_size=None,
    ),
    "longcat_flash": _DEEPSEEK | dict(
        num_layers=1, expert_ffn_hidden_size=48, ffn_hidden_size=96, zero_expert_num=2, moe_topk=3, head_dim=16,
    ),
    "jetmoe": _COMMON | dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=16, num_key_value_heads=4),
}  # fmt: skip


def mixture(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of a family, in eval mode, whose experts all count."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.1)
            elif not parameter.any():
                nn.init.normal_(parameter, std=0.05)  # biases
    return model

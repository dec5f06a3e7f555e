"""A tiny random model of any architecture of transformers, and a batch of three rows for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

VOCABULARY = 128
LARGEST = 3_000_000  # parameters of a tiny model
# Sizes that every configuration gets that has a number of this name.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "dim_model", "emb_dim", "projection_dim"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "hidden_dim", "d_embed", "pronunciation_embed_dim"), 64),
    **dict.fromkeys(("shape_embed_dim", "encoder_hidden_dim", "decoder_hidden_dim", "out_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "dim_ff"), 96),
    **dict.fromkeys(("n_inner", "d_inner", "ffn_hidden_size", "shared_expert_intermediate_size", "hidden_dim_ff"), 96),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth", "num_hidden_layers_cls"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "d_kv", "global_head_dim", "dim_head"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 24),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "rotary_dim"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "lru_width"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    "image_size": 32, "patch_size": 8, "num_mel_bins": 16, "type_vocab_size": 2, "sliding_window": 16,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "spatial_merge_size": 2,
}  # fmt: skip
# Sizes of lists, one for each stage of a model or each convolution.
LISTS = {"depths": 1, "hidden_sizes": 32, "embed_dims": 32, "embed_dim": 32, "conv_dim": 32, "layer_depths": 1}
# Probabilities with which training hides parts of a sound that is longer than the batch's.
_MASKS = ("mask_time_prob", "mask_feature_prob")
# Ids of special tokens, which must lie inside the small vocabulary.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
QWEN = {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}
QWEN_VISION = {"patch_size": 4, "num_heads": 4, "hidden_size": 64, "depth": 2, "in_channels": 3}
# What an architecture needs besides its sizes.
NEEDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "donut-swin": {"embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": 96,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 96},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", **VISION}, "text_config": {"model_type": "llama"},
        "image_token_index": 100, "image_seq_length": 4,
    },
    "longcat_flash": {"num_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_vl": {
        **QWEN, "text_config": MROPE,
        "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 64},
    },
    "qwen2_vl": {**QWEN, "text_config": MROPE, "vision_config": {**QWEN_VISION, "embed_dim": 64}},
    "qwen3_vl_moe": {
        **QWEN, "text_config": MROPE,
        "vision_config": {
            **QWEN_VISION, "deepstack_visual_indexes": [0], "out_hidden_size": 64, "num_position_embeddings": 64
        },
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "feed_forward_size": 96},
    "swin": {"embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "swinv2": {"embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def ids(T: int, rows: int = 3) -> Tensor:
    return torch.arange(rows * T).view(rows, T) * 7 % 90 + 5


def pictures(T: int = 12) -> dict[str, Tensor]:
    """Two pictures in the first row and one in the last, of 8, 4 and 8 patches, four of which make a placeholder."""
    found = ids(T)
    for row, places in ((0, (1, 2, 5)), (2, (3, 4))):
        found[row, list(places)] = 100
        found[row, [place - 1 for place in places if found[row, place - 1] != 100]] = 102
    grid = torch.tensor([[1, 2, 4], [1, 2, 2], [1, 2, 4]])
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 4 * 4)
    return {
        "input_ids": found,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (found == 100).long(),
    }


def one_picture_each() -> dict[str, Tensor]:
    found = ids(8)
    found[:, 1:5] = 100
    return {"input_ids": found, "pixel_values": torch.randn(3, 3, 16, 16)}


# What transformers can make a model for: the class that makes it, the types of configurations that it takes, and a batch.
TASKS: dict[str, tuple[str, str, dict[str, Tensor]]] = {
    "text": ("AutoModelForCausalLM", "CAUSAL_LM", {"input_ids": ids(7)}),
    "translation": (
        "AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", {"input_ids": ids(7), "decoder_input_ids": ids(5)},
    ),
    "encoder": ("AutoModelForMaskedLM", "MASKED_LM", {"input_ids": ids(7)}),
    "image": ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION", {"pixel_values": torch.randn(3, 3, 32, 32)}),
    "sound": ("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION", {"input_values": torch.randn(3, 1600)}),
}  # fmt: skip
# Models of other tasks, or with batches of their own.
OTHERS: dict[tuple[str, str], dict[str, Tensor]] = {
    ("AutoModelForSpeechSeq2Seq", "whisper"): {"input_features": torch.randn(3, 16, 128), "decoder_input_ids": ids(5)},
    ("AutoModel", "clip"): {"input_ids": ids(7), "pixel_values": torch.randn(3, 3, 32, 32)},
    ("AutoModel", "siglip"): {"input_ids": ids(7), "pixel_values": torch.randn(3, 3, 32, 32)},
    ("AutoModelForImageTextToText", "llava"): one_picture_each(),
    ("AutoModelForImageTextToText", "qwen2_vl"): pictures(),
    ("AutoModelForImageTextToText", "qwen2_5_vl"): pictures(),
    ("AutoModelForImageTextToText", "qwen3_vl_moe"): pictures(),
}


class Family(NamedTuple):
    """An architecture for a task."""

    kind: str  # of its configuration
    auto: str  # the class that makes its model
    batch: dict[str, Tensor]

    def make(self, device: str | None = None) -> nn.Module:
        """The model, with the same random numbers every time."""
        torch.manual_seed(0)
        with torch.device(device or "cpu"):
            model: nn.Module = getattr(transformers, self.auto).from_config(make_config(self.kind)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.1)
        return model


def families() -> Iterator[Family]:
    """Every architecture of the installed transformers that one of the tasks takes."""
    for auto, mapping, batch in TASKS.values():
        for kind in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"):
            if all(kind != other for _, other in OTHERS):
                yield Family(kind, auto, batch)
    for (auto, kind), batch in OTHERS.items():
        yield Family(kind, auto, batch)


def make_config(kind: str) -> PreTrainedConfig:
    """The configuration of an architecture with every size that it has made small."""
    default = AutoConfig.for_model(kind)
    given = _shrink(default)
    for name, value in NEEDS.get(kind, {}).items():
        inner = given.get(name)
        given[name] = {**inner, **value} if isinstance(inner, dict) and name != "rope_parameters" else value
    return type(default)(**given)


def _shrink(default: PreTrainedConfig) -> dict[str, Any]:
    given = vars(default)
    sizes = {name: size for name, size in SIZES.items() if type(given.get(name)) is int}
    for name, size in LISTS.items():
        if isinstance(given.get(name), list | tuple):
            sizes[name] = [size] * len(given[name])
    for name in _MASKS:
        if name in given:
            sizes[name] = 0.0
    for name in default.sub_configs:
        if isinstance(inner := given.get(name), PreTrainedConfig):
            sizes[name] = {"model_type": inner.model_type, **_shrink(inner)}
    for name, token in SPECIAL.items():
        if isinstance(given.get(name), int | list):
            sizes[name] = token
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes.get("num_attention_heads", 4)
    kinds = given.get("layer_types")
    if isinstance(kinds, list):
        sizes["layer_types"] = list(dict.fromkeys(kinds)) if len(set(kinds)) > 1 else kinds[:2]
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    return sizes

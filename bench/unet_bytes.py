"""Bytes of UNets of diffusers in NF4, as shares of bfloat16: python bench/unet_bytes.py. No weight is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lowrank_ops as lo

# The published configurations, where they differ from the class's own.
UNETS: dict[str, dict[str, Any]] = {
    "SDXL": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "Stable Diffusion 1.5": {"sample_size": 64, "cross_attention_dim": 768},
}  # fmt: skip


def shares(unet: nn.Module) -> tuple[int, float, float]:
    """The number of parameters, and the bytes with linear layers in NF4, and with convolutions too, over bfloat16's."""
    config = lo.NF4Config(convolutions="nf4")
    total = sum(p.numel() for p in unet.parameters())
    weights = [m for m in config.choose(unet).values() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    sizes = [sum(m.weight.numel() for m in weights if isinstance(m, kind)) for kind in (nn.Linear, nn.Module)]
    linear, both = (1 - size / total + size / total * config.bytes_per_weight() / 2 for size in sizes)
    return total, linear, both


def main() -> None:
    from diffusers import UNet2DConditionModel

    for name, options in UNETS.items():
        with torch.device("meta"):
            total, linear, both = shares(UNet2DConditionModel(**options))
        print(f"{name}: {total / 1e9:.2f} billion, linear layers {linear:.1%}, convolutions too {both:.1%}")


if __name__ == "__main__":
    main()

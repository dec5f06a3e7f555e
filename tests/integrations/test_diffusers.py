"""Tiny models of diffusers in 4 bits: adapters, convolutions, a mixture for each image, frames, and the page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ops as lo
from lowrank_ops.adapters import layouts

diffusers = pytest.importorskip("diffusers")
PAGE = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(7))


def sdxl() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip


def run_sdxl(model: Any) -> torch.Tensor:
    added = {"text_embeds": random(4, 32), "time_ids": torch.ones(4, 6)}
    y: torch.Tensor = model(random(4, 4, 8, 8), torch.tensor(3), random(4, 5, 32), added_cond_kwargs=added).sample
    return y


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def run_flux(model: Any) -> torch.Tensor:
    y: torch.Tensor = model(
        hidden_states=random(4, 16, 4), encoder_hidden_states=random(4, 5, 32), pooled_projections=random(4, 32),
        timestep=torch.full((4,), 0.3), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3),
    ).sample  # fmt: skip
    return y


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def run_wan(model: Any) -> torch.Tensor:
    y: torch.Tensor = model(random(4, 4, 2, 4, 4), torch.full((4,), 3), random(4, 5, 16)).sample
    return y


def motion() -> Any:
    return diffusers.UNetMotionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2,
        motion_num_attention_heads=2, motion_max_seq_length=8,
    )  # fmt: skip


def run_motion(model: Any) -> torch.Tensor:
    text = random(4, 5, 16).repeat_interleave(3, 0)  # as the pipeline has it
    y: torch.Tensor = model(random(4, 4, 3, 8, 8), torch.full((4,), 3), text).sample
    return y


def latte() -> Any:
    return diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        norm_type="ada_norm_single", norm_elementwise_affine=False, num_embeds_ada_norm=1000, video_length=3,
    )  # fmt: skip


def run_latte(model: Any) -> torch.Tensor:
    y: torch.Tensor = model(
        random(4, 4, 3, 8, 8), timestep=torch.full((4,), 3), encoder_hidden_states=random(4, 5, 16)
    ).sample
    return y


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor], list[str]]] = {
    "SDXL": (sdxl, run_sdxl, ["to_q", "to_v", "proj_in", "conv1", "conv_in", "time_emb_proj"]),
    "Flux": (flux, run_flux, ["to_q", "to_v", "proj_mlp", "x_embedder"]),
    "Wan": (wan, run_wan, ["to_q", "to_v", "net.2"]),
    "AnimateDiff": (motion, run_motion, ["to_q", "to_v", "conv1", "time_emb_proj"]),
    "Latte": (latte, run_latte, ["to_q", "to_v", "linear_1", "proj"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mixture_for_each_image(name: str, tmp_path: Path) -> None:
    make, run, targets = CASES[name]

    def adapted(kind: Any) -> Any:
        torch.manual_seed(0)
        return lo.adapt(make().eval(), kind, targets)

    base = adapted(None)
    pool, alone = lo.AdapterPool(base, 1 << 22), {}
    with torch.no_grad():
        alone[None] = run(base)
        for seed, adapter in enumerate("ab"):
            model = adapted(lo.LoRA(4))
            for p in lo.adapter_parameters(model):
                nn.init.normal_(p, std=0.3, generator=generator(seed))
            lo.save_adapter(model, tmp_path / adapter)
            pool.load(adapter, tmp_path / adapter)
            alone[adapter] = run(model)
            if adapter == "a":
                lo.set_strength(model, 0.5)
                half = run(model)
                lo.set_strength(model, 1.0)
                lo.save_adapter(model, tmp_path / "file", format="diffusers")
                again = lo.load_adapter(adapted(None), tmp_path / "file")
                torch.testing.assert_close(run(again), alone["a"], rtol=1e-4, atol=1e-4)
        # Two images, and guidance that doubles the batch.
        with pool.route([{"a": 0.5}, "b"] * 2):
            y = run(base)
        with pool.route([None, "a", "a", None]):
            z = run(base)
    assert (alone["a"] - alone["b"]).abs().max() > 1e-3
    for got, wanted in ((y, [half, alone["b"]] * 2), (z, [alone[None], alone["a"], alone["a"], alone[None]])):
        right = torch.stack([wanted[row][row] for row in range(4)])
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


def test_a_whole_unet_is_small_in_four_bits_and_its_projections_are_not_fused() -> None:
    unet = sdxl().eval().to(torch.bfloat16)
    before = sum(p.numel() * p.itemsize for p in unet.parameters())
    lo.adapt(unet, None, quantize=lo.NF4Config(convolutions="nf4"))
    held = [*unet.parameters(), *unet.buffers()]
    assert sum(t.numel() * t.itemsize for t in held) <= 0.3 * before
    with pytest.raises(ValueError, match="is a layer of lowrank_ops, and fusing projections"):
        unet.fuse_qkv_projections()


class Pipe:
    """What the page calls a pipeline, over tiny models."""

    def __init__(self) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=99, **sizes)).eval()
        torch.manual_seed(0)
        self.transformer, self.unet = flux().eval(), sdxl().eval()

    def __call__(self, prompts: list[str], guidance_scale: float) -> Any:
        assert guidance_scale == 1.0
        images = self.transformer(
            hidden_states=random(len(prompts), 16, 4), encoder_hidden_states=random(len(prompts), 5, 32),
            pooled_projections=random(len(prompts), 32), timestep=torch.full((len(prompts),), 0.3),
            img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip
        return SimpleNamespace(images=images)


def test_kohyas_files_of_sdxl_have_the_names_of_stability() -> None:
    """Every layer of a UNet by its original name, as diffusers' own converter reads it, and in one file."""
    unet = sdxl()
    layers = {n.replace(".", "_"): (n, m) for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    rests = {found[1] for name in layers if (found := re.search(r"attentions_\d+_(.+)", name))} | layouts._RESNET.keys()
    named = [
        f"{side}_blocks_{i}_{j}_{rest}"
        for side in ("input", "output")
        for i in range(4)
        for j in (0, 1)
        for rest in rests
    ]
    named += [f"middle_block_{i}_{rest}" for i in range(3) for rest in rests]
    named += [*layouts._OUTER, "input_blocks_2_0_op", "output_blocks_1_2_conv"]
    made = {name: layouts.diffusers_name(name, 1) for name in named}
    original = {flat: name for name, flat in made.items() if flat in layers}
    assert original.keys() == layers.keys()

    tensors = {}
    for flat, name in original.items():
        module = layers[flat][1]
        out, into, *kernel = module.weight.shape
        tensors[f"lora_unet_{name}.lora_down.weight"] = random(2, into, *kernel)
        tensors[f"lora_unet_{name}.lora_up.weight"] = random(out, 2, *(1 for _ in kernel))
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    convert = diffusers.loaders.lora_conversion_utils
    theirs, _ = convert._convert_non_diffusers_lora_to_diffusers(
        convert._maybe_map_sgm_blocks_to_diffusers(dict(tensors), unet.config)
    )
    names = {re.sub(r"[._]lora\..*", "", key).removeprefix("unet.").replace(".processor", "") for key in theirs}
    assert {name.replace("to_out", "to_out.0").replace(".0.0", ".0") for name in names} == {
        n for n, _ in layers.values()
    }

    lo.load_adapter(unet, tensors)
    for flat, name in original.items():
        adapted = unet.get_submodule(layers[flat][0])
        assert torch.equal(adapted.up.flatten(), tensors[f"lora_unet_{name}.lora_up.weight"].flatten())


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    scope: dict[str, Any] = {"lo": lo, "pipe": Pipe(), "path": tmp_path / "unet"}
    for name in ("ink", "oil"):
        torch.manual_seed(0)
        model = lo.adapt(flux(), lo.LoRA(4))
        for p in lo.adapter_parameters(model):
            nn.init.normal_(p, std=0.3)
        lo.save_adapter(model, tmp_path / name)
        scope[name] = tmp_path / name
    blocks = re.findall(r"\n\n((?:    .*\n|\n(?=    ))+)", PAGE)
    assert len(blocks) == 4
    for block in blocks:
        exec(textwrap.dedent(block), scope)
    assert isinstance(scope["pipe"].unet.conv_in.weight, lo.NF4Weight) and len(scope["images"]) == 2

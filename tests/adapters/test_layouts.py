"""Adapters out of files and state dicts of several layouts, over one model and in a pool, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TOKENS, snapshot, tiny, write_peft
from safetensors.torch import load_file, save_file

import lowrank_ops as lo
from lowrank_ops.adapters.layouts import diffusers_name

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A directory that PEFT wrote, s = 2 in one layer of two and 3 in the other, and the logits of its model."""
    path = tmp_path_factory.mktemp("peft")
    alphas = {"layers.1.self_attn.q_proj": 12}
    logits, _ = write_peft(tiny, path, lora_alpha=8, alpha_pattern=alphas)
    return path, logits


@pytest.fixture
def tensors(peft: tuple[Path, torch.Tensor]) -> Tensors:
    return load_file(peft[0] / "adapter_model.safetensors")


@pytest.fixture
def config(peft: tuple[Path, torch.Tensor]) -> dict[str, Any]:
    return json.loads((peft[0] / "adapter_config.json").read_text())  # type: ignore[no-any-return]


def renamed(tensors: Tensors, prefix: str, down: str = "lora_A", up: str = "lora_B", flat: bool = False) -> Tensors:
    made = {}
    for key, tensor in tensors.items():
        name, _, role = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        name = name.replace(".", "_") if flat else name
        made[f"{prefix}{name}.{ {'lora_A': down, 'lora_B': up}[role] }.weight"] = tensor
    return made


def with_alpha(tensors: Tensors) -> Tensors:
    layers = {key.partition(".lora")[0] for key in tensors}
    return tensors | {
        f"{name}.alpha": torch.tensor(12.0 if "layers.1" in name or "layers_1" in name else 8.0) for name in layers
    }


def logits_of(source: Any, config: Any = None) -> torch.Tensor:
    model = lo.load_adapter(tiny(), source, config=config).eval()
    return model(TOKENS).logits.detach()


def metadata(config: dict[str, Any], prefix: str) -> dict[str, str]:
    kept = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "target_modules")
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"{prefix}{key}": config[key] for key in kept})}


LAYOUTS = {
    "diffusers'": ("transformer.", {}),
    "diffusers', older": ("unet.", {"down": "lora.down", "up": "lora.up"}),
    "no prefix": ("", {}),
    "kohya's": ("lora_te_", {"down": "lora_down", "up": "lora_up", "flat": True}),
    "lora_down": ("diffusion_model.", {"down": "lora_down", "up": "lora_up"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_with_alphas(layout, peft, tensors: Tensors, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    prefix, names = LAYOUTS[layout]
    theirs = with_alpha(renamed(tensors, prefix, **names))
    torch.testing.assert_close(logits_of(theirs), peft[1], rtol=1e-4, atol=1e-5)
    save_file(theirs, tmp_path / "some.safetensors")
    torch.testing.assert_close(logits_of(tmp_path / "some.safetensors"), peft[1], rtol=1e-4, atol=1e-5)


def test_the_configuration_in_metadata_beside_the_file_and_as_an_argument(
    peft, tensors: Tensors, config, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    expected = peft[1]
    model = lo.adapt(tiny(), None, quantize=None)
    pool = lo.AdapterPool(model, 1 << 20, root=tmp_path)
    save_file(
        renamed(tensors, "transformer."),
        tmp_path / "pytorch_lora_weights.safetensors",
        metadata(config, "transformer."),
    )
    shutil.copytree(peft[0], tmp_path / "peft")
    shutil.copytree(peft[0], tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").rename(tmp_path / "other" / "mine.safetensors")
    sources = [
        (tmp_path, None),  # diffusers' directory
        (tmp_path / "pytorch_lora_weights.safetensors", None),
        (tmp_path / "peft" / "adapter_model.safetensors", None),
        (tmp_path / "other" / "mine.safetensors", None),
        (tensors, config),
        (renamed(tensors, ""), config),
        (renamed(tensors, "transformer."), config),
    ]
    for at, (source, given) in enumerate(sources):
        torch.testing.assert_close(logits_of(source, given), expected, rtol=1e-4, atol=1e-5)
        pool.load(f"a{at}", source, given)
        with pool.route([f"a{at}"] * len(TOKENS)):
            torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


def test_without_alpha_diffusers_layout_has_strength_one(tensors: Tensors, config) -> None:  # type: ignore[no-untyped-def]
    ones = config | {"lora_alpha": 4, "alpha_pattern": {}}
    assert torch.equal(logits_of(renamed(tensors, "unet.")), logits_of(tensors, ones))


def test_a_file_for_several_models_gives_this_ones(peft, tensors: Tensors) -> None:  # type: ignore[no-untyped-def]
    other = {f"unet.blocks.0.to_q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    with pytest.warns(UserWarning, match="adapters of other models too, which are not loaded: unet"):
        got = logits_of(with_alpha(renamed(tensors, "text_encoder.")) | other)
    torch.testing.assert_close(got, peft[1], rtol=1e-4, atol=1e-5)


def test_a_pool_of_a_root_opens_no_file_outside(peft, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "in").mkdir()
    pool = lo.AdapterPool(lo.adapt(tiny(), None), 1 << 20, root=tmp_path / "in")
    (tmp_path / "in" / "a.safetensors").symlink_to(peft[0] / "adapter_model.safetensors")
    (tmp_path / "in" / "pytorch_lora_weights.safetensors").symlink_to(peft[0] / "adapter_model.safetensors")
    for source in (peft[0] / "adapter_model.safetensors", tmp_path / "in" / "a.safetensors", tmp_path / "in"):
        with pytest.raises(ValueError, match="source must be inside"):
            pool.load("a", source)


Q = "model.layers.{}.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, config, message",
    [
        (lambda t: {"blocks.0.hada_w1_a": torch.ones(2, 2)}, None, "none of the known layouts .* are 'blocks.0.hada_w1_a'"),
        (lambda t: t, None, r"config must say what the tensors of the state dict are \(r, lora_alpha\)"),
        (lambda t: renamed(t, "lora_te_", "lora_down", "lora_up", True), None, "layout kohya's, which needs alpha, and"),
        (lambda t: renamed(t, "", "lora_down", "lora_up"), None, "needs alpha, and has none for 'model.layers.0"),
        (lambda t: renamed(t, "unet.") | renamed(t, "text_encoder."), None, f"two prefixes for layer '{Q.format(0)}'"),
        (lambda t: renamed(t, "unet.x."), None, "layers that are not in the model: 'unet.x.model.layers.0"),
        (
            lambda t: renamed(t, "unet.") | {f"unet.b{i}.lora_A.weight": torch.ones(4, 4) for i in range(7)},
            None,
            "layers that are not in the model: 'unet.b0', 'unet.b1', 'unet.b2', 'unet.b3', 'unet.b4', …$",
        ),
        (lambda t: renamed(t, "") | {"x.dora_scale": torch.ones(4)}, None, "no LoRA factors: 'x.dora_scale'"),
        (lambda t: with_alpha(renamed(t, "")), {"r": 4, "lora_alpha": 8}, "alpha twice"),
        (lambda t: with_alpha(renamed(t, "")) | {Q.format(0) + ".alpha": torch.ones(2)}, None, "must be one finite number"),
        (
            lambda t: with_alpha(renamed(t, "")) | {Q.format(0) + ".lora_B.weight": torch.ones(32, 5)},
            None,
            r"q_proj.lora_B.weight must be \[32, 4\]",
        ),
        (lambda t: t | {PREFIX + "a.lora_A.weight": torch.ones(4, 3)}, {"r": 4, "lora_alpha": 8}, "lacks a.lora_B"),
        (
            lambda t: t | {f"{PREFIX}b{i}.lora_{p}.weight": torch.ones(4, 4) for i in range(7) for p in "AB"},
            {"r": 4, "lora_alpha": 8},
            "tensors for 'b0', 'b1', 'b2', 'b3', 'b4', …, which",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(change, config, message: str, tensors: Tensors) -> None:  # type: ignore[no-untyped-def]
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lo.load_adapter(model, change(tensors), config=config)
    assert snapshot(model)[0] == before[0] and not any(isinstance(m, lo.Linear) for m in model.modules())
    pool = lo.AdapterPool(lo.adapt(model, None), 1 << 20)
    with pytest.raises(
        ValueError, match=message.replace("tensors for 'b0', 'b1', 'b2', 'b3', 'b4', …, which", "tensors for 'b0'")
    ):
        pool.load("a", change(tensors), config)
    assert pool.names() == []


def test_a_truncated_file_and_metadata_that_lack_alpha(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for text, message in (
        ("{", "is not JSON"),
        ('{"unet.r": 4}', "lacks unet.r or unet.lora_alpha"),
        ("[]", "must be a table"),
    ):
        save_file(renamed(tensors, "unet."), path, {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=message):
            lo.load_adapter(tiny(), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        lo.load_adapter(tiny(), path)
    with pytest.raises(FileNotFoundError):
        lo.load_adapter(tiny(), tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="leave config out"):
        lo.load_adapter(tiny(), path, config={"r": 4})


@pytest.mark.parametrize(
    "original, layers, expected",
    [
        ("input_blocks_0_0", 2, "conv_in"),
        ("input_blocks_3_0_op", 2, "down_blocks_0_downsamplers_0_conv"),
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            2,
            "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        ),
        ("input_blocks_8_0_in_layers_2", 2, "down_blocks_2_resnets_1_conv1"),
        ("middle_block_1_proj_in", 2, "mid_block_attentions_0_proj_in"),
        ("middle_block_2_emb_layers_1", 2, "mid_block_resnets_1_time_emb_proj"),
        ("output_blocks_2_1_conv", 2, "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_5_2_conv", 2, "up_blocks_1_upsamplers_0_conv"),
        ("output_blocks_3_0_skip_connection", 1, "up_blocks_1_resnets_1_conv_shortcut"),
        ("middle_block_3_proj_in", 2, None),
        ("down_blocks_0_resnets_0_conv1", 2, None),
    ],
)
def test_names_of_stability(original: str, layers: int, expected: str | None) -> None:
    assert diffusers_name(original, layers) == expected

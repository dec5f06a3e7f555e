"""lowrank_ops.Conv1d and Conv2d: against the dense equation, PEFT's files and outputs, whole models, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_ops as lo

SHAPES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(6, 20, 3, padding=1), (2, 6, 7, 5)),
    "strided": (lambda: nn.Conv2d(6, 20, (3, 2), stride=(2, 1), padding=(0, 1), bias=False), (3, 6, 9, 5)),
    "dilated": (lambda: nn.Conv2d(5, 12, 3, dilation=2, padding="same"), (2, 5, 6, 7)),
    "circular": (lambda: nn.Conv2d(6, 12, 3, padding=1, padding_mode="circular"), (1, 6, 5, 5)),
    "one by one": (lambda: nn.Conv2d(17, 9, 1), (2, 17, 3, 3)),
    "unbatched": (lambda: nn.Conv2d(6, 12, 3), (6, 5, 5)),
    "groups": (lambda: nn.Conv2d(6, 12, 3, groups=2, padding=1), (2, 6, 5, 5)),
    "1d": (lambda: nn.Conv1d(7, 12, 4, stride=2, padding=1, padding_mode="reflect"), (2, 7, 11)),
}


def conv(name: str = "plain", dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = SHAPES[name]
    return make().to(dtype), torch.randn(shape, dtype=dtype)


def moved(layer: Any) -> Any:
    torch.manual_seed(1)
    for p in layer.trained():
        nn.init.normal_(p, std=0.3)
    return layer


def dense(layer: Any) -> torch.Tensor:
    """W of a layer as a kernel, float64."""
    weight = layer.weight
    held = weight.dequantize(torch.float32) if not isinstance(weight, torch.Tensor) else weight.detach()
    return held.double().view(layer.out_channels, -1, *layer.kernel_size)


def exact(layer: Any, plain: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y by torch's convolutions in float64."""
    wide = copy.deepcopy(plain).double()
    wide.weight = nn.Parameter(dense(layer), requires_grad=False)
    ones = (1,) * len(layer.kernel_size)
    options = (plain.stride, plain.padding, plain.dilation)
    first = type(plain)(
        plain.in_channels, layer.adapter.rank, plain.kernel_size, *options, 1, False, plain.padding_mode
    )
    h = torch.func.functional_call(first.double(), {"weight": down.view_as(first.weight)}, (x.double(),))
    function = nn.functional.conv1d if len(ones) == 1 else nn.functional.conv2d
    y: torch.Tensor = wide(x.double()) + layer.adapter.scale * function(
        h, up.view(*up.shape, *ones), groups=layer.groups
    )
    return y


@pytest.mark.parametrize("quantize", ["nf4", None], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_equation_and_its_gradients(name: str, quantize: str | None) -> None:
    plain, x = conv(name)
    layer = moved((lo.Conv1d if name == "1d" else lo.Conv2d).from_conv(plain, lo.LoRA(4, alpha=6), quantize))
    x.requires_grad_()
    y = layer(x)
    parts = [t.detach().double().requires_grad_() for t in (x, layer.down, layer.up)]
    right = exact(layer, plain, *parts)
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    y.backward(g)
    right.backward(g.double())
    for mine, theirs in zip((x, layer.down, layer.up), parts, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=2e-5)
    assert not layer.weight.requires_grad if quantize is None else isinstance(layer.weight, lo.NF4Weight)
    if name == "groups":
        with pytest.raises(ValueError, match="groups=2: the update joins the channels of all groups"):
            layer.merged_weight()
        return
    made = layer.make_plain(nn.Parameter(layer.merged_weight()))
    assert type(made) is type(plain) and made.weight.shape == plain.weight.shape
    torch.testing.assert_close(made(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_err_no_more_than_torch(dtype: torch.dtype) -> None:
    plain, x = conv("plain", dtype)
    layer = moved(lo.Conv2d.from_conv(plain, lo.LoRA(4, alpha=6)))
    right = exact(layer, plain, x, layer.down.detach().double(), layer.up.detach().double())
    rounded = nn.functional.conv2d(x, layer.merged_weight(dtype), plain.bias, padding=1)
    y = layer(x)
    assert y.dtype == dtype
    assert (y - right).abs().max() <= 2 * (rounded - right).abs().max() + 1e-6 * right.abs().max()
    wide, x = conv()
    cast = lo.Conv2d.from_conv(wide, lo.LoRA(4))
    with torch.autocast("cpu", dtype):
        assert cast(x).dtype == dtype


def test_the_graph_does_not_hold_the_decoded_kernel() -> None:
    plain, x = conv()
    layer, held = lo.Conv2d.from_conv(plain, lo.LoRA(4)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        layer(x.requires_grad_()).sum()
    assert plain.weight.numel() not in held


def test_it_starts_as_the_convolution_and_compiles() -> None:
    plain, x = conv()
    layer = lo.Conv2d.from_conv(plain, lo.LoRA(4, dropout=0.5), None)
    assert_bits_equal(layer(x), plain(x))
    assert layer.weight.data_ptr() == plain.weight.data_ptr() and layer.weight is not plain.weight
    moved(layer)
    assert not torch.equal(layer.train()(x), layer(x))
    layer.eval()
    assert_bits_equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bits_equal(again(x), layer(x))
    assert "6, 20, kernel_size=(3, 3)" in repr(layer) and "adapter=LoRA(rank=4" in repr(layer)
    assert "torch's convolution" in lo.explain(layer, x)
    layer.set_adapter(None)
    assert_bits_equal(layer(x), plain(x))
    assert_bits_equal(lo.Conv2d.from_conv(layer, lo.LoRA(2), None)(x), plain(x))


class Blocks(nn.Module):
    """Convolutions of several kinds, and a linear layer."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(8, 16, 3, padding=1)
        self.down = nn.Sequential(nn.SiLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1))
        self.shortcut = nn.Conv2d(32, 16, 1, groups=groups)
        self.time = nn.Conv1d(16, 16, 3, padding=1)
        self.proj = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shortcut(self.down(self.conv_in(x))).flatten(2)
        out: torch.Tensor = self.proj(self.time(y).transpose(1, 2))
        return out


TARGETS = ["conv_in", "down.1", "shortcut", "time", "proj"]
X = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(3))


def blocks(groups: int = 1) -> Any:
    torch.manual_seed(0)
    return Blocks(groups).eval()


def trained(groups: int = 1, quantize: str | None = None, targets: Any = TARGETS, seed: int = 1) -> Any:
    model = lo.adapt(blocks(groups), lo.LoRA(4, alpha=6), targets, quantize)
    torch.manual_seed(seed)
    for p in lo.adapter_parameters(model):
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("groups", [1, 2])
def test_files_and_outputs_of_peft_both_ways(groups: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(groups)
    y = model(X)
    lo.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(blocks(groups), tmp_path / "ours")
    torch.testing.assert_close(theirs(X), y, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    for base in (blocks(groups), trained(groups)):
        assert_bits_equal(lo.load_adapter(base, tmp_path / "theirs")(X), y)
    if groups == 1:
        merged, other = lo.merge(model), theirs.merge_and_unload()
        for name in ("conv_in", "down.1", "shortcut", "time"):
            assert type(merged.get_submodule(name)) is type(other.get_submodule(name))
            torch.testing.assert_close(
                merged.get_submodule(name).weight, other.get_submodule(name).weight, rtol=1e-5, atol=1e-6
            )
        torch.testing.assert_close(merged(X), y, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="layer 'shortcut': groups=2"):
            lo.merge(model)
        assert_bits_equal(model(X), y)


@pytest.mark.parametrize("quantize", ["nf4", None], ids=str)
def test_in_a_model(quantize: str | None, tmp_path: Path) -> None:
    base = lo.adapt(blocks(), None, TARGETS, quantize)(X) if quantize else blocks()(X)
    model = trained(quantize=quantize)
    assert all(isinstance(model.get_submodule(n), lo.Conv2d | lo.Conv1d | lo.Linear) for n in TARGETS)
    y = model(X)
    with lo.disabled(model):
        assert_bits_equal(model(X), base)
    with lo.strength(model, 0.0):
        torch.testing.assert_close(model(X), base)
    again = lo.adapt(blocks(), lo.LoRA(4, alpha=6), TARGETS, quantize)
    again.load_state_dict(model.state_dict())
    assert_bits_equal(again(X), y)
    lo.set_strength(model, 0.5)
    half = model(X)
    assert_bits_equal(lo.reference(model)(X), half)
    torch.testing.assert_close(lo.merge(model)(X), half, rtol=1e-4, atol=1e-5)
    # The layers without an adapter are taken over, and the first optimiser step moves U.
    fresh = lo.adapt(lo.adapt(blocks(), None, TARGETS, quantize), lo.LoRA(4), TARGETS)
    fresh(X).square().mean().backward()
    assert all(layer.up.grad.any() for layer in (fresh.conv_in, fresh.time))


def test_all_linear_leaves_convolutions_and_a_configuration_takes_them() -> None:
    model = lo.adapt(blocks(), lo.LoRA(4))
    assert type(model.conv_in) is nn.Conv2d and isinstance(model.proj, lo.Linear)
    config = lo.NF4Config(convolutions="nf4", skip=["conv_in"])
    model = lo.adapt(blocks(), lo.LoRA(4), quantize=config)
    assert isinstance(model.time.weight, lo.NF4Weight) and model.time.adapter is None
    assert type(getattr(model.conv_in, "weight")) is nn.Parameter  # noqa: B009
    assert_bits_equal(lo.adapt(model, lo.LoRA(2), ["time"])(X), model(X))
    with pytest.raises(ValueError, match="has no nn.Conv1d or nn.Conv2d"):
        config.choose(nn.Sequential(nn.Linear(4, 4)))


def test_other_layouts_of_files(tmp_path: Path) -> None:
    model = trained()
    y = model(X)
    lo.save_adapter(model, tmp_path, format="diffusers")
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert tensors["transformer.conv_in.lora_A.weight"].shape == (4, 8, 3, 3)
    assert tensors["transformer.time.lora_B.weight"].shape == (16, 4, 1)
    torch.testing.assert_close(lo.load_adapter(blocks(), tmp_path)(X), y, rtol=1e-5, atol=1e-5)
    older = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in tensors.items()}
    # A 1 x 1 convolution as a matrix, and a linear layer as a 1 x 1 convolution.
    for key in list(older):
        if "shortcut" in key:
            older[key] = older[key].flatten(1)
        if "proj" in key:
            older[key] = older[key][:, :, None, None]
    torch.testing.assert_close(lo.load_adapter(blocks(), older)(X), y, rtol=1e-5, atol=1e-5)
    kohya = {}
    for key, tensor in tensors.items():
        name, part = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)
        stem = "lora_unet_" + name.replace(".", "_")
        kohya[f"{stem}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[part] }.weight"] = tensor
        kohya[f"{stem}.alpha"] = torch.tensor(4.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(lo.load_adapter(blocks(), tmp_path / "kohya.safetensors")(X), y, rtol=1e-5, atol=1e-5)
    wrong = dict(tensors) | {"transformer.conv_in.lora_A.weight": torch.ones(4, 8, 1, 1)}
    with pytest.raises(
        ValueError, match=r"'conv_in': the file's lora_A.weight must be \[4, 8, 3, 3\] .* got \[4, 8, 1, 1\]"
    ):
        lo.load_adapter(blocks(), wrong)
    lo.save_adapter(model, tmp_path / "as_lora", as_lora=True)
    torch.testing.assert_close(lo.load_adapter(blocks(), tmp_path / "as_lora")(X), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="conv_in.*one of a convolution; load it into the model"):
        lo.combine([(str(tmp_path / "as_lora"), 1.0)])


@pytest.mark.parametrize("quantize", ["nf4", None], ids=str)
def test_rows_of_a_pool_have_their_own_convolutions(quantize: str | None, tmp_path: Path) -> None:
    models = [trained(quantize=quantize, seed=seed) for seed in (1, 2)]
    base = lo.adapt(blocks(), None, TARGETS if quantize else ["proj"], quantize)
    y0 = base(X)
    pool = lo.AdapterPool(base, 1 << 20)
    for name, model in zip("ab", models, strict=True):
        lo.save_adapter(model, tmp_path / name)
        pool.load(name, tmp_path / name)
    ya, yb = (model(X) for model in models)
    with pool.route(["a", None, "b"]):
        y = base(X)
    torch.testing.assert_close(y, torch.stack([ya[0], y0[1], yb[2]]), rtol=1e-5, atol=1e-5)
    with pool.route(["a"] * 3):
        torch.testing.assert_close(base(X), ya, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "error, message, make, kind",
    [
        (TypeError, "conv must be an nn.Conv1d or nn.Conv2d .*got Linear", lambda: nn.Linear(4, 4), lo.LoRA(2)),
        (TypeError, "got ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 4, 3), lo.LoRA(2)),
        (TypeError, "conv must be an nn.Conv2d, got Conv1d", lambda: nn.Conv1d(4, 4, 3), lo.LoRA(2)),
        (ValueError, "a convolution can have a LoRA with .*got SVF", lambda: nn.Conv2d(4, 4, 3), lo.SVF()),
        (ValueError, "without dora", lambda: nn.Conv2d(4, 4, 3), lo.LoRA(2, dora=True)),
        (ValueError, "rank must be at most .* = 4", lambda: nn.Conv2d(4, 4, 3), lo.LoRA(5)),
        (ValueError, "rank must be a multiple of groups = 2, got 3", lambda: nn.Conv2d(4, 4, 3, groups=2), lo.LoRA(3)),
        (ValueError, "meta device", lambda: nn.Conv2d(4, 4, 3, device="meta"), lo.LoRA(2)),
    ],
)
def test_what_is_refused(error: type[Exception], message: str, make: Any, kind: Any) -> None:
    with pytest.raises(error, match=message):
        lo.Conv2d.from_conv(make(), kind)


def test_a_model_of_transformers_is_read_saved_and_adapted_with_its_convolutions(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    from lowrank_ops.__main__ import main

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    base = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)).eval()
    base.save_pretrained(tmp_path / "base")
    x, config, patch = (
        torch.randn(2, 3, 16, 16),
        lo.NF4Config(convolutions="nf4"),
        "embeddings.patch_embeddings.projection",
    )

    def read(name: str, **options: Any) -> Any:
        return ViTModel.from_pretrained(tmp_path / name, **options).eval()

    model = read("base", quantization_config=config)
    conv = model.get_submodule(patch)
    assert isinstance(conv, lo.Conv2d) and isinstance(conv.weight, lo.NF4Weight) and conv.bias is not None
    y = model(x).last_hidden_state
    assert_bits_equal(lo.adapt(base, None, quantize=config)(x).last_hidden_state, y)
    model.save_pretrained(tmp_path / "saved")
    assert model.config.to_dict().get("quantization_config") is None
    assert '"quant_method": "lowrank_ops"' in (tmp_path / "saved" / "config.json").read_text()
    assert main(["quantize", str(tmp_path / "base"), "--convolutions", "--out", str(tmp_path / "command")]) == 0
    for name in ("saved", "command"):
        assert_bits_equal(read(name)(x).last_hidden_state, y)
    lo.adapt(model, lo.LoRA(4), ["projection"])
    moved(model.get_submodule(patch))
    y = model(x).last_hidden_state
    model.save_pretrained(tmp_path / "adapted")
    assert_bits_equal(read("adapted")(x).last_hidden_state, y)
    again = lo.load_adapter(read("base", quantization_config=config), tmp_path / "adapted")
    assert_bits_equal(again(x).last_hidden_state, y)

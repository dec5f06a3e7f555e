"""Adapters in the files of diffusers and llama.cpp, from a model and from their own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lowrank_ops as lo
from lowrank_ops.__main__ import main

KINDS = [
    lo.LoRA(3, alpha=7),
    lo.LoRA(4, rslora=True),
    lo.LoRA(2, init="pissa"),
    lo.LoRAXS(4),
    lo.SVFT(bandwidth=1, rank=5),
]


def adapted(path: str, kind: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    lo.adapt(model, kind, targets=["q_proj", "k_proj", "down_proj"], quantize=None)
    generator = torch.Generator().manual_seed(1)
    for parameter in lo.adapter_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def changes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: lo.combine([(m, 1.0)]).delta() for name, m in model.named_modules() if isinstance(m, lo.Linear)}


def written(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The fields of a GGUF file that say what it is, and ΔW by llama.cpp's names."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    alpha = fields["adapter.lora.alpha"]
    names = {name.removesuffix(".weight.lora_a") for name in tensors if name.endswith("lora_a")}
    delta = {}
    for name in names:
        a, b = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        delta[name] = alpha / len(a) * (b @ a)
    return fields, delta


def turned(change: torch.Tensor, heads: int) -> torch.Tensor:
    """Row i of the first half of a head goes to 2 i, of the second half to 2 i + 1."""
    size = len(change) // heads
    rows = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in range(2)]
    return change[rows]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gguf_holds_every_kind_under_the_names_of_llama_cpp(kind: Any, causal_model: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = adapted(causal_model, kind)
    lo.save_adapter(model, tmp_path, format="gguf")
    fields, delta = written(tmp_path / "adapter.gguf")
    kept = {key: fields[key] for key in ("general.type", "general.architecture", "adapter.type")}
    assert kept == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    names = {"self_attn.q_proj": ("attn_q", 6), "self_attn.k_proj": ("attn_k", 2), "mlp.down_proj": ("ffn_down", 0)}
    wanted = changes(model)
    assert len(delta) == len(wanted) == 6
    for name, change in wanted.items():
        _, _, block, own = name.split(".", 3)
        theirs, heads = names[own]
        right = turned(change, heads) if heads else change
        assert (delta[f"blk.{block}.{theirs}"] - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_diffusers_file_has_the_scale_in_its_factors(kind: Any, causal_model: str, tmp_path: Path) -> None:
    model = adapted(causal_model, kind)
    lo.save_adapter(model, tmp_path, format="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    read = AutoModelForCausalLM.from_pretrained(causal_model, dtype=torch.float32)
    lo.load_adapter(read, tmp_path)
    back = changes(read)
    for name, change in changes(model).items():
        product = tensors[f"text_encoder.{name}.lora_B.weight"] @ tensors[f"text_encoder.{name}.lora_A.weight"]
        for got in (product, back[name]):
            assert (got - change).norm() <= 1e-5 * change.norm()


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids=str)
def test_the_command_needs_no_model(
    kind: Any, causal_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    model = adapted(causal_model, kind)
    source, wanted = str(tmp_path / "source"), changes(model)
    lo.save_adapter(model, source, "auto" if isinstance(kind, lo.LoRA) else "stored")
    assert main(["convert", source, "--to", "gguf", "--model", causal_model, "--out", str(tmp_path / "a.gguf")]) == 0
    lo.save_adapter(model, tmp_path, format="gguf")
    (_, ours), (_, theirs) = written(tmp_path / "adapter.gguf"), written(tmp_path / "a.gguf")
    assert ours.keys() == theirs.keys() and all((ours[n] - theirs[n]).norm() <= 1e-5 * ours[n].norm() for n in ours)
    for to in ("peft", "diffusers"):
        assert main(["convert", source, "--to", to, "--out", str(tmp_path / to)]) == 0
        read = AutoModelForCausalLM.from_pretrained(causal_model, dtype=torch.float32)
        lo.load_adapter(read, tmp_path / to)
        for name, change in changes(read).items():
            assert (change - wanted[name]).norm() <= 1e-5 * change.norm()
    assert "6 layers in" in capsys.readouterr().out


def test_what_a_format_has_no_place_for_is_refused(causal_model: str, tmp_path: Path) -> None:
    model = adapted(causal_model, lo.LoRA(2))
    with pytest.raises(ValueError, match="format must be one of peft, diffusers, gguf, got 'ggml'"):
        lo.save_adapter(model, tmp_path / "out", format="ggml")
    with pytest.raises(ValueError, match="factors must be 'auto' for a plain LoRA"):
        lo.save_adapter(model, tmp_path / "out", "stored", format="diffusers")
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="has no place for 'lm_head.weight', which is trained beside"):
        lo.save_adapter(model, tmp_path / "out", format="gguf")
    plain = nn.Sequential(nn.Linear(8, 8))
    lo.adapt(plain, lo.LoRA(2), targets="all-linear", quantize=None)
    with pytest.raises(ValueError, match="needs a model of transformers"):
        lo.save_adapter(plain, tmp_path / "out", format="gguf")
    pytest.importorskip("gguf")
    other = adapted(causal_model, lo.LoRA(2))
    other.config.model_type = "mamba"
    with pytest.raises(ValueError, match="names are known here for llama, .*, got 'mamba'"):
        lo.save_adapter(other, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_missing(
    causal_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nn.Sequential(nn.Linear(8, 8))
    lo.adapt(plain, lo.LoRA(2), targets="all-linear", quantize=None)
    lo.save_adapter(plain, tmp_path / "source")
    arguments = ["convert", str(tmp_path / "source"), "--to", "gguf", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "does not name its base; give --model" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert main([*arguments, "--model", causal_model]) == 1
    assert 'pip install "lowrank-ops[gguf]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""Models with experts: quantised expert by expert while transformers reads them, saved under published names, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import lowrank_ops as lo
from lowrank_ops.__main__ import main

IDS = torch.arange(12).view(2, 6)
SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def make(family: str) -> Any:
    torch.manual_seed(0)
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(intermediate_size=96, num_local_experts=4, **SMALL))
    elif family == "qwen3_moe":  # every half of gate_up has whole groups of 256 blocks of 32
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, head_dim=16, **SMALL)
        )
    else:
        model = GptOssForCausalLM(GptOssConfig(intermediate_size=96, num_local_experts=4, head_dim=16, **SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def load(directory: Path, config: Any = None, **options: Any) -> Any:
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.detach()


def adapted_experts(model: Any) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "ExpertsLinear" and m.adapter is not None]


def stacks(model: Any) -> dict[str, lo.NF4Weight]:
    return {
        name: m.weight
        for name, m in model.named_modules()
        if type(m).__name__ == "ExpertsLinear" and not isinstance(m.weight, torch.nn.Parameter)
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_quantised_while_they_are_read_and_come_back(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make(family).save_pretrained(tmp_path / "dense")
    config = lo.NF4Config(block_size=32)
    model = load(tmp_path / "dense", config, dtype=dtype)
    assert len(stacks(model)) == 2 and all(len(weight.shape) == 3 for weight in stacks(model).values())
    dense = load(tmp_path / "dense", dtype=dtype)
    block = dense.model.layers[0].mlp.experts
    for name, weight in stacks(model).items():
        parameter = getattr(block, name.rpartition(".")[2]).detach()
        parameter = parameter.mT if block.is_transposed else parameter
        assert_bits_equal(weight.packed, lo.NF4Weight.quantize(parameter, 32).packed)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    for name, weight in stacks(again).items():
        assert_bits_equal(weight.dequantize(), stacks(model)[name].dequantize())
    assert_bits_equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice")  # what was read can be written
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "twice"))
    # Halves of gate_up that end within a group of 256 blocks were joined with float32 scales.
    joined = {
        key for key in first if family == "mixtral" and ".nested_" in key and ".w2." not in key and "experts" in key
    }
    assert first.keys() - joined == second.keys()
    published = load_file(tmp_path / "dense" / "model.safetensors").keys()
    assert published <= first.keys()


def test_matrices_of_experts_are_bitsandbytes_entries(tmp_path: Path) -> None:
    """Each matrix can be read alone, as directories of MoE models that bitsandbytes quantised look."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    make("mixtral").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", lo.NF4Config())
    model.save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved" / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    entries = {key: t for key, t in state.items() if key.startswith(name + ".")}
    theirs = Params4bit.from_prequantized(state[name], entries, device="cpu")
    (gate_up,) = (weight for key, weight in stacks(model).items() if key.endswith("gate_up_proj"))
    assert_bits_equal(dequantize_4bit(theirs.data, theirs.quant_state), gate_up[2].dequantize()[96:])
    # Each matrix with an offset of its own, as bitsandbytes quantises them.
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    for key, tensor in dense.items():
        if ".experts." in key:
            weight = lo.NF4Weight.quantize(tensor)
            state = {k: t for k, t in state.items() if not k.startswith(key)}
            state |= weight.to_bitsandbytes(key.removesuffix("weight"))
    save_file(state, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    again = load(tmp_path / "saved")
    (gate_up,) = (weight for key, weight in stacks(again).items() if key.endswith("gate_up_proj"))
    own = (lo.NF4Weight.quantize(dense[name.replace("w3", part)]).dequantize() for part in ("w1", "w3"))
    assert_bits_equal(gate_up[2].dequantize(), torch.cat(list(own)))


def test_mxfp4_of_gpt_oss_is_read_as_it_is(tmp_path: Path) -> None:
    dense = make("gpt_oss").to(torch.bfloat16)
    dense.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    decoded = dict(state)
    for key in [key for key in state if key.endswith(("gate_up_proj", "down_proj"))]:
        weight = lo.MXFP4Weight.quantize(state.pop(key).mT)
        state[key + "_blocks"], state[key + "_scales"] = weight.to_blocks()
        decoded[key] = weight.dequantize(torch.bfloat16).mT.contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"quantization_config": {"quant_method": "mxfp4"},', 1))
    model = load(tmp_path, lo.NF4Config())
    kept = stacks(model)
    assert len(kept) == 2 and all(isinstance(weight, lo.MXFP4Weight) for weight in kept.values())
    for name, weight in kept.items():
        assert_bits_equal(weight.dequantize().mT.contiguous(), decoded[name])
    model.save_pretrained(tmp_path / "saved")
    ours = load_file(tmp_path / "saved" / "model.safetensors")
    assert ours.keys() == state.keys()
    for key, tensor in ours.items():
        assert_bits_equal(tensor, state[key])
    assert_bits_equal(logits(load(tmp_path / "saved")), logits(model))


def test_shared_experts_are_no_stack(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, intermediate_size=96, moe_intermediate_size=64, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=0, kv_lora_rank=16, q_lora_rank=32,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).eval().save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", lo.NF4Config())
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    shared = again.model.layers[0].mlp.shared_experts.down_proj
    assert len(stacks(again)) == 2 and isinstance(shared.weight, lo.NF4Weight)
    assert_bits_equal(shared.weight.packed, model.model.layers[0].mlp.shared_experts.down_proj.weight.packed)
    torch.testing.assert_close(logits(again), logits(model))


def test_experts_that_older_files_have_transposed(tmp_path: Path) -> None:
    text = SMALL | {
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"hidden_size": 64, "depth": 1, "num_heads": 4, "out_hidden_size": 64, "deepstack_visual_indexes": []}
    torch.manual_seed(0)
    dense = Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(
            text_config=text, vision_config=vision | {"intermediate_size": 64, "num_position_embeddings": 64}
        )
    )
    files = []
    for age in ("newer", "older"):
        dense.save_pretrained(tmp_path / age)
        file = tmp_path / age / "model.safetensors"
        state = load_file(file)
        if age == "older":
            state = {key: t.mT.contiguous() if ".experts." in key else t for key, t in state.items()}
            save_file(state, file, metadata={"format": "pt"})
        assert main(["quantize", str(tmp_path / age), "--out", str(tmp_path / f"{age}-4")]) == 0
        files.append(load_file(tmp_path / f"{age}-4" / "model.safetensors"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "older-4").eval()
    again.save_pretrained(tmp_path / "twice")
    files.append(load_file(tmp_path / "twice" / "model.safetensors"))
    for other in files[1:]:
        assert other.keys() == files[0].keys()
        for key, tensor in other.items():
            assert_bits_equal(tensor, files[0][key])
    adapted = lo.adapt(dense.eval(), None)
    assert len(stacks(again)) == 2 and stacks(again).keys() == stacks(adapted).keys()
    assert_bits_equal(logits(again), logits(adapted))
    adapted.save_pretrained(tmp_path / "adapted")
    for key, tensor in load_file(tmp_path / "adapted" / "model.safetensors").items():
        assert_bits_equal(tensor, files[0][key])


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for part in "123":
        del state[f"model.layers.0.block_sparse_moe.experts.3.w{part}.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="experts.*(3, 192, 64|needs)"):
        load(tmp_path, lo.NF4Config())


def test_skip_leaves_experts_dense(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path)
    model = load(tmp_path, lo.NF4Config(skip=["experts.down_proj"]))
    assert [name.rpartition(".")[2] for name in stacks(model)] == ["gate_up_proj"]
    down = load(tmp_path).model.layers[0].mlp.experts.down_proj
    assert_bits_equal(model.model.layers[0].mlp.experts.down_proj.weight.detach(), down.detach())


@pytest.mark.parametrize(
    "family, kind, quantize",
    [
        ("mixtral", lo.LoRA(4), "nf4"),
        ("gpt_oss", lo.LoRA(4), None),
        ("mixtral", lo.SVFT(pattern="random", entries=2), None),
        ("gpt_oss", lo.SVFT(bandwidth=1), "nf4"),
        ("gpt_oss", lo.SVF(form="replace"), "nf4"),
    ],
)
def test_adapters_of_experts_are_saved_with_the_model(
    family: str, kind: Any, quantize: str | None, tmp_path: Path
) -> None:
    model = lo.adapt(make(family), kind, quantize=quantize)
    with torch.no_grad():
        for parameter in lo.adapter_parameters(model):
            parameter.normal_(std=0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = [load(tmp_path)]
    if quantize and isinstance(kind, lo.LoRA):  # a fresh model that has the base
        loaded.append(lo.load_adapter(lo.adapt(make(family), None), tmp_path))
    for again in loaded:
        assert len(adapted_experts(again)) == 2
        assert len(lo.adapter_parameters(again)) == len(lo.adapter_parameters(model))
        torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)

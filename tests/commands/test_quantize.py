"""lowrank-ops quantize: a directory to 4 bits, file by file."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
from helpers import assert_bits_equal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import lowrank_ops as lo
from lowrank_ops.__main__ import main
from lowrank_ops.commands.wide_options import WIDE
from lowrank_ops.integrations import transformers_quantize


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: t for file in directory.glob("*.safetensors") for key, t in load_file(file).items()}


def mixtral() -> torch.nn.Module:
    config = MixtralConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def tied() -> torch.nn.Module:
    model = models.llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def gpt_oss() -> torch.nn.Module:  # stacks that are one tensor in the files, transposed
    config = GptOssConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4,
    )  # fmt: skip
    return GptOssForCausalLM(config)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "dense"
    models.llama().to(torch.bfloat16).save_pretrained(directory, max_shard_size="60KB")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.mark.parametrize(
    "make, config, options",
    [
        (models.llama, lo.NF4Config(skip=["k_proj"]), ["--skip", "k_proj"]),
        (
            models.llama,
            lo.FP4Config(128, False, head="fp4"),
            ["--format=fp4", "--block-size=128", "--no-double-quant", "--head"],
        ),
        (models.llama, lo.MXFP4Config(), ["--format", "mxfp4"]),
        (tied, lo.NF4Config(head="nf4"), ["--head"]),
        (tied, lo.NF4Config(embeddings="nf4"), ["--embeddings"]),
        (tied, lo.NF4Config(embeddings="nf4", head="nf4"), ["--embeddings", "--head"]),
        (models.llama, lo.NF4Config(head="int8"), ["--head", "int8"]),
        (tied, lo.MXFP4Config(embeddings="int8"), ["--embeddings", "int8", "--format=mxfp4"]),
        (models.gpt2, lo.NF4Config(), []),
        (mixtral, lo.NF4Config(), []),
        (mixtral, lo.NF4Config(skip=["experts.down_proj"]), ["--skip", "experts.down_proj"]),
        (gpt_oss, lo.NF4Config(32), ["--block-size=32"]),
    ],
)
def test_it_writes_what_save_pretrained_writes(tmp_path: Path, make, config, options: list[str]) -> None:  # type: ignore[no-untyped-def]
    dense, out, saved = tmp_path / "dense", tmp_path / "out", tmp_path / "saved"
    make().save_pretrained(dense, max_shard_size="60KB")
    # An option whose value may be left out takes no MODEL_DIR for it.
    given = [*options, str(dense)] if options[-1:] and options[-1] in WIDE else [str(dense), *options]
    assert main(["quantize", "--out", str(out), *given]) == 0
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(saved)
    ours, theirs = tensors(out), tensors(saved)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert_bits_equal(tensor, theirs[key])
    assert json.loads((out / "config.json").read_text()) == json.loads((saved / "config.json").read_text())


def test_it_resumes_and_reports_the_error_of_every_layer(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, save, written = tmp_path / "out", transformers_quantize._save, []

    def interrupted(entries: dict[str, torch.Tensor], path: Path) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        save(entries, path)

    monkeypatch.setattr(transformers_quantize, "_save", interrupted)
    command = ["quantize", str(sharded), "--out", str(out)]
    assert main(command) == 130 and not (out / "config.json").exists()
    assert "the same command resumes" in capsys.readouterr().err
    monkeypatch.setattr(
        transformers_quantize, "_save", lambda entries, path: written.append(path.name) or save(entries, path)
    )
    assert main(command) == 0
    assert len(written) == len(set(written)) == len(list(sharded.glob("*.safetensors"))) > 2
    assert (out / "tokenizer.json").read_text() == "{}"
    model = AutoModelForCausalLM.from_pretrained(out)
    errors = json.loads((out / "quantization.json").read_text())["files"]
    errors = {name: lost for file in errors.values() for name, lost in file["errors"].items()}
    assert errors.keys() == set(models.adapted(model))
    dense = AutoModelForCausalLM.from_pretrained(sharded)
    for name, lost in errors.items():
        w, w4 = (m.get_submodule(name).weight for m in (dense.requires_grad_(False), model))
        assert lost == pytest.approx(float((w4.dequantize(torch.float32) - w).norm() / w.float().norm()), rel=1e-5)
    assert "14 layers" in capsys.readouterr().out
    # Other choices begin again.
    assert main([*command, "--no-double-quant"]) == 0 and len(written) == 2 * len(set(written))


def test_experts_resume_and_are_reported_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards so small that the matrices of one expert lie in several."""
    dense, out, save, written = tmp_path / "dense", tmp_path / "out", transformers_quantize._save, []
    mixtral().save_pretrained(dense, max_shard_size="60KB")

    def interrupted(entries: dict[str, torch.Tensor], path: Path) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        save(entries, path)

    command = ["quantize", str(dense), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(transformers_quantize, "_save", interrupted)
        assert main(command) == 130
    stamps = {name: (out / name).stat().st_mtime_ns for name in written}
    assert main(command) == 0
    assert stamps == {name: (out / name).stat().st_mtime_ns for name in written}
    assert "down_proj" in (said := capsys.readouterr().out) and "12 layers" in said
    files = json.loads((out / "quantization.json").read_text())["files"]
    errors = {name: lost for file in files.values() for name, lost in file["errors"].items()}
    model, plain = (AutoModelForCausalLM.from_pretrained(directory) for directory in (out, dense))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    w, w4 = plain.get_parameter(name).detach()[3], model.get_submodule(name).weight[3].dequantize()
    assert errors[f"{name}.3"] == pytest.approx(float((w4 - w).norm() / w.norm()), rel=1e-5)
    assert len(errors) == 12


def test_a_missing_expert_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixtral().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert main(["quantize", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "lack 1 weights to quantise: model.layers.0.mlp.experts.gate_up_proj" in capsys.readouterr().err


def test_bad_directories_are_refused(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(directory: Path, *options: str) -> str:
        assert main(["quantize", str(directory), "--out", str(tmp_path / "out"), *options]) == 1
        return capsys.readouterr().err

    assert "has no config.json" in said(tmp_path)
    assert "skip ['zz'] matches no layer" in said(sharded, "--skip", "zz")
    assert "block_size must be one of" in said(sharded, "--block-size", "100")
    main(["quantize", str(sharded), "--out", str(tmp_path / "four")])
    assert "quantised already" in said(tmp_path / "four")
    shard = next(file for file in sharded.glob("*.safetensors") if any("up_proj" in key for key in load_file(file)))
    held = load_file(shard)
    name = next(key for key in held if "up_proj" in key)
    save_file(held | {name: torch.full_like(held[name], torch.inf)}, shard)
    assert f"{shard}: '{name}': weight must be finite" in said(sharded)
    save_file({key: t for key, t in held.items() if key != name}, shard)
    assert f"lack 1 weights to quantise: {name}" in said(sharded)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} is damaged" in said(sharded)

"""The bench behind docs/quantization.md, on a small model: every row, and that a second call goes on."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
from serving_helpers import text_of
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_ops.bench import quantization


@pytest.fixture
def model(causal_model: str, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(causal_model) / name, directory)
    return directory


def test_every_row_is_made_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [tmp_path / name for name in ("calibration", "text", "foreign")]
    for number, path in enumerate(texts):
        parts = (" ".join(text_of(5 * n + k + number) for k in range(5)) for n in range(20))
        path.write_text("\n\n".join(parts))
    options = ["--calibrate", str(texts[0]), "--text", str(texts[1]), "--foreign", str(texts[2])]
    options += ["--calibrate-tokens", "512", "--tokens", "64", "--length", "32", "--out", str(tmp_path)]
    assert quantization.main([str(model), *options, "--only", quantization.BASELINE]) == 0
    assert set(json.loads((tmp_path / "results.json").read_text())["models"]) == {"dense", quantization.BASELINE}
    before = (tmp_path / "moments.safetensors").stat().st_mtime_ns
    peer = ["--peer", f"peer=4.5={model}"]
    assert quantization.main([str(model), *options, *peer, "--train", "2"]) == 0
    assert (tmp_path / "moments.safetensors").stat().st_mtime_ns == before
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["models"]
    assert len(rows) == 2 + 12 + 1 and rows["dense"]["kl"] == 0 and rows["peer"]["bits"] == 4.5
    assert abs(rows["peer"]["kl"]) < 1e-5  # it is the dense model
    assert all(row["kl"] > 0 and row["foreign_kl"] > 0 for name, row in rows.items() if name not in ("dense", "peer"))
    assert rows["calibrated"]["bits"] == rows[quantization.BASELINE]["bits"] < rows["calibrated, branch of 16"]["bits"]
    assert list(results["training"]) == list(quantization.TRAINED)
    assert "| calibrated, branch of 32 |" in capsys.readouterr().out
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_an_encoder_is_compared_by_its_embeddings(small_model: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("\n\n".join(" ".join(text_of(5 * n + k) for k in range(6)) for n in range(20)))
    kept = quantization.Kept(tmp_path / "results.json")
    quantization.encode(argparse.Namespace(encoder=small_model, text=text, calibrate=text), kept)
    rows = kept.rows("encoder")
    assert rows["calibrated"]["cosine_error"] < rows[quantization.BASELINE]["cosine_error"] < 0.1
    assert rows["calibrated, branch of 32"]["bits"] > rows["calibrated, branch of 16"]["bits"]
    assert f"| NF4 | {rows['NF4']['bits']:.3f} |" in quantization.tables(quantization.Kept(kept.path))

"""The scripts of docs/training.md run as they stand, but for a tiny model and few steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowrank_ops as lo

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("trl")

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
SCRIPTS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))
LIBRARY = {"embed": "sentence_transformers", "light": "lightning"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", model_max_length=64
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def script(name: str, base: Path) -> str:
    text, changed = re.subn(r'^name = ".*"$', f"name = {str(base)!r}", SCRIPTS[name], flags=re.MULTILINE)
    assert changed == 1
    changes = {"max_steps=100": "max_steps=2", "save_steps=50": "save_steps=1", "LoRA(16)": "LoRA(4)",
               '"run",': '"run", use_cpu=True, bf16=False,'}  # fmt: skip
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def test_the_page_has_them_all() -> None:
    assert set(SCRIPTS) == {"sft", "dpo", "grpo", "reward", "embed", "light"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in LIBRARY:
        pytest.importorskip(LIBRARY[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    scope = {"__name__": "__main__"}
    exec(compile(script(name, base), f"{name}.py", "exec"), scope)
    model = scope["module"].model if name == "light" else scope["model"]  # type: ignore[attr-defined]
    moved = [float(layer.up.detach().abs().max()) for layer in model.modules() if isinstance(layer, lo.Linear)]
    assert moved and all(moved)  # up starts from 0
    if name == "light":
        kept = torch.load("run/last.ckpt", weights_only=False)["state_dict"]
        assert len(kept) == 3 * len(moved)
        return
    files = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt"} <= files and "model.safetensors" not in files
    assert Path("reward" if name == "reward" else "adapter", "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes(base: Path, tmp_path: Path) -> None:
    (tmp_path / "sft.py").write_text(script("sft", base))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sft.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    files = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {
        "adapter_model.safetensors",
        "rng_state_0.pth",
        "rng_state_1.pth",
    } <= files and "model.safetensors" not in files
    lo.load_adapter(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")

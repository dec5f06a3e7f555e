"""Every kind, written as a GGUF adapter, gives our logits in llama.cpp over a base in GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_ops as lo

pytestmark = pytest.mark.slow
gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp's library (pip install xllamacpp) is not installed")

VOCABULARY, HEADS, KV = 64, 4, 2
IDS = [5, 17, 33, 8, 41, 9, 60, 22]
KINDS = [
    lo.LoRA(4, alpha=6),
    lo.LoRA(4, rslora=True),
    lo.LoRA(2, init="pissa"),
    lo.LoRAXS(8),
    lo.SVF(rank=8),
    lo.SVFT(bandwidth=1, rank=8),
]


def base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.1)
    return model


def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q and k as llama.cpp's converter puts them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a GGUF file in float32."""
    model, path = base(), tmp_path_factory.mktemp("gguf") / "base.gguf"
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for end, heads in (("q_proj.weight", HEADS), ("k_proj.weight", KV)):
            tensor = turned(tensor, heads) if name.endswith(end) else tensor
        theirs = table.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{theirs}.weight", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(file: Path, adapter: Path | None = None) -> torch.Tensor:
    """log p of the token after the prompt, by llama.cpp, [VOCABULARY]."""
    parameters = llama_cpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.verbosity = str(file), 64, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    if adapter is not None:
        info = llama_cpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        parameters.lora_adapters = [info]
    server = llama_cpp.Server(parameters)
    answer = server.handle_completions(
        {"prompt": IDS, "n_predict": 1, "temperature": 0, "n_probs": VOCABULARY, "logprobs": VOCABULARY}
    )
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    logs = torch.full((VOCABULARY,), float("nan"))
    for token in found:
        logs[token["id"]] = token["logprob"]
    return logs


def ours(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([IDS])).logits[0, -1]
    return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def difference(file: Path) -> float:
    """By how much the base alone differs; llama.cpp keeps keys and values in float16."""
    return float((theirs(file) - ours(base())).abs().nan_to_num(9.0).max())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_of_every_kind(kind: Any, file: Path, difference: float, tmp_path: Path) -> None:
    model = lo.adapt(base(), kind, ["q_proj", "k_proj", "o_proj", "down_proj", "gate_proj"], None)
    torch.manual_seed(1)
    for p in lo.adapter_parameters(model):
        p.data += torch.randn_like(p) * (0.05 if isinstance(kind, lo.LoRA) else 0.3)
    lo.save_adapter(model, tmp_path, format="gguf")
    right, got = ours(model), theirs(file, tmp_path / "adapter.gguf")
    assert difference < 5e-3
    assert (right - ours(base())).abs().max() > 100 * difference  # the adapter matters
    # Twice, since the keys and values that float16 rounds are others with the adapter.
    assert (got - right).abs().nan_to_num(9.0).max() <= 2 * difference

"""Small models and layers to adapt, and measures of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank_ops as lo
from lowrank_ops.adapters.linear import AdaptedLayer

TOKENS = torch.arange(1, 15).view(2, 7)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=32, n_embd=64, n_layer=1, n_head=2)).eval()


def tiny(tied: bool = False, classes: int = 0, bias: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, attention_bias=bias, pad_token_id=0, num_labels=classes or 2,
    )  # fmt: skip
    return (LlamaForSequenceClassification if classes else LlamaForCausalLM)(config).eval()


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    return BertForSequenceClassification(config).eval()


def gemma() -> Any:
    """Its embedding is scaled, and tied to the head."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def write_peft(
    make: Callable[[], Any], path: Path, tokens: torch.Tensor = TOKENS, seed: int = 1, **options: Any
) -> tuple[torch.Tensor, set[str]]:
    """Save a trained PEFT adapter of a model; its logits, and the names of what it trains beside the updates."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make(), LoraConfig(r=4, **{"target_modules": ["q_proj"], **options})).eval()
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p) / 10
    model.save_pretrained(path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    return model(tokens).logits.detach(), trained


def adapted(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, lo.Linear)]


def snapshot(model: nn.Module) -> tuple[str, dict[str, torch.Tensor], dict[str, bool]]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return repr(model), state, {name: p.requires_grad for name, p in model.named_parameters()}


def linear(N: int = 48, K: int = 64, decay: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer whose singular values fall as i^-decay, as in trained weights."""
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(K, N, dtype=dtype)
    U, V = (torch.linalg.qr(torch.randn(n, min(N, K), generator=generator))[0] for n in (N, K))
    with torch.no_grad():
        made.weight.copy_(U * torch.arange(1.0, min(N, K) + 1) ** -decay @ V.T)
        made.bias.normal_(generator=generator)
    return made


def perturb(layer: lo.Linear, size: float = 0.1) -> lo.Linear:
    """Move the adapters as some training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.trained():
            p += size * torch.randn(p.shape, generator=generator)
    return layer


def randomised(model: nn.Module) -> nn.Module:
    """Give the adapters of a model values, as some training would."""
    torch.manual_seed(1)
    for p in lo.adapter_parameters(model):
        nn.init.normal_(p, std=0.1)
    return model


def random_branch(*shape: int, rank: int = 3, seed: int = 0) -> lo.LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    *stack, N, K = shape
    down = torch.randn(*stack, rank, K, generator=generator) / K**0.5
    return lo.LowRankUpdate(down.bfloat16(), (torch.randn(*stack, N, rank, generator=generator) / 5).bfloat16())


def with_branches(model: nn.Module) -> nn.Module:
    """A model in 4 bits whose every layer has a branch of a rank of its own."""
    if not any(isinstance(m, AdaptedLayer) for m in model.modules()):
        lo.adapt(model, None)
    for i, layer in enumerate(m for m in model.modules() if isinstance(m, AdaptedLayer)):
        layer.set_branch(random_branch(*layer.shape, rank=2 + i % 3, seed=i))
    return model

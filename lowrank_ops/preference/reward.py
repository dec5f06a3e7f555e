"""Reward models on a 4-bit base: a transformer with an adapter, and a head that gives one number for each text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..adapters.checkpoint import load_adapter, save_adapter
from ..adapters.kinds import Adapter
from ..adapters.linear import AdaptedLayer
from ..adapters.model import adapt, freeze
from ..adapters.peft_files import TENSORS
from ..files import load_json, make_folder, write_tensors

HEAD = "reward_head.safetensors"
POOLINGS = ("last", "mean", "first")


class RewardHead(nn.Module):
    """reward = ⟨w, pool(hidden)⟩, one number for each text.

    Args:
        hidden_size: H.
        pooling: "last": the last real token, the only one that depends on the whole text in a causal decoder; "mean" of
            the real tokens, each of which depends on the whole text in an encoder, as sentence encoders are trained;
            "first": for an encoder whose first token was trained as a summary.

    w starts normal with variance 1 / (H + 1). The head computes in float32.
    """

    def __init__(self, hidden_size: int, pooling: str = "last") -> None:
        super().__init__()
        if not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(f"hidden_size must be an integer of at least 1, got {hidden_size!r}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.pooling = pooling
        self.weight = nn.Parameter(torch.randn(hidden_size, dtype=torch.float32) * (hidden_size + 1) ** -0.5)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """The rewards, float32 [B].

        Args:
            hidden: [B, T, H].
            attention_mask: [B, T], nonzero for real tokens, at any position.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: a shape differs, or a text has no real token.
        """
        _check_tensors(hidden=hidden, attention_mask=attention_mask)
        real = attention_mask != 0
        if hidden.dim() != 3 or hidden.shape[-1] != self.weight.numel() or real.shape != hidden.shape[:2]:
            raise ValueError(
                f"hidden must be [B, T, {self.weight.numel()}] and attention_mask [B, T], got {list(hidden.shape)} and "
                f"{list(real.shape)}"
            )
        if not torch.compiler.is_compiling() and not real.any(1).all():
            raise ValueError(f"text {int((~real.any(1)).nonzero()[0])} of the batch has no real token")
        if self.pooling == "mean":
            weight = real.unsqueeze(-1).float()
            pooled = (hidden.float() * weight).sum(1) / weight.sum(1)
        else:
            positions = torch.arange(real.shape[1], device=real.device)
            if self.pooling == "last":
                at = torch.where(real, positions, -1).amax(1)
            else:
                at = torch.where(real, positions, real.shape[1]).amin(1)
            pooled = hidden[torch.arange(len(at), device=at.device), at].float()
        return pooled @ self.weight.float()

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, pooling={self.pooling!r}"


class RewardModel(nn.Module):
    """A transformer with a :class:`RewardHead`, made by :func:`reward_model`.

    Attributes:
        model: the base, without any other head. head: the RewardHead. quantize: the base's format, or None.
    """

    def __init__(self, model: nn.Module, head: RewardHead, quantize: str | None) -> None:
        super().__init__()
        self.model, self.head, self.quantize = model, head, quantize

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """The rewards of B texts, float32 [B].

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for real tokens, padded on either side: real tokens are first moved to the front,
                so that positions count from 0 and the side of the padding does not change the reward.
            inputs: other outputs of the tokenizer, such as token_type_ids [B, T].

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: the shapes differ, or a text has no real token.
        """
        _check_tensors(input_ids=input_ids, attention_mask=attention_mask)
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids and attention_mask must be [B, T], got {list(input_ids.shape)} and {list(attention_mask.shape)}"
            )
        real = attention_mask != 0
        order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
        named = {"input_ids": input_ids, "attention_mask": real.to(torch.int64), **inputs}
        moved = {k: v.gather(1, order) if v.shape == order.shape else v for k, v in named.items()}
        if self.head.pooling == "last" and hasattr(self.model.config, "use_cache"):
            moved["use_cache"] = False  # type: ignore[assignment]
        hidden = self.model(**moved).last_hidden_state
        rewards: Tensor = self.head(hidden, moved["attention_mask"])
        return rewards


def _check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def reward_model(
    model: nn.Module,
    adapter: Adapter | None = None,
    quantize: str | None = "nf4",
    *,
    targets: str | Sequence[str] = "all-linear",
    pooling: str | None = None,
) -> RewardModel:
    """reward(text) = ⟨w, pool(model(text))⟩: a Hugging Face encoder or decoder, made 4-bit and adapted in place, and a head.

    Args:
        model: an ``AutoModel``, or a model with a head for another task, which is dropped.
        adapter: the kind of update; None trains the head alone. ``lowrank_ops.LoRA(16)`` is a start.
        quantize: the format of the weights, ``"nf4"``, ``"fp4"`` or ``"mxfp4"``, or None to keep them dense.
        targets: as in :func:`lowrank_ops.adapt`.
        pooling: see :class:`RewardHead`; None tries whether a later token changes the hidden state of an earlier one,
            and takes "mean" if it does, "last" if not.

    Returns:
        the reward model; only the adapters and the head are trainable.

    Raises:
        TypeError: model is not a transformer that returns hidden states, or has both an encoder and a decoder.
        ValueError: as :func:`lowrank_ops.adapt`.
    """
    base = _base(model)
    if pooling is None:
        pooling = "last" if _is_causal(base) else "mean"
    head = RewardHead(base.config.hidden_size, pooling)
    if adapter is not None or quantize is not None:
        adapt(base, adapter, targets, quantize)
    else:
        freeze(base)
    return RewardModel(base, head.to(next(base.parameters()).device), quantize)


def _base(model: nn.Module) -> Any:
    base = getattr(model, "base_model", model)
    config = getattr(base, "config", None)
    if not isinstance(base, nn.Module) or not hasattr(config, "hidden_size"):
        raise TypeError(f"model must be a Hugging Face transformer with config.hidden_size, got {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"model must be an encoder or a decoder; {type(model).__name__} is both")
    return base


def _is_causal(model: Any) -> bool:
    """Try on two texts of two tokens whether a later token leaves the hidden state of an earlier one unchanged."""
    device, size, training = next(model.parameters()).device, model.config.vocab_size, model.training
    if device.type == "meta":
        raise ValueError("model is on the meta device; materialise it first")
    first = size // 2
    ids = torch.tensor([[first, (first + 1) % size], [first, (first + 2) % size]], device=device)
    model.eval()
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
    model.train(training)
    change = (hidden[0] - hidden[1]).abs().amax(1)
    return bool(change[0] <= 1e-5 * change[1])


def save_reward_model(model: RewardModel, path: str | os.PathLike[str]) -> None:
    """Write the adapters as :func:`lowrank_ops.save_adapter` does, and the head next to them.

    The head's file has the digest of the adapters' tensors. After a kill between the two files the directory is refused
    until the next save.

    Args:
        model: from :func:`reward_model`.
        path: a directory, created if missing. ``reward_head.safetensors`` holds ``score.weight`` [1, H], named and
            shaped as in Hugging Face's sequence classifiers with one label.

    Raises:
        TypeError: model is no RewardModel. OSError: a file cannot be written.
    """
    if not isinstance(model, RewardModel):
        raise TypeError(f"model must be a RewardModel, got {type(model).__name__}")
    directory = Path(path)
    adapted = _has_adapter(model.model)
    if adapted:
        save_adapter(model.model, directory)
    make_folder(directory)
    facts: dict[str, Any] = {"pooling": model.head.pooling, "quantize": model.quantize, "adapter": adapted}
    if adapted:
        facts["tensors"] = _digest(directory / TENSORS)
    metadata = {"format": "pt", "lowrank_ops": json.dumps(facts)}
    write_tensors(directory / HEAD, {"score.weight": model.head.weight.detach()[None]}, metadata)


def load_reward_model(model: nn.Module, path: str | os.PathLike[str], adapter: Adapter | None = None) -> RewardModel:
    """Load a reward model written by :func:`save_reward_model`, onto the base it was made from.

    Args:
        model: the base in its original dense weights; it is quantised and adapted in place.
        path: the directory.
        adapter: the trained kind; needed for a quantised base if the kind changes the base (PiSSA, MiLoRA, LoftQ); otherwise
            the files record it.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit this model.
    """
    file = Path(path) / HEAD
    if not file.is_file():
        raise FileNotFoundError(f"no reward model at {path}: {HEAD} is missing")
    try:
        with safe_open(file, framework="pt") as opened:
            facts = load_json((opened.metadata() or {}).get("lowrank_ops", "null"))
            weight = opened.get_tensor("score.weight")
        pooling, quantize, adapted = facts["pooling"], facts["quantize"], facts["adapter"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a reward head: {error}") from error
    if adapted and facts.get("tensors") not in (None, _digest(Path(path) / TENSORS)):
        raise ValueError(
            f"{file} belongs to another version of the adapter than the one beside it; save the model again"
        )
    base = _base(model)
    if tuple(weight.shape) != (1, base.config.hidden_size) or not torch.isfinite(weight).all():
        raise ValueError(
            f"score.weight in {file} must be finite and [1, {base.config.hidden_size}], got {list(weight.shape)}"
        )
    made = reward_model(model, adapter, quantize, pooling=pooling)
    if adapted or adapter is not None:
        load_adapter(made.model, path)
    made.head.load_state_dict({"weight": weight[0]})
    return made


def _digest(path: Path) -> str | None:
    """sha256 of a file, as hexadecimal digits; None if there is none."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, AdaptedLayer) and module.adapter is not None for module in model.modules())

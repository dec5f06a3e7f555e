"""From the hidden states of a text's tokens to its embedding, as the model's own files ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..files import load_json

MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")


class Normalize(nn.Module):
    """e = v / |v|."""

    def forward(self, v: Tensor) -> Tensor:
        return nn.functional.normalize(v, dim=-1)


class Pooling:
    """e = f(v), where v joins what the modes make of the states h [tokens, hidden] of a text.

    ``cls`` and ``lasttoken`` take the first and the last token, ``max`` the largest numbers, ``mean`` Σ h_t / T,
    ``mean_sqrt_len_tokens`` Σ h_t / √T, and ``weightedmean`` Σ t h_t / Σ t with t from 1.

    Args:
        modes: names as above, in the order in which they are joined.
        after: the modules whose composition is f, such as :class:`Normalize`, linear layers and activations.

    Raises:
        ValueError: a mode has another name, or there is none.
    """

    def __init__(self, modes: Sequence[str] = ("mean",), after: Sequence[nn.Module] | None = None) -> None:
        if not modes or not set(modes) <= set(MODES):
            raise ValueError(f"pooling must be some of {', '.join(MODES)}, got {', '.join(modes) or 'none'}")
        self.modes = tuple(modes)
        self.after = nn.Sequential(*([Normalize()] if after is None else after)).float().requires_grad_(False)

    @classmethod
    def read(cls, directory: Path) -> Pooling:
        """Read what a directory in the format of sentence-transformers asks for; without its files mean and length 1.

        Raises:
            ValueError: a module is none of Transformer, Pooling, Dense and Normalize, or in another order; the pooling has
                an unknown mode; or a Dense is not y = f(W x + b) of the embedding, with f in torch.nn.
            FileNotFoundError: a module's file is missing; weights are read as safetensors only.
        """
        if not (directory / "modules.json").is_file():
            return cls()
        modes, after = ["mean"], list[nn.Module]()
        for module in load_json((directory / "modules.json").read_text()):
            kind = str(module["type"]).rpartition(".")[2]
            if kind == "Pooling" and not after:
                modes = _modes(load_json((directory / module["path"] / "config.json").read_text()))
            elif kind == "Normalize":
                after.append(Normalize())
            elif kind == "Dense":
                after += _dense(directory / module["path"])
            elif kind != "Transformer" or after:
                raise ValueError(
                    f"modules.json asks for {kind}{' after other modules' * bool(after)}; a Transformer, Pooling, and then "
                    "Dense and Normalize can be served"
                )
        return cls(modes, after)

    def size(self, hidden: int) -> int:
        """The numbers of an embedding of a model with so many hidden ones.

        Raises:
            ValueError: a linear layer takes another number.
        """
        size = hidden * len(self.modes)
        for layer in self.after:
            if isinstance(layer, nn.Linear):
                if layer.in_features != size:
                    raise ValueError(f"a Dense module takes {layer.in_features} numbers, and {size} come to it")
                size = layer.out_features
        return size

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings float32 [rows, size] of hidden states [rows, tokens, hidden]; mask [rows, tokens] has ones first."""
        v = torch.cat([self._pool(mode, hidden.float(), mask) for mode in self.modes], -1)
        embeddings: Tensor = self.after.to(v.device)(v)
        return embeddings

    def _pool(self, mode: str, hidden: Tensor, mask: Tensor) -> Tensor:
        if mode == "cls":
            return hidden[:, 0]
        if mode == "lasttoken":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        if mode == "max":
            return hidden.masked_fill(weight == 0, -torch.inf).amax(1)
        if mode == "weightedmean":
            weight = weight * torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=hidden.dtype)[:, None]
        total = weight.sum(1)
        return (hidden * weight).sum(1) / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)


def _modes(config: dict[str, Any]) -> list[str]:
    """The modes of a 1_Pooling/config.json: a name or several, or in older files a flag for each."""
    given = config.get("pooling_mode")
    if given is not None:
        return [given] if isinstance(given, str) else given
    flags = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    names = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
    return [name for flag, name in zip(flags, names, strict=True) if config.get(f"pooling_mode_{flag}")]


def _dense(directory: Path) -> list[nn.Module]:
    """The linear layer and the activation of a Dense module."""
    config = load_json((directory / "config.json").read_text())
    where, _, name = config.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")
    kind = getattr(nn, name, None) if where.startswith("torch.nn") else None
    try:
        activation = kind() if isinstance(kind, type) and issubclass(kind, nn.Module) else None
    except TypeError:  # a layer with sizes
        activation = None
    if activation is None:
        raise ValueError(f"the activation of a Dense module must be one of torch.nn, got {where}.{name}")
    names = {config.get(f"module_{end}_name") for end in ("input", "output")}
    if config.get("use_residual") or not names <= {None, "sentence_embedding"}:
        raise ValueError("a Dense module with a residual, or of something else than the embedding, cannot be served")
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    try:
        weights = load_file(directory / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{directory.name}/model.safetensors is damaged: {error}") from error
    linear.load_state_dict({key.removeprefix("linear."): value for key, value in weights.items()})
    return [linear, activation]

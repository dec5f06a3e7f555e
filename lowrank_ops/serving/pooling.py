"""From the hidden states of a text's tokens to its embedding, as the model's own files ask for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODES = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean")


class Pooling:
    """e = v / |v| or e = v, where v joins what the modes make of the states h [tokens, hidden] of a text.

    ``cls`` and ``lasttoken`` take the first and the last token, ``max`` the largest numbers, ``mean`` Σ h_t / T,
    ``mean_sqrt_len_tokens`` Σ h_t / √T, and ``weightedmean`` Σ t h_t / Σ t with t from 1.

    Args:
        modes: names as above, in the order in which they are joined.
        normalize: divide by the length.

    Raises:
        ValueError: a mode has another name, or there is none.
    """

    def __init__(self, modes: Sequence[str] = ("mean",), normalize: bool = True) -> None:
        if not modes or not set(modes) <= set(MODES):
            raise ValueError(f"pooling must be some of {', '.join(MODES)}, got {', '.join(modes) or 'none'}")
        self.modes, self.normalize = tuple(modes), normalize

    @classmethod
    def read(cls, directory: Path) -> Pooling:
        """Read what a directory in the format of sentence-transformers asks for; without its files mean and length 1.

        Raises:
            ValueError: a module is neither the model, Pooling nor Normalize; or the pooling has an unknown mode.
        """
        if not (directory / "modules.json").is_file():
            return cls()
        modes, normalize = ["mean"], False
        for module in json.loads((directory / "modules.json").read_text()):
            kind = str(module["type"]).rpartition(".")[2]
            if kind == "Pooling":
                modes = _modes(json.loads((directory / module["path"] / "config.json").read_text()))
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise ValueError(f"modules.json asks for {kind}; Transformer, Pooling and Normalize can be served")
        return cls(modes, normalize)

    def size(self, hidden: int) -> int:
        """The numbers of an embedding of a model with so many hidden ones."""
        return hidden * len(self.modes)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings float32 [rows, size] of hidden states [rows, tokens, hidden]; mask [rows, tokens] has ones first."""
        v = torch.cat([self._pool(mode, hidden.float(), mask) for mode in self.modes], -1)
        return nn.functional.normalize(v, dim=-1) if self.normalize else v

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

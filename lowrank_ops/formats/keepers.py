"""Where the bytes of a 4-bit weight are, if its buffers do not hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn


class Keeper(Protocol):
    """What keeps the bytes of a weight where its buffers do not hold them: on the host, on disk, in shards."""

    @property
    def device(self) -> torch.device:
        """Where the weight computes."""

    def read(self) -> Mapping[str, Any]:
        """The buffers by name, brought to that device."""


class Shards:
    """The keeper of a weight whose bytes are Parameters, which torch's fully_shard splits and gathers.

    Args:
        weight: a 4-bit weight, whose buffers of these names become the Parameters.
        name: of its format, for messages.
    """

    gathering = False  # whether a read outside the forward gathers the bytes, in which every process must take part

    def __init__(self, weight: nn.Module, buffers: Sequence[str], name: str) -> None:
        self.weight, self.name = weight, name
        self.dtypes: dict[str, torch.dtype] = {}
        for buffer in buffers:
            tensor = weight._buffers.pop(buffer)
            assert tensor is not None
            self.dtypes[buffer] = tensor.dtype
            # As bytes: a policy of mixed precision would round scales.
            weight.register_parameter(buffer, nn.Parameter(tensor.view(torch.uint8), requires_grad=False))

    @property
    def device(self) -> torch.device:
        return next(self.weight.parameters()).device

    def read(self) -> Mapping[str, Any]:
        read: dict[str, Any] = dict(self.weight._buffers)
        for name, dtype in self.dtypes.items():
            tensor: Any = self.weight._parameters[name]
            if hasattr(tensor, "full_tensor"):  # a DTensor
                if not self.gathering:
                    raise ValueError(
                        f"the bytes of the {self.name} weight are sharded over processes; call the module that "
                        "fully_shard was given, or unshard() it first"
                    )
                tensor = tensor.full_tensor()
            read[name] = tensor.view(dtype)
        return read

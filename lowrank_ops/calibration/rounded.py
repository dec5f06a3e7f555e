"""A block whose layers are rounded for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..adapters.config import WeightConfig
from ..adapters.model import layer_over, replacements_of
from ..adapters.targets import Target
from ..formats import Moment
from .observe import swapped


@contextmanager
def rounded(
    block: nn.Module, config: WeightConfig, layers: Mapping[str, Target], moments: Mapping[str, Moment]
) -> Iterator[None]:
    """Within it the layers of a block are those that the configuration makes of them with these moments."""
    made = {name: layer_over(layer, None, config.format) for name, layer in layers.items()}
    with swapped(block, replacements_of(layers, made)):
        yield

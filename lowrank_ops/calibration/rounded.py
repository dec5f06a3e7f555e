"""A block whose layers are rounded for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from ..adapters.config import WeightConfig
from ..adapters.model import layer_over, replacements_of
from ..adapters.targets import Target, shape_of, target_weight
from ..formats import Moment, Moments, QuantizedWeight
from .observe import swapped


@contextmanager
def rounded(
    block: nn.Module, config: WeightConfig, layers: Mapping[str, Target], moments: Mapping[str, Moment]
) -> Iterator[None]:
    """Within it the layers of a block are those that the configuration makes of them with these moments."""
    dense = {n: layer for n, layer in layers.items() if not isinstance(target_weight(layer), QuantizedWeight)}
    plans = replace(config, calibration=Moments(moments)).roundings({n: shape_of(t) for n, t in dense.items()})
    made = {name: layer_over(layer, None, plans[name]) for name, layer in dense.items()}
    with swapped(block, replacements_of(dense, made)):
        yield

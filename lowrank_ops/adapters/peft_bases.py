"""The base W − s · U₀ D₀ of adapters whose files, written by PEFT, do not hold U₀ and D₀."""

from __future__ import annotations

import dataclasses

from ..formats import QuantizedWeight
from ..svd.store import weight_key
from .kinds import LoRA
from .linear import AdaptedLayer
from .peft_files import Loaded
from .start import Source, changes_base, fingerprint, shift_of
from .targets import Target, target_weight


def complete(loaded: Loaded, layer: Target, has_base: bool) -> None:
    """Add U₀ and D₀ to a PEFT adapter whose base is W − s · U₀ D₀, as PEFT makes them again from W.

    Args:
        has_base: whether the file has the base itself; then the adapter is a LoRA over that.
    """
    kind = loaded.kind
    if not isinstance(kind, LoRA) or not changes_base(kind) or loaded.source is not None:
        return
    if has_base or loaded.embeds:
        loaded.kind = dataclasses.replace(kind, init="kaiming")
        return
    if isinstance(layer, AdaptedLayer) and layer.base_down is not None:
        raise ValueError(
            f"the layer has a base of its own, and the file, which PEFT wrote, is over that which {kind} makes of the "
            "original weight; load it into the dense model"
        )
    weight = target_weight(layer)
    if isinstance(weight, QuantizedWeight) or weight.dim() == 3:
        raise ValueError(
            f"PEFT makes the base of {kind} again from W before it was quantised, which the layer does not hold; load it "
            "into the dense model, or let PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) write a LoRA"
        )
    down, up = shift_of(kind, weight)
    loaded.source = Source(weight_key(weight), fingerprint(down, up))
    loaded.tensors = loaded.tensors | {"base_down": down, "base_up": up}

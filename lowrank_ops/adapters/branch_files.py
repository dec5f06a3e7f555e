"""The branches of a model on disk: a plain LoRA in PEFT's two files, in a folder beside the 4-bit weights.

Every scale is 1, so that PEFT computes W₄ x + U_b (D_b x) over the same weights in bitsandbytes' layers. A branch holds what
one rounding of W lost, so the file has a digest of the codes and scales of each layer, and another base is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..formats.absmax import AbsmaxWeight
from ..functional import LowRankUpdate
from .checkpoint import peft_config
from .expert_files import flatten, peft_names, stacks_of
from .experts import ExpertsLinear
from .kinds import LoRA
from .linear import AdaptedLayer, check_unsplit
from .names import call_named, modules_of
from .peft_files import LORA, OURS, PREFIX, Loaded, check_shapes
from .sources import all_loaded
from .start import record_of
from .versions import read_files, write_files

FOLDER = "branch"
# The key of a quantization_config that says that a folder with branches belongs to the weights.
BRANCH = "lowrank_ops_branch"


def digest_of(weight: QuantizedWeight) -> str:
    """sha256 of the shape, the codes and the decoded scales of W, which say all of its numbers."""
    digest = hashlib.sha256(f"{weight.format.name} {weight.block_size} {list(weight.shape)}\n".encode())
    for matrix in [weight[e] for e in range(weight.experts)] or [weight]:
        scales = matrix._scales() if isinstance(matrix, AbsmaxWeight) else matrix.operand().scales[0]
        for part in (matrix.held()["packed"], scales):
            numbers: Any = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(numbers)
    return digest.hexdigest()


def branched(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers of a model that have a branch, by name."""
    found = {n: m for n, m in modules_of(model).items() if isinstance(m, AdaptedLayer)}
    return {name: layer for name, layer in found.items() if layer.branch is not None}


def write_branches(model: nn.Module, directory: Path) -> bool:
    """Write the branches of a model to a directory as a LoRA that PEFT reads; return whether there are any.

    Experts whose Parameter PEFT cannot adapt make it a file of ours alone.

    Raises:
        ValueError: a layer is split over processes.
    """
    layers = branched(model)
    if not layers:
        return False
    kinds = {name: LoRA(layer.branch.rank, layer.branch.rank) for name, layer in layers.items() if layer.branch}
    stacks = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertsLinear)}
    plain = all(stack.peft_swapped is not None for stack in stacks.values())
    names = peft_names(stacks) if plain else {}
    tensors: dict[str, Tensor] = {}
    records: dict[str, Any] = {}
    for name, layer in layers.items():
        call_named(name, check_unsplit, layer)
        branch, weight = layer.branch, layer.weight
        assert branch is not None and isinstance(weight, QuantizedWeight)
        assert isinstance(branch.down, Tensor) and isinstance(branch.up, Tensor)
        factors = branch.down, branch.up
        if name in names:
            factors = flatten(stacks[name], *factors)
        for key, factor in zip(("down", "up"), factors, strict=True):
            tensors[f"{PREFIX}{names.get(name, name)}.{LORA[key]}"] = factor.detach().contiguous()
        records[name] = record_of(kinds[name], None) | {"base": digest_of(weight)}
    config = peft_config(model, kinds, set(stacks))
    if not plain:
        config = {"peft_type": OURS, "base_model_name_or_path": config["base_model_name_or_path"]}
    write_files(directory, tensors, config, {"format": "pt", "lowrank_ops": json.dumps(records)})
    return True


def read_branches(model: nn.Module, directory: Path) -> None:
    """Put the branches of a directory that :func:`write_branches` wrote beside the 4-bit weights of a model, in place.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are damaged or no branches; a layer is missing, has another shape, or other 4-bit numbers than
            those that the branch was fitted to. The message names the layer, and the model stays unchanged.
    """
    config, contents, records = read_files(directory)
    modules = modules_of(model)
    stacks = stacks_of(modules)
    old, new = _prefixes(model, records, {*modules, *stacks})
    here = {new + name.removeprefix(old): tensors for name, tensors in contents.layers.items()}
    records = {new + name.removeprefix(old): record for name, record in records.items()}
    plan: list[tuple[AdaptedLayer, LowRankUpdate]] = []
    for name, loaded in all_loaded(config, here, records, stacks).items():
        layer = modules.get(name)
        if not isinstance(layer, AdaptedLayer) or not isinstance(layer.weight, QuantizedWeight):
            raise ValueError(f"{directory} has a branch for {name!r}, which is no 4-bit layer of the model")
        plan.append((layer, _branch_over(name, layer.weight, loaded, directory)))
    for layer, branch in plan:
        layer.set_branch(branch)


class BranchFiles:
    """The branches of a directory, for code that has the 4-bit weights one by one and no model of ours.

    Args:
        directory: as :func:`write_branches` wrote it.

    Attributes:
        names: of the layers that have a branch.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_branches`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config, contents, records = read_files(directory)
        self._loaded = all_loaded(config, contents.layers, records, {})
        self.names = set(self._loaded)

    def of(self, name: str, weight: QuantizedWeight) -> LowRankUpdate | None:
        """The branch beside a weight on its device, or None if it has none.

        Raises:
            ValueError: as :func:`read_branches`.
        """
        loaded = self._loaded.get(name)
        return None if loaded is None else _branch_over(name, weight, loaded, self.directory)


def _branch_over(name: str, weight: QuantizedWeight, loaded: Loaded, directory: Path) -> LowRankUpdate:
    if not isinstance(loaded.kind, LoRA) or loaded.kind.dora or loaded.kind.lora_bias:
        raise ValueError(f"{directory} must hold a plain LoRA for {name!r}, got {loaded.kind}")
    check_shapes(name, loaded, *weight.shape)
    if loaded.base != digest_of(weight):
        raise ValueError(
            f"the branch in {directory} was fitted to other 4-bit numbers than layer {name!r} has; it belongs to the "
            "weights that it was saved with"
        )
    down, up = (loaded.tensors[part].to(weight.device) for part in ("down", "up"))
    if loaded.kind.scale != 1:
        up = (up.float() * loaded.kind.scale).to(up.dtype)
    return LowRankUpdate(down, up)


def _prefixes(model: Any, names: Collection[str], modules: Collection[str]) -> tuple[str, str]:
    """What names in a file begin with, and what stands there in this model, which may lack or have a head around it."""
    before = f"{getattr(model, 'base_model_prefix', '')}."
    if before != "." and not any(name in modules for name in names):
        if any(before + name in modules for name in names):
            return "", before
        if any(name.removeprefix(before) in modules for name in names):
            return before, ""
    return "", ""

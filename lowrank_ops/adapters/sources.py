"""Where adapters come from: directories, files and state dicts, read into checked parts by the names of a model's layers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .beside import Beside
from .expert_files import Stacked, read_stacks
from .kinds import LoRA
from .names import call_named
from .peft_files import CONFIG, OURS, Loaded, kind_of, loaded_of
from .state_files import read_state, read_tokens, state_file
from .versions import read_files


def read_adapters(
    directory: Path, modules: Iterable[str], stacks: Mapping[str, Stacked]
) -> tuple[dict[str, Loaded], Beside]:
    """Layer name -> its adapter in a directory, and what is there beside the adapters.

    Args:
        modules: the names of the modules of the model that takes them.
        stacks: its stacks of experts.
    """
    if not (directory / CONFIG).exists() and (state := state_file(directory)) is not None:
        known = {*modules, *stacks}
        return read_state(state, known), Beside(tokens=read_tokens(state, known))
    config, contents, records = read_files(directory)
    if config["peft_type"] == OURS and set(records) != set(contents.layers):
        raise ValueError(f"{directory} does not say of every layer what kind of adapter it has")
    loaded = all_loaded(config, contents.layers, records, stacks)
    for name, of_layer in loaded.items():
        of_layer.embeds = name in contents.embeddings
    return loaded, Beside.of(contents, config)


def all_loaded(
    config: dict[str, Any],
    found: dict[str, dict[str, Tensor]],
    records: Mapping[str, Any],
    stacks: Mapping[str, Stacked],
) -> dict[str, Loaded]:
    """The contents of a file by the names that layers have in the model."""
    kinds: dict[str, LoRA] = {}
    if config["peft_type"] != OURS:
        found, kinds = read_stacks(config, found, stacks, functools.partial(kind_of, config))
    return {
        name: Loaded(kinds[name], tensors)
        if name in kinds
        else call_named(name, loaded_of, config, name, tensors, records.get(name))
        for name, tensors in found.items()
    }

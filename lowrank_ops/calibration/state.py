"""How far a calibration by blocks is: moments and activations, in memory or in a folder from which a later call goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..files import inside, load_json, make_folder, write_tensors, write_text
from ..formats import Moment, Moments

_STATE, _ACTIVATIONS = "state.json", "activations"


class State:
    """The moments of the blocks that are done, and the activations that enter the next one.

    In a folder, the activations of a block are removed after the state that no longer needs them is written.

    Args:
        folder: or None for memory. Files of an earlier calibration with other choices are removed from it.
        choices: what the result depends on, as JSON.

    Attributes:
        done: how many blocks are done.
    """

    def __init__(self, folder: Path | None, choices: Mapping[str, Any]) -> None:
        self._folder, self._choices = folder, load_json(json.dumps(choices))
        self._moments: dict[str, dict[str, Moment]] = {}
        self._held: dict[tuple[int, int], Tensor] = {}
        self._names: list[str] = []
        self.done = 0
        if folder is None:
            return
        known = _read(folder / _STATE)
        if known.get("choices") == self._choices:
            self.done, self._names = int(known["done"]), list(known["names"])
            return
        for name in known.get("names", []):
            self._file(name).unlink(missing_ok=True)
        shutil.rmtree(folder / _ACTIVATIONS, ignore_errors=True)
        make_folder(folder)
        self._write()

    def put(self, block: int, batch: int, x: Tensor) -> None:
        """Keep the input of a block for a batch."""
        if self._folder is None:
            self._held[block, batch] = x
            return
        path = self._activations(block) / f"{batch}.safetensors"
        make_folder(path.parent)
        write_tensors(path, {"x": x})

    def get(self, block: int, batch: int) -> Tensor:
        if self._folder is None:
            return self._held[block, batch]
        return load_file(self._activations(block) / f"{batch}.safetensors")["x"]

    def has(self, name: str) -> bool:
        """Whether the moments of this name were kept."""
        return name in self._names

    def keep(self, name: str, moments: Mapping[str, Moment]) -> None:
        """Keep the moments of a block or of the head."""
        if self._folder is None:
            self._moments[name] = dict(moments)
        else:
            Moments(moments).save(self._file(name))
        self._names = [*self._names, name]

    def complete(self, block: int) -> None:
        """Note that a block is done, and drop the activations that entered it."""
        self.done = block + 1
        if self._folder is None:
            self._held = {place: x for place, x in self._held.items() if place[0] != block}
        else:
            self._write()
            shutil.rmtree(self._activations(block), ignore_errors=True)

    def finish(self) -> Moments:
        """All moments; the activations are dropped."""
        if self._folder is None:
            return Moments({name: m for part in self._moments.values() for name, m in part.items()})
        self._write()
        shutil.rmtree(self._folder / _ACTIVATIONS, ignore_errors=True)
        return Moments({name: m for part in self._names for name, m in Moments.load(self._file(part)).items()})

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return inside(self._folder, f"{name}.safetensors", self._folder / _STATE)

    def _activations(self, block: int) -> Path:
        assert self._folder is not None
        return self._folder / _ACTIVATIONS / str(block)

    def _write(self) -> None:
        assert self._folder is not None
        state = {"choices": self._choices, "done": self.done, "names": self._names}
        write_text(self._folder / _STATE, json.dumps(state, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        known = load_json(path.read_text())
        return known if {"choices", "done", "names"} <= known.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}  # none yet, or none of ours

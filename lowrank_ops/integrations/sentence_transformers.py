"""SentenceTransformerTrainer with adapted models: a checkpoint is read into the model that is being trained.

To resume and to load the best model, the trainer makes a second model from the directory of the checkpoint and copies its
state. The directory of an adapted model has no dense weights for a second model. So the class of an adapted
SentenceTransformer (or CrossEncoder, …) becomes a subclass of the same name, which returns the directory instead.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapters import model as _model
from ..adapters.linear import AdaptedLayer
from ..adapters.peft_files import CONFIG
from ..adapters.state_files import open_state, state_file
from ..files import load_json
from .transformers import load_trained

# The class method by which the trainer makes the second model.
_LOADER = "_load_with_module_classes"


def mark(model: nn.Module) -> None:
    """Make an adapted SentenceTransformer read checkpoints into itself; give a merged one its own class back."""
    kind: Any = type(model)
    ours = any(isinstance(module, AdaptedLayer) for module in model.modules())
    if isinstance(model, _ReadsCheckpoints):
        if not ours:
            model.__class__ = _plain(kind)
    elif ours and kind.__module__.partition(".")[0] == "sentence_transformers" and hasattr(kind, _LOADER):
        model.__class__ = _reading(kind)


_model.AFTER_REPLACING.append(mark)


class _Checkpoint:
    """A directory in the place of a model that was made from it."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def state_dict(self) -> _Checkpoint:
        return self


class _ReadsCheckpoints(nn.Module):
    @classmethod
    def _load_with_module_classes(cls, directory: str, *arguments: Any, **options: Any) -> _Checkpoint:
        return _Checkpoint(directory)

    def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(state_dict, _Checkpoint):
            return super().load_state_dict(state_dict, *arguments, **options)
        directory = state_dict.directory
        if (directory / CONFIG).is_file():  # of the adapter alone
            return load_trained(self, directory)
        return super().load_state_dict(self.state_dict() | _saved_state(self, directory))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (_plain(type(self)),), self.__getstate__()


def _saved_state(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    """The states that the modules of a SentenceTransformer wrote, with the names that the whole model has."""
    state: dict[str, Tensor] = {}
    for entry in load_json((directory / "modules.json").read_text()):
        if (file := state_file(directory / entry["path"])) is None:
            continue  # a module without parameters
        module, (where, read) = model.get_submodule(entry["name"]), open_state(file)
        own = set(module.state_dict())
        # The first module writes the state of the model inside it.
        inside = ["", *(f"{name}." for name, _ in module.named_modules() if name)]
        before = max(inside, key=lambda before: sum(before + key in own for key in where))
        state |= {f"{entry['name']}.{before}{key}": read(key) for key in where}
    return state


def _plain(kind: type) -> Any:
    """The library's class behind a subclass of :func:`_reading`."""
    return kind.__mro__[2]


@functools.cache
def _reading(kind: type) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_ReadsCheckpoints, kind), names)


def _empty(kind: type) -> Any:
    """The empty model that copy and pickle fill."""
    reading = _reading(kind)
    return reading.__new__(reading)

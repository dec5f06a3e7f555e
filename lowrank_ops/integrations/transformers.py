"""transformers: checkpoints of the adapter alone for Trainer and the trainers that derive from it, and ties of weights."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..adapters import model as _model
from ..adapters.beside import trained_beside
from ..adapters.checkpoint import load_adapter, write_adapter
from ..adapters.expert_files import stacks_of
from ..adapters.kinds import described, same_meaning
from ..adapters.linear import AdaptedLayer
from ..adapters.names import modules_of
from ..adapters.peft_files import CONFIG
from ..adapters.sharded import is_sharded
from ..adapters.sources import read_adapters
from ..calibration.blocks import OPENERS
from ..files import replacing
from ..formats import QuantizedWeight

# The file of older checkpoints for parameters that are trained beside the adapters, such as a head.
BESIDE = "trained_beside.safetensors"


class AdapterCheckpoints:
    """Makes a trainer write, resume from and select checkpoints that hold the trained parameters only, not the base.

    Put it before the trainer's class::

        class Trainer(AdapterCheckpoints, SFTTrainer):
            pass

    and use the class like the trainer's own; ``save_strategy``, ``resume_from_checkpoint``, ``load_best_model_at_end``
    and ``save_model`` keep their meaning. It is tested with transformers' Trainer, TRL's trainers and
    SentenceTransformerTrainer. The trainer handles a model without adapters of ours by itself.

    A checkpoint has the files of :func:`lowrank_ops.save_adapter`, which hold the other trained parameters and the
    statistics of batch normalisation too, so :func:`lowrank_ops.load_adapter` opens it (and PEFT where all layers have a
    LoRA); and the trainer's own files: the states of optimizer, scheduler and random numbers.

    A checkpoint with adapters of another kind, rank or scale is refused, and so is saving adapters that DeepSpeed or
    FullyShardedDataParallel (FSDP1) has sharded. The trainer reads a checkpoint of a whole model by itself.
    """

    model: Any
    args: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not _adapted(self.model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        directory = Path(output_dir or self.args.output_dir)
        if self.args.should_save or is_sharded(self.model):  # all processes take part in gathering
            save_trained(self.model, directory)
        if not self.args.should_save:
            return
        tokenizer = getattr(self, "processing_class", None) or getattr(
            getattr(self, "data_collator", None), "tokenizer", None
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        with replacing(directory / "training_args.bin") as scratch:
            torch.save(self.args, scratch)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *arguments: Any, **options: Any) -> None:
        if _adapted(self.model) and os.path.isfile(os.path.join(resume_from_checkpoint, CONFIG)):
            load_trained(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *arguments, **options)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = getattr(self, "state").best_model_checkpoint  # noqa: B009  (a trainer's attribute)
        if _adapted(self.model) and os.path.isfile(os.path.join(best, CONFIG)):
            load_trained(self.model, Path(best))
        else:
            super()._load_best_model()  # type: ignore[misc]


def save_trained(model: nn.Module, directory: Path) -> None:
    """Write the adapters of a model and the other parameters that are trained."""
    write_adapter(model, directory)
    (directory / BESIDE).unlink(missing_ok=True)


def load_trained(model: nn.Module, directory: Path) -> None:
    """Read a directory of :func:`save_trained` into a model that trains the same parameters.

    Raises:
        ValueError: the model trains other parameters, or adapters of another kind, rank or scale; it stays unchanged.
    """
    modules = modules_of(model)
    layers = {name: m.adapter for name, m in modules.items() if isinstance(m, AdaptedLayer)}
    found, beside, _ = read_adapters(directory, modules, stacks_of(modules))
    for name, loaded in found.items():
        mine = layers.get(name)
        if mine is None or not same_meaning(mine, loaded.kind):
            raise ValueError(f"checkpoint: {described(loaded.kind)}, model: {described(mine)} (layer {name!r})")
    file = directory / BESIDE
    older = load_file(file) if file.is_file() else {}
    ours, theirs = trained_beside(model), beside.tensors | older
    shapes, own = ({name: list(t.shape) for name, t in tensors.items()} for tensors in (theirs, ours.tensors))
    needed = ours.trained | beside.trained | older.keys()
    if different := [name for name in sorted(needed) if shapes.get(name) != own.get(name)]:
        name = different[0]
        raise ValueError(
            f"beside the adapters the checkpoint trains {len(beside.trained | older.keys())} tensors and the model "
            f"{len(ours.trained)}, of which {len(different)} differ: {name!r} is {shapes.get(name, 'missing')} there and "
            f"{own.get(name, 'missing')} here"
        )
    load_adapter(model, directory)
    with torch.no_grad():
        for name, tensor in older.items():
            ours.tensors[name].copy_(tensor)


def untie(model: nn.Module) -> None:
    """Drop the ties of weights that replacing layers has cut, so that ``tie_weights()`` leaves the new layers as they are.

    A head that is tied to the embedding and then quantised, or merged, has a weight of its own. Without this,
    ``tie_weights``, which ``resize_token_embeddings`` and other libraries call, would put the embedding in its place.
    """
    for module in model.modules():
        state: dict[str, Any] = vars(module)
        tied = state.get("all_tied_weights_keys")
        if not isinstance(tied, dict):
            continue
        kept = {target: source for target, source in tied.items() if not _is_cut(module, target, source)}
        if len(kept) == len(tied):
            continue
        named: Any = getattr(module, "_tied_weights_keys", None) or {}
        # Patterns are replaced by the names that they stood for.
        literal = named.keys() <= tied.keys()
        state["all_tied_weights_keys"] = kept
        state["_tied_weights_keys"] = {key: kept[key] for key in named if key in kept} if literal else kept


def _is_cut(model: nn.Module, target: str, source: str) -> bool:
    """Whether two names of one tensor now mean two."""
    sides = []
    for path in (target, source):
        parent, _, name = path.rpartition(".")
        try:
            sides.append(getattr(model.get_submodule(parent), name))
        except AttributeError:  # such as a layer without a weight
            return True
    first, second = sides
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        # A 4-bit weight that two layers share is no Parameter, which transformers could tie.
        return first is not second or isinstance(first, QuantizedWeight)
    # On the meta device all addresses are 0: what a loader fills later is tied then.
    return first is not second and first.data_ptr() != second.data_ptr()


_model.AFTER_REPLACING.append(untie)


def _open_directory(path: Path, device: torch.device) -> Any:
    """The model of a directory for calibration block by block; None without transformers."""
    if find_spec("transformers") is None:
        return None
    from .transformers_blocks import Directory

    return Directory(path, device)


OPENERS.append(_open_directory)

# The module of transformers after whose import its from_pretrained and save_pretrained can know our layers.
_LOADS = "transformers.modeling_utils"


def follow_import() -> None:
    """Register ``transformers_loading`` with transformers, at once or when a program imports it."""
    if _LOADS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Follower())


class _Follower(MetaPathFinder):
    """Finds one module as the other finders do, and acts after its import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _LOADS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from .transformers_loading import register

        register()
    except (ImportError, AttributeError, ValueError) as error:  # must not keep transformers from being imported
        from transformers import __version__ as version

        warnings.warn(
            f"lowrank_ops cannot load or save 4-bit models with transformers {version} ({error}); its layers work as ever. "
            "Versions 5.20 to 5.24 are tested",
            RuntimeWarning,
            stacklevel=2,
        )


def _adapted(model: nn.Module) -> bool:
    return any(isinstance(m, AdaptedLayer) and m.adapter is not None for m in model.modules())

"""The files of a transformers model: headers of safetensors, the quantization_config, and directories written as a whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..adapters.branch_files import BRANCH, FOLDER
from ..adapters.config import WeightConfig
from ..adapters.conv import Convolution
from ..adapters.embedding import Embedding
from ..adapters.experts import ExpertsLinear
from ..adapters.foreign import is_conv1d
from ..adapters.frozen import is_plain_linear
from ..adapters.linear import AdaptedLayer, Linear
from ..adapters.peft_files import CONFIG, TENSORS
from ..adapters.start import RECORD
from ..adapters.state_files import state_file
from ..files import exclusive, flush, flush_all, load_json, make_folder, move, scratch_folder
from ..formats import MARKS, QuantizedWeight

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MODEL_CONFIG = "config.json"
# The weights of a model, whole or in shards, and their index.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class Entry(NamedTuple):
    """Where a tensor is and what its header says."""

    file: Path
    dtype: str
    shape: list[int]


class Files:
    """The safetensors files of a model; files in other formats are left to transformers.

    Args:
        paths: the files.

    Raises:
        ValueError: a file is damaged; the message names it.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self.paths = [Path(path) for path in paths]
        self.entries: dict[str, Entry] = {}
        for path in self.paths:
            if path.suffix == ".safetensors":
                self.entries |= {key: Entry(path, *entry) for key, entry in read_header(path).items()}

    def __str__(self) -> str:
        return f"the files in {self.paths[0].parent}" if self.paths else "the tensors given"

    def quantized(self) -> set[str]:
        """The names of the 4-bit weights."""
        marks = tuple(MARKS.values())
        ends = [(key, mark) for key in self.entries for mark in marks if key.endswith(mark)]
        return {key.removesuffix(mark) for key, mark in ends}

    def check_quantized(self, endings: Iterable[str]) -> None:
        """Raise ValueError if a 4-bit weight has entries beside those with the endings."""
        names, known, adapters = self.quantized(), set(endings), self.adapters()
        for key, entry in self.entries.items():
            if key in adapters:  # of a stack of experts, whose weight is named as the layer
                continue
            name = next((key[:at] for at in _points(key) if key[:at] in names), None)
            if name is not None and key.removeprefix(name) not in known:
                raise ValueError(
                    f"{entry.file}: {key!r} is no entry of a 4-bit weight, and what it means for {name!r} is unknown"
                )

    def state(self) -> Path | None:
        """The file, or the index of files, with the adapters of ours that were saved with the model, if any."""
        return state_file(self.paths[0].parent) if self.adapters() else None

    def adapted(self) -> set[str]:
        """The names of the layers with adapters of ours that were saved with the model."""
        return {key.removesuffix("." + RECORD) for key in self.entries if key.endswith("." + RECORD)}

    def adapters(self) -> set[str]:
        """The keys of adapters of ours that were saved with the model."""
        layers = self.adapted()
        parts = ("weight", "bias")
        return {
            key
            for key in self.entries
            for at in _points(key)
            if key[:at] in layers and key[at + 1 :].partition(".")[0] not in parts
        }

    def storage_dtypes(self) -> set[torch.dtype]:
        """The floating dtypes as which bytes of 4-bit weights are stored."""
        stored = {self.entries[name].dtype for name in self.quantized() if name in self.entries}
        return {_FLOATS[name] for name in stored if name in _FLOATS}

    def check_dense(self) -> None:
        """Raise ValueError if a matrix is not a plain float tensor: another method of quantisation stored it."""
        for key, (file, dtype, shape) in self.entries.items():
            if key.endswith("weight") and len(shape) > 1 and dtype not in _FLOATS:
                raise ValueError(
                    f"{file}: {key!r} is stored as {dtype}, which another method of quantisation wrote; config.json has no "
                    "quantization_config for it. Quantise the dense original of the model"
                )

    def origin(self, name: str) -> str:
        """The file and the key of a parameter, for messages."""
        key = self._key(name)
        return f"{self if key is None else self.entries[key].file}: {name!r}"

    def hold(self, name: str) -> bool:
        """Tell whether the files have a tensor for a parameter."""
        return self._key(name) is not None

    def _key(self, name: str) -> str | None:
        tails = [name, *(name[at + 1 :] for at in _points(name))]
        return next((tail for tail in tails if tail in self.entries), None)


def _points(key: str) -> list[int]:
    return [i for i, letter in enumerate(key) if letter == "."]


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Key -> (dtype, shape) of a safetensors file, whose size is checked.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header should have {length} bytes and the file has {size}")
            header = load_json(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != 8 + length + end:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
        return {key: (entry["dtype"], entry["shape"]) for key, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy or download it again") from error


def names_in_model(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Key in files -> the name that the model has for the tensor; matrices of experts keep their numbers."""
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    prefix, state = model.base_model_prefix, model.state_dict()
    return {key: rename_source_key(key, renamings, [], prefix, state)[0] for key in keys}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The quantization_config of a model with layers of ours, as bitsandbytes' users load it; None without such a layer.

    Layers that stay dense are listed, so that every other linear layer is known to have 4 bits. Where bitsandbytes can read
    no weight, because they are in MXFP4 or dense, or not all, because one is in int8, an embedding or a convolution, only
    lowrank_ops is named.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    weights = [m.weight for m in layers.values() if isinstance(m.weight, QuantizedWeight)]
    if not weights and all(layer.adapter is None for layer in layers.values()):
        return None
    formats = {weight.format.name for weight in weights}
    beside = {BRANCH: True} if any(layer.branch is not None for layer in layers.values()) else {}
    if formats == {"mxfp4"} and all(isinstance(m, ExpertsLinear) for m in layers.values()):  # as gpt-oss is published
        plain = [name for name, m in model.named_modules() if is_plain_linear(m)]
        return {"quant_method": "mxfp4", "modules_to_not_convert": plain, WeightConfig.quant_method: True} | beside
    foreign = any(is_4bit_embedding(m) or isinstance(m, Convolution) for m in layers.values())
    if not formats <= {"nf4", "fp4"} or not formats or foreign:
        kind = "mxfp4" if "mxfp4" in formats else max(formats - {"int8"}, default="nf4")
        return {"quant_method": WeightConfig.quant_method, "format": kind} | beside
    dense = [name for name, m in model.named_modules() if is_plain_linear(m) or is_conv1d(m)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": max(formats),
        "bnb_4bit_use_double_quant": weights[0].double_quant,
        "bnb_4bit_compute_dtype": str(weights[0].dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense + [n for n, m in layers.items() if not isinstance(m.weight, QuantizedWeight)],
        WeightConfig.quant_method: True,  # who wrote it; bitsandbytes ignores it
    } | beside


def is_4bit_embedding(module: object) -> bool:
    return isinstance(module, Embedding) and isinstance(module.weight, QuantizedWeight)


def dense_conv1d(model: nn.Module) -> set[str]:
    """The keys of dense weights that layers without an adapter have transposed, and files have as Conv1D does.

    Layers with an adapter keep theirs, [N, K], as trainers read such files into the model that they train.
    """
    return {
        f"{name}.weight"
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, Linear) and m.transposed and m.adapter is None and isinstance(m.weight, nn.Parameter)
    }


def surplus_entries(model: nn.Module) -> set[str]:
    """The keys of a state dict that a file of the weights is not to have: of branches, which have files of their own, and of
    the 4-bit weight of an embedding a second time, for what is tied to it."""
    layers = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, AdaptedLayer)]
    branches = {f"{n}.{part}" for n, m in layers if m.branch is not None for part in ("branch_down", "branch_up")}
    first: dict[int, str] = {}
    for name, layer in layers:
        if is_4bit_embedding(layer):
            first.setdefault(id(layer.weight), name)
    return branches | {
        key
        for name, layer in layers
        if isinstance(layer.weight, QuantizedWeight) and first.get(id(layer.weight), name) != name
        for key in layer.weight._entries(f"{name}.weight")
    }


@contextmanager
def configured(model: Any, description: dict[str, Any] | None) -> Iterator[None]:
    """Within it the model's configuration says how the model is saved: in 4 bits, and with no tie that was cut.

    None, of a model without a layer of ours, changes nothing.
    """
    if description is None:
        yield
        return
    config = model.config
    configs = {id(c): c for c in (config, config.get_text_config())}.values()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    cut = isinstance(head, AdaptedLayer) and not (head.weight is table.weight and is_4bit_embedding(table))
    untied = [c for c in configs if cut and getattr(c, "tie_word_embeddings", False)]
    before = vars(config).get("quantization_config")
    try:
        config.quantization_config = description
        for c in untied:
            c.tie_word_embeddings = False
        yield
    finally:
        if before is None:
            del config.quantization_config
        else:
            config.quantization_config = before
        for c in untied:
            c.tie_word_embeddings = True


@contextmanager
def save_whole(directory: Path) -> Iterator[Path]:
    """Yield an empty directory to write to, whose files move into ``directory`` once all are complete.

    After an error ``directory`` is as it was. Where it has a model already, its config.json goes first and the new one comes
    last, so that after a kill while files move there is no model to load rather than a mixed one. Weights of an earlier
    model in it, and their branches, are removed.

    Raises:
        OSError: the disk is full, or the like; the message names the directory.
    """
    try:
        with scratch_folder(directory) as scratch:
            yield scratch
            flush_all(scratch)
            make_folder(directory)
            with exclusive(directory):
                _move_all(scratch, directory)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{directory} was not written and is as it was before: {error}") from error


def _move_all(scratch: Path, directory: Path) -> None:
    files = sorted(path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file())
    last = Path(MODEL_CONFIG)
    weights = any(_WEIGHTS.fullmatch(str(file)) for file in files)
    if weights and last in files:
        invalidate(directory)
    for file in sorted(files, key=lambda file: (file == last, file)):
        if file == last:
            if weights:
                _remove_older(directory, files)
            flush(directory)
        make_folder((directory / file).parent)
        move(scratch / file, directory / file)
    if weights and last not in files:
        _remove_older(directory, files)


def invalidate(directory: Path) -> None:
    """Remove config.json, without which nobody takes the files of a directory for a model."""
    if (directory / MODEL_CONFIG).exists():
        (directory / MODEL_CONFIG).unlink()
        flush(directory)


def _remove_older(directory: Path, files: list[Path]) -> None:
    """Remove weights and branches that are not among the new files."""
    for path in directory.iterdir():
        if _WEIGHTS.fullmatch(path.name) and Path(path.name) not in files:
            path.unlink()
    if not any(file.parts[0] == FOLDER for file in files):
        for name in (CONFIG, TENSORS):
            (directory / FOLDER / name).unlink(missing_ok=True)

"""A directory of a transformers model to 4 bits, file by file: what ``lowrank-ops quantize`` does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..adapters.config import WeightConfig
from ..adapters.foreign import is_conv1d
from ..adapters.linear import Linear
from ..formats import QuantizedWeight
from .transformers_files import Files, configured, describe

# What is known of files that are done, and the error of every layer.
REPORT = "quantization.json"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)


def quantize_directory(
    source: Path,
    out: Path,
    config: WeightConfig,
    device: torch.device | str = "cpu",
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Write a model in 4 bits, with the tensors and the config.json that ``save_pretrained`` of the loaded model writes.

    Each file of the source becomes a file of the same name, so memory holds one file in 4 bits and one dense weight. A file
    that a call with the same choices has completed is not made again; other files of the directory, such as the
    tokenizer's, are copied. A model with stacks of experts is read and saved as a whole, in 4 bits, without a report.

    Args:
        source: a directory with config.json and safetensors files of dense weights.
        out: the directory to write to.
        config: the format and the layers.
        device: where to quantise.
        advance: is called with the name of each layer that is done.

    Returns:
        ‖W − W₄‖ / ‖W‖, in the Frobenius norm, of every layer by name; ``quantization.json`` in ``out`` has it too.

    Raises:
        FileNotFoundError: config.json or the safetensors files are missing.
        ValueError: a file is damaged or has 4 bits already, a layer's weight is missing or not finite; the message names the
            file and the tensor.
    """
    paths = _paths(source)
    if source.resolve() == out.resolve():
        raise ValueError(f"out must be another directory than the model's, got {out}")
    files = Files(paths)
    if quantized := files.quantized():
        raise ValueError(f"{files.origin(min(quantized))} has 4 bits already; quantise the dense original")
    files.check_dense()
    model = _build(source)
    chosen = config.choose(model)
    layers = {f"{name}.weight": layer for name, layer in chosen.items() if isinstance(layer, nn.Module)}
    if len(layers) < len(chosen):  # matrices of one expert may be in several files
        reading = type(model).from_pretrained(source, quantization_config=config, local_files_only=True)
        reading.save_pretrained(out)
        _copy_others(source, out)
        return {}
    names = _Names(model)
    found = {names.of(key) for key in files.entries}
    if missing := sorted(layers.keys() - found - names.tied):
        raise ValueError(
            f"{files} lack {len(missing)} weights to quantise: {', '.join(missing[:3])}{', …' * (len(missing) > 3)}; leave "
            "them out with skip, or, if transformers joins them from several tensors, use from_pretrained with "
            "quantization_config and save_pretrained"
        )
    out.mkdir(parents=True, exist_ok=True)
    report = _Report(out / REPORT, {**config.to_dict(), "weights": sorted(layers)})
    for path in paths:
        if not report.has(path, out / path.name):
            errors: dict[str, float] = {}
            tensors = _convert(path, names, layers, config, device, errors, advance)
            _save(dict(tensors), out / path.name)
            report.add(path, errors)
        else:
            for name in report.errors(path):
                advance(name)
    for name, layer in layers.items():  # the description needs their classes only
        weight = config.quantize(torch.zeros(1, 64, dtype=layer.weight.dtype))  # type: ignore[arg-type]
        model.set_submodule(name.removesuffix(".weight"), Linear.from_weight(weight))
    _finish(source, out, model, [path.name for path in paths])
    return report.all()


def layer_names(source: Path, config: WeightConfig) -> list[str]:
    """The names of the layers that :func:`quantize_directory` quantises."""
    _paths(source)
    return list(config.choose(_build(source)))


def _paths(source: Path) -> list[Path]:
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} is not a Hugging Face model directory: it has no config.json")
    single, index = source / "model.safetensors", source / _INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"{source} has neither {single.name} nor {index.name}; load the model with transformers and save it again"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    if missing := [name for name in names if not (source / name).is_file()]:
        raise FileNotFoundError(f"{source} is incomplete: {index.name} names {missing[0]}, which is missing")
    return [source / name for name in names]


def _build(source: Path) -> Any:
    """The model without memory."""
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source / 'config.json'} has a quantization_config: the model is quantised already")
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    make = kind._from_config if kind is not None else transformers.AutoModel.from_config
    with torch.device("meta"):
        return make(config, dtype=config.dtype or torch.float32)


class _Names:
    """The names of the tensors in files as the model has them."""

    def __init__(self, model: Any) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.state: dict[str, Tensor] = model.state_dict()
        self.tied = set(model.all_tied_weights_keys)

    def of(self, key: str) -> str | None:
        """The model's name of a tensor; None if it has none of its own."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.state)
        return name if pattern is None and name in self.state and name not in self.tied else None


def _convert(
    path: Path,
    names: _Names,
    layers: dict[str, nn.Module],
    config: WeightConfig,
    device: torch.device | str,
    errors: dict[str, float],
    advance: Callable[[str], None],
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file of the result."""
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                name = names.of(key)
                if name is None:
                    continue
                tensor: Tensor = file.get_tensor(key)
                if tensor.is_floating_point():
                    tensor = tensor.to(names.state[name].dtype)
                if name not in layers:
                    yield key, tensor
                    continue
                try:
                    dense = tensor.to(device)
                    dense = dense.t() if is_conv1d(layers[name]) else dense
                    weight = config.quantize(dense)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}: {key!r}: {error}") from error
                layer = name.removesuffix(".weight")
                errors[layer] = _error(dense, weight)
                yield from weight.to("cpu")._entries(key).items()
                advance(layer)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _error(dense: Tensor, weight: QuantizedWeight) -> float:
    w = dense.float()
    lost = weight.dequantize(torch.float32).sub_(w)
    return float(lost.norm() / w.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    scratch = path.with_name(f".{path.name}.new")
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, scratch, metadata={"format": "pt"})
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} was not written: {error}; the same command goes on from there") from error
    finally:
        scratch.unlink(missing_ok=True)


class _Report:
    """``quantization.json``: the choices, and for each source file its size, its time and the errors of its layers."""

    def __init__(self, path: Path, choices: dict[str, Any]) -> None:
        self._path, self._known = path, {"choices": json.loads(json.dumps(choices)), "files": {}}
        try:
            before = json.loads(path.read_text())
            if before["choices"] == self._known["choices"] and isinstance(before["files"], dict):
                self._known = before
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or of other choices

    def has(self, source: Path, made: Path) -> bool:
        entry = self._known["files"].get(source.name)
        return entry is not None and entry["source"] == _stamp(source) and made.is_file()

    def add(self, source: Path, errors: dict[str, float]) -> None:
        self._known["files"][source.name] = {"source": _stamp(source), "errors": errors}
        scratch = self._path.with_name(f".{self._path.name}.new")
        scratch.write_text(json.dumps(self._known, indent=1) + "\n")
        scratch.replace(self._path)

    def errors(self, source: Path) -> dict[str, float]:
        errors: dict[str, float] = self._known["files"][source.name]["errors"]
        return errors

    def all(self) -> dict[str, float]:
        return {name: error for entry in self._known["files"].values() for name, error in entry["errors"].items()}


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def _finish(source: Path, out: Path, model: Any, names: list[str]) -> None:
    """Write what belongs to the weights: the index, config.json, and copies of other files."""
    if names != ["model.safetensors"]:
        entries = Files([out / name for name in names]).entries
        size = sum((out / name).stat().st_size for name in names)
        index = {
            "metadata": {"total_size": size},
            "weight_map": {key: e.file.name for key, e in sorted(entries.items())},
        }
        (out / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    _copy_others(source, out)
    description = describe(model)
    assert description is not None
    model.config.architectures = [type(model).__name__]
    with configured(model, description):
        model.config.save_pretrained(out)


def _copy_others(source: Path, out: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHTS):
            shutil.copy2(path, out / path.name)

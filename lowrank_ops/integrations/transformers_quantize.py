"""A directory of a transformers model to 4 bits, file by file: what ``lowrank-ops quantize`` does."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..adapters.branch_files import FOLDER, write_branches
from ..adapters.config import WeightConfig
from ..adapters.experts import ExpertsLinear, Stack, layout_of, stand_in
from ..adapters.foreign import is_conv1d
from ..adapters.linear import Linear
from ..adapters.rounding import RoundingPlan
from ..adapters.targets import shape_of
from ..files import (
    copy_file,
    exclusive,
    inside,
    load_json,
    make_folder,
    remove_scratch,
    replacing,
    write_tensors,
    write_text,
)
from ..formats import QuantizedWeight
from ..functional import LowRankUpdate
from .transformers_files import MODEL_CONFIG, Files, configured, describe, invalidate
from .transformers_stacks import experts_in, join_expert, joins_matrices, published_entries

# What is known of files that are done, and the error of every layer.
REPORT = "quantization.json"
# A folder for branches until the model is complete.
_BRANCHES = "branches.new"
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
    text: str = "",
) -> dict[str, float]:
    """Write a model in 4 bits, with the tensors and the config.json that ``save_pretrained`` of the loaded model writes.

    Each file of the source becomes a file of the same name, so memory holds one file in 4 bits and one dense weight. A file
    that a call with the same choices has completed is not made again; other files of the directory, such as the
    tokenizer's, are copied. Experts are quantised one at a time, each joined from its matrices as the model has it,
    whichever file these are in. Where transformers does more to experts than to join them, or an embedding or a head that
    is tied to one is to have 4 bits, the model is read and saved as a whole, in 4 bits, without a report. Branches of the
    configuration are kept in the folder ``branch``; to write it, the 4-bit model is read at the end.

    Args:
        source: a directory with config.json and safetensors files of dense weights.
        out: the directory to write to.
        config: the format, the layers, and the calibration if it has one.
        device: where to quantise.
        advance: is called with the name of each layer that is done.
        text: what tells the calibration's text from another one; files made with another one are made again.

    Returns:
        ‖W − W₄‖ / ‖W‖, in the Frobenius norm, of every layer by name, and of every expert of a stack by the stack's name, a
        point and the expert's number; of a layer with moments ‖(W − W₄ − U_b D_b) H^½‖ / ‖W H^½‖. ``quantization.json`` in
        ``out`` has it too.

    Raises:
        FileNotFoundError: config.json or the safetensors files are missing.
        ValueError: a file is damaged or has 4 bits already, a layer's weight is missing or not finite, or its moments are
            missing or of another model; the message names the file and the tensor.
    """
    if config.compensate_bytes is not None:
        raise ValueError(
            "compensate_bytes needs the model as a whole: use from_pretrained with the configuration, then save_pretrained; "
            "or give compensate, a rank for each layer"
        )
    paths = _paths(source)
    _check_out(source, out)
    files = Files(paths)
    if quantized := files.quantized():
        raise ValueError(f"{files.origin(min(quantized))} has 4 bits already; quantise the dense original")
    files.check_dense()
    model = _build(source)
    chosen = config.choose(model)
    layers = {f"{name}.weight": layer for name, layer in chosen.items() if isinstance(layer, nn.Module)}
    names = _Names(model)
    stacks = _Stacks({name: layer for name, layer in chosen.items() if isinstance(layer, Stack)}, names, files)
    # A tensor of an embedding may stand for a head too, whose tie is kept or cut; a kernel is not a matrix.
    whole = nn.Embedding | nn.Conv1d | nn.Conv2d
    ties = any(name in names.tied or isinstance(layer, whole) for name, layer in layers.items())
    if ties or not stacks.joined_alone():
        reading = type(model).from_pretrained(source, quantization_config=config, local_files_only=True)
        reading.save_pretrained(out)
        _copy_others(source, out)
        return {}
    found = {names.of(key)[0] for key in files.entries}
    if missing := sorted((layers.keys() - found) | stacks.missing()):
        raise ValueError(
            f"{files} lack {len(missing)} weights to quantise: {', '.join(missing[:3])}{', …' * (len(missing) > 3)}; leave "
            "them out with skip, or, if transformers joins them from several tensors, use from_pretrained with "
            "quantization_config and save_pretrained"
        )
    make_folder(out)
    with exclusive(out, wait=False) as free:
        if free is False:
            raise OSError(f"{out} is being written by another process or thread")
        remove_scratch(out)
        report = _report(out, config, [*layers, *stacks.stacks], text)
        complete = all(report.has(path, out / path.name) for path in paths)
        shapes, in_int8 = {name: shape_of(t) for name, t in chosen.items()}, config.in_int8(model)
        if complete and config.compensate is not None and (out / MODEL_CONFIG).is_file() and (out / FOLDER).is_dir():
            shutil.rmtree(out / _BRANCHES, ignore_errors=True)
            return report.all()
        invalidate(out)  # until all files belong together
        plans = {} if complete else config.roundings(shapes, in_int8)  # whose moments may be gone
        for path in paths:
            if not report.has(path, out / path.name):
                job = _Job(names, layers, stacks, plans, config, device, advance)
                _save(dict(job.convert(path)), out / path.name)
                if job.branches:
                    make_folder(out / _BRANCHES)
                    _save(job.branches, out / _BRANCHES / path.name)
                report.add(path, job.errors)
            else:
                for name in report.errors(path):
                    advance(name)
        # The description needs the classes of layers only.
        zeros = torch.zeros(1, 64, dtype=model.dtype)
        weight = config.quantize(zeros)
        for name in chosen.keys() - stacks.stacks.keys():
            of_layer = config.plan(name in in_int8).keep(zeros).weight
            assert isinstance(of_layer, QuantizedWeight)
            model.set_submodule(name, Linear.from_weight(of_layer))
        experts = type(weight).stack([weight])
        for path_of_block, block in list(model.named_modules()):
            own = {stack.matrix.name for stack in stacks.stacks.values() if stack.block is block}
            if own and (layout := layout_of(block)) is not None:
                dense = torch.zeros(1, 1, 64)
                weights = {matrix.name: experts if matrix.name in own else dense for matrix in layout.matrices}
                made = {name: ExpertsLinear.from_weight(w, quantize=None) for name, w in weights.items()}
                model.set_submodule(path_of_block, stand_in(block, made))
        _finish(source, out, model, [path.name for path in paths])
        if config.compensate is None:
            shutil.rmtree(out / FOLDER, ignore_errors=True)  # beside other 4-bit numbers it would be wrong
            _save_config(model, out)
        else:
            _write_branches(out, model)
        return report.all()


def is_complete(source: Path, out: Path, config: WeightConfig, text: str = "") -> bool:
    """Whether :func:`quantize_directory` with these choices has no layer left to quantise.

    Raises:
        ValueError: ``out`` is ``source``; the rank of the branch is above min(N, K) of a layer.
    """
    _check_out(source, out)
    chosen = config.choose(_build(source))
    if config.unseen == "refuse":  # otherwise a layer that saw no token needs no branch
        config.check_ranks({name: shape_of(t) for name, t in chosen.items() if not isinstance(t, nn.Embedding)})
    weights = [name if isinstance(layer, Stack) else f"{name}.weight" for name, layer in chosen.items()]
    report = _report(out, config, weights, text)
    return all(report.has(path, out / path.name) for path in _paths(source))


def _check_out(source: Path, out: Path) -> None:
    if source.resolve() == out.resolve():
        raise ValueError(f"out must be another directory than the model's, got {out}")


def _report(out: Path, config: WeightConfig, weights: list[str], text: str) -> _Report:
    return _Report(out / REPORT, {**config.to_dict(), "weights": sorted(weights), "text": text})


def _write_branches(out: Path, made: Any) -> None:
    """Read the 4-bit model that was written, and write the branches of its layers and config.json beside it.

    made: the model of that configuration, without memory.
    """
    parts: dict[str, Tensor] = {}
    for path in sorted((out / _BRANCHES).glob("*.safetensors")):
        parts |= load_file(path)
    with _described(made):
        model = type(made).from_pretrained(out, config=made.config, local_files_only=True)
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear | ExpertsLinear):
            continue
        names = [f"{name}.{e}" for e in range(layer.num_experts)] if isinstance(layer, ExpertsLinear) else [name]
        if f"{names[0]}.down" in parts:
            down, up = (torch.stack([parts[f"{each}.{part}"] for each in names]) for part in ("down", "up"))
            stacked = isinstance(layer, ExpertsLinear)
            layer.set_branch(LowRankUpdate(down, up) if stacked else LowRankUpdate(down[0], up[0]))
    write_branches(model, out / FOLDER)
    _save_config(model, out)
    shutil.rmtree(out / _BRANCHES)


def layer_names(source: Path, config: WeightConfig) -> list[str]:
    """The names of the layers that :func:`quantize_directory` quantises."""
    _paths(source)
    chosen = config.choose(_build(source))
    experts = (
        f"{name}.{e}" for name, layer in chosen.items() if isinstance(layer, Stack) for e in range(layer.shape[0])
    )
    return [*(name for name, layer in chosen.items() if not isinstance(layer, Stack)), *experts]


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
        names = sorted(set(load_json(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    for name in names:
        inside(source, name, index)
    if missing := [name for name in names if not (source / name).is_file()]:
        raise FileNotFoundError(f"{source} is incomplete: {index.name} names {missing[0]}, which is missing")
    return [source / name for name in names]


def _build(source: Path, buffers: bool = False) -> Any:
    """The model without memory, but for its buffers if they are wanted."""
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source / 'config.json'} has a quantization_config: the model is quantised already")
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    make = kind._from_config if kind is not None else transformers.AutoModel.from_config
    with torch.device("meta") if not buffers else _parameters_on_meta():
        return make(config, dtype=config.dtype or torch.float32)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it new modules have their Parameters on the meta device and their buffers in memory."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(
            module, name, None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        )

    nn.Module.register_parameter = on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Names:
    """The names of the tensors in files as the model has them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.state: dict[str, Tensor] = model.state_dict()
        self.tied = set(model.all_tied_weights_keys)

    def of(self, key: str) -> tuple[str | None, str | None]:
        """The model's name of a tensor, None if the model does not read it; the converter's pattern if one makes it."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.state)
        return (name if name in self.state and name not in self.tied else None), pattern

    def converter(self, pattern: str) -> WeightConverter:
        return next(c for c in self._converters if pattern in c.source_patterns)


class _Stacks:
    """Stacks of experts, and the tensors in files that they are made of."""

    def __init__(self, stacks: dict[str, Stack], names: _Names, files: Files) -> None:
        self.stacks, self._names, self._files = stacks, names, files
        # Stack -> pattern of a converter -> the keys of its experts in order; the pattern "" for a stack in one tensor.
        self._keys: dict[str, dict[str, list[str]]] = {name: {} for name in stacks}
        self._open = functools.cache(lambda path: safe_open(path, framework="pt"))
        for key in sorted(files.entries, key=dot_natural_key):
            name, pattern = names.of(key)
            if name in stacks:
                self._keys[name].setdefault(pattern or "", []).append(key)

    def joined_alone(self) -> bool:
        """Whether each stack is one tensor or transformers only joins its matrices, below one another."""
        return all(
            not pattern or (joins_matrices(self._names.converter(pattern)) and not self.stacks[name].matrix.transposed)
            for name, keys in self._keys.items()
            for pattern in keys
        )

    def missing(self) -> set[str]:
        """The stacks that lack tensors."""
        return {name for name, keys in self._keys.items() if not self._complete(name, keys)}

    def _complete(self, name: str, keys: dict[str, list[str]]) -> bool:
        if keys.keys() == {""}:
            return len(keys[""]) == 1
        patterns = {p for pattern in keys if pattern for p in self._names.converter(pattern).source_patterns}
        return (
            bool(keys) and keys.keys() == patterns and {len(k) for k in keys.values()} == {self.stacks[name].shape[0]}
        )

    def place(self, name: str, key: str) -> tuple[int, int, int] | None:
        """The expert that a tensor is of, and where its rows begin and end in that W; None for a tensor of all experts."""
        pattern, keys = next((pattern, keys) for pattern, keys in self._keys[name].items() if key in keys)
        if not pattern:
            return None
        e, start = keys.index(key), 0
        for before in self._names.converter(pattern).source_patterns:
            rows = self._files.entries[self._keys[name][before][e]].shape[0]
            if before == pattern:
                break
            start += rows
        return e, start, start + rows

    def read(self, name: str, e: int) -> Tensor:
        """W [N, K] of an expert that has tensors of its own."""
        model = self._names.model
        keys = {pattern: held[e] for pattern, held in self._keys[name].items()}
        tensors = {pattern: self._open(self._files.entries[key].file).get_tensor(key) for pattern, key in keys.items()}
        return join_expert(self._names.converter(next(iter(keys))), tensors, name, model, model.config)

    def read_all(self, name: str, key: str) -> Iterator[Tensor]:
        """W [N, K] of each expert of a tensor of all."""
        stack, entry = self.stacks[name], self._files.entries[key]
        expected = list(stack.block.get_parameter(stack.matrix.name).shape)
        if entry.shape != expected:
            raise ValueError(f"it is {entry.shape} and the model, by config.json, needs {expected}")
        for part in experts_in(self._open(entry.file).get_slice(key), stack):
            yield part.mT if stack.matrix.transposed else part


class _Job:
    """Makes the files of the result and keeps the errors of their layers."""

    def __init__(
        self,
        names: _Names,
        layers: dict[str, nn.Module],
        stacks: _Stacks,
        plans: dict[str, RoundingPlan],
        config: WeightConfig,
        device: torch.device | str,
        advance: Callable[[str], None],
    ) -> None:
        self.names, self.layers, self.stacks, self.plans = names, layers, stacks, plans
        self.config, self.device, self.advance = config, device, advance
        self.errors: dict[str, float] = {}
        # The factors of branches, by the layer's name and ``.down`` or ``.up``.
        self.branches: dict[str, Tensor] = {}
        # Of a stack, the plans of its experts; of an expert's two matrices the experts come alternately.
        self._of_experts = functools.lru_cache(maxsize=2)(lambda name, count: self.plans[name].of_experts(count))
        # Stack -> its last expert, whose other matrix mostly follows soon.
        self._last: dict[str, tuple[int, QuantizedWeight]] = {}

    def convert(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a file of the result."""
        try:
            with safe_open(path, framework="pt") as file:
                for key in sorted(file.keys(), key=dot_natural_key):  # matrices of an expert together
                    name, _ = self.names.of(key)
                    if name is None:
                        continue
                    dtype = self.names.state[name].dtype
                    try:
                        if name in self.layers:
                            dense = file.get_tensor(key).to(dtype)
                            dense = dense.t() if is_conv1d(self.layers[name]) else dense
                            yield from self._quantize(name.removesuffix(".weight"), dense)._entries(key).items()
                        elif name in self.stacks.stacks:
                            yield from self._experts(name, key, dtype)
                        else:
                            tensor: Tensor = file.get_tensor(key)
                            yield key, tensor.to(dtype) if tensor.is_floating_point() else tensor
                    except (ValueError, TypeError) as error:
                        raise ValueError(f"{path}: {key!r}: {error}") from error
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def _experts(self, name: str, key: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        stack = self.stacks.stacks[name]
        N = stack.shape[1]
        place = self.stacks.place(name, key)
        if place is None:
            experts = enumerate(self.stacks.read_all(name, key))
            made = [self._quantize(f"{name}.{e}", dense.to(dtype), (name, e)) for e, dense in experts]
            joined = type(made[0]).stack(made)
            yield from published_entries(self.names.model, name, joined, stack.matrix).items()
            return
        e, start, stop = place
        known, weight = self._last.get(name, (-1, None))
        if weight is None or known != e:
            dense = self.stacks.read(name, e)
            if dense.shape != stack.shape[1:]:
                raise ValueError(f"expert {e} is {list(dense.shape)} and the model needs {list(stack.shape[1:])}")
            weight = self._quantize(f"{name}.{e}", dense.to(dtype), (name, e), counts=start == 0)
            self._last[name] = e, weight
        yield from (weight if stop - start == N else weight.cut(0, start, stop))._entries(key).items()

    def _quantize(
        self, name: str, dense: Tensor, expert: tuple[str, int] | None = None, counts: bool = True
    ) -> QuantizedWeight:
        """Quantise W.

        Args:
            name: of the layer, or of the expert.
            expert: the stack that W belongs to, and W's number there.
            counts: also note the error and that the layer is done.
        """
        if expert is None:
            plan = self.plans.get(name) or self.config.plan()
            if plan.moment is not None:
                plan.moment.check(dense, name)
        else:
            stack, e = expert
            plan = self._of_experts(stack, self.stacks.stacks[stack].shape[0])[e]
            if (known := self.plans[stack].moment) is not None:
                known.check_expert(dense, name, e)
        dense = dense.to(self.device)
        base = plan.keep(dense)
        weight = base.weight
        assert isinstance(weight, QuantizedWeight)
        if base.branch is not None:
            for part in ("down", "up"):
                self.branches[f"{name}.{part}"] = getattr(base.branch, part).cpu()
        if counts:
            self.errors[name] = _error(dense, weight) if base.loss is None else base.loss.left
            self.advance(name)
        return weight.to("cpu")


def _error(dense: Tensor, weight: QuantizedWeight) -> float:
    w = dense.float()
    lost = weight.dequantize(torch.float32).sub_(w)
    return float(lost.norm() / w.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        write_tensors(path, tensors, {"format": "pt"})
    except OSError as error:
        raise OSError(f"{error}; the same command goes on from there") from error


class _Report:
    """``quantization.json``: the choices, and for each source file its size, its time and the errors of its layers."""

    def __init__(self, path: Path, choices: dict[str, Any]) -> None:
        self._path, self._known = path, {"choices": load_json(json.dumps(choices)), "files": {}}
        try:
            before = load_json(path.read_text())
            if before["choices"] == self._known["choices"] and isinstance(before["files"], dict):
                self._known = before
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or of other choices

    def has(self, source: Path, made: Path) -> bool:
        entry = self._known["files"].get(source.name)
        return entry is not None and entry["source"] == _stamp(source) and made.is_file()

    def add(self, source: Path, errors: dict[str, float]) -> None:
        self._known["files"][source.name] = {"source": _stamp(source), "errors": errors}
        write_text(self._path, json.dumps(self._known, indent=1) + "\n")

    def errors(self, source: Path) -> dict[str, float]:
        errors: dict[str, float] = self._known["files"][source.name]["errors"]
        return errors

    def all(self) -> dict[str, float]:
        return {name: error for entry in self._known["files"].values() for name, error in entry["errors"].items()}


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def _finish(source: Path, out: Path, model: Any, names: list[str]) -> None:
    """Write what belongs to the weights: the index, and copies of other files."""
    if names != ["model.safetensors"]:
        entries = Files([out / name for name in names]).entries
        size = sum((out / name).stat().st_size for name in names)
        index = {
            "metadata": {"total_size": size},
            "weight_map": {key: e.file.name for key, e in sorted(entries.items())},
        }
        write_text(out / _INDEX, json.dumps(index, indent=2) + "\n")
    _copy_others(source, out)


def _described(model: Any) -> AbstractContextManager[None]:
    """Within it the configuration of a model says that it has 4 bits."""
    description = describe(model)
    assert description is not None
    model.config.architectures = [type(model).__name__]
    return configured(model, description)


def _save_config(model: Any, out: Path) -> None:
    """Write config.json, which makes the files of the directory a model."""
    with _described(model), replacing(out / MODEL_CONFIG) as scratch:
        model.config.save_pretrained(scratch.parent)


def _copy_others(source: Path, out: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHTS):
            copy_file(path, out / path.name)

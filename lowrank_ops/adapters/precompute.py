"""Singular vectors of a whole checkpoint, computed once: ``lowrank-ops precompute MODEL_DIR --rank 64 --out DIR``.

Layers are read from the safetensors files one by one, so memory holds only a few. Factors are looked up by weight
content, not by name, whichever float dtype the weight has; those of a 4-bit weight are of the decoded numbers.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import inside, load_json, remove_scratch
from ..formats import MARKS, WEIGHTS, QuantizedWeight, from_state_dict
from ..svd.decompose import Triple, magnitude, truncated_svd
from ..svd.store import FactorStore, is_exact, largest, weight_key
from .expert_files import EXPERT, PARTS, stacks_for
from .experts import Stack, find_stacks
from .foreign import is_conv1d, is_linear
from .targets import HEADS

T = TypeVar("T")

_DTYPES = ("F32", "BF16", "F16")
# Number of layers of one shape that are decomposed together: a GPU then solves their small problems in parallel.
_TOGETHER = {"cpu": 1, "cuda": 4}
# Where transformers cannot tell what a module is, its name must tell.
_NOT_LINEAR = re.compile(rf"embed|lm_head|wte|wpe|norm|(^|[._])ln(_|\d|\.|$)|(^|\.)({'|'.join(HEADS)})\.")
_HEADS = re.compile(rf"({'|'.join(HEADS)})(\..*)?")
# Experts in one tensor, with or without ``.weight``.
_EXPERTS = re.compile(r"(^|\.)experts\.[a-z_]*(?<!_bias)$")
# Functions of integrations: given a model and names of tensors in its files, the names that the model has for them.
RENAMERS: list[Callable[[nn.Module, Iterable[str]], dict[str, str]]] = []
# Model types whose linear layers are transformers' Conv1D, stored as [K, N].
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


# ---- the checkpoint ----

# Tensors by file and key.
Places = tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class Layer:
    """One matrix in a checkpoint: a linear layer, or one expert's part of a stack.

    Args:
        name: of the layer; of an expert that of the stack, a point and the expert's number.
        places: the tensors whose rows make up W, by file and key.
        shape: of W, (N, K).
        transposed: whether the tensors are W transposed.
        experts, expert: how many matrices a tensor holds along its first dimension, and which one this is; 0 and 0 for a
            tensor of its own.
        packed: for each place the entries of a 4-bit weight, by file and key; empty for a dense tensor.
    """

    name: str
    places: Places
    shape: tuple[int, int]
    transposed: bool
    experts: int = 0
    expert: int = 0
    packed: tuple[Places, ...] = ()

    def load(self) -> Tensor:
        """Load W [N, K] as stored, or decoded to float32, into its own memory."""
        if self.packed:
            return self._decode()
        parts = []
        for path, key in self.places:
            try:
                with safe_open(path, framework="pt") as file:
                    if self.experts:
                        stored = file.get_slice(key)
                        part = self._own(stored, stored.get_shape())
                    else:
                        part = file.get_tensor(key)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"layer {self.name!r}: {path} cannot be read: {error}") from error
            parts.append(part.T.contiguous() if self.transposed else part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self) -> Tensor:
        parts = []
        for (_, key), entries in zip(self.places, self.packed, strict=True):
            try:
                weight = _read_packed(key, entries)
            except (OSError, SafetensorError, ValueError) as error:
                raise ValueError(f"layer {self.name!r}: {error}") from error
            parts.append((weight[self.expert] if self.experts else weight).dequantize(torch.float32))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _own(self, stored: Any, shape: Sequence[int]) -> Tensor:
        if len(shape) == 3:
            return cast(Tensor, stored[self.expert])
        rows = shape[0] // self.experts
        return cast(Tensor, stored[self.expert * rows : (self.expert + 1) * rows])


@functools.lru_cache(maxsize=1)  # the experts of a stack follow each other
def _read_packed(key: str, entries: Places) -> QuantizedWeight:
    tensors = {}
    for path, name in entries:
        with safe_open(path, framework="pt") as file:
            tensors[name] = file.get_tensor(name)
    return from_state_dict(tensors, key)


def linear_layers(model_dir: str | os.PathLike[str], targets: str | Sequence[str] = "all-linear") -> list[Layer]:
    """The linear layers of a Hugging Face checkpoint directory, in the order of the model.

    Args:
        model_dir: with config.json and model.safetensors, or shards and model.safetensors.index.json.
        targets: as in :func:`lowrank_ops.adapt`: ``"all-linear"`` (without the output head), a regular expression that
            matches a layer's whole name, or a list of whole names or endings of names.

    transformers builds the model of config.json without memory and tells which modules are linear, and which of them
    store W transposed (GPT-2's Conv1D); a tensor that the files call otherwise has the model's name here. The matrices
    of fused experts count one by one, whether the files have them in one tensor or expert by expert. If transformers is
    not installed or does not know the model, every 2-D ``….weight`` counts as linear unless its name has ``embed``,
    ``lm_head``, ``wte``, ``wpe``, ``norm`` or ``ln``, or is one of the heads ``score``, ``classifier``,
    ``pre_classifier``, ``classification_head`` and ``qa_outputs``; in the model types gpt2, openai-gpt, imagegpt and
    decision_transformer it counts as transposed. One warning tells how many other matrices the targets cover, such as
    convolutions named by a target; for all-linear, matrices without a module in the model and experts in an unknown
    layout.

    Raises:
        FileNotFoundError: config.json, the safetensors files or one of the shards is missing.
        ValueError: a file is damaged, a layer is stored quantised in another format than lowrank_ops has, or a target
            matches no layer.
    """
    directory = Path(model_dir)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{directory} is not a Hugging Face model directory: it has no config.json")
    config = _read_json(config_path)
    stored = _tensors(directory)
    packed = _gather_packed(stored)
    known, stacks, names = _modules(directory, config, stored)
    layers, left = [], []
    chosen = {name: stack for name, stack in stacks.items() if _matches(name, targets)}
    experts = _find_experts({names.get(key, key): (key, entry) for key, entry in stored.items()}, chosen)
    held = {key for layer in experts for _, key in layer.places}
    layers += experts
    for key, (file, shape, dtype) in sorted(stored.items(), key=lambda item: _natural(item[0])):
        if key in held:
            if dtype not in _DTYPES and key not in packed:
                raise _quantised_error(key, dtype)
            continue
        full = names.get(key, key)
        name = full.removesuffix(".weight")
        if len(shape) < 2 or (name == full and not _EXPERTS.search(full)):
            continue
        if known is None or name not in known:
            transposed = config.get("model_type") in _TRANSPOSED
            linear = known is None and len(shape) == 2 and not _NOT_LINEAR.search(full)
            other = _EXPERTS.search(full) or (known is not None and not _NOT_LINEAR.search(full))
        else:
            transposed = known[name] is True
            linear, other = len(shape) == 2 and known[name] is not None, False
        if not linear:
            # Report tensors named by a target; for all-linear, tensors that may belong to a linear layer.
            if _matches(name, targets) and (other or targets != "all-linear"):
                left.append(name)
            continue
        transposed = transposed and key not in packed
        N, K = reversed(shape) if transposed else shape
        layer = Layer(name, ((file, key),), (N, K), transposed)
        if _matches(name, targets):
            if key not in packed and (dtype not in _DTYPES or any(other.startswith(f"{key}.") for other in stored)):
                raise _quantised_error(name, dtype)
            layers.append(layer)
    layers = [
        replace(layer, transposed=False, packed=tuple(packed[key] for _, key in layer.places))
        if layer.places[0][1] in packed
        else layer
        for layer in layers
    ]
    _check_matched(targets, [layer.name for layer in layers], directory)
    if left:
        warnings.warn(
            f"left out {len(left)} tensor{'s' * (len(left) > 1)} that targets cover ({', '.join(left[:3])}"
            f"{', …' * (len(left) > 3)}): no linear layer of the model has them, or experts in an unknown layout",
            stacklevel=2,
        )
    return layers


def checkpoint_tensors(directory: Path) -> dict[str, Path]:
    """Key -> file of every tensor of a checkpoint directory."""
    return {key: path for key, (path, *_) in _tensors(directory).items()}


def _gather_packed(stored: dict[str, tuple[Path, tuple[int, ...], str]]) -> dict[str, Places]:
    """Put the shape of W in the place of the entries of each 4-bit weight; return the entries by the weight's name."""
    packed: dict[str, Places] = {}
    kinds = {key: kind for kind, mark in MARKS.items() for key in stored if key.endswith(mark)}
    for key, kind in kinds.items():
        name = key.removesuffix(MARKS[kind])
        path, shape, _ = stored[key]
        if kind == "mxfp4":
            *rows, groups, size = shape
            shape = (*rows, groups * size * 2)
        else:
            try:
                with safe_open(path, framework="pt") as file:
                    shape = tuple(load_json(bytes(file.get_tensor(key).tolist()))["shape"])
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: {key!r} describes no 4-bit weight: {error!r}") from error
        entries = [name + end for end in WEIGHTS[kind]._suffixes() if name + end in stored]
        packed[name] = tuple((stored[entry][0], entry) for entry in entries)
        for entry in entries:
            del stored[entry]
        stored[name] = path, shape, kind
    return packed


def _quantised_error(name: str, dtype: str) -> ValueError:
    return ValueError(
        f"layer {name!r} is stored quantised or as {dtype}; the weights before quantisation are needed, in float32, "
        "bfloat16 or float16"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = load_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def _tensors(directory: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Tensor -> file, shape and dtype, in natural order; reads only headers."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index} is damaged: it has no weight_map")
        files = {inside(directory, name, index) for name in places.values()}
        expected: set[str] | None = set(places)
    else:
        files, expected = {single}, None
    found = {}
    for path in sorted(files):
        if not path.is_file():
            what = f"{index.name} names" if expected is not None else f"it has neither {index.name} nor"
            raise FileNotFoundError(f"{directory} is incomplete: {what} {path.name}")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (no mapping)
                    part = file.get_slice(key)
                    found[key] = (path, tuple(part.get_shape()), str(part.get_dtype()))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    if expected is not None and not expected <= found.keys():
        raise ValueError(f"{directory} is damaged: no shard holds {min(expected - found.keys())!r}")
    return {key: found[key] for key in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _find_experts(
    stored: Mapping[str, tuple[str, tuple[Path, tuple[int, ...], str]]], stacks: Mapping[str, Stack]
) -> list[Layer]:
    """The matrices of a model's stacks of experts that a checkpoint has, in one tensor or expert by expert.

    stored: the model's name of a tensor -> its key, and the entry of :func:`_tensors`.
    """
    found = []
    for name, stack in stacks.items():
        E, N, K = stack.shape
        if name in stored:
            key, (path, _, _) = stored[name]
            turned = stack.matrix.transposed
            found += [Layer(f"{name}.{e}", ((path, key),), (N, K), turned, E, e) for e in range(E)]
    single: dict[tuple[str, str, int], tuple[Path, str]] = {}  # block, part, expert -> place
    for name, (key, (path, _, _)) in stored.items():
        if match := EXPERT.fullmatch(name.removesuffix(".weight")):
            single[match[1], match[3], int(match[2])] = path, key
    for prefix in sorted({prefix for prefix, _, _ in single}, key=_natural):
        for name in stacks_for(prefix, stacks):
            E, N, K = stacks[name].shape
            for e in range(E):
                aliases = PARTS[name.rpartition(".")[2]]
                places = [
                    next((single[prefix, part, e] for part in names if (prefix, part, e) in single), None)
                    for names in aliases
                ]
                if all(place is not None for place in places):
                    found.append(Layer(f"{name}.{e}", tuple(filter(None, places)), (N, K), False))
    return found


def _modules(
    directory: Path, config: Mapping[str, Any], keys: Iterable[str]
) -> tuple[dict[str, bool | None] | None, dict[str, Stack], dict[str, str]]:
    """Name in the checkpoint -> whether W is stored transposed, None if not linear; the stacks of experts by name; keys
    whose tensors have another name in the model -> that name.

    None, no stacks and no names if transformers cannot tell.
    """
    try:
        import transformers
    except ImportError:
        return None, {}, {}
    try:
        known = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        names = config.get("architectures") or []
        kind = getattr(transformers, names[0], None) if names else None
        with torch.device("meta"):
            model = (kind._from_config if kind else transformers.AutoModel.from_config)(known)
    except Exception as error:
        print(f"transformers cannot build this model ({error}); layers are recognised by name", file=sys.stderr)
        return None, {}, {}
    head = model.get_output_embeddings()
    found = {
        name: is_conv1d(module) if is_linear(module) and module is not head and not _HEADS.fullmatch(name) else None
        for name, module in model.named_modules()
    }
    # A checkpoint of the bare model lacks the prefix of the model with a head, or the other way round.
    prefix = f"{model.base_model_prefix}."

    def by_all_names(things: dict[str, T]) -> dict[str, T]:
        bare = {name.removeprefix(prefix): thing for name, thing in things.items()}
        return things | bare | {prefix + name: thing for name, thing in bare.items()}

    modules, stacks = by_all_names(found), by_all_names(find_stacks(dict(model.named_modules())))
    strange = [key for key in keys if key.removesuffix(".weight") not in modules and key not in stacks]
    names = {key: name for renamer in RENAMERS for key, name in renamer(model, strange).items()}
    return modules, stacks, names


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_matched(targets: str | Sequence[str], names: Sequence[str], directory: Path) -> None:
    if isinstance(targets, str):
        missing = [] if names else [targets]
    else:
        missing = [target for target in targets if not any(_matches(name, [target]) for name in names)]
    if missing or not names:
        raise ValueError(f"targets {missing} match no linear layer of {directory}")


# ---- the computation ----


def precompute(
    model_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rank: int | None,
    oversample: int | None = None,
    power_iterations: int = 4,
    seed: int = 0,
    targets: str | Sequence[str] = "all-linear",
    device: torch.device | str = "cpu",
) -> dict[str, str]:
    """Compute U diag(S) Vᵀ ≈ W of every linear layer of a checkpoint and store it in ``out``; return layer -> key.

    Args:
        model_dir, targets: see :func:`linear_layers`.
        out: a :class:`FactorStore`. A layer whose file exists, with the same options or a higher rank, is not computed
            again, so an interrupted run resumes.
        rank: R, or None for min(N, K) of every layer.
        oversample, power_iterations, seed: see :func:`lowrank_ops.truncated_svd`, used for ranks up to a quarter of
            min(N, K); above that the full decomposition is computed and cut.
        device: where to compute.

    Raises:
        NotADirectoryError, FileNotFoundError: out is a file; files of the checkpoint are missing.
        ValueError: see :func:`linear_layers`; rank is above min(N, K) of a layer; a weight is not finite. The message names
            the layer.
    """
    store = FactorStore(out)
    layers = linear_layers(model_dir, targets)
    for layer in layers:
        if rank is not None and not 1 <= rank <= min(layer.shape):
            N, K = layer.shape
            raise ValueError(
                f"layer {layer.name!r}: rank must be from 1 to min(N, K) = {min(N, K)} for a weight {N} x {K}, got {rank}; "
                "targets can leave the layer out"
            )
    remove_scratch(store.path)
    device = torch.device(device)
    keys: dict[str, str] = {}
    with progress(len(layers)) as advance:
        for group in _groups(layers, _TOGETHER.get(device.type, 1)):
            R = rank or min(group[0].shape)
            options = {"rank": R, "oversample": R if oversample is None else oversample}
            options |= {"power_iterations": power_iterations, "seed": seed}
            fresh: dict[str, tuple[Layer, Tensor]] = {}
            for layer in group:
                weight = layer.load()
                try:
                    magnitude(weight)
                except ValueError as error:
                    raise ValueError(f"layer {layer.name!r}: {error}") from error
                keys[layer.name] = key = weight_key(weight)
                if key not in fresh and not _is_done(store.metadata(key), options):
                    fresh[key] = (layer, weight.to(device))
            if fresh:
                stack = [weight for _, weight in fresh.values()]
                try:
                    found = _decompose(stack, R, oversample, power_iterations, seed)
                except RuntimeError as error:
                    names = ", ".join(layer.name for layer, _ in fresh.values())
                    raise RuntimeError(f"layer {names!r}: {error}") from error
                for (key, (layer, weight)), factors in zip(fresh.items(), found, strict=True):
                    labels = {"layer": layer.name, "version": _version(), **options}
                    store.save(weight, factors, key=key, **labels)
            store.note({layer.name: keys[layer.name] for layer in group})
            for layer in group:
                advance(layer.name)
    return keys


def _decompose(
    weights: Sequence[Tensor], rank: int, oversample: int | None, power_iterations: int, seed: int
) -> list[Triple]:
    if is_exact(rank, weights[0]):
        return [largest(weight, rank) for weight in weights]
    U, S, Vt = truncated_svd(list(weights), rank, oversample, power_iterations, seed)
    return list(zip(U, S, Vt, strict=True))


def _is_done(stored: Mapping[str, str], options: Mapping[str, int]) -> bool:
    stored_rank = stored.get("rank", "")
    if not stored_rank.isdigit():
        return False
    return int(stored_rank) > options["rank"] or all(stored.get(name) == str(value) for name, value in options.items())


def _groups(layers: Iterable[Layer], most: int) -> Iterator[list[Layer]]:
    """Group neighbours of one shape, at most ``most`` together."""
    group: list[Layer] = []
    for layer in layers:
        if group and (layer.shape != group[0].shape or len(group) == most):
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


@contextmanager
def progress(total: int, description: str = "decomposing") -> Iterator[Any]:
    """Yield a function to call with the name of each finished layer; it moves a bar on stderr if rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        done = 0

        def report(name: str) -> None:
            nonlocal done
            done += 1
            print(f"{done}/{total} {name}", file=sys.stderr)

        yield report
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


def _version() -> str:
    try:
        return version("lowrank-ops")
    except PackageNotFoundError:  # a checkout without installation
        return "0.0.0+checkout"

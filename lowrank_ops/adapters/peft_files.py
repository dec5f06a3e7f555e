"""The two files of an adapter, in PEFT's layout: read them into checked tensors and kinds, without a model."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from .. import cores
from ..files import load_json
from ..formats import FLOAT_DTYPES, NF4Weight, QuantizedWeight
from .kinds import Adapter, LoRA, LoRAXS
from .patterns import check_pattern, matches
from .start import Source, changes_base, empty_core, read_record

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BIASES = ("none", "all", "lora_only")  # the biases that PEFT trains
TRAINED = "lowrank_ops_trained"  # the metadata that names what was trained beside the updates
OURS = "LOWRANK_OPS"  # the peft_type of kinds PEFT does not have
# PEFT's names for the factors; ours are the mathematical roles.
FACTORS = {"down": "lora_A", "up": "lora_B"}
# What DoRA and lora_bias have for each row of W.
ROWS = {"magnitude": "lora_magnitude_vector", "up_bias": "lora_B.bias"}
LORA = {name: f"{theirs}.weight" for name, theirs in FACTORS.items()} | ROWS
EMBEDDING = {"down": "lora_embedding_A", "up": "lora_embedding_B"}  # of an embedding
_ROLES = {theirs: role for names in (LORA, EMBEDDING) for role, theirs in names.items()}
_SMALL = 1 << 20  # bytes of a file
_LARGEST_CONFIG = 16 << 20  # bytes
_FLOATS = (*FLOAT_DTYPES, torch.float64)
_KEY = re.compile(
    r"(.+?)\.(?:(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector|lora_embedding_[AB])|lowrank_ops\.(.+))"
)
# What PEFT's wrappers add to the names of parameters of the base.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save|original_module|token_adapter)(?=\.)")
TOKENS = ".token_adapter.trainable_tokens_delta"  # the rows of single tokens
# Options that change what the tensors mean; with other values than these, ΔW is not s · U D on this base.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "alora_invocation_tokens": (None, []),
}
# Options of these forms choose a variant; of those beside _PLAIN only these leave the meaning of the tensors as it is.
_VARIANT = re.compile(r"use_.+|.+_config")
_KNOWN = {
    *("use_rslora", "use_dora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_config", "runtime_config"),
}
# PEFT's starts that leave the base as it is, and those whose base can be made again from W.
_KEEPING = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_REMADE = ("pissa", "olora")


@dataclasses.dataclass
class Contents:
    """The tensors of a file.

    Attributes:
        layers: layer name -> its tensors by attribute names.
        embeddings: the names of those layers that are embeddings.
        beside: parameter of the base model -> its values.
        bases: names in ``beside`` of what PEFT kept frozen under an adapter.
        trained: names in ``beside`` of what was trained, or None if the file does not say it.
        tokens: name of an embedding or a head -> rows that single tokens have there.
        metadata: of the file.
    """

    layers: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    embeddings: set[str] = dataclasses.field(default_factory=set)
    beside: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    bases: set[str] = dataclasses.field(default_factory=set)
    trained: list[str] | None = None
    tokens: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Loaded:
    """The contents of a file for one layer."""

    kind: Adapter
    tensors: dict[str, Tensor]
    source: Source | None = None
    base: str | None = None
    embeds: bool | None = None  # whether the layer is an embedding, if the file says it


def loaded_of(config: dict[str, Any], name: str, tensors: dict[str, Tensor], record: dict[str, Any] | None) -> Loaded:
    """The kind and the tensors by the attributes of a layer; halves of a changed base taken apart."""
    if record is None:
        if "down" not in tensors or "up" not in tensors:
            raise ValueError("the file says nothing of its kind of adapter")
        return Loaded(kind_of(config, name), tensors)
    kind, source = read_record(record)
    if changes_base(kind):
        R = kind.rank or 0
        down, up = tensors["down"], tensors["up"]
        halves = {"down": down[..., :R, :], "base_down": down[..., R:, :], "up": up[..., :R], "base_up": -up[..., R:]}
        tensors = {key: tensor.contiguous() for key, tensor in (tensors | halves).items()}
    return Loaded(kind, tensors, source, record.get("base"))


def check_shapes(name: str, loaded: Loaded, *shape: int, groups: int = 1) -> None:
    """Raise unless the tensors fit a layer [N, K], or a stack [E, N, K]; groups: of a convolution; U is [N, R / groups]."""
    *stack, N, K = shape
    kind, tensors = loaded.kind, loaded.tensors
    if isinstance(kind, LoRA):
        R = kind.rank
        expected: dict[str, tuple[int, ...]] = {"down": (R, K), "up": (N, R // groups)}
        if changes_base(kind):
            expected |= {"base_down": (R, K), "base_up": (N, R)}
        for key, wanted in (("magnitude", kind.dora), ("up_bias", kind.lora_bias)):
            if wanted:
                expected[key] = (N,)
            elif key in tensors:
                raise ValueError(f"the file has {name}.{ROWS[key]}, and {kind} has no such part")
    elif isinstance(kind, LoRAXS):
        expected = {"core": (kind.rank, kind.rank)}
    else:
        core = empty_core(kind, kind.size(N, K))
        expected = {"core": tuple(core.values.shape)}
        if isinstance(core, cores.Sparse):
            expected["pairs"] = (2, core.values.numel())
    for key, own in expected.items():
        needed = own if key == "pairs" else (*stack, *own)
        theirs = f"{name}.{(EMBEDDING if loaded.embeds else LORA).get(key, key)}"
        if key not in tensors:
            raise ValueError(f"the file lacks {theirs}")
        if tuple(tensors[key].shape) != needed:
            what = f"a layer {N} x {K}" if not stack else f"a stack of {stack[0]} experts {N} x {K}"
            raise ValueError(f"{theirs} must be {list(needed)} for {kind} and {what}, got {list(tensors[key].shape)}")


def check_pairs(core: cores.Core | None, loaded: Loaded) -> None:
    """Raise unless a sparse core has the entries that the file has."""
    if isinstance(core, cores.Sparse):
        pairs = torch.stack([core.rows, core.cols]).cpu()
        if not torch.equal(pairs, loaded.tensors["pairs"].long()):
            raise ValueError("the layer has another random pattern than the file")


def read_matrix(tensors: dict[str, Tensor], name: str) -> QuantizedWeight | Tensor:
    if f"{name}.absmax" in tensors:
        return NF4Weight._from_entries(tensors, name)
    if name not in tensors:
        raise ValueError(f"the file lacks the stored {name}")
    return tensors[name]


def read_text(path: Path) -> str:
    """The text of a small file of an adapter, which must exist.

    Raises:
        FileNotFoundError: there is no such file, or it is a pipe, a device or a folder.
        ValueError: it is larger than a configuration can be, or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path.parent}: {path.name} is missing")
    with open(path, "rb") as file:
        data = file.read(_LARGEST_CONFIG + 1)
    if len(data) > _LARGEST_CONFIG:
        raise ValueError(f"{path} has more than {_LARGEST_CONFIG >> 20} MiB, and a configuration has not")
    try:
        return data.decode()
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def parse_json(text: str, where: object) -> Any:
    """What a text that a file holds means; where: the file, for the message.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return load_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def checked_config(config: Any, path: str) -> dict[str, Any]:
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", OURS):
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} describes a {kind!r} adapter; only 'LORA' and {OURS!r} can be loaded")
    for option, plain in _PLAIN.items():
        if option in config and config[option] not in plain:
            raise ValueError(
                f"{path} has {option}={config[option]!r}, which changes what the factors mean; a plain LoRA is needed"
            )
    for option, value in config.items():
        if value and _VARIANT.fullmatch(option) and option not in _KNOWN and option not in _PLAIN:
            raise ValueError(
                f"{path} has {option}={value!r}, which is not known here and may change what the factors mean; load the "
                "adapter with the PEFT that wrote it, or take the option out if it does not"
            )
    if config.get("layer_replication"):
        raise ValueError(
            f"{path} has layer_replication={config['layer_replication']!r}: its layers stand in several places of a deeper "
            "model, with an adapter for each; load it with PEFT, merge_and_unload() it, and save the deeper model"
        )
    if (start := config.get("init_lora_weights")) not in (*_KEEPING, *_REMADE):
        raise ValueError(
            f"{path} has init_lora_weights={start!r}, which changed the base in a way that W alone does not tell; write it "
            "again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it"
        )
    tokens = config.get("trainable_token_indices") or []
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    if not all(isinstance(numbers, list) and all(type(n) is int for n in numbers) for numbers in lists):
        raise ValueError(
            f"{path} has trainable_token_indices={tokens!r}, which is no list of tokens and no table of lists"
        )
    modules = config.get("modules_to_save") or []
    if not (isinstance(modules, str) or (isinstance(modules, list) and all(isinstance(m, str) for m in modules))):
        raise ValueError(f"{path} has modules_to_save={modules!r}, which is not a list of names")
    if (bias := config.get("bias")) not in (*BIASES, None):
        raise ValueError(f"{path} has bias={bias!r}, which must be one of {', '.join(BIASES)}")
    for option in ("rank_pattern", "alpha_pattern"):
        table = config.get(option) or {}
        try:
            for pattern in dict(table):
                check_pattern(pattern)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has {option}={table!r}, which is not a table of patterns: {error}") from error
    return config


def read_tensors(path: Path) -> tuple[Contents, dict[str, Any]]:
    """The checked tensors of a file; layer name -> its record."""
    return contents_of(*read_file(path), str(path))


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter at {path.parent}: {path.name} is missing")
    try:
        if path.stat().st_size <= _SMALL:  # reading once is three times as fast for many small tensors
            data = path.read_bytes()
            tensors = dict(sorted(load(data).items()))  # the file has them in any order
            metadata = load_json(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
        else:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    # KeyError: an element type that torch does not have.
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    return tensors, metadata or {}


def contents_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str
) -> tuple[Contents, dict[str, Any]]:
    """The checked tensors of a file by PEFT's names; layer name -> its record."""
    try:
        records, trained = _records(metadata.get("lowrank_ops", "{}")), load_json(metadata.get(TRAINED, "null"))
    except ValueError as error:
        raise ValueError(f"the metadata of {where} is not JSON: {error}") from error
    if not isinstance(records, dict):
        raise ValueError(
            f"the record of the adapters in {where} must be a table by layer, got {type(records).__name__}"
        )
    contents = checked_tensors(tensors, where)
    if trained is not None and not (isinstance(trained, list) and contents.beside.keys() >= set(map(str, trained))):
        raise ValueError(f"the names of what was trained in {where} must be names of its tensors, got {trained!r}")
    contents.trained, contents.metadata = trained, metadata
    return contents, records


@functools.lru_cache(maxsize=8)  # thousands of files may share one recipe
def _records(text: str) -> Any:
    """Parse the metadata; the result is cached for the next file, so it must not be changed."""
    return load_json(text)


def checked_tensors(tensors: Mapping[str, Tensor], path: str) -> Contents:
    """Sort the tensors of a file by layers."""
    contents = Contents()
    found, beside = contents.layers, contents.beside
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _KEY.fullmatch(name)
        if match is not None and key != name:
            found.setdefault(match[1], {})[_ROLES[match[2]] if match[2] else match[3]] = tensor
            if match[2] and match[2].startswith("lora_embedding"):
                contents.embeddings.add(match[1])
        elif key != name and name.endswith(TOKENS):
            if tensor.dtype not in _FLOATS or not all_finite([tensor]):
                raise ValueError(f"{name} in {path} must be finite floats, got {tensor.dtype}")
            contents.tokens[name.removesuffix(TOKENS)] = tensor
        elif key == name or "lora_" in name:
            raise ValueError(f"{path} holds {key!r}, which is neither a LoRA factor nor a parameter of a base model")
        elif ".original_module." not in name:  # what PEFT trained stands in its place
            plain = _WRAPPED.sub("", name)
            if plain in beside and not torch.equal(beside[plain].double(), tensor.double()):
                raise ValueError(f"{path} has two values for {plain!r}")
            beside[plain] = tensor
            if name.endswith(".base_layer.weight"):
                contents.bases.add(plain)
    floats: list[tuple[str, str, Tensor]] = []
    for name, parts in found.items():
        names = EMBEDDING if name in contents.embeddings else LORA
        for own in FACTORS:
            if "core" not in parts and own not in parts:
                raise ValueError(f"{path} lacks {name}.{names[own]}")
        floats += [(name, own, parts[own]) for own in (*LORA, "core") if own in parts and f"{own}.absmax" not in parts]
    # Check all at once; find the bad tensor only if there is one.
    right = all(tensor.dtype in _FLOATS for *_, tensor in floats)
    if not right or not all_finite(tensor for *_, tensor in floats):
        for name, own, tensor in floats:
            if tensor.dtype not in _FLOATS or not all_finite([tensor]):
                wrong = f"{name}.{(EMBEDDING if name in contents.embeddings else LORA).get(own, own)}"
                got = "" if tensor.dtype in _FLOATS else f", got {tensor.dtype}"
                raise ValueError(f"{wrong} in {path} must be finite floats{got}")
    if not found:
        raise ValueError(f"{path} holds no factor")
    return contents


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no tensor has NaN or infinity."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        # Check a large tensor by itself, because joining copies it.
        if tensor.numel() > 1 << 16:
            if not torch.isfinite(tensor).all():
                return False
        else:
            by_dtype.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return all(bool(torch.isfinite(torch.cat(same)).all()) for same in by_dtype.values())


def kind_of(config: Mapping[str, Any], name: str) -> LoRA:
    """The kind of a layer by the config."""

    def pattern(table: dict[str, Any] | None, default: Any) -> Any:
        for key, value in (table or {}).items():
            if matches(key, name):
                return value
        return default

    return LoRA(
        rank=pattern(config.get("rank_pattern"), config.get("r", 8)),
        alpha=pattern(config.get("alpha_pattern"), config.get("lora_alpha", 8)),
        rslora=bool(config.get("use_rslora", False)),
        dropout=config.get("lora_dropout", 0.0),
        init=start if (start := config.get("init_lora_weights")) in _REMADE else "kaiming",
        dora=bool(config.get("use_dora", False)),
        lora_bias=bool(config.get("lora_bias", False)),
    )


def lora_config(kinds: Mapping[str, LoRA], targets: list[str] | str) -> dict[str, Any]:
    """What adapter_config.json says of LoRAs over any model; targets: what finds their layers."""
    for option in ("rslora", "dropout", "dora", "lora_bias"):
        values = {getattr(kind, option) for kind in kinds.values()}
        if len(values) > 1:
            raise ValueError(f"a saved adapter has one {option} for all layers, got {sorted(values)}")
    # Twice the rank if D₀ and U₀ are included, with the alpha that keeps s.
    ranks = {name: kind.rank * (2 if changes_base(kind) else 1) for name, kind in kinds.items()}
    alphas = {
        name: kind.alpha * ((math.sqrt(2) if kind.rslora else 2) if changes_base(kind) else 1)
        for name, kind in kinds.items()
    }
    first = next(iter(kinds.values()))
    rank, alpha = (Counter(table.values()).most_common(1)[0][0] for table in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        **{key: True for key, used in (("use_dora", first.dora), ("lora_bias", first.lora_bias)) if used},
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": targets,
        # Anchored full names: PEFT reads a key as a regular expression that may match an ending.
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "task_type": None,
    }

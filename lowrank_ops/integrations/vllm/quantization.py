"""vLLM's side of 4-bit weights: the configuration, the method of linear layers and the reader of checkpoints.

A linear layer of vLLM gets an empty weight whose loader takes every matrix of the checkpoint whole, quantises it if it is
dense, and keeps the part of its process. So no more than one dense matrix is in memory, and blocks are those of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ...adapters.branch_files import BRANCH, FOLDER, BranchFiles
from ...formats import FLOAT_DTYPES, WEIGHTS, QuantizedWeight
from ...functional import LowRankUpdate
from .experts import ExpertsMethod
from .shards import Carrier, Matrix, Part, Shard, ShardedLinear, gather, take_matrix

NAME = "lowrank_ops"
_NAME = "lowrank_ops_name"  # attribute of a tensor that a loader hands to a model: its name in the checkpoint
_LAYER = "lowrank_ops"  # attribute of a layer of vLLM
_QKV = {"q": 0, "k": 1, "v": 2}


class Config(QuantizationConfig):
    """How the linear layers of a model are kept.

    Args:
        format: "nf4", "fp4", or None, which keeps dense weights dense, so that PiSSA over them can be served.
        block_size, double_quant: as in :meth:`lowrank_ops.NF4Weight.quantize`, for weights that are dense in the files.
        skip: names of layers, or ends of them, that stay dense.
        quantized: whether the files hold 4-bit weights. What they hold dense then stays dense.
        branch: whether a folder with branches lies beside them.
    """

    def __init__(
        self,
        format: str | None = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        skip: tuple[str, ...] = (),
        quantized: bool = False,
        branch: bool = False,
    ) -> None:
        super().__init__()
        if format not in ("nf4", "fp4", None):
            raise ValueError(f"quantization_config: format must be 'nf4', 'fp4' or null, got {format!r}")
        self.format, self.block_size, self.double_quant, self.skip = format, block_size, double_quant, skip
        self.quantized, self.has_branch = quantized, branch
        self.folder: Path | None = None  # with the branches
        self._branches: BranchFiles | None = None

    def get_name(self) -> Any:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(FLOAT_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Take checkpoints that we wrote, and bitsandbytes' if the user says so."""
        method = hf_quant_cfg.get("quant_method")
        ours = method == NAME or bool(hf_quant_cfg.get(NAME))
        return NAME if ours or (method == "bitsandbytes" and user_quant == NAME) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Config:
        """Read a quantization_config: of a checkpoint of bitsandbytes or of ours; for dense files, from --hf-overrides, with
        the first four arguments of the class under ``in_flight``.

        Raises:
            ValueError: it describes other weights than these, or has an option that is not known.
        """
        if config.get("quant_method") == "bitsandbytes":
            if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
                raise ValueError(
                    "only bitsandbytes' 4-bit weights can be served, and quantization_config has 8-bit ones"
                )
            return cls(config.get("bnb_4bit_quant_type", "nf4"), quantized=True, branch=bool(config.get(BRANCH)))
        if (options := config.get("in_flight")) is None:
            return cls(config.get("format", "nf4"), quantized=True, branch=bool(config.get(BRANCH)))
        known = ("format", "block_size", "double_quant", "skip")
        if not isinstance(options, dict) or not options.keys() <= set(known):
            raise ValueError(f"quantization_config: in_flight must be a table of {', '.join(known)}, got {options!r}")
        return cls(**options | {"skip": tuple(options.get("skip", ()))})

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find the branches of a model in a local directory."""
        if self.has_branch:
            folder = Path(model_name) / FOLDER
            if not folder.is_dir():
                raise ValueError(f"config.json says that branches belong to the weights, and there is no {folder}")
            self.folder = folder

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return ExpertsMethod(self.quantize, layer, prefix)
        return LinearMethod(self, prefix) if isinstance(layer, LinearBase) else None

    def quantize(self, name: str, weight: Tensor) -> Matrix:
        """W as it is kept under its name."""
        dense = self.quantized or self.format is None
        if dense or any(name == end or name.endswith("." + end) for end in self.skip):
            return weight
        kind: Any = WEIGHTS[self.format or "nf4"]
        quantized: QuantizedWeight = kind.quantize(weight, block_size=self.block_size, double_quant=self.double_quant)
        return quantized

    @property
    def branches(self) -> BranchFiles | None:
        """The branches; read by the first process that needs them, since vLLM sends its configuration to others."""
        if self._branches is None and self.folder is not None:
            self._branches = BranchFiles(self.folder)
        return self._branches


class LinearMethod(LinearMethodBase):
    """y = W x + bias over the parts of W that this process has: :class:`.ShardedLinear`."""

    def __init__(self, config: Config, prefix: str) -> None:
        self.config, self.prefix = config, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        loaded: dict[tuple[int, ...], Shard] = {}
        sizes = list(output_partition_sizes)
        vars(weight)["weight_loader"] = partial(self._load, layer, loaded, sizes, input_size_per_partition)
        layer.register_parameter("weight", weight)
        vars(layer)["lowrank_ops_loaded"] = loaded, range(len(sizes))

    def _load(
        self,
        layer: Any,
        loaded: dict[tuple[int, ...], Shard],
        sizes: list[int],
        columns: int,
        param: Tensor,
        tensor: Tensor,
        shard_id: Any = None,
    ) -> None:
        """Take one matrix of the checkpoint; ``shard_id`` says which rows of the layer it has, None for all."""
        numbers: tuple[int, ...]
        if shard_id is None:
            numbers = tuple(range(len(sizes)))
        else:
            numbers = shard_id if isinstance(shard_id, tuple) else (_QKV.get(shard_id, shard_id),)
        name = getattr(tensor, _NAME, f"{self.prefix}.weight").removesuffix(".weight")
        try:
            matrix = take_matrix(tensor, param)
            if isinstance(matrix, Tensor) and not isinstance(layer, GateLinear):  # routers of experts stay dense
                matrix = self.config.quantize(name, matrix)
            N, K = matrix.shape
            part = self._part(layer, (N, K), sizes, columns, numbers)
            branches = self.config.branches
            branch = branches.of(name, matrix) if branches and isinstance(matrix, QuantizedWeight) else None
            if branch is not None:
                assert isinstance(branch.down, Tensor) and isinstance(branch.up, Tensor)
                branch = LowRankUpdate(part.down(branch.down), part.up(branch.up).contiguous())
            loaded[numbers] = Shard(name, part, part.take(matrix), branch)
        except ValueError as error:
            split = f" (split over {layer.tp_size} processes)" if layer.tp_size > 1 else ""
            raise ValueError(f"{name}{split}: {error}") from error

    def _part(
        self, layer: Any, shape: tuple[int, int], sizes: list[int], columns: int, numbers: tuple[int, ...]
    ) -> Part:
        N, K = shape
        if isinstance(layer, ColumnParallelLinear):
            rows, begin = [], 0
            for number in numbers:
                replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and number else 1
                at = begin + layer.tp_rank // replicas * sizes[number]
                rows.append((at, at + sizes[number]))
                begin += sizes[number] * layer.tp_size // replicas
            part = Part.of_rows(shape, rows)
            expected = begin, columns
        elif isinstance(layer, RowParallelLinear):
            at = layer.tp_rank * columns
            part = Part(shape, ((0, N),), (at, at + columns))
            expected = sizes[0], columns * layer.tp_size
        else:
            part, expected = Part(shape, ((0, N),), (0, K)), (sum(sizes[number] for number in numbers), columns)
        if shape != expected:
            raise ValueError(f"a matrix {list(expected)} is needed, got {list(shape)}")
        return part

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if hasattr(layer, _LAYER):  # vLLM may ask twice
            return
        loaded, needed = vars(layer).pop("lowrank_ops_loaded")
        shards = [loaded[numbers] for numbers in sorted(loaded)]
        if [number for numbers in sorted(loaded) for number in numbers] != list(needed):
            raise ValueError(f"{self.prefix}: the checkpoint has the parts {sorted(loaded)} of {list(needed)}")
        layer.register_module(_LAYER, ShardedLinear(shards))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = getattr(layer, _LAYER)(x, bias)
        return y


class Loader(DefaultModelLoader):
    """The default loader, which for models of ours hands over each 4-bit weight as one tensor, and tells names."""

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        weights = super().get_all_weights(model_config, model)
        if model_config.quantization != NAME:
            yield from weights
            return
        # Tables stay dense; they have the numbers of the 4-bit weight.
        tables = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, VocabParallelEmbedding)}
        found = (getattr(m, "quant_config", None) for m in model.modules())
        config = next(one for one in found if isinstance(one, Config))
        names: set[str] = set()
        for name, matrix in gather(weights) if config.quantized else weights:
            if isinstance(matrix, Tensor):
                tensor = matrix
            elif name.removesuffix(".weight").rpartition(".")[2] in tables:
                tensor = matrix.dequantize()
            else:
                tensor = Carrier.of(matrix)
            vars(tensor)[_NAME] = name
            names.add(name.removesuffix(".weight"))
            yield name, tensor
        if config.branches is not None and (unknown := sorted(config.branches.names - names)):
            raise ValueError(
                f"the branches in {config.folder} belong to layers that the checkpoint lacks: {unknown[:5]}"
            )


def layer_of(module: nn.Module) -> ShardedLinear | None:
    """The layer of ours that computes for a linear layer of vLLM, or None."""
    layer = module._modules.get(_LAYER)
    return layer if isinstance(layer, ShardedLinear) else None


def install() -> None:
    """Register the configuration and the loader; vLLM may ask twice."""
    register_quantization_config(NAME)(Config)
    for load_format, loader in list(_LOAD_FORMAT_TO_MODEL_LOADER.items()):
        if loader is DefaultModelLoader and load_format in ("auto", "hf", "safetensors"):
            _LOAD_FORMAT_TO_MODEL_LOADER[load_format] = Loader

"""vLLM's side of 4-bit experts: the method of its fused experts, over our experts op.

vLLM's router picks the experts of every token, and its loader hands over one expert's matrices at a time. Each expert is
quantised as soon as its matrices are there, and the part of this process is kept: some experts with expert parallelism,
otherwise some rows of gate and up and some columns of down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, MoEActivation, apply_moe_activation

from ...adapters.experts import Experts, ExpertsLinear
from ...adapters.route import Rows
from ...formats.absmax import AbsmaxWeight
from .shards import Matrix, Part, take_matrix

_LAYER = "lowrank_ops"  # attribute of a layer of vLLM
_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


class StackedExperts(Experts):
    """expert_e(x) = W_down,e (act(W_gate,e x) ∘ (W_up,e x)), gate and up in one stack."""

    def __init__(self, first: Matrix, down: Matrix, activation: MoEActivation) -> None:
        super().__init__()
        self.gate_up_proj = ExpertsLinear.from_weight(first, quantize=None)
        self.down_proj = ExpertsLinear.from_weight(down, quantize=None)
        self.activation = activation

    def layers(self) -> list[ExpertsLinear]:
        return [self.gate_up_proj, self.down_proj]

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        h = self.gate_up_proj(x, rows)
        gated = h.new_empty(len(h), h.shape[1] // 2)
        apply_moe_activation(self.activation, gated, h)
        y: Tensor = self.down_proj(gated, rows)
        return y


class ExpertsMethod(FusedMoEMethodBase):
    """y[t] = Σ_i w[t, i] · expert_{index[t, i]}(x[t]) over the experts, or the parts of them, that this process has.

    Args:
        quantize: name and dense matrix -> the matrix as it is kept. The names are ``PREFIX.gate_up_proj`` and
            ``PREFIX.down_proj``, once for all experts.
        layer: vLLM's experts.
        prefix: their name in the model.

    Raises:
        ValueError: they have biases, no gate, or another activation than SiLU and GELU.
    """

    def __init__(self, quantize: Callable[[str, Tensor], Matrix], layer: Any, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.quantize, self.prefix = quantize, prefix
        limits = (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
        if self.moe.has_bias or layer.activation not in _ACTIVATIONS or any(one is not None for one in limits):
            bias = " and biases" if self.moe.has_bias else ""
            raise ValueError(
                f"{prefix}: experts with gate, up and down, SiLU or GELU and no biases or limits can be served by "
                f"--quantization lowrank_ops, and these have {layer.activation.value}{bias}; serve the model with "
                "lowrank-ops serve"
            )
        self.loaded: dict[
            tuple[str, int], Matrix
        ] = {}  # ("w1", "w2" or "w3", expert) until both of gate and up are there
        self.experts: dict[str, dict[int, Matrix]] = {"w13": {}, "w2": {}}

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        sizes = hidden_size, intermediate_size_per_partition
        for name in ("w13_weight", "w2_weight"):
            weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)

            def load(
                param: Tensor,
                loaded_weight: Tensor,
                weight_name: str,
                shard_id: str,
                expert_id: int,
                return_success: bool = False,
            ) -> bool | None:
                taken = self._load(layer, sizes, param, loaded_weight, shard_id, expert_id)
                return taken if return_success else None

            vars(weight)["weight_loader"] = load
            layer.register_parameter(name, weight)

    def _load(self, layer: Any, sizes: tuple[int, int], param: Tensor, tensor: Tensor, shard: str, expert: int) -> bool:
        """Take one matrix of one expert; tell whether this process has the expert."""
        local = layer._map_global_expert_id_to_local_expert_id(expert)
        if local == -1:
            return False
        hidden, inner = sizes
        ranks, rank = self.moe.tp_size, self.moe.tp_rank
        try:
            matrix = take_matrix(tensor, param)
            expected = (hidden, inner * ranks) if shard == "w2" else (inner * ranks, hidden)
            if tuple(matrix.shape) != expected:
                raise ValueError(f"a matrix {list(expected)} is needed, got {list(matrix.shape)}")
            if shard == "w2":
                part = Part(expected, ((0, hidden),), (rank * inner, (rank + 1) * inner))
                kept = self.quantize(f"{self.prefix}.down_proj", matrix) if isinstance(matrix, Tensor) else matrix
                self.experts["w2"][local] = part.take(kept)
                return True
            self.loaded[shard, local] = matrix
            gate, up = self.loaded.get(("w1", local)), self.loaded.get(("w3", local))
            if gate is not None and up is not None:
                self.experts["w13"][local] = self._first(gate, up, inner, rank)
                del self.loaded["w1", local], self.loaded["w3", local]
        except ValueError as error:
            split = f" (split over {ranks} processes)" if ranks > 1 else ""
            raise ValueError(f"{self.prefix}: expert {expert}, {shard}{split}: {error}") from error
        return True

    def _first(self, gate: Matrix, up: Matrix, inner: int, rank: int) -> Matrix:
        """The rows of gate that this process has, and below them its rows of up."""
        N, K = (int(size) for size in gate.shape)
        own = rank * inner, (rank + 1) * inner
        if isinstance(gate, Tensor) and isinstance(up, Tensor):
            joined = self.quantize(f"{self.prefix}.gate_up_proj", torch.cat([gate, up]))
            return Part.of_rows((2 * N, K), [own, (N + own[0], N + own[1])]).take(joined)
        part = Part.of_rows((N, K), [own])
        gate, up = part.take(gate), part.take(up)
        if not isinstance(gate, AbsmaxWeight) or type(gate) is not type(up):
            raise ValueError("gate and up must both be dense or both of one 4-bit format, NF4 or FP4")
        return type(gate).join([gate, up])

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if hasattr(layer, _LAYER):  # vLLM may ask twice
            return
        count = self.moe.num_local_experts
        for name, found in self.experts.items():
            if missing := sorted(set(range(count)) - found.keys()):
                raise ValueError(f"{self.prefix}: the checkpoint lacks matrices {name} of the experts {missing[:5]}")
        first, down = (_stack([found[e] for e in range(count)]) for found in self.experts.values())
        self.experts.clear()
        layer.register_module(_LAYER, StackedExperts(first, down, layer.activation))

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None  # vLLM's own kernels would read it

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        experts: StackedExperts = getattr(layer, _LAYER)
        if layer.expert_map is not None:  # experts of other processes count for nothing
            local = layer.expert_map[topk_ids.long()]
            topk_ids = torch.where(local < 0, experts.gate_up_proj.num_experts, local)
        return experts.mix(x, topk_ids, topk_weights, layer.apply_router_weight_on_input).to(x.dtype)


def _stack(matrices: list[Matrix]) -> Matrix:
    if isinstance(first := matrices[0], Tensor):
        return torch.stack([matrix for matrix in matrices if isinstance(matrix, Tensor)])
    kind: Any = type(first)
    made: Matrix = kind.stack(matrices)
    return made

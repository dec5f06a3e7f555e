"""vLLM's side of adapters: its managers of slots, over the arena of :mod:`.slots`.

vLLM keeps what it decides: which adapters are known, which of them have a slot, and each token's slot. The files are read
by us, the layers stay as they are, and no buffer is padded to the largest rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_tp_group
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.worker import lora_model_runner_mixin

from ...serving.store import ReadAdapter
from .quantization import NAME, layer_of
from .slots import Slots, arena_bytes


def _exchange(value: Any) -> list[Any]:
    """The values of all processes that have parts of the same matrices."""
    group = get_tp_group()
    told: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(told, value, group.cpu_group)
    return told


class Adapter(LoRAModel):
    """An adapter that vLLM knows, read by us."""

    def __init__(self, number: int, rank: int, read: ReadAdapter) -> None:
        super().__init__(number, rank, {})
        self.read = read


class Manager(LRUCacheLoRAModelManager):
    """Keeps the slots of a model's layers; --additional-config may have ``{"lowrank_ops": {"arena_bytes", "factors"}}``."""

    def __init__(self, *arguments: Any, vllm_config: Any, **options: Any) -> None:
        self._options = dict((vllm_config.additional_config or {}).get(NAME, {}))
        if unknown := self._options.keys() - {"arena_bytes", "factors"}:
            raise ValueError(f"additional_config: {NAME} has no option {', '.join(sorted(unknown))}")
        super().__init__(*arguments, vllm_config=vllm_config, **options)

    def _create_lora_modules(self) -> None:
        """Give the layers their slots; vLLM's own layers for adapters are not needed."""
        named = self.model.named_modules()
        layers = [layer for name, m in named if (layer := layer_of(m)) and self._match_target_modules(name)]
        if not layers:
            raise ValueError("the model has no linear layer that adapters could be routed to")
        count, rank, dtype = self.lora_slots, self.lora_config.max_lora_rank, self.lora_config.lora_dtype
        capacity = self._options.get("arena_bytes") or arena_bytes(layers, count, rank, dtype)
        self.routed = Slots(
            layers, count, self.max_num_batched_tokens, capacity, rank, dtype, self._options.get("factors"), _exchange
        )

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> LoRAModel:
        """An adapter without updates: the arena is there before memory is measured, and graphs are the same with others."""
        return LoRAModel(lora_id, rank, {})

    def _add_adapter(self, lora: LoRAModel) -> None:
        self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id: int) -> bool:
        if not super().activate_adapter(lora_id):
            return False
        adapter = self._registered_adapters[lora_id]
        if isinstance(adapter, Adapter):
            try:
                self.routed.put(self.lora_index_to_id.index(lora_id), adapter.read)
            except BaseException:
                self.deactivate_adapter(lora_id)
                raise
        return True

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            self.routed.clear(self.lora_index_to_id.index(lora_id))
        super()._deactivate_adapter(lora_id)

    def remove_all_adapters(self) -> None:
        for slot in range(self.lora_slots):
            self.routed.clear(slot)
        super().remove_all_adapters()

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        super()._set_adapter_mapping(mapping)
        if mapping.type == LoRAMappingType.LANGUAGE:
            wrapper = next(iter(self.punica_wrapper_mapping.values()))
            present = set(mapping.index_mapping)
            active = [slot for slot, number in enumerate(self.lora_index_to_id) if number in present]
            self.routed.route(wrapper.token_lora_indices, active)


class WorkerManager(LRUCacheWorkerLoRAManager):
    """Reads adapters of every kind from their directories."""

    _manager_cls = Manager

    def _apply_adapters(self, lora_requests: Iterable[LoRARequest | None]) -> None:
        """Load what is missing in one order: the processes of a split model exchange weights for it, and a set has an order
        of its own in each of them."""
        super()._apply_adapters(sorted((one for one in lora_requests if one), key=lambda one: one.lora_int_id))

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        routed: Slots = self._adapter_manager.routed
        try:
            read = routed.read(Path(get_adapter_absolute_path(lora_request.lora_path)))
        except FileNotFoundError as error:
            raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path) from error
        return Adapter(lora_request.lora_int_id, int(read.version.rows.fields[:, 0].max()), read)


_STOCK = LRUCacheWorkerLoRAManager


def _manager(vllm_config: Any, device: torch.device, embedding_modules: dict[str, str]) -> LRUCacheWorkerLoRAManager:
    """The manager of adapters for a model: ours where the weights are."""
    ours = vllm_config.model_config.quantization == NAME
    return (WorkerManager if ours else _STOCK)(vllm_config, device, embedding_modules)


def install() -> None:
    """Let vLLM make our managers for models of ours; it may ask twice."""
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = _manager

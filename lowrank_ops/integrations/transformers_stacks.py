"""Stacks of experts in the files of transformers: quantised expert by expert while they are read, written as published.

Most files hold one matrix for each expert and projection, which transformers joins to the Parameter of a block. Here each
expert is joined and quantised by itself. 4-bit experts are written under the same names, as bitsandbytes' entries of
matrices, which is how directories of MoE models quantised by bitsandbytes look; experts that are published as one tensor are
written as the entries of a stack.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    revert_weight_conversion,
)

from ..adapters.experts import Experts, ExpertsLinear, Stack
from ..adapters.rounding import Base, join_bases
from ..formats import QuantizedWeight, from_state_dict

# Before a pattern for names, so that "experts" does not match the end of "shared_experts".
WHOLE_NAME = r"(?<!\w)"


class Whole(ConversionOps):
    """A tensor as it is; its name in files is that in the model."""

    def convert(
        self, input_dict: dict[str, Any], *arguments: Any, target_patterns: Any = (), **options: Any
    ) -> dict[str, Any]:
        return dict(zip(target_patterns, input_dict.values(), strict=True))


class ByExpert(WeightConverter):
    """Reads, joins and quantises the matrices of a stack one expert at a time."""

    __slots__ = ()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> Any:
        stack: Stack | None = getattr(hf_quantizer, "stacks", {}).get(layer_name)
        jobs = self.collected_tensors
        counts = {len(found) for found in jobs.values()}
        alone = all(callable(job) for found in jobs.values() for job in found)
        if stack is None or self.quantization_operation is None or not alone:
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        E = stack.shape[0]
        if counts == {1} and isinstance(self.operations[0], Whole):
            ((job,),) = jobs.values()
            experts: Iterable[Tensor] = _experts_of(job, stack)
        elif counts == {E}:
            experts = self._joined(layer_name, model, config)
        else:
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        layer, rounding = hf_quantizer.roundings[layer_name]
        missing = loading_info.missing_keys

        def make(stack: Stack) -> Base:
            made = []
            for e, (expert, of_expert) in enumerate(zip(experts, rounding.of_experts(E), strict=True)):
                weight = expert.mT if stack.matrix.transposed else expert
                if weight.shape != stack.shape[1:]:
                    raise ValueError(f"expert {e} is {list(weight.shape)} and the model needs {list(stack.shape[1:])}")
                if of_expert.moment is not None and int(of_expert.moment.count):
                    of_expert.moment.check(weight, f"{layer}.{e}")
                made.append(of_expert.keep(weight))
            return join_bases(made)

        result = hf_quantizer.place_stack(model, layer_name, make, missing)
        jobs.clear()
        return result

    def _joined(self, layer_name: str, model: Any, config: Any) -> Iterator[Tensor]:
        """Each expert as the model has it, from its matrices in the files."""
        for parts in zip(*self.collected_tensors.values(), strict=True):
            tensors = {name: job() for name, job in zip(self.collected_tensors, parts, strict=True)}
            yield join_expert(self, tensors, layer_name, model, config)


def joins_matrices(conversion: Any) -> bool:
    """Whether a converter makes a stack of matrices by joining them alone."""
    operations = getattr(conversion, "operations", [])
    return bool(operations) and all(isinstance(op, MergeModulelist | Concatenate) for op in operations)


def turns_older_files(conversion: Any) -> bool:
    """Whether a converter only transposes a tensor that is not as the model has it, which no file in 4 bits is."""
    operations = getattr(conversion, "operations", [])
    return bool(operations) and all(isinstance(op, Transpose) and op.check_dims for op in operations)


def join_expert(conversion: Any, tensors: dict[str, Tensor], layer_name: str, model: Any, config: Any) -> Tensor:
    """One expert as the model has it, from its matrices by the source patterns of a converter that joins them."""
    made: dict[str, Any] = {name: [tensor] for name, tensor in tensors.items()}
    for op in conversion.operations:
        made = op.convert(
            made,
            source_patterns=conversion.source_patterns,
            target_patterns=conversion.target_patterns,
            full_layer_name=layer_name,
            model=model,
            config=config,
        )
    ((joined,),) = made.values()
    return joined


class JoinEntries(WeightConverter):
    """Joins the 4-bit matrices of experts to the stack of a block; dense ones pass as transformers joins them."""

    __slots__ = ("original",)  # the model's converter

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> Any:
        if len(self.collected_tensors) == len(self.target_names()):
            dtype = model.get_parameter(layer_name).dtype
            made = super().convert(layer_name, model, config, hf_quantizer, loading_info)
            return {name: tensor.to(dtype) for name, tensor in made.items()}
        found: Any = self.materialize_tensors()

        def make(stack: Stack) -> Base:
            made = []
            for e in range(stack.shape[0]):
                parts: list[Any] = []
                for name in self.target_names():
                    entries = {
                        key.removeprefix(name): tensors for key, tensors in found.items() if key.startswith(name)
                    }
                    entries = {f"weight{end}": tensors[e] for end, tensors in entries.items() if e < len(tensors)}
                    parts.append(from_state_dict(entries, "weight"))
                made.append(parts[0] if len(parts) == 1 else type(parts[0]).join(parts))
            return Base(type(made[0]).stack(made))

        return hf_quantizer.place_stack(model, layer_name, make, loading_info.missing_keys)

    def target_names(self) -> list[str]:
        """The names of the matrices, without the endings of entries."""
        return [name for name in self.source_patterns if name.endswith(".weight")]


def converters(conversions: list[Any], stacks: dict[str, Stack], endings: Iterable[str], read: Any) -> list[Any]:
    """A model's converters with those in place of them that make 4-bit stacks.

    Args:
        conversions: of the model.
        stacks: the Parameters that get 4 bits, by name.
        endings: of the entries of a 4-bit weight.
        read: the operation that reads entries of a stack, or None if the files are dense.
    """
    made: list[Any] = []
    endings = sorted(endings, key=len, reverse=True)
    for conversion in conversions:
        targets_stack = any(target in name for target in conversion.target_patterns for name in stacks)
        if read is not None and targets_stack and turns_older_files(conversion):
            continue
        if joins_matrices(conversion) and targets_stack:
            if read is None:
                conversion = copy.deepcopy(conversion)
                conversion.__class__ = ByExpert
            else:
                names, targets = conversion._original_source_patterns, conversion._original_target_patterns
                joined = JoinEntries(
                    [name + end for end in endings for name in names], list(targets), conversion.operations
                )
                joined.original = conversion
                for scope in ("scope_prefix", "base_model_prefix"):
                    setattr(joined, scope, getattr(conversion, scope, None))
                conversion = joined
        made.append(conversion)
    for name in sorted({".".join(name.split(".")[-2:]) for name in stacks}):
        whole = WHOLE_NAME + name
        if read is None:
            made.append(ByExpert([whole], [name], [Whole()]))
        else:
            made.append(WeightConverter([whole + end for end in endings], [name], [read]))
    return made


def _experts_of(job: Any, stack: Stack) -> Iterator[Tensor]:
    """The experts of one tensor in a file as the model has them, each read by itself where the tensor is not read yet."""
    held = inspect.getclosurevars(job).nonlocals  # what transformers will read, and to where
    tensor = held.get("tensor")
    if hasattr(tensor, "get_shape") and held.get("sharding_op") is None:
        for part in experts_in(tensor, stack):
            yield part.to(device=held.get("device"), dtype=held.get("dtype"))
    else:
        yield from experts_in(job(), stack)


def experts_in(tensor: Any, stack: Stack) -> Iterator[Tensor]:
    """The experts in a stack of theirs, a tensor or a slice of safetensors that is read expert by expert."""
    E = stack.shape[0]
    rows = (tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)[0] // E
    for e in range(E):
        yield tensor[e * rows : (e + 1) * rows] if stack.matrix.experts else tensor[e : e + 1][0]


def stacks_as_published(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the names of published files, in which stacks of experts are matrices as they are published."""
    state = dict(state)
    for name in getattr(model, "all_tied_weights_keys", None) or {}:
        state.pop(name, None)
    experts: dict[str, Tensor] = {}
    for path, block in model.named_modules():
        if not isinstance(block, Experts):
            continue
        for matrix in block.layout.matrices:
            name = f"{path}.{matrix.name}" if path else matrix.name
            layer = block.get_submodule(matrix.name)
            assert isinstance(layer, ExpertsLinear)
            if matrix.bias is not None and f"{name}.bias" in state:
                state[f"{path}.{matrix.bias}"] = state.pop(f"{name}.bias")
            for key in [key for key in state if key.startswith(f"{name}.")]:
                tensor = state.pop(key)
                if not key.startswith(f"{name}.weight"):  # of the adapter, whose names stay
                    experts[key] = tensor
            if isinstance(layer.weight, QuantizedWeight):
                experts |= published_entries(model, name, layer.weight, matrix)
            elif layer.weight is not None:
                state[name] = matrix.stored(layer.weight.detach())
    return _reverted(model, state) | experts


def _reverted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the names and layouts of published files."""
    own = model.get_parameter
    # Transpose asks the model for the shape of a Parameter, in whose place a layer of ours stands.
    vars(model)["get_parameter"] = lambda name: state[name] if name in state else own(name)
    try:
        return revert_weight_conversion(model, state)  # type: ignore[arg-type]
    finally:
        del vars(model)["get_parameter"]


def published_entries(model: nn.Module, name: str, weight: QuantizedWeight, matrix: Any) -> dict[str, Tensor]:
    """The entries of a stack under the names that its matrices have in published files."""
    E, N, _ = weight.shape
    # Numbers of rows in the place of the weight show which of them are a matrix in the files.
    numbers = torch.arange(E * N, dtype=torch.float64).view(E, N, 1)
    parts = _reverted(model, {name: matrix.stored(numbers)})
    entries: dict[str, Tensor] = {}
    for key, part in parts.items():
        rows = part.flatten().long()
        if len(rows) == E * N:
            return weight._entries(key)
        start, stop = int(rows[0]), int(rows[-1]) + 1
        if not torch.equal(rows, torch.arange(start, stop)) or start // N != (stop - 1) // N:
            raise ValueError(f"{key!r} holds other rows of {name!r} than those of one expert, which 4 bits cannot keep")
        expert = weight[start // N]
        if (start % N, stop - start) != (0, N):
            expert = expert.cut(0, start % N, start % N + stop - start)
        entries |= expert._entries(key)
    return entries

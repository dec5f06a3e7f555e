"""transformers' from_pretrained and save_pretrained for models with 4-bit layers of lowrank_ops.

transformers imports this file by itself (see :func:`lowrank_ops.integrations.transformers.follow_import`). It registers a
quantizer and puts two functions around transformers' own:

- ``AutoHfQuantizer.merge_quantization_configs`` chooses who reads files that have 4 bits already: this file where the call
  says so by a configuration of ours, where lowrank_ops wrote the files, or where bitsandbytes, which wrote them, is not
  installed;
- ``PreTrainedModel.save_pretrained`` writes bitsandbytes' ``quantization_config``, and a directory as a whole or not at all.

A loaded model keeps no trace of the quantizer: it is the model that :func:`lowrank_ops.adapt` makes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import is_bitsandbytes_available

from ..adapters.branch_files import FOLDER, read_branches, write_branches
from ..adapters.config import CONFIGS, WeightConfig, fit_budget
from ..adapters.conv import conv_over_weight
from ..adapters.embedding import Embedding, is_embedding
from ..adapters.experts import Experts, ExpertsLinear, Stack, find_stacks, stand_in
from ..adapters.foreign import is_conv, is_conv1d, is_linear, linear_shape
from ..adapters.linear import AdaptedLayer, Linear
from ..adapters.model import MERGED, freeze, replace_layers
from ..adapters.precompute import RENAMERS
from ..adapters.rounding import Base, RoundingPlan
from ..adapters.state_files import restore_adapters
from ..adapters.targets import shape_of
from ..formats import FLOAT_DTYPES, MARKS, QuantizedWeight, from_state_dict
from .transformers_files import (
    BRANCH,
    Files,
    configured,
    dense_conv1d,
    describe,
    names_in_model,
    save_whole,
    surplus_entries,
)
from .transformers_stacks import WHOLE_NAME, JoinEntries, Whole, converters, stacks_as_published

# The endings of the entries of one weight with bitsandbytes' scales, and of MXFP4's.
_ABSMAX = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    *(MARKS[n] for n in ("nf4", "fp4", "int8")),
)
_MXFP4 = ("_blocks", "_scales")


class Quantizer(HfQuantizer):
    """Makes 4-bit layers of ours while transformers reads a model, one tensor at a time."""

    requires_calibration = False
    is_trainable = True

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.config: WeightConfig = quantization_config
        self.files = Files([])
        # The names of the weights that get 4 bits, each with all names of its layer.
        self.layers: dict[str, list[str]] = {}
        self.missing: set[str] = set()
        # The names of the weights of embeddings among them, each with those that are tied to it and not in the files.
        self.tied: dict[str, list[str]] = {}
        # Ties to these, target -> source, which transformers is not to see while it reads.
        self.cut: dict[str, str] = {}
        # The Parameters of experts that get 4 bits, and their weights as far as they were read.
        self.stacks: dict[str, Stack] = {}
        # The weights of Conv1D that the files have as a layer of ours with an adapter has them, [N, K].
        self.turned: set[str] = set()
        self.made: dict[str, Base] = {}
        # Name of a weight or a Parameter of experts -> how it is rounded, with the name of its layer.
        self.roundings: dict[str, tuple[str, RoundingPlan]] = {}

    def __deepcopy__(self, memo: Any) -> Quantizer:
        return self  # transformers copies the operations of a converter for every tensor

    def is_serializable(self, *arguments: Any, **options: Any) -> bool:
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16 for a model in 4 bits, got {dtype}")
        return dtype

    def validate_environment(self, *arguments: Any, device_map: Any = None, **options: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts layers on disk, where 4-bit weights cannot stay; use 'cpu', or a device that holds them"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        self.files = Files(checkpoint_files or [])
        quantized = self.files.quantized()
        if self.pre_quantized and not (quantized or self.files.adapters()) and self.files.entries:
            raise ValueError(
                f"{self.files} hold no 4-bit weight, and quantization_config in config.json says that they do; remove it "
                "there to quantise the model while it is read"
            )
        # Files of 4-bit weights without a quantization_config, as a state dict that was saved by hand.
        self.pre_quantized = self.pre_quantized or bool(quantized)
        if not self.pre_quantized:
            self.files.check_dense()
            targets = self.config.choose(model)
            self.stacks = {name: target for name, target in targets.items() if isinstance(target, Stack)}
            plain_rounded = nn.Embedding | nn.Conv1d | nn.Conv2d  # at which the calibration does not look
            shapes = {n: shape_of(t) for n, t in targets.items() if not isinstance(t, plain_rounded)}
            in_int8 = self.config.in_int8(model)
            roundings = self.config.roundings(shapes, in_int8)
            for own, target in targets.items():
                for key in [own] if isinstance(target, Stack) else _weights_of(model, target):
                    self.roundings[key] = own, roundings.get(own) or self.config.plan(own in in_int8)
            chosen = {layer for layer in targets.values() if isinstance(layer, nn.Module)}
        else:
            self.files.check_quantized((*_ABSMAX, *_MXFP4))
            self.stacks = find_stacks(dict(model.named_modules()))
            held = quantized | {f"{name}.weight" for name in self.files.adapted()}
            prefix = getattr(model, "base_model_prefix", "")
            key_at = {at: key for key in held for at in (f"{prefix}.{key}", key.removeprefix(f"{prefix}."), key)}
            chosen = set()
            for name, layer in model.named_modules():
                held_as = key_at.get(f"{name}.weight")
                if held_as in quantized and (is_linear(layer) or is_embedding(layer) or is_conv(layer)):
                    chosen.add(layer)
                elif held_as is not None and is_conv1d(layer):
                    self.turned.add(f"{name}.weight")
        ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        for name, layer in model.named_modules():
            if layer in chosen and isinstance(layer, nn.Embedding):
                weight = f"{name}.weight"
                self.tied[weight] = [t for t, source in ties.items() if source == weight and not self.files.hold(t)]
        chosen |= {model.get_submodule(t.removesuffix(".weight")) for targets in self.tied.values() for t in targets}
        places: dict[nn.Module, list[str]] = {}
        for name, layer in model.named_modules(remove_duplicate=False):
            if layer in chosen:
                places.setdefault(layer, []).append(name)
        self.layers = {f"{name}.weight": names for names in places.values() for name in names}
        if keys := self.files.adapters():
            ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
            vars(model)["_keys_to_ignore_on_load_unexpected"] = {*ignored, *(f"{re.escape(key)}$" for key in keys)}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **options: Any) -> bool:
        return param_name in self.layers or param_name in self.stacks

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        kept = self.param_needs_quantization(model, param_name)
        return self.config.bytes_per_weight() if kept else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        if not self.pre_quantized:
            return []
        # transformers before 5.23 takes the first name that a key begins with.
        names = sorted((f"weight{ending}" for ending in (*_ABSMAX, *_MXFP4)), key=len, reverse=True)
        return [WeightConverter(names, "weight", [_Read(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        read = _Read(self) if self.pre_quantized else None
        made = converters(weight_conversions, self.stacks, (*_ABSMAX, *_MXFP4), read)
        return made + self.get_weight_conversions()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to read a tensor in, None for its own; transformers asks before it collects the tensor."""
        floating = (
            param.get_dtype().startswith(("F", "BF")) if hasattr(param, "get_dtype") else param.is_floating_point()
        )
        if isinstance(converter, JoinEntries):
            return None  # it casts dense experts itself
        reads = any(isinstance(op, _Read) for op in getattr(converter, "operations", ()))
        # Of the entries of a layer "weight" comes first. If it is floating, it is dense or checked by _Read.
        return dtype if floating and not (reads and converter.collected_tensors) else None

    def keep(self, name: str, dense: Tensor) -> Base:
        """What stands in place of a dense weight: a matrix of a layer, by the weight's name."""
        layer, rounding = self.roundings[name]
        if rounding.moment is not None:
            rounding.moment.check(dense, layer)
        return rounding.keep(dense)

    def place(self, model: nn.Module, name: str, make: Callable[[nn.Module], Base], missing: Any) -> Any:
        """Put a 4-bit layer in the place of the one whose weight has the name; what transformers is to do then: nothing."""
        try:
            old = model.get_submodule(name.removesuffix(".weight"))
            if not isinstance(old, AdaptedLayer):  # which a second name of the layer has made
                base = make(old)
                for tied in [name, *self.tied.get(name, [])]:
                    path = tied.removesuffix(".weight")
                    layer = _layer_over(model.get_submodule(path), base)
                    for place in self.layers.get(tied, [path]):
                        model.set_submodule(place, layer)
                        missing.discard(f"{place}.weight")
                self.missing = missing
                ties: dict[str, str] = vars(model).get("all_tied_weights_keys", {})
                for target in [target for target, source in ties.items() if source == name]:
                    self.cut[target] = ties.pop(target)  # else transformers looks for a Parameter
        except (ValueError, TypeError, RuntimeError) as error:
            return _Failed(ValueError(f"{self.files.origin(name)}: {error}"))
        return {}

    def place_stack(self, model: Any, name: str, make: Callable[[Stack], Base], missing: Any) -> Any:
        """Keep the 4-bit weight of a stack until its block is complete; what transformers is to do then: nothing."""
        stack = self.stacks[name]
        try:
            base = make(stack)
            weight = base.weight
            if weight.shape != stack.shape:
                raise ValueError(f"it is {list(weight.shape)} and the model, by config.json, needs {list(stack.shape)}")
        except (ValueError, TypeError, RuntimeError) as error:
            return _Failed(ValueError(f"{self.files.origin(name)}: {error}"))
        assert isinstance(weight, QuantizedWeight)
        if weight.format.name == "mxfp4":  # its entries do not say the dtype
            weight.dtype = stack.holder.get_parameter(stack.matrix.name.rpartition(".")[2]).dtype
        self.made[name] = base
        missing.discard(name)
        return {}

    def _stand_in(self, model: Any) -> None:
        """Put :class:`Experts` in the places of blocks whose stacks were read."""
        for path, block in list(model.named_modules()):
            own = {name: stack for name, stack in self.stacks.items() if stack.block is block and name in self.made}
            if not own:
                continue
            layers = {}
            for name, stack in own.items():
                bias = None if stack.matrix.bias is None else block.get_parameter(stack.matrix.bias)
                base, turned = self.made.pop(name), stack.matrix.transposed
                layers[stack.matrix.name] = made = ExpertsLinear.from_weight(
                    base.weight, bias, transposed=turned, branch=base.branch
                )
                made.loss = base.loss
            model.set_submodule(path, stand_in(block, layers))

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        self._stand_in(model)
        # What saving reverses: the model's own converters.
        used = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            getattr(c, "original", c)
            for c in used
            if not any(isinstance(op, _Read | Whole) for op in getattr(c, "operations", ()))
        ]
        names = [
            name if isinstance(layer, Stack) else f"{name}.weight"
            for name, layer in self.config.choose(model).items()
            if not isinstance(layer, AdaptedLayer)
        ]
        offset = ".core_offset"  # of the replace form, which has no weight
        given = {
            key.removesuffix(offset) + end
            for key in self.files.adapters()
            if key.endswith(offset)
            for end in (".weight", "")
        }
        if names := [name for name in names if name in self.missing - given]:
            raise ValueError(
                f"{self.files} lack {len(names)} weights of layers in 4 bits: {', '.join(names[:3])}"
                f"{', …' * (len(names) > 3)}. If they are right, give quantization_config=lowrank_ops.NF4Config(skip=[...]) "
                "these layers, and transformers draws them at random"
            )
        # A head that is tied to the embedding, or the embedding, has no tensor of its own in the files.
        tied: dict[str, Any] = {} if self.pre_quantized else self.config.choose(model)
        replacements: dict[nn.Module, nn.Module] = {}
        for name, layer in tied.items():
            if isinstance(layer, AdaptedLayer | Stack) or layer in replacements:
                continue
            embeds, base = isinstance(layer, nn.Embedding), self.keep(f"{name}.weight", layer.weight.detach())
            sharing = [m for m in model.modules() if embeds and m._parameters.get("weight") is layer.weight]
            replacements |= {other: _layer_over(other, base) for other in sharing or [layer]}
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        vars(model).get("all_tied_weights_keys", {}).update(self.cut)
        replace_layers(model, replacements)  # which tells the other integrations
        for layer in model.modules():  # transformers fills this buffer only in classes of its own
            if isinstance(layer, Embedding) and isinstance(layer.embed_scale, Tensor):
                shell: Any = layer._shell[0]
                layer.embed_scale.fill_(shell.scalar_embed_scale)
        if self.config.compensate_bytes is not None:
            ours = {name: m for name, m in model.named_modules() if isinstance(m, Linear | ExpertsLinear)}
            fit_budget(ours, self.config.compensate_bytes)
        if self.config.has_branch:
            folder = self.files.paths[0].parent / FOLDER
            if not folder.is_dir():
                raise ValueError(
                    f"{folder} is missing: the model was saved with branches, which are a part of it; copy or download that "
                    f"folder too, or remove {BRANCH!r} from config.json to read the 4-bit weights alone"
                )
            read_branches(model, folder)
        if (state := self.files.state()) is not None:
            restore_adapters(model, state)
            freeze(model)
        return model


def _weights_of(model: nn.Module, layer: nn.Module) -> list[str]:
    """Every name that the weight of a layer has."""
    return [f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if module is layer]


def _layer_over(old: Any, base: Base) -> AdaptedLayer:
    """What stands in the place of a layer or an embedding whose weight is in 4 bits."""
    weight = base.weight
    assert isinstance(weight, QuantizedWeight)
    if isinstance(old, nn.Embedding):
        return Embedding.from_weight(weight, old)
    if is_conv(old):
        return conv_over_weight(weight, old)
    if not is_linear(old):
        raise ValueError(
            f"a {type(old).__name__} is tied to the embedding, and only linear layers can share 4-bit weights"
        )
    layer = Linear.from_weight(weight, branch=base.branch)
    layer.loss = base.loss
    layer.register_parameter("bias", old.bias)
    layer.transposed = is_conv1d(old)
    return layer.train(old.training)


class _Failed(dict[str, Any]):
    """An error in the place of a result. transformers gathers errors of conversions and tells them by a traceback in a
    table; it looks at results outside of that."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def items(self) -> NoReturn:
        raise self.error


class _Quantize(ConversionOps):
    """One dense weight to a 4-bit layer."""

    # The name that transformers looks for.
    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], *arguments: Any, model: Any = None, missing_keys: Any = None, **options: Any
    ) -> dict[str, Any]:
        ((name, value),) = input_dict.items()
        dense = value[0] if isinstance(value, list) else value
        keep = self.hf_quantizer.keep
        if name in self.hf_quantizer.stacks:
            return self.hf_quantizer.place_stack(
                model, name, lambda stack: keep(name, stack.matrix.view(dense)), missing_keys
            )

        def make(old: Any) -> Base:
            expected = old.weight.shape
            if dense.shape != expected:
                raise ValueError(
                    f"it is {list(dense.shape)} and the model, by config.json, needs {list(expected)}; the file is another "
                    "model's"
                )
            dense_matrix = dense.flatten(1) if is_conv(old) else dense.t() if is_conv1d(old) else dense
            return keep(name, dense_matrix)

        return self.hf_quantizer.place(model, name, make, missing_keys)


class _Read(ConversionOps):
    """The entries of one 4-bit weight to a layer; a dense weight passes."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *arguments: Any,
        target_patterns: Any = ("weight",),
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        base = target_patterns[0]  # "weight", or the name of a stack
        entries = {
            key.removeprefix(WHOLE_NAME): value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        dense: Any = entries.get(base)
        plain = list(entries) == [base] and dense.is_floating_point()
        if plain and full_layer_name not in self.hf_quantizer.layers:
            return {base: dense.t().contiguous() if full_layer_name in self.hf_quantizer.turned else dense}
        if full_layer_name in self.hf_quantizer.stacks:
            return self.hf_quantizer.place_stack(
                model, full_layer_name, lambda stack: Base(from_state_dict(entries, base)), missing_keys
            )
        files = self.hf_quantizer.files

        def make(old: Any) -> Base:
            if isinstance(dense, Tensor) and dense.is_floating_point() and dense.dtype not in files.storage_dtypes():
                raise ValueError(
                    f"its bytes are stored as another dtype and were read as {dense.dtype}; call from_pretrained with "
                    f"dtype={next(iter(files.storage_dtypes()), None)}"
                )
            weight = from_state_dict(entries, base)
            if not (is_linear(old) or is_embedding(old) or is_conv(old)):
                raise ValueError(
                    "the model, by config.json, has no linear layer, convolution or embedding there but a "
                    f"{type(old).__name__}"
                )
            dense_shape = isinstance(old, nn.Embedding) or is_conv(old)
            expected = old.weight.flatten(1).shape if dense_shape else linear_shape(old)
            if weight.shape != expected:
                raise ValueError(f"it is {list(weight.shape)} and the model, by config.json, needs {list(expected)}")
            if weight.format.name == "mxfp4":  # its entries do not say the dtype
                weight.dtype = old.weight.dtype
            return Base(weight)

        return self.hf_quantizer.place(model, full_layer_name, make, missing_keys)


def _config_of(stored: Mapping[str, Any]) -> WeightConfig:
    """The configuration that stands for a quantization_config in config.json."""
    method = getattr(stored.get("quant_method"), "value", stored.get("quant_method"))
    if stored.get("load_in_4bit") and method in (None, "bitsandbytes"):
        kind = stored.get("bnb_4bit_quant_type", "fp4")
    else:
        kind = stored.get("format") if method == WeightConfig.quant_method else method
    if kind not in CONFIGS or stored.get("load_in_8bit"):
        raise ValueError(
            f"quantization_config in config.json says quant_method {method!r}"
            f"{' with load_in_8bit' if stored.get('load_in_8bit') else ''}; lowrank_ops reads bitsandbytes' 4-bit formats "
            "and MXFP4. Load the model without a configuration of lowrank_ops, or quantise its dense original"
        )
    config = CONFIGS[kind]()
    object.__setattr__(config, "has_branch", bool(stored.get(BRANCH)))
    return config


def _choosing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any = None) -> Any:
        given = quantization_config_from_args
        stored = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        if isinstance(given, WeightConfig):
            if given.calibration is not None:
                raise ValueError(
                    "the files have 4 bits already, and calibration rounds dense weights; give the dense model"
                )
            return _config_of(stored)
        foreign = stored.get("load_in_4bit") and not is_bitsandbytes_available()
        if given is None and (foreign or WeightConfig.quant_method in (stored.get("quant_method"), *stored)):
            return _config_of(stored)
        return original(quantization_config, given)

    return merge_quantization_configs


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel, save_directory: Any, is_main_process: bool = True, *arguments: Any, **options: Any
    ) -> Any:
        if not is_main_process or Path(save_directory).is_file():
            return original(self, save_directory, is_main_process, *arguments, **options)
        if dense := dense_conv1d(self):
            state = dict(options.get("state_dict") or self.state_dict())
            options["state_dict"] = state | {key: state[key].t() for key in dense & state.keys()}
        if options.get("save_original_format", True) and any(isinstance(m, Experts) for m in self.modules()):
            state = options.get("state_dict") or self.state_dict()
            options |= {"state_dict": stacks_as_published(self, state), "save_original_format": False}
        description = describe(self)
        if description is None and not getattr(self, MERGED, False):
            return original(self, save_directory, is_main_process, *arguments, **options)
        if options.get("push_to_hub"):  # transformers takes the name from the directory
            options.setdefault("repo_id", Path(save_directory).name)
        if shared := surplus_entries(self):
            state = options.get("state_dict") or self.state_dict()
            options["state_dict"] = {key: tensor for key, tensor in state.items() if key not in shared}
        with configured(self, description), save_whole(Path(save_directory)) as scratch:
            write_branches(self, scratch / FOLDER)
            return original(self, str(scratch), is_main_process, *arguments, **options)

    return save_pretrained


def register() -> None:
    """Make transformers use this file."""
    auto.register_quantizer(WeightConfig.quant_method)(Quantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[WeightConfig.quant_method] = WeightConfig
    choose = auto.AutoHfQuantizer.merge_quantization_configs
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(_choosing(choose))  # type: ignore[method-assign]
    RENAMERS.append(names_in_model)
    PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)  # type: ignore[method-assign]

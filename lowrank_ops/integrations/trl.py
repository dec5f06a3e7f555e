"""TRL's trainers over adapted models: the reference is :func:`lowrank_ops.reference` of the model, not another model.

To TRL a model that is no PeftModel is fully fine-tuned: where DPO, KTO, GRPO and RLOO are given no reference they load what
``config._name_or_path`` names, dense and without the adapter. Of an adapted model that name is a :class:`BasePath`. Read by
the function of TRL that loads references, it leads transformers to a model type that is registered here and whose
``from_pretrained`` makes the reference; to everything else it is the name. Nothing of TRL is replaced.

TRL also multiplies by the weight of the output head itself, where an adapter of that head would have no part. A hook on the
forward of the model refuses such calls.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..adapters import model as _model
from ..adapters.linear import AdaptedLayer, Linear
from ..adapters.references import reference

_TYPE = "lowrank_ops_reference"
# A config.json of that type, which transformers reads.
_DIRECTORY = Path(__file__).parent / "trl_reference"
_CHOSEN: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def use_reference(model: nn.Module, made: nn.Module | None) -> None:
    """Choose what TRL's trainers take for the reference of a model where they would load one (DPO, KTO, GRPO, RLOO).

    Without it that is ``lowrank_ops.reference(model)``: the model with the adapter as it stands when the trainer is made.

    Args:
        model: that :func:`lowrank_ops.adapt` or :func:`lowrank_ops.load_adapter` made, as the trainer is given it.
        made: ``lowrank_ops.reference(model, adapter=False)``, say, for the model before it was adapted; None takes a choice
            back.

    Raises:
        ValueError: the model has no layer of ours, or is itself the reference.
        TypeError: the reference is no module.
    """
    if not any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise ValueError(f"model, a {type(model).__name__}, is not adapted, and TRL loads its reference by itself")
    if made is model:
        raise ValueError("made must be another module than model; use lowrank_ops.reference(model)")
    if made is not None and not isinstance(made, nn.Module):
        raise TypeError(f"made must be a module or None, got {type(made).__name__}")
    mark(model)  # its layers may have been replaced by hand
    if made is None:
        _CHOSEN.pop(model, None)
    else:
        _CHOSEN[model] = made


class BasePath(str):
    """Where the base of an adapted model came from. As text it is that name, but while TRL loads a reference."""

    def __str__(self) -> str:
        if _loading() is None:
            return str.__str__(self)
        _register_type()
        return str(_DIRECTORY)


def mark(model: nn.Module) -> None:
    """Make the name in the configuration of a model a :class:`BasePath` where the model has layers of ours, else plain.

    A model whose output head is a layer of ours also gets the hook that checks it.
    """
    ours = any(isinstance(module, AdaptedLayer) for module in model.modules())
    for module in model.modules():
        config = vars(module).get("config")
        name = getattr(config, "_name_or_path", None)
        if isinstance(name, str) and isinstance(name, BasePath) != ours:
            config._name_or_path = BasePath(name) if ours else str.__str__(name)  # type: ignore[union-attr]
            _let_yaml_write_paths()
        _watch_head(module)


def _watch_head(model: Any) -> None:
    """Give a model the hook that checks its output head where that is a layer of ours, else take it away."""
    if not hasattr(model, "get_output_embeddings"):
        return
    hooks = model._forward_pre_hooks
    checks = [key for key, hook in hooks.items() if hook is _check_head]
    ours = isinstance(model.get_output_embeddings(), Linear)
    if ours and not checks:
        model.register_forward_pre_hook(_check_head, with_kwargs=True)
    for key in checks if not ours else ():
        del hooks[key], model._forward_pre_hooks_with_kwargs[key]


def _check_head(model: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise where TRL calls the model to multiply by the numbers in the weight of its output head."""
    if not options.get("fused_lm_head"):
        return
    head = model.get_output_embeddings()
    if isinstance(head, Linear) and (head.adapter is not None or not isinstance(head.weight, Tensor)):
        name = next((name for name, module in model.named_modules() if module is head), "lm_head")
        state = "adapted" if head.adapter is not None else "kept in 4 bits"
        raise ValueError(
            f"layer {name!r}, the output head, is {state}, and TRL multiplies by its weight without calling the layer; "
            f"leave {name!r} out of the targets of lowrank_ops.adapt (targets='all-linear' does)"
        )


_model.AFTER_REPLACING.append(mark)


def _loading() -> FrameType | None:
    """The call of TRL that loads a reference, where there is one on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "create_model_from_path" and name.partition(".")[0] == "trl":
            return frame
        frame = frame.f_back
    return None


def _reference_of(path: Any) -> nn.Module:
    """The reference of the model for whose trainer TRL loads one from a path."""
    loading = _loading()
    trainer = None if loading is None or loading.f_back is None else loading.f_back.f_locals.get("self")
    model = getattr(trainer, "model", None)
    if not isinstance(model, nn.Module) or getattr(getattr(model, "config", None), "_name_or_path", None) is not path:
        raise ValueError(
            f"{str.__str__(path)!r} is the dense base of an adapted model and not its reference; give the trainer "
            "ref_model=lowrank_ops.reference(model)"
        )
    if getattr(getattr(trainer, "args", None), "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True mixes weights into the reference, which shares the memory of the frozen ones with the "
            "model; it must be False for an adapted model"
        )
    chosen = _CHOSEN.get(model)
    return reference(model) if chosen is None else chosen


@functools.cache
def _register_type() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    class ReferenceConfig(PretrainedConfig):
        model_type = _TYPE

    class Reference:
        @classmethod
        def from_pretrained(cls, path: Any, *arguments: Any, **options: Any) -> nn.Module:
            return _reference_of(path)

    AutoConfig.register(_TYPE, ReferenceConfig)
    AutoModelForCausalLM.register(ReferenceConfig, Reference)


@functools.cache
def _let_yaml_write_paths() -> None:
    """As plain text, in model cards; yaml takes no other class than str for text."""
    import yaml

    for name in ("SafeDumper", "Dumper", "CSafeDumper", "CDumper"):
        if dumper := getattr(yaml, name, None):
            dumper.add_representer(BasePath, lambda dumper, path: dumper.represent_str(str.__str__(path)))

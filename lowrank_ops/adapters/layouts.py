"""The layouts in which LoRA files name their tensors, as one table, and the way from each of them to PEFT's."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..files import load_json
from .peft_files import PREFIX

_ALPHA = "alpha"
_A, _B, _M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# The metadata in which diffusers keeps PEFT's configuration, an entry "prefix.option" for each option.
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Layout:
    """How one kind of file names the factors of a layer, and where it has the numerator of s = alpha / R.

    Attributes:
        name: for messages.
        prefixes: what may stand before the name of a layer; "": nothing.
        endings: what stands after it -> what PEFT has there.
        alpha: where alpha is if there is neither a configuration nor an entry ``NAME.alpha``: ``"rank"``: alpha = R, so that
            s = 1; ``"needed"``: nowhere, and the file is refused.
        flat: whether the name has "_" in place of ".".
    """

    name: str
    prefixes: tuple[str, ...]
    endings: Mapping[str, str]
    alpha: str
    flat: bool = False

    def parts(self, key: str) -> tuple[str, str] | None:
        """The key before its ending, and the ending."""
        for ending in (*self.endings, _ALPHA):
            if key.endswith(f".{ending}"):
                return key[: -len(ending) - 1], ending
        return None

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether some key has a factor's ending and a prefix of this layout."""
        return any(
            key.endswith(ending) and any(key.startswith(prefix) for prefix in self.prefixes)
            for key in keys
            for ending in self.endings
        )


PEFT = Layout("PEFT's", (PREFIX,), {_A: _A, _B: _B, _M: _M, "lora_embedding_A": "", "lora_embedding_B": ""}, "needed")
# The first one that fits a file is taken.
LAYOUTS = (
    PEFT,
    Layout(
        "diffusers'",
        ("transformer.", "unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", ""),
        {_A: _A, _B: _B, _M: _M, "lora.down.weight": _A, "lora.up.weight": _B},
        "rank",
    ),
    Layout(
        "kohya's",
        ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_"),
        {"lora_down.weight": _A, "lora_up.weight": _B},
        "needed",
        flat=True,
    ),
    Layout(
        "the trainers' with lora_down and lora_up",
        ("diffusion_model.", "transformer.", "unet.", ""),
        {"lora_down.weight": _A, "lora_up.weight": _B},
        "needed",
    ),
)


def to_peft(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    names: Iterable[str],
    where: str,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file by PEFT's names, and what adapter_config.json would say of them.

    Args:
        config: PEFT's configuration of the tensors, or None if it can only be in the file itself.
        metadata: of the file.
        names: of the modules of the model that takes the adapter. Of a file for several models, such as a pipeline's, only
            the layers of this one are taken.
        where: for messages.

    Raises:
        ValueError: the layout is not known; there are other tensors than LoRAs, layers that are not in the model, two
            prefixes for one layer; alpha is missing, or there twice.
    """
    layout = next((layout for layout in LAYOUTS if layout.fits(tensors)), None)
    if layout is None:
        raise ValueError(
            f"{where} has none of the known layouts ({', '.join(layout.name for layout in LAYOUTS)}); its first keys are "
            f"{_some(tensors)}"
        )
    if layout is PEFT:
        if config is None:
            raise ValueError(
                f"config must say what the tensors of {where} are (r, lora_alpha), as adapter_config.json does"
            )
        return dict(tensors), dict(config)
    parts = {key: layout.parts(key) for key in tensors}
    if strange := [key for key, part in parts.items() if part is None]:
        raise ValueError(
            f"{where} has the layout {layout.name}, and tensors that are no LoRA factors: {_some(strange)}"
        )
    layers = _layers(layout, {part[0] for part in parts.values() if part is not None}, set(names), where)
    made: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, part in parts.items():
        assert part is not None
        if (layer := layers.get(part[0])) is None:
            continue
        if part[1] == _ALPHA:
            alphas[layer[1]] = _number(tensors[key], key, where)
            continue
        name = f"{PREFIX}{layer[1]}.{layout.endings[part[1]]}"
        if name in made:
            raise ValueError(f"{where} has {key!r} in two ways of writing it")
        made[name] = tensors[key]
    if config is None:
        config = _packed(metadata, {prefix for prefix, _ in layers.values()}, where)
    if config is not None and alphas:
        raise ValueError(f"{where} has alpha twice: in a configuration, and in entries such as {_some(alphas)}.alpha")
    found = sorted({name for _, name in layers.values()})
    return made, dict(config) if config is not None else _told_by_tensors(layout, found, made, alphas, where)


# Names in Stability's UNets, which kohya's files of SDXL use -> names in diffusers, with "_" in place of ".".
_OUTER = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(?:(input|output)_blocks_(\d+)_(\d+)|middle_block_(\d+))_(.+)")


def diffusers_name(name: str, layers: int) -> str | None:
    """The flat name in diffusers of a layer of one of Stability's UNets; None if their UNets have no such name.

    Args:
        layers: ResNets of a block on the way down (``layers_per_block``). Their blocks count these and what follows them
            one after the other, those of diffusers by block.
    """
    if name in _OUTER:
        return _OUTER[name]
    if not (found := _BLOCK.fullmatch(name)):
        return None
    side, block, part, middle, rest = found.groups()
    rest = _RESNET.get(rest, rest)
    if middle is not None:
        return f"mid_block_{_MIDDLE[int(middle)]}_{rest}" if int(middle) < len(_MIDDLE) else None
    way, (at, of_block) = {
        "input": ("down", divmod(int(block) - 1, layers + 1)), "output": ("up", divmod(int(block), layers + 1)),
    }[side]  # fmt: skip
    if rest in ("op", "conv"):  # it changes the size of pictures
        return f"{way}_blocks_{at}_{way}samplers_0_conv"
    kinds = "resnets", "attentions"
    return f"{way}_blocks_{at}_{kinds[int(part)]}_{of_block}_{rest}" if int(part) < len(kinds) else None


def _layers(layout: Layout, stems: set[str], names: set[str], where: str) -> dict[str, tuple[str, str]]:
    """Key before its ending -> (prefix, name of the layer in the model), for the layers of this model."""
    flat: dict[str, list[str]] = {}
    for name in names:
        flat.setdefault(name.replace(".", "_") if layout.flat else name, []).append(name)
    in_block = sum(re.fullmatch(r"down_blocks\.0\.resnets\.\d+", name) is not None for name in names)

    def of_model(name: str) -> list[str]:
        """The layers that a name without its prefix may mean."""
        if name not in flat and layout.flat and in_block:
            name = diffusers_name(name, in_block) or name
        return flat.get(name, [])

    found: dict[str, tuple[str, str]] = {}
    absent: dict[str, str] = {}  # key -> its prefix
    claims: dict[str, str] = {}
    for stem in sorted(stems):
        fitting = [p for p in sorted(layout.prefixes, key=len, reverse=True) if stem.startswith(p)]
        prefix = next((p for p in fitting if of_model(stem[len(p) :])), None)
        if prefix is None:
            absent[stem] = fitting[0] if fitting else ""
            continue
        here = of_model(stem[len(prefix) :])
        if len(here) > 1:
            raise ValueError(f"{where} has {stem!r}, which may be any of the layers {_some(here)}")
        if here[0] in claims:
            raise ValueError(f"{where} has two prefixes for layer {here[0]!r}: {claims[here[0]]!r} and {stem!r}")
        claims[here[0]] = stem
        found[stem] = prefix, here[0]
    used = {prefix for prefix, _ in found.values()}
    missing = [stem for stem, prefix in absent.items() if not used or prefix in used or prefix == ""]
    if missing:
        raise ValueError(f"{where} has tensors for layers that are not in the model: {_some(missing)}")
    if absent:
        others = ", ".join(sorted({prefix.rstrip("._") for prefix in absent.values()}))
        warnings.warn(f"{where} has adapters of other models too, which are not loaded: {others}", stacklevel=2)
    return found


def _packed(metadata: Mapping[str, str], prefixes: set[str], where: str) -> dict[str, Any] | None:
    """PEFT's configuration in diffusers' metadata, or None if there is none."""
    if (text := metadata.get(_METADATA)) is None:
        return None
    try:
        table = load_json(text)
    except ValueError as error:
        raise ValueError(f"the metadata {_METADATA} of {where} is not JSON: {error}") from error
    if not isinstance(table, dict) or len(prefixes) != 1:
        raise ValueError(
            f"the metadata {_METADATA} of {where} must be a table for one model, got {type(table).__name__}"
        )
    prefix = next(iter(prefixes))
    config = {key[len(prefix) :]: value for key, value in table.items() if key.startswith(prefix)}
    if not {"r", "lora_alpha"} <= config.keys():
        raise ValueError(f"the metadata {_METADATA} of {where} lacks {prefix}r or {prefix}lora_alpha")
    # What PEFT would train besides, and how it starts, does not matter for the factors that are there.
    kept = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "lora_dropout")
    return {"peft_type": "LORA", **{key: config[key] for key in kept if key in config}}


def _told_by_tensors(
    layout: Layout, names: list[str], made: Mapping[str, Tensor], alphas: Mapping[str, float], where: str
) -> dict[str, Any]:
    """A configuration with the rank of each layer's tensors, and its alpha."""
    if layout.alpha == "needed" and (untold := [name for name in names if name not in alphas]):
        raise ValueError(f"{where} has the layout {layout.name}, which needs alpha, and has none for {_some(untold)}")
    ranks: dict[str, int] = {}
    for name in names:
        down = made.get(f"{PREFIX}{name}.{_A}")
        if down is None or down.dim() < 2:
            raise ValueError(f"{where} lacks the matrix D [R, K] of layer {name!r}")
        ranks[name] = down.shape[0]
    patterns = {name: f"^{re.escape(name)}" for name in names}
    return {
        "peft_type": "LORA",
        "rank_pattern": {patterns[name]: rank for name, rank in ranks.items()},
        "alpha_pattern": {patterns[name]: alphas.get(name, rank) for name, rank in ranks.items()},
        "use_dora": any(key.endswith(_M) for key in made),
    }


def _number(tensor: Tensor, key: str, where: str) -> float:
    if tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(value := float(tensor)):
        raise ValueError(f"{key!r} in {where} must be one finite number, got a tensor {list(tensor.shape)}")
    return value


def _some(keys: Iterable[str]) -> str:
    """Five of the keys at most."""
    keys = sorted(keys)
    return ", ".join(map(repr, keys[:5])) + ", …" * (len(keys) > 5)

"""lowrank_ops.Embedding: nn.Embedding over a frozen weight, dense or in 4 bits, with a LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..functional import LowRankUpdate
from .foreign import check_in_place, known_hooks
from .kinds import Adapter, LoRA, described
from .linear import AdaptedLayer, check_adapter
from .route import check_unpooled
from .start import Start

INITS = ("kaiming", "gaussian")


class Embedding(AdaptedLayer, nn.Embedding):
    """y = c · (W[i] + s · U D[:, i]): W [V, N] is frozen, D [R, V] and U [N, R] are trained.

    It takes the place of an ``nn.Embedding``. c is 1, or the ``embed_scale`` of transformers' scaled embeddings. D starts at
    0 and U normal, as in PEFT. The weight stays the Parameter that it was, so a head that is tied to it stays tied. Of a
    4-bit weight only the rows that are read are decoded.

    Attributes:
        weight: the Parameter [V, N], or a 4-bit weight whose rows are whole blocks.
        adapter: the :class:`LoRA`, or None; its dropout is not used.
        down, up: D and U, float32, or None.

    Numerics: the update in float32; the sum is rounded once to the dtype of W, or to the one that ``.to()`` gave the layer.

    Source: LoRA of embeddings, arXiv 2106.09685, with the tensors of PEFT's ``lora_embedding_A`` and ``lora_embedding_B``.
    """

    weight: nn.Parameter | QuantizedWeight  # type: ignore[assignment]
    embed_scale: Tensor | float | None
    max_norm = None
    # Of the output over a 4-bit weight, if the layer was cast since; then the weight keeps its own.
    _cast_to: torch.dtype | None = None
    _shell: tuple[nn.Module]

    @classmethod
    def from_embedding(cls, embedding: nn.Module, adapter: Adapter, started: Start | None = None) -> Embedding:
        """Make a layer over the weight of an embedding, which stays as it is, frozen or not.

        Args:
            embedding: an ``nn.Embedding``, a scaled one of transformers, or an :class:`Embedding` without an adapter.
            adapter: a :class:`LoRA` with ``init="kaiming"`` or ``"gaussian"``.
            started: D and U, if already made.

        Raises:
            TypeError: another kind of module; adapter is no adapter.
            ValueError: an adapter of another kind; the rank is above min(V, N); hooks would be lost; ``max_norm`` would
                change the weight.
        """
        embedding, put_hooks_on = check_embedding(embedding, adapter)
        weight: Any = embedding.weight
        layer = cls._over(embedding, weight)
        layer._install(adapter, started or layer._start(adapter))
        put_hooks_on(layer)
        return layer.train(embedding.training)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, embedding: nn.Module) -> Embedding:
        """Make a layer without an adapter over a 4-bit weight [V, N], with the options of an embedding [V, N].

        Args:
            weight: of any format; it is kept, and may be that of a head too.
            embedding: an ``nn.Embedding``, or a scaled one of transformers, whose own weight is not read.

        Raises:
            TypeError: another kind of module or of weight.
            ValueError: a row of the weight is not whole blocks; the shapes differ; hooks would be lost; ``max_norm`` would
                change the weight.
        """
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"weight must be an NF4Weight, FP4Weight or MXFP4Weight, got {type(weight).__name__}")
        weight.check_rows()
        plain, put_hooks_on = _check_plain(embedding)
        if weight.shape != (plain.num_embeddings, plain.embedding_dim):
            raise ValueError(
                f"weight must be {[plain.num_embeddings, plain.embedding_dim]} as the embedding, got {list(weight.shape)}"
            )
        layer = cls._over(plain, weight)
        layer._install(None, Start(None, None, None))
        put_hooks_on(layer)
        return layer.train(plain.training)

    @classmethod
    def _over(cls, embedding: nn.Embedding, weight: nn.Parameter | QuantizedWeight) -> Embedding:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.num_embeddings, layer.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        layer.padding_idx, scale = embedding.padding_idx, getattr(embedding, "embed_scale", None)
        if isinstance(scale, Tensor):
            layer.register_buffer("embed_scale", scale, persistent=False)
        else:
            layer.embed_scale = scale
        layer.out_features, layer.in_features = embedding.embedding_dim, embedding.num_embeddings
        layer.weight = weight
        layer._dtype, layer._cast_to = weight.dtype, getattr(embedding, "_cast_to", None)
        shell = embedding._shell[0] if isinstance(embedding, Embedding) else copy.copy(embedding)
        shell._parameters = {"weight": None}
        layer._shell = (shell,)  # in a tuple, so that it does not become a child
        layer.register_parameter("bias", None)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if isinstance(self.weight, QuantizedWeight):  # what follows computes in the dtype of the embedding's output
            probe = torch.empty(0, dtype=self._cast_to or self.weight.dtype, device=self.device)
            self._cast_to = fn(probe).dtype
        return self

    def _start(self, adapter: Adapter) -> Start:
        assert isinstance(adapter, LoRA)
        options: dict[str, Any] = {"dtype": torch.float32, "device": self.weight.device}
        down = torch.zeros(adapter.rank, self.in_features, **options)
        return Start(None, down, torch.randn(self.out_features, adapter.rank, **options))

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Give the layer a fresh LoRA, or none; W stays unchanged.

        Raises:
            ValueError: another kind; the rank is above min(V, N); or a pool routes the layer.
        """
        if adapter is not None:
            check_lora(adapter, "an embedding")
            adapter.check(self.out_features, self.in_features)
        check_unpooled(self)
        self._install(adapter, Start(None, None, None) if adapter is None else self._start(adapter))

    def forward(self, ids: Tensor) -> Tensor:
        return embed(self, self.weight, None if self.disabled else self._weaker_update(), ids)

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W' = W + s · (U D)ᵀ, [V, N], added in float32 and rounded once; without the factor c."""
        with torch.no_grad():
            W = self.weight
            merged = W.dequantize(torch.float32) if isinstance(W, QuantizedWeight) else W.float().clone()
            if (update := self._weaker_update()) is not None:
                merged += update.delta().t()
            return merged.to(dtype or self.dtype)

    def make_plain(self, weight: nn.Parameter) -> nn.Module:
        """The embedding that stood in the model before, with another weight."""
        plain = copy.copy(self._shell[0])
        plain._parameters = {"weight": weight}
        plain._buffers = plain._buffers | {key: self._buffers[key] for key in plain._buffers}
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, adapter={self.adapter}"


def takes_lora(adapter: Adapter) -> bool:
    """Tell whether embeddings and convolutions can have the kind."""
    return isinstance(adapter, LoRA) and adapter.init in INITS and not (adapter.dora or adapter.lora_bias)


def check_lora(adapter: Adapter, what: str) -> None:
    """Raise unless an embedding or a convolution can have the kind."""
    check_adapter(adapter)
    if not takes_lora(adapter):
        raise ValueError(
            f"{what} can have a LoRA with init={' or '.join(map(repr, INITS))}, without dora and lora_bias, got "
            f"{described(adapter)}"
        )


def check_embedding(embedding: nn.Module, adapter: Adapter) -> tuple[nn.Embedding, Callable[[nn.Module], None]]:
    """Raise if :meth:`Embedding.from_embedding` would; the embedding without hooks, and how to hook a replacement."""
    check_lora(adapter, "an embedding")
    plain, put_hooks_on = _check_plain(embedding)
    if plain is not embedding:
        check_in_place(embedding.weight)
    if plain.weight.device.type == "meta":
        raise ValueError("weight is on the meta device and holds no numbers; load or materialise it first")
    adapter.check(plain.embedding_dim, plain.num_embeddings)
    return plain, put_hooks_on


def _check_plain(embedding: nn.Module) -> tuple[nn.Embedding, Callable[[nn.Module], None]]:
    """The embedding without hooks, and how to hook a replacement; raise if it can have none."""
    if not is_embedding(embedding):
        raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
    if (unhooked := known_hooks(embedding)) is None:
        raise ValueError(
            "embedding has hooks, or a forward of its own set on it, which would be lost; remove them first"
        )
    plain, put_hooks_on = unhooked
    assert isinstance(plain, nn.Embedding)
    if plain.max_norm is not None:
        raise ValueError(f"an embedding with max_norm={plain.max_norm} changes its weight and cannot be frozen")
    return plain, put_hooks_on


def is_embedding(module: nn.Module) -> bool:
    """Tell whether :meth:`Embedding.from_embedding` takes the module."""
    if isinstance(module, Embedding):
        return module.adapter is None and type(module).forward is Embedding.forward
    if not isinstance(module, nn.Embedding):
        return False
    # A subclass that computes something else with its weight is not taken.
    scaled = type(module).__module__.startswith("transformers.") and hasattr(module, "embed_scale")
    return type(module).forward is nn.Embedding.forward or (scaled and len([*module.parameters()]) == 1)


def embed(embedding: Any, weight: Tensor | QuantizedWeight, update: LowRankUpdate | None, ids: Tensor) -> Tensor:
    """c · (W[i] + s · U D[:, i]) for an embedding's options, another weight [V, N] and an update of W as [N, V]."""
    if isinstance(weight, QuantizedWeight):
        y = weight.dequantize_rows(ids, embedding._cast_to)
    else:
        y = nn.functional.embedding(ids, weight, embedding.padding_idx)
    if update is not None:
        assert isinstance(update.down, Tensor) and isinstance(update.up, Tensor)
        h = nn.functional.embedding(ids, update.down.t(), embedding.padding_idx)
        y = (y.float() + update.scale * nn.functional.linear(h.float(), update.up.float())).to(y.dtype)
    scale = getattr(embedding, "embed_scale", None)
    return y if scale is None else y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)

"""Preferences: the Bradley–Terry loss, reward models on a 4-bit base, and strengths of items from a table of wins.

Of two answers with rewards c and r a person prefers the first with probability F(c − r). If each answer's worth to a
person is its reward plus noise of its own, F is the distribution of the difference of two noises: with Gumbel noise the
logistic σ (Bradley–Terry), with Gaussian noise of variance ½ the normal Φ (Thurstone's case V).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import _strengths
from ._strengths import Strengths
from .adapters import Adapter
from .checkpoint import load_adapter, save_adapter
from .formats import FLOAT_DTYPES
from .linear import Linear
from .model import adapt, freeze
from .ops._plan import forced

__all__ = [
    "RewardHead",
    "RewardModel",
    "Strengths",
    "bradley_terry_loss",
    "fit_bradley_terry",
    "load_reward_model",
    "reward_model",
    "save_reward_model",
    "win_probability",
]

HEAD = "reward_head.safetensors"
POOLINGS = ("last", "mean", "first")


# ---- the loss ----


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float | None = None,
    labels: Tensor | None = None,
    center: float = 0.0,
) -> Tensor:
    """loss = mean over pairs of −y log σ(d) − (1 − y) log σ(−d) + center · (c + r)², d = c − r − margin; in one op.

    With the defaults it is −mean log σ(c − r − margin), the loss of TRL's RewardTrainer, and ``center`` is its
    ``center_rewards_coefficient``.

    Args:
        chosen, rejected: rewards c and r, of the same shape with n >= 1 elements; float32, bfloat16 or float16, on a CPU
            float64 too.
        margin: what c should be ahead by: a tensor of n elements, or one number.
        labels: y in [0, 1], n elements: the probability that ``chosen`` is the better one; ½ is a tie, and 0 says that
            the two are swapped. None is 1.
        center: the weight of the pull of c + r to 0, >= 0.

    Returns:
        a scalar, float32 (float64 of float64). Gradients flow to chosen and rejected.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, there is no pair, margin or labels ask for a gradient
            or, on a CPU, hold a number that they must not. On a GPU, where looking would make the host wait, such labels
            and margins make the loss NaN.

    Numerics: softplus(−|d|) + |d| · (the label's share of the less likely side), in float32 after c and r are widened, so
    that no gap overflows; a reward that is not finite makes the loss so too. The order of the sum depends on n alone.

    Source: Bradley and Terry (1952); margin: arXiv 2307.09288; centring: arXiv 2312.09244.
    """
    for name, rewards in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(rewards, Tensor):
            raise TypeError(f"{name} must be a Tensor of rewards, got {type(rewards).__name__}")
    if chosen.shape != rejected.shape or chosen.device != rejected.device:
        raise ValueError(
            f"chosen and rejected must have one shape and device, got {list(chosen.shape)} on {chosen.device} and "
            f"{list(rejected.shape)} on {rejected.device}"
        )
    if not chosen.numel():
        raise ValueError(f"chosen and rejected must hold at least one pair, got {list(chosen.shape)}")
    dtype = torch.promote_types(chosen.dtype, rejected.dtype)
    wide = chosen.device.type == "cpu" and forced() != "triton" or forced() == "reference"
    if dtype not in (*FLOAT_DTYPES, torch.float64)[: None if wide else -1]:
        raise TypeError(
            f"chosen and rejected must be float32, bfloat16 or float16{', or float64' if wide else ''}, got {dtype}"
        )
    if not (isinstance(center, int | float) and math.isfinite(center) and center >= 0):
        raise ValueError(f"center must be a number of at least 0, got {center!r}")
    chosen, rejected = _flat(chosen, dtype), _flat(rejected, dtype)
    if isinstance(margin, int | float):
        margin = torch.full_like(chosen, margin, dtype=torch.promote_types(dtype, torch.float32))
    margin, labels = _data("margin", margin, chosen), _data("labels", labels, chosen)
    loss: Tensor = torch.ops.lowrank_ops.bradley_terry_loss.default(chosen, rejected, margin, labels, float(center))
    # The kernel makes NaN of what it must not hold, so looking at the loss is enough until it is to be told why.
    if loss.device.type == "cpu" and not torch.compiler.is_compiling() and not math.isfinite(loss.item()):
        _refuse("margin", margin, "be finite")
        _refuse("labels", labels, "be in [0, 1]")
    return loss


def _data(name: str, values: Any, rewards: Tensor) -> Tensor | None:
    if values is None:
        return None
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a Tensor of {rewards.numel()} numbers or None, got {type(values).__name__}")
    if values.numel() != rewards.numel():
        raise ValueError(f"{name} must hold {rewards.numel()} numbers, one a pair, got {list(values.shape)}")
    if values.device != rewards.device:
        raise ValueError(f"{name} is on {values.device} and chosen on {rewards.device}; move one of them")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient here, but it has requires_grad=True; detach it")
    return _flat(values, torch.promote_types(rewards.dtype, torch.float32))


def _flat(values: Tensor, dtype: torch.dtype) -> Tensor:
    # Asked first, for each call that does nothing costs as much as a batch of pairs.
    values = values if values.dtype == dtype else values.to(dtype)
    return values if values.dim() == 1 else values.reshape(-1)


def _refuse(name: str, values: Tensor | None, must: str) -> None:
    if values is None:
        return
    bad = ~torch.isfinite(values) if name == "margin" else ~((values >= 0) & (values <= 1))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"{name} must {must}, got {values[at].item()} for pair {at}")


def win_probability(gap: Tensor, noise: str = "gumbel") -> Tensor:
    """P(first preferred) = F(gap) of a random-utility model: σ(gap) for "gumbel" noise, Φ(gap) for "gaussian".

    Args:
        gap: the first's strength less the second's, any float dtype and shape.
        noise: of each item's utility; its scale is the unit of strengths (Gumbel of scale 1; Gaussian of variance ½).

    Raises:
        ValueError: another noise.
    """
    return _strengths.log_win_probability(gap, noise)[0].exp()


def fit_bradley_terry(
    wins: Any, prior: float | None = None, *, noise: str = "gumbel", max_iterations: int = 100
) -> Strengths:
    """s = argmax Σ_ij wins[i, j] log F(s_i − s_j) − Σ_i s_i² / (2 prior²), with mean s = 0: strengths of items.

    Args:
        wins: [n, n], how often i beat j; a tie is ½ for both. Any array of finite numbers of at least 0, diagonal 0.
        prior: the standard deviation of a Gaussian prior of every strength; None is none, the maximum likelihood.
        noise: "gumbel" for Bradley–Terry, F = σ; "gaussian" for Thurstone's case V, F = Φ.
        max_iterations: Newton steps.

    Returns:
        :class:`Strengths`. The standard errors are from the inverse of the observed information, those of strengths whose
        mean is held at 0.

    Raises:
        TypeError, ValueError: wins is no such table. Without a prior: the wins are not strongly connected (some items never
            lost to the others), where no finite maximum exists; the message says which items.
        RuntimeError: no convergence, which rounding may cause at gaps that no table of usual size has.

    Numerics: float64. The negative log-likelihood is strictly convex in the gaps for either noise (both densities are
    log-concave), so Newton's steps with a line search converge from any start; n up to a few thousand.

    Source: Bradley and Terry (1952); existence: Ford (1957); Thurstone (1927).
    """
    return _strengths.fit(wins, prior, noise, max_iterations)


# ---- reward models ----


class RewardHead(nn.Module):
    """reward = ⟨w, pool(hidden)⟩, one number a text.

    Args:
        hidden_size: H.
        pooling: "last", the last real token, the only one that has seen the whole text in a causal decoder; "mean" of the
            real tokens, each of which has seen it in an encoder, and what sentence encoders are trained for; "first", for
            an encoder whose first token was trained as a summary.

    w starts normal with variance 1 / (H + 1). It computes in float32.
    """

    def __init__(self, hidden_size: int, pooling: str = "last") -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.pooling = pooling
        self.weight = nn.Parameter(torch.randn(hidden_size) * (hidden_size + 1) ** -0.5)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """The rewards, float32 [B].

        Args:
            hidden: [B, T, H].
            attention_mask: [B, T], not 0 for real tokens, wherever they are.

        Raises:
            ValueError: a shape differs, or a text has no real token.
        """
        real = attention_mask != 0
        if hidden.dim() != 3 or hidden.shape[-1] != self.weight.numel() or real.shape != hidden.shape[:2]:
            raise ValueError(
                f"hidden must be [B, T, {self.weight.numel()}] and attention_mask [B, T], got {list(hidden.shape)} and "
                f"{list(real.shape)}"
            )
        if not torch.compiler.is_compiling() and not real.any(1).all():
            raise ValueError(f"text {int((~real.any(1)).nonzero()[0])} of the batch has no real token")
        if self.pooling == "mean":
            weight = real.unsqueeze(-1).float()
            pooled = (hidden.float() * weight).sum(1) / weight.sum(1)
        else:
            positions = torch.arange(real.shape[1], device=real.device)
            if self.pooling == "last":
                at = torch.where(real, positions, -1).amax(1)
            else:
                at = torch.where(real, positions, real.shape[1]).amin(1)
            pooled = hidden[torch.arange(len(at), device=at.device), at].float()
        return pooled @ self.weight.float()

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, pooling={self.pooling!r}"


class RewardModel(nn.Module):
    """A transformer with a :class:`RewardHead`; :func:`reward_model` makes it.

    Attributes:
        model: the base, without another head. head: the RewardHead. quantize: what the base was quantised to.
    """

    def __init__(self, model: nn.Module, head: RewardHead, quantize: str | None) -> None:
        super().__init__()
        self.model, self.head, self.quantize = model, head, quantize

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """The rewards of B texts, float32 [B].

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 for real tokens, with padding on either side: the real tokens are moved to the front
                first, so that positions count from 0 and the side does not change the reward.
            inputs: what else the tokenizer made, such as token_type_ids [B, T].

        Raises:
            ValueError: the shapes differ, or a text has no real token.
        """
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids and attention_mask must be [B, T], got {list(input_ids.shape)} and {list(attention_mask.shape)}"
            )
        real = attention_mask != 0
        order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
        named = {"input_ids": input_ids, "attention_mask": real.to(torch.int64), **inputs}
        moved = {k: v.gather(1, order) if v.shape == order.shape else v for k, v in named.items()}
        if self.head.pooling == "last" and hasattr(self.model.config, "use_cache"):
            moved["use_cache"] = False  # type: ignore[assignment]
        hidden = self.model(**moved).last_hidden_state
        rewards: Tensor = self.head(hidden, moved["attention_mask"])
        return rewards


def reward_model(
    model: nn.Module,
    adapter: Adapter | None = None,
    quantize: str | None = "nf4",
    *,
    targets: str | Sequence[str] = "all-linear",
    pooling: str | None = None,
) -> RewardModel:
    """reward(text) = ⟨w, pool(model(text))⟩: a Hugging Face encoder or decoder, 4-bit and adapted in place, and a head.

    Args:
        model: an ``AutoModel``, or a model with a head for another task, which is left out.
        adapter: the kind of update; None trains the head alone. ``lowrank_ops.LoRA(16)`` is a start.
        quantize: ``"nf4"``, or None to keep the weights dense.
        targets: as for :func:`lowrank_ops.adapt`.
        pooling: see :class:`RewardHead`; None is "last" where a later token does not change an earlier one's hidden state,
            which is tried out, and "mean" where it does.

    Returns:
        the reward model: the adapters and the head are trainable, all else is frozen.

    Raises:
        TypeError: no transformer that returns hidden states, or one with an encoder and a decoder.
        ValueError: as :func:`lowrank_ops.adapt`.
    """
    base = _base(model)
    if pooling is None:
        pooling = "last" if _causal(base) else "mean"
    head = RewardHead(base.config.hidden_size, pooling)
    if adapter is not None or quantize is not None:
        adapt(base, adapter, targets, quantize)
    else:
        freeze(base)
    return RewardModel(base, head.to(next(base.parameters()).device), quantize)


def _base(model: nn.Module) -> Any:
    base = getattr(model, "base_model", model)
    config = getattr(base, "config", None)
    if not isinstance(base, nn.Module) or not hasattr(config, "hidden_size"):
        raise TypeError(f"model must be a Hugging Face transformer with config.hidden_size, got {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"model must be an encoder or a decoder; {type(model).__name__} is both")
    return base


def _causal(model: Any) -> bool:
    """Whether a later token leaves an earlier one's hidden state alone, found out on two texts of two tokens."""
    device, size, training = next(model.parameters()).device, model.config.vocab_size, model.training
    if device.type == "meta":
        raise ValueError("model is on the meta device; materialise it first")
    first = size // 2
    ids = torch.tensor([[first, (first + 1) % size], [first, (first + 2) % size]], device=device)
    model.eval()
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
    model.train(training)
    change = (hidden[0] - hidden[1]).abs().amax(1)
    return bool(change[0] <= 1e-5 * change[1])


def save_reward_model(model: RewardModel, path: str | os.PathLike[str]) -> None:
    """Write the adapters as :func:`lowrank_ops.save_adapter` does, and the head beside them.

    Args:
        model: from :func:`reward_model`.
        path: a directory; it is made where it is missing. ``reward_head.safetensors`` holds ``score.weight`` [1, H], the
            name and shape of Hugging Face's sequence classifiers with one label.
    """
    directory = Path(path)
    adapted = _adapted(model.model)
    if adapted:
        save_adapter(model.model, directory)
    directory.mkdir(parents=True, exist_ok=True)
    facts = {"pooling": model.head.pooling, "quantize": model.quantize, "adapter": adapted}
    metadata = {"format": "pt", "lowrank_ops": json.dumps(facts)}
    scratch = directory / (HEAD + ".new")
    save_file({"score.weight": model.head.weight.detach()[None].contiguous()}, scratch, metadata=metadata)
    scratch.replace(directory / HEAD)


def load_reward_model(model: nn.Module, path: str | os.PathLike[str], adapter: Adapter | None = None) -> RewardModel:
    """The reward model that :func:`save_reward_model` wrote, on the base it was made from.

    Args:
        model: the base, dense as it was; it is quantised and adapted in place.
        path: the directory.
        adapter: the kind that was trained, needed on a quantised base where it starts from the weight before that (PiSSA,
            MiLoRA, LoftQ, LoRA-XS, SVF, SVFT); otherwise the files say it.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit this model.
    """
    file = Path(path) / HEAD
    if not file.is_file():
        raise FileNotFoundError(f"no reward model at {path}: {HEAD} is missing")
    try:
        with safe_open(file, framework="pt") as opened:
            facts = json.loads((opened.metadata() or {}).get("lowrank_ops", "null"))
            weight = opened.get_tensor("score.weight")
        pooling, quantize, adapted = facts["pooling"], facts["quantize"], facts["adapter"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no reward head: {error}") from error
    base = _base(model)
    if tuple(weight.shape) != (1, base.config.hidden_size) or not torch.isfinite(weight).all():
        raise ValueError(
            f"score.weight in {file} must be finite and [1, {base.config.hidden_size}], got {list(weight.shape)}"
        )
    made = reward_model(model, adapter, quantize, pooling=pooling)
    if adapted or adapter is not None:
        load_adapter(made.model, path)
    made.head.load_state_dict({"weight": weight[0]})
    return made


def _adapted(model: nn.Module) -> bool:
    return any(isinstance(module, Linear) and module.adapter is not None for module in model.modules())

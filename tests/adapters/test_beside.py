"""What stands in an adapter's file beside the updates: heads, embeddings, norms and biases, as PEFT has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from models import TOKENS, bert, gemma, plain, snapshot, tiny, write_peft
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_ops as lo
from lowrank_ops.adapters.frozen import is_plain_linear

CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "head": (tiny, {"modules_to_save": ["lm_head"]}),
    "head and embeddings": (tiny, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, both": (partial(tiny, tied=True), {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, head": (partial(tiny, tied=True), {"modules_to_save": ["lm_head"]}),
    "tied, embeddings": (partial(tiny, tied=True), {"modules_to_save": ["embed_tokens"]}),
    "tied as one": (partial(tiny, tied=True), {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "score": (partial(tiny, classes=3), {"task_type": "SEQ_CLS"}),
    "classifier": (bert, {"task_type": "SEQ_CLS", "target_modules": ["query"]}),
    "norms": (tiny, {"modules_to_save": ["norm"]}),
    "a block": (tiny, {"modules_to_save": ["mlp"]}),
    "all biases": (bert, {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "all"}),
    "biases of adapted layers": (partial(tiny, bias=True), {"bias": "lora_only"}),
    "adapted head": (tiny, {"target_modules": ["q_proj", "lm_head"]}),
    "adapted embeddings": (bert, {"target_modules": ["query", "word_embeddings"]}),
    "adapted embeddings, scaled and tied": (gemma, {"target_modules": ["q_proj", "embed_tokens"]}),
    "adapted embeddings and head, tied": (
        partial(tiny, tied=True),
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "pissa, base made again": (tiny, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}),
    "olora, base made again": (tiny, {"init_lora_weights": "olora", "use_rslora": True}),
    "olora, base of the head in the file": (
        tiny,
        {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "olora"},
    ),
    "adapted head, tied": (partial(tiny, tied=True), {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT on tied weights
@pytest.mark.parametrize("case", CASES)
def test_what_peft_trained_beside_the_updates(case: str, tmp_path: Path) -> None:
    """Loaded, trained on, saved so that PEFT and we load it, and merged: the logits of PEFT each time."""
    from peft import PeftModel

    make, options = CASES[case]
    expected, trained = write_peft(make, tmp_path / "peft", **options)
    near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    before = make()(TOKENS).logits
    assert (before - expected).abs().max() > 1e-3

    model = lo.load_adapter(lo.adapt(make(), None, quantize=None), tmp_path / "peft")
    near(model(TOKENS).logits, expected)
    adapters = {id(p) for p in lo.adapter_parameters(model)}
    beside = [p for p in model.parameters() if p.requires_grad and id(p) not in adapters]
    assert len(beside) == len(trained)
    model(TOKENS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in beside)

    with torch.no_grad():
        for p in (*beside, *lo.adapter_parameters(model)):
            p += p.grad.sign() / 100
    expected = model(TOKENS).logits.detach()
    assert (before - expected).abs().max() > 1e-3
    lo.save_adapter(model, tmp_path / "ours")
    near(PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()(TOKENS).logits, expected)
    near(lo.load_adapter(make(), tmp_path / "ours")(TOKENS).logits, expected)
    near(lo.merge(model)(TOKENS).logits, expected)
    model.save_pretrained(tmp_path / "merged")
    near(type(model).from_pretrained(tmp_path / "merged").eval()(TOKENS).logits, expected)


def test_a_head_over_a_quantised_one(tmp_path: Path) -> None:
    """A head in four bits gives way to the trained one; a copy of the base weight leaves the bytes as they are."""
    write_peft(tiny, tmp_path / "whole", modules_to_save=["lm_head"])
    write_peft(tiny, tmp_path / "update", target_modules=["q_proj", "lm_head"])
    quantised = partial(lo.adapt, targets=r".*_proj|lm_head")
    model = lo.load_adapter(quantised(tiny(), None), tmp_path / "whole")
    assert is_plain_linear(model.lm_head) and model.lm_head.weight.requires_grad
    assert_bits_equal(model.lm_head.weight, load_file(tmp_path / "whole" / "adapter_model.safetensors")[HEAD])
    model = quantised(tiny(), None)
    weight = model.lm_head.weight
    assert lo.load_adapter(model, tmp_path / "update").lm_head.weight is weight
    other = quantised(tiny(), None)
    with torch.no_grad():
        other.lm_head.weight.packed.zero_()
    lo.load_adapter(other, tmp_path / "update")
    assert_bits_equal(other.lm_head.weight.packed, weight.packed)
    base = HEAD.replace(".weight", ".base_layer.weight")
    _edit(tmp_path / "update", lambda t: t.update({HEAD: t.pop(base)}), {"modules_to_save": ["lm_head"]})
    with pytest.raises(ValueError, match=r"an update of 'lm_head' and a trained weight in its place"):
        lo.load_adapter(quantised(tiny(), None), tmp_path / "update")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resized_vocabulary(tmp_path: Path) -> None:
    """PEFT writes the embedding and the head beside a LoRA that does not touch them."""
    from peft import LoraConfig, get_peft_model

    def resized(seed: int) -> Any:
        model = tiny()
        torch.manual_seed(seed)
        model.resize_token_embeddings(43)
        return model

    theirs = get_peft_model(resized(0), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    expected = theirs(TOKENS + 28).logits
    with pytest.raises(
        ValueError, match=r"must be \[40, 32\] as in the model, got \[43, 32\]; give the model as many tokens"
    ):
        lo.load_adapter(tiny(), tmp_path / "peft")
    model = lo.load_adapter(lo.adapt(resized(1), None, quantize=None), tmp_path / "peft")
    torch.testing.assert_close(model(TOKENS + 28).logits, expected, rtol=1e-5, atol=1e-6)
    assert not model.lm_head.weight.requires_grad
    lo.save_adapter(model, tmp_path / "ours")  # what the file brought is in the next file too
    again = lo.load_adapter(resized(2), tmp_path / "ours")
    torch.testing.assert_close(again(TOKENS + 28).logits, expected, rtol=1e-5, atol=1e-6)
    lo.adapt(lo.merge(again), lo.LoRA(2), ["q_proj"])
    lo.save_adapter(again, tmp_path / "next")
    assert not [key for key in load_file(tmp_path / "next" / "adapter_model.safetensors") if "lora" not in key]


def test_a_base_that_peft_changed_needs_the_dense_weight(tmp_path: Path) -> None:
    write_peft(tiny, tmp_path, init_lora_weights="pissa")
    for model, why in (
        (lo.adapt(tiny(), None), "again from W before it was quantised, which the layer does not hold"),
        (lo.adapt(tiny(), lo.LoRA(4, 8, init="pissa"), ["q_proj"], quantize=None), "the layer has a base of its own"),
    ):
        with pytest.raises(ValueError, match=f"layer 'model.layers.0.self_attn.q_proj': .*{why}"):
            lo.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="again from W before it was quantised"):
        lo.AdapterPool(lo.adapt(tiny(), None), 1 << 20).load("a", tmp_path)


def test_olora_starts_as_the_base() -> None:
    layer = lo.Linear.from_linear(nn.Linear(24, 40), lo.LoRA(5, alpha=8, init="olora"), None)
    Q, R = torch.linalg.qr(layer.merged_weight(torch.float32).double())
    torch.testing.assert_close((layer.up @ layer.down).double(), Q[:, :5] @ R[:5], rtol=1e-4, atol=1e-5)
    assert layer.start_error < 1e-6 and layer.base_down is not None


HEAD = "base_model.model.lm_head.weight"
TOKEN = HEAD.replace("lm_head", "model.embed_tokens")


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None, config: Any = None) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if change is not None:
        tensors = load_file(path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "message, change",
    [
        (r"lm_head.weight in .* must be \[40, 32\] as in the model, got \[41, 32\]", {HEAD: torch.ones(41, 32)}),
        (r"lm_head.weight in .* must be finite", {HEAD: torch.full((40, 32), float("nan"))}),
        (r"lm_head.weight in .* must be finite and of a kind", {HEAD: torch.ones(40, 32, dtype=torch.int32)}),
        (r"values for 'value_head.weight', for which the model has no", {HEAD.replace("lm_", "value_"): torch.ones(1)}),
        (r"two values for 'lm_head.weight'", {HEAD.replace(".w", ".modules_to_save.w"): torch.ones(40, 32)}),
        (r"embed_tokens.weight in .*\[9, 32\]; give the model", {TOKEN: torch.ones(9, 32)}),
        (r"holds 'lm_head.weight', which is neither", {"lm_head.weight": torch.ones(40, 32)}),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_change_nothing(message: str, change: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_peft(tiny, tmp_path, modules_to_save=["lm_head"])
    _edit(tmp_path, lambda tensors: tensors.update(change))
    model = lo.adapt(tiny(), None)
    description, state, _ = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lo.load_adapter(model, tmp_path)
    assert repr(model) == description
    for key, value in model.state_dict().items():
        assert_bits_equal(value, state[key])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tied_weights_that_contradict_are_refused(tmp_path: Path) -> None:
    write_peft(partial(tiny, tied=True), tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    _edit(tmp_path, config={"ensure_weight_tying": True})
    with pytest.raises(ValueError, match=r"were trained as one and differ"):
        lo.load_adapter(tiny(tied=True), tmp_path)


@pytest.mark.parametrize(
    "message, config",
    [
        ("modules_to_save=.*not a list", {"modules_to_save": 3}),
        ("bias='some', which must be", {"bias": "some"}),
        (r"layer_replication=\[\[0, 1\]\]: .*merge_and_unload", {"layer_replication": [[0, 1]]}),
        ("init_lora_weights='corda', which changed the base.*path_initial_model", {"init_lora_weights": "corda"}),
        ("init_lora_weights='pissa_niter_4', which changed", {"init_lora_weights": "pissa_niter_4"}),
    ],
)
def test_options_that_cannot_be_followed(message: str, config: dict[str, Any], tmp_path: Path) -> None:
    write_peft(tiny, tmp_path)
    _edit(tmp_path, config=config)
    with pytest.raises(ValueError, match=message):
        lo.load_adapter(tiny(), tmp_path)


def test_the_optimizer_keeps_the_parameters_it_has(tmp_path: Path) -> None:
    """Loading into a model that trains the same parts changes their values; what the file lacks is named."""
    write_peft(tiny, tmp_path / "a", modules_to_save=["lm_head"])
    write_peft(tiny, tmp_path / "b")
    model = lo.load_adapter(tiny(), tmp_path / "a")
    head, values = model.lm_head.weight, model.lm_head.weight.detach().clone()
    head.data.zero_()
    lo.load_adapter(model, tmp_path / "a")
    assert model.lm_head.weight is head
    assert_bits_equal(head, values)
    with pytest.warns(UserWarning, match=r"nothing for lm_head.weight, which the model trains"):
        lo.load_adapter(model, tmp_path / "b")


class Wrapped(nn.Module):
    """A model with a parameter of its own, batch normalisation, and two modules whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.body, self.bn, self.head, self.ahead = plain(), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.body(x))
        return self.scale * (self.head(y) + self.ahead(y))


@pytest.mark.parametrize("kind", [lo.LoRA(4), lo.LoRAXS(4)], ids=str)
def test_parts_of_a_users_own_model(kind: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    def make() -> Wrapped:
        torch.manual_seed(0)
        return Wrapped()

    x = torch.randn(6, 64)
    model = lo.adapt(make(), kind, r"body\..*", quantize=None)
    model.head.requires_grad_()
    model.scale.requires_grad_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    expected = model.eval()(x)
    lo.save_adapter(model, tmp_path)
    fresh = lo.load_adapter(make(), tmp_path).eval()
    torch.testing.assert_close(fresh(x), expected)
    trained = {n for n, p in fresh.named_parameters() if p.requires_grad and not n.startswith("body")}
    assert trained == {"head.weight", "head.bias", "scale"}
    if isinstance(kind, lo.LoRA):
        torch.testing.assert_close(
            PeftModel.from_pretrained(make(), str(tmp_path)).eval()(x), expected, rtol=1e-4, atol=1e-5
        )

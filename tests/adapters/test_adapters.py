"""Every kind: its start, its trained tensors, its gradients against autograd through W', its number of parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import assert_bits_equal
from models import linear, perturb
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.adapters import Adapter
from lowrank_ops.adapters import start as init
from lowrank_ops.adapters.frozen import is_plain_linear

KEEPING = [
    lo.LoRA(4, init="nystrom"),
    lo.LoRAXS(6),
    lo.LoRAXS(6, alpha=12, factors="float32"),
    lo.SVF(),
    lo.SVF(rank=10, factors="nf4"),
    lo.SVFT(bandwidth=0),
    lo.SVFT(bandwidth=3),
    lo.SVFT(bandwidth=2, rank=20, factors="bfloat16"),
    lo.SVFT("random", entries=5),
    lo.SVFT("random", bandwidth=4, rank=16, seed=3),
]
CHANGING = [
    lo.LoRA(4, alpha=4, init="pissa"),
    lo.LoRA(4, alpha=8, init="milora"),
    lo.LoRA(6, rslora=True, init="pissa"),
]
REPLACING = [
    lo.SVF(form="replace", factors="float32"),
    lo.SVFT(bandwidth=2, form="replace", factors="float32"),
    lo.SVFT("random", entries=4, form="replace", factors="float32"),
]


# ---- the start ----


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("kind", KEEPING, ids=str)
def test_starts_as_the_kept_weight(kind: Adapter, quantize: str | None) -> None:
    dense = linear()
    layer = lo.Linear.from_linear(dense, kind, quantize)
    w = lo.NF4Weight.quantize(dense.weight.detach()).dequantize() if quantize else dense.weight.detach()
    assert_bits_equal(layer.merged_weight(), w)
    x = torch.randn(5, 64)
    plain = lo.Linear.from_linear(dense, None, quantize)(x) if quantize else dense(x)
    torch.testing.assert_close(layer(x), plain)
    assert layer.start_error is None


@pytest.mark.parametrize("kind", CHANGING, ids=str)
def test_a_changed_base_and_its_update_are_the_weight(kind: lo.LoRA) -> None:
    dense = linear()
    layer = lo.Linear.from_linear(dense, kind, quantize=None)
    assert torch.linalg.norm(layer.merged_weight() - dense.weight) < 1e-6 * torch.linalg.norm(dense.weight)
    assert layer.start_error < 1e-6
    U, S, Vt = torch.linalg.svd(dense.weight.detach())
    which = slice(-kind.rank, None) if kind.init == "milora" else slice(0, kind.rank)
    part = U[:, :48][:, which] * S[which] @ Vt[:48][which]
    torch.testing.assert_close(kind.scale * layer.up @ layer.down, part, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(layer.weight.detach(), dense.weight.detach() - part, atol=2e-5, rtol=1e-3)
    quantised = lo.Linear.from_linear(dense, kind)
    assert isinstance(quantised.weight, lo.NF4Weight) and 0 < quantised.start_error < 0.15
    assert f"start_error={quantised.start_error:.2g}" in repr(quantised)


@pytest.mark.parametrize("kind", REPLACING, ids=str)
def test_the_replace_form_starts_as_the_weight_without_holding_it(kind: Adapter) -> None:
    dense = linear()
    layer = lo.Linear.from_linear(dense, kind)
    assert layer.weight is None and layer.start_error < 1e-5
    assert "weight" not in layer.state_dict()
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.merged_weight(), dense.weight.detach(), atol=1e-5, rtol=1e-4)
    truncated = dataclasses.replace(kind, rank=20)
    assert 0.05 < lo.Linear.from_linear(dense, truncated).start_error < 0.5
    in_nf4 = lo.Linear.from_linear(dense, dataclasses.replace(kind, factors=None))
    assert isinstance(in_nf4.up, lo.NF4Weight) and 0.05 < in_nf4.start_error < 0.3


def test_spectral_factors_are_those_of_the_unquantised_weight() -> None:
    dense = linear()
    U, S, Vt = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    layer = lo.Linear.from_linear(dense, lo.LoRAXS(5, factors="float32"))
    torch.testing.assert_close((layer.up.norm(dim=0)), S[:5], atol=1e-4, rtol=1e-3)
    product = layer.up @ layer.down
    torch.testing.assert_close(product, U[:, :5] * S[:5] @ Vt[:5], atol=1e-4, rtol=1e-3)
    layer = lo.Linear.from_linear(dense, lo.SVF(factors="float32"))
    torch.testing.assert_close(layer.up * S @ layer.down, dense.weight.detach(), atol=1e-4, rtol=1e-3)
    largest = layer.up.gather(0, layer.up.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()  # the sign rule


def test_nystrom_is_a_sketch_of_the_weight() -> None:
    dense = linear(N=40, K=100)
    torch.manual_seed(3)
    layer = lo.Linear.from_linear(dense, lo.LoRA(8, init="nystrom"), quantize=None)
    torch.manual_seed(3)
    sketch = torch.randn(8, 40) @ dense.weight.detach()
    torch.testing.assert_close(layer.down / layer.down.norm(), sketch / sketch.norm(), atol=1e-5, rtol=1e-4)
    assert layer.down.square().mean().sqrt().item() == pytest.approx((3 * 100) ** -0.5, rel=1e-4) and not layer.up.any()


@pytest.mark.parametrize("decay", [0.3, 0.7])
def test_quantisation_error(decay: float) -> None:
    """Nuclear norms of W − W' on decaying spectra: QPiSSA-5 < QPiSSA-1 < QLoRA and LoftQ-5 < LoftQ-1 < QLoRA."""
    dense = linear(256, 320, decay)

    def error(kind: lo.LoRA) -> float:
        layer = lo.Linear.from_linear(dense, kind)
        w = dense.weight.detach()
        lost = w - layer.merged_weight(torch.float32)
        if kind.init != "kaiming":
            assert layer.start_error == pytest.approx(float(lost.norm() / w.norm()), rel=1e-3)
        return float(torch.linalg.matrix_norm(lost, "nuc"))

    qlora = error(lo.LoRA(16))
    for init_name in ("pissa", "loftq"):
        one, five = (error(lo.LoRA(16, init=init_name, iterations=n)) for n in (1, 5))
        assert five < one < qlora, (init_name, five, one, qlora)


# ---- training ----


def exact_and_plain(layer: lo.Linear, x: Tensor, g: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of x and of the trained tensors by autograd through W' in a dtype."""
    leaves = [p.detach().to(dtype).requires_grad_() for p in layer.trained()]
    x = x.detach().to(dtype).requires_grad_()
    held = dict(zip([id(p) for p in layer.trained()], leaves, strict=True))

    def of(value):  # type: ignore[no-untyped-def]
        if isinstance(value, lo.NF4Weight):
            return value.dequantize(torch.float32).to(dtype)
        return held.get(id(value), value.detach().to(dtype))

    core = None
    if layer.core is not None:
        values = of(layer.core)
        core = layer.make_core(values if layer.core_offset is None else values + layer.core_offset.to(dtype))
    merged = layer.adapter.scale * (of(layer.up) @ (of(layer.down) if core is None else core.dense() @ of(layer.down)))
    if layer.weight is not None:
        merged = merged + of(layer.weight)
    return list(torch.autograd.grad(x @ merged.T, [x, *leaves], g.to(dtype)))


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("kind", KEEPING + CHANGING + REPLACING, ids=str)
def test_gradients_are_those_of_the_merged_weight(kind: Adapter, quantize: str | None) -> None:
    layer = perturb(lo.Linear.from_linear(linear(), kind, quantize))
    for M in (3, 40):
        x, g = torch.randn(M, 64, requires_grad=True), torch.randn(M, 48)
        y = layer(x)
        got = torch.autograd.grad(y, [x, *layer.trained()], g)
        exact, plain = (exact_and_plain(layer, x, g, dtype) for dtype in (torch.float64, torch.float32))
        for mine, judge, baseline in zip(got, exact, plain, strict=True):
            # The baseline rounds W' [N, K], the kernel does not: the factor is a little larger.
            worst = (mine.double() - judge).abs().max()
            allowed = 2 * (baseline.double() - judge).abs().max() + 2e-6 * judge.abs().max()
            assert worst <= allowed, (worst, allowed)


@pytest.mark.parametrize("kind", KEEPING + CHANGING + REPLACING, ids=str)
def test_merged_and_unmerged_agree(kind: Adapter) -> None:
    model = nn.Sequential(lo.Linear.from_linear(linear(), kind))
    perturb(model[0])
    x = torch.randn(7, 64)
    y = model(x)
    merged = lo.merge(model)[0]
    assert type(merged) is nn.Linear
    w, b = merged.weight.detach(), merged.bias.detach()
    exact = x.double() @ w.double().T + b.double()
    rounding = 2**-23 * (x.abs() @ w.abs().T + b.abs()).double() * 4
    assert ((y.double() - exact).abs() <= rounding + 2e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("kind", KEEPING + CHANGING + REPLACING, ids=str)
def test_trains_what_it_says_and_counts_it(kind: Adapter) -> None:
    model = lo.adapt(nn.Sequential(linear(), nn.ReLU(), nn.Linear(48, 10)), kind, targets=["0"])
    trained = lo.adapter_parameters(model)
    assert sum(p.numel() for p in trained) == kind.num_parameters(48, 64)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    assert f"parameters={kind.num_parameters(48, 64):,}" in repr(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    x, target = torch.randn(32, 64), torch.randn(32, 10)
    losses = []
    for _ in range(12):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [lo.LoRAXS(6), lo.SVFT("random", entries=5), REPLACING[1]], ids=str)
def test_state_dict_and_casting(kind: Adapter) -> None:
    layer = perturb(lo.Linear.from_linear(linear(), kind))
    other = lo.Linear(64, 48, adapter=kind)
    assert str(other.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(3, 64)
    assert_bits_equal(other(x), layer(x))
    for key, value in other.state_dict().items():
        assert_bits_equal(value, layer.state_dict()[key])
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    if layer.core_index is not None:
        assert layer.core_index.dtype == torch.int32


@pytest.mark.parametrize(
    "kind", [lo.LoRAXS(6), lo.SVFT(bandwidth=2), lo.SVFT("random", entries=5), REPLACING[0]], ids=str
)
def test_compiles(kind: Adapter) -> None:
    layer = perturb(lo.Linear.from_linear(linear(), kind))
    x = torch.randn(5, 64, requires_grad=True)

    def gradients(function) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        return torch.autograd.grad(function(x).square().sum(), [x, *layer.trained()])

    for mine, eager in zip(gradients(torch.compile(layer, fullgraph=True)), gradients(layer), strict=True):
        torch.testing.assert_close(mine, eager)


# ---- counts ----

GEMMA_2B = 18, [(2048, 2048)] * 2 + [(256, 2048)] * 2 + [(16384, 2048)] * 2 + [(2048, 16384)]
GEMMA_7B = 28, [(4096, 3072)] * 3 + [(3072, 4096)] + [(24576, 3072)] * 2 + [(3072, 24576)]
MISTRAL_7B = 32, [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]


@pytest.mark.parametrize(
    "kind, model, published",
    [
        (lo.SVF(), GEMMA_2B, 193_536),
        (lo.SVFT(bandwidth=0), GEMMA_2B, 193_536),
        (lo.SVFT(bandwidth=8), GEMMA_2B, 3_281_040),
        (lo.SVFT(bandwidth=16), GEMMA_2B, 6_352_416),
        (lo.SVFT("random", bandwidth=16), GEMMA_2B, 6_352_416),
        (lo.SVFT(bandwidth=16), GEMMA_7B, 19_816_384),
        (lo.LoRAXS(64), MISTRAL_7B, 917_504),
        (lo.LoRAXS(32), MISTRAL_7B, 229_376),
        (lo.LoRAXS(16), MISTRAL_7B, 57_344),
        (lo.LoRAXS(64), GEMMA_7B, 802_816),
        (lo.LoRAXS(32), GEMMA_7B, 200_704),
        (lo.LoRAXS(16), GEMMA_7B, 50_176),
        (lo.LoRA(64), MISTRAL_7B, 167_772_160),
        (lo.LoRA(64), GEMMA_7B, 200_015_872),
    ],
    ids=str,
)
def test_published_parameter_counts(kind: Adapter, model: tuple[int, list[tuple[int, int]]], published: int) -> None:
    layers, shapes = model
    assert layers * sum(kind.num_parameters(out_features=N, in_features=K) for N, K in shapes) == published


def test_random_patterns() -> None:
    kind = lo.SVFT("random", bandwidth=3, seed=5)
    rows, cols = kind.pairs(40)
    banded = init.empty_core(lo.SVFT(bandwidth=3), 40)
    assert torch.equal(rows.bincount(), lo.cores.pattern(banded)[0].bincount())
    assert len({*zip(rows.tolist(), cols.tolist(), strict=True)}) == len(rows) == kind.num_parameters(40, 40)
    assert all((i, i) in {*zip(rows.tolist(), cols.tolist(), strict=True)} for i in range(40))
    assert torch.equal(cols, lo.SVFT("random", bandwidth=3, seed=5).pairs(40)[1])
    assert not torch.equal(cols, lo.SVFT("random", bandwidth=3, seed=6).pairs(40)[1])
    assert lo.SVFT("random", entries=40).pairs(40)[0].numel() == 1600


# ---- bad input ----


def nf4_linear() -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compress_statistics=True)
    made.load_state_dict(linear().state_dict())
    return made.to("cpu")


def broken(value: float) -> nn.Module:
    made = linear()
    with torch.no_grad():
        made.weight[3, 5] = value
    return nn.Sequential(nn.ReLU(), made)


def test_principal_kinds_over_a_quantised_weight() -> None:
    for kind in (lo.LoRAXS(4), lo.SVF(rank=4), lo.SVFT(bandwidth=1), lo.LoRA(4, init="nystrom")):
        layer = lo.Linear.from_linear(nf4_linear(), kind)
        assert_bits_equal(layer.merged_weight(torch.float32), layer.weight.dequantize(torch.float32))


@pytest.mark.parametrize(
    "error, message, call",
    [
        (
            ValueError,
            "bandwidth must be below R = 48 .*got 48",
            lambda: lo.Linear(64, 48, adapter=lo.SVFT(bandwidth=48)),
        ),
        (ValueError, "bandwidth must be below R = 4 ", lambda: lo.SVFT(bandwidth=4, rank=4).num_parameters(48, 64)),
        (ValueError, "entries must be at most R = 48 ", lambda: lo.SVFT("random", entries=49).num_parameters(48, 64)),
        (ValueError, "rank must be at most .* = 48 .*got 49", lambda: lo.LoRAXS(49).num_parameters(48, 64)),
        (ValueError, "rank must be at most .* = 48 .*got 49", lambda: lo.Linear(64, 48, adapter=lo.SVF(49))),
        (ValueError, "'banded' needs bandwidth", lambda: lo.SVFT()),
        (ValueError, "'banded' needs bandwidth and no entries", lambda: lo.SVFT(bandwidth=1, entries=2)),
        (ValueError, "'random' needs entries or bandwidth", lambda: lo.SVFT("random")),
        (ValueError, "'random' needs entries or bandwidth", lambda: lo.SVFT("random", entries=2, bandwidth=3)),
        (ValueError, "pattern must be one of banded, random, got 'topk'", lambda: lo.SVFT("topk", entries=2)),
        (ValueError, "form must be one of additive, replace", lambda: lo.SVF(form="merged")),
        (ValueError, "factors must be one of nf4.*got 'int8'", lambda: lo.LoRAXS(4, factors="int8")),
        (ValueError, "bandwidth must be at least 0, got -1", lambda: lo.SVFT(bandwidth=-1)),
        (TypeError, "bandwidth must be an int, got 1.5", lambda: lo.SVFT(bandwidth=1.5)),
        (ValueError, "rank must be at least 1, got 0", lambda: lo.LoRAXS(0)),
        (ValueError, "iterations above 1 need", lambda: lo.LoRA(4, iterations=5)),
        (ValueError, "alpha must be above 0", lambda: lo.LoRA(4, alpha=-1, init="pissa")),
        (
            ValueError,
            "loftq.*needs quantize='nf4'",
            lambda: lo.Linear(64, 48, adapter=lo.LoRA(4, init="loftq"), quantize=None),
        ),
        (
            ValueError,
            "iterations=5.*need quantize='nf4'",
            lambda: lo.Linear(64, 48, adapter=lo.LoRA(4, init="pissa", iterations=5), quantize=None),
        ),
        (
            ValueError,
            "init='milora'.*before it was quantised",
            lambda: lo.Linear.from_linear(nf4_linear(), lo.LoRA(4, init="milora")),
        ),
        (
            ValueError,
            "layer '1': .*before it was quantised",
            lambda: lo.adapt(nn.Sequential(nn.ReLU(), nf4_linear()), lo.LoRA(4, init="pissa")),
        ),
        (ValueError, "layer '1': weight must be finite", lambda: lo.adapt(broken(float("nan")), lo.LoRAXS(4))),
        (
            ValueError,
            "layer '1': weight must be finite",
            lambda: lo.adapt(broken(float("inf")), lo.LoRA(4, init="pissa")),
        ),
        (ValueError, "changes the base, and W stays", lambda: lo.Linear(64, 48).set_adapter(lo.LoRA(4, init="pissa"))),
        (ValueError, "gives W up", lambda: lo.Linear(64, 48).set_adapter(lo.SVF(form="replace"))),
        (
            ValueError,
            "no weight to set another adapter over",
            lambda: lo.Linear(64, 48, adapter=lo.SVF(form="replace")).set_adapter(None),
        ),
        (
            ValueError,
            "changed the base of the layer",
            lambda: lo.Linear(64, 48, adapter=lo.LoRA(4, init="pissa")).set_adapter(None),
        ),
    ],
)
def test_bad_input(error: type[Exception], message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_a_refused_model_stays_as_it_was() -> None:
    model = broken(float("nan"))
    with pytest.raises(ValueError, match="layer '1'"):
        lo.adapt(model, lo.SVF())
    assert is_plain_linear(model[1]) and model[1].weight.requires_grad


# ---- docs ----


def test_the_documented_example() -> None:
    """docs/adapters.md, N = K = 4096 in NF4 with bfloat16 x: extra parameters, bytes and FLOPs, kept for backward."""
    N = K = 4096
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()

    def nf4(rows: int, columns: int) -> int:
        return lo.NF4Weight.quantize(torch.zeros(rows, columns)).nbytes

    assert f"base {nf4(N, K):,} bytes and {2 * N * K:,} FLOPs" in text
    kinds = {
        "LoRA(16)": lo.LoRA(16),
        'LoRA(16, init="pissa")': lo.LoRA(16, init="pissa"),
        "LoRAXS(64)": lo.LoRAXS(64),
        "SVF(rank=256)": lo.SVF(rank=256),
        "SVF()": lo.SVF(),
        'SVFT("banded", bandwidth=8)': lo.SVFT("banded", bandwidth=8),
        'SVFT("random", bandwidth=8)': lo.SVFT("random", bandwidth=8),
        'SVF(form="replace")': lo.SVF(form="replace"),
    }
    for name, kind in kinds.items():
        cells = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |")).split("|")[2:-1]
        documented = [int(cell.split()[0].replace(",", "").rstrip(";")) for cell in cells]
        count = kind.num_parameters(N, K)
        if isinstance(kind, lo.LoRA):
            R, entries, kept = kind.rank, 0, 4 * kind.rank + 2 * K
            frozen = 4 * R * (N + K) if kind.init == "pissa" else 0
        else:
            R, entries = kind.size(N, K), count
            kept = (2 if kind.form == "replace" else 4) * R
            frozen = nf4(N, R) + nf4(R, K) + (4 * count if kind.form == "replace" else 0)
            core = init.empty_core(kind, R)
            frozen += 0 if core.index is None else core.index.nbytes
        assert documented == [count, 4 * count, frozen, 2 * R * (N + K) + 2 * entries, kept], name


# ---- the kind in a state dict ----

OTHERS = [
    (lo.LoRA(8, alpha=16), lo.LoRA(8, alpha=16, init="pissa"), "LoRA(8, alpha=16)", "LoRA(8, alpha=16, init='pissa')"),
    (lo.LoRA(8, alpha=16), lo.LoRA(8), "LoRA(8, alpha=16)", "LoRA(8, alpha=32)"),
    (lo.LoRA(8, alpha=16), lo.LoRA(4, alpha=16), "LoRA(8, alpha=16)", "LoRA(4, alpha=16)"),
    (lo.LoRA(8, alpha=16), lo.LoRAXS(16), "LoRA(8, alpha=16)", "LoRAXS(16)"),
    (lo.LoRA(8), lo.LoRA(8, rslora=True), "LoRA(8, alpha=32)", "LoRA(8, alpha=32, rslora=True)"),
    (lo.LoRAXS(6), lo.LoRAXS(6, alpha=3.0), "LoRAXS(6)", "LoRAXS(6, alpha=3)"),
    (lo.SVF(), lo.SVFT(bandwidth=0), "SVF()", "SVFT(bandwidth=0)"),
    (lo.SVFT("random", entries=5), lo.SVFT("random", entries=5, seed=1), "SVFT(pattern='random', entries=5)",
     "SVFT(pattern='random', entries=5, seed=1)"),
    (lo.SVF(form="replace"), lo.SVF(), "SVF(form='replace')", "SVF()"),
]  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("first", "second", "one", "other"), OTHERS, ids=str)
def test_a_state_of_another_kind_is_refused_in_one_sentence(  # type: ignore[no-untyped-def]
    first: Adapter, second: Adapter, one: str, other: str, strict: bool
) -> None:
    def model(kind: Adapter) -> nn.Module:
        torch.manual_seed(0)
        return lo.adapt(nn.Sequential(linear(), nn.ReLU(), nn.Linear(48, 64)), kind)

    for theirs, mine, said in ((first, second, (one, other)), (second, first, (other, one))):
        made = model(mine)
        before = {key: value.clone() for key, value in made.state_dict().items()}
        with pytest.raises(RuntimeError) as caught:
            made.load_state_dict(model(theirs).state_dict(), strict=strict)
        sentences = str(caught.value).split("\n\t")[1:]
        assert [s for s in sentences if "checkpoint" in s] == ["checkpoint: {}, model: {}".format(*said)]
        if not strict:
            assert len(sentences) == 1
        for key, value in made.state_dict().items():
            assert_bits_equal(value, before[key])


def test_options_that_change_no_meaning_are_not_compared() -> None:
    kinds = lo.LoRA(8), lo.LoRA(8, dropout=0.5, init="gaussian")
    layers = [perturb(lo.Linear.from_linear(linear(), kind)).eval() for kind in kinds]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(3, 64)
    assert_bits_equal(layers[1](x), layers[0](x))
    xs = lo.Linear.from_linear(linear(), lo.LoRAXS(6, alpha=6, factors="float32"))
    xs.load_state_dict(lo.Linear.from_linear(linear(), lo.LoRAXS(6, factors="float32")).state_dict())


def test_states_without_a_record_load_as_ever() -> None:
    def state(kind: Adapter | None) -> dict[str, Tensor]:
        entries = lo.Linear.from_linear(linear(), kind).state_dict()
        return {key: value for key, value in entries.items() if key != "adapter"}

    for kind in {kind for row in OTHERS for kind in row[:2]}:
        lo.Linear.from_linear(linear(), kind).load_state_dict(state(kind))
    made = lo.Linear.from_linear(linear(), lo.LoRA(8))
    with pytest.raises(RuntimeError, match=r"checkpoint: a LoRA over a base of its own, model: LoRA\(8, alpha=32\)"):
        made.load_state_dict(state(lo.LoRA(8, init="pissa")), strict=False)


def test_a_layer_without_an_adapter_takes_a_base_but_no_changed_one() -> None:
    bare = lo.Linear.from_linear(linear(), None)
    bare.load_state_dict(perturb(lo.Linear.from_linear(linear(), lo.LoRA(8))).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="model: no adapter"):
        bare.load_state_dict(lo.Linear.from_linear(linear(), lo.LoRA(8, init="pissa")).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="'adapter' is not a record of an adapter"):
        bare.load_state_dict({"adapter": torch.tensor([1, 2], dtype=torch.uint8)}, strict=False)
    with pytest.raises(RuntimeError, match="the record of its adapter is damaged: KeyError"):
        bare.load_state_dict({"adapter": torch.tensor(list(b"{}"), dtype=torch.uint8)}, strict=False)


def test_factors_that_are_loaded_bring_along_of_which_weight_they_are() -> None:
    torch.manual_seed(3)
    theirs = lo.Linear.from_linear(nn.Linear(64, 48), lo.LoRAXS(6))
    made = lo.Linear.from_linear(linear(), lo.LoRAXS(6))
    assert made.source != theirs.source
    made.load_state_dict(theirs.state_dict())
    assert made.source == theirs.source

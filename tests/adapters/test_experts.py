"""Mixtures of experts: the block that stands in for fused experts, over every layout of transformers' families."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import FAMILIES, mixture
from torch import Tensor, nn

import lowrank_ops as lo
from lowrank_ops.adapters.experts import ExpertsLinear, Rows, find_stacks
from lowrank_ops.adapters.precompute import precompute
from lowrank_ops.formats import QuantizedWeight

IDS = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(0))
KINDS = [
    lo.LoRA(4),
    lo.LoRA(4, rslora=True, init="orthogonal"),
    lo.LoRA(4, init="nystrom"),
    lo.LoRA(4, init="pissa", iterations=2),
    lo.LoRA(4, init="milora"),
    lo.LoRA(4, init="loftq"),
    lo.LoRAXS(8),
    lo.SVF(),
    lo.SVF(form="replace", factors="float32"),
    lo.SVFT(bandwidth=2),
    lo.SVFT(pattern="random", entries=3),
    lo.SVFT(bandwidth=1, form="replace", factors="float32"),
]


def stacks(model: nn.Module) -> dict[str, ExpertsLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertsLinear)}


def perturb(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move the adapters as some training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lo.adapter_parameters(model):
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS, use_cache=False).logits
    return y


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Two orders of summation in float32 differ by this much of the largest number."""
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def block_stack(E: int = 4, N: int = 24, K: int = 32, decay: float = 1.0) -> Tensor:
    """Matrices whose singular values fall as i^-decay, each with its own."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(E, n, min(N, K), generator=generator))[0] for n in (N, K))
    return U * torch.arange(1.0, min(N, K) + 1) ** -decay @ V.mT


def some_rows(E: int = 4, K: int = 32, counts: tuple[int, ...] = (3, 0, 5, 1), past: int = 2) -> tuple[Tensor, Rows]:
    """Rows of x sorted by expert, one expert without rows, and rows past the last expert."""
    P = sum(counts) + past
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return torch.randn(P, K, generator=torch.Generator().manual_seed(2)), Rows(offsets, torch.arange(P), P)


def by_expert(x: Tensor, rows: Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[p] = W_e x[p] + b_e, expert by expert; 0 for rows past the last."""
    counts = rows.offsets.diff().tolist()
    parts = x.split([*counts, len(x) - sum(counts)])
    added = bias if bias is not None else torch.zeros(weight.shape[:2])
    y = [part @ w.T + b for part, w, b in zip(parts, weight, added, strict=False)]
    return torch.cat([*y, x.new_zeros(len(parts[-1]), weight.shape[1])])


# ---- a stack ----


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_start_of_a_stack_is_that_of_each_matrix(kind: Any) -> None:
    weight = block_stack()
    torch.manual_seed(0)
    layer = ExpertsLinear.from_weight(weight, None, kind)
    alone = [nn.Linear(32, 24, bias=False) for _ in weight]
    for linear, w in zip(alone, weight, strict=True):
        linear.weight.data.copy_(w)
    torch.manual_seed(0)
    singles = [lo.Linear.from_linear(linear, kind) for linear in alone]
    torch.testing.assert_close(layer.merged_weight(), torch.stack([s.merged_weight() for s in singles]))
    for name in ("down", "up", "core_offset", "base_down", "base_up"):
        for e, single in enumerate(singles):
            mine, theirs = getattr(layer, name), getattr(single, name)
            if theirs is None:
                assert mine is None
            elif isinstance(theirs, QuantizedWeight):
                assert torch.equal(mine[e].packed, theirs.packed)
            else:
                assert torch.equal(mine[e], theirs)


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_equal_autograd_through_the_merged_weights(kind: Any, quantize: str | None) -> None:
    if (
        quantize is None
        and getattr(kind, "init", "") == "loftq"
        or (quantize is None and getattr(kind, "iterations", 1) > 1)
    ):
        pytest.skip("the kind compensates 4 bits")
    bias = torch.randn(4, 24, generator=torch.Generator().manual_seed(3))
    layer = perturb(nn.ModuleList([ExpertsLinear.from_weight(block_stack(), bias, kind, quantize)]))[0]
    assert isinstance(layer, ExpertsLinear)
    x, rows = some_rows()
    x.requires_grad_()
    g = torch.randn(len(x), 24, generator=torch.Generator().manual_seed(4))
    y = layer(x, rows)
    y.backward(g)
    got = [x.grad, *(p.grad for p in layer.trained())]
    x.grad = None
    layer.zero_grad()
    if layer.weight is None:
        update = lo.LowRankUpdate(layer.down, layer.up, layer._replacing_core())
        weight = update.delta()
    else:
        base = layer.weight.dequantize() if isinstance(layer.weight, QuantizedWeight) else layer.weight.detach()
        weight = base + layer._relative_update().delta()
    assert_close(layer.merged_weight(), weight.detach())
    expected = by_expert(x, rows, weight, bias)
    expected.backward(g)
    assert_close(y, expected)
    assert not y[9:].any()
    for mine, theirs in zip(got, [x.grad, *(p.grad for p in layer.trained())], strict=True):
        assert_close(mine, theirs)


def test_stacks_are_combined_and_converted() -> None:
    kinds = [
        lo.LoRA(4),
        lo.LoRA(4, init="pissa"),
        lo.LoRAXS(4),
        lo.SVFT(pattern="random", entries=2),
        lo.SVFT(bandwidth=1),
    ]
    layers = [perturb(nn.ModuleList([ExpertsLinear.from_weight(block_stack(), None, kind)]))[0] for kind in kinds]
    deltas = []
    for layer in layers:
        assert isinstance(layer, ExpertsLinear) and layer.update is not None
        base = 0 if layer.update.base is None else layer.update.base.delta()
        deltas.append(layer.update.delta() - base)
        exact = lo.convert(layer)
        assert_close(exact.update.delta(), deltas[-1])
        lower = lo.convert(layer, rank=3)
        best = [torch.linalg.svdvals(d)[3:].norm() ** 2 for d in deltas[-1]]
        assert lower.update.rank == 3
        assert abs(lower.error - sum(best) ** 0.5 / deltas[-1].norm()) < 1e-4
    both = lo.combine([(layer, 0.5 - i) for i, layer in enumerate(layers)])  # type: ignore[misc]
    assert_close(both.delta(), sum((0.5 - i) * d for i, d in enumerate(deltas)))
    cores = lo.combine([(layers[3], 1.0), (layers[4], 2.0)])  # the same factors, and patterns that are united
    assert cores.core is not None
    assert_close(cores.delta(), deltas[3] + 2 * deltas[4])


# ---- families ----


@pytest.mark.filterwarnings("ignore:adapt left out")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_its_dense_model_does(family: str) -> None:
    model = mixture(family)
    shapes = {name: (p.shape, p.dtype) for name, p in model.state_dict().items()}
    taken = set(find_stacks(dict(model.named_modules())))
    lo.adapt(model, lo.LoRA(4))
    assert set(stacks(model)) == taken and taken
    outside = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)] + [
        model.get_output_embeddings().weight
    ]
    packed = sum(m.numel() for m in model.modules() if isinstance(m, QuantizedWeight))
    trained = {id(p) for p in lo.adapter_parameters(model)}
    left = sum(p.numel() for p in {*model.parameters()} - {*outside} if id(p) not in trained)
    assert packed >= 0.97 * (packed + left)

    perturb(model)
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    y = model(inputs_embeds=x, use_cache=False).logits
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    y.backward(g)
    scale = {name: layer.adapter.scale for name, layer in stacks(model).items()}
    factors = {name: (layer.down, layer.up) for name, layer in stacks(model).items()}
    matrices = {name: block.matrix for name, block in find_stacks(dict(mixture(family).named_modules())).items()}

    merged: Any = lo.merge(model)
    assert {name: (p.shape, p.dtype) for name, p in merged.state_dict().items()} == shapes
    dense = {name: merged.get_parameter(name).requires_grad_() for name in taken}
    again = x.detach().requires_grad_()
    expected = merged(inputs_embeds=again, use_cache=False).logits
    expected.backward(g)
    assert_close(y, expected)
    assert x.grad is not None and again.grad is not None
    assert_close(x.grad, again.grad, 1e-4)
    for name, p in dense.items():
        if p.grad is None:  # no token chose one of its experts
            continue
        grad = p.grad.unflatten(0, (matrices[name].experts, -1)) if matrices[name].experts else p.grad
        grad = grad.mT if matrices[name].transposed else grad
        down, up = factors[name]
        assert_close(down.grad, scale[name] * up.detach().mT @ grad, 1e-4)
        assert_close(up.grad, scale[name] * grad @ down.detach().mT, 1e-4)


@pytest.mark.filterwarnings("ignore:adapt left out")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "dbrx", "nemotron_h", "jetmoe"])
def test_adapters_of_a_family_are_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = perturb(lo.adapt(mixture(family), lo.LoRA(4)))
    expected = logits(model)
    lo.save_adapter(model, tmp_path)
    base = lo.adapt(mixture(family), None)
    assert (logits(base) - expected).abs().max() > 1e-3 * expected.abs().max()
    assert torch.equal(logits(lo.load_adapter(base, tmp_path)), expected)
    state = lo.adapt(mixture(family), lo.LoRA(4))
    state.load_state_dict(model.state_dict())
    assert torch.equal(logits(state), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_family_that_nobody_knows_follows_the_interface(transposed: bool, gated: bool) -> None:
    from transformers.integrations.moe import use_experts_implementation

    first = "gate_up_proj" if gated else "up_proj"

    @use_experts_implementation(is_transposed=transposed, has_bias=True, has_gate=gated, has_post_expert_norm=True)
    class Unknown(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 4, nn.GELU()
            for name, N, K in ((first, 48 if gated else 24, 32), ("down_proj", 32, 24)):
                shape = (4, K, N) if transposed else (4, N, K)
                self.register_parameter(name, nn.Parameter(torch.randn(shape) / 4))
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(4, N)))
            self.post_expert_norm = nn.LayerNorm(32)
            nn.init.normal_(self.post_expert_norm.bias)

        def forward(self, *arguments: Any) -> Tensor:
            raise AssertionError("the interface chooses another forward")

    torch.manual_seed(0)
    config = type("Config", (), {"_experts_implementation": "grouped_mm"})()
    model = nn.ModuleDict({"experts": Unknown(config)})
    x, index, weights = torch.randn(5, 32), torch.stack([torch.randperm(4)[:2] for _ in range(5)]), torch.rand(5, 2)
    with torch.no_grad():
        expected = model["experts"](x, index, weights)
        lo.adapt(model, lo.LoRA(4), quantize=None)
        assert isinstance(model["experts"], lo.Experts) and len(stacks(model)) == 2
        assert_close(model["experts"](x, index, weights), expected)
        got = perturb(lo.adapt(lo.merge(model), lo.LoRA(4)))["experts"](x, index, weights)
        assert type(lo.merge(model)["experts"]) is Unknown
        assert_close(model["experts"](x, index, weights), got)


# ---- serving ----


def pooled(family: str, tmp_path: Path, kinds: dict[str, Any]) -> tuple[Any, lo.AdapterPool, dict[str, Tensor]]:
    """A model with a pool, the adapters of some kinds in it, and the logits that each gives alone."""
    expected = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        single = perturb(lo.adapt(lo.adapt(mixture(family), None), kind), seed)
        lo.save_adapter(single, tmp_path / name)
        expected[name] = logits(single)
    model = lo.adapt(mixture(family), None)
    pool = lo.AdapterPool(model, capacity_bytes=1 << 22)
    for name in kinds:
        pool.load(name, tmp_path / name)
    return model, pool, expected | {"": logits(model)}


ROUTED = {"a": lo.LoRA(4), "b": lo.LoRAXS(4), "c": lo.SVFT(pattern="random", entries=2), "d": lo.SVF(rank=8)}


@pytest.mark.filterwarnings("ignore:adapt left out")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text", "dbrx", "nemotron_h", "longcat_flash"])
def test_every_row_goes_through_its_own_adapter_in_every_expert(family: str, tmp_path: Path) -> None:
    kinds = ROUTED if family == "qwen3_moe" else {"a": lo.LoRA(4), "b": lo.LoRAXS(4)}
    model, pool, expected = pooled(family, tmp_path, kinds)
    names = [None, *kinds]
    with torch.no_grad(), pool.route(names):
        y = model(input_ids=IDS[:1].expand(len(names), -1), use_cache=False).logits
    for row, name in zip(y, names, strict=True):
        assert_close(row, expected[name or ""][0], 5e-5)
    assert (y[0] - y[1]).abs().max() > 1e-2 * y.abs().max()


def test_a_row_of_a_block_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    model, pool, _ = pooled("qwen3_moe", tmp_path, ROUTED)
    block = model.model.layers[0].mlp.experts
    names = [None, *ROUTED, "a"]
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(6))
    index = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:2] for t in range(6)])
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), pool.route(names):
        y = block(x, index, weights)
    for t, name in enumerate(names):
        one = slice(t, t + 1)
        with torch.no_grad(), pool.route([name]):
            assert torch.equal(block(x[one], index[one], weights[one])[0], y[t])


def test_rows_generate_with_their_adapters(tmp_path: Path) -> None:
    model, pool, _ = pooled("qwen3_moe", tmp_path, {"a": lo.LoRA(4), "b": lo.LoRA(8, init="pissa")} | ROUTED)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = {}
    for name in (None, "a", "b", "c"):
        with pool.route([name]):
            alone[name] = model.generate(IDS[:1], **options)[0]
    with pool.route(["c", None, "b", "a"]):
        together = model.generate(IDS[:1].expand(4, -1), **options)
    for row, name in zip(together, ["c", None, "b", "a"], strict=True):
        assert torch.equal(row, alone[name])
    assert len({tuple(row.tolist()) for row in alone.values()}) > 1


def test_an_adapter_of_other_experts_is_not_loaded(tmp_path: Path) -> None:
    lo.save_adapter(perturb(lo.adapt(mixture("mixtral"), lo.LoRA(4))), tmp_path)
    pool = lo.AdapterPool(lo.adapt(mixture("qwen3_moe"), None), capacity_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"experts"):
        pool.load("a", tmp_path)
    assert not pool.names()


# ---- compiled ----


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text", "nemotron_h"])
def test_a_block_compiles_as_one_graph(family: str) -> None:
    model = perturb(lo.adapt(mixture(family), lo.LoRA(4), r".*experts.*"))
    block = next(m for m in model.modules() if isinstance(m, lo.Experts))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(6))
    index = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:2] for t in range(9)])
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(7))
    inputs = (x,) if family == "llama4_text" else (x, index, weights)

    def loss(function: Any) -> Tensor:
        y = function(*inputs)
        return (y[0] if isinstance(y, tuple) else y).square().sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for function in (block, compiled):
        model.zero_grad()
        value = loss(function)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in lo.adapter_parameters(model) if p.grad is not None)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


# ---- the block ----


def test_targets_name_a_stack() -> None:
    model = lo.adapt(mixture("qwen3_moe"), lo.LoRA(4), ["layers.1.mlp.experts.gate_up_proj"])
    chosen = {name: layer.adapter for name, layer in stacks(model).items()}
    assert chosen == {
        "model.layers.1.mlp.experts.gate_up_proj": lo.LoRA(4),
        "model.layers.1.mlp.experts.down_proj": None,
    }
    other = stacks(model)["model.layers.1.mlp.experts.down_proj"].weight
    assert isinstance(other, nn.Parameter)  # as it was
    assert type(model.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"


def test_experts_can_be_left_alone() -> None:
    model = lo.adapt(mixture("qwen3_moe"), lo.LoRA(4), experts=False)
    assert not stacks(model) and isinstance(model.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)
    assert not any(p.requires_grad for p in model.model.layers[0].mlp.experts.parameters())


def test_adapt_again_over_quantised_experts() -> None:
    model = lo.adapt(mixture("gpt_oss"), None)
    before = logits(model)
    weights = {name: layer.weight for name, layer in stacks(model).items()}
    lo.adapt(model, lo.LoRA(4))
    assert torch.equal(logits(model), before)
    assert all(layer.weight is weights[name] and layer.adapter == lo.LoRA(4) for name, layer in stacks(model).items())


def test_disabled_and_reference() -> None:
    model = lo.adapt(mixture("qwen3_moe"), None)
    before = logits(model)
    perturb(lo.adapt(model, lo.LoRA(4)))
    after = logits(model)
    with lo.disabled(model):
        assert_close(logits(model), before)
    assert torch.equal(logits(lo.reference(model, adapter=False)), before)
    assert torch.equal(logits(lo.reference(model)), after) and not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sentinels_and_routing_weights_of_another_dtype(dtype: torch.dtype) -> None:
    model = perturb(lo.adapt(mixture("qwen3_moe", dtype), lo.LoRA(4)))
    block = model.model.layers[0].mlp.experts
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(6)).to(dtype)
    index = torch.tensor([[0, 1], [3, 4], [4, 4], [2, 0], [1, 4], [3, 2]])  # expert 4 does not exist
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(7))
    y = block(x, index, weights)
    assert y.dtype == dtype and not y[2].any()
    plain = lo.merge(model).model.layers[0].mlp.experts.float()
    real = index < 4
    expected = plain(x.float(), index.clamp(max=3), weights * real)
    assert_close(y.float(), expected, 2e-5 if dtype == torch.float32 else 2e-2)


def test_no_tokens() -> None:
    model = lo.adapt(mixture("qwen3_moe"), lo.LoRA(4))
    y = model.model.layers[0].mlp.experts(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert y.shape == (0, 64)


def test_blocks_with_hooks_and_adapters_of_experts_that_do_not_fit_are_refused() -> None:
    model = mixture("qwen3_moe")
    block = model.model.layers[1].mlp.experts
    handle = block.register_forward_hook(lambda *_: None)
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*hooks"):
        lo.adapt(model, lo.LoRA(4))
    handle.remove()
    with torch.no_grad():
        block.down_proj[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj.*finite"):
        lo.adapt(model, lo.LoRA(4))
    assert model.model.layers[1].mlp.experts is block and model.state_dict().keys() == state.keys()
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj.*rank"):
        lo.adapt(mixture("qwen3_moe"), lo.LoRA(65), ["experts.gate_up_proj"])


def test_explain_names_both_products() -> None:
    model = lo.adapt(mixture("qwen3_moe"), lo.LoRA(4))
    text = lo.explain(model.model.layers[0].mlp.experts, torch.empty(6, 64, device="meta"))
    assert "gate_up_proj\nexperts_linear  P=6 E=4 N=96 K=64 R=4  W NF4" in text
    assert "down_proj\nexperts_linear  P=6 E=4 N=64 K=48 R=4" in text and text.count("runs") == 2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dbrx", "mixtral"])
def test_singular_vectors_of_experts_are_computed_once(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The files have one matrix for each expert, or one tensor, or one that is flat; W may be transposed in them.
    model = mixture(family)
    model.save_pretrained(tmp_path / "model")
    keys = precompute(tmp_path / "model", tmp_path / "factors", 4)
    matrices = {f"{name}.{e}" for name, stack in find_stacks(dict(model.named_modules())).items() for e in range(4)}
    assert {name for name in keys if name in matrices} == matrices
    expected = logits(lo.adapt(mixture(family), lo.LoRAXS(4)))
    monkeypatch.setattr("lowrank_ops.adapters.start.largest", lambda *_: pytest.fail("decomposed again"))
    assert torch.equal(logits(lo.adapt(model, lo.LoRAXS(4), factors=tmp_path / "factors")), expected)


def test_parameters_are_grouped_and_counted() -> None:
    model = lo.adapt(mixture("qwen3_moe"), lo.LoRA(4), ["experts.gate_up_proj", "experts.down_proj"])
    groups = lo.parameter_groups(model, lr=1e-4, lr_up=1e-3)
    assert len(groups[1]["params"]) == 4
    assert sum(p.numel() for p in lo.adapter_parameters(model)) == 2 * 4 * 4 * (64 + 96 + 48 + 64)
    dense = sum(p.numel() for p in mixture("qwen3_moe").parameters())
    trained = sum(p.numel() for p in lo.adapter_parameters(model))
    assert lo.scaling_laws.count_parameters(model, "all") == dense + trained

"""Adapters on disk: our own round trip, and PEFT in both directions."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_bits_equal
from models import adapted, gpt2, llama, plain, randomised, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_ops as lo
from lowrank_ops.adapters import peft_files, rounding
from lowrank_ops.adapters.frozen import is_plain_linear

TOKENS = torch.arange(14).view(2, 7)


def test_round_trip(tmp_path: Path) -> None:
    model = randomised(lo.adapt(llama(), lo.LoRA(4, alpha=6.5, dropout=0.1))).eval()
    expected = model(TOKENS).logits
    lo.save_adapter(model, tmp_path / "new" / "folder")
    fresh = lo.adapt(llama(), lo.LoRA(4, alpha=6.5, dropout=0.1)).eval()
    assert lo.load_adapter(fresh, tmp_path / "new" / "folder") is fresh
    assert_bits_equal(fresh(TOKENS).logits, expected)
    # a base that is only quantised gets its adapters from the file
    bare = lo.adapt(llama(), None).eval()
    lo.load_adapter(bare, tmp_path / "new" / "folder")
    assert_bits_equal(bare(TOKENS).logits, expected)
    assert bare.model.layers[0].mlp.up_proj.adapter == lo.LoRA(4, alpha=6.5, dropout=0.1)


@pytest.mark.parametrize(
    "make, targets", [(llama, "all-linear"), (llama, ["q_proj", "layers.1.mlp.up_proj"]), (gpt2, "all-linear")]
)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_it_and_agrees(make, targets, rslora: bool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from peft import PeftModel

    model = randomised(lo.adapt(make(), lo.LoRA(4, alpha=8, rslora=rslora), targets, quantize=None)).eval()
    lo.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    wrapped = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(adapted(model))
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_peft_over_bitsandbytes_gives_the_same_output(tmp_path: Path) -> None:
    """The 4-bit base with the adapter: the same bytes and factors in both, so the same function.

    Every in_features of this model is a multiple of 64: where blocks straddle rows, bitsandbytes 0.50.2 decodes its own
    bytes wrongly on a CPU for some shapes.
    """
    import bitsandbytes as bnb
    from peft import PeftModel

    model = randomised(lo.adapt(llama(), lo.LoRA(4))).eval()
    lo.save_adapter(model, tmp_path)
    base = llama()
    for name in adapted(model):
        parent, _, child = name.rpartition(".")
        dense = base.get_submodule(name)
        packed = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
        )
        packed.load_state_dict(dense.state_dict())
        setattr(base.get_submodule(parent), child, packed.to("cpu"))
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).train()
    with torch.enable_grad():
        expected = theirs(TOKENS).logits.detach()
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)


KINDS = [
    lo.LoRA(4, init="nystrom"),
    lo.LoRAXS(6, alpha=9),
    lo.SVF(rank=20, factors="float32"),
    lo.SVFT(bandwidth=2),
    lo.SVFT("random", entries=3, seed=4, rank=16),
]
CHANGING = [
    lo.LoRA(4, init="pissa", iterations=2),
    lo.LoRA(4, init="loftq", iterations=2, rslora=True),
    lo.LoRA(2, init="milora"),
]
REPLACING = [lo.SVF(form="replace"), lo.SVFT("random", entries=3, form="replace", rank=30, factors="bfloat16")]


@pytest.mark.parametrize("kind", KINDS + CHANGING + REPLACING, ids=str)
def test_the_adapter_of_a_whole_saved_model(kind, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = randomised(lo.adapt(llama(), kind)).eval()
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    fresh = randomised(lo.adapt(llama(), kind)).eval()
    with torch.no_grad():
        for p in lo.adapter_parameters(fresh):
            p.add_(1)
    assert_bits_equal(lo.load_adapter(fresh, tmp_path)(TOKENS).logits, expected)
    if kind in CHANGING:
        return
    bare = llama() if kind in REPLACING else lo.adapt(llama(), None)
    loaded = lo.load_adapter(bare, tmp_path).eval()
    assert_bits_equal(loaded(TOKENS).logits, expected)
    lo.save_adapter(loaded, tmp_path / "alone", "stored")
    again = llama() if kind in REPLACING else lo.adapt(llama(), None)
    assert_bits_equal(lo.load_adapter(again, tmp_path / "alone").eval()(TOKENS).logits, expected)


def test_the_adapter_of_a_whole_model_that_is_another(tmp_path: Path) -> None:
    randomised(lo.adapt(llama(), lo.LoRA(4, init="pissa"), quantize=None)).save_pretrained(tmp_path / "pissa")
    model = lo.load_adapter(llama(), tmp_path / "pissa").eval()
    expected = randomised(lo.adapt(llama(), lo.LoRA(4, init="pissa"), quantize=None)).eval()(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    lo.adapt(llama(), lo.LoRAXS(6)).save_pretrained(tmp_path / "xs")
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(1)
    for taker in (lo.adapt(copy.deepcopy(other), None), other):
        with pytest.raises(
            ValueError, match="layer 'model.layers.1.mlp.up_proj': the adapter was made for another weight"
        ):
            lo.load_adapter(taker, tmp_path / "xs")
    with pytest.raises(
        ValueError, match=r"the layer has the adapter LoRAXS.*rank=5.* and the file one of LoRAXS.*rank=6"
    ):
        lo.load_adapter(lo.adapt(llama(), lo.LoRAXS(5)), tmp_path / "xs")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_whole_state_of_an_inner_model_and_damaged_ones(name: str, tmp_path: Path) -> None:
    def save(state: dict[str, torch.Tensor]) -> None:
        if name.endswith(".bin"):
            torch.save(state, tmp_path / name)
        else:
            save_file(state, tmp_path / name)

    model = randomised(lo.adapt(plain(), lo.LoRA(4)))
    state = model.state_dict()
    save(state)
    outer = lo.load_adapter(nn.Sequential(nn.Identity(), lo.adapt(plain(), lo.LoRA(4))), tmp_path)
    x = torch.randn(3, 64)
    assert_bits_equal(outer(x), model(x))
    twice = nn.ModuleList([lo.adapt(plain(), None), lo.adapt(plain(), None)])
    with pytest.raises(ValueError, match="which is not a linear layer, a convolution or an embedding of the model"):
        lo.load_adapter(twice, tmp_path)
    fresh = lo.adapt(plain(), lo.LoRA(4))
    damages = [
        ("records no kind of its adapters", lambda s: {k: v for k, v in s.items() if not k.endswith(".adapter")}),
        ("has no adapter", lambda s: lo.adapt(plain(), None).state_dict()),
        ("the file lacks 0.lora_B.weight", lambda s: {k: v for k, v in s.items() if k != "0.up"}),
        ("layer '0': its adapter must be finite", lambda s: s | {"0.up": s["0.up"] * torch.nan}),
        ("layer '0': '0.adapter' is not a record", lambda s: s | {"0.adapter": torch.ones(3, dtype=torch.uint8)}),
    ]
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    for message, damage in damages:
        save(damage(state))
        with pytest.raises(ValueError, match=message):
            lo.load_adapter(fresh, tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a whole state of a model"):
        lo.load_adapter(fresh, tmp_path)
    for key, value in fresh.state_dict().items():
        assert_bits_equal(value, before[key])


@pytest.mark.parametrize("kind", KINDS + CHANGING, ids=str)
def test_every_kind_comes_back_over_a_dense_model(kind, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if isinstance(kind, lo.LoRA) and (kind.iterations > 1 or kind.init == "loftq"):
        kind = lo.LoRA(4, init="pissa")
    model = randomised(lo.adapt(llama(), kind, quantize=None)).eval()
    expected = model(TOKENS).logits
    lo.save_adapter(model, tmp_path)
    plain_model = lo.load_adapter(llama(), tmp_path).eval()
    torch.testing.assert_close(plain_model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    # and what was loaded can be saved and loaded again
    lo.save_adapter(plain_model, tmp_path / "again")
    again = lo.load_adapter(llama(), tmp_path / "again").eval()
    assert_bits_equal(again(TOKENS).logits, plain_model(TOKENS).logits)


def test_peft_loads_a_changed_base_as_a_lora_of_the_original(tmp_path: Path) -> None:
    from peft import PeftModel

    for i, kind in enumerate((lo.LoRA(4, alpha=6, init="pissa"), lo.LoRA(2, rslora=True, init="milora"))):
        model = randomised(lo.adapt(llama(), kind, quantize=None)).eval()
        lo.save_adapter(model, tmp_path / str(i))
        theirs = PeftModel.from_pretrained(llama(), str(tmp_path / str(i))).eval()
        torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=2e-5)


def test_kinds_mixed_in_one_model(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = lo.adapt(llama(), lo.LoRAXS(4), ["q_proj"])
        lo.adapt(model, lo.LoRA(3), ["up_proj"])
        return lo.adapt(model, lo.SVFT(bandwidth=1), ["o_proj"]).eval()

    model = randomised(make())
    lo.save_adapter(model, tmp_path)
    assert_bits_equal(lo.load_adapter(make(), tmp_path)(TOKENS).logits, model(TOKENS).logits)


def other_base() -> nn.Module:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.01
    return model


@pytest.mark.parametrize("factors", ["recipe", "stored"])
@pytest.mark.parametrize("kind", [lo.LoRAXS(6), lo.SVFT("random", entries=3), lo.LoRA(4, init="pissa")], ids=str)
def test_factors_of_another_model_are_refused(kind, factors: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lo.save_adapter(randomised(lo.adapt(llama(), kind)), tmp_path, factors)
    for model in (other_base(), lo.adapt(other_base(), kind)):
        description, before, _ = snapshot(model)
        with pytest.raises(ValueError, match="layer 'model.layers.1.mlp.up_proj': .*another weight"):
            lo.load_adapter(model, tmp_path)
        assert repr(model) == description
        for key, value in model.state_dict().items():
            assert_bits_equal(value, before[key])


def _records(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    file = path / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        records = json.loads(opened.metadata()["lowrank_ops"])
    change(records)
    save_file(load_file(file), file, {"format": "pt", "lowrank_ops": json.dumps(records)})


CORE = "base_model.model.2.0.lowrank_ops.core"
PAIRS = "base_model.model.2.0.lowrank_ops.pairs"


@pytest.mark.parametrize(
    "message, damage",
    [
        ("'2.0': .*fingerprints differ", lambda p: _records(p, lambda r: r["2.0"].update(fingerprint=[1.0] * 8))),
        ("'2.0': .*another weight", lambda p: _records(p, lambda r: r["2.0"].update(weight="0" * 64))),
        ("'2.0': the record of its adapter is damaged", lambda p: _records(p, lambda r: r["2.0"].pop("kind"))),
        ("does not say of every layer", lambda p: _records(p, lambda r: r.pop("2.0"))),
        ("2.0.core must be", lambda p: _tensors(p, lambda t: t.update({CORE: torch.ones(3)}), True)),
        ("2.0.core.*finite", lambda p: _tensors(p, lambda t: t[CORE].fill_(float("nan")), True)),
        ("lacks 2.0.pairs", lambda p: _tensors(p, lambda t: t.pop(PAIRS), True)),
        ("'2.0': the layer has another random pattern", lambda p: _tensors(p, lambda t: t[PAIRS].fill_(0), True)),
        ("'2.0': the layer has the adapter", lambda p: _records(p, lambda r: r["2.0"]["kind"].update(seed=7))),
    ],
)
def test_damaged_files_of_a_spectral_kind(message: str, damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    kind = lo.SVFT("random", entries=3)
    lo.save_adapter(randomised(lo.adapt(plain(), kind)), tmp_path, "recipe")
    damage(tmp_path)
    model = lo.adapt(plain(), kind)
    _, state, _ = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lo.load_adapter(model, tmp_path)
    for key, value in model.state_dict().items():
        assert_bits_equal(value, state[key])


def test_a_base_made_with_other_vectors_is_refused(tmp_path: Path) -> None:
    kind = lo.LoRA(4, init="pissa")
    lo.save_adapter(randomised(lo.adapt(plain(), kind)), tmp_path)
    _tensors(tmp_path, lambda t: t["base_model.model.2.0.lora_A.weight"][4:].mul_(1.01), True)
    model = lo.adapt(plain(), kind)
    with pytest.raises(ValueError, match="layer '2.0': the layer's base was made with other vectors"):
        lo.load_adapter(model, tmp_path)


def test_a_plain_lora_does_not_go_over_a_changed_base(tmp_path: Path) -> None:
    lo.save_adapter(randomised(lo.adapt(plain(), lo.LoRA(4))), tmp_path)
    with pytest.raises(ValueError, match="layer '0': the layer has the adapter .*pissa"):
        lo.load_adapter(lo.adapt(plain(), lo.LoRA(4, init="pissa")), tmp_path)


def test_ranks_that_differ(tmp_path: Path) -> None:
    from peft import PeftModel

    model = llama()
    lo.adapt(model, lo.LoRA(2, alpha=4), ["q_proj", "k_proj"], quantize=None)
    lo.adapt(model, lo.LoRA(8, alpha=4), ["layers.0.mlp.up_proj"], quantize=None)
    lo.adapt(model, lo.LoRA(2, alpha=16), ["layers.1.mlp.up_proj"], quantize=None)
    randomised(model).eval()
    lo.save_adapter(model, tmp_path)
    torch.testing.assert_close(
        PeftModel.from_pretrained(llama(), str(tmp_path)).eval()(TOKENS).logits, model(TOKENS).logits,
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    fresh = lo.load_adapter(llama(), tmp_path).eval()
    assert_bits_equal(fresh(TOKENS).logits, model(TOKENS).logits)


def test_reads_what_peft_writes(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    theirs = get_peft_model(llama(), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path)
    model = lo.load_adapter(llama(), tmp_path).eval()
    assert len(adapted(model)) == 4
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="adapted by PEFT already"):
        lo.load_adapter(theirs, tmp_path)


def test_auto_classes_of_peft_find_the_model(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    llama().save_pretrained(tmp_path / "base")
    model = randomised(lo.adapt(llama().from_pretrained(tmp_path / "base"), lo.LoRA(4), quantize=None)).eval()
    lo.save_adapter(model, tmp_path / "adapter")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_loaded_trains_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    lo.save_adapter(randomised(lo.adapt(plain(), lo.LoRA(4))), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    model = lo.load_adapter(plain(), tmp_path)
    assert {p.dtype for p in lo.adapter_parameters(model)} == {torch.float32}
    model(torch.randn(3, 64)).sum().backward()


def test_saving_over_an_older_one(tmp_path: Path) -> None:
    lo.save_adapter(randomised(lo.adapt(plain(), lo.LoRA(4))), tmp_path)
    model = randomised(lo.adapt(plain(), lo.LoRA(2)))
    lo.save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    lo.load_adapter(lo.adapt(plain(), lo.LoRA(2)), tmp_path)


def test_a_wrapped_model_saves_under_its_own_names(tmp_path: Path) -> None:
    model = randomised(lo.adapt(plain(), lo.LoRA(4)))
    lo.save_adapter(torch.compile(model), tmp_path)
    fresh = lo.load_adapter(lo.adapt(plain(), lo.LoRA(4)), tmp_path)
    x = torch.randn(3, 64)
    assert_bits_equal(fresh(x), model(x))
    with pytest.raises(ValueError, match="no adapter inside it"):
        lo.save_adapter(lo.Linear(64, 64, adapter=lo.LoRA(4)), tmp_path)


def test_names_are_those_of_the_model_inside_its_wrappers(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = randomised(lo.adapt(plain(), lo.LoRA(4)))
    x = torch.randn(3, 64)
    expected = model(x)
    model[2] = checkpoint_wrapper(model[2])
    lo.save_adapter(model, tmp_path)
    assert_bits_equal(lo.load_adapter(lo.adapt(plain(), lo.LoRA(4)), tmp_path)(x), expected)
    assert_bits_equal(lo.load_adapter(model, tmp_path)(x), expected)


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


@pytest.mark.parametrize(
    "wrap",
    [
        averaged,
        nn.DataParallel,
        torch.ao.quantization.QuantWrapper,
        lambda model: averaged(torch.compile(nn.DataParallel(model))),
    ],
)
def test_wrappers_of_torch_leave_no_trace_in_names(wrap, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = randomised(lo.adapt(plain(), lo.LoRA(4)))
    x = torch.randn(3, 64)
    expected = model(x)
    lo.save_adapter(wrap(model), tmp_path / "outer")
    assert_bits_equal(lo.load_adapter(lo.adapt(plain(), lo.LoRA(4)), tmp_path / "outer")(x), expected)
    other = wrap(lo.adapt(plain(), lo.LoRA(4)))
    assert_bits_equal(lo.load_adapter(other, tmp_path / "outer")(x).cpu(), expected)
    lo.save_adapter(nn.ModuleDict({"net": wrap(model)}), tmp_path / "inner")
    fresh = nn.ModuleDict({"net": lo.adapt(plain(), lo.LoRA(4))})
    assert_bits_equal(lo.load_adapter(fresh, tmp_path / "inner")["net"](x), expected)


def test_a_users_attribute_called_module_is_no_wrapper(tmp_path: Path) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.other = plain(), plain()

    for model in (Held(), nn.ModuleDict({"module": plain(), "other": plain()})):
        lo.save_adapter(lo.adapt(model, lo.LoRA(4)), tmp_path)
        names = {name.split(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
        assert names == {"module", "other"}


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

    plainly = randomised(lo.adapt(plain(), lo.LoRA(4)))
    lo.save_adapter(plainly, tmp_path / "a")
    model = randomised(lo.adapt(plain(), lo.LoRA(4)))
    fully_shard(model)
    for call in (lambda: lo.merge(model), lambda: lo.load_adapter(model, tmp_path / "a")):
        with pytest.raises(ValueError, match="layer '0': down is sharded.*unshard"):
            call()
    assert len(adapted(model)) == 3
    lo.save_adapter(model, tmp_path / "sharded")
    assert isinstance(model, FSDPModule)
    model.unshard()
    lo.save_adapter(model, tmp_path / "b")
    older = FullyShardedDataParallel(plainly, use_orig_params=True, device_id=torch.device("cpu"))
    with FullyShardedDataParallel.summon_full_params(older):
        lo.save_adapter(older, tmp_path / "c")
    for name in ("sharded", "b", "c"):
        for key, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items():
            assert_bits_equal(load_file(tmp_path / name / "adapter_model.safetensors")[key], tensor)


def test_names_are_a_list_where_a_list_can_say_it(tmp_path: Path) -> None:
    lo.save_adapter(lo.adapt(llama(), lo.LoRA(2), ["layers.1.mlp.up_proj"]), tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.1.mlp.up_proj"]


def test_loading_into_a_plain_model_freezes_the_rest(tmp_path: Path) -> None:
    lo.save_adapter(lo.adapt(plain(), lo.LoRA(4)), tmp_path)
    model = lo.load_adapter(plain(), tmp_path)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in lo.adapter_parameters(model)}


def test_a_failed_load_attaches_nothing(tmp_path: Path) -> None:
    lo.save_adapter(lo.adapt(plain(), lo.LoRA(4), ["0", "2.0"]), tmp_path)
    model = lo.adapt(plain(), None, ["0"])
    model[2].double()
    with pytest.raises(TypeError, match="layer '2.0': .*float64"):
        lo.load_adapter(model, tmp_path)
    assert model[0].adapter is None and is_plain_linear(model[2][0])
    with pytest.raises(ValueError, match="meta device"):
        lo.load_adapter(lo.adapt(plain(), lo.LoRA(4), ["0", "2.0"]).to("meta"), tmp_path)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter"):
        lo.save_adapter(plain(), tmp_path)
    model = plain()
    lo.adapt(model, lo.LoRA(2), ["0"])
    lo.adapt(model, lo.LoRA(2, rslora=True), ["2.0"])
    with pytest.raises(ValueError, match="one rslora"):
        lo.save_adapter(model, tmp_path)


def _config(path: Path, **changes: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _tensors(path: Path, change, keep_records: bool = False) -> None:  # type: ignore[no-untyped-def]
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, file, metadata if keep_records else None)


def _truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


KEY = "base_model.model.2.0.lora_A.weight"


@pytest.mark.parametrize(
    "error, message, damage",
    [
        (FileNotFoundError, "adapter_config.json is missing", lambda p: (p / "adapter_config.json").unlink()),
        (FileNotFoundError, "safetensors is missing", lambda p: (p / "adapter_model.safetensors").unlink()),
        (ValueError, "is not JSON", lambda p: (p / "adapter_config.json").write_text("{")),
        (ValueError, "'LOHA' adapter", lambda p: _config(p, peft_type="LOHA")),
        (ValueError, "the file lacks 0.lora_magnitude_vector", lambda p: _config(p, use_dora=True)),
        (ValueError, "kasa_config={'beta'", lambda p: _config(p, kasa_config={"beta": 1e-4})),
        (ValueError, "monteclora_config={", lambda p: _config(p, monteclora_config={"num_samples": 8})),
        (ValueError, "arrow_config={", lambda p: _config(p, arrow_config={"top_k": 3})),
        (ValueError, "rank_pattern=.*not a table", lambda p: _config(p, rank_pattern={"(": 2})),
        (ValueError, "alpha_pattern=.*not a table", lambda p: _config(p, alpha_pattern=[1])),
        (TypeError, "layer '0': alpha must be a number, got None", lambda p: _config(p, lora_alpha=None)),
        (ValueError, "init_lora_weights='loftq'", lambda p: _config(p, init_lora_weights="loftq")),
        (ValueError, r"must be \[3, 64\] for LoRA\(rank=3", lambda p: _config(p, r=3)),
        (ValueError, "not a complete safetensors", _truncate),
        (ValueError, "lacks 2.0.lora_A.weight", lambda p: _tensors(p, lambda t: t.pop(KEY))),
        (ValueError, "neither a LoRA factor", lambda p: _tensors(p, lambda t: t.update(other=torch.ones(1)))),
        (ValueError, "2.0.lora_A.weight.*finite", lambda p: _tensors(p, lambda t: t[KEY].fill_(float("nan")))),
        (ValueError, "2.0.lora_A.weight must be", lambda p: _tensors(p, lambda t: t.update({KEY: torch.ones(4, 5)}))),
        (
            ValueError,
            "'9', which is not a linear layer",
            lambda p: _tensors(p, lambda t: t.update({k.replace("2.0", "9"): t.pop(k) for k in list(t) if "2.0" in k})),
        ),
        (
            ValueError,
            "nothing for the adapted layers 2.0",
            lambda p: _tensors(p, lambda t: [t.pop(k) for k in list(t) if "2.0" in k]),
        ),
    ],
)
@pytest.mark.parametrize("small", [0, 1 << 30], ids=["mapped", "in one read"])
def test_damaged_files_change_nothing(  # type: ignore[no-untyped-def]
    small: int, error: type[Exception], message: str, damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_files, "_SMALL", small)
    lo.save_adapter(randomised(lo.adapt(plain(), lo.LoRA(4))), tmp_path)
    damage(tmp_path)
    model = lo.adapt(plain(), lo.LoRA(4))
    description, state, _ = snapshot(model)
    with pytest.raises(error, match=message):
        lo.load_adapter(model, tmp_path)
    assert repr(model) == description
    for key, value in model.state_dict().items():
        assert_bits_equal(value, state[key])


def test_a_file_is_the_same_mapped_and_in_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lo.save_adapter(randomised(lo.adapt(plain(), lo.SVFT("random", entries=3))), tmp_path, factors="stored")
    both = []
    for small in (0, 1 << 30):
        monkeypatch.setattr(peft_files, "_SMALL", small)
        both.append(peft_files.read_tensors(tmp_path / peft_files.TENSORS))
    (mapped, theirs), (read, ours) = both
    assert theirs == ours and list(mapped.layers) == list(read.layers)
    for name, tensors in mapped.layers.items():
        assert list(tensors) == list(read.layers[name])
        for key, tensor in tensors.items():
            assert_bits_equal(tensor, read.layers[name][key])


def test_saving_hashes_a_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lo.adapt(plain(), lo.LoRAXS(4))
    hashed: list[object] = []
    monkeypatch.setattr(rounding, "weight_key", lambda weight: hashed.append(weight) or "key")
    lo.save_adapter(model, tmp_path)
    assert len(hashed) == len(adapted(model)) > 1


def test_another_rank_is_refused(tmp_path: Path) -> None:
    lo.save_adapter(lo.adapt(plain(), lo.LoRA(4)), tmp_path)
    with pytest.raises(ValueError, match="layer '0': the layer has an adapter of rank 2 and the file one of 4"):
        lo.load_adapter(lo.adapt(plain(), lo.LoRA(2)), tmp_path)

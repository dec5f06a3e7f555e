"""lowrank-ops precompute: a checkpoint's factors, stored under the hash of each weight, and the store that looks them up."""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from safetensors.torch import load_file, save_file

import lowrank_ops as lo
from lowrank_ops.__main__ import main
from lowrank_ops.adapters import precompute
from lowrank_ops.adapters.precompute import FactorStore, linear_layers, weight_key
from lowrank_ops.svd import store as factors

transformers = pytest.importorskip("transformers")

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in range(2)
    for part in (
        *("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
        *("self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"),
    )
]


def llama(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_hidden_layers=2, vocab_size=64, **sizes, **options)
    )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return {name.removesuffix(".weight"): tensor for name, tensor in found.items()}


def check_found(store: FactorStore, weight: torch.Tensor, rank: int) -> None:
    found = store.find(weight, rank)
    assert found is not None
    for ours, theirs in zip(found, lo.truncated_svd(weight, rank), strict=True):
        assert_bits_equal(ours, theirs)


# ---- keys and the store


def test_a_key_is_of_the_numbers_and_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(33, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    key = weight_key(w)
    assert len(key) == 64
    monkeypatch.setattr(factors, "_CHUNK", 50)  # pieces of two rows
    assert key == weight_key(w.float()) == weight_key(w.T.contiguous().T) == weight_key(torch.nn.Parameter(w))
    other = w.clone()
    other[32, 19] += 1
    assert len({key, weight_key(other), weight_key(w.reshape(20, 33)), weight_key(w.T)}) == 4
    nf4 = lo.NF4Weight.quantize(w)
    assert weight_key(nf4) == weight_key(nf4.dequantize(torch.float32))


def test_the_key_never_changes() -> None:
    """Keys never change, so that existing stores stay valid."""
    expected = "be19e4e0ff7ce2c463c4a9f03f372a7561834468e7f4e2d21a38abc11785e955"
    assert weight_key(torch.arange(6.0).view(2, 3)) == expected


class Params4bit(torch.nn.Parameter):
    pass


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (torch.ones(3), ValueError),
        (torch.ones(0, 3), ValueError),
        (torch.ones(2, 3, dtype=torch.int8), ValueError),
        (torch.ones(2, 3, device="meta"), ValueError),
        (Params4bit(torch.ones(6, 1), False), TypeError),
        ([1.0], TypeError),
    ],
)
def test_a_key_needs_a_matrix(weight: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="weight must be"):
        weight_key(weight)


def test_the_store_gives_back_what_was_saved(tmp_path: Path) -> None:
    store = FactorStore(tmp_path / "not" / "there")
    w = torch.randn(12, 20)
    assert store.find(w, 1) is None and not store.path.exists()
    U, S, Vt = lo.truncated_svd(w, 8)
    key = store.save(w, (U, S, Vt), layer="a", rank=8)
    assert key == weight_key(w) and [p.name for p in store.path.iterdir()] == [f"{key}.safetensors"]
    assert store.metadata(key) == {"layer": "a", "rank": "8"}
    for rank in (8, 3, 1):
        found = store.find(w, rank)
        assert found is not None
        for ours, expected in zip(found, (U[:, :rank], S[:rank], Vt[:rank]), strict=True):
            assert_bits_equal(ours, expected)
            assert ours.is_contiguous()
    assert store.find(w, 9) is None
    assert store.find(w * 2, 8) is None
    assert store.metadata("0" * 64) == {}


def test_the_store_refuses_what_does_not_fit(tmp_path: Path) -> None:
    store, w = FactorStore(tmp_path), torch.randn(12, 20)
    U, S, Vt = lo.truncated_svd(w, 4)
    for triple in ((U, S, Vt.T), (U[:-1], S, Vt), (U, S[:2], Vt), (S, S, S)):
        with pytest.raises(ValueError, match="factors must be"):
            store.save(w, triple)
    assert not list(tmp_path.iterdir())
    save_file({"U": U[:-1].contiguous(), "S": S, "Vt": Vt}, store.file(weight_key(w)))
    with pytest.raises(ValueError, match="do not fit a weight 12 x 20; delete it"):
        store.find(w, 2)
    store.file(weight_key(w)).write_bytes(b"cut")
    with pytest.raises(ValueError, match="is damaged .* run precompute again"):
        store.find(w, 2)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        FactorStore(file)


def test_a_save_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, w = FactorStore(tmp_path), torch.randn(12, 20)
    triple = lo.truncated_svd(w, 4)
    store.save(w, triple)

    def fail(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("lowrank_ops.files.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        store.save(w, triple)
    assert len(list(tmp_path.iterdir())) == 1
    assert store.find(w, 4) is not None


# ---- which layers


def test_the_layers_of_a_classification_head_are_left_out(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=99, dim=64, n_layers=1, n_heads=2, hidden_dim=128)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    names = [layer.name for layer in linear_layers(tmp_path)]
    assert len(names) == 6 and not any("classifier" in name for name in names)


def test_linear_layers_of_a_sharded_llama(sharded: Path) -> None:
    layers = linear_layers(sharded)
    assert [layer.name for layer in layers] == NAMES
    assert {layer.shape for layer in layers} == {(32, 32), (16, 32), (48, 32), (32, 48)}
    stored = weights(sharded)
    for layer in layers:
        assert torch.equal(layer.load(), stored[layer.name])


def test_targets(sharded: Path) -> None:
    def names(targets: Any) -> list[str]:
        return [layer.name for layer in linear_layers(sharded, targets)]

    assert names(["q_proj", "model.layers.1.mlp.up_proj"]) == [NAMES[5], NAMES[9], NAMES[12]]
    assert names(r".*\.0\..*_proj") == NAMES[:7]
    for wrong in (["q_proj", "nonsense"], r"nonsense", ["proj"]):
        with pytest.raises(ValueError, match="match no linear layer"):
            names(wrong)


def test_without_transformers_names_decide(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert [layer.name for layer in linear_layers(sharded)] == NAMES


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_gpt2_stores_its_weights_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare: bool, installed: bool
) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    (model.transformer if bare else model).save_pretrained(tmp_path)
    if bare:  # as on the hub: the file of the bare model, the config of the model with a head
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}))
    if not installed:
        monkeypatch.setitem(sys.modules, "transformers", None)
    layers = linear_layers(tmp_path)
    assert {layer.name.removeprefix("transformer.") for layer in layers} == {
        f"h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    out = tmp_path / "factors"
    precompute.precompute(tmp_path, out, 8)
    for name, module in model.named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc")):
            check_found(FactorStore(out), module.weight.detach().T.contiguous(), 8)


# ---- the work


def test_the_command(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "factors"
    options = ["--power-iterations", "3", "--oversample", "5", "--seed", "7"]
    assert main(["precompute", str(sharded), "--rank", "4", "--out", str(out), "--device", "cpu", *options]) == 0
    assert "14 layers of rank 4" in capsys.readouterr().out
    store, stored = FactorStore(out), weights(sharded)
    index = json.loads((out / "index.json").read_text())
    assert sorted(index) == sorted(NAMES)
    for name, key in index.items():
        found = store.find(stored[name], 4)
        assert found is not None
        for ours, expected in zip(found, lo.truncated_svd(stored[name], 4, 5, 3, 7), strict=True):
            assert_bits_equal(ours, expected)
        labels = {"rank": "4", "oversample": "5", "power_iterations": "3", "seed": "7", "layer": name}
        assert labels.items() <= store.metadata(key).items() and "version" in store.metadata(key)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["index.json", *(f"{key}.safetensors" for key in index.values())]
    )


def test_one_file_and_bfloat16(tmp_path: Path) -> None:
    model = llama().bfloat16()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    keys = precompute.precompute(tmp_path, tmp_path / "factors", 6, targets=["q_proj", "down_proj"])
    assert len(keys) == 4
    store = FactorStore(tmp_path / "factors")
    for name in keys:
        weight = model.get_submodule(name).weight.detach()
        check_found(store, weight, 6)
        assert store.find(weight.float(), 6) is not None


def test_a_stopped_run_goes_on(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    decompose = precompute._decompose

    def count(stack: Any, *arguments: Any) -> Any:
        if len(done) == limit:
            raise KeyboardInterrupt
        done.append(len(stack))
        return decompose(stack, *arguments)

    monkeypatch.setattr(precompute, "_decompose", count)
    command = ["precompute", str(sharded), "--rank", "4", "--out", str(tmp_path), "--device", "cpu"]
    limit = 5
    assert main(command) == 130
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(files) == 5 and not list(tmp_path.glob(".*"))
    limit = 99
    assert main(command) == 0 and len(done) == 14
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert main(command) == 0 and len(done) == 14, "everything was there"
    # A damaged file, another option and a higher rank need a new computation; a lower rank is in the file already.
    next(iter(files)).write_bytes(b"cut")
    assert main(command) == 0 and len(done) == 15
    assert main([*command, "--seed", "1"]) == 0 and len(done) == 29
    command[3] = "6"
    assert main(command) == 0 and len(done) == 43
    command[3] = "5"
    assert main(command) == 0 and len(done) == 43


def test_memory_stays_at_a_few_layers(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    load = precompute.Layer.load

    def watched(layer: precompute.Layer) -> torch.Tensor:
        nonlocal most
        weight = load(layer)
        alive.append(weakref.ref(weight))
        most = max(most, sum(reference() is not None for reference in alive))
        return weight

    monkeypatch.setattr(precompute.Layer, "load", watched)
    for together in (1, 3):
        monkeypatch.setitem(precompute._TOGETHER, "cpu", together)
        alive.clear()
        most = 0
        precompute.precompute(sharded, tmp_path / str(together), 4)
        assert len(alive) == 14 and most <= 2 * together
    for name, weight in weights(sharded).items():
        if name in NAMES:
            for together in (1, 3):
                check_found(FactorStore(tmp_path / str(together)), weight, 4)


def test_progress_without_rich(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    precompute.precompute(sharded, tmp_path, 2, targets=["k_proj"])
    assert capsys.readouterr().err.splitlines() == [f"1/2 {NAMES[3]}", f"2/2 {NAMES[10]}"]


# ---- what is refused


def copy_of(sharded: Path, path: Path) -> Path:
    path.mkdir()
    for file in sharded.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def failure(capsys: pytest.CaptureFixture[str], model: Path, out: Path, *options: str) -> str:
    assert main(["precompute", str(model), "--rank", "4", "--out", str(out), "--device", "cpu", *options]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("error: ") :].replace("\n", " ")


def test_bad_checkpoints(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in failure(capsys, tmp_path / "empty", out)
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "neither model.safetensors.index.json nor model.safetensors" in failure(capsys, tmp_path / "empty", out)
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "config.json is damaged" in failure(capsys, tmp_path / "empty", out)
    model = copy_of(sharded, tmp_path / "model")
    first, second, *_ = sorted(model.glob("model-*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-8])
    assert f"{first} is damaged" in failure(capsys, model, out)
    first.write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    assert f"{first} is damaged" in failure(capsys, model, out)
    first.write_bytes(second.read_bytes())
    assert "no shard holds" in failure(capsys, model, out)
    first.unlink()
    assert f"model.safetensors.index.json names {first.name}" in failure(capsys, model, out)
    first.write_bytes(whole)
    (model / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "has no weight_map" in failure(capsys, model, out)
    assert not out.exists()


def test_bad_arguments(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    file.touch()
    assert "is a file" in failure(capsys, sharded, file)
    message = failure(capsys, sharded, out, "--rank", "20")
    assert f"layer '{NAMES[3]}': rank must be from 1 to min(N, K) = 16 for a weight 16 x 32, got 20; targets" in message
    assert main(["precompute", str(sharded), "--rank", "20", "--out", str(out), "--targets", "q_proj", "o_proj"]) == 0
    capsys.readouterr()
    assert "rank must be from 1" in failure(capsys, sharded, out, "--rank", "0")
    assert "oversample must be at least 0" in failure(capsys, sharded, out, "--oversample", "-1")
    assert "targets ['nonsense'] match no" in failure(capsys, sharded, out, "--targets", "q_proj", "nonsense")


@pytest.mark.parametrize("together", [1, 4])
def test_a_weight_that_is_not_finite(
    sharded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    together: int,
) -> None:
    monkeypatch.setitem(precompute._TOGETHER, "cpu", together)
    model, name = copy_of(sharded, tmp_path / "model"), NAMES[9]
    places = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    path = model / places[f"{name}.weight"]
    tensors = load_file(path)
    tensors[f"{name}.weight"][3, 4] = torch.nan
    save_file(tensors, path)
    assert f"layer '{name}': weight must be finite" in failure(capsys, model, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert name not in index
    assert {f"{key}.safetensors" for key in index.values()} == {
        p.name for p in (tmp_path / "out").glob("*.safetensors")
    }


def test_a_checkpoint_of_another_quantisation(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (dtype, extra) in enumerate([(torch.uint8, ""), (torch.bfloat16, ".absmax"), (torch.float64, "")]):
        model = copy_of(sharded, tmp_path / str(number))
        places = json.loads((model / "model.safetensors.index.json").read_text())
        path = model / places["weight_map"][f"{NAMES[0]}.weight"]
        tensors = load_file(path)
        tensors[f"{NAMES[0]}.weight"] = tensors[f"{NAMES[0]}.weight"].to(dtype)
        if extra == ".absmax":
            tensors[f"{NAMES[0]}.weight.absmax"] = torch.ones(8)
        save_file(tensors, path)
        message = failure(capsys, model, tmp_path / "out")
        assert f"layer '{NAMES[0]}' is stored quantised" in message and "before quantisation are needed" in message


def mixtral() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(num_hidden_layers=1, num_local_experts=3, vocab_size=64, **sizes)
    return transformers.MixtralForCausalLM(config)


def gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64))


def gpt_oss() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.GptOssConfig(num_hidden_layers=1, num_local_experts=3, vocab_size=64, head_dim=8, **sizes)
    return transformers.GptOssForCausalLM(config)


@pytest.mark.parametrize(
    "make, quantize", [(llama, "nf4"), (gpt2, "fp4"), (mixtral, "nf4"), (gpt_oss, "mxfp4"), (gpt_oss, "nf4")]
)
def test_the_factors_of_a_4_bit_checkpoint_are_those_of_the_decoded_weights(
    make: Any, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lo.adapt(make(), None, quantize=quantize)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    out = tmp_path / "out"
    assert main(["precompute", str(tmp_path / "model"), "--rank", "4", "--out", str(out), "--device", "cpu"]) == 0
    expected = {}
    formats = lo.NF4Weight | lo.FP4Weight | lo.MXFP4Weight
    kept = {name: m.weight for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), formats)}
    for name, weight in kept.items():
        experts = range(weight.shape[0]) if len(weight.shape) == 3 else ()
        expected |= {f"{name}.{e}": weight_key(weight[e]) for e in experts} or {name: weight_key(weight)}
    assert json.loads((out / "index.json").read_text()) == expected
    check_found(FactorStore(out), weight.dequantize(torch.float32).view(-1, *weight.shape[-2:])[-1], 4)

    def refuse(*_: Any) -> Any:
        raise AssertionError("computed though it is there")

    monkeypatch.setattr("lowrank_ops.adapters.start.largest", refuse)
    targets = ".*(q_proj|c_attn|down_proj)"
    lo.adapt(model, lo.LoRAXS(4), targets, factors=out)


def test_names_that_differ_in_files_are_those_of_the_model(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
    text = {**sizes, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    mixtral().save_pretrained(tmp_path / "mixtral")
    model.save_pretrained(tmp_path / "vision")
    assert "model.layers.0.mlp.down_proj.weight" in load_file(tmp_path / "vision" / "model.safetensors")
    found = {layer.name: layer for layer in linear_layers(tmp_path / "vision")}
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert_bits_equal(found[f"model.language_model.{name}"].load(), module.weight.detach())
    assert len(linear_layers(tmp_path / "mixtral")) == 4 + 3 * 2
    assert not [w for w in recwarn if "left out" in str(w.message)]  # the router is known, and no linear layer


def test_a_damaged_4_bit_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    lo.adapt(llama(), None).save_pretrained(model)
    whole = load_file(model / "model.safetensors")
    name = f"{NAMES[0]}.weight"
    save_file({key: tensor for key, tensor in whole.items() if key != f"{name}.absmax"}, model / "model.safetensors")
    message = failure(capsys, model, tmp_path / "out")
    assert f"layer '{NAMES[0]}'" in message and f"lacks '{name}.absmax'" in message
    state = f"{name}.quant_state.bitsandbytes__nf4"
    save_file(whole | {state: torch.zeros(3, dtype=torch.uint8)}, model / "model.safetensors")
    assert f"{state!r} describes no 4-bit weight" in failure(capsys, model, tmp_path / "out")


def test_every_singular_triple_and_adapt_uses_them(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    assert main(["precompute", str(sharded), "--rank", "full", "--out", str(tmp_path), "--device", "cpu"]) == 0

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(sharded, local_files_only=True).eval()

    tokens = torch.arange(10).view(2, 5)
    kinds = (lo.SVF(), lo.SVFT(bandwidth=1), lo.LoRAXS(4), lo.LoRA(4, init="pissa"), lo.LoRA(4, init="milora"))
    computed = [lo.adapt(load(), kind)(tokens).logits for kind in kinds]

    def refuse(*_: Any) -> Any:
        raise AssertionError("computed though it is there")

    monkeypatch.setattr("lowrank_ops.adapters.start.largest", refuse)
    for kind, expected in zip(kinds, computed, strict=True):
        model = lo.adapt(load(), kind, factors=tmp_path)
        torch.testing.assert_close(model(tokens).logits, expected, atol=2e-2, rtol=2e-2)
        lo.save_adapter(model, tmp_path / "adapter")
        loaded = lo.load_adapter(load(), tmp_path / "adapter", factors=tmp_path).eval()
        assert torch.isfinite(loaded(tokens).logits).all()


def test_factors_that_are_not_there_are_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16))

    def said() -> list[str]:
        texts = [str(w.message) for w in recwarn]
        recwarn.clear()
        return [text for text in texts if "computed instead" in text]

    warnings.simplefilter("always")  # not once a line
    none = tmp_path / "none"
    lo.save_adapter(lo.adapt(model(), lo.SVF(rank=4), quantize=None), tmp_path / "a", "recipe")
    for use in (
        lambda: lo.adapt(model(), lo.SVF(rank=4), factors=none),
        lambda: lo.load_adapter(model(), tmp_path / "a", factors=none),
        lambda: lo.AdapterPool(lo.adapt(model(), None), 1 << 20, factors=none),
    ):
        with pytest.raises(FileNotFoundError, match="factors must be a directory written by lowrank-ops precompute"):
            use()
    # Factors of another model, then of a lower rank.
    store, other = FactorStore(tmp_path / "factors"), torch.randn(32, 32)
    store.save(other, lo.truncated_svd(other, 4))
    for rank in (4, 8):
        lo.adapt(model(), lo.SVF(rank=rank), factors=store.path)
        assert len(said()) == 1
        weight = model()[0].weight.detach()
        store.save(weight, lo.truncated_svd(weight, 4))
    lo.adapt(model(), lo.LoRA(4), factors=store.path)  # needs none
    lo.adapt(model(), lo.SVF(rank=4), factors=store.path)  # has some
    lo.load_adapter(model(), tmp_path / "a", factors=store.path)
    assert not said()
    pool = lo.AdapterPool(lo.adapt(model(), None, quantize=None), 1 << 20, factors=tmp_path / "a")
    pool.load("a", tmp_path / "a")
    assert len(said()) == 1


def test_what_targets_cover_beside_linear_layers_is_said(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def said(path: Path, targets: Any = "all-linear") -> list[str]:
        recwarn.clear()
        warnings.simplefilter("always")
        linear_layers(path, targets)
        return [str(w.message) for w in recwarn if "left out" in str(w.message)]

    (embedding,) = said(sharded, r".*(embed_tokens|q_proj|norm)")
    assert embedding.startswith("left out 1 tensor that targets cover (model.embed_tokens): ")
    tensors = load_file(next(sharded.glob("model-*2-of*"))) | {
        "model.layers.0.mlp.experts.up_proj": torch.zeros(3, 8, 4),
        "model.layers.0.conv.weight": torch.zeros(3, 8, 4),
    }
    one = tmp_path / "one"
    one.mkdir()
    (one / "config.json").write_text((sharded / "config.json").read_text())
    save_file(tensors, one / "model.safetensors")
    assert not said(sharded) and not said(sharded, ["q_proj", "v_proj"])
    assert "2 tensors" in said(one)[0]
    monkeypatch.setitem(sys.modules, "transformers", None)  # layers are identified by their names
    assert not said(sharded)
    (stacked,) = said(one)
    assert stacked.startswith("left out 1 tensor that targets cover (model.layers.0.mlp.experts.up_proj): ")

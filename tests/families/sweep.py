"""Every architecture of the installed transformers: train, save, load, route, generate, merge, or a refusal by name.

`make test-families` runs this file; it takes minutes. `make test` runs some of it in test_families_sample.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import LARGEST, Family, families
from torch import Tensor, nn
from weight_reads import reads_in

import lowrank_ops as lo
from lowrank_ops.adapters import targets

# Outputs that a model has one of for each row.
_OUTPUTS = ("logits", "text_embeds", "last_hidden_state")
# Architectures that must pass; another one is skipped if no tiny model of it can be made or run.
_ALWAYS = """
llama mistral ministral qwen2 qwen3 smollm3 olmo2 olmo3 cohere2 granite glm4 stablelm gemma2 gemma3_text gemma3n_text
gemma4_text gpt2 gpt_neo gpt_neox opt phi3 falcon bloom mpt mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba2
nemotron nemotron_h lfm2 recurrent_gemma rwkv mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5 qwen3_5_moe gpt_oss olmoe
deepseek_v2 deepseek_v3 glm4_moe granitemoe granitemoehybrid phimoe llama4 dbrx jetmoe ernie4_5_moe hunyuan_v1_moe
minimax_m2 lfm2_moe longcat_flash kimi_linear exaone4 ministral3 bert modernbert deberta-v2 t5 bart
switch_transformers whisper wav2vec2 vit dinov2 swin clip siglip llava qwen2_vl qwen2_5_vl qwen3_vl_moe
"""
ALWAYS = set(_ALWAYS.split())
# Those of them that have layers whose rows cannot be told, so that all names must be equal.
EQUAL_NAMES = {"deberta-v2", "jetmoe", "switch_transformers"}
# Layers that a module calls too: bloom reads them for a bit-exact sum, deberta and reformer for a query from elsewhere.
CALLED_TOO = {
    ("BloomAttention", "dense"),
    ("BloomMLP", "dense_4h_to_h"),
    ("DisentangledSelfAttention", "in_proj"),
    ("LSHSelfAttention", "query_key"),
    ("LSHSelfAttention", "value"),
}


def scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    found = next((t for name in _OUTPUTS if isinstance(t := getattr(output, name, None), Tensor)), None)
    return output[0] if found is None else found


def written(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of three tokens that the model writes."""
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    made = model.generate(**batch, **how, output_logits=True)  # type: ignore[operator]
    return torch.stack(made.logits, 1)


def train(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Three steps towards random outputs, which change every layer's adapter."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(lo.adapter_parameters(model.train()), lr=1e-2)
    for _ in range(3):
        found = scores(model, batch).float()
        loss = (found - torch.randn_like(found)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
    model.eval()


def check_close(got: Tensor, want: Tensor, what: str) -> None:
    error = float((got - want).abs().max()) / max(float(want.abs().max()), 1e-6)
    assert error < 1e-3, f"{what}: relative difference {error:.3g}"


def check_family(family: Family, root: Path) -> None:
    """Take a model through everything; raise where something differs."""
    batch, runs = family.batch, [scores]
    if family.auto == "AutoModelForCausalLM" and family.kind != "rwkv":  # of which generate changes the weights
        runs.append(written)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = lo.adapt(family.make(), lo.LoRA(4))
        except ValueError as error:  # all linear layers are heads, smaller than the rank, or of a class of its own
            assert family.kind not in ALWAYS, error
            assert "matches nothing" in str(error) or "rank must be at most" in str(error)
            return
        if family.kind == "reformer":  # its reversible blocks pass on a gradient only where their input has one
            model.enable_input_require_grads()  # type: ignore[operator]
        train(model, batch)
        lo.save_adapter(model, root)
        base = lo.adapt(family.make(), None)
        pool = lo.AdapterPool(base, 1 << 23)
        pool.load("a", root)
        loaded = lo.load_adapter(lo.adapt(family.make(), None), root)
        with torch.no_grad():
            alone, want, again = ([run(m, batch) for run in runs] for m in (base, model, loaded))
            assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True)), "loaded"
            assert float((want[0] - alone[0]).abs().max()) > 1e-3 * float(want[0].abs().max()), (
                "training changed nothing"
            )
            try:
                with pool.route(["a", None, "a"]):
                    routed = [run(base, batch) for run in runs]
            except ValueError as error:
                assert family.kind in EQUAL_NAMES or family.kind not in ALWAYS, error
                assert "use adapters without this layer" in str(error)
            else:
                assert family.kind not in EQUAL_NAMES
                for got, a, b in zip(routed, want, alone, strict=True):
                    check_close(got, torch.stack([a[0], b[1], a[2]]), "routed")
            with pool.route(["a"] * 3):
                for run, a in zip(runs, want, strict=True):
                    check_close(run(base, batch), a, "routed with equal names")
            merged = lo.merge(model)
            for run, a in zip(runs, want, strict=True):
                check_close(run(merged, batch), a, "merged")


def make_or_skip(family: Family) -> None:
    """Skip an architecture of which no tiny model can be made and run without us."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            count = sum(p.numel() for p in family.make("meta").parameters())
            if count > LARGEST:
                raise ValueError(f"{count} parameters")
            model = family.make()
            with torch.no_grad():
                scores(model, family.batch)
    except Exception as error:
        if family.kind in ALWAYS:
            raise
        pytest.skip(f"no tiny model: {type(error).__name__}: {str(error)[:100]}")
    if not any(isinstance(m, nn.Linear) for m in model.modules()):
        pytest.skip("no linear layer")


@pytest.mark.parametrize("family", list(families()), ids=lambda family: f"{family.kind}-{family.auto}")
def test_family(family: Family, tmp_path: Path) -> None:
    make_or_skip(family)
    check_family(family, tmp_path)


def test_all_architectures_that_must_pass_are_there() -> None:
    assert ALWAYS <= {family.kind for family in families()}


def test_every_weight_that_transformers_reads_is_known() -> None:
    """The tables of lowrank_ops.adapters.targets are what the source of transformers says."""
    both = (targets._READ, targets._READ_BY_KERNELS)
    known = {(kind, path.replace("blocks.*.", "")) for table in both for kind, paths in table.items() for path in paths}
    heads = {found for found in reads_in(Path(transformers.__file__).parent / "models") if found[1] == "lm_head"}
    found = reads_in(Path(transformers.__file__).parent / "models") - heads - CALLED_TOO
    assert found - known == set()

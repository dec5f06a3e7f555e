"""TRL's trainers over adapted models: before the first step policy and reference are the same model."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ops as lo
from lowrank_ops.integrations.trl import BasePath, use_reference

pytest.importorskip("datasets")
pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from datasets import Dataset  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

QUESTIONS = [f"what is {i}?" for i in range(8)]
PAIRS = [{"prompt": question, "chosen": " yes", "rejected": " no"} for question in QUESTIONS]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model saved to disk, as a user would have it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=False, initializer_range=0.15,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def dense(path: Path) -> Any:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM.from_pretrained(path)


def moved(model: Any) -> Any:
    with torch.no_grad():
        for p in lo.adapter_parameters(model):
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


def options(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "run"), "max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False,
        "disable_tqdm": True, **more,
    }  # fmt: skip


def dpo(model: Any, tokenizer: Any, tmp_path: Path, ref_model: Any = None, **more: Any) -> Any:
    args = DPOConfig(**options(tmp_path, **more))
    data = Dataset.from_list(PAIRS)
    return DPOTrainer(model, ref_model, args=args, train_dataset=data, processing_class=tokenizer)


def logged(trainer: Any, key: str) -> list[float]:
    trainer.train()
    return [float(row[key]) for row in trainer.state.log_history if key in row]


def rewards(trainer: Any) -> list[float]:
    trainer.train()
    return [float(trainer.state.log_history[0][f"rewards/{which}"]) for which in ("chosen", "rejected")]


KINDS = [
    lo.LoRA(8),
    lo.LoRA(8, init="pissa"),
    lo.LoRAXS(8),
    lo.SVFT(bandwidth=2),
    lo.SVF(form="replace"),
]


def test_dropout_is_switched_off_where_trl_switches_it_off(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = moved(lo.adapt(dense(path), lo.LoRA(8, dropout=0.5)))
    assert rewards(dpo(model, tokenizer, tmp_path, disable_dropout=False)) != [0, 0]
    assert rewards(dpo(model, tokenizer, tmp_path)) == [0, 0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dpo_starts_where_it_should(kind, path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = moved(lo.adapt(dense(path), kind))  # it had been trained before
    trainer = dpo(model, tokenizer, tmp_path)
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert frozen <= {p.data_ptr() for p in trainer.ref_model.parameters()}
    assert rewards(trainer) == [0, 0]
    assert float(trainer.state.log_history[0]["loss"]) == pytest.approx(0.693147, abs=1e-6)


def test_five_steps_of_dpo_are_those_of_peft(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from peft import PeftModel

    model = moved(lo.adapt(dense(path), lo.LoRA(8)))
    lo.save_adapter(model, tmp_path / "adapter")
    theirs = dense(path)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, lo.Linear):  # the numbers that the 4-bit weights decode to
                theirs.get_submodule(name).weight.copy_(layer.weight.dequantize())
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    steps = {"max_steps": 5, "learning_rate": 1e-2}
    ours, control = (logged(dpo(m, tokenizer, tmp_path, **steps), "loss") for m in (model, theirs))
    assert len(ours) == 5 and control[-1] < 0.5
    assert ours == pytest.approx(control, rel=1e-4)


def test_kto(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = moved(lo.adapt(dense(path), lo.LoRA(8)))
    data = Dataset.from_list(
        [{"prompt": q, "completion": " yes", "label": i % 2 == 0} for i, q in enumerate(QUESTIONS)]
    )
    trainer = KTOTrainer(
        model, args=KTOConfig(**options(tmp_path)), train_dataset=data, processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]
    assert [float(value) for key, value in first.items() if key.startswith("rewards/") or key == "kl"] == [0] * 4
    assert float(first["loss"]) == pytest.approx(0.5, abs=1e-6)


def on_policy(trainer: Any, config: Any, model: Any, tokenizer: Any, tmp_path: Path, **more: Any) -> Any:
    args = config(num_generations=4, max_completion_length=8, beta=0.1, **options(tmp_path, **more))
    data = Dataset.from_list([{"prompt": question} for question in QUESTIONS])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    return trainer(model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_grpo_and_rloo(trainer, config, path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = moved(lo.adapt(dense(path), lo.LoRA(8)))
    made = on_policy(trainer, config, model, tokenizer, tmp_path)
    assert logged(made, "kl") == [0]
    # The model before it was adapted, on request.
    base = lo.reference(model, adapter=False)
    use_reference(model, base)
    made = on_policy(trainer, config, model, tokenizer, tmp_path)
    assert made.ref_model is base and logged(made, "kl")[0] > 1e-3
    use_reference(model, None)
    assert logged(on_policy(trainer, config, model, tokenizer, tmp_path), "kl") == [0]


def test_online_dpo(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    model = moved(lo.adapt(dense(path), lo.LoRA(8)))
    data = Dataset.from_list([{"prompt": question} for question in QUESTIONS])
    for reference in (lo.reference(model), None):
        trainer = OnlineDPOTrainer(
            model, reference, reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            args=OnlineDPOConfig(max_new_tokens=8, **options(tmp_path, learning_rate=0.0)), train_dataset=data,
            processing_class=tokenizer,
        )  # fmt: skip
        assert logged(trainer, "objective/kl") == [0]


def test_a_model_without_a_name_and_one_of_the_hub_need_no_disk(path, tokenizer, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("", "somebody/no-such-model"):
        model = dense(path)
        model.config._name_or_path = name
        assert rewards(dpo(lo.adapt(model, lo.LoRA(8)), tokenizer, tmp_path)) == [0, 0]


def test_a_copy_gets_its_own_reference(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = lo.adapt(dense(path), lo.LoRA(8))
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert rewards(dpo(moved(made), tokenizer, tmp_path)) == [0, 0]


def test_what_would_write_into_the_shared_weights_is_refused(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = lo.adapt(dense(path), lo.LoRA(8))
    with pytest.raises(ValueError, match="sync_ref_model=True mixes weights into the reference"):
        dpo(model, tokenizer, tmp_path, sync_ref_model=True)


def test_a_reference_asked_for_by_nobody_known_is_refused(path) -> None:  # type: ignore[no-untyped-def]
    from trl.trainer.utils import create_model_from_path

    model = lo.adapt(dense(path), lo.LoRA(8))
    with pytest.raises(
        ValueError, match=r"is the dense base of an adapted model .* ref_model=lowrank_ops.reference\(model\)"
    ):
        create_model_from_path(model.config._name_or_path)
    assert isinstance(create_model_from_path(str(path)), transformers.LlamaForCausalLM)


def test_to_everything_else_the_name_is_a_name(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = lo.adapt(dense(path), lo.LoRA(8))
    name = model.config._name_or_path
    assert type(name) is BasePath and name == str(path) and f"{name}" == str(path) and type(str(name)) is str
    assert type(transformers.AutoConfig.from_pretrained(name)) is transformers.LlamaConfig
    assert isinstance(transformers.AutoModelForCausalLM.from_pretrained(name), transformers.LlamaForCausalLM)
    assert json.loads(json.dumps(name)) == pickle.loads(pickle.dumps(name)) == copy.deepcopy(name) == str(path)
    model.config.save_pretrained(tmp_path)
    assert "BasePath" not in model.config.to_json_string() + (tmp_path / "config.json").read_text()
    lo.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(path)
    model.config._name_or_path = BasePath("somebody/model")
    trainer = dpo(model, tokenizer, tmp_path, ref_model=lo.reference(model))
    trainer.create_model_card("mine")
    assert "base_model: somebody/model\n" in (tmp_path / "run" / "README.md").read_text()
    model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)


def test_a_model_whose_layers_were_replaced_by_hand(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = dense(path).requires_grad_(False)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = lo.Linear.from_linear(mlp.down_proj, lo.LoRA(8))
    moved(model)
    use_reference(model, lo.reference(model))
    assert rewards(dpo(model, tokenizer, tmp_path)) == [0, 0]


def test_merged_models_and_plain_ones_are_left_to_trl(path) -> None:  # type: ignore[no-untyped-def]
    model = lo.adapt(dense(path), lo.LoRA(8))
    assert type(lo.merge(model).config._name_or_path) is str
    lo.save_adapter(lo.adapt(model, lo.LoRA(8)), path / "adapter")
    assert type(lo.load_adapter(dense(path), path / "adapter").config._name_or_path) is BasePath
    with pytest.raises(ValueError, match="model, a LlamaForCausalLM, is not adapted"):
        use_reference(dense(path), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="made must be another module than model"):
        use_reference(model, model)
    with pytest.raises(TypeError, match="made must be a module or None, got str"):
        use_reference(model, "base")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "quantize"), [(lo.LoRA(4), None), (lo.LoRA(4), "nf4"), (None, "nf4")], ids=str)
def test_an_output_head_that_trl_would_not_call_is_refused(kind, quantize, path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = lo.adapt(dense(path), lo.LoRA(4), ["q_proj"])
    lo.adapt(model, kind, ["lm_head"], quantize=quantize)
    sft = SFTTrainer(
        model, args=SFTConfig(**options(tmp_path)), train_dataset=Dataset.from_list([{"text": q} for q in QUESTIONS]),
        processing_class=tokenizer,
    )  # fmt: skip
    message = f"layer 'lm_head', the output head, is {'kept in 4 bits' if kind is None else 'adapted'}, and TRL"
    for trainer in (sft, dpo(copy.deepcopy(model), tokenizer, tmp_path)):
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0
    assert not lo.merge(lo.adapt(dense(path), lo.LoRA(4), ["lm_head"]))._forward_pre_hooks


def test_an_output_head_of_ours_that_is_dense_and_not_adapted_is_right(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = lo.adapt(dense(path), lo.LoRA(4), ["q_proj"])
    assert rewards(dpo(lo.adapt(model, None, ["lm_head"], quantize=None), tokenizer, tmp_path)) == [0, 0]


def test_through_peft(path, tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Five steps over our 4-bit layers and over the same weights by PEFT alone, from the same factors."""
    peft = pytest.importorskip("peft")
    losses = []
    for config, model in (
        (lo.peft.LoraConfig, lo.adapt(dense(path), None)),
        (peft.LoraConfig, lo.merge(lo.adapt(dense(path), None))),
    ):
        torch.manual_seed(2)
        args = DPOConfig(**options(tmp_path, max_steps=5, learning_rate=1e-2))
        made = config(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = DPOTrainer(
            model, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer, peft_config=made
        )
        fused = [m for m in trainer.model.modules() if type(m).__module__ == "lowrank_ops.integrations.peft"]
        assert len(fused) == (14 if config is lo.peft.LoraConfig else 0) and trainer.ref_model is None
        losses.append(logged(trainer, "loss"))
        first = trainer.state.log_history[0]
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert losses[0][0] == pytest.approx(0.693147, abs=1e-4) and losses[0][-1] < 0.6
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

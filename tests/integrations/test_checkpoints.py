"""Trainers' checkpoints of adapted models: of the adapter alone, resumed and chosen among, and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_bits_equal
from safetensors.torch import save_file
from torch import nn

import lowrank_ops as lo
from lowrank_ops.integrations.transformers import AdapterCheckpoints, load_trained, save_trained

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROWS = [{"input_ids": [(7 * i + j) % 50 for j in range(8)], "labels": (7 * i) % 3} for i in range(16)]
TOKENS = torch.tensor([row["input_ids"] for row in ROWS])
BASE = {"model.safetensors", "pytorch_model.bin"}


class Trainer(AdapterCheckpoints, transformers.Trainer):
    pass


def classifier(kind: Any, head: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    lo.adapt(model, kind)
    model.score.requires_grad_(head)
    return model


def trainer(model: Any, out: Path, kind: Any = Trainer, **more: Any) -> Any:
    options = {"output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
               "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
               "seed": 1, **more}  # fmt: skip
    return kind(model, transformers.TrainingArguments(**options), train_dataset=ROWS, eval_dataset=ROWS[:8])


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


KINDS = [lo.LoRA(4), lo.LoRA(4, init="pissa"), lo.LoRAXS(6), lo.SVF(form="replace")]
EVERY_TWO = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(("kind", "head"), list(zip(KINDS, [True, False, False, True], strict=True)), ids=str)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(kind: Any, head: bool, tmp_path: Path) -> None:
    model = classifier(kind, head)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is said to be left out of what is saved
        trainer(model, tmp_path, **EVERY_TWO).train()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert not files & BASE and {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth"} <= files
    other = classifier(kind, head)
    trainer(other, tmp_path / "later").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ends = trained(other)
    assert ends.keys() == trained(model).keys() and ("score.weight" in ends) == head
    for name, tensor in trained(model).items():
        assert_bits_equal(ends[name], tensor)
    # What is in it is the adapter's usual directory.
    taken = classifier(kind)
    lo.load_adapter(taken, tmp_path / "checkpoint-4")
    if not head:
        assert_bits_equal(taken.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    run = trainer(
        classifier(lo.LoRA(4), head=True), tmp_path, **EVERY_TWO, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert losses[0] > losses[1] and run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-6)
    assert run.model.score.weight.requires_grad
    run.save_model(str(tmp_path / "end"))
    assert not {path.name for path in (tmp_path / "end").iterdir()} & BASE


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lo.LoRA(4, alpha=8), "LoRA(4, alpha=8)"),
        (lo.LoRA(2), "LoRA(2, alpha=32)"),
        (lo.LoRAXS(6), "LoRAXS(6)"),
        (None, "no adapter"),
    ],
)
def test_another_kind_rank_or_alpha_is_refused(other: Any, said: str, tmp_path: Path) -> None:
    trainer(classifier(lo.LoRA(4)), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    model = classifier(other)
    if other is None:  # but for one layer, so that it has something to train
        model.model.layers[0].mlp.up_proj.set_adapter(lo.LoRA(4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        trainer(model, tmp_path / "later").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert str(caught.value).startswith(f"checkpoint: LoRA(4, alpha=32), model: {said}")
    for key, value in model.state_dict().items():
        assert_bits_equal(value, before[key])


def test_what_is_trained_beside_must_be_the_same(tmp_path: Path) -> None:
    with_head, without = classifier(lo.LoRA(4), True), classifier(lo.LoRA(4))
    for one, other, said in ((with_head, without, "trains 1 tensors and the model 0"),
                             (without, with_head, "trains 0 tensors and the model 1")):  # fmt: skip
        save_trained(one, tmp_path)
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=f"{said}.*'score.weight'"):
            load_trained(other, tmp_path)
        for key, value in other.state_dict().items():
            assert_bits_equal(value, before[key])


def test_an_older_checkpoint_with_the_head_in_a_file_of_its_own(tmp_path: Path) -> None:
    model = classifier(lo.LoRA(4), True)
    head = {"score.weight": model.score.weight.detach() + 1}
    save_trained(model.requires_grad_(False), tmp_path)
    save_file(head, tmp_path / "trained_beside.safetensors")
    other = classifier(lo.LoRA(4), True)
    load_trained(other, tmp_path)
    assert_bits_equal(other.score.weight, head["score.weight"])
    with pytest.raises(ValueError, match="trains 1 tensors and the model 0.*'score.weight'"):
        load_trained(classifier(lo.LoRA(4)), tmp_path)
    save_trained(other, tmp_path)
    assert not (tmp_path / "trained_beside.safetensors").exists()


def test_statistics_of_normalisation_go_along(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return lo.adapt(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)), lo.LoRA(2))

    moved = model()
    moved(torch.randn(8, 32))
    save_trained(moved, tmp_path)
    other = model()
    load_trained(other, tmp_path)
    assert_bits_equal(other[1].running_mean, moved[1].running_mean)


def test_whole_checkpoints_and_models_without_adapters_are_the_trainers_own(tmp_path: Path) -> None:
    model = classifier(lo.LoRA(4))
    trainer(model, tmp_path, transformers.Trainer, **EVERY_TWO).train()
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} & BASE
    other = classifier(lo.LoRA(4))
    trainer(other, tmp_path / "later").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in trained(model).items():
        assert_bits_equal(trained(other)[name], tensor)
    dense = classifier(None).requires_grad_()
    trainer(lo.merge(dense).requires_grad_(), tmp_path / "dense", save_strategy="steps", save_steps=4).train()
    assert {path.name for path in (tmp_path / "dense" / "checkpoint-4").iterdir()} & BASE


# ---- sentence-transformers ----

PAIRS = [{"anchor": f"how do I open file {i}", "positive": f"opening file {i} is done so"} for i in range(16)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with its tokenizer on the disk."""
    pytest.importorskip("datasets")
    pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("encoder")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<unk>", *alphabet])}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", model_max_length=32)
    tokens.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(directory)
    return directory


def sentences(encoder: Path, kind: Any) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    inner = modules.Transformer(str(encoder))
    model = SentenceTransformer(modules=[inner, modules.Pooling(32), modules.Dense(32, 16)], device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "targets='all-linear' leaves out 2.linear")
        lo.adapt(model, kind)
    model[2].requires_grad_()
    return model


def sentence_trainer(model: Any, out: Path, alone: bool, **more: Any) -> Any:
    import datasets
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer import losses

    class Alone(AdapterCheckpoints, SentenceTransformerTrainer):
        pass

    rows = datasets.Dataset.from_list(PAIRS)
    options = {"output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
               "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 1, **more}  # fmt: skip
    return (Alone if alone else SentenceTransformerTrainer)(
        model,
        args=SentenceTransformerTrainingArguments(**options),
        train_dataset=rows,
        eval_dataset=rows,
        loss=losses.MultipleNegativesRankingLoss(model),
    )


class EarlierIsBetter(transformers.TrainerCallback):
    """Adds the metric ``eval_steps``, so that the best model is surely not the last, whatever it has learnt."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **more: Any) -> None:
        metrics["eval_steps"] = state.global_step


@pytest.mark.parametrize("alone", [False, True])
def test_sentence_transformers_resume_and_find_the_best(alone: bool, encoder: Path, tmp_path: Path) -> None:
    model = sentences(encoder, lo.LoRA(4))
    slow = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    run = sentence_trainer(
        model, tmp_path, alone, **EVERY_TWO, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_steps", greater_is_better=False, **slow,
    )  # fmt: skip
    run.add_callback(EarlierIsBetter())
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2" and abs(losses[0] - losses[1]) > 1e-4
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert bool({path.name for path in best.iterdir()} & BASE) != alone
    again = sentences(encoder, lo.LoRA(4))
    resumed = sentence_trainer(again, tmp_path / "later", alone, **slow)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.evaluate()["eval_loss"] == pytest.approx(losses[1], abs=1e-5)
    assert len(trained(again)) == len(trained(model)) == 2 * 13 + 2
    taken = lo.load_adapter(sentences(encoder, None), tmp_path / "checkpoint-4")
    for name, tensor in trained(again).items():
        assert name.startswith("2.") or torch.equal(taken.get_parameter(name), tensor)
    with pytest.raises((RuntimeError, ValueError), match=r"checkpoint: LoRA\(4, alpha=32\), model: LoRAXS\(4\)"):
        sentence_trainer(sentences(encoder, lo.LoRAXS(4)), tmp_path / "xs", alone).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_an_adapted_sentence_transformer_copies_and_pickles_and_is_plain_once_merged(encoder: Path) -> None:
    model = sentences(encoder, lo.LoRA(4))
    plain = type(sentences(encoder, lo.LoRA(4)))
    assert isinstance(model, plain) and plain.__name__ == "SentenceTransformer"
    expected = model.encode(["hello"])
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made) is type(model) and (made.encode(["hello"]) == expected).all()
        with torch.no_grad():
            next(iter(lo.adapter_parameters(made))).add_(1)
        assert (model.encode(["hello"]) == expected).all()
    from sentence_transformers import SentenceTransformer

    assert type(lo.merge(model)) is SentenceTransformer
    lo.adapt(model, lo.LoRA(4), ["query", "value"])
    assert type(model) is not SentenceTransformer
    model.load_state_dict(copy.deepcopy(model).state_dict())

"""Run by vLLM's interpreter with the name of a case and a directory: vLLM against transformers over the decoded weights.

What is measured goes to stdout, as JSON in the last line: for each row the tokens that are not transformers' and the largest
difference of a log-probability. It needs vLLM, transformers and this package, and no test library.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowrank_ops as lo
from lowrank_ops.adapters.branch_files import BRANCH, FOLDER, write_branches

STEPS = 12
PROMPTS = [[(7 * n + 3 * i) % 290 + 3 for i in range(5 + 2 * n)] for n in range(6)]
ENGINE: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_model_len": 128,
    "enable_prefix_caching": False, "max_num_seqs": 8,
}  # fmt: skip


def model_of(family: str) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128, "initializer_range": 0.08,
    }  # fmt: skip
    if family == "Qwen3Moe":
        sizes |= {"moe_intermediate_size": 128, "num_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def layers_of(model: Any) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def decoded(model: Any) -> Any:
    """The model with the weights of its linear layers and its experts as 4 bits have them."""
    with torch.no_grad():
        for name, stack in model.named_parameters():
            if ".experts." in name:
                stack.copy_(lo.NF4Weight.quantize(stack).dequantize(torch.float32))
        for layer in layers_of(model).values():
            layer.weight.copy_(lo.NF4Weight.quantize(layer.weight).dequantize(torch.float32))
    return model


def write_adapters(family: str, root: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """Adapters over the 4-bit model, and for each the dense model that has W + ΔW."""
    references = {"": decoded(model_of(family))}
    for seed, (name, (kind, targets)) in enumerate(kinds.items()):
        adapted = lo.adapt(model_of(family), kind, targets)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in lo.adapter_parameters(adapted):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        lo.save_adapter(adapted, root / name, factors="stored")
        reference = decoded(model_of(family))
        with torch.no_grad():
            for at, layer in layers_of(reference).items():
                own = adapted.get_submodule(at)
                if isinstance(own, lo.Linear) and own.adapter is not None:
                    eye = torch.eye(own.in_features)
                    layer.weight.copy_(own(eye).T)
        references[name] = reference
    return references


@torch.no_grad()
def compare(reference: Any, prompt: list[int], tokens: list[int], logprobs: list[float]) -> tuple[int, float]:
    """How many tokens are not the reference's, given those before, and the largest difference of a log-probability."""
    scores = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens).unsqueeze(1))[:, 0]
    return int((scores.argmax(1) != torch.tensor(tokens)).sum()), float((own - torch.tensor(logprobs)).abs().max())


def answers(llm: Any, names: list[str], root: Path, known: dict[str, int]) -> list[tuple[list[int], list[float]]]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = [LoRARequest(n, known.setdefault(n, len(known) + 1), str(root / n)) if n else None for n in names]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS[: len(names)]],
        SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=1, detokenize=False),
        lora_request=requests if any(names) else None,
        use_tqdm=False,
    )
    made = [output.outputs[0] for output in outputs]
    return [
        (list(o.token_ids), [step[t].logprob for step, t in zip(o.logprobs, o.token_ids, strict=True)]) for o in made
    ]


def measure(llm: Any, references: dict[str, Any], names: list[str], root: Path, known: dict[str, int]) -> list[Any]:
    got = answers(llm, names, root, known)
    return [(n, *compare(references[n], p, *g)) for n, p, g in zip(names, PROMPTS, got, strict=False)]


def engine(path: Path, **options: Any) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from vllm import LLM

    words = models.WordLevel({f"t{i}": i for i in range(300)}, unk_token="t0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="t1").save_pretrained(path)

    return LLM(str(path), quantization="lowrank_ops", **ENGINE | options)


def kinds_of(llm: Any) -> list[str]:
    """How the first block's matrices are kept."""
    from lowrank_ops.integrations.vllm.shards import ShardedLinear

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    layers = [m for m in model.modules() if isinstance(m, ShardedLinear)]
    return [f"{layer.whole!r} | {[repr(site.weight) for site in layer.sites]}" for layer in layers[:4]]


def adapters(root: Path, **options: Any) -> Any:
    """A dense Llama quantised while it is read; adapters of all kinds in three slots, with rows that have none."""
    kinds = {
        "lora": (lo.LoRA(8), "all-linear"), "narrow": (lo.LoRA(3), ["q_proj", "v_proj"]),
        "xs": (lo.LoRAXS(12), "all-linear"), "svf": (lo.SVF(rank=20), "all-linear"),
        "svft": (lo.SVFT("banded", bandwidth=2, rank=16), ["k_proj", "down_proj"]),
    }  # fmt: skip
    references = write_adapters("Llama", root, kinds)
    model_of("Llama").save_pretrained(root / "model")
    llm = engine(root / "model", enable_lora=True, max_loras=3, max_lora_rank=8, max_cpu_loras=4, **options)
    known: dict[str, int] = {}
    rounds = [
        ["", "lora", "narrow", "", "xs", "lora"],  # all slots are taken
        ["svf", "svft", "", "xs", "", "svf"],  # adapters come and go
        ["lora", "svft", "narrow", "", "lora", ""],
    ]
    measured = [measure(llm, references, names, root, known) for names in rounds]
    dense = model_of("Llama")
    base = answers(llm, ["", ""], root, known)
    return {"rows": measured, "dense": [compare(dense, p, *g) for p, g in zip(PROMPTS, base, strict=False)]}


def checkpoint(root: Path, **options: Any) -> Any:
    """A Qwen3 in bitsandbytes' entries with 8-bit scales, and once more with branches beside it."""
    model, reference = model_of("Qwen3"), decoded(model_of("Qwen3"))
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in layers_of(model).items():
        state |= lo.NF4Weight.quantize(layer.weight).to_bitsandbytes(f"{name}.")
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = described = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"],
    }  # fmt: skip
    from safetensors.torch import save_file

    for folder in ("plain", "branched"):
        (root / folder).mkdir()
        save_file({k: t.contiguous() for k, t in state.items()}, root / folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(root / "plain")
    llm = engine(root / "plain", **options)
    result = {"rows": [measure(llm, {"": reference}, [""] * 4, root, {})], "kinds": kinds_of(llm)}
    adapted = lo.adapt(model_of("Qwen3"), None)
    for seed, layer in enumerate(m for m in adapted.modules() if isinstance(m, lo.Linear)):
        torch.manual_seed(seed)
        N, K = layer.out_features, layer.in_features
        layer.set_branch(lo.LowRankUpdate(torch.randn(3, K) / K**0.5, torch.randn(N, 3) / 5))
    write_branches(adapted, root / "branched" / FOLDER)
    model.config.quantization_config = described | {BRANCH: True}
    model.config.save_pretrained(root / "branched")
    with torch.no_grad():
        for name, layer in layers_of(reference).items():
            layer.weight.add_(adapted.get_submodule(name).branch.delta())
    del llm  # it would end the process groups of the next engine
    gc.collect()
    llm = engine(root / "branched", **options)
    result["rows"].append(measure(llm, {"": reference}, [""] * 4, root, {}))
    shutil.rmtree(root / "branched" / FOLDER)
    try:
        engine(root / "branched", **options)
    except Exception as error:
        result["missing"] = str(error.__cause__ or error)
    return result


def split(root: Path) -> Any:
    """Adapters of all kinds over two processes."""
    kinds = {
        "lora": (lo.LoRA(8), "all-linear"), "xs": (lo.LoRAXS(12), "all-linear"),
        "svf": (lo.SVF(rank=20), ["q_proj", "down_proj"]),
        "svft": (lo.SVFT("banded", bandwidth=2, rank=16), ["k_proj", "o_proj"]),
    }  # fmt: skip
    references = write_adapters("Llama", root, kinds)
    model_of("Llama").save_pretrained(root / "model")
    llm = engine(root / "model", enable_lora=True, max_loras=2, max_lora_rank=8, tensor_parallel_size=2)
    known: dict[str, int] = {}
    rounds = [["", "lora", "xs", "lora"], ["svf", "", "svft", "svf"], ["xs", "", "xs", "lora"]]
    return {"rows": [measure(llm, references, names, root, known) for names in rounds]}


def experts(root: Path, **options: Any) -> Any:
    """A dense Qwen3 with experts, quantised while it is read; rows with adapters of the attention, and without."""
    kinds = {"lora": (lo.LoRA(8), ["q_proj", "o_proj"])}
    references = write_adapters("Qwen3Moe", root, kinds)
    model_of("Qwen3Moe").save_pretrained(root / "model")
    llm = engine(root / "model", enable_lora=True, max_loras=1, max_lora_rank=8, **options)
    known: dict[str, int] = {}
    result = {"rows": [measure(llm, references, ["", "lora", "", "lora"], root, known)]}
    if options:
        return result
    shutil.copytree(root / "lora", root / "inside")
    factors = {"lora_A": torch.ones(2, 256), "lora_B": torch.ones(128, 2)}
    inside = "base_model.model.model.layers.0.mlp.experts.0.gate_proj"
    from safetensors.torch import save_file

    save_file({f"{inside}.{k}.weight": t for k, t in factors.items()}, root / "inside" / "adapter_model.safetensors")
    try:
        answers(llm, ["inside"], root, known)
    except Exception as error:
        result["refused"] = str(error)
    return result


def split_experts(root: Path) -> Any:
    """The same over two processes."""
    return experts(root, tensor_parallel_size=2)


def read_experts(root: Path) -> Any:
    """Experts in bitsandbytes' entries, one for each matrix of each expert, as transformers' files name them."""
    model = model_of("Qwen3Moe")
    reference = decoded(model_of("Qwen3Moe"))
    model.save_pretrained(root / "model")
    from safetensors.torch import load_file, save_file

    state: dict[str, Tensor] = load_file(root / "model" / "model.safetensors")
    ends = (*(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")),)
    held: dict[str, Tensor] = {}
    for key in [key for key in state if key.endswith(ends)]:
        weight = lo.NF4Weight.quantize(state.pop(key))
        held[key] = weight.dequantize(torch.float32)
        state |= weight.to_bitsandbytes(key.removesuffix("weight"))
    with torch.no_grad():
        for at, layer in enumerate(reference.model.layers):
            for e in range(6):
                gate, up, down = (
                    held[f"model.layers.{at}.mlp.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")
                )
                layer.mlp.experts.gate_up_proj[e] = torch.cat([gate, up])
                layer.mlp.experts.down_proj[e] = down
    save_file({k: t.contiguous() for k, t in state.items()}, root / "model" / "model.safetensors", {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"],
    }  # fmt: skip
    model.config.save_pretrained(root / "model")
    return {"rows": [measure(engine(root / "model"), {"": reference}, [""] * 4, root, {})]}


def names(root: Path) -> Any:
    """The names of vLLM that the plugin replaces or overrides, where they are missing or are used otherwise."""
    import inspect

    from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.layers.fused_moe import RoutedExperts, apply_moe_activation
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.version import __version__

    parameters = {
        LRUCacheLoRAModelManager._create_lora_modules: ["self"],
        LRUCacheLoRAModelManager._add_adapter: ["self", "lora"],
        LRUCacheLoRAModelManager._deactivate_adapter: ["self", "lora_id"],
        LRUCacheLoRAModelManager._set_adapter_mapping: ["self", "mapping"],
        LRUCacheLoRAModelManager._match_target_modules: ["self", "module_name"],
        LRUCacheLoRAModelManager.activate_adapter: ["self", "lora_id"],
        LRUCacheLoRAModelManager.create_dummy_lora: ["self", "lora_id", "rank", "embedding_modules"],
        LRUCacheWorkerLoRAManager._load_adapter: ["self", "lora_request"],
        LRUCacheWorkerLoRAManager._apply_adapters: ["self", "lora_requests"],
        DefaultModelLoader.get_all_weights: ["self", "model_config", "model"],
        apply_moe_activation: [
            "activation", "output", "input", "activation_config", "topk_ids", "expert_map", "valid_token_counts",
        ],
        RoutedExperts._map_global_expert_id_to_local_expert_id: ["self", "expert_id"],
    }  # fmt: skip
    wrong = [f.__qualname__ for f, own in parameters.items() if list(inspect.signature(f).parameters) != own]
    uses = {
        LoRAModelRunnerMixin.load_lora_model: "LRUCacheWorkerLoRAManager(",
        LoRAModelManager.__init__: "self._create_lora_modules()",
        LoRAModelManager.activate_adapter: "self.lora_index_to_id[index] = ",
        LRUCacheWorkerLoRAManager.create_lora_manager: "self._manager_cls",
        LRUCacheWorkerLoRAManager._apply_adapters: "for lora_request in lora_requests\n",
        PunicaWrapperBase.token_lora_indices.fget: "self._token_lora_indices[:",
        QKVParallelLinear.load_weights: "param.weight_loader(param, loaded_weight, shard_id)",
        DefaultModelLoader.load_weights: "self.get_all_weights(model_config, model)",
        RoutedExperts.load_weights: "success = param.weight_loader(",
        RoutedExperts.forward_modular: "return self.quant_method.apply(",
        RoutedExperts._get_quant_method: "resolve_quant_method(quant_config, self, prefix)",
    }
    wrong += [f.__qualname__ for f, text in uses.items() if text not in inspect.getsource(f)]
    wrong += [] if issubclass(_LOAD_FORMAT_TO_MODEL_LOADER["auto"], DefaultModelLoader) else ["auto"]
    return {"version": __version__, "wrong": wrong}


if __name__ == "__main__":
    from lowrank_ops.integrations import vllm

    vllm.register()
    cases = (adapters, checkpoint, split, experts, split_experts, read_experts, names)
    case = next(case for case in cases if case.__name__ == sys.argv[1])
    print(json.dumps(case(Path(sys.argv[2]))))

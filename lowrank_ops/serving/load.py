"""Load what is served: a model with its engine, tokenizer, limits and metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily

from ..adapters.config import CONFIGS
from ..adapters.model import adapt
from .engine import Engine
from .grammar import Grammars
from .pooling import Pooling
from .protocol import Limits
from .texts import make_bound


class ServeError(Exception):
    """An error the user can fix; the message says how."""


class Metrics:
    """The metrics of /metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        rows = (1, 2, 4, 8, 16, 32, 64, 128, 256)

        def named(kind: Callable[..., Any], name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"lowrank_ops_{name}", text, labels, registry=self.registry, **options)

        self.requests = named(Counter, "requests", "Requests answered", "path", "status")
        self.seconds = named(Histogram, "request_seconds", "From a request's arrival to the end of its answer", "path")
        self.tokens = named(Counter, "tokens", "Tokens of accepted prompts, and drawn", "kind")
        self.running = named(Gauge, "requests_running", "Requests accepted and not answered yet")
        self.queue = named(Gauge, "queue_rows", "Rows that wait for a forward")
        self.failed = named(Counter, "forwards_failed", "Forwards that raised an error")
        self.failing = 0  # failed forwards with no success since
        self._observed = {
            "batch": named(Histogram, "batch_rows", "Rows in a forward", buckets=rows),
            "adapters": named(
                Histogram, "batch_adapters", "Different adapters in a forward, the base one", buckets=rows
            ),
            "forward": named(Histogram, "forward_seconds", "A forward"),
        }

    def observe(self, name: str, value: float) -> None:
        if name == "failed":
            self.failed.inc()
            self.failing += 1
            return
        if name == "forward":
            self.failing = 0
        self._observed[name].observe(value)

    def watch(self, engine: Engine) -> None:
        """Read the queue and the pool whenever the metrics are requested."""
        self.queue.set_function(lambda: engine.queued)

        class Pool:
            def collect(self) -> Iterator[GaugeMetricFamily]:
                for name, value in engine.pool.stats().items():
                    family = GaugeMetricFamily(f"lowrank_ops_pool_{name}", f"{name} of AdapterPool.stats()")
                    family.add_metric([], value)
                    yield family

        self.registry.register(Pool())


@dataclass
class Service:
    """A loaded model and what the application needs to know about it."""

    name: str
    engine: Engine
    tokenizer: Any
    limits: Limits
    metrics: Metrics
    vocabulary: int
    closing: bool = False

    def __post_init__(self) -> None:
        # A fast tokenizer may be called by several threads once its first call has set it up.
        self._alone: AbstractContextManager[Any] = (
            threading.Lock() if not getattr(self.tokenizer, "is_fast", False) else nullcontext()
        )
        self.tokenize(["set up"])
        self.special = frozenset(self.tokenizer.all_special_ids)
        self.has_more = make_bound(self.tokenizer)
        self.grammars = Grammars(self.tokenizer, self.vocabulary, self.engine.ends)

    def tokenize(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """The token ids of texts, with the tokenizer's special tokens or without."""
        options = {"truncation": False, "padding": False, "verbose": False, "add_special_tokens": special}
        with self._alone:
            return self.tokenizer(list(texts), **options)["input_ids"]


def load(
    model: str | Path,
    adapters: str | Path | None,
    *,
    quantize: str | None = "nf4",
    head: bool | str | None = False,
    device: str | None = None,
    name: str | None = None,
    limits: Limits | None = None,
    chat_template: str | Path | None = None,
    **options: Any,
) -> Service:
    """Load a Hugging Face directory and start its engine. Only files on this machine are read.

    Args:
        model: directory of an encoder or a causal model with its tokenizer.
        adapters: the directory whose folders are the adapters.
        quantize: the format of the weights, ``"nf4"``, ``"fp4"`` or ``"mxfp4"``, or None to keep them dense.
            A dense checkpoint is quantised tensor by tensor while it is read.
        head: quantise the output head and the embeddings too, which a small model with a large vocabulary mostly is: True
            in the format of the weights, or ``"int8"``.
        device: default: a GPU if there is one.
        name: name of the base model in requests; default: the last part of its path.
        limits: default: :class:`Limits`, with the longest input the model takes.
        chat_template: a file with a chat template in Jinja, in place of the tokenizer's.
        options: arguments of :class:`lowrank_ops.serving.engine.Engine`.

    Raises:
        ServeError: a directory is missing or holds no such model; a limit is out of range; an adapter has the base's name.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if head and quantize is None:
        raise ServeError("the head can be quantised only with the other layers; quantize is None")
    directory = Path(model).resolve()
    if not (directory / "config.json").is_file():
        raise ServeError(f"{model} is not a Hugging Face model directory: it has no config.json")
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        # A directory of sentence-transformers embeds, whatever the class of its model.
        embeds = (directory / "modules.json").is_file()
        causal = not embeds and any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in config.architectures or ())
        pooling = Pooling.read(directory)
        if not causal:
            pooling.size(config.hidden_size)
        kind = AutoModelForCausalLM if causal else AutoModel
        wide = quantize if head is True else head or None
        named: dict[str, Any] = dict.fromkeys(("head", "embeddings")[not causal :], wide)
        reading = {} if quantize is None else {"quantization_config": CONFIGS[quantize](**named)}
        loaded = kind.from_pretrained(directory, local_files_only=True, dtype="auto", **reading).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        if chat_template is not None:
            tokenizer.chat_template = Path(chat_template).read_text()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ServeError(f"cannot load a model and its tokenizer from {model}: {error}") from error
    if config.is_encoder_decoder:
        raise ServeError(f"{model} holds an encoder-decoder model; an encoder or a causal model is needed")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and loaded.dtype == torch.float16:
        loaded = loaded.float()
    longest = min(getattr(config, "max_position_embeddings", None) or 1 << 30, tokenizer.model_max_length)
    try:
        limits = (limits or Limits(max_tokens=longest)).resolved(longest, options.get("max_queue"))
    except ValueError as error:
        raise ServeError(str(error)) from error
    metrics = Metrics()
    try:
        engine = Engine(
            adapt(loaded.to(device), None, quantize=quantize),
            adapters,
            causal=causal,
            pooling=pooling,
            pad=tokenizer.pad_token_id or 0,
            ends=_ends(loaded, tokenizer) if causal else (),
            observe=metrics.observe,
            **options,
        )
    except (ValueError, RuntimeError) as error:
        raise ServeError(str(error)) from error
    name = directory.name if name is None else name
    if name in engine.names():
        engine.close()
        raise ServeError(f"the base model and an adapter are both named {name!r}; give the base another name")
    metrics.watch(engine)
    return Service(name, engine, tokenizer, limits, metrics, loaded.get_input_embeddings().num_embeddings)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the model's, the tokenizer's, and the one after an answer in its chat template."""
    given = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given]), _end_of_turn(tokenizer)}
    return [end for end in ends if end is not None]


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an answer, if it puts one there."""
    answer = "This is the answer."
    talk = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # without a template, or one that refuses this talk
        return None
    _, found, after = text.rpartition(answer)
    first = tokenizer.encode(after.lstrip(), add_special_tokens=False)[:1] if found else []
    added = tokenizer.added_tokens_decoder
    return next((token for token in first if token in added and added[token].special), None)

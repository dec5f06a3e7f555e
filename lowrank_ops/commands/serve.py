"""``lowrank-ops serve``: the options, and the process of :mod:`lowrank_ops.serving`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys

_LONGEST = 1 << 30  # tokens; the model's own limit is lower


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="a Hugging Face directory with an encoder or a causal model")
    add("--adapters", metavar="DIR", help="a directory of folders, each an adapter with the folder's name")
    add("--name", help="name of the base model in requests (default: the last part of MODEL_DIR)")
    add("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    formats = ("nf4", "fp4", "mxfp4", "none")
    add("--quantize", choices=formats, default="nf4", help="the base model's weights (default %(default)s)")
    add("--quantize-head", action="store_true", help="quantise the output head and the embeddings too")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if available)")
    add("--pool-mb", type=int, default=1024, help="memory for adapters, in MB (default %(default)s)")
    add("--host-mb", type=int, default=4096, help="host memory for further adapters, in MB (default %(default)s)")
    add("--max-batch", type=int, default=32, help="rows in one forward (default %(default)s)")
    add(
        "--max-batch-tokens",
        type=int,
        default=16384,
        help="rows times the longest row in one forward (default %(default)s)",
    )
    text = "tokens of prompts read between two tokens of running completions (default %(default)s)"
    add("--chunk-tokens", type=int, default=512, help=text)
    text = "memory for the beginnings of earlier texts, in MB; 0: none (default %(default)s)"
    add("--prefix-mb", type=int, default=256, help=text)
    add("--max-queue", type=int, default=1024, help="rows that may wait before 429 (default %(default)s)")
    add("--max-inputs", type=int, default=64, help="texts in one request (default %(default)s)")
    add(
        "--max-tokens",
        type=int,
        help="limit of an input, or of a prompt and its completion (default: the model's limit)",
    )
    add("--max-body-mb", type=int, default=4, help="limit of a request, in MB (default %(default)s)")
    add(
        "--drain-seconds", type=float, default=60, help="time for accepted requests after SIGTERM (default %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; return 0, or 2 after an error message."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        from ..serving.http import Server
        from ..serving.load import ServeError, load
        from ..serving.protocol import Limits

        service = load(
            arguments.model,
            arguments.adapters,
            quantize=None if arguments.quantize == "none" else arguments.quantize,
            head=arguments.quantize_head,
            device=arguments.device,
            name=arguments.name,
            limits=Limits(
                max_inputs=arguments.max_inputs,
                max_tokens=_LONGEST if arguments.max_tokens is None else arguments.max_tokens,
                max_body_bytes=arguments.max_body_mb << 20,
            ),
            capacity_bytes=arguments.pool_mb << 20,
            host_bytes=arguments.host_mb << 20,
            max_batch=arguments.max_batch,
            max_batch_tokens=arguments.max_batch_tokens,
            max_queue=arguments.max_queue,
            chunk_tokens=arguments.chunk_tokens,
            prefix_bytes=arguments.prefix_mb << 20,
        )
    except ImportError as error:
        print(f'lowrank-ops serve needs {error.name}; pip install "lowrank-ops[serve]"', file=sys.stderr)
        return 2
    except ServeError as error:
        print(f"lowrank-ops serve: {error}", file=sys.stderr)
        return 2
    process = Server(service, arguments.host, arguments.port, arguments.drain_seconds)
    # Handle signals until uvicorn listens, because it installs its handler only then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, process.handle_exit)
    names = service.engine.names()
    logging.getLogger("lowrank_ops").info("model %s, %d adapters", service.name, len(names))
    process.run()
    return 0

"""``lowrank-ops serve``: the options, and the process of :mod:`lowrank_ops.serving`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from .wide_options import add_wide

KEYS = "LOWRANK_OPS_API_KEYS"
_LONGEST = 1 << 30  # tokens; the model's own limit is lower


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="a Hugging Face directory with an encoder or a causal model")
    add("--adapters", metavar="DIR", help="a directory of folders, each an adapter with the folder's name")
    text = "let clients load adapters from folders in this directory, and unload them (/v1/load_lora_adapter)"
    add("--adapter-source", metavar="DIR", help=text)
    add("--chat-template", metavar="FILE", help="a chat template in Jinja (default: that of the model's tokenizer)")
    add("--name", help="name of the base model in requests (default: the last part of MODEL_DIR)")
    add("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    formats = ("nf4", "fp4", "mxfp4", "none")
    add("--quantize", choices=formats, default="nf4", help="the base model's weights (default %(default)s)")
    text = "quantise the output head and the embeddings too, in the format of the weights or in int8"
    add_wide(parser, "--quantize-head", text)
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
    add("--client-rows", type=int, default=0, help="inputs of one client that wait or run (default: 8 x --max-inputs)")
    add("--client-body-mb", type=int, default=0, help="bodies of one client together (default: 48 x --max-body-mb)")
    add("--bodies-mb", type=int, default=0, help="bodies of all clients together (default: 128 x --max-body-mb)")
    add("--connections", type=int, default=1024, help="connections of all clients (default %(default)s)")
    add("--client-connections", type=int, default=512, help="connections of one address (default %(default)s)")
    add(
        "--read-seconds",
        type=float,
        default=30,
        help="time for a request's header, and the longest pause in a body or in reading an answer (default %(default)s)",
    )
    add("--body-seconds", type=float, default=120, help="time for a request's body (default %(default)s)")
    add("--request-seconds", type=float, default=600, help="time for an answer (default %(default)s)")
    add(
        "--drain-seconds", type=float, default=60, help="time for accepted requests after SIGTERM (default %(default)s)"
    )
    _add_access(parser)


def _add_access(parser: argparse.ArgumentParser) -> None:
    def add_several(name: str, metavar: str, text: str) -> None:
        parser.add_argument(name, action="append", default=[], metavar=metavar, help=f"{text}; may be given again")

    add = parser.add_argument
    add_several("--api-key", "KEY", f"a request needs such a key (other users of this machine see it; also: ${KEYS})")
    add("--api-key-file", metavar="FILE", help="a file of such keys, one a line")
    add("--tls-certificate", metavar="FILE", help="serve HTTPS with this certificate and its chain, in PEM")
    add("--tls-key", metavar="FILE", help="the certificate's key (default: in the certificate's file)")
    add_several(
        "--allowed-host",
        "NAME",
        "a name of this server in the Host header, or *.example.com (default: any; at a local address the local names)",
    )
    add_several("--allowed-origin", "URL", "a web site whose pages may ask from a browser, or * (default: none)")
    add_several("--trusted-proxy", "ADDRESS", "a proxy in front, whose X-Forwarded-For tells the client's address")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; return 0, or 2 after an error message."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        from ..serving.gate import Access
        from ..serving.load import ServeError, load
        from ..serving.process import LOCAL, Server
        from ..serving.protocol import Limits

        try:
            access = Access(_keys(arguments), arguments.allowed_host, arguments.allowed_origin)
        except (OSError, ValueError) as error:
            raise ServeError(str(error)) from error
        service = load(
            arguments.model,
            arguments.adapters,
            quantize=None if arguments.quantize == "none" else arguments.quantize,
            head=arguments.quantize_head == "same" or arguments.quantize_head,
            device=arguments.device,
            name=arguments.name,
            limits=Limits(
                max_inputs=arguments.max_inputs,
                max_tokens=_LONGEST if arguments.max_tokens is None else arguments.max_tokens,
                max_body_bytes=arguments.max_body_mb << 20,
                client_rows=arguments.client_rows,
                client_body_bytes=arguments.client_body_mb << 20,
                bodies_bytes=arguments.bodies_mb << 20,
                connections=arguments.connections,
                client_connections=arguments.client_connections,
                read_seconds=arguments.read_seconds,
                body_seconds=arguments.body_seconds,
                request_seconds=arguments.request_seconds,
            ),
            chat_template=arguments.chat_template,
            source=arguments.adapter_source,
            capacity_bytes=arguments.pool_mb << 20,
            host_bytes=arguments.host_mb << 20,
            max_batch=arguments.max_batch,
            max_batch_tokens=arguments.max_batch_tokens,
            max_queue=arguments.max_queue,
            chunk_tokens=arguments.chunk_tokens,
            prefix_bytes=arguments.prefix_mb << 20,
        )
        process = Server(
            service,
            arguments.host,
            arguments.port,
            arguments.drain_seconds,
            access=access,
            certificate=arguments.tls_certificate,
            key=arguments.tls_key,
            proxies=arguments.trusted_proxy,
        )
    except ImportError as error:
        print(f'lowrank-ops serve needs {error.name}; pip install "lowrank-ops[serve]"', file=sys.stderr)
        return 2
    except ServeError as error:
        print(f"lowrank-ops serve: {error}", file=sys.stderr)
        return 2
    # Handle signals until uvicorn listens, because it installs its handler only then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, process.handle_exit)
    if not access.keys and arguments.host not in LOCAL:
        logging.getLogger("lowrank_ops").warning("anybody who reaches %s may ask: there is no key", arguments.host)
    names = service.engine.names()
    logging.getLogger("lowrank_ops").info("model %s, %d adapters", service.name, len(names))
    process.run()
    return 0


def _keys(arguments: argparse.Namespace) -> list[str]:
    """The keys of the options, the file and the environment."""
    keys = [*arguments.api_key, *os.environ.get(KEYS, "").split()]
    if arguments.api_key_file is not None:
        found = Path(arguments.api_key_file).read_text().split()
        if not found:
            raise ValueError(f"--api-key-file {arguments.api_key_file} holds no key")
        keys += found
    return keys

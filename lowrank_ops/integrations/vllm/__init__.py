"""vLLM serves 4-bit weights of ours: ``--quantization lowrank_ops``, and adapters of every kind with ``--enable-lora``.

``pip install lowrank-ops`` beside vLLM is all: vLLM finds :func:`register` by its entry point, in every process of its own.
The package does not depend on vLLM, whose distribution has several names. Only :mod:`.shards` can be imported without vLLM.
"""

from __future__ import annotations

import logging

# The versions whose names, some of them private, :mod:`.quantization` and :mod:`.lora` were read in.
VERSIONS = ("0.32.0",)

# Beneath vLLM's own logger, whose handler prints it.
_LOG = logging.getLogger("vllm.lowrank_ops")


def unsupported(version: str) -> str | None:
    """Tell why a version of vLLM is not served, or None if it is; what follows a "+" says how it was built."""
    if version.partition("+")[0] in VERSIONS:
        return None
    return (
        f"the plugin lowrank_ops knows vLLM {', '.join(VERSIONS)}, and this is {version}, whose private names may mean "
        "something else; install a version that it knows"
    )


def register() -> None:
    """Make the quantisation ``lowrank_ops`` known to vLLM. Another version of vLLM stays as it is, and its log says why."""
    from vllm.version import __version__

    if (why := unsupported(__version__)) is not None:
        _LOG.error("--quantization lowrank_ops is not there: %s", why)
        return
    from . import lora, quantization

    quantization.install()
    lora.install()

"""Report what this installation has and lacks: versions, instruction set, CUDA targets, GPU, Triton."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__, ops
from ..ops import _cpu, _plan


def collect() -> dict[str, str]:
    """Collect name -> finding, in the order of printing; missing parts are findings, not errors."""
    facts = {
        "lowrank_ops": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }
    if _cpu.import_error() is None:
        module = _cpu.module()
        targets = module.cuda_targets()
        facts["compiled module"] = f"version {module.version}, built by compiler {module.compiler}"
        try:
            chosen = module.isa()
        except ValueError as error:  # LOWRANK_OPS_ISA names an unusable instruction set
            chosen = f"none: {error}"
        facts["instruction set"] = f"{chosen} (this machine can run: {', '.join(module.isas())})"
        if not chosen.startswith("none"):
            facts["bfloat16 products"] = (
                "of the processor"
                if _cpu.has_bfloat16()
                else "none by this instruction set: linear layers that adapt leaves dense run in our kernels, not in torch's"
            )
        facts["cuda targets"] = targets or "none: the build found no CUDA compiler"
    else:
        facts["compiled module"] = f"missing, CPU kernels cannot run: {_cpu.import_error()}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["gpu"] = ", ".join(names)
    else:
        facts["gpu"] = "none" + ("" if torch.version.cuda else " (this torch is built without CUDA)")
    facts["triton"] = _version("triton", "missing: GPU kernels cannot run")
    if _plan.interpreted():
        facts["triton"] += ", interpreting on the CPU (TRITON_INTERPRET is set)"
    for package in ("bitsandbytes", "peft", "transformers", "matplotlib", "rich"):
        facts[package] = _version(package, "missing (optional)")
    facts |= ops.call_paths()
    if _plan.forced():
        facts["implementation"] = f"{_plan.forced()} (chosen by name)"
    return facts


def _version(package: str, missing: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return missing


def text() -> str:
    facts = collect()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {finding}" for name, finding in facts.items())

"""Every private name of torch that the registration uses may be missing: calls then go through torch's public API."""

from __future__ import annotations

import subprocess
import sys

from lowrank_ops import info, ops
from lowrank_ops.ops import _register

# `torch` as lowrank_ops.ops._register sees it lacks one name; everybody else sees it as it is. A process for each name: an
# op is registered once. They are forks of one that has torch imported, which takes the longest.
HIDE = """
import os
import sys

class Without:
    def __init__(self, whole, path):
        self.__dict__.update(whole=whole, path=path)

    def __getattr__(self, name):
        head, _, rest = self.path.partition(".")
        if name == head and sys._getframe(1).f_globals["__name__"] == "lowrank_ops.ops._register":
            if not rest:
                raise AttributeError(name)
            return Without(getattr(self.whole, name), rest)
        return getattr(self.whole, name)

    def __setattr__(self, name, value):
        setattr(self.whole, name, value)

    def __call__(self, *arguments):
        return self.whole(*arguments)

import torch
import torch._dynamo, torch.library
torch.set_num_threads(1)
for name in sys.argv[1:]:
    if not os.fork():
        break
    if os.wait()[1]:
        sys.exit(f"without {name} it failed")
else:
    sys.exit()
module, _, path = name.partition(".")
setattr(torch, module, Without(getattr(torch, module), path))
"""
# Checks results with and without gradients, each way of calling, and the refusal of a second derivative.
USE = """
import lowrank_ops as lo
from lowrank_ops import info, ops
from lowrank_ops.ops import _register
print("WITHOUT", name)
assert f"torch.{name}" in _register.MISSING.values()
torch.manual_seed(0)
tensors = [torch.randn(3, 64), torch.randn(4, 64), torch.randn(32, 4), torch.randn(4), torch.randn(32)]
x, down, up, values, bias = tensors
weight = lo.NF4Weight.quantize(torch.randn(32, 64))
update = lo.LowRankUpdate(down, up, lo.cores.Diagonal(values))
expected = lo.reference.adapted_linear(x, weight.dequantize(), down, up, bias, core=torch.diag(values))
with torch.no_grad():
    torch.testing.assert_close(lo.functional.adapted_linear(x, weight, update, bias), expected, rtol=1e-4, atol=1e-4)
for t in tensors:
    t.requires_grad_()
expected = lo.reference.adapted_linear(x, weight.dequantize(), down, up, bias, core=torch.diag(values))
wanted = torch.autograd.grad(expected.square().sum(), tensors)
y = lo.functional.adapted_linear(x, weight, update, bias)
for got, want in zip(torch.autograd.grad(y.square().sum(), tensors, create_graph=True), wanted):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
twice = torch.autograd.grad(lo.functional.adapted_linear(x, weight, update).sum(), x, create_graph=True)[0]
try:
    torch.autograd.grad(twice.square().sum(), down)
except RuntimeError as error:
    print(error)
print(info.text(), flush=True)
"""
NAMES = {**dict.fromkeys(_register.FOR_CALL, "call"), **dict.fromkeys(_register.FOR_AUTOGRAD, "autograd")}


def test_without_a_private_name_calls_go_through_the_dispatcher() -> None:
    ran = subprocess.run([sys.executable, "-c", HIDE + USE, *NAMES], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    for name, said in zip(NAMES, ran.stdout.split("WITHOUT")[1:], strict=True):
        assert said.split()[0] == name and "can be differentiated once" in said
        way = "the dispatcher" if NAMES[name] == "call" else "torch.library"
        assert f"through {way}: torch.{name} is missing" in said


def test_this_torch_has_all_private_names() -> None:
    assert _register.MISSING == {"call": "", "autograd": "", "frames": ""}
    assert ops.call_paths().items() <= info.collect().items()

"""python -m lowrank_ops.bench.cases.bench_pool: thousands of LoRA-XS adapters of a Llama-3-8B in one AdapterPool.

The 224 linear layers have the real shapes, in NF4 with double quantisation. The numbers are random, and all blocks
share the seven weights of one block, so that the base is made in seconds; every layer is its own lowrank_ops.Linear
with its own factors in the pool. A few adapters with random cores are written once and loaded under as many names as
requested, each time from the file.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank_ops as lo
from lowrank_ops.adapters.peft_files import CONFIG, TENSORS
from lowrank_ops.adapters.start import Start, start
from lowrank_ops.ops import _plan
from lowrank_ops.serving.pool import Version
from lowrank_ops.svd.store import FactorStore, largest, weight_key

from ..peak import status
from ..report import Table

BLOCKS, LAYERS, RANK, ROWS, FILES = 32, 7, 16, 8, 16
# Hidden, intermediate, keys and values of Llama 3 8B.
SIZES = 4096, 14336, 1024


class Timed(lo.AdapterPool):
    """A pool that records the duration of copying adapters to its arena."""

    def __init__(self, model: nn.Module, capacity_bytes: int, store: Path) -> None:
        super().__init__(model, capacity_bytes, dtype=torch.bfloat16, factors=store)
        self.copies: list[float] = []

    def _make_resident(self, version: Version) -> None:
        began = time.perf_counter()
        super()._make_resident(version)
        if version.ready is not None:
            version.ready.synchronize()
        self.copies.append(time.perf_counter() - began)


def shapes(hidden: int, intermediate: int, keys: int) -> dict[str, tuple[int, int]]:
    """[N, K] of a block's linear layers by their names in transformers."""
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def llama(block: dict[str, lo.Linear], kind: lo.LoRAXS | None, starts: dict[str, Start], blocks: int) -> nn.Module:
    """A model with ``model.layers.<i>.<name>`` for each layer of a block; all blocks share one block's weights."""
    model = nn.Module()
    for i in range(blocks):
        for name, linear in block.items():
            *path, last = f"model.layers.{i}.{name}".split(".")
            parent = model
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, lo.Linear.from_linear(linear, kind, None, started=starts[name]))
    return model


def write(directory: Path, sizes: tuple[int, int, int], blocks: int, device: torch.device) -> nn.Module:
    """Make a model without adapters; write FILES adapters to directory/0 … and their factors to directory/factors."""
    block = {
        name: lo.Linear(K, N, bias=False, adapter=None, device=device, dtype=torch.bfloat16)
        for name, (N, K) in shapes(*sizes).items()
    }
    store, kind = FactorStore(directory / "factors"), lo.LoRAXS(RANK)
    bare, starts = {}, {}
    for name, linear in block.items():
        assert isinstance(linear.weight, lo.NF4Weight)
        key = weight_key(linear.weight)
        store.save(linear.weight, largest(linear.weight, RANK), key)
        starts[name] = start(kind, linear.weight, None, store, key)
        bare[name] = Start(linear.weight, None, None)
    adapted = llama(block, kind, starts, blocks)
    for layer in adapted.modules():
        if isinstance(layer, lo.Linear):
            layer.core = nn.Parameter(torch.randn(RANK, RANK))
    lo.save_adapter(adapted, directory / "0", factors="recipe")
    # The others are that file with other cores, because save_adapter would hash all weights again.
    with safe_open(directory / "0" / TENSORS, framework="pt") as file:
        metadata = file.metadata()
    first = load_file(directory / "0" / TENSORS)
    for i in range(1, FILES):
        (directory / str(i)).mkdir()
        (directory / str(i) / CONFIG).write_bytes((directory / "0" / CONFIG).read_bytes())
        other = {key: torch.randn(RANK, RANK) for key in first}
        save_file(other, directory / str(i) / TENSORS, metadata=metadata)
    return llama(block, None, bare, blocks)


@contextmanager
def form(few: bool) -> Iterator[None]:
    """Make the planner choose form "few" for any number of tokens, or form "many"."""
    before = dict(_plan.FEW_TOKENS)
    _plan.FEW_TOKENS.update(dict.fromkeys(before, 1 << 30 if few else 0))
    try:
        yield
    finally:
        _plan.FEW_TOKENS.update(before)


def rows_alone(pool: lo.AdapterPool, layers: Sequence[lo.Linear], names: Sequence[str]) -> bool:
    """Tell whether each row of a routed batch has the same bits as by itself, and all adapters give different rows."""
    for layer in layers:
        x = torch.randn(1, layer.in_features, device=layer.device).bfloat16().expand(len(names), -1).contiguous()
        for few in (True, False):
            with form(few), torch.no_grad():
                with pool.route(names):
                    y = layer(x)
                alone = []
                for i, name in enumerate(names):
                    with pool.route([name]):
                        alone.append(layer(x[i : i + 1]))
            if not torch.equal(y.view(torch.int16), torch.cat(alone).view(torch.int16)):
                return False
            if len({tuple(row.tolist()) for row in y}) < len(names):
                return False
    return True


def measure(
    adapters: int,
    sizes: tuple[int, int, int] = SIZES,
    blocks: int = BLOCKS,
    capacity_bytes: int = 2 << 30,
    device: torch.device | None = None,
) -> Table:
    """Measure ``adapters`` loads, at least ROWS."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        model = write(directory, sizes, blocks, device or torch.device("cpu"))
        pool = Timed(model, capacity_bytes, directory / "factors")
        resident, loads, processor = 0, [], []
        for i in range(adapters):
            began, busy = time.perf_counter(), time.process_time()
            pool.load(str(i), directory / str(i % FILES))
            loads.append(time.perf_counter() - began)
            processor.append(time.process_time() - busy)
            if not i:  # the first load also makes the factors, so it counts separately
                gc.collect()
                resident = status("VmRSS")
        grown = status("VmRSS") - resident
    first, *others = loads
    stats = pool.stats()
    assert stats["adapters"] == stats["resident"] == adapters and not stats["evictions"]
    own = stats["used_bytes"] - stats["family_bytes"]
    tenth = max(1, len(others) // 10)
    # Choose adapters spread over all, no two from one file.
    names = [str(i * (adapters // ROWS) // FILES * FILES + i) for i in range(ROWS)]
    layers = [layer for layer in model.modules() if isinstance(layer, lo.Linear)]
    routes = []
    for _ in range(50):
        began = time.perf_counter()
        with pool.route(names):
            routes.append(time.perf_counter() - began)
    same = rows_alone(pool, layers[:LAYERS], names)

    def spread(seconds: Sequence[float]) -> str:
        return f"{1e3 * statistics.median(seconds):.2f} ms, {1e3 * sorted(seconds)[len(seconds) * 99 // 100]:.2f} ms"

    lines = [
        ["adapters, resident", f"{adapters:,}, {stats['resident']:,}"],
        ["bytes of the arena in use", f"{stats['used_bytes']:,} of {stats['capacity_bytes']:,}"],
        ["of which shared factors", f"{stats['family_bytes']:,}"],
        ["bytes of an adapter", f"{own / adapters:,.0f}"],
        ["resident memory of the process, growth per adapter", f"{grown / max(1, len(others)):,.0f} bytes"],
        ["all loads", f"{sum(loads):.1f} s"],
        ["the first, which looks up the factors", f"{first:.1f} s"],
        ["a load, median and 99th percentile", spread(others)],
        ["its processor time, median and 99th percentile", spread(processor[1:])],
        ["its copy to the arena, median and 99th percentile", spread(pool.copies[1:adapters])],
        ["a load in the first and in the last tenth, median",
         f"{1e3 * statistics.median(others[:tenth]):.2f} ms, {1e3 * statistics.median(others[-tenth:]):.2f} ms"],
        [f"entering a route of {ROWS} adapters, median", f"{1e3 * statistics.median(routes):.2f} ms"],
        [f"{ROWS} rows of {ROWS} adapters, {LAYERS} layers: bits of a row as alone", "yes" if same else "NO"],
    ]  # fmt: skip
    text = f"LoRA-XS of rank {RANK} on {len(layers)} layers in bfloat16, {torch.get_num_threads()} threads."
    return Table("Many adapters in one pool", ["", ""], lines, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_ops.bench.cases.bench_pool", description=str(__doc__).split(": ")[1]
    )
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    asked = parser.parse_args(arguments)
    if asked.adapters < ROWS:
        parser.error(f"--adapters must be at least {ROWS}, got {asked.adapters}")
    print(measure(asked.adapters, device=torch.device(asked.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

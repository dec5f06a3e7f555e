"""python -m lowrank_ops.bench.decode_variants: compare ways to decode NF4 in a Triton kernel by their machine instructions.

Needs no GPU. Every variant decodes the same packed words to exact float32 levels, multiplies them by their scale and
adds them up, one FFMA for each weight. The instructions of its main loop are counted for a thread that decodes 64
weights. Each pipe of a multiprocessor takes a limited number of lanes a clock, which bounds the weights a clock; the
lowest bound counts. The loops of the package's own kernels are counted the same way.
"""

# mypy: allow-untyped-defs
# Parameters of kernels have Triton's types.

from __future__ import annotations

import random
import re
import struct
from collections import Counter
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowrank_ops.kernels import adapted_linear, aot
from lowrank_ops.kernels.config import Arch, Config, get_config
from lowrank_ops.kernels.launch import recording
from lowrank_ops.kernels.matrix import levels_of_words, load_levels
from lowrank_ops.kernels.operands import NF4

ROWS, WORDS, WARPS = 32, 32, 4  # a tile: 64 weights for each thread
TARGETS = (80, 90)

# Lanes of a warp that a pipe of a multiprocessor processes in a clock (CUDA C++ Programming Guide, arithmetic instructions;
# shared memory serves 32 banks of four bytes). Every instruction also takes one of 4 · 32 issue slots.
LANES = {
    "issue": {80: 128, 90: 128},
    "integer": {80: 64, 90: 64},
    "float": {80: 64, 90: 128},
    "shuffle": {80: 32, 90: 32},
    "memory": {80: 32, 90: 32},
}
PIPES = (
    ("shuffle", r"SHFL"),
    ("memory", r"LDS|LDSM|STS|STSM|LDG|STG|LDGSTS|LDL|STL"),
    ("float", r"FMUL|FFMA|FADD|IMAD|HFMA2"),  # includes integer multiplies and the moves written as such
    ("integer", r"SHF|PRMT|LOP3|SEL|FSEL|LEA|IADD3|ISETP|F2FP|SGXT|BMSK|VIADD|MOV|IABS|IMNMX|I2FP|CS2R|PLOP3|VOTE|R2P"),
)


def byte_permute() -> str:
    """Assembly that puts the eight levels of a word $8 into $0 … $7, by permuting the table's four byte planes.

    A permutation looks up four nibbles among eight bytes, so a plane of sixteen bytes takes two, and a third that
    chooses between them by the top bit of each nibble. The four planes are then transposed into four float32 levels.
    """
    code = [struct.unpack("<I", struct.pack("<f", level))[0] for level in NF4.levels]
    lines = ["and.b32 low, $8, 0x77777777;", "shr.u32 top, $8, 1;", "and.b32 top, top, 0x44444444;"]
    lines += ["or.b32 top, top, 0x32103210;"]
    for half in range(2):
        if half:
            lines += ["shr.u32 low, low, 16;", "shr.u32 top, top, 16;"]
        for plane in range(4):
            table = [sum((code[4 * q + i] >> 8 * plane & 255) << 8 * i for i in range(4)) for q in range(4)]
            lines += [f"mov.b32 t{q}, {table[q]:#x};" for q in range(4)]
            lines += ["prmt.b32 a, t0, t1, low;", "prmt.b32 b, t2, t3, low;", f"prmt.b32 p{plane}, a, b, top;"]
        for pair in range(2):
            selector = ("0x5140", "0x7362")[pair]
            lines += [f"prmt.b32 a, p0, p1, {selector};", f"prmt.b32 b, p2, p3, {selector};"]
            # Nibble i of a word is its element i ^ 1: the high nibble of a byte comes first.
            for i, order in ((0, "0x5410"), (1, "0x7632")):
                lines.append(f"prmt.b32 ${(4 * half + 2 * pair + i) ^ 1}, a, b, {order};")
    return "{ .reg .b32 low, top, a, b, t0, t1, t2, t3, p0, p1, p2, p3;\n" + "\n".join(lines) + " }"


PERMUTE = tl.constexpr(byte_permute())
# Assumes that the table of 256 pairs is at the start of shared memory.
PAIR = tl.constexpr("ld.shared.v2.f32 {$0, $1}, [$2];")


@triton.jit
def _join(x0, x1, x2, x3, x4, x5, x6, x7):
    return tl.join(tl.join(tl.join(x0, x4), tl.join(x2, x6)), tl.join(tl.join(x1, x5), tl.join(x3, x7)))


@triton.jit
def _variant_kernel(
    packed_ptr, scale_ptr, table_ptr, out_ptr, tiles, VARIANT: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    levels = table_ptr
    if VARIANT == "shuffle":
        levels = load_levels(table_ptr)
    elif VARIANT == "gather":
        levels = tl.broadcast_to(tl.load(table_ptr + tl.arange(0, 16))[None, :], (ROWS, 16))
    acc = tl.zeros((ROWS, 8 * WORDS), tl.float32)
    for tile in range(tiles):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        words = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + row * WORDS + tl.arange(0, WORDS)[None, :])
        if VARIANT == "shuffle":
            w = levels_of_words(levels, words)
        elif VARIANT == "permute":
            x0, x1, x2, x3, x4, x5, x6, x7 = tl.inline_asm_elementwise(
                PERMUTE,
                "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r",
                [words],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
            w = _join(x0, x1, x2, x3, x4, x5, x6, x7)
        elif VARIANT == "gather":
            x0, x1 = tl.gather(levels, words >> 4 & 15, 1), tl.gather(levels, words & 15, 1)
            x2, x3 = tl.gather(levels, words >> 12 & 15, 1), tl.gather(levels, words >> 8 & 15, 1)
            x4, x5 = tl.gather(levels, words >> 20 & 15, 1), tl.gather(levels, words >> 16 & 15, 1)
            x6, x7 = tl.gather(levels, words >> 28 & 15, 1), tl.gather(levels, words >> 24 & 15, 1)
            w = _join(x0, x1, x2, x3, x4, x5, x6, x7)
        elif VARIANT == "pairs in shared memory":
            x0, x1 = tl.inline_asm_elementwise(
                PAIR, "=f,=f,r", [words << 3 & 2040], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
            )
            x2, x3 = tl.inline_asm_elementwise(
                PAIR, "=f,=f,r", [words >> 5 & 2040], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
            )
            x4, x5 = tl.inline_asm_elementwise(
                PAIR, "=f,=f,r", [words >> 13 & 2040], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
            )
            x6, x7 = tl.inline_asm_elementwise(
                PAIR, "=f,=f,r", [words >> 21 & 2040], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
            )
            w = _join(x0, x1, x2, x3, x4, x5, x6, x7)
        else:
            pair_ptr = table_ptr.to(tl.pointer_type(tl.int64))
            y0, y1 = tl.load(pair_ptr + (words & 255)), tl.load(pair_ptr + (words >> 8 & 255))
            y2, y3 = tl.load(pair_ptr + (words >> 16 & 255)), tl.load(pair_ptr + (words >> 24 & 255))
            x0, x1 = y0.to(tl.int32).to(tl.float32, bitcast=True), (y0 >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            x2, x3 = y1.to(tl.int32).to(tl.float32, bitcast=True), (y1 >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            x4, x5 = y2.to(tl.int32).to(tl.float32, bitcast=True), (y2 >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            x6, x7 = y3.to(tl.int32).to(tl.float32, bitcast=True), (y3 >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            w = _join(x0, x1, x2, x3, x4, x5, x6, x7)
        scale = tl.broadcast_to(tl.load(scale_ptr + row), (ROWS, 8 * WORDS))
        acc = tl.fma(tl.reshape(w, (ROWS, 8 * WORDS)), scale, acc)
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * 8 * WORDS + tl.arange(0, 8 * WORDS)[None, :], acc)


VARIANTS = ("gather", "shuffle", "permute", "pairs in shared memory", "pairs through L1")


def compile_variant(variant: str, target: int) -> str:
    """Compile a variant to machine code."""
    types = {"packed_ptr": "*u8", "scale_ptr": "*fp32", "table_ptr": "*fp32", "out_ptr": "*fp32", "tiles": "i32"}
    constants = {"VARIANT": variant, "ROWS": ROWS, "WORDS": WORDS}
    index = {parameter.name: i for i, parameter in enumerate(_variant_kernel.params)}
    source = ASTSource(
        _variant_kernel,
        types | dict.fromkeys(constants, "constexpr"),
        {(index[name],): value for name, value in constants.items()},
        {(index[name],): [["tt.divisibility", 16]] for name, type_ in types.items() if type_.startswith("*")},
    )
    options = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}
    return aot.disassemble(triton.compile(source, target=GPUTarget("cuda", target, 32), options=options))


def main_loop(code: str) -> Counter[str]:
    """Count the instructions of the longest innermost loop."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.x]+)([^;]*);", code, re.MULTILINE)
    at = [(int(address, 16), op, rest) for address, op, rest in found]
    ends = [(int(m[1], 16), a) for a, op, rest in at if op == "BRA" and (m := re.search(r"0x([0-9a-f]+)", rest))]
    spans = [(first, last) for first, last in ends if first < last]
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    first, last = max(inner, key=lambda span: span[1] - span[0])
    return Counter(op for a, op, _ in at if first <= a <= last and op != "NOP")


def clocks(ops: Iterable[tuple[str, float]], conflicts: float = 1.0) -> dict[str, float]:
    """Lanes used in each pipe: one for each instruction; in shared memory one for every four bytes, or a conflict."""
    used = dict.fromkeys(LANES, 0.0)
    for op, count in ops:
        used["issue"] += count
        pipe = next((pipe for pipe, pattern in PIPES if re.match(rf"({pattern})(\.|$)", op)), None)
        if pipe == "memory" and re.match(r"(LDS|LDG\.E)\.64", op) and conflicts > 1:
            used[pipe] += count * conflicts  # look-ups of pairs; nothing else here loads 64 bits
        elif pipe == "memory":
            width = re.search(r"\.(128|64)\b", op)
            used[pipe] += count * (int(width[1]) // 32 if width else 1)
        elif pipe is not None:
            used[pipe] += count
    return used


def conflicts(variant: str) -> float:
    """Passes that a look-up of random pairs needs: by banks of a half warp in shared memory, by 128-byte lines in L1."""
    generator, trials, total = random.Random(0), 2000, 0
    for _ in range(trials):
        lanes = [generator.randrange(256) for _ in range(32)]
        if variant == "pairs through L1":
            total += len({lane // 16 for lane in lanes})
        elif variant == "pairs in shared memory":
            for half in (lanes[:16], lanes[16:]):
                total += max(Counter(lane % 16 for lane in set(half)).values())
        else:
            return 1.0
    return total / trials


def bounds(used: dict[str, float], target: int, weights: float) -> dict[str, float]:
    """Weights a clock that each pipe of a multiprocessor allows."""
    return {pipe: weights * LANES[pipe][target] / count for pipe, count in used.items() if count}


HEAD = ("SHFL", "LDS, LDG", "PRMT", "SHF, LOP3, SEL", "FMUL, FFMA", "F2FP", "all", "bound", "by")


def line(name: str, target: int, ops: Counter[str], weights: float, passes: float = 1.0) -> str:
    """Format the counts for 64 weights and the bound as a row of the table."""
    scaled = {op: count * 64 / weights for op, count in ops.items()}

    def total(pattern: str) -> str:
        return f"{sum(count for op, count in scaled.items() if re.match(pattern, op.split('.')[0] + ' ')):.0f}"

    limit = bounds(clocks(scaled.items(), passes), target, 64)
    pipe = min(limit, key=lambda key: limit[key])
    groups = ("SHFL ", "(LDS|LDSM|LDG|LDGSTS) ", "PRMT ", "(SHF|LOP3|SEL|FSEL) ", "(FMUL|FFMA) ", "F2FP ", "")
    return f"| {name} | sm_{target} | " + " | ".join(map(total, groups)) + f" | {limit[pipe]:.0f} | {pipe} |"


def kernel_loops(target: int) -> Iterable[tuple[str, Counter[str], float]]:
    """Name, main loop and weights for each thread of the package's own kernels, bfloat16, K = 4096, double quantisation."""
    arch = Arch("", target, aot.TARGETS[target][1])
    for M, N, name in ((1, 4096, "few_forward"), (16, 16384, "few_forward"), (16, 4096, "few_forward_split")):
        config: Config = get_config(name, arch, M, N, 4096, 0, 16, 64)
        with recording(arch) as launches:
            x = torch.empty(M, 4096, dtype=torch.bfloat16, device="meta")
            weight = aot._matrix(N, 4096, torch.bfloat16, "double")
            adapted_linear.forward(x, weight, N, 0, None, None, None, None, 1.0, 0.0, None, "few")
        signature = aot.signature_of(launches[0], "")
        code = aot.disassemble(aot.compile_signature(signature, target))
        yield f"{name}, {M} tokens", main_loop(code), config.BLOCK_N * config.BLOCK_K / (32 * config.num_warps)


def main() -> None:
    """Print both tables."""
    print("| way | target | " + " | ".join(HEAD) + " |\n|" + "---|" * (len(HEAD) + 2))
    for variant in VARIANTS:
        for target in TARGETS:
            ops = main_loop(compile_variant(variant, target))
            print(line(variant, target, ops, ROWS * WORDS * 8 / (32 * WARPS), conflicts(variant)))
    for target in TARGETS:
        for name, ops, weights in kernel_loops(target):
            print(line(name, target, ops, weights))


if __name__ == "__main__":
    main()

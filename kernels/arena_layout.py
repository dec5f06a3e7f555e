"""The layout of a row of an arena's table: what a slot holds and where its parts begin. Needs only Python.

An arena is a uint8 tensor that holds factors and cores; its table is int64 [slots, len(FIELDS)], a row for each slot:

    rank              R; 0 for a slot that holds nothing
    down_…, up_…      D [R, K] and U [N, R]: data, type, absmax (or exponents), absmax2, offset, block
    core_…            C [R, R]: values, type, kind, entries, bandwidth, index
    scale             s, the bits of a float32

Data, absmax, absmax2, offset, values and index are byte positions in the arena, multiples of ALIGNMENT; -1 means
absent. A type is 0 float32, 1 bfloat16, 2 float16, or the ``element_type`` of a :class:`operands.Format`. A
block is the number of weights that share a scale, 0 for a dense matrix. A kind is an index into CORE_KINDS; the bandwidth
of a banded core is d, and its diagonals are -d … d.

A slot may hold the updates of E experts, which share their rank, kinds, types, index and s: then every part but the
index is a stack, E equal pieces one after another, and the fields are those of the first.
"""

from __future__ import annotations

MATRIX_FIELDS = ("data", "type", "absmax", "absmax2", "offset", "block")
CORE_FIELDS = ("values", "type", "kind", "entries", "bandwidth", "index")
FIELDS: tuple[str, ...] = (
    "rank",
    *(f"down_{field}" for field in MATRIX_FIELDS),
    *(f"up_{field}" for field in MATRIX_FIELDS),
    *(f"core_{field}" for field in CORE_FIELDS),
    "scale",
)
FIELD = {name: index for index, name in enumerate(FIELDS)}
CORE_KINDS = ("none", "banded", "sparse", "dense")
ALIGNMENT = 64

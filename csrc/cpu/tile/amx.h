// The matrix unit: the sums of tile.h over the same pairs of bfloat16, 16 rows and 16 lanes at a time. Tiles 0 to 3 are
// accumulators, 4 and 5 hold rows of the left operand (3 to 5 for a single tile of lanes), 6 and 7 hold lanes.
#pragma once

#include "cpu/tile/tile.h"

#if defined(LOWRANK_OPS_EMULATE_AMX)
#include "amx_emulation.h" // of tests/emulation, see `make test-amx`
#endif

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int64_t kUnitsAtOnce = 16;

// Configures the tiles, with `rows` rows on the left, and releases the configuration on destruction, because other
// libraries configure the unit too.
class MatrixUnit {
public:
    explicit MatrixUnit(int rows) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i)
            config.bytes[i] = 64, config.rows[i] = uint8_t(i < 6 ? rows : 16);
        _tile_loadconfig(&config);
    }
    ~MatrixUnit() { _tile_release(); }
};

// C [rows, 2 * 16 lanes]; its rows are two tiles if `two`, else one.
LOWRANK_INLINE void matrix_tiles(bool two, int64_t units, Left left, const float* p, int64_t p_stride, float* c,
                                 int64_t c_stride, bool first) {
    float* below = c + 16 * c_stride;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if (two) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, c, c_stride * 4);
        _tile_loadd(1, c + 16, c_stride * 4);
        if (two) {
            _tile_loadd(2, below, c_stride * 4);
            _tile_loadd(3, below + 16, c_stride * 4);
        }
    }
    for (int64_t t = 0; t < units; t += kUnitsAtOnce) {
        _tile_loadd(4, left.row(0) + t * 4, left.stride);
        _tile_loadd(6, p + t * p_stride, p_stride * 4);
        _tile_loadd(7, p + t * p_stride + 16, p_stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, left.row(16) + t * 4, left.stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_stride * 4);
    _tile_stored(1, c + 16, c_stride * 4);
    if (two) {
        _tile_stored(2, below, c_stride * 4);
        _tile_stored(3, below + 16, c_stride * 4);
    }
}

// C [16 * kTiles rows, 16 lanes].
template <int kTiles>
LOWRANK_INLINE void matrix_column(int64_t units, Left left, const float* p, int64_t p_stride, float* c,
                                  int64_t c_stride, bool first) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
    } else {
        _tile_loadd(0, c, c_stride * 4);
        if (kTiles > 1)
            _tile_loadd(1, c + 16 * c_stride, c_stride * 4);
        if (kTiles > 2)
            _tile_loadd(2, c + 32 * c_stride, c_stride * 4);
    }
    for (int64_t t = 0; t < units; t += kUnitsAtOnce) {
        _tile_loadd(6, p + t * p_stride, p_stride * 4);
        _tile_loadd(3, left.row(0) + t * 4, left.stride);
        _tile_dpbf16ps(0, 3, 6);
        if (kTiles > 1) {
            _tile_loadd(4, left.row(16) + t * 4, left.stride);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (kTiles > 2) {
            _tile_loadd(5, left.row(32) + t * 4, left.stride);
            _tile_dpbf16ps(2, 5, 6);
        }
    }
    _tile_stored(0, c, c_stride * 4);
    if (kTiles > 1)
        _tile_stored(1, c + 16 * c_stride, c_stride * 4);
    if (kTiles > 2)
        _tile_stored(2, c + 32 * c_stride, c_stride * 4);
}

// C of 16, 32 or 48 rows over `vectors` vectors of lanes, operands zero up to a multiple of kUnitsAtOnce. Needs a
// MatrixUnit of 16 rows.
inline void tall_tiles_of_pairs(int64_t rows, int vectors, int64_t units, Left left, const float* p, float* c,
                                int64_t c_stride, bool first) {
    const int64_t p_stride = vectors * kLanes;
    for (int lane = 0; lane < p_stride; lane += 32)
        if (p_stride - lane >= 32) {
            matrix_tiles(rows > 16, units, left, p + lane, p_stride, c + lane, c_stride, first);
            if (rows > 32)
                matrix_tiles(false, units, {left.row(32), left.stride}, p + lane, p_stride, c + 32 * c_stride + lane,
                             c_stride, first);
        } else if (rows > 32) {
            matrix_column<3>(units, left, p + lane, p_stride, c + lane, c_stride, first);
        } else if (rows > 16) {
            matrix_column<2>(units, left, p + lane, p_stride, c + lane, c_stride, first);
        } else {
            matrix_column<1>(units, left, p + lane, p_stride, c + lane, c_stride, first);
        }
}

// C of any number of rows; `units` is a multiple of kUnitsAtOnce.
inline void wide_tiles_of_pairs(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride,
                                bool first) {
    const int64_t whole = rows & -16;
    if (whole > 0) {
        const MatrixUnit unit(16);
        for (int lane = 0; lane < kPanel; lane += 32)
            for (int64_t i = 0; i < whole; i += 32)
                matrix_tiles(whole - i >= 32, units, {left.row(i), left.stride}, p + lane, kPanel,
                             c + i * c_stride + lane, c_stride, first);
    }
    if (whole < rows) {
        const MatrixUnit unit(int(rows - whole));
        for (int lane = 0; lane < kPanel; lane += 32)
            matrix_tiles(false, units, {left.row(whole), left.stride}, p + lane, kPanel, c + whole * c_stride + lane,
                         c_stride, first);
    }
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA

// Emulates the matrix unit on a processor with AVX-512 BF16: each thread keeps its tiles in memory, and the vector
// instruction for pairs of bfloat16 computes their sums. `make test-amx` builds with it. The process ends if tiles are
// used before they are configured or exceed the configured size.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace amx_emulation {
namespace {

struct Unit {
    uint16_t bytes[8];
    uint8_t rows[8];
    uint32_t tiles[8][16][16];
    bool configured;
};

inline Unit& unit() {
    static thread_local Unit one;
    return one;
}

inline Unit& configured_unit() {
    if (!unit().configured)
        __builtin_trap();
    return unit();
}

// The processor's layout: bytes per row of each tile from byte 16 on, rows from byte 48 on.
inline void configure(const void* config) {
    const auto* bytes = static_cast<const uint8_t*>(config);
    Unit& u = unit();
    std::memcpy(u.bytes, bytes + 16, sizeof u.bytes);
    std::memcpy(u.rows, bytes + 48, sizeof u.rows);
    std::memset(u.tiles, 0, sizeof u.tiles);
    for (int t = 0; t < 8; ++t)
        if (u.rows[t] > 16 || u.bytes[t] > 64)
            __builtin_trap();
    u.configured = true;
}

inline void zero(int t) {
    std::memset(configured_unit().tiles[t], 0, sizeof unit().tiles[t]);
}

inline void load(int t, const void* from, int64_t stride) {
    zero(t);
    for (int r = 0; r < unit().rows[t]; ++r)
        std::memcpy(unit().tiles[t][r], static_cast<const char*>(from) + r * stride, unit().bytes[t]);
}

inline void store(int t, void* to, int64_t stride) {
    const Unit& u = configured_unit();
    for (int r = 0; r < u.rows[t]; ++r)
        std::memcpy(static_cast<char*>(to) + r * stride, u.tiles[t][r], u.bytes[t]);
}

inline void multiply(int c, int a, int b) {
    Unit& u = configured_unit();
    for (int m = 0; m < u.rows[c]; ++m) {
        __m512 sums = _mm512_loadu_ps(u.tiles[c][m]);
        for (int k = 0; k < u.bytes[a] / 4; ++k)
            sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32(int(u.tiles[a][m][k])),
                                    (__m512bh)_mm512_loadu_si512(u.tiles[b][k]));
        _mm512_storeu_ps(u.tiles[c][m], sums);
    }
}

} // namespace
} // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulation::configure(config)
#define _tile_release() (amx_emulation::unit().configured = false)
#define _tile_zero(t) amx_emulation::zero(t)
#define _tile_loadd(t, from, stride) amx_emulation::load(t, from, stride)
#define _tile_stored(t, to, stride) amx_emulation::store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulation::multiply(c, a, b)

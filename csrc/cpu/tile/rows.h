// Converts, pads, masks and transposes rows of floats. Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/tile/dropout.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

LOWRANK_INLINE const void* at(const Rows& rows, int64_t i, int64_t k) {
    return static_cast<const char*>(rows.data) + (i * rows.stride + k) * size_of(rows.dtype);
}

template <class T>
LOWRANK_INLINE void convert(const T* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        store(to + i, load(from + i));
    if (i < count)
        store_n(to + i, load_n(from + i, count - i), count - i);
}

// to[0 … count) = row i from column k on, masked; zeros up to `padded`.
inline void load_row(const Rows& rows, int64_t i, int64_t k, int64_t count, float* to, int64_t padded,
                     const Dropout* dropout = nullptr) {
    with_type(rows.dtype, [&](auto t) { convert(static_cast<const decltype(t)*>(at(rows, i, k)), count, to); });
    for (int64_t j = count; j < padded; ++j)
        to[j] = 0;
    if (dropout && dropout->on)
        dropout->apply(i, k, count, to);
}

// to[i] = from[i], rounded to the element type `dtype`, from element `first` of `to` on.
inline void store_row(const float* from, int64_t count, void* to, int dtype, int64_t first) {
    with_type(dtype, [&](auto t) {
        auto* out = static_cast<decltype(t)*>(to) + first;
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes)
            store(out + i, load(from + i));
        if (i < count)
            store_n(out + i, load_n(from + i, count - i), count - i);
    });
}

// to[c][r] = from[r][c] for whole squares of kLanes; both matrices are padded to multiples of kLanes.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
    for (int64_t r = 0; r < rows; r += kLanes)
        for (int64_t c = 0; c < columns; c += kLanes) {
            V square[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                square[i] = load(from + (r + i) * from_stride + c);
            transpose_square(square);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
                store(to + (c + i) * to_stride + r, square[i]);
        }
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA

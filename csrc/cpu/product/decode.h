// Rows of a frozen matrix, decoded. Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/tile/units.h"

namespace lowrank::cpu::LOWRANK_ISA {

namespace {

constexpr float kLevels[kFormats][16] = LOWRANK_LEVELS;

LOWRANK_INLINE const float* levels_of(const Matrix& w) {
    return kLevels[format_index(w.type)];
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// The scale of block b. Under double quantisation the product and the sum are each rounded (no contraction).
LOWRANK_INLINE float scale_at(const Matrix& w, int64_t b) {
    const Scales& s = w.scales;
    if (has_exponents(w.type)) {
        const uint32_t bits = exponent_bits(static_cast<const uint8_t*>(s.absmax)[b]);
        float scale;
        std::memcpy(&scale, &bits, sizeof scale);
        return scale;
    }
    if (!s.absmax2)
        return static_cast<const float*>(s.absmax)[b];
    return kDynamicCode[static_cast<const uint8_t*>(s.absmax)[b]] * s.absmax2[b / kAbsmaxBlock] + *s.offset;
}

// out[i] = scale of the elements f + i * piece …, i < pieces; f and the block size are multiples of `piece`. Writes
// whole vectors.
inline void scales_of(const Matrix& w, int64_t f, int64_t pieces, int64_t piece, float* out) {
    const Scales& s = w.scales;
    const int piece_shift = __builtin_ctzll(uint64_t(piece));
    const int shift = __builtin_ctzll(uint64_t(s.block_size)) - piece_shift;
    const int64_t first = f >> piece_shift;
    for (int64_t i = 0; i < pieces; i += kDynamicAtOnce) {
        const int64_t count = min(kDynamicAtOnce, pieces - i), group = (first + i) / kAbsmaxBlock;
        if (count > kLanes / 2 && s.absmax2 && shift == 0 && group == (first + i + count - 1) / kAbsmaxBlock) {
            V codes[kDynamicAtOnce / kLanes];
            dynamic_codes(static_cast<const uint8_t*>(s.absmax) + first + i, count, codes);
#pragma GCC unroll 2
            for (int64_t j = 0; j < kDynamicAtOnce; j += kLanes)
                if (j < count)
                    store(out + i + j, add(mul(codes[j / kLanes], set1(s.absmax2[group])), set1(*s.offset)));
        } else {
            for (int64_t j = i; j < i + count; ++j)
                out[j] = scale_at(w, (first + j) >> shift);
        }
    }
}

// ---- packed weights -------------------------------------------------------------------------------------------------

// Decodes 32 weights of one block: the table holds level * scale, rounded to T beforehand where that is cheaper.
template <class T>
struct Decoder {
    Table table;
    LOWRANK_INLINE Decoder(const Table& levels, float scale) : table(mul(levels, scale)) {}
    LOWRANK_INLINE void decode32(const uint8_t* bytes, T* out) const {
        for (int i = 0; i < 32; i += 2 * kLanes) {
            const I nibbles = load_bytes(bytes + i / 2);
            V low, high;
            interleave(lookup(table, high_nibble(nibbles)), lookup(table, nibbles), &low, &high);
            store(out + i, low);
            store(out + i + kLanes, high);
        }
    }
};

#if defined(__AVX512F__) || defined(LOWRANK_NEON)
template <>
struct Decoder<BFloat16> : WordTable {
    LOWRANK_INLINE Decoder(const Table& levels, float scale) : WordTable(words_of<BFloat16>(mul(levels, scale))) {}
};
template <>
struct Decoder<Float16> : WordTable {
    LOWRANK_INLINE Decoder(const Table& levels, float scale) : WordTable(words_of<Float16>(mul(levels, scale))) {}
};
#endif
#if defined(LOWRANK_NEON)
template <>
struct Decoder<float> : Planes {
    LOWRANK_INLINE Decoder(const Table& levels, float scale) : Planes(mul(levels, scale)) {}
};
#elif defined(LOWRANK_AVX2)
template <>
struct Decoder<float> {
    Planes levels;
    V scale;
    LOWRANK_INLINE Decoder(const Table& levels, float scale) : levels(levels), scale(set1(scale)) {}
    LOWRANK_INLINE void decode32(const uint8_t* bytes, float* out) const {
        LOWRANK_ISA::decode32(levels, scale, bytes, out);
    }
};
#endif

LOWRANK_INLINE const uint8_t* bytes_at(const Matrix& w, int64_t f) {
    return static_cast<const uint8_t*>(w.data) + f / 2;
}

// out[i] = weight f + i, i < count, all of one block; f is even.
template <class T>
inline void decode_some(const Matrix& w, int64_t f, int64_t count, T* out) {
    const Decoder<T> decoder(load_table(levels_of(w)), scale_at(w, f / w.scales.block_size));
    const uint8_t* bytes = bytes_at(w, f);
    for (; count >= 32; count -= 32, bytes += 16, out += 32)
        decoder.decode32(bytes, out);
    if (count > 0) {
        uint8_t rest[16] = {};
        T decoded[32];
        std::memcpy(rest, bytes, size_t(count + 1) / 2);
        decoder.decode32(rest, decoded);
        std::memcpy(out, decoded, size_t(count) * sizeof(T));
    }
}

// Decodes whole pieces of kPiece elements; each piece lies in one block.
template <int kPiece, class T>
inline void decode_pieces(const Matrix& w, int64_t f, int64_t pieces, T* out) {
    constexpr int64_t kAtOnce = 16;
    const Table levels = load_table(levels_of(w));
    const uint8_t* bytes = bytes_at(w, f);
    for (int64_t done = 0; done < pieces; done += kAtOnce) {
        float scale[kAtOnce];
        const int64_t now = min(kAtOnce, pieces - done);
        scales_of(w, f + done * kPiece, now, kPiece, scale);
        for (int64_t i = 0; i < now; ++i, bytes += kPiece / 2, out += kPiece) {
            const Decoder<T> decoder(levels, scale[i]);
#pragma GCC unroll 2
            for (int j = 0; j < kPiece; j += 32)
                decoder.decode32(bytes + j / 2, out + j);
        }
    }
}

// out[i] = level[nibble(f + i)] * scale((f + i) / block_size), 0 <= i < count, rounded once to T.
template <class T>
inline void decode(const Matrix& w, int64_t f, int64_t count, T* out) {
    if (count > 0 && (f & 1)) {
        const float level = levels_of(w)[nibble_at(static_cast<const uint8_t*>(w.data), f)];
        store_n(out, mul(set1(level), set1(scale_at(w, f / w.scales.block_size))), 1);
        ++f, ++out, --count;
    }
    const int64_t piece = min(w.scales.block_size, 64);
    const int64_t head = min(count, -f & (piece - 1)); // up to the first whole piece
    if (head > 0)
        decode_some(w, f, head, out);
    f += head, out += head, count -= head;
    const int64_t whole = count & -piece;
    if (piece == 64)
        decode_pieces<64>(w, f, whole / 64, out);
    else
        decode_pieces<32>(w, f, whole / 32, out);
    if (whole < count)
        decode_some(w, f + whole, count - whole, out + whole);
}

// ---- int8 -----------------------------------------------------------------------------------------------------------

// out[i] = byte[f + i] * scale((f + i) / block_size), 0 <= i < count, rounded once to T.
template <class T>
inline void decode_bytes(const Matrix& w, int64_t f, int64_t count, T* out) {
    const int64_t block_size = w.scales.block_size;
    while (count > 0) {
        const auto* bytes = static_cast<const int8_t*>(w.data) + f;
        const int64_t block = f / block_size, now = min(count, (block + 1) * block_size - f);
        const V scale = set1(scale_at(w, block));
        int64_t i = 0;
        for (; i + kLanes <= now; i += kLanes)
            store(out + i, mul(load(bytes + i), scale));
        if (i < now)
            store_n(out + i, mul(load_n(bytes + i, now - i), scale), now - i);
        f += now, out += now, count -= now;
    }
}

// ---- W --------------------------------------------------------------------------------------------------------------

// to[0 … count) = W[n, k …) rounded once to T.
template <class T>
inline void weight_row(const Matrix& w, int64_t K, int64_t n, int64_t k, int64_t count, T* to) {
    if (is_packed(w.type))
        return decode(w, n * K + k, count, to);
    if (w.type == kInt8)
        return decode_bytes(w, n * K + k, count, to);
    with_type(w.type, [&](auto t) {
        const auto* from = static_cast<const decltype(t)*>(w.data) + n * K + k;
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes)
            store(to + i, load(from + i));
        if (i < count)
            store_n(to + i, load_n(from + i, count - i), count - i);
    });
}

// to[0 … count) = W[n, k …) in float32, then zeros up to `padded`.
inline void weight_row_padded(const Matrix& w, int64_t K, int64_t n, int64_t k, int64_t count, float* to,
                              int64_t padded) {
    weight_row(w, K, n, k, count, to);
    for (int64_t j = count; j < padded; ++j)
        to[j] = 0;
}

// Prefetches the bytes of W[n, k … k + count).
LOWRANK_INLINE void prefetch_weight(const Matrix& w, int64_t K, int64_t n, int64_t k, int64_t count) {
    const int64_t first = n * K + k;
    const char* data = static_cast<const char*>(w.data);
    const bool packed = is_packed(w.type);
    const int64_t begin = packed ? first / 2 : first * size_of(w.type);
    const int64_t bytes = packed ? count / 2 : count * size_of(w.type);
    for (int64_t b = 0; b < bytes; b += 64)
        __builtin_prefetch(data + begin + b);
}

// True if a product of many tokens takes the columns of W [., K] in the order of order_fours.
template <class Units>
LOWRANK_INLINE bool in_fours(const Matrix& w, int64_t K) {
    if constexpr (Units::kPerUnit == 2)
        return is_packed(w.type) && w.scales.block_size >= 64 && K % max(Units::kFours, 64) == 0;
    return false;
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA

// Rounding to 4 bits that weighs the error by a second moment of the inputs; reference/rounding.py has the equations.
// Compiled once per instruction set. Rows are independent: a thread takes panels of rows, whose columns lie one after
// the other with the rows as lanes, so that neither threads nor other rows change a row's bits.
#include "cpu/product/decode.h"
#include "cpu/runtime/isa.h"

#include <cfloat>
#include <cmath>

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

constexpr int64_t kRows = 64;           // of a panel
constexpr int64_t kTile = 4;            // columns of a tile of the product
constexpr int64_t kColumns = 64;        // columns that are rounded one by one between two products
constexpr int64_t kDepth = 128;         // columns of the sum whose errors stay in the first cache
constexpr int64_t kLargestChosen = 128; // blocks up to this size have their scales chosen again
constexpr int kFractions = 18;
constexpr float kScaleStep = 1.0f / 64;
constexpr int kLargestUsedExponent = 252; // larger ones reach infinity in float32
constexpr int64_t kBlocksOfTask = 256;

// ---- levels ---------------------------------------------------------------------------------------------------------

// The levels of a format by rank: the rank of the level nearest to a number is the number of thresholds below it.
struct Codes {
    Table level, nibble, threshold; // nibbles are stored as the bits of floats
    float middle;
    uint8_t nibble_of[16], rank_of[16];

    explicit Codes(int format) {
        float ascending[16], thresholds[16] = {}, nibbles[16];
        int32_t order[16];
        for (int i = 0; i < 16; ++i) {
            const float level = kLevels[format_index(format)][i];
            int at = i;
            for (; at > 0 && ascending[at - 1] > level; --at)
                ascending[at] = ascending[at - 1], order[at] = order[at - 1];
            ascending[at] = level, order[at] = i;
        }
        for (int i = 0; i < 16; ++i)
            nibble_of[i] = uint8_t(order[i]), rank_of[order[i]] = uint8_t(i);
        for (int i = 0; i < 15; ++i)
            thresholds[i] = (ascending[i] + ascending[i + 1]) / 2;
        std::memcpy(nibbles, order, sizeof nibbles);
        level = load_table(ascending), nibble = load_table(nibbles), threshold = load_table(thresholds);
        middle = thresholds[7];
    }

    LOWRANK_INLINE I nearest(V v) const {
        I i = step_where_below(zero_int(), 8, set1(middle), v);
        i = step_where_below(i, 4, lookup(threshold, plus(i, 3)), v);
        i = step_where_below(i, 2, lookup(threshold, plus(i, 1)), v);
        return step_where_below(i, 1, lookup(threshold, i), v);
    }
};

LOWRANK_INLINE float inverse_of(float scale) {
    return std::fabs(scale) < 1e-38f ? 0.0f : 1.0f / scale;
}

LOWRANK_INLINE void store_codes(uint8_t* p, I codes) {
    int32_t lanes[kLanes];
    store_int(lanes, codes);
    for (int i = 0; i < kLanes; ++i)
        p[i] = uint8_t(lanes[i]);
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// sum of h (w - q)^2 over a block, q nearest to w for this scale.
LOWRANK_INLINE float block_error(const Codes& codes, const float* w, const float* h, int64_t count, float scale) {
    const V s = set1(scale), inverse = set1(inverse_of(scale));
    V sum = zero();
    int64_t i = 0;
    const auto add_error = [&](V v, V weight) {
        const V d = sub(v, mul(s, lookup(codes.level, codes.nearest(mul(v, inverse)))));
        sum = fma(mul(d, d), weight, sum);
    };
    for (; i + kLanes <= count; i += kLanes)
        add_error(load(w + i), load(h + i));
    if (i < count)
        add_error(load_n(w + i, count - i), load_n(h + i, count - i));
    return reduce_add(sum);
}

float largest_of(const float* w, int64_t count) {
    float most = 0;
    for (int64_t i = 0; i < count; ++i)
        most = std::fabs(w[i]) > most ? std::fabs(w[i]) : most;
    return most;
}

void search_block(const Codes& codes, int format, const float* w, const float* h, int64_t count, int64_t block,
                  void* scales) {
    const float most = largest_of(w, count);
    float least = INFINITY;
    if (has_exponents(format)) {
        int32_t bits;
        std::memcpy(&bits, &most, sizeof bits);
        const int usual = int(min(max((bits >> 23) - kLargestExponent, 0), kLargestUsedExponent));
        uint8_t& best = static_cast<uint8_t*>(scales)[block];
        constexpr int kSteps[3] = {0, -1, 1};
        for (int step : kSteps) {
            const int exponent = int(min(max(usual + step, 0), kLargestUsedExponent));
            const uint32_t scale_bits = exponent_bits(uint8_t(exponent));
            float scale;
            std::memcpy(&scale, &scale_bits, sizeof scale);
            const float error = block_error(codes, w, h, count, scale);
            if (error < least)
                least = error, best = uint8_t(exponent);
        }
        return;
    }
    float& best = static_cast<float*>(scales)[block];
    best = most * 1.06f;
    for (int i = 0; i < kFractions; ++i) {
        const float scale = most * (float(106 - 3 * i) / 100.0f);
        const float error = block_error(codes, w, h, count, scale);
        if (error < least)
            least = error, best = scale;
    }
}

void search_scales(int format, const float* w, int64_t N, int64_t K, const float* importance, int64_t block_size,
                   void* scales, int threads) {
    const int64_t numel = N * K, blocks = ceil_div(numel, block_size);
    const Codes codes(format);
    parallel_for(threads, ceil_div(blocks, kBlocksOfTask), [&](int64_t task) {
        const Scratch scratch;
        float* wrapped = scratch.take<float>(block_size);
        for (int64_t b = task * kBlocksOfTask; b < min(blocks, (task + 1) * kBlocksOfTask); ++b) {
            const int64_t f = b * block_size, count = min(block_size, numel - f), k = f % K;
            const float* h = importance + k;
            if (k + count > K) { // the block runs into the next row
                for (int64_t i = 0; i < count; ++i)
                    wrapped[i] = importance[(k + i) % K];
                h = wrapped;
            }
            search_block(codes, format, w + f, h, count, b, scales);
        }
    });
}

void round_nearest(const float* w, int64_t numel, Matrix matrix, int threads) {
    const Codes codes(matrix.type);
    const int64_t block_size = matrix.scales.block_size, blocks = ceil_div(numel, block_size);
    uint8_t* packed = static_cast<uint8_t*>(const_cast<void*>(matrix.data));
    parallel_for(threads, ceil_div(blocks, kBlocksOfTask), [&](int64_t task) {
        constexpr int64_t kGroup = 32;
        for (int64_t b = task * kBlocksOfTask; b < min(blocks, (task + 1) * kBlocksOfTask); ++b) {
            const V inverse = set1(inverse_of(scale_at(matrix, b)));
            const int64_t last = min(numel, (b + 1) * block_size);
            for (int64_t f = b * block_size; f < last; f += kGroup) {
                const int64_t count = min(kGroup, last - f);
                float padded[kGroup] = {};
                std::memcpy(padded, w + f, size_t(count) * sizeof(float));
                I nibbles[kGroup / kLanes];
                for (int j = 0; j < kGroup / kLanes; ++j) {
                    const V v = load(static_cast<const float*>(padded) + j * kLanes);
                    nibbles[j] = bits_abs(lookup(codes.nibble, codes.nearest(mul(v, inverse))));
                }
                uint8_t bytes[kGroup / 2];
                store_nibbles(bytes, nibbles);
                std::memcpy(packed + f / 2, bytes, size_t(count + 1) / 2);
            }
        }
    });
}

// ---- products -------------------------------------------------------------------------------------------------------

// Tile t of a matrix A [K, K] holds columns 4t … 4t + 3 as [K][4], divided by their diagonal if that is wanted, and
// zeros past the last column; only the rows up to the end of the chunk if A is triangular.
void pack_tiles(const float* a, int64_t K, bool triangular, float* tiles, int threads) {
    parallel_for(threads, ceil_div(K, kTile), [&](int64_t tile) {
        const int64_t k = tile * kTile, columns = min(kTile, K - k);
        const int64_t last = triangular ? min(K, round_up(k + 1, kColumns)) : K;
        float* to = tiles + k * K;
        for (int64_t j = 0; j < last; ++j)
            for (int64_t i = 0; i < kTile; ++i)
                to[j * kTile + i] = i >= columns ? 0
                                    : triangular ? a[j * K + k + i] / a[(k + i) * (K + 1)]
                                                 : a[j * K + k + i];
    });
}

// out[i][rows] += sum over first <= j < last of tile[j][i] error[j][rows], i < 4.
LOWRANK_INLINE void add_tile(const float* tile, const float* error, int64_t first, int64_t last, float* out) {
    constexpr int kVectors = kRegisters == 32 ? 4 : 2;
    for (int64_t r = 0; r < kRows; r += kVectors * kLanes) {
        V sum[kTile][kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                sum[i][v] = load(static_cast<const float*>(out) + i * kRows + r + v * kLanes);
        for (int64_t j = first; j < last; ++j) {
            V e[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                e[v] = load(error + j * kRows + r + v * kLanes);
#pragma GCC unroll 4
            for (int i = 0; i < kTile; ++i) {
                const V a = set1(tile[j * kTile + i]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    sum[i][v] = fma(a, e[v], sum[i][v]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                store(out + i * kRows + r + v * kLanes, sum[i][v]);
    }
}

// out[k - begin][rows] += sum over first <= j < last of A[j, k] error[j][rows], begin <= k < end; begin is a multiple
// of the tile, and out has room for whole tiles.
void add_product(const float* tiles, int64_t K, const float* error, int64_t first, int64_t last, int64_t begin,
                 int64_t end, float* out) {
    for (int64_t j = first; j < last; j += kDepth)
        for (int64_t k = begin; k < end; k += kTile)
            add_tile(tiles + k * K, error, j, min(last, j + kDepth), out + (k - begin) * kRows);
}

// ---- a panel of rows ------------------------------------------------------------------------------------------------

struct Problem {
    int64_t N, K;
    const float* w;
    Matrix matrix; // its codes and scales are rewritten in place
    const float *factor, *moment;
    const int32_t* order;
    const float *coupling, *moments; // tiles
    bool choose;
    int64_t passes;
    double* errors; // [3][N]: before, fed back, at the end
};

// Rows n … n + kRows of W as [K][kRows]; rows past the last are zeros with scale zero.
struct Panel {
    const Problem& p;
    const Codes& codes;
    int64_t n, rows;
    bool whole;            // blocks do not straddle rows
    float *w, *error;      // [K][kRows]
    float* scale;          // [blocks of a row][kRows], or [K][kRows] if they straddle rows
    uint8_t *code, *other; // [K][kRows], ranks
    float* work;           // [kLargestChosen][kRows]

    Panel(const Problem& p, const Codes& codes, int64_t n, const Scratch& scratch)
        : p(p), codes(codes), n(n), rows(min(kRows, p.N - n)), whole(p.K % p.matrix.scales.block_size == 0) {
        const int64_t size = p.K * kRows;
        w = scratch.take<float>(size), error = scratch.take<float>(size);
        scale = scratch.take<float>(whole ? p.K / p.matrix.scales.block_size * kRows : size);
        code = scratch.take<uint8_t>(size), other = scratch.take<uint8_t>(size);
        work = scratch.take<float>(kLargestChosen * kRows);
        std::memset(w, 0, size_t(size) * sizeof(float));
        std::memset(code, codes.rank_of[0], size_t(size));
        const uint8_t* packed = static_cast<const uint8_t*>(p.matrix.data);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = 0; k < p.K; ++k) {
                w[k * kRows + r] = p.w[(n + r) * p.K + k];
                code[k * kRows + r] = codes.rank_of[nibble_at(packed, (n + r) * p.K + k)];
            }
        load_scales();
    }

    void load_scales() {
        const int64_t block_size = p.matrix.scales.block_size, count = whole ? p.K / block_size : p.K;
        for (int64_t b = 0; b < count; ++b)
            for (int64_t r = 0; r < kRows; ++r) {
                const int64_t f = (n + r) * p.K + (whole ? b * block_size : b);
                scale[b * kRows + r] = r < rows ? scale_at(p.matrix, f / block_size) : 0;
            }
    }

    LOWRANK_INLINE const float* scale_of(int64_t k) const {
        return scale + (whole ? k / p.matrix.scales.block_size : k) * kRows;
    }

    // q of column k, rows r …, by its rank.
    LOWRANK_INLINE V level(const float* s, const uint8_t* rank) const {
        return mul(load(s), lookup(codes.level, load_bytes(rank)));
    }

    // The weighted errors of the rows, as the sum of (R_kk (E_k + sum of E_j R_jk / R_kk over j < k))^2. With kFeed
    // each code is chosen here, after a correction for the errors before it, and written to `other`; without, E is the
    // error of `code`.
    template <bool kFeed>
    void triangle(double* total) {
        for (int64_t r = 0; r < kRows; ++r)
            total[r] = 0;
        for (int64_t first = 0; first < p.K; first += kColumns) {
            const int64_t last = min(p.K, first + kColumns);
            std::memset(work, 0, kColumns * kRows * sizeof(float));
            add_product(p.coupling, p.K, error, 0, first, first, last, work);
            for (int64_t r = 0; r < kRows; r += kLanes) {
                V sum = zero();
                for (int64_t k = first; k < last; ++k) {
                    const int64_t column = p.order[k], at = column * kRows + r;
                    const float* s = scale_of(column) + r;
                    float* correction = work + (k - first) * kRows + r;
                    const V weight = load(static_cast<const float*>(w) + at),
                            c = load(static_cast<const float*>(correction));
                    V e;
                    if constexpr (kFeed) {
                        float inverse[kLanes];
                        for (int i = 0; i < kLanes; ++i)
                            inverse[i] = inverse_of(s[i]);
                        const I rank = codes.nearest(mul(add(weight, c), load(static_cast<const float*>(inverse))));
                        store_codes(other + at, rank);
                        e = sub(weight, mul(load(s), lookup(codes.level, rank)));
                    } else
                        e = sub(weight, level(s, code + at));
                    store(error + k * kRows + r, e);
                    const V d = mul(add(e, c), set1(p.factor[k * (p.K + 1)]));
                    sum = fma(d, d, sum);
                    // Row k of A within the chunk, tile by tile.
                    for (int64_t j = k + 1; j < last; ++j) {
                        float* next = work + (j - first) * kRows + r;
                        const float a = p.coupling[j / kTile * kTile * p.K + k * kTile + j % kTile];
                        store(next, fma(set1(a), e, load(static_cast<const float*>(next))));
                    }
                }
                float sums[kLanes];
                store(sums, sum);
                for (int i = 0; i < kLanes; ++i)
                    total[r + i] += double(sums[i]);
            }
        }
    }

    void feed_back(double* before, double* after) {
        triangle<true>(after);
        for (int64_t r = 0; r < kRows; ++r)
            if (!(after[r] < before[r]))
                after[r] = before[r];
            else
                for (int64_t k = 0; k < p.K; ++k)
                    code[k * kRows + r] = other[k * kRows + r];
    }

    // One block of columns, rounded for given scales.
    struct Try {
        float scale[kRows], inverse[kRows], start[kRows], cost[kRows];
        float *error, *slope; // [block][kRows]
        uint8_t* code;
    };

    // Takes the columns first … last one after the other, each the best for the others as they are. `outside` is
    // sum of E_j H_jk over j outside of the block.
    void round_block(int64_t first, int64_t last, const float* outside, bool one_scale, Try& t) {
        for (int64_t k = first; k < last; ++k)
            for (int64_t r = 0; r < kRows; r += kLanes) {
                const int64_t at = (k - first) * kRows + r;
                const float* s = one_scale ? t.scale + r : scale_of(k) + r;
                std::memcpy(t.code + at, code + k * kRows + r, kLanes);
                store(t.error + at, sub(load(static_cast<const float*>(w) + k * kRows + r), level(s, t.code + at)));
                store(t.slope + at, load(outside + at));
            }
        const int64_t width = last - first;
        // The block's own part of H starts at row `first` of its tiles.
        for (int64_t k = first; k < last; k += kTile)
            add_tile(p.moments + k * p.K + first * kTile, t.error, 0, width, t.slope + (k - first) * kRows);
        for (int64_t r = 0; r < kRows; r += kLanes) {
            const auto cost = [&](float* to) {
                V sum = zero();
                for (int64_t i = 0; i < width; ++i) {
                    const int64_t at = i * kRows + r;
                    const V both = add(load(static_cast<const float*>(t.slope) + at), load(outside + at));
                    sum = fma(load(static_cast<const float*>(t.error) + at), both, sum);
                }
                store(to + r, sum);
            };
            cost(t.start);
            for (int64_t k = first; k < last; ++k) {
                const int64_t at = (k - first) * kRows + r;
                const float* row = p.moment + k * p.K;
                const float* s = one_scale ? t.scale + r : scale_of(k) + r;
                float inverse[kLanes];
                if (!one_scale)
                    for (int i = 0; i < kLanes; ++i)
                        inverse[i] = inverse_of(s[i]);
                const V before = load(static_cast<const float*>(t.error) + at);
                const V weight = load(static_cast<const float*>(w) + k * kRows + r);
                const V slope = load(static_cast<const float*>(t.slope) + at);
                const V target = fma(slope, set1(1.0f / row[k]), sub(weight, before));
                const I rank =
                    codes.nearest(mul(target, load(one_scale ? t.inverse + r : static_cast<const float*>(inverse))));
                const V e = sub(weight, mul(load(s), lookup(codes.level, rank))), change = sub(e, before);
                store_codes(t.code + at, rank);
                store(t.error + at, e);
                for (int64_t j = first; j < last; ++j) {
                    float* next = t.slope + (j - first) * kRows + r;
                    store(next, fma(set1(row[j]), change, load(static_cast<const float*>(next))));
                }
            }
            cost(t.cost);
        }
    }

    // The scale of block b of row r that is `step` steps larger, stored into `bytes` as the matrix stores it.
    float stepped(int64_t b, int step, void* bytes) const {
        const Scales& scales = p.matrix.scales;
        if (has_exponents(p.matrix.type) || scales.absmax2) {
            const int most = has_exponents(p.matrix.type) ? kLargestUsedExponent : 255;
            const int old = static_cast<const uint8_t*>(scales.absmax)[b];
            const uint8_t index = uint8_t(min(max(old + step, 0), most));
            *static_cast<uint8_t*>(bytes) = index;
            if (has_exponents(p.matrix.type)) {
                const uint32_t bits = exponent_bits(index);
                float scale;
                std::memcpy(&scale, &bits, sizeof scale);
                return scale;
            }
            return kDynamicCode[index] * scales.absmax2[b / kAbsmaxBlock] + *scales.offset;
        }
        const float scale = static_cast<const float*>(scales.absmax)[b] * (1.0f + float(step) * kScaleStep);
        std::memcpy(bytes, &scale, sizeof scale);
        return scale;
    }

    // One pass over all columns; `total` follows the weighted errors of the rows.
    void descend(double* total) {
        const Scratch scratch;
        const int64_t block_size = p.matrix.scales.block_size, chunk = p.choose ? block_size : kColumns;
        const int tries = p.choose ? 3 : 1;
        Try* const t = scratch.take<Try>(3);
        for (int i = 0; i < tries; ++i) {
            t[i].error = scratch.take<float>(round_up(chunk, kTile) * kRows);
            t[i].slope = scratch.take<float>(round_up(chunk, kTile) * kRows);
            t[i].code = scratch.take<uint8_t>(chunk * kRows);
        }
        for (int64_t k = 0; k < p.K; ++k)
            for (int64_t r = 0; r < kRows; r += kLanes)
                store(error + k * kRows + r, sub(load(static_cast<const float*>(w) + k * kRows + r),
                                                 level(scale_of(k) + r, code + k * kRows + r)));
        for (int64_t first = 0; first < p.K; first += chunk) {
            const int64_t last = min(p.K, first + chunk), blocks = p.K / block_size;
            std::memset(work, 0, size_t(round_up(last - first, kTile) * kRows) * sizeof(float));
            add_product(p.moments, p.K, error, 0, first, first, last, work);
            add_product(p.moments, p.K, error, last, p.K, first, last, work);
            float kept[3][kRows] = {}; // the scales as they are stored
            constexpr int kSteps[3] = {0, -1, 1};
            for (int i = 0; i < tries; ++i) {
                if (p.choose)
                    for (int64_t r = 0; r < kRows; ++r) {
                        const int64_t b = (n + r) * blocks + first / block_size;
                        t[i].scale[r] = r < rows ? stepped(b, kSteps[i], &kept[i][r]) : 0;
                        t[i].inverse[r] = inverse_of(t[i].scale[r]);
                    }
                round_block(first, last, work, p.choose, t[i]);
            }
            for (int64_t r = 0; r < rows; ++r) {
                int best = 0;
                for (int i = 1; i < tries; ++i)
                    if (t[i].cost[r] < t[best].cost[r])
                        best = i;
                total[r] += double(t[best].cost[r]) - double(t[0].start[r]);
                for (int64_t k = first; k < last; ++k) {
                    code[k * kRows + r] = t[best].code[(k - first) * kRows + r];
                    error[k * kRows + r] = t[best].error[(k - first) * kRows + r];
                }
                if (p.choose) {
                    const int64_t size = has_exponents(p.matrix.type) || p.matrix.scales.absmax2 ? 1 : 4;
                    char* stored = static_cast<char*>(const_cast<void*>(p.matrix.scales.absmax));
                    std::memcpy(stored + ((n + r) * blocks + first / block_size) * size, &kept[best][r], size_t(size));
                    scale[first / block_size * kRows + r] = t[best].scale[r];
                }
            }
        }
    }

    // Panels begin at whole bytes, because kRows is even.
    void store_packed() const {
        uint8_t* packed = static_cast<uint8_t*>(const_cast<void*>(p.matrix.data));
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = 0; k < p.K; ++k) {
                const int64_t f = (n + r) * p.K + k;
                const uint8_t nibble = codes.nibble_of[code[k * kRows + r]];
                uint8_t& byte = packed[f / 2];
                byte = f & 1 ? uint8_t((byte & 0xf0) | nibble) : uint8_t((byte & 0x0f) | nibble << 4);
            }
    }
};

void weighted_errors(int64_t N, int64_t K, const float* w, Matrix matrix, const float* factor, const int32_t* order,
                     float* work, double* errors, int threads) {
    pack_tiles(factor, K, true, work, threads);
    const Codes codes(matrix.type);
    const Problem problem = {.N = N,
                             .K = K,
                             .w = w,
                             .matrix = matrix,
                             .factor = factor,
                             .moment = nullptr,
                             .order = order,
                             .coupling = work,
                             .moments = nullptr,
                             .choose = false,
                             .passes = 0,
                             .errors = errors};
    parallel_for(threads, ceil_div(N, kRows), [&](int64_t task) {
        const Scratch scratch;
        Panel panel(problem, codes, task * kRows, scratch);
        double total[kRows];
        panel.triangle<false>(total);
        std::memcpy(errors + task * kRows, total, size_t(panel.rows) * sizeof(double));
    });
}

void round_weighted(const RoundWeighted& a) {
    float* const moments = a.work + round_up(a.K, kTile) * a.K;
    pack_tiles(a.factor, a.K, true, a.work, a.threads);
    if (a.passes > 0)
        pack_tiles(a.moment, a.K, false, moments, a.threads);
    const Codes codes(a.matrix.type);
    const int64_t block_size = a.matrix.scales.block_size;
    const Problem problem = {.N = a.N,
                             .K = a.K,
                             .w = a.w,
                             .matrix = a.matrix,
                             .factor = a.factor,
                             .moment = a.moment,
                             .order = a.order,
                             .coupling = a.work,
                             .moments = moments,
                             .choose = a.choose && a.K % block_size == 0 && block_size <= kLargestChosen,
                             .passes = a.passes,
                             .errors = a.errors};
    parallel_for(a.threads, ceil_div(a.N, kRows), [&](int64_t task) {
        const Scratch scratch;
        Panel panel(problem, codes, task * kRows, scratch);
        double before[kRows] = {}, total[kRows];
        double* const errors = a.errors + task * kRows;
        const size_t bytes = size_t(panel.rows) * sizeof(double);
        std::memcpy(before, errors, bytes);
        panel.feed_back(before, total);
        std::memcpy(errors + a.N, total, bytes);
        for (int64_t pass = 0; pass < a.passes; ++pass)
            panel.descend(total);
        std::memcpy(errors + 2 * a.N, total, bytes);
        panel.store_packed();
    });
}

} // namespace

extern const RoundingKernels rounding_kernels = {search_scales, round_nearest, weighted_errors, round_weighted};

} // namespace lowrank::cpu::LOWRANK_ISA

// Units of 32 bits, which the operands of a tile consist of, and the choice of a unit for a product. Included by files
// that are compiled once per instruction set.
#pragma once

#include "cpu/tile/floats.h"
#include "cpu/tile/tile.h"
#include "cpu/tile/word_levels.h"
#if defined(__AVX512BF16__)
#include "cpu/tile/bf16_pairs.h"
#elif defined(LOWRANK_NEON_PAIRS)
#include "cpu/tile/neon_pairs.h"
#endif
#if defined(__AMX_BF16__)
#include "cpu/tile/amx.h"
#endif
#if defined(__AVX2__)
#include "cpu/tile/words.h"
#elif defined(LOWRANK_NEON)
#include "cpu/tile/neon_words.h"
#endif

#include <concepts>

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

// ---- the contract ---------------------------------------------------------------------------------------------------

// A tile sums l * p + c over units: `lanes(p, i)` are kLanes units of the packed right operand, and `i` < kLeft numbers
// the parts of a unit that `multiply_add` takes one after the other, each with its own 32 bits on the left.
template <class Units>
concept Multiplies = requires(const float* p, V v) {
    { Units::kLeft } -> std::convertible_to<int>; // 32-bit numbers on the left for a unit on the right
    Units::multiply_add(v, Units::lanes(p, 0), Units::multiply_add(v, v, v));
};

// The units that a product packs its operands into. A unit holds kPerUnit elements of neighbouring t: rows of W are
// decoded to `Element`, and `units_of(row, next, to)` makes kLanes units of one t from the rows t * kPerUnit and the
// next.
template <class Units>
concept UnitsOfProducts =
    Multiplies<Units> && Units::kLeft == 1 && Units::kPerUnit * sizeof(typename Units::Element) == sizeof(float) &&
    requires(const typename Units::Element* row, float* to) { Units::units_of(row, row, to); };

// Units of two also take columns in the order of fours, in groups of kFours, in which packed weights are decoded
// without a shuffle (from levels, bytes and a scale for every 64 columns): `decode_fours` makes the left operand,
// `pack_fours` the right one from two rows, `unpack_fours` restores the order of columns, and `order_fours` brings
// other numbers into the order. `split`, for a matrix unit, makes three parts of type Element of a float32. `Levels`
// decodes weights for few tokens. `WithFloats` multiplies the same right operand by float32 on the left.
template <class Units>
concept UnitsOfTwo = UnitsOfProducts<Units> && Units::kPerUnit == 2 && Multiplies<typename Units::WithFloats> &&
                     Units::WithFloats::kLeft == 2 && Units::kFours % (8 * kLanes) == 0 &&
                     requires(const float* f, float* to, const uint8_t* bytes, typename Units::Element* e) {
                         Units::decode_fours(f, bytes, f, int64_t(1), e);
                         Units::pack_fours(f, bytes, bytes, f, f, int64_t(1), int64_t(1), to);
                         Units::unpack_fours(to, int64_t(1));
                         Units::order_fours(e, int64_t(1), e);
                         Units::order_fours(f, int64_t(1), to);
                         requires std::constructible_from<typename Units::Levels, int, const float*>;
                         Units::template load_words<true>(bytes);
                     };

// Units of whole numbers, kColumns of which share a step. `Levels` decodes weights to four vectors, whose columns
// `column_of` tells, and `dot` multiplies them. `quantise` makes the words of a token, or returns 0 where they would be
// too coarse.
template <class Units>
concept UnitsOfWords = Units::kColumns % 64 == 0 && Units::column_of(0) == 0 &&
                       requires(const float* f, const uint8_t* bytes, int16_t* words, I* vectors, V v, int type,
                                const typename Units::Levels& levels) {
                           levels.template decode<false>(bytes, vectors);
                           add(Units::dot(vectors, words), v);
                           { Units::quantise(f, type, words) } -> std::convertible_to<float>;
                       };

// The same for many tokens: `Coarse` decodes kColumns in order, `Scaled` packs rows of W whose scales differ, and
// `tile` sums kSummed units in 32 bits.
template <class Units>
concept UnitsOfManyWords =
    UnitsOfWords<Units> && Units::kColumns % (2 * Units::kSummed) == 0 && Units::column_of_unit(0) == 0 &&
    requires(const float* f, float* to, const uint8_t* bytes, int16_t* words, const typename Units::Coarse& coarse,
             const typename Units::Scaled& scaled, const uint8_t* const (&rows)[2], const int16_t* const (&ratios)[2]) {
        coarse.decode(bytes, words);
        scaled.pack(rows, ratios, int64_t(1), to);
        Units::template tile<1, 1, 1>(int64_t(1), f, int64_t(1), f, f, f, int64_t(1), to, int64_t(1));
    };

// ---- the choice -----------------------------------------------------------------------------------------------------

static_assert(UnitsOfProducts<Floats>);
#if defined(__AVX512BF16__) || defined(LOWRANK_NEON_PAIRS)
static_assert(UnitsOfTwo<Pairs>);
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
using Pairs = Floats;
#endif

#if defined(__AVX2__) || defined(LOWRANK_NEON)
static_assert(UnitsOfWords<Words>);
constexpr bool kHasWords = true;
#else
constexpr bool kHasWords = false;
struct Words {
    static constexpr int64_t kColumns = 0;
};
#endif
// For many tokens, words pay where a sum of words takes no more instructions than a sum of floats: the addition is a
// part of the multiplication (VNNI), or it runs beside the multiplications (AVX2). SMLAL multiplies as many as FMLA.
#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
static_assert(UnitsOfManyWords<Words>);
constexpr bool kManyWords = true;
#else
constexpr bool kManyWords = false;
#endif

#if defined(__AMX_BF16__)
constexpr bool kHasMatrixUnit = true;
static_assert(requires(V v, const int (&parts)[3], Pairs::Element* e) {
    Pairs::split(v, int64_t(1), parts, e, int64_t(1));
});
#else
constexpr bool kHasMatrixUnit = false;

class MatrixUnit {
public:
    explicit MatrixUnit(int) {}
};

#if !defined(LOWRANK_NEON_PAIRS)
constexpr int64_t kUnitsAtOnce = 1;

inline void tall_tiles_of_pairs(int64_t rows, int vectors, int64_t units, Left left, const float* p, float* c,
                                int64_t c_stride, bool first) {
    tall_tiles<Pairs>(rows, vectors, units, left.data, p, c, c_stride, first);
}

inline void wide_tiles_of_pairs(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride,
                                bool first) {
    wide_tiles<Pairs>(rows, units, left, p, c, c_stride, first);
}
#endif
#endif

// The contract of the matrix unit and of its substitute: operands are zero up to a multiple of kUnitsAtOnce, and
// tall_tiles_of_pairs is called during the life of a MatrixUnit of 16 rows.
static_assert(std::constructible_from<MatrixUnit, int> && kUnitsAtOnce > 0);

bool use_pairs(int dtype) {
    return kHasPairs && dtype == kBFloat16;
}

// Calls body(units) with the units of a product whose tokens are of `dtype`.
template <class Body>
LOWRANK_INLINE void with_units(int dtype, const Body& body) {
    if (use_pairs(dtype))
        body(Pairs{});
    else
        body(Floats{});
}

// tall_tiles for either kind of unit.
template <class Units>
LOWRANK_INLINE void tall(int64_t rows, int vectors, int64_t units, const float* left, int64_t stride, const float* p,
                         float* c, int64_t c_stride, bool first) {
    if constexpr (Units::kPerUnit == 2)
        tall_tiles_of_pairs(rows, vectors, units, {left, stride * 4}, p, c, c_stride, first);
    else
        tall_tiles<Units>(rows, vectors, units, left, p, c, c_stride, first);
}

// wide_tiles for either kind of unit.
template <class Units>
LOWRANK_INLINE void wide(int64_t rows, int64_t units, Left left, const float* p, float* c, int64_t c_stride,
                         bool first) {
    if constexpr (Units::kPerUnit == 2)
        wide_tiles_of_pairs(rows, units, left, p, c, c_stride, first);
    else
        wide_tiles<Units>(rows, units, left, p, c, c_stride, first);
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA

// Checks of operands that hold positions. Compiled with baseline flags.
#include "cpu/runtime/checks.h"

#include <limits>
#include <vector>

namespace lowrank::cpu {

namespace {

// Starts rise from 0 to `entries`.
bool starts_fit(const int32_t* starts, int64_t R, int64_t entries) {
    for (int64_t i = 0; i < R; ++i)
        if (starts[i] > starts[i + 1])
            return false;
    return starts[0] == 0 && starts[R] == entries;
}

// Numbers from 0 to end - 1.
bool within(const int32_t* numbers, int64_t count, int64_t end) {
    bool fits = true;
    for (int64_t i = 0; i < count; ++i)
        fits &= numbers[i] >= 0 && numbers[i] < end;
    return fits;
}

bool index_fits(const int32_t* index, int64_t R, int64_t entries) {
    const int32_t *columns = index + R + 1, *column_start = columns + entries, *rows = column_start + R + 1;
    return starts_fit(index, R, entries) && within(columns, entries, R) && starts_fit(column_start, R, entries) &&
           within(rows, entries, R) && within(rows + entries, entries, entries);
}

// a * b; the largest number in place of one that is too large.
int64_t times(int64_t a, int64_t b) {
    int64_t product;
    return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}

int64_t ceil_div(int64_t a, int64_t b) {
    return a / b + (a % b != 0);
}

bool is_dense(int64_t type) {
    return type == kFloat32 || type == kBFloat16 || type == kFloat16;
}

int64_t size_of(int64_t type) {
    return type == kFloat32 ? 4 : 2;
}

struct Arena {
    const char* memory;
    int64_t bytes, E;

    // E pieces of `count` elements begin at a position.
    bool holds(int64_t position, int64_t count, int64_t size, int64_t experts) const {
        return position >= 0 && position % 64 == 0 && position <= bytes &&
               times(times(count, size), experts) <= bytes - position;
    }

    bool holds(const ArenaMatrix& m, int64_t rows, int64_t columns) const {
        const int64_t numel = times(rows, columns);
        if (is_dense(m.type))
            return holds(m.data, numel, size_of(m.type), E);
        if (!is_packed(m.type))
            return false;
        const bool power_of_two = m.block >= 32 && m.block <= 4096 && (m.block & (m.block - 1)) == 0;
        if (!power_of_two || (has_exponents(m.type) && (m.block != 32 || m.absmax2 >= 0)))
            return false;
        const int64_t blocks = ceil_div(numel, m.block);
        if (!holds(m.data, ceil_div(numel, 2), 1, E))
            return false;
        if (m.absmax2 < 0)
            return holds(m.absmax, blocks, has_exponents(m.type) ? 1 : 4, E);
        return holds(m.absmax, blocks, 1, E) && holds(m.absmax2, ceil_div(blocks, 256), 4, E) &&
               holds(m.offset, 1, 4, E);
    }

    bool holds(const ArenaCore& c, int64_t R) const {
        if (c.kind == kNoCore)
            return true;
        if (c.kind < 0 || c.kind > kDense || !is_dense(c.type) || c.entries < 1 || c.entries > times(R, R) ||
            !holds(c.values, c.entries, size_of(c.type), E))
            return false;
        if (c.kind == kDense)
            return c.entries == times(R, R);
        if (c.kind == kBanded)
            return c.bandwidth >= 0 && c.bandwidth < R &&
                   c.entries == R * (2 * c.bandwidth + 1) - c.bandwidth * (c.bandwidth + 1);
        return holds(c.index, 2 * (R + 1) + 3 * c.entries, 4, 1) &&
               index_fits(reinterpret_cast<const int32_t*>(memory + c.index), R, c.entries);
    }
};

} // namespace

std::string index_fault(const int32_t* index, int64_t R, int64_t entries) {
    return index_fits(index, R, entries) ? ""
                                         : "it points outside of a core " + std::to_string(R) + " x " +
                                               std::to_string(R) + " with " + std::to_string(entries) + " entries";
}

std::string arena_fault(const char* memory, int64_t bytes, const ArenaRow* table, int64_t table_rows,
                        const int32_t* slots, int64_t M, int64_t N, int64_t K, int64_t E) {
    const Arena arena{memory, bytes, E};
    std::vector<bool> seen(static_cast<size_t>(table_rows));
    for (int64_t t = 0; t < M; ++t) {
        const int64_t slot = slots[t];
        if (slot == -1)
            continue;
        if (slot < 0 || slot >= table_rows)
            return "slots must be in [-1, " + std::to_string(table_rows) + ") for this table, got " +
                   std::to_string(slot);
        if (seen[size_t(slot)])
            continue;
        seen[size_t(slot)] = true;
        const ArenaRow& row = table[slot];
        if (row.rank == 0)
            continue;
        // Every factor has at least half a byte for an element, so a larger rank cannot fit.
        const bool sane = row.rank > 0 && row.rank <= bytes && row.rank < (int64_t(1) << 30);
        const char* part = !sane                                 ? "rank"
                           : !arena.holds(row.down, row.rank, K) ? "D"
                           : !arena.holds(row.up, N, row.rank)   ? "U"
                           : !arena.holds(row.core, row.rank)    ? "C"
                                                                 : nullptr;
        if (part)
            return "row " + std::to_string(slot) + " of the table does not describe an update in this arena of " +
                   std::to_string(bytes) + " bytes: its " + part + " does not fit";
    }
    return "";
}

} // namespace lowrank::cpu

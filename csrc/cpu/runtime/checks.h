// Checks of operands that hold positions: kernels read wherever these point. Nothing here is inline: isa.h says why.
#pragma once

#include "cpu/operands.h"

#include <string>

namespace lowrank::cpu {

// What is wrong with the index of a sparse core C [R, R] with so many entries: a sentence, "" if nothing is.
std::string index_fault(const int32_t* index, int64_t R, int64_t entries);

// What is wrong with the slots of M rows, or with a row of the table that they name.
// Factors are D [R, K] and U [N, R], of E experts each, in an arena of `bytes` bytes.
std::string arena_fault(const char* arena, int64_t bytes, const ArenaRow* table, int64_t table_rows,
                        const int32_t* slots, int64_t M, int64_t N, int64_t K, int64_t E);

} // namespace lowrank::cpu

// A row of an arena's table: the update in a slot and the byte offset of each of its parts in the arena, -1 if it has
// no such part. kernels/arena_layout.py explains the fields and has the same names in the same order.
#pragma once

#include <cstdint>

#define LOWRANK_ARENA_MATRIX(FIELD) FIELD(data) FIELD(type) FIELD(absmax) FIELD(absmax2) FIELD(offset) FIELD(block)
#define LOWRANK_ARENA_CORE(FIELD) FIELD(values) FIELD(type) FIELD(kind) FIELD(entries) FIELD(bandwidth) FIELD(index)

namespace lowrank {

#define LOWRANK_MEMBER(name) int64_t name;
struct ArenaMatrix {
    LOWRANK_ARENA_MATRIX(LOWRANK_MEMBER)
};
struct ArenaCore {
    LOWRANK_ARENA_CORE(LOWRANK_MEMBER)
};
#undef LOWRANK_MEMBER

struct ArenaRow {
    int64_t rank; // 0: the slot is empty
    ArenaMatrix down, up;
    ArenaCore core;
    int64_t scale; // the bits of a float32
};

#define LOWRANK_DOWN(name) "down_" #name,
#define LOWRANK_UP(name) "up_" #name,
#define LOWRANK_CORE(name) "core_" #name,
constexpr const char* kArenaFields[] = {
    "rank",
    LOWRANK_ARENA_MATRIX(LOWRANK_DOWN) LOWRANK_ARENA_MATRIX(LOWRANK_UP) LOWRANK_ARENA_CORE(LOWRANK_CORE) "scale",
};
#undef LOWRANK_DOWN
#undef LOWRANK_UP
#undef LOWRANK_CORE
static_assert(sizeof(ArenaRow) == sizeof(kArenaFields) / sizeof(*kArenaFields) * sizeof(int64_t));

} // namespace lowrank

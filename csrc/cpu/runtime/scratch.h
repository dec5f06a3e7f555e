// Scratch memory of a thread. Nothing here is inline: isa.h says why. Kernels use it through the class Scratch of
// vector/basics.h.
#pragma once

#include <cstddef>

namespace lowrank::cpu {

// Every thread has a stack of arrays. Its memory is kept for the next call, because fresh memory costs more in page
// faults than some kernels take.
struct ScratchMark {
    size_t chunk, used;
};

// The top of this thread's stack.
ScratchMark scratch_mark();
// Pushes `bytes` bytes, aligned to a page, and returns them; older arrays do not move. Throws std::bad_alloc.
void* scratch_take(size_t bytes);
// Pops everything that was pushed after the mark.
void scratch_release(ScratchMark mark);

// Call it before memory is first written: asks for huge pages, because far fewer of them have to be faulted in.
void prefer_huge_pages(void* memory, size_t bytes);

} // namespace lowrank::cpu

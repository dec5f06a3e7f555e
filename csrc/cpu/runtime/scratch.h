// Scratch memory of a thread. Compiled code of scratch.cpp: see isa.h for why nothing here is inline. Kernels use it
// through the class Scratch of vector/basics.h.
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
// `bytes` on top, aligned to a page; what lies below stays where it is. Throws std::bad_alloc.
void* scratch_take(size_t bytes);
// Takes everything off that was put on after the mark.
void scratch_release(ScratchMark mark);

// Before memory is written for the first time: its pages may be huge, of which there are far fewer to be faulted in.
void prefer_huge_pages(void* memory, size_t bytes);

} // namespace lowrank::cpu

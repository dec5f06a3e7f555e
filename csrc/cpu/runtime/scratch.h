// Scratch memory. Compiled code of scratch.cpp: see isa.h for why nothing here is inline.
#pragma once

#include <cstddef>

namespace lowrank::cpu {

// `bytes` of memory, aligned to a page, kept for the next call on this thread: fresh memory costs more in page faults
// than some kernels take. A slot is one buffer; asking for it again gives the same memory, contents not kept when it
// grows.
void* scratch_memory(int slot, size_t bytes);

// Before memory is written for the first time: its pages may be huge, of which there are far fewer to be faulted in.
void prefer_huge_pages(void* memory, size_t bytes);

} // namespace lowrank::cpu

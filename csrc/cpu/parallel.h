// Threads and scratch memory. Declarations are compiled code of isa.cpp: see isa.h for why nothing here is inline.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowrank::cpu {

// Runs task(context, i, thread) for 0 <= i < tasks on up to `threads` threads of the process's OpenMP pool, which
// PyTorch uses too. Each begins with a share of neighbouring tasks, one by one, and a thread that is held up leaves
// some to others.
void run_tasks(int threads, int64_t tasks, void (*task)(void* context, int64_t i, int thread), void* context);

// `bytes` of memory, aligned to a page, kept for the next call on this thread: fresh memory costs more in page faults
// than some kernels take. A slot is one buffer; asking for it again gives the same memory, contents not kept when it
// grows.
void* scratch_memory(int slot, size_t bytes);

// Before memory is written for the first time: its pages may be huge, of which there are far fewer to be faulted in.
void prefer_huge_pages(void* memory, size_t bytes);

} // namespace lowrank::cpu

// Threads. Compiled code of threads.cpp: see isa.h for why nothing here is inline.
#pragma once

#include <cstdint>

namespace lowrank::cpu {

// Runs task(context, i, thread) for 0 <= i < tasks on up to `threads` threads of the process's OpenMP pool, which
// PyTorch uses too. Each begins with a share of neighbouring tasks, one by one, and a thread that is held up leaves
// some to others. What a task throws is thrown here when all threads are done.
void run_tasks(int threads, int64_t tasks, void (*task)(void* context, int64_t i, int thread), void* context);

} // namespace lowrank::cpu

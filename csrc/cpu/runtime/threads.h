// Threads. Nothing here is inline: isa.h says why.
#pragma once

#include <cstdint>

namespace lowrank::cpu {

// Runs task(context, i, thread) for 0 <= i < tasks on up to `threads` threads of the process's OpenMP pool, which
// PyTorch uses too; in a process that fork() made, on threads that end with the call. Each thread begins with a share
// of neighbouring tasks; threads that finish early steal tasks from slower ones. An exception of a task is rethrown
// here after all threads are done.
void run_tasks(int threads, int64_t tasks, void (*task)(void* context, int64_t i, int thread), void* context);

} // namespace lowrank::cpu

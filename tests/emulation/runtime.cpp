// Checks threads and scratch memory of the CPU side; prints errors and then returns 1.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cpu/vector/basics.h"

using namespace lowrank::cpu;
using lowrank::cpu::portable::Scratch;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
    if (!holds)
        std::printf("%s\n", what), ++failures;
}

void fill(uint8_t* memory, int64_t bytes, int value) {
    std::memset(memory, value, size_t(bytes));
}

bool holds(const uint8_t* memory, int64_t bytes, int value) {
    for (int64_t i = 0; i < bytes; ++i)
        if (memory[i] != value)
            return false;
    return true;
}

// Takes arrays of all sizes in nested scopes that outgrow the first chunk: no array moves, none overlaps another.
void nest(int depth, int64_t bytes) {
    const Scratch scratch;
    auto* before = scratch.take<uint8_t>(bytes);
    fill(before, bytes, depth);
    expect(reinterpret_cast<uintptr_t>(before) % 64 == 0, "an array is not aligned");
    if (depth > 0)
        nest(depth - 1, bytes * 2);
    auto* after = scratch.take<uint8_t>(bytes);
    fill(after, bytes, depth + 100);
    expect(holds(before, bytes, depth), "an array of an outer scope was overwritten");
}

void scopes() {
    for (int turn = 0; turn < 3; ++turn)
        nest(12, 1000);
    uint8_t *first, *again;
    {
        const Scratch scratch;
        first = scratch.take<uint8_t>(100);
    }
    {
        const Scratch scratch;
        again = scratch.take<uint8_t>(100);
    }
    expect(first == again, "released memory is not used again");
    const Scratch scratch;
    expect(scratch.take<float>(0) != nullptr, "no memory for nothing");
    auto* kept = scratch.take<uint8_t>(100);
    fill(kept, 100, 7);
    bool thrown = false;
    try {
        scratch.take<char>(int64_t(1) << 60);
    } catch (const std::bad_alloc&) {
        thrown = true;
    }
    expect(thrown, "no bad_alloc");
    auto* next = scratch.take<uint8_t>(100);
    fill(next, 100, 8);
    expect(holds(kept, 100, 7), "bad_alloc moved the top");
}

void threads() {
    constexpr int64_t kTasks = 1000;
    std::vector<std::atomic<int>> done(kTasks);
    const Scratch scratch;
    auto* shared = scratch.take<int64_t>(kTasks);
    portable::parallel_for(4, kTasks, [&](int64_t i) {
        const Scratch mine;
        auto* bytes = mine.take<uint8_t>(5000);
        fill(bytes, 5000, int(i % 251));
        ++done[size_t(i)];
        shared[i] = i;
        expect(holds(bytes, 5000, int(i % 251)), "threads share scratch memory");
    });
    for (int64_t i = 0; i < kTasks; ++i)
        expect(done[size_t(i)] == 1 && shared[i] == i, "a task was not run once");
}

void exceptions() {
    for (int count : {1, 4}) {
        std::atomic<int> run{0};
        bool caught = false;
        try {
            portable::parallel_for(count, 1000, [&](int64_t i) {
                ++run;
                if (i % 250 == 3) // in the share of every thread, which then begins no other task
                    throw std::bad_alloc();
            });
        } catch (const std::bad_alloc&) {
            caught = true;
        }
        expect(caught, "what a task throws is lost");
        expect(run < 1000, "tasks are begun after one has failed");
        std::atomic<int> after{0};
        portable::parallel_for(count, 10, [&](int64_t) { ++after; });
        expect(after == 10, "no tasks are run after a failure");
    }
}

bool every_task_is_run() {
    std::vector<std::atomic<int>> done(100);
    portable::parallel_for(4, 100, [&](int64_t i) { ++done[size_t(i)]; });
    for (const auto& times : done)
        if (times != 1)
            return false;
    return true;
}

// A child of a process that used threads computes, with threads of its own and where the system gives it none.
void children() {
    expect(every_task_is_run(), "a task was not run before fork");
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        bool right = every_task_is_run();
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, size_t(1) << 46); // more memory than there is addresses for
        right &= pthread_setattr_default_np(&attributes) == 0;
        _exit(right && every_task_is_run() ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child does not run its tasks");
    expect(every_task_is_run(), "a task was not run after fork");
}

} // namespace

int main() {
    scopes();
    threads();
    exceptions();
    children();
    return failures > 0;
}

// Threads. Compiled with baseline flags.
#include "cpu/runtime/threads.h"

#include <dlfcn.h>
#include <pthread.h>
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#endif

#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

namespace lowrank::cpu {

namespace {

struct Region {
    void (*task)(void*, int64_t, int);
    void* context;
    std::atomic<int> threads{0};

    // A thread's share of the tasks. They are neighbours in memory, so that data prefetched past one task serves the
    // next. A thread that has finished its share steals from the others.
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    std::vector<Share> shares;

    // The first exception of a task. It must not leave a thread of the pool; tasks that have not begun are skipped.
    std::exception_ptr error;
    std::atomic<bool> failed{false};

    Region(void (*task)(void*, int64_t, int), void* context, int64_t tasks, int threads)
        : task(task), context(context), shares(size_t(threads)) {
        for (int i = 0; i < threads; ++i) {
            shares[size_t(i)].next = tasks * i / threads;
            shares[size_t(i)].end = tasks * (i + 1) / threads;
        }
    }

    // Call it after all threads are done.
    void rethrow() const {
        if (error)
            std::rethrow_exception(error);
    }

    static void work(void* region) {
        auto& self = *static_cast<Region*>(region);
        const size_t first = size_t(self.threads.fetch_add(1, std::memory_order_relaxed)), count = self.shares.size();
        for (size_t i = 0; i < count; ++i) {
            Share& share = self.shares[(first + i) % count];
            for (int64_t t; (t = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
                try {
                    if (!self.failed.load(std::memory_order_relaxed))
                        self.task(self.context, t, int(first));
                } catch (...) {
                    if (!self.failed.exchange(true))
                        self.error = std::current_exception();
                }
        }
    }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// The OpenMP runtime where none has global symbols. PyTorch for macOS brings LLVM's libomp in a folder of its own, so
// the images of the process tell its path.
void* openmp_runtime() {
#if defined(__APPLE__)
    constexpr char kName[] = "/libomp.dylib";
    for (uint32_t i = 0; i < _dyld_image_count(); ++i) {
        const char* path = _dyld_get_image_name(i);
        const size_t length = path ? std::strlen(path) : 0, end = sizeof kName - 1;
        if (length >= end && !std::strcmp(path + length - end, kName))
            return dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    }
    return nullptr;
#else
    return dlopen("libgomp.so.1", RTLD_NOW | RTLD_LOCAL);
#endif
}

// The entry point for a parallel region of libgomp, which LLVM's libomp has too. PyTorch loads its OpenMP runtime with
// global symbols, so the first look-up finds PyTorch's; a runtime linked here would make a second pool that competes
// for the same cores.
GompParallel gomp_parallel() {
    static const GompParallel found = [] {
        void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
        if (!symbol)
            if (void* library = openmp_runtime())
                symbol = dlsym(library, "GOMP_parallel");
        return reinterpret_cast<GompParallel>(symbol);
    }();
    return found;
}

// A process that fork() made has only the thread that called it. OpenMP does not know: its pool still names the others,
// and the next region would wait for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watch_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Threads of this region alone.
void run_in_own_threads(Region& region, int threads) {
    std::vector<std::thread> others;
    try {
        others.reserve(size_t(threads - 1));
        for (int i = 1; i < threads; ++i)
            others.emplace_back(Region::work, &region);
    } catch (...) {
        // The system has no memory for another thread: those that there are steal its share.
    }
    Region::work(&region);
    for (std::thread& other : others)
        other.join();
}

} // namespace

void run_tasks(int threads, int64_t tasks, void (*task)(void*, int64_t, int), void* context) {
    if (threads > tasks)
        threads = int(tasks);
    if (threads <= 1) {
        for (int64_t i = 0; i < tasks; ++i)
            task(context, i, 0);
        return;
    }
    Region region(task, context, tasks, threads);
    const GompParallel parallel = forked ? nullptr : gomp_parallel();
    if (parallel)
        parallel(Region::work, &region, unsigned(threads), 0);
    else
        run_in_own_threads(region, threads);
    region.rethrow();
}

} // namespace lowrank::cpu

#include "thread_pool.h"

#include <algorithm>
#include <chrono>

namespace moei {
namespace {

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits for a condition without the kernel's help for at most 50 microseconds, about what waking a thread costs.
template <typename Condition>
bool spin_until(Condition condition) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
    do {
        for (int i = 0; i < 16; ++i) {
            if (condition()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return condition();
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    generation_.fetch_add(1);
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::drain(Loop& loop, int thread) {
    // Its own run in order: what comes next was asked for while the task before was read.
    for (int i = 0; i < loop.count; ++i) {
        Run& run = loop.runs[(thread + i) % loop.count];
        for (int64_t task; (task = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;) {
            loop.call(loop.body, task, thread);
        }
    }
}

void ThreadPool::run(int64_t tasks, const void* body, Call call) {
    Loop loop{body, call, static_cast<int>(std::min<int64_t>({tasks, threads(), kRuns}))};
    for (int i = 0; i < loop.count; ++i) {
        loop.runs[i].next.store(tasks * i / loop.count, std::memory_order_relaxed);
        loop.runs[i].end = tasks * (i + 1) / loop.count;
    }
    const bool alone = workers_.empty() || tasks < 2;
    if (!alone) {
        {
            const std::lock_guard lock(mutex_);
            loop_ = &loop;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
    }
    drain(loop, 0);
    if (alone) return;
    {
        const std::lock_guard lock(mutex_);
        loop_ = nullptr;  // late workers find nothing; those inside are counted
    }
    if (spin_until([&] { return loop.active.load(std::memory_order_acquire) == 0; })) {
        // The last worker still holds the mutex while it tells us: only then may `loop` go out of scope.
        const std::lock_guard lock(mutex_);
        return;
    }
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return loop.active.load(std::memory_order_acquire) == 0; });
}

void ThreadPool::work(int thread) {
    uint64_t seen = 0;
    for (;;) {
        spin_until([&] { return generation_.load(std::memory_order_acquire) != seen; });
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_.load(std::memory_order_relaxed) != seen; });
        if (stop_) return;
        seen = generation_.load(std::memory_order_relaxed);
        Loop* const loop = loop_;
        if (!loop) continue;
        loop->active.fetch_add(1, std::memory_order_relaxed);
        lock.unlock();
        drain(*loop, thread);
        lock.lock();
        if (loop->active.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
}

}  // namespace moei

#include "thread_pool.h"

#include <algorithm>
#include <chrono>
#include <system_error>

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
    workers_.reserve(threads > 1 ? static_cast<size_t>(threads - 1) : 0);
    try {
        for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
    } catch (const std::system_error&) {
        // The system gives no more threads: those that there are do the same work.
    }
}

ThreadPool::~ThreadPool() {
    stop_.store(true);
    {
        const std::lock_guard lock(mutex_);  // a worker is either before its last look at stop_, or waits
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::drain(int thread) {
    // Its own run in order: what comes next was asked for while the task before was read.
    for (int i = 0; i < loop_.count; ++i) {
        Run& run = loop_.runs[(thread + i) % loop_.count];
        for (int64_t task; (task = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;) {
            loop_.call(loop_.body, task, thread);
        }
    }
}

void ThreadPool::run(int64_t tasks, const void* body, Call call) {
    loop_.body = body;
    loop_.call = call;
    loop_.count = static_cast<int>(std::min<int64_t>({tasks, threads(), kRuns}));
    for (int i = 0; i < loop_.count; ++i) {
        loop_.runs[i].next.store(tasks * i / loop_.count, std::memory_order_relaxed);
        loop_.runs[i].end = tasks * (i + 1) / loop_.count;
    }
    if (workers_.empty() || tasks < 2) return drain(0);
    state_.store((state_.load(std::memory_order_relaxed) & ~kOpen) + kNextLoop + kOpen);
    // A worker counts itself before it looks for a loop for the last time, so either it finds this one or is counted here.
    if (sleepers_.load() > 0) {
        {
            const std::lock_guard lock(mutex_);
        }
        wake_.notify_all();
    }
    drain(0);
    state_.fetch_and(~kOpen);  // late workers find nothing; those inside are counted
    if (spin_until([&] { return empty(); })) return;
    std::unique_lock lock(mutex_);
    caller_sleeps_.store(true);
    done_.wait(lock, [&] { return empty(); });
    caller_sleeps_.store(false);
}

void ThreadPool::work(int thread) {
    uint64_t seen = 0;
    const auto wanted = [&] { return open(seen) || stop_.load(); };
    for (;;) {
        if (!spin_until(wanted)) {
            std::unique_lock lock(mutex_);
            sleepers_.fetch_add(1);
            wake_.wait(lock, wanted);
            sleepers_.fetch_sub(1);
        }
        if (stop_.load()) return;
        uint64_t state = state_.load();
        if (!(state & kOpen) || !state_.compare_exchange_strong(state, state + 1)) continue;
        seen = state / kNextLoop;
        drain(thread);
        state_.fetch_sub(1);
        if (caller_sleeps_.load() && empty()) {
            {
                const std::lock_guard lock(mutex_);
            }
            done_.notify_one();
        }
    }
}

}  // namespace moei

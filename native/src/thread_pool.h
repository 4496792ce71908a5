#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace moei {

// `threads` workers, the caller counted. Each begins with a run of tasks of its own and then takes what others have
// left, so who does which task varies; tasks must not care. Between parallel loops a worker spins for some microseconds
// (the next loop of the same call comes soon) and joins it without a lock; then it sleeps in the kernel: an idle pool
// uses no processor time. After a fork the child's caller works alone.
class ThreadPool {
public:
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // Runs body(task, thread) for every task in [0, tasks), thread in [0, threads()). One caller at a time; body may
    // not throw.
    template <typename Body>
    void for_each(int64_t tasks, const Body& body) {
        run(tasks, &body, [](const void* self, int64_t task, int thread) {
            (*static_cast<const Body*>(self))(task, thread);
        });
    }

private:
    using Call = void (*)(const void* body, int64_t task, int thread);
    static constexpr int kRuns = 64;
    // On a cache line of its own: most claims are then made by one thread alone.
    struct alignas(64) Run {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    // Written by the caller while nobody is inside.
    struct Loop {
        const void* body = nullptr;
        Call call = nullptr;
        int count = 0;  // of runs
        Run runs[kRuns];
    };
    // The state of the pool is one number: which loop it is, whether workers may still join, how many are inside.
    static constexpr uint64_t kInside = 0xffff, kOpen = 0x10000, kNextLoop = 0x20000;

    void run(int64_t tasks, const void* body, Call call);
    void work(int thread);
    void drain(int thread);
    bool empty() const { return (state_.load() & kInside) == 0; }
    // Whether there is a loop to join after loop `seen`.
    bool open(uint64_t seen) const {
        const uint64_t state = state_.load();
        return (state & kOpen) && state / kNextLoop != seen;
    }

    Loop loop_;
    alignas(64) std::atomic<uint64_t> state_{0};
    alignas(64) std::atomic<int> sleepers_{0};  // workers that wait for wake_, or are about to
    std::atomic<bool> caller_sleeps_{false};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;  // for sleeping only
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
};

}  // namespace moei

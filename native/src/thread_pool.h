#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace moei {

// `threads` workers, the caller counted. Each begins with a run of tasks of its own and then takes what others have
// left, so who does which task varies; tasks must not care. Between parallel loops a worker spins for some microseconds (the next loop of the same call comes
// soon) and then sleeps in the kernel: an idle pool uses no processor time. After a fork the child's caller works alone.
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
    struct Loop {
        const void* body;
        Call call;
        int count;  // of runs
        Run runs[kRuns];
        std::atomic<int> active{0};  // workers inside; changed under the mutex, read outside
    };

    void run(int64_t tasks, const void* body, Call call);
    void work(int thread);
    static void drain(Loop& loop, int thread);

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Loop* loop_ = nullptr;
    std::atomic<uint64_t> generation_{0};
    bool stop_ = false;
    std::vector<std::thread> workers_;
};

}  // namespace moei

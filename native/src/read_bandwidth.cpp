#include <algorithm>
#include <atomic>
#include <chrono>

#include "matmul.h"

namespace moei {

double read_bandwidth(const uint8_t* data, int64_t nbytes, int repeats, ThreadPool& pool) {
    constexpr int64_t kPiece = 1 << 20;
    std::atomic<uint64_t> sink{0};
    double best = 0;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        for (const ReadKernel read : kernels().read) {
            const auto start = std::chrono::steady_clock::now();
            pool.for_each(nbytes / kPiece, [&](int64_t piece, int) noexcept {
                sink.fetch_xor(read(data + piece * kPiece, kPiece), std::memory_order_relaxed);
            });
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            best = std::max(best, static_cast<double>(nbytes / kPiece * kPiece) / seconds.count());
        }
    }
    return best;
}

}  // namespace moei

// What the calls built from `project` (experts, linear layers, attention) share.
#pragma once

#include <cfenv>
#include <cstdint>

#include "activations.h"
#include "formats.h"
#include "kernels.h"
#include "matmul.h"

namespace moei {

constexpr int64_t kStrip = 32;  // outputs computed together: one block of quantised activations
constexpr int64_t kTaskNbytes = 64 << 10;  // some microseconds: what threads wait for each other at the end of a loop
constexpr int64_t kWorthWaking = 256 << 10;  // bytes of weights that take longer to read than threads to wake up

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Strips a task takes, so that a task is worth its claim and many enough remain to share; a multiple of `least`, which
// make up kStreams rows of tiles.
inline int64_t strips_per_task(int64_t strip_nbytes, int64_t least) {
    const int64_t strips = kTaskNbytes / (strip_nbytes < 1 ? 1 : strip_nbytes);
    return strips < least ? least : strips / least * least;
}

// Whether n tokens are so many that a matrix unit is faster, if there is one.
bool grouped(const Kernels& kernels, Format format, Order order, int64_t n);

// Bytes of a quantised row of activations; 0 for weights that are multiplied by float32 ones.
inline int64_t quantized_nbytes(Format format, int64_t cols) {
    return is_integer_dot(format) ? quantized_row_nbytes(cols, format == Format::Q8_0) : 0;
}

// Denormals and rounding must not depend on what the calling thread was set to (torch.set_flush_denormal).
class DefaultFloatingPoint {
public:
    DefaultFloatingPoint() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
    DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
    DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

private:
    std::fenv_t saved_;
};

// Runs body(task, thread) for all tasks: shared if they read enough, else by the caller alone.
template <typename Body>
void share(ThreadPool& pool, int64_t tasks, int64_t nbytes, const Body& body) {
    if (nbytes >= kWorthWaking) return pool.for_each(tasks, body);
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace moei

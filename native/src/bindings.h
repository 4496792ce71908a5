// What the files of the Python module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "dense.h"
#include "layer.h"
#include "matmul.h"

namespace nb = nanobind;

namespace moei {

// One pool and one workspace for the process; calls from several Python threads take turns. Never destroyed: joining
// threads while the process exits, or in the child of a fork, could wait for ever.
struct Runtime {
    std::mutex mutex;
    std::unique_ptr<ThreadPool> pool;
    Workspace workspace;
    LayerScratch scratch;
    int threads = 0;
    pid_t owner = 0;

    ThreadPool& ready() {
        if (owner != getpid()) {
            (void)pool.release();  // its threads stayed in the parent
            owner = getpid();
        }
        if (!pool) {
            if (threads == 0) threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
            pool = std::make_unique<ThreadPool>(threads);
        }
        return *pool;
    }
};

inline Runtime& runtime() {
    static auto* const shared = new Runtime;
    return *shared;
}

// Runs `body(pool, workspace)` without the interpreter's lock.
template <typename Body>
auto exclusively(const Body& body) {
    const nb::gil_scoped_release release;
    Runtime& shared = runtime();
    const std::lock_guard lock(shared.mutex);
    return body(shared.ready(), shared.workspace);
}

inline void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

inline Format float_type(std::string_view name) {
    const Format type = format_from_name(name);
    require(is_float(type), "activations must be floats");
    return type;
}

inline AttentionCall attention_call(std::string_view type, int64_t x, int64_t cosine, int64_t sine, int64_t keys, int64_t values,
                                    int64_t capacity, int64_t position, int64_t mask, int64_t out) {
    require(x && cosine && sine && keys && values && out, "an address is missing");
    require(position >= 0 && position < capacity, "there is no room for this token");
    const auto bytes = [](int64_t address) { return reinterpret_cast<uint8_t*>(address); };
    return {float_type(type), bytes(x), bytes(cosine), bytes(sine), bytes(keys), bytes(values), capacity, position, bytes(mask), bytes(out)};
}

// A norm of the last dimension, in the activations' own type.
struct RmsNorm {
    std::vector<float> weight;
    double eps;
};

// A norm's weights are copied, so that Python need not keep float32 ones alive.
struct LatentAttention {
    LatentLayout layout;
    std::vector<float> q_norm, kv_norm;
};

void bind_latent_attention(nb::module_& m);
void bind_learned(nb::module_& m);

}  // namespace moei

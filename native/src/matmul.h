// Products of one weight matrix with rows of activations, and the fused expert call built from them.
#pragma once

#include <cstdint>

#include "activations.h"
#include "formats.h"
#include "kernels.h"
#include "thread_pool.h"

namespace moei {

// `rows` outputs of `cols` inputs each. `stride`: elements from one stored row to the next (floating formats).
struct Matrix {
    const uint8_t* data;
    Format format;
    Order order;
    int64_t rows, cols, stride;
};

// Rows of activations as the matrix's format wants them: float32, or the quantised rows of kernels.h.
using Inputs = const void* const*;

// Floats of scratch that `project` needs for matrices of this format.
int64_t scratch_floats(Format format, int64_t cols);

// out[t * ld + r - begin] = W[r] . x[t] for r in [begin, end), t in [0, n). `begin` is a multiple of 16.
void project(const Kernels& kernels, const Matrix& w, int64_t begin, int64_t end, Inputs x, int64_t n, float* out,
             int64_t ld, float* scratch);

enum class Gating { None, Separate, Concatenated, Interleaved };
Gating gating_from_name(std::string_view name);  // throws std::invalid_argument

struct FfnLayout {
    int64_t hidden, intermediate;
    Format gate_up_format, down_format, bias_format;
    Order gate_up_order, down_order;
    Gating gating;
    ActivationSettings activation;
};

// Addresses of one expert's parts; 0 where the layout has none. Concatenated and Interleaved keep gate and up at `gate`
// (and their biases at gate_bias); None keeps up there.
struct ExpertParts {
    int64_t gate, up, down, gate_bias, up_bias, down_bias;
};

// Expert e serves the pairs [offsets[e], offsets[e + 1]); pair p is row rows[p] of x, [tokens, hidden], and writes row
// p of out, [pairs, hidden]. With places it writes row places[p] of out instead, times weights[p].
struct FfnCall {
    int64_t experts, tokens;
    const ExpertParts* parts;
    const int64_t* offsets;
    const int64_t* rows;
    const float* x;
    float* out;
    const int64_t* places = nullptr;
    const float* weights = nullptr;
};

// Memory of one thread pool's calls, grown to the largest call so far.
class Workspace {
public:
    ~Workspace() { release(); }
    uint8_t* reserve(int64_t nbytes);  // aligned to 64 bytes; throws std::bad_alloc
    void release();

private:
    uint8_t* memory_ = nullptr;
    int64_t nbytes_ = 0;
};

int64_t ffn_workspace_nbytes(const FfnLayout& layout, int64_t tokens, int64_t pairs, int threads);
void moe_ffn(const FfnLayout& layout, const FfnCall& call, ThreadPool& pool, Workspace& workspace);

// Bytes per second of the best of `repeats` rounds of every read kernel over `nbytes`, whole mebibytes of which are
// read. Beyond the last-level cache this is what memory can give this pool.
double read_bandwidth(const uint8_t* data, int64_t nbytes, int repeats, ThreadPool& pool);

}  // namespace moei

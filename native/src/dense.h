// Linear layers on activations in the model's own float type, and one token's attention around four of them.
#pragma once

#include <cstdint>
#include <string_view>

#include "matmul.h"

namespace moei {

// A weight matrix and its bias; bias null: none.
struct Weights {
    Matrix matrix;
    const uint8_t* bias;
    Format bias_format;
};

// Values of a float format to and from float32 (rounded to nearest, ties to even).
void widen(Format type, const uint8_t* source, int64_t count, float* out);
void narrow(Format type, const float* source, int64_t count, uint8_t* out);

// out[tokens, rows] = x[tokens, cols] times W transposed, plus the bias. x and out are of the float format `type`.
void linear(const Weights& w, Format type, const uint8_t* x, int64_t tokens, uint8_t* out, ThreadPool& pool,
            Workspace& workspace);

struct Norm {
    const float* weight;
    float eps;
};

// x times 1 / sqrt(mean of squares + eps), times the weights.
void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out);

// Which values of a head turn together, and where the numbers of a pair lie. Halves: i and i + rotary / 2, each by its
// own; Short: both by number i of rotary / 2; Neighbors: 2i and 2i + 1 by number i.
enum class Rotation { Halves, Short, Neighbors };
Rotation rotation_from_name(std::string_view name);  // throws std::invalid_argument

// Grouped-query attention of one token: projections, a norm of each head (null: none) or of all heads together
// (`wide_norms`), values kept within +-clip, rotation of the first `rotary` values of a head, softmax over what is cached, output
// projection.
struct AttentionLayout {
    int64_t hidden, heads, kv_heads, head_dim, rotary;
    float scale, eps;
    Weights q, k, v, o;
    const float *q_norm, *k_norm;
    bool wide_norms;
    Rotation rotation;
    Format turn_type;    // of cosine and sine
    float clip;          // infinite: none
    const float* sinks;  // for each head a score that takes part in its softmax and adds nothing; null: none
};

// x, out: [hidden]. cosine, sine: [rotary], Short: half as many. keys, values: [kv_heads, capacity, head_dim], of which `position` tokens
// are there and this token becomes the next. mask: for each of position + 1 tokens whether it is seen; null: all are.
struct AttentionCall {
    Format type;
    const uint8_t *x, *cosine, *sine;
    uint8_t *keys, *values;
    int64_t capacity, position;
    const uint8_t* mask;
    uint8_t* out;
};

void attend(const AttentionLayout& layout, const AttentionCall& call, ThreadPool& pool, Workspace& workspace);

}  // namespace moei

// What the calls on activations of the model's own type share: rows as kernels want them, products with a bias.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "dense.h"
#include "matmul_parts.h"

namespace moei {

// Rows of activations as a matrix's kernel wants them: float32, or quantised.
struct Activations {
    int64_t quantized_nbytes;  // of a row; 0: float32
    const float* values;
    uint8_t* quantized;
    int64_t cols;

    const void* row(int64_t t) const {
        return quantized_nbytes ? static_cast<const void*>(quantized + t * quantized_nbytes) : values + t * cols;
    }
};

inline void quantize_row(const Activations& x, Format format, int64_t t) {
    quantize(format, x.values + t * x.cols, x.cols / kBlock, 0, x.cols,
             reinterpret_cast<int8_t*>(x.quantized + t * x.quantized_nbytes));
}

inline int64_t rows_of_task(const Matrix& w, int64_t least = 2) {
    return kStrip * strips_per_task(kStrip * row_nbytes(w.format, w.cols), least);
}

// Rows [begin, end) of a product and its bias, into float32.
inline void project_with_bias(const Kernels& table, const Weights& w, int64_t begin, int64_t end, Inputs x, int64_t n,
                              float* out, int64_t ld, float* scratch) {
    project(table, w.matrix, begin, end, x, n, out, ld, scratch);
    if (!w.bias) return;
    const int64_t item = format_info(w.bias_format).block_nbytes;
    for (int64_t i = 0; i < end - begin; ++i) {
        float value;
        widen(w.bias_format, w.bias + (begin + i) * item, 1, &value);
        for (int64_t t = 0; t < n; ++t) out[t * ld + i] += value;
    }
}

// The projections of one token that read the same activations, their tasks shared together.
template <size_t N>
void project_token(const Kernels& table, const Weights* const (&weights)[N], const Activations& x, float* const (&outs)[N],
                   ThreadPool& pool, float* scratch, int64_t scratch_floats_each) {
    int64_t tasks = 0, nbytes = 0;
    for (const Weights* w : weights) {
        tasks += round_up(w->matrix.rows, rows_of_task(w->matrix)) / rows_of_task(w->matrix);
        nbytes += matrix_nbytes(w->matrix.format, w->matrix.order, w->matrix.rows, w->matrix.cols);
    }
    const void* const row = x.row(0);
    share(pool, tasks, nbytes, [&](int64_t task, int thread) noexcept {
        size_t i = 0;
        for (;; ++i) {
            const int64_t own = round_up(weights[i]->matrix.rows, rows_of_task(weights[i]->matrix)) / rows_of_task(weights[i]->matrix);
            if (task < own) break;
            task -= own;
        }
        const Matrix& w = weights[i]->matrix;
        const int64_t begin = task * rows_of_task(w), end = std::min(w.rows, begin + rows_of_task(w));
        project_with_bias(table, *weights[i], begin, end, &row, 1, outs[i] + begin, w.rows, scratch + thread * scratch_floats_each);
    });
}

// Turns the first `rotary` values of a head.
inline void rotate(float* head, const float* cosine, const float* sine, int64_t rotary, Rotation rotation) {
    const int64_t half = rotary / 2, second = rotation == Rotation::Halves ? half : 0;
    const int64_t step = rotation == Rotation::Neighbors ? 2 : 1, apart = rotation == Rotation::Neighbors ? 1 : half;
    for (int64_t i = 0; i < half; ++i) {
        float &first = head[step * i], &other = head[step * i + apart];
        const float low = first, high = other;
        first = low * cosine[i] - high * sine[i];
        other = high * cosine[second + i] + low * sine[second + i];
    }
}

}  // namespace moei

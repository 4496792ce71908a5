#include "dense.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "dense_parts.h"

namespace moei {
namespace {

constexpr int64_t kGroup = 16;  // heads that share a pass over keys and values

uint16_t to_bfloat(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t to_half(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {
        // Subnormal halves are multiples of 2^-24: adding 0.5 leaves exactly those bits, rounded, in the mantissa.
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace

void widen(Format type, const uint8_t* source, int64_t count, float* out) {
    if (type == Format::F32) {
        std::memcpy(out, source, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    uint16_t bits;
    if (type == Format::BF16) {
        for (int64_t i = 0; i < count; ++i) {
            std::memcpy(&bits, source + 2 * i, sizeof bits);
            out[i] = std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        std::memcpy(&bits, source + 2 * i, sizeof bits);
        out[i] = half_to_float(bits);
    }
}

void narrow(Format type, const float* source, int64_t count, uint8_t* out) {
    if (type == Format::F32) {
        std::memcpy(out, source, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t bits = type == Format::BF16 ? to_bfloat(source[i]) : to_half(source[i]);
        std::memcpy(out + 2 * i, &bits, sizeof bits);
    }
}

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
    float partial[16] = {};  // so that vectors of any size give the same bits
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int64_t j = 0; j < 16; ++j) partial[j] += x[i + j] * x[i + j];
    for (; i < count; ++i) partial[i % 16] += x[i] * x[i];
    float sum = 0;
    for (const float part : partial) sum += part;
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(count) + eps);
    for (i = 0; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

void linear(const Weights& weights, Format type, const uint8_t* x, int64_t tokens, uint8_t* out, ThreadPool& pool,
            Workspace& workspace) {
    const Kernels& table = kernels();
    const Matrix& w = weights.matrix;
    const int64_t item = format_info(type).block_nbytes, per_task = rows_of_task(w);
    const bool wide = type == Format::F32;
    const int64_t quantized = quantized_nbytes(w.format, w.cols);
    // x in float32, then quantised, pointers to its rows, then for each thread scratch and the results of a task.
    const int64_t quantized_at = wide ? 0 : round_up(tokens * w.cols * 4, 64);
    const int64_t pointers_at = quantized_at + tokens * quantized, scratch_at = pointers_at + round_up(tokens * 8, 64);
    const int64_t scratch_nbytes = round_up(4 * scratch_floats(w.format, w.cols), 64);
    const int64_t thread_nbytes = scratch_nbytes + (wide ? 0 : round_up(4 * tokens * std::min(per_task, w.rows), 64));
    uint8_t* const memory = workspace.reserve(scratch_at + pool.threads() * thread_nbytes);
    const DefaultFloatingPoint guard;

    auto* const widened = reinterpret_cast<float*>(memory);
    const Activations inputs{quantized, wide ? reinterpret_cast<const float*>(x) : widened, memory + quantized_at, w.cols};
    auto** const rows = reinterpret_cast<const void**>(memory + pointers_at);
    const auto prepare = [&](int64_t t, int) noexcept {
        if (!wide) widen(type, x + t * w.cols * item, w.cols, widened + t * w.cols);
        if (quantized) quantize_row(inputs, w.format, t);
        rows[t] = inputs.row(t);
    };
    share(pool, tokens, tokens < 8 ? 0 : tokens * w.cols * 4, prepare);

    const int64_t tasks = round_up(w.rows, per_task) / per_task;
    share(pool, tasks, tokens * matrix_nbytes(w.format, w.order, w.rows, w.cols), [&](int64_t task, int thread) noexcept {
        const int64_t begin = task * per_task, end = std::min(w.rows, begin + per_task), count = end - begin;
        auto* const scratch = reinterpret_cast<float*>(memory + scratch_at + thread * thread_nbytes);
        if (wide) {
            project_with_bias(table, weights, begin, end, rows, tokens, reinterpret_cast<float*>(out) + begin, w.rows, scratch);
            return;
        }
        float* const results = scratch + scratch_nbytes / 4;
        project_with_bias(table, weights, begin, end, rows, tokens, results, count, scratch);
        for (int64_t t = 0; t < tokens; ++t) narrow(type, results + t * count, count, out + (t * w.rows + begin) * item);
    });
}

void attend(const AttentionLayout& l, const AttentionCall& call, ThreadPool& pool, Workspace& workspace) {
    const Kernels& table = kernels();
    const int64_t item = format_info(call.type).block_nbytes, length = call.position + 1;
    const int64_t q_width = l.heads * l.head_dim, kv_width = l.kv_heads * l.head_dim, group = l.heads / l.kv_heads;
    const int64_t widest = std::max(l.hidden, q_width);
    int64_t scratch_each = 0;
    for (const Weights* w : {&l.q, &l.k, &l.v, &l.o})
        scratch_each = std::max(scratch_each, round_up(scratch_floats(w->matrix.format, w->matrix.cols), 16));
    const auto floats = [](int64_t count) { return round_up(count, 16); };
    const int64_t total = floats(l.hidden) + 2 * floats(q_width) + 2 * floats(kv_width) + floats(2 * l.rotary) +
                          l.heads * floats(length) + pool.threads() * scratch_each;
    uint8_t* const memory = workspace.reserve(4 * total + quantized_row_nbytes(round_up(widest, kBlock), true));
    const DefaultFloatingPoint guard;
    auto* at = reinterpret_cast<float*>(memory);
    const auto take = [&](int64_t count) { return std::exchange(at, at + floats(count)); };
    float *const x = take(l.hidden), *const q = take(q_width), *const mixed = take(q_width), *const k = take(kv_width),
                 *const v = take(kv_width), *const turn = take(2 * l.rotary), *const scores = take(l.heads * floats(length));
    float* const scratch = take(pool.threads() * scratch_each);
    auto* const quantized = reinterpret_cast<uint8_t*>(at);

    widen(call.type, call.x, l.hidden, x);
    widen(call.type, call.cosine, l.rotary, turn);
    widen(call.type, call.sine, l.rotary, turn + l.rotary);
    const auto activations = [&](const float* values, const Matrix& w) {
        const Activations made{quantized_nbytes(w.format, w.cols), values, quantized, w.cols};
        if (made.quantized_nbytes) quantize_row(made, w.format, 0);
        return made;
    };
    // q, k and v are of one format: the binding sees to it.
    project_token(table, {&l.q, &l.k, &l.v}, activations(x, l.q.matrix), {q, k, v}, pool, scratch, scratch_each);
    for (int64_t head = 0; head < l.heads + l.kv_heads; ++head) {
        float* const values = head < l.heads ? q + head * l.head_dim : k + (head - l.heads) * l.head_dim;
        const float* const norm = head < l.heads ? l.q_norm : l.k_norm;
        if (norm) rms_norm(values, norm, l.head_dim, l.eps, values);
        rotate(values, turn, turn + l.rotary, l.rotary);
    }
    const int64_t head_nbytes = call.capacity * l.head_dim * item;
    for (int64_t head = 0; head < l.kv_heads; ++head) {
        const int64_t place = head * head_nbytes + call.position * l.head_dim * item;
        narrow(call.type, k + head * l.head_dim, l.head_dim, call.keys + place);
        narrow(call.type, v + head * l.head_dim, l.head_dim, call.values + place);
    }

    const int64_t ld = floats(length), kv_nbytes = kv_width * length * item;
    share(pool, l.kv_heads, 2 * kv_nbytes, [&](int64_t head, int) noexcept {
        const Matrix keys{call.keys + head * head_nbytes, call.type, Order::Plain, length, l.head_dim, l.head_dim};
        const Matrix values{call.values + head * head_nbytes, call.type, Order::Transposed, l.head_dim, length, l.head_dim};
        for (int64_t first = 0; first < group; first += kGroup) {
            const int64_t n = std::min(kGroup, group - first), start = head * group + first;
            const void* rows[kGroup];
            for (int64_t i = 0; i < n; ++i) rows[i] = q + (start + i) * l.head_dim;
            project(table, keys, 0, length, rows, n, scores + start * ld, ld, nullptr);
            float factors[kGroup];
            for (int64_t i = 0; i < n; ++i) {
                factors[i] = table.softmax(scores + (start + i) * ld, length, l.scale, call.mask);
                rows[i] = scores + (start + i) * ld;
            }
            project(table, values, 0, l.head_dim, rows, n, mixed + start * l.head_dim, l.head_dim, nullptr);
            for (int64_t i = 0; i < n; ++i)
                for (int64_t d = 0; d < l.head_dim; ++d) mixed[(start + i) * l.head_dim + d] *= factors[i];
        }
    });

    const Activations inputs = activations(mixed, l.o.matrix);
    project_token(table, {&l.o}, inputs, {x}, pool, scratch, scratch_each);
    narrow(call.type, x, l.hidden, call.out);
}

}  // namespace moei

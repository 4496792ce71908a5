#include "dense.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "dense_parts.h"
#include "exponential.h"

namespace moei {
namespace {

constexpr int64_t kGroup = 16;         // heads that share a pass over keys and values
constexpr int64_t kKeysOfTask = 512;  // whatever the number of threads: sums are put together in this many keys

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

Rotation rotation_from_name(std::string_view name) {
    if (name == "halves") return Rotation::Halves;
    if (name == "short") return Rotation::Short;
    if (name == "neighbors") return Rotation::Neighbors;
    throw std::invalid_argument("unknown rotation '" + std::string(name) + "'");
}

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
    const int64_t item = format_info(type).block_nbytes, per_task = rows_of_task(w, grouped(table, w.format, w.order, tokens) ? 4 : 2);
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

namespace {

// Values beyond the limit become it; what is no number stays.
void clip_row(float* values, int64_t count, float limit) {
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] > limit ? limit : values[i] < -limit ? -limit : values[i];
}

// The norms and the rotation of all heads of q or k.
void prepare_heads(const AttentionLayout& l, float* values, int64_t heads, const float* norm, const float* cosine, const float* sine) {
    if (norm && l.wide_norms) rms_norm(values, norm, heads * l.head_dim, l.eps, values);
    for (int64_t head = 0; head < heads; ++head) {
        float* const own = values + head * l.head_dim;
        if (norm && !l.wide_norms) rms_norm(own, norm, l.head_dim, l.eps, own);
        if (std::isfinite(l.clip)) clip_row(own, l.head_dim, l.clip);
        rotate(own, cosine, sine, l.rotary, l.rotation);
    }
}

constexpr float kNothingSeen = -std::numeric_limits<float>::infinity();

struct Range {
    int64_t begin, end;
};

// The part of [begin, end) from the first key that is seen to the last, its beginning rounded down to what softmax
// takes together; empty if none is seen. With a sliding window most keys are not.
Range seen_keys(const uint8_t* mask, int64_t begin, int64_t end) {
    if (!mask) return {begin, end};
    int64_t first = begin;
    while (first < end && !mask[first]) ++first;
    if (first == end) return {end, end};
    while (!mask[end - 1]) --end;
    return {first - (first - begin) % 16, end};
}

// out = what one head makes of all keys: the parts' sums brought to the largest score of all, added in ascending order.
void join_parts(const AttentionLayout& l, int64_t head, int64_t parts, const SoftmaxPart* softmaxes, const float* mixtures,
                float* out) {
    float top = l.sinks ? l.sinks[head] : kNothingSeen;
    for (int64_t part = 0; part < parts; ++part) top = std::max(top, softmaxes[part * l.heads + head].largest);
    std::fill(out, out + l.head_dim, 0.0f);
    float sum = l.sinks ? exponential(l.sinks[head] - top) : 0;
    for (int64_t part = 0; part < parts; ++part) {
        const SoftmaxPart own = softmaxes[part * l.heads + head];
        if (own.largest == kNothingSeen && own.sum == 0) continue;
        const float factor = exponential(own.largest - top), *const mixture = mixtures + (part * l.heads + head) * l.head_dim;
        sum += own.sum * factor;
        for (int64_t d = 0; d < l.head_dim; ++d) out[d] += mixture[d] * factor;
    }
    for (int64_t d = 0; d < l.head_dim; ++d) out[d] *= 1.0f / sum;
}

}  // namespace

void attend(const AttentionLayout& l, const AttentionCall& call, ThreadPool& pool, Workspace& workspace) {
    const Kernels& table = kernels();
    const int64_t item = format_info(call.type).block_nbytes, length = call.position + 1;
    const int64_t q_width = l.heads * l.head_dim, kv_width = l.kv_heads * l.head_dim, group = l.heads / l.kv_heads;
    const int64_t widest = std::max(l.hidden, q_width), parts = round_up(length, kKeysOfTask) / kKeysOfTask;
    int64_t scratch_each = 0;
    for (const Weights* w : {&l.q, &l.k, &l.v, &l.o})
        scratch_each = std::max(scratch_each, round_up(scratch_floats(w->matrix.format, w->matrix.cols), 16));
    const auto floats = [](int64_t count) { return round_up(count, 16); };
    const int64_t total = floats(l.hidden) + 2 * floats(q_width) + 2 * floats(kv_width) + floats(2 * l.rotary) +
                          floats(parts * 2 * l.heads) + floats(parts * q_width) + pool.threads() * (kGroup * kKeysOfTask + scratch_each);
    uint8_t* const memory = workspace.reserve(4 * total + quantized_row_nbytes(round_up(widest, kBlock), true));
    const DefaultFloatingPoint guard;
    auto* at = reinterpret_cast<float*>(memory);
    const auto take = [&](int64_t count) { return std::exchange(at, at + floats(count)); };
    float *const x = take(l.hidden), *const q = take(q_width), *const mixed = take(q_width), *const k = take(kv_width),
                 *const v = take(kv_width), *const turn = take(2 * l.rotary), *const mixtures = take(parts * q_width),
                 *const scores = take(pool.threads() * kGroup * kKeysOfTask);
    auto* const softmaxes = reinterpret_cast<SoftmaxPart*>(take(parts * 2 * l.heads));
    float* const scratch = take(pool.threads() * scratch_each);
    auto* const quantized = reinterpret_cast<uint8_t*>(at);

    widen(call.type, call.x, l.hidden, x);
    const int64_t turns = l.rotation == Rotation::Short ? l.rotary / 2 : l.rotary;
    widen(l.turn_type, call.cosine, turns, turn);
    widen(l.turn_type, call.sine, turns, turn + l.rotary);
    const auto activations = [&](const float* values, const Matrix& w) {
        const Activations made{quantized_nbytes(w.format, w.cols), values, quantized, w.cols};
        if (made.quantized_nbytes) quantize_row(made, w.format, 0);
        return made;
    };
    // q, k and v are of one format: the binding sees to it.
    project_token(table, {&l.q, &l.k, &l.v}, activations(x, l.q.matrix), {q, k, v}, pool, scratch, scratch_each);
    prepare_heads(l, q, l.heads, l.q_norm, turn, turn + l.rotary);
    prepare_heads(l, k, l.kv_heads, l.k_norm, turn, turn + l.rotary);
    if (std::isfinite(l.clip)) clip_row(v, kv_width, l.clip);
    const int64_t head_nbytes = call.capacity * l.head_dim * item;
    for (int64_t head = 0; head < l.kv_heads; ++head) {
        const int64_t place = head * head_nbytes + call.position * l.head_dim * item;
        narrow(call.type, k + head * l.head_dim, l.head_dim, call.keys + place);
        narrow(call.type, v + head * l.head_dim, l.head_dim, call.values + place);
    }

    const int64_t kv_nbytes = 2 * kv_width * length * item;
    share(pool, l.kv_heads * parts, kv_nbytes, [&](int64_t task, int thread) noexcept {
        const int64_t head = task / parts, part = task % parts;
        const Range range = seen_keys(call.mask, part * kKeysOfTask, std::min(length, (part + 1) * kKeysOfTask));
        const int64_t count = range.end - range.begin, place = head * head_nbytes + range.begin * l.head_dim * item;
        const Matrix keys{call.keys + place, call.type, Order::Plain, count, l.head_dim, l.head_dim};
        const Matrix values{call.values + place, call.type, Order::Transposed, l.head_dim, count, l.head_dim};
        float* const own = scores + thread * kGroup * kKeysOfTask;
        for (int64_t first = 0; first < group; first += kGroup) {
            const int64_t n = std::min(kGroup, group - first), start = head * group + first;
            SoftmaxPart* const sums = softmaxes + part * l.heads + start;
            if (count == 0) {
                std::fill(sums, sums + n, SoftmaxPart{kNothingSeen, 0});
                continue;
            }
            const void* rows[kGroup];
            for (int64_t i = 0; i < n; ++i) rows[i] = q + (start + i) * l.head_dim;
            project(table, keys, 0, count, rows, n, own, kKeysOfTask, nullptr);
            const uint8_t* const mask = call.mask ? call.mask + range.begin : nullptr;
            for (int64_t i = 0; i < n; ++i) {
                sums[i] = table.softmax_part(own + i * kKeysOfTask, count, l.scale, mask);
                rows[i] = own + i * kKeysOfTask;
            }
            project(table, values, 0, l.head_dim, rows, n, mixtures + (part * l.heads + start) * l.head_dim, l.head_dim, nullptr);
        }
    });
    for (int64_t head = 0; head < l.heads; ++head)
        join_parts(l, head, parts, softmaxes, mixtures, mixed + head * l.head_dim);

    const Activations inputs = activations(mixed, l.o.matrix);
    project_token(table, {&l.o}, inputs, {x}, pool, scratch, scratch_each);
    narrow(call.type, x, l.hidden, call.out);
}

}  // namespace moei

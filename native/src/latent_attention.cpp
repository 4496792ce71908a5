#include "latent_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "dense_parts.h"

namespace moei {
namespace {

constexpr int64_t kTokens = 64;   // cached tokens of a task
constexpr int64_t kColumns = 64;  // values of the mixed latents of a task

// Turns the `rotary` values at `head`.
void turn_head(const LatentLayout& l, const float* cosine, const float* sine, float* head) {
    rotate(head, cosine, sine, l.rotary, l.turn == Turn::Halves ? Rotation::Halves : Rotation::Neighbors);
}

// Values 2 i to i and 2 i + 1 to rotary / 2 + i, where the cache keeps them so. spare: [rotary].
void leave_in_halves(const LatentLayout& l, float* head, float* spare) {
    std::copy(head, head + l.rotary, spare);
    for (int64_t i = 0; i < l.rotary / 2; ++i) {
        head[i] = spare[2 * i];
        head[l.rotary / 2 + i] = spare[2 * i + 1];
    }
}

// out[rank] = sum over the rows of one head's key of query[row] times the row.
void fold_query(const Kernels& table, const LatentLayout& l, int64_t head, const float* query, float* out) {
    const Matrix& w = l.kv_b.matrix;
    const int64_t row_bytes = row_nbytes(w.format, l.rank);
    const uint8_t* const rows = w.data + head * (l.nope + l.value) * row_bytes;
    if (is_float(w.format)) {
        const void* const x = query;
        project(table, {rows, w.format, Order::Transposed, l.rank, l.nope, l.rank}, 0, l.rank, &x, 1, out, l.rank, nullptr);
        return;
    }
    const int64_t tile_nbytes = int64_t{kTileRows} * format_info(w.format).block_nbytes;
    for (int64_t block = 0; block < l.rank / kBlock; ++block)
        table.q8_0_columns(rows + block * tile_nbytes, kTileRows * row_bytes, l.nope / kTileRows, query, out + block * kBlock);
}

}  // namespace

Turn turn_from_name(std::string_view name) {
    if (name == "halves") return Turn::Halves;
    if (name == "neighbors_to_halves") return Turn::NeighborsToHalves;
    if (name == "neighbors") return Turn::Neighbors;
    throw std::invalid_argument("unknown turn '" + std::string(name) + "'");
}

void attend(const LatentLayout& l, const AttentionCall& call, ThreadPool& pool, Workspace& workspace) {
    const Kernels& table = kernels();
    const int64_t item = format_info(call.type).block_nbytes, length = call.position + 1;
    const int64_t key = l.nope + l.rotary, both = l.nope + l.value, q_width = l.heads * key, v_width = l.heads * l.value;
    const bool low = l.q_a.matrix.data;
    const int64_t low_width = low ? l.q_a.matrix.rows : 0, threads = pool.threads();
    int64_t scratch_each = 0;
    for (const Weights* w : {&l.q, &l.kv_a, &l.o})
        scratch_each = std::max(scratch_each, scratch_floats(w->matrix.format, w->matrix.cols));
    if (low) scratch_each = std::max(scratch_each, scratch_floats(l.q_a.matrix.format, l.hidden));
    const auto floats = [](int64_t count) { return round_up(count, 16); };
    // A task's scratch also holds what its tokens' turned vectors add to the scores, and a quantised row of latents.
    const int64_t latent_row = quantized_nbytes(l.kv_b.matrix.format, l.rank);
    scratch_each = floats(std::max({scratch_each, l.heads * kTokens, latent_row / 4}));
    const int64_t ld = floats(length), widest = round_up(std::max({l.hidden, low_width, v_width}), kBlock);
    const int64_t total = floats(l.hidden) + floats(low_width) + floats(q_width) + floats(l.rank + l.rotary) + 2 * floats(l.rotary) +
                          floats(l.rotary) + floats(l.heads * l.rank) + floats(v_width) + l.heads * ld + floats(4 * l.heads) +
                          floats(l.heads) + threads * scratch_each;
    uint8_t* const memory = workspace.reserve(4 * total + quantized_row_nbytes(widest, true));
    const DefaultFloatingPoint guard;
    auto* at = reinterpret_cast<float*>(memory);
    const auto take = [&](int64_t count) { return std::exchange(at, at + floats(count)); };
    float *const x = take(l.hidden), *const narrow_q = take(low_width), *const q = take(q_width), *const kv = take(l.rank + l.rotary),
                 *const cosine = take(l.rotary), *const sine = take(l.rotary), *const spare = take(l.rotary),
                 *const latents = take(l.heads * l.rank), *const mixed = take(v_width), *const scores = take(l.heads * ld);
    auto** const folded = reinterpret_cast<const void**>(take(2 * l.heads));
    auto** const turned = reinterpret_cast<const void**>(take(2 * l.heads));
    float *const factors = take(l.heads), *const scratch = take(threads * scratch_each);
    auto* const quantized = reinterpret_cast<uint8_t*>(at);
    const auto activations = [&](const float* values, const Matrix& w) {
        const Activations made{quantized_nbytes(w.format, w.cols), values, quantized, w.cols};
        if (made.quantized_nbytes) quantize_row(made, w.format, 0);
        return made;
    };

    widen(call.type, call.x, l.hidden, x);
    const Weights& first = low ? l.q_a : l.q;
    project_token(table, {&first, &l.kv_a}, activations(x, first.matrix), {low ? narrow_q : q, kv}, pool, scratch, scratch_each);
    if (low) {
        rms_norm(narrow_q, l.q_norm.weight, low_width, l.q_norm.eps, narrow_q);
        project_token(table, {&l.q}, activations(narrow_q, l.q.matrix), {q}, pool, scratch, scratch_each);
    }
    if (l.turn == Turn::Neighbors) {
        const auto* const pairs = reinterpret_cast<const float*>(call.cosine);
        for (int64_t i = 0; i < l.rotary / 2; ++i) {
            cosine[i] = pairs[2 * i];
            sine[i] = pairs[2 * i + 1];
        }
    } else {
        widen(call.type, call.cosine, l.rotary, cosine);
        widen(call.type, call.sine, l.rotary, sine);
    }
    for (int64_t head = 0; head <= l.heads; ++head) {
        float* const values = head < l.heads ? q + head * key + l.nope : kv + l.rank;
        turn_head(l, cosine, sine, values);
        if (l.turn == Turn::NeighborsToHalves) leave_in_halves(l, values, spare);
        if (head == l.heads) break;
        turned[head] = values;
        folded[head] = latents + head * l.rank;
    }
    rms_norm(kv, l.kv_norm.weight, l.rank, l.kv_norm.eps, kv);
    narrow(call.type, kv, l.rank, call.keys + call.position * l.rank * item);
    narrow(call.type, kv + l.rank, l.rotary, call.values + call.position * l.rotary * item);

    const int64_t head_nbytes = row_nbytes(l.kv_b.matrix.format, l.rank);
    share(pool, l.heads, l.heads * l.nope * head_nbytes, [&](int64_t head, int) noexcept {
        fold_query(table, l, head, q + head * key, latents + head * l.rank);
    });

    // Every cached value meets all heads: work that waking pays for comes with fewer bytes.
    const int64_t cached = length * (l.rank + l.rotary) * item * std::max<int64_t>(1, l.heads / 4);
    const int64_t token_tasks = round_up(length, kTokens) / kTokens;
    share(pool, token_tasks, cached, [&](int64_t task, int thread) noexcept {
        const int64_t begin = task * kTokens, end = std::min(length, begin + kTokens), count = end - begin;
        float* const more = scratch + thread * scratch_each;
        const Matrix keys{call.keys, call.type, Order::Plain, length, l.rank, l.rank};
        const Matrix turns{call.values, call.type, Order::Plain, length, l.rotary, l.rotary};
        project(table, keys, begin, end, folded, l.heads, scores + begin, ld, nullptr);
        project(table, turns, begin, end, turned, l.heads, more, kTokens, nullptr);
        for (int64_t head = 0; head < l.heads; ++head)
            for (int64_t i = 0; i < count; ++i) scores[head * ld + begin + i] += more[head * kTokens + i];
    });
    share(pool, l.heads, 16 * l.heads * length, [&](int64_t head, int) noexcept {
        factors[head] = table.softmax(scores + head * ld, length, l.scale, call.mask);
        folded[head] = scores + head * ld;
    });
    share(pool, round_up(l.rank, kColumns) / kColumns, cached, [&](int64_t task, int) noexcept {
        const int64_t begin = task * kColumns, end = std::min(l.rank, begin + kColumns);
        const Matrix values{call.keys, call.type, Order::Transposed, l.rank, length, l.rank};
        project(table, values, begin, end, folded, l.heads, latents + begin, l.rank, nullptr);
        for (int64_t head = 0; head < l.heads; ++head)
            for (int64_t i = begin; i < end; ++i) latents[head * l.rank + i] *= factors[head];
    });
    share(pool, l.heads, l.heads * l.value * head_nbytes, [&](int64_t head, int thread) noexcept {
        Activations row{latent_row, latents + head * l.rank, reinterpret_cast<uint8_t*>(scratch + thread * scratch_each), l.rank};
        if (latent_row) quantize_row(row, l.kv_b.matrix.format, 0);
        const void* const given = row.row(0);
        project(table, l.kv_b.matrix, head * both + l.nope, (head + 1) * both, &given, 1, mixed + head * l.value, l.value, nullptr);
    });
    project_token(table, {&l.o}, activations(mixed, l.o.matrix), {x}, pool, scratch, scratch_each);
    narrow(call.type, x, l.hidden, call.out);
}

}  // namespace moei

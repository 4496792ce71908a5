// The kernels without Python, for sanitizers and for processors that only an emulator runs. Every matrix product is
// compared with one in double precision over the stored values, under a bound from the rounding of each step; then
// bits are compared across token counts, thread counts and orders of storage. Prints a line per failure. One program, so
// that each sanitizer builds once; hence its more than 400 lines.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "dense.h"
#include "latent_attention.h"
#include "layer.h"
#include "matmul.h"

using namespace moei;

namespace {

int failures = 0;

#define CHECK(condition, ...)                                  \
    do {                                                       \
        if (!(condition)) {                                    \
            ++failures;                                        \
            std::printf("FAILED line %d: %s ", __LINE__, #condition); \
            std::printf(__VA_ARGS__);                          \
            std::printf("\n");                                 \
        }                                                      \
    } while (0)

std::mt19937 generator(1);

int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

std::vector<float> normal(int64_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = distribution(generator);
    return values;
}

void put(std::vector<uint8_t>& out, size_t at, uint16_t value) { std::memcpy(out.data() + at, &value, sizeof value); }

// Random stored weights: any bytes are valid quants, and scales are finite halves of moderate size.
std::vector<uint8_t> stored_weights(Format format, int64_t rows, int64_t cols) {
    const FormatInfo& info = format_info(format);
    std::vector<uint8_t> out(static_cast<size_t>(matrix_nbytes(format, Order::Plain, rows, cols)));
    for (uint8_t& byte : out) byte = static_cast<uint8_t>(integer(0, 255));
    const auto half = [] { return static_cast<uint16_t>(integer(0, 1) << 15 | integer(0x0000, 0x3bff)); };
    for (size_t at = 0; at < out.size(); at += static_cast<size_t>(info.block_nbytes)) {
        switch (format) {
            case Format::F32: {
                const float value = std::normal_distribution<float>()(generator);
                std::memcpy(out.data() + at, &value, sizeof value);
                break;
            }
            case Format::BF16: put(out, at, static_cast<uint16_t>(integer(0, 1) << 15 | integer(0x3c00, 0x3f80))); break;
            case Format::Q4_K:
            case Format::Q5_K: put(out, at + 2, half()); [[fallthrough]];
            case Format::F16:
            case Format::Q8_0:
            case Format::Q4_0: put(out, at, half()); break;
            case Format::Q6_K: put(out, at + 208, half()); break;
            case Format::MXFP4: out[at] = static_cast<uint8_t>(integer(0, 9) ? integer(110, 130) : integer(0, 3)); break;
        }
    }
    return out;
}

std::vector<uint8_t> transpose(const std::vector<uint8_t>& w, int64_t rows, int64_t cols, size_t element) {
    std::vector<uint8_t> out(w.size());
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c)
            std::memcpy(&out[static_cast<size_t>(c * rows + r) * element], &w[static_cast<size_t>(r * cols + c) * element], element);
    return out;
}

// The activations that the kernels really multiply: quantised and decoded again for integer formats. `bound` gets the
// largest error of that step: half a unit in each place.
std::vector<float> seen_activations(Format format, const std::vector<float>& x, int64_t cols) {
    if (!is_integer_dot(format)) return x;
    std::vector<float> out(x.size());
    const bool wide = format == Format::Q8_0;
    std::vector<int8_t> row(static_cast<size_t>(quantized_row_nbytes(cols, wide)));
    quantize(format, x.data(), cols / 32, 0, cols, row.data());
    for (int64_t c = 0; c < cols; ++c) {
        const float scale = load_f32(row.data() + (wide ? 2 : 1) * cols + 4 * (c / 32));
        const int value = wide ? kWide * row[static_cast<size_t>(c)] + row[static_cast<size_t>(cols + c)] : row[static_cast<size_t>(c)];
        CHECK(std::abs(value) <= (wide ? 127 * kWide : 127), "a value of %d", value);
        out[static_cast<size_t>(c)] = scale * static_cast<float>(value);
        const double error = std::fabs(static_cast<double>(out[static_cast<size_t>(c)]) - static_cast<double>(x[static_cast<size_t>(c)]));
        CHECK(error <= (wide ? 0.503 : 0.5001) * static_cast<double>(scale) + (wide ? 2e-34 : 1.5e-36), "quantisation error %g, scale %g", error, static_cast<double>(scale));
    }
    return out;
}

void linear(const Matrix& w, const float* x, int64_t tokens, float* out, ThreadPool& pool, Workspace& workspace) {
    linear({w, nullptr, Format::F32}, Format::F32, reinterpret_cast<const uint8_t*>(x), tokens, reinterpret_cast<uint8_t*>(out), pool, workspace);
}

void test_linear(Format format, Order order, int64_t rows, int64_t cols, int64_t tokens, float magnitude) {
    const std::vector<uint8_t> plain = stored_weights(format, rows, cols);
    std::vector<uint8_t> w = plain;
    if (order == Order::Transposed) w = transpose(plain, rows, cols, static_cast<size_t>(format_info(format).block_nbytes));
    if (order == Order::Rows16) {
        w.assign(static_cast<size_t>(matrix_nbytes(format, order, rows, cols)), 0xee);
        to_rows16(format, rows, cols, plain.data(), w.data());
        std::vector<uint8_t> back(plain.size());
        from_rows16(format, rows, cols, w.data(), back.data());
        CHECK(back == plain, "%s %lld x %lld", format_info(format).name, static_cast<long long>(rows), static_cast<long long>(cols));
    }
    CHECK(all_finite(format, order, rows, cols, w.data()), "%s", format_info(format).name);
    std::vector<float> x = normal(tokens * cols);
    for (float& value : x) value *= magnitude;
    const Matrix matrix{w.data(), format, order, rows, cols, order == Order::Transposed ? rows : cols};
    std::vector<float> out(static_cast<size_t>(tokens * rows), NAN), other(out);
    Workspace workspace;
    ThreadPool one(1), three(3);
    linear(matrix, x.data(), tokens, out.data(), one, workspace);
    linear(matrix, x.data(), tokens, other.data(), three, workspace);
    CHECK(std::memcmp(out.data(), other.data(), out.size() * 4) == 0, "threads change %s", format_info(format).name);
    for (int64_t t = 0; t < tokens; ++t) {
        linear(matrix, x.data() + t * cols, 1, other.data() + t * rows, one, workspace);
    }
    CHECK(std::memcmp(out.data(), other.data(), out.size() * 4) == 0, "token counts change %s order %d", format_info(format).name, static_cast<int>(order));
    if (order == Order::Rows16) {
        const Matrix as_is{plain.data(), format, Order::Plain, rows, cols, cols};
        linear(as_is, x.data(), tokens, other.data(), one, workspace);
        CHECK(std::memcmp(out.data(), other.data(), out.size() * 4) == 0, "interleaving changes %s", format_info(format).name);
    }

    std::vector<float> decoded(static_cast<size_t>(rows * cols));
    decode(format, plain.data(), rows * cols, decoded.data());
    const double unit = std::ldexp(1.0, -24);
    for (int64_t t = 0; t < tokens; ++t) {
        const std::vector<float> row(x.begin() + t * cols, x.begin() + (t + 1) * cols);
        const std::vector<float> seen = seen_activations(format, row, cols);
        for (int64_t r = 0; r < rows; ++r) {
            double exact = 0, sizes = 0;
            for (int64_t c = 0; c < cols; ++c) {
                const double product = static_cast<double>(decoded[static_cast<size_t>(r * cols + c)]) * static_cast<double>(seen[static_cast<size_t>(c)]);
                exact += product;
                sizes += std::fabs(product);
            }
            // At most cols + 6 roundings lie between a product and its sum (blocks have far fewer).
            const double bound = static_cast<double>(cols + 6) * unit * sizes + 1e-37;
            const double error = std::fabs(static_cast<double>(out[static_cast<size_t>(t * rows + r)]) - exact);
            CHECK(error <= bound, "%s order %d %lld x %lld: error %g, bound %g", format_info(format).name, static_cast<int>(order),
                  static_cast<long long>(rows), static_cast<long long>(cols), error, bound);
        }
    }
}

// A layer whose experts serve several tokens each equals the same experts called for one token alone, bit for bit, with
// any threads; and gate and up may be stored separately, concatenated or interleaved.
void test_ffn(Format format, Order order, int64_t hidden, int64_t intermediate, int64_t tokens, Activation activation) {
    const int64_t experts = 3;
    const auto store = [&](const std::vector<uint8_t>& plain, int64_t rows, int64_t cols) {
        if (order == Order::Transposed) return transpose(plain, rows, cols, static_cast<size_t>(format_info(format).block_nbytes));
        if (order == Order::Plain) return plain;
        std::vector<uint8_t> out(static_cast<size_t>(matrix_nbytes(format, order, rows, cols)));
        to_rows16(format, rows, cols, plain.data(), out.data());
        return out;
    };
    const size_t row = static_cast<size_t>(row_nbytes(format, hidden));
    std::vector<std::vector<uint8_t>> gates, ups, downs, joined, mixed;
    std::vector<std::vector<float>> biases;
    std::vector<ExpertParts> separate, concatenated, interleaved;
    const auto address = [](const auto& data) { return reinterpret_cast<int64_t>(data.data()); };
    for (int64_t e = 0; e < experts; ++e) {
        const std::vector<uint8_t> gate = stored_weights(format, intermediate, hidden), up = stored_weights(format, intermediate, hidden);
        std::vector<uint8_t> both = gate, alternating;
        both.insert(both.end(), up.begin(), up.end());
        for (size_t r = 0; r < static_cast<size_t>(intermediate); ++r) {
            alternating.insert(alternating.end(), gate.begin() + static_cast<int64_t>(r * row), gate.begin() + static_cast<int64_t>((r + 1) * row));
            alternating.insert(alternating.end(), up.begin() + static_cast<int64_t>(r * row), up.begin() + static_cast<int64_t>((r + 1) * row));
        }
        gates.push_back(store(gate, intermediate, hidden));
        ups.push_back(store(up, intermediate, hidden));
        downs.push_back(store(stored_weights(format, hidden, intermediate), hidden, intermediate));
        joined.push_back(store(both, 2 * intermediate, hidden));
        mixed.push_back(store(alternating, 2 * intermediate, hidden));
        const std::vector<float> gate_bias = normal(intermediate), up_bias = normal(intermediate);
        std::vector<float> bias_both = gate_bias, bias_alternating;
        bias_both.insert(bias_both.end(), up_bias.begin(), up_bias.end());
        for (size_t i = 0; i < gate_bias.size(); ++i) bias_alternating.insert(bias_alternating.end(), {gate_bias[i], up_bias[i]});
        biases.insert(biases.end(), {gate_bias, up_bias, bias_both, bias_alternating, normal(hidden)});
        const size_t b = biases.size() - 5;
        separate.push_back({address(gates.back()), address(ups.back()), address(downs.back()), address(biases[b]), address(biases[b + 1]), address(biases[b + 4])});
        concatenated.push_back({address(joined.back()), 0, address(downs.back()), address(biases[b + 2]), 0, address(biases[b + 4])});
        interleaved.push_back({address(mixed.back()), 0, address(downs.back()), address(biases[b + 3]), 0, address(biases[b + 4])});
    }
    // Expert 1 serves nobody, expert 0 every token, expert 2 the last token first.
    std::vector<int64_t> offsets{0, tokens, tokens, 2 * tokens}, rows;
    for (int64_t t = 0; t < tokens; ++t) rows.push_back(t);
    for (int64_t t = 0; t < tokens; ++t) rows.push_back(tokens - 1 - t);
    const std::vector<float> x = normal(tokens * hidden);
    FfnLayout layout{hidden, intermediate, format, format, Format::F32, order, order, Gating::Separate, {activation, 1.702f, 7.0f}};
    Workspace workspace;
    ThreadPool one(1), two(2);
    std::vector<float> out(static_cast<size_t>(2 * tokens * hidden), NAN), other(out);
    moe_ffn(layout, {experts, tokens, separate.data(), offsets.data(), rows.data(), x.data(), out.data()}, one, workspace);
    const auto same = [&](const char* what) {
        CHECK(std::memcmp(out.data(), other.data(), out.size() * 4) == 0, "%s changes %s order %d", what, format_info(format).name, static_cast<int>(order));
    };
    moe_ffn(layout, {experts, tokens, separate.data(), offsets.data(), rows.data(), x.data(), other.data()}, two, workspace);
    same("threads");
    const std::vector<int64_t> alone{0, 1};
    for (size_t p = 0; p < rows.size(); ++p) {
        const ExpertParts* expert = &separate[p < static_cast<size_t>(tokens) ? 0 : 2];
        moe_ffn(layout, {1, tokens, expert, alone.data(), &rows[p], x.data(), other.data() + static_cast<int64_t>(p) * hidden}, two, workspace);
    }
    same("one token at a time");
    layout.gating = Gating::Concatenated;
    moe_ffn(layout, {experts, tokens, concatenated.data(), offsets.data(), rows.data(), x.data(), other.data()}, two, workspace);
    same("concatenating");
    layout.gating = Gating::Interleaved;
    moe_ffn(layout, {experts, tokens, interleaved.data(), offsets.data(), rows.data(), x.data(), other.data()}, two, workspace);
    same("interleaving gate and up");
    for (float value : out) CHECK(std::isfinite(value), "a value is missing");
}

// The product with a transposed Q8_0 matrix: the order of additions that kernels.h fixes, bit for bit.
void test_column_tiles(int64_t rows, int64_t cols) {
    const std::vector<uint8_t> plain = stored_weights(Format::Q8_0, rows, cols);
    std::vector<uint8_t> tiles(plain.size());
    to_rows16(Format::Q8_0, rows, cols, plain.data(), tiles.data());
    const std::vector<float> x = normal(rows);
    std::vector<float> out(static_cast<size_t>(cols), NAN);
    const int64_t stride = kTileRows * row_nbytes(Format::Q8_0, cols);
    for (int64_t block = 0; block < cols / kBlock; ++block)
        kernels().q8_0_columns(tiles.data() + block * kTileRows * 34, stride, rows / kTileRows, x.data(), out.data() + block * kBlock);
    for (int64_t c = 0; c < cols; ++c) {
        float sums[kTileRows] = {};
        for (int64_t r = 0; r < rows; ++r) {
            const uint8_t* const stored = plain.data() + r * row_nbytes(Format::Q8_0, cols) + c / kBlock * 34;
            uint16_t scale;
            std::memcpy(&scale, stored, sizeof scale);
            sums[r % kTileRows] += half_to_float(scale) * x[static_cast<size_t>(r)] * static_cast<float>(static_cast<int8_t>(stored[2 + c % kBlock]));
        }
        for (int half = kTileRows / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
        CHECK(std::memcmp(&out[static_cast<size_t>(c)], sums, 4) == 0, "column %lld of %lld rows: %g, not %g", static_cast<long long>(c),
              static_cast<long long>(rows), static_cast<double>(out[static_cast<size_t>(c)]), static_cast<double>(sums[0]));
    }
}

// Attention over latents gives the same bits with any threads, and writes its token and no other.
void test_latent_attention(Format format, Turn turn, bool low, int64_t position) {
    const int64_t heads = 5, nope = 16, rotary = 8, value = 32, rank = 96, hidden = 64, narrow_rows = 32, capacity = position + 2;
    std::vector<std::vector<uint8_t>> kept;
    const auto weights = [&](int64_t rows, int64_t cols) -> Weights {
        std::vector<uint8_t> stored = stored_weights(format, rows, cols);
        if (format == Format::Q8_0) {
            const std::vector<uint8_t> plain = stored;
            stored.assign(static_cast<size_t>(matrix_nbytes(format, Order::Rows16, rows, cols)), 0);
            to_rows16(format, rows, cols, plain.data(), stored.data());
        }
        kept.push_back(std::move(stored));
        return {{kept.back().data(), format, format == Format::Q8_0 ? Order::Rows16 : Order::Plain, rows, cols, cols}, nullptr, Format::F32};
    };
    const std::vector<float> q_norm = normal(narrow_rows), kv_norm = normal(rank), x = normal(hidden), turns = normal(2 * rotary);
    const LatentLayout layout{hidden, heads, nope, rotary, value, rank, 0.25f, turn,
                              low ? weights(narrow_rows, hidden) : Weights{}, weights(heads * (nope + rotary), low ? narrow_rows : hidden),
                              weights(rank + rotary, hidden), weights(heads * (nope + value), rank), weights(hidden, heads * value),
                              {q_norm.data(), 1e-6f}, {kv_norm.data(), 1e-6f}};
    const std::vector<float> latents = normal(capacity * rank), turned = normal(capacity * rotary);
    std::vector<uint8_t> mask(static_cast<size_t>(position + 1), 1);
    if (position > 2) mask[1] = mask[2] = 0;
    const auto bytes = [](auto& values) { return reinterpret_cast<uint8_t*>(const_cast<float*>(values.data())); };
    std::vector<float> first;
    for (const int threads : {1, 3}) {
        ThreadPool pool(threads);
        Workspace workspace;
        std::vector<float> out(static_cast<size_t>(hidden), NAN), kept_latents = latents, kept_turned = turned;
        attend(layout, {Format::F32, bytes(x), bytes(turns), bytes(turns) + 4 * rotary, bytes(kept_latents), bytes(kept_turned), capacity, position, mask.data(), bytes(out)}, pool, workspace);
        for (const float one : out) CHECK(std::isfinite(one), "a value is missing");
        for (int64_t i = 0; i < capacity * rank; ++i)
            CHECK(i / rank == position || kept_latents[static_cast<size_t>(i)] == latents[static_cast<size_t>(i)], "another token's latent has changed");
        out.insert(out.end(), kept_latents.begin(), kept_latents.end());
        out.insert(out.end(), kept_turned.begin(), kept_turned.end());
        if (first.empty()) first = out;
        CHECK(std::memcmp(first.data(), out.data(), out.size() * 4) == 0, "threads change %s", format_info(format).name);
    }
}

// One token's attention against double precision, with parts of the keys hidden and with sinks, and the same bits from
// any number of threads. The projections are identities as far as they go, so that all is in the attention itself.
void test_attention(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t position, int64_t shown, bool sunk, Rotation rotation) {
    const int64_t width = heads * head_dim, kv_width = kv_heads * head_dim, capacity = position + 2, length = position + 1;
    const auto matrix = [](const std::vector<float>& w, int64_t rows, int64_t cols) {
        return Weights{{reinterpret_cast<const uint8_t*>(w.data()), Format::F32, Order::Plain, rows, cols, cols}, nullptr, Format::F32};
    };
    std::vector<float> q(static_cast<size_t>(width * width), 0.0f), kv(static_cast<size_t>(kv_width * width), 0.0f);
    for (int64_t i = 0; i < width; ++i) q[static_cast<size_t>(i * width + i)] = 1.0f;
    for (int64_t i = 0; i < kv_width; ++i) kv[static_cast<size_t>(i * width + i)] = 1.0f;
    std::vector<float> x = normal(width), keys = normal(kv_heads * capacity * head_dim), values = normal(kv_heads * capacity * head_dim);
    const std::vector<float> cosine = normal(head_dim), sine = normal(head_dim), sinks = normal(heads);
    std::vector<uint8_t> mask(static_cast<size_t>(length), 0);
    for (int64_t i = std::max<int64_t>(0, length - shown); i < length; ++i) mask[static_cast<size_t>(i)] = 1;
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    const AttentionLayout layout{width, heads, kv_heads, head_dim, head_dim, scale, 0.0f, matrix(q, width, width), matrix(kv, kv_width, width),
                                 matrix(kv, kv_width, width), matrix(q, width, width), nullptr, nullptr, false, rotation, Format::F32,
                                 std::numeric_limits<float>::infinity(), sunk ? sinks.data() : nullptr};
    std::vector<float> out(static_cast<size_t>(width), NAN), other(out);
    const auto bytes = [](auto& data) { return reinterpret_cast<uint8_t*>(const_cast<float*>(data.data())); };
    Workspace workspace;
    ThreadPool one(1), three(3);
    attend(layout, {Format::F32, bytes(x), bytes(cosine), bytes(sine), bytes(keys), bytes(values), capacity, position, mask.data(), bytes(other)}, three, workspace);
    attend(layout, {Format::F32, bytes(x), bytes(cosine), bytes(sine), bytes(keys), bytes(values), capacity, position, mask.data(), bytes(out)}, one, workspace);
    CHECK(std::memcmp(out.data(), other.data(), out.size() * 4) == 0, "threads change attention at %lld", static_cast<long long>(position));
    for (int64_t head = 0; head < heads; ++head) {
        std::vector<double> query(x.begin() + head * head_dim, x.begin() + (head + 1) * head_dim), mixed(static_cast<size_t>(head_dim), 0.0);
        const auto half = static_cast<size_t>(head_dim / 2);
        for (size_t i = 0; i < half; ++i) {
            const bool pairs = rotation == Rotation::Neighbors;
            const size_t a = pairs ? 2 * i : i, b = pairs ? 2 * i + 1 : half + i, second = rotation == Rotation::Halves ? half + i : i;
            const double low = query[a], high = query[b];
            query[a] = low * static_cast<double>(cosine[i]) - high * static_cast<double>(sine[i]);
            query[b] = high * static_cast<double>(cosine[second]) + low * static_cast<double>(sine[second]);
        }
        double sum = sunk ? std::exp(static_cast<double>(sinks[static_cast<size_t>(head)])) : 0;
        for (int64_t t = 0; t < length; ++t) {
            if (!mask[static_cast<size_t>(t)]) continue;
            const auto at = static_cast<size_t>((head / (heads / kv_heads) * capacity + t) * head_dim);
            double score = 0;
            for (size_t d = 0; d < 2 * half; ++d) score += query[d] * static_cast<double>(keys[at + d]);
            const double weight = std::exp(score * static_cast<double>(scale));
            sum += weight;
            for (size_t d = 0; d < 2 * half; ++d) mixed[d] += weight * static_cast<double>(values[at + d]);
        }
        for (size_t d = 0; d < 2 * half; ++d) {
            const double error = std::fabs(static_cast<double>(out[static_cast<size_t>(head * head_dim) + d]) - mixed[d] / sum);
            CHECK(error <= 3e-5, "attention of %lld keys, head %lld: error %g", static_cast<long long>(length), static_cast<long long>(head), error);
        }
    }
}

// Of a router that chooses before its softmax: the largest logits, and weights that are these alone.
void test_late_router() {
    const std::vector<float> w{1, 5, 3, 4}, bias{0, -3, 0, 0.5f}, x{1};
    const Weights weights{{reinterpret_cast<const uint8_t*>(w.data()), Format::F32, Order::Plain, 4, 1, 1}, reinterpret_cast<const uint8_t*>(bias.data()), Format::F32};
    std::vector<float> logits(4), chosen(2);
    std::vector<int64_t> experts(2);
    LayerScratch scratch;
    Workspace workspace;
    ThreadPool one(1);
    route({weights, 2, 1.0f, false, false, false, true, true}, Format::F32, reinterpret_cast<const uint8_t*>(x.data()), reinterpret_cast<uint8_t*>(logits.data()),
          experts.data(), chosen.data(), scratch, one, workspace);
    CHECK(experts[0] == 3 && experts[1] == 2, "%lld and %lld were chosen", static_cast<long long>(experts[0]), static_cast<long long>(experts[1]));
    const double largest = 1 / (1 + std::exp(-1.5));
    CHECK(std::fabs(static_cast<double>(chosen[0]) - largest) < 1e-6 && std::fabs(static_cast<double>(chosen[1]) - (1 - largest)) < 1e-6, "their weights");
}

void test_nonfinite() {
    std::vector<uint8_t> w = stored_weights(Format::Q8_0, 17, 64);
    put(w, 34 * 33, 0x7c00);
    CHECK(!all_finite(Format::Q8_0, Order::Plain, 17, 64, w.data()), "an infinite scale");
    std::vector<uint8_t> tiles(static_cast<size_t>(matrix_nbytes(Format::Q8_0, Order::Rows16, 17, 64)));
    to_rows16(Format::Q8_0, 17, 64, w.data(), tiles.data());
    CHECK(!all_finite(Format::Q8_0, Order::Rows16, 17, 64, tiles.data()), "an infinite scale in a tile");
    std::vector<float> x(64, 1.0f);
    x[40] = std::numeric_limits<float>::infinity();
    for (const Format format : {Format::Q8_0, Format::Q4_0}) {
        const bool wide = format == Format::Q8_0;
        std::vector<int8_t> row(static_cast<size_t>(quantized_row_nbytes(64, wide)));
        quantize(format, x.data(), 2, 0, 64, row.data());
        const int8_t* const scales = row.data() + (wide ? 128 : 64);
        CHECK(!std::isnan(load_f32(scales)) && std::isnan(load_f32(scales + 4)), "an infinite activation");
    }
}

// Loops that follow each other at once, while workers are about to sleep, and after they did: every task is done once, by
// a thread of its own, and what a loop wrote is there for the next.
void test_pool() {
    for (const int threads : {2, 4}) {
        ThreadPool pool(threads);
        std::vector<int64_t> done(64, 0);
        int64_t expected = 0;
        for (int loop = 0; loop < 2000; ++loop) {
            const int64_t tasks = loop % 65;
            std::vector<std::atomic<int>> busy(static_cast<size_t>(threads));
            pool.for_each(tasks, [&](int64_t task, int thread) noexcept {
                CHECK(thread >= 0 && thread < threads && busy[static_cast<size_t>(thread)].fetch_add(1) == 0, "thread %d", thread);
                // Another thread did this task in other loops.
                done[static_cast<size_t>(task)] += task + 1;
                busy[static_cast<size_t>(thread)].fetch_sub(1);
            });
            expected += tasks * (tasks + 1) / 2;
            int64_t sum = 0;
            for (const int64_t value : done) sum += value;
            CHECK(sum == expected, "loop %d of %d threads", loop, threads);
            if (loop % 100 < 3) std::this_thread::sleep_for(std::chrono::microseconds(loop % 100 * 40 + 20));
        }
    }
}

void test_read() {
    std::vector<uint8_t> data(4 << 20, 0);
    data[3 << 20] = 1;
    for (const ReadKernel read : kernels().read) CHECK(read(data.data(), 4 << 20) != 0, "a byte was not read");
    ThreadPool two(2);
    CHECK(read_bandwidth(data.data(), 4 << 20, 1, two) > 0, "no rate");
}

}  // namespace

int main() {
    std::printf("%s\n", kernels().isa);
    const Format formats[] = {Format::F32, Format::F16, Format::BF16, Format::Q8_0, Format::Q4_0, Format::Q4_K, Format::Q5_K, Format::Q6_K, Format::MXFP4};
    for (const Format format : formats) {
        const int block = format_info(format).block_weights;
        for (int round = 0; round < 12; ++round) {
            const int64_t cols = block > 1 ? block * integer(1, block == 32 ? 70 : 3) : integer(1, 200);
            const int64_t rows = integer(1, 70), tokens = integer(1, round % 4 ? 9 : 70);
            const float magnitude = round == 1 ? 1e-39f : round == 2 ? 1e30f : 1.0f;
            test_linear(format, Order::Plain, rows, cols, tokens, magnitude);
            if (is_float(format)) test_linear(format, Order::Transposed, rows, cols, tokens, magnitude);
            if (is_integer_dot(format)) test_linear(format, Order::Rows16, rows, cols, tokens, magnitude);
        }
        const int64_t width = block == 256 ? 256 : 64;
        const Activation activations[] = {Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::ClampedSwiglu};
        for (const Activation activation : activations) {
            for (const int64_t tokens : {1, 5, 67}) {
                test_ffn(format, Order::Plain, width, width + (block == 256 ? 256 : 32), tokens, activation);
                if (is_float(format)) test_ffn(format, Order::Transposed, 40, 51, tokens, activation);
                if (is_integer_dot(format)) test_ffn(format, Order::Rows16, width, width + 32, tokens, activation);
            }
        }
    }
    test_column_tiles(16, 32);
    test_column_tiles(112, 96);
    for (const Format format : {Format::F32, Format::BF16, Format::Q8_0})
        for (const Turn turn : {Turn::Halves, Turn::NeighborsToHalves, Turn::Neighbors})
            for (const int64_t position : {0, 70, 700}) test_latent_attention(format, turn, position == 70, position);
    const Rotation rotations[] = {Rotation::Halves, Rotation::Short, Rotation::Neighbors};
    for (const Rotation rotation : rotations) {
        for (const int64_t position : {0, 37, 511, 512, 1500}) {
            test_attention(8, 1, 32, position, position + 1, false, rotation);
            test_attention(6, 2, 20, position, 3, true, rotation);
            test_attention(5, 5, 16, position, 130, true, rotation);
            test_attention(16, 1, 64, position, 600, false, rotation);
        }
    }
    test_late_router();
    test_nonfinite();
    test_pool();
    test_read();
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}

#include "activations.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace moei {
namespace {

// exp with a relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2] (the constants are Cephes' expf,
// Moshier). Ours, because the C library's differs between machines and does not vectorise. NaN gives a finite value:
// callers multiply by the argument, which keeps it.
inline float exponential(float x) {
    x = x > -60.0f ? x : -60.0f;
    x = x < 60.0f ? x : 60.0f;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
    const float n = (x * 1.44269504f + round) - round;
    x = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

inline float times_sigmoid(float x, float argument) { return x / (1.0f + exponential(-argument)); }

inline float silu(float x) { return times_sigmoid(x, x); }
inline float relu(float x) { return x < 0.0f ? 0.0f : x; }
inline float gelu(float x) { return 0.5f * x * std::erfc(-0.70710678f * x); }
// 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
inline float gelu_tanh(float x) { return times_sigmoid(x, 1.59576912f * (x + 0.044715f * x * x * x)); }

// The compiler makes vectors of each loop because the step is a constant there.
template <typename Function>
void apply(Function function, const float* gate, const float* up, int64_t step, int64_t count, float* __restrict out) {
    if (!up) {
        for (int64_t i = 0; i < count; ++i) out[i] = function(gate[i]);
    } else if (step == 1) {
        for (int64_t i = 0; i < count; ++i) out[i] = function(gate[i]) * up[i];
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = function(gate[2 * i]) * up[2 * i];
    }
}

void clamped_swiglu(const ActivationSettings& s, const float* gate, const float* up, int64_t step, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        const float g = gate[i * step] > s.limit ? s.limit : gate[i * step];
        float u = up[i * step];
        u = u > s.limit ? s.limit : u;
        u = u < -s.limit ? -s.limit : u;
        out[i] = (u + 1.0f) * times_sigmoid(g, g * s.alpha);
    }
}

}  // namespace

Activation activation_from_name(std::string_view name) {
    if (name == "silu") return Activation::Silu;
    if (name == "gelu") return Activation::Gelu;
    if (name == "gelu_tanh") return Activation::GeluTanh;
    if (name == "relu") return Activation::Relu;
    if (name == "clamped_swiglu") return Activation::ClampedSwiglu;
    throw std::invalid_argument("unknown activation '" + std::string(name) + "'");
}

void activate(const ActivationSettings& settings, const float* gate, const float* up, int64_t step, int64_t count, float* out) {
    switch (settings.kind) {
        case Activation::Silu: apply(silu, gate, up, step, count, out); break;
        case Activation::Gelu: apply(gelu, gate, up, step, count, out); break;
        case Activation::GeluTanh: apply(gelu_tanh, gate, up, step, count, out); break;
        case Activation::Relu: apply(relu, gate, up, step, count, out); break;
        case Activation::ClampedSwiglu: clamped_swiglu(settings, gate, up, step, count, out); break;
    }
}

void softmax(float* scores, int64_t count, float scale, const uint8_t* mask) {
    constexpr int64_t width = 16;  // partial results, so that vectors of any size give the same bits
    float largest[width], sums[width] = {}, check[width] = {};
    for (float& value : largest) value = -std::numeric_limits<float>::infinity();
    int64_t i = 0;
    // What is no number would get lost in comparisons and in exp: times zero it is kept.
    for (; i + width <= count; i += width)
        for (int64_t j = 0; j < width; ++j) check[j] += scores[i + j] * 0.0f;
    for (; i < count; ++i) check[0] += scores[i] * 0.0f;
    for (i = 0; i < count; ++i) {
        scores[i] = mask && !mask[i] ? -std::numeric_limits<float>::infinity() : scores[i] * scale;
    }
    for (i = 0; i + width <= count; i += width)
        for (int64_t j = 0; j < width; ++j) largest[j] = scores[i + j] > largest[j] ? scores[i + j] : largest[j];
    for (; i < count; ++i) largest[0] = scores[i] > largest[0] ? scores[i] : largest[0];
    float top = largest[0];
    for (const float value : largest) top = value > top ? value : top;
    for (i = 0; i + width <= count; i += width)
        for (int64_t j = 0; j < width; ++j) sums[j] += scores[i + j] = exponential(scores[i + j] - top);
    for (; i < count; ++i) sums[0] += scores[i] = exponential(scores[i] - top);
    float sum = 0;
    for (const float value : sums) sum += value;
    float inverse = 1.0f / sum;
    for (const float value : check) inverse += value;
    for (i = 0; i < count; ++i) scores[i] = mask && !mask[i] ? 0.0f : scores[i] * inverse;
}

void quantize(const float* x, int64_t blocks, int64_t first, int64_t cols, int offset, int8_t* out) {
    for (int64_t b = first; b < first + blocks; ++b, x += 32) {
        // Compared as integers, the magnitudes order as floats do and NaN is above all.
        int32_t largest = 0;
        for (int i = 0; i < 32; ++i) {
            const int32_t bits = std::bit_cast<int32_t>(x[i]) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        const auto magnitude = std::bit_cast<float>(largest);
        float scale = magnitude / 127.0f;
        float inverse = 127.0f / magnitude;
        if (largest >= 0x7f800000) {
            scale = std::numeric_limits<float>::quiet_NaN();
            inverse = 0.0f;
        } else if (scale < std::numeric_limits<float>::min()) {
            scale = inverse = 0.0f;  // its inverse would overflow; the values are below 1.5e-36
        }
        int32_t sum = 0;
        int8_t* const quants = out + 32 * b;
        for (int i = 0; i < 32; ++i) {
            const float rounded = (x[i] * inverse + 12582912.0f) - 12582912.0f;  // to nearest, ties to even
            const auto quant = inverse == 0.0f ? int32_t{0} : static_cast<int32_t>(rounded);
            quants[i] = static_cast<int8_t>(quant);
            sum += quant;
        }
        const int32_t correction = -offset * sum;
        std::memcpy(out + cols + 4 * b, &scale, sizeof scale);
        std::memcpy(out + cols + cols / 8 + 4 * b, &correction, sizeof correction);
    }
}

}  // namespace moei

#include "activations.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "exponential.h"
#include "kernels.h"

namespace moei {
namespace {

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

template <bool Wide>
void quantize_blocks(const float* x, int64_t blocks, int64_t first, int64_t cols, int offset, int8_t* out) {
    constexpr float most = 127.0f * (Wide ? kWide : 1);
    int8_t* const scales = out + (Wide ? 2 : 1) * cols;
    for (int64_t b = first; b < first + blocks; ++b, x += 32) {
        // Compared as integers, the magnitudes order as floats do and NaN is above all.
        int32_t largest = 0;
        for (int i = 0; i < 32; ++i) {
            const int32_t bits = std::bit_cast<int32_t>(x[i]) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        const auto magnitude = std::bit_cast<float>(largest);
        float scale = magnitude / most;
        float inverse = most / magnitude;
        if (largest >= 0x7f800000) {
            scale = std::numeric_limits<float>::quiet_NaN();
            inverse = 0.0f;
        } else if (scale < std::numeric_limits<float>::min()) {
            scale = inverse = 0.0f;  // its inverse would overflow; the values are below 1.5e-36, wide 2e-34
        }
        int32_t sum = 0;
        int8_t* const quants = out + 32 * b;
        for (int i = 0; i < 32; ++i) {
            const float rounded = (x[i] * inverse + 12582912.0f) - 12582912.0f;  // to nearest, ties to even
            const auto quant = inverse == 0.0f ? int32_t{0} : static_cast<int32_t>(rounded);
            if constexpr (Wide) {
                const int32_t high = (quant + kWide / 2) >> kWideBits;
                quants[i] = static_cast<int8_t>(high);
                quants[cols + i] = static_cast<int8_t>(quant - kWide * high);
            } else {
                quants[i] = static_cast<int8_t>(quant);
            }
            sum += quant;
        }
        const int32_t correction = -offset * sum;
        std::memcpy(scales + 4 * b, &scale, sizeof scale);
        std::memcpy(scales + cols / 8 + 4 * b, &correction, sizeof correction);
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

void quantize(Format format, const float* x, int64_t blocks, int64_t first, int64_t cols, int8_t* out) {
    switch (format) {
        case Format::Q8_0: return quantize_blocks<true>(x, blocks, first, cols, kQ8Offset, out);
        case Format::Q4_0: return quantize_blocks<false>(x, blocks, first, cols, kQ4Offset, out);
        default: return quantize_blocks<false>(x, blocks, first, cols, kFp4Offset, out);
    }
}

}  // namespace moei

// What happens to the values between the matrix products: quantisation and activation functions. Plain C++ compiled
// without contraction, so its results are the same on every instruction set.
#pragma once

#include <cstdint>
#include <string_view>

#include "formats.h"

namespace moei {

enum class Activation { Silu, Gelu, GeluTanh, Relu, ClampedSwiglu };
Activation activation_from_name(std::string_view name);  // throws std::invalid_argument

// Quantises `blocks` blocks of 32 values for weights of this format: the blocks `first`... of the row `out`, laid out as
// quantized_row_nbytes describes. The scale is max|x| / 127, wide: max|x| / (127 * kWide).
// A block with a NaN or an infinity gets a NaN scale, so that it cannot turn into a wrong token unseen.
void quantize(Format format, const float* x, int64_t blocks, int64_t first, int64_t cols, int8_t* out);

// out[i] = activation(gate[i * step]) * up[i * step]; up == nullptr: without the factor. ClampedSwiglu is gpt-oss's
// (up + 1) * gate * sigmoid(alpha * gate) with gate at most `limit` and up within +-`limit`.
struct ActivationSettings {
    Activation kind;
    float alpha, limit;
};
void activate(const ActivationSettings& settings, const float* gate, const float* up, int64_t step, int64_t count, float* out);

}  // namespace moei

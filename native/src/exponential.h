// exp, and softmax with it. Plain C++ without anything of the standard library, for every instruction set (kernels.h):
// the compiler makes vectors of whatever size there is, and the results are the same.
#pragma once

#include <cstdint>
#include <cstring>

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
    const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

// The two passes over blocks of 16, the last one filled up: partial results in fixed places, so that vectors of any
// size give the same bits.
template <bool Masked>
SoftmaxPart softmax_passes(float* scores, int64_t count, float scale, const uint8_t* mask) {
    constexpr int64_t width = 16;
    constexpr float none = -__builtin_inff();
    float largest[width], sums[width] = {}, check[width] = {};
    for (float& value : largest) value = none;
    const auto prepare = [&](int64_t i, int64_t j) {
        float score = scores[i] * scale;
        check[j] += score * 0.0f;  // what is no number would get lost in comparisons and in exp
        if constexpr (Masked) score = mask[i] ? score : none;
        scores[i] = score;
        largest[j] = score > largest[j] ? score : largest[j];
    };
    int64_t i = 0;
    for (; i + width <= count; i += width)
        for (int64_t j = 0; j < width; ++j) prepare(i + j, j);
    for (; i < count; ++i) prepare(i, i % width);
    float top = none;
    for (const float value : largest) top = value > top ? value : top;
    const auto raise = [&](int64_t i, int64_t j) {
        float term = exponential(scores[i] - top);
        if constexpr (Masked) term = mask[i] ? term : 0.0f;
        scores[i] = term;
        sums[j] += term;
    };
    for (i = 0; i + width <= count; i += width)
        for (int64_t j = 0; j < width; ++j) raise(i + j, j);
    for (; i < count; ++i) raise(i, i % width);
    float sum = 0, wrong = 0;
    for (const float value : sums) sum += value;
    for (const float value : check) wrong += value;
    return {top, sum + wrong};
}

inline SoftmaxPart softmax_part_kernel(float* scores, int64_t count, float scale, const uint8_t* mask) {
    return mask ? softmax_passes<true>(scores, count, scale, mask) : softmax_passes<false>(scores, count, scale, mask);
}

inline float softmax_kernel(float* scores, int64_t count, float scale, const uint8_t* mask) {
    return 1.0f / softmax_part_kernel(scores, count, scale, mask).sum;
}

}  // namespace
}  // namespace moei

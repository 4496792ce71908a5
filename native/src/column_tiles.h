// The product with a transposed Q8_0 matrix in rows16 order, over the Lanes of float_kernels.h: see kernels.h.
#pragma once

namespace moei {
namespace {

inline void q8_0_columns(const uint8_t* tiles, int64_t stride, int64_t count, const float* x, float* out) {
    constexpr int pieces = 8, lanes = 64;  // of a tile: four columns of sixteen rows each
    alignas(64) float sums[pieces][lanes] = {};
    alignas(64) float scales[16], factors[lanes];
    for (int64_t tile = 0; tile < count; ++tile, tiles += stride) {
        store(scales, load(F16{}, tiles));
        for (int lane = 0; lane < lanes; ++lane) factors[lane] = scales[lane / 4] * x[16 * tile + lane / 4];
        const auto* const quants = reinterpret_cast<const int8_t*>(tiles + 32);
        for (int piece = 0; piece < pieces; ++piece)
            for (int lane = 0; lane < lanes; ++lane)
                sums[piece][lane] += factors[lane] * static_cast<float>(quants[lanes * piece + lane]);
    }
    for (int piece = 0; piece < pieces; ++piece) {
        for (int half = lanes / 2; half >= 4; half /= 2)
            for (int lane = 0; lane < half; ++lane) sums[piece][lane] += sums[piece][lane + half];
        memcpy(out + 4 * piece, sums[piece], 4 * sizeof(float));
    }
}

}  // namespace
}  // namespace moei

// Plain C++ for every processor. Products of the floating-point kernels are rounded before they are added: fused
// multiply-add is a slow library call where the hardware lacks it.
#include "formats.h"
#include "exponential.h"
#include "kernels.h"

namespace moei {
namespace {

struct Lanes {
    float v[16];
};
constexpr int kRows = 1, kTokens = 4;
constexpr bool kSums16 = false;
inline Lanes sum16(const Lanes* rows) { return rows[0]; }  // never called

inline Lanes zero() { return {}; }
inline Lanes broadcast(float value) {
    Lanes lanes;
    for (float& lane : lanes.v) lane = value;
    return lanes;
}
inline Lanes fma(const Lanes& a, const Lanes& b, Lanes c) {
    for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
}
inline float sum(Lanes lanes) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes.v[i] += lanes.v[i + half];
    return lanes.v[0];
}
inline void store(float* out, const Lanes& lanes) { memcpy(out, lanes.v, sizeof lanes.v); }

struct Bits {
    uint64_t v[2];
};
inline Bits no_bits() { return {}; }
inline Bits flip_bits(Bits bits, const uint8_t* data) {
    Bits other;
    memcpy(&other, data, sizeof other);
    return {{bits.v[0] ^ other.v[0], bits.v[1] ^ other.v[1]}};
}

Lanes load(F32, const uint8_t* from) {
    Lanes lanes;
    memcpy(lanes.v, from, sizeof lanes.v);
    return lanes;
}
Lanes load(F16, const uint8_t* from) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) {
        uint16_t half;
        memcpy(&half, from + 2 * i, sizeof half);
        lanes.v[i] = half_to_float(half);
    }
    return lanes;
}
Lanes load(BF16, const uint8_t* from) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, sizeof bits);
        lanes.v[i] = bfloat_to_float(bits);
    }
    return lanes;
}

}  // namespace
}  // namespace moei

#include "float_kernels.h"

#include "column_tiles.h"

namespace moei {
namespace {

inline float half_scale(const uint8_t* tile, int r) {
    uint16_t half;
    memcpy(&half, tile + 2 * r, sizeof half);
    return half_to_float(half);
}

struct Q8 {
    static constexpr int tile_nbytes = 16 * 34, scales_nbytes = 32;
    static float scale(const uint8_t* tile, int r) { return half_scale(tile, r); }
    static constexpr bool wide = true;
    static void dots(const uint8_t* quants, const int8_t* x, int64_t cols, int32_t* dot) {
        for (int k = 0; k < 8; ++k)
            for (int r = 0; r < 16; ++r)
                for (int i = 0; i < 4; ++i)
                    dot[r] += static_cast<int8_t>(quants[64 * k + 4 * r + i]) * (kWide * x[4 * k + i] + x[cols + 4 * k + i]);
    }
};
struct Q4 {
    static constexpr int tile_nbytes = 16 * 18, scales_nbytes = 32;
    static float scale(const uint8_t* tile, int r) { return half_scale(tile, r); }
    static constexpr bool wide = false;
    static void dots(const uint8_t* quants, const int8_t* x, int64_t, int32_t* dot) {
        for (int k = 0; k < 4; ++k)
            for (int r = 0; r < 16; ++r)
                for (int i = 0; i < 4; ++i) {
                    const int pair = quants[64 * k + 4 * r + i];
                    dot[r] += ((pair & 15) - kQ4Offset) * x[4 * k + i] + ((pair >> 4) - kQ4Offset) * x[16 + 4 * k + i];
                }
    }
};

struct Fp4 {
    static constexpr int tile_nbytes = 16 * 17, scales_nbytes = 16;
    static float scale(const uint8_t* tile, int r) {
        const uint32_t bits = fp4_scale_bits(tile[r]);
        return load_f32(&bits);
    }
    static constexpr bool wide = false;
    static void dots(const uint8_t* quants, const int8_t* x, int64_t, int32_t* dot) {
        for (int k = 0; k < 4; ++k)
            for (int r = 0; r < 16; ++r)
                for (int i = 0; i < 4; ++i) {
                    const int pair = quants[64 * k + 4 * r + i];
                    dot[r] += kFp4Doubled[pair & 15] * x[4 * k + i] + kFp4Doubled[pair >> 4] * x[16 + 4 * k + i];
                }
    }
};

template <typename Q>
void tile_kernel(const uint8_t* tiles, int64_t first, int64_t count, int64_t cols, const void* const* activations,
                 int64_t n, float* sums) {
    for (int64_t b = 0; b < count; ++b, tiles += Q::tile_nbytes) {
        float scales[16];
        for (int r = 0; r < 16; ++r) scales[r] = Q::scale(tiles, r);
        for (int64_t t = 0; t < n; ++t) {
            const auto* x = static_cast<const int8_t*>(activations[t]);
            int32_t dot[16] = {};
            Q::dots(tiles + Q::scales_nbytes, x + 32 * (first + b), cols, dot);
            const float scale = load_f32(x + (Q::wide ? 2 : 1) * cols + 4 * (first + b));
            for (int r = 0; r < 16; ++r) sums[16 * t + r] += static_cast<float>(dot[r]) * (scales[r] * scale);
        }
    }
}

template <typename Q>
void token_kernel(const uint8_t* const* tiles, int64_t, int rows, int64_t cols, const void* activations, float* sums) {
    for (int i = 0; i < 16 * rows; ++i) sums[i] = 0;
    for (int r = 0; r < rows; ++r) tile_kernel<Q>(tiles[r], 0, cols / 32, cols, &activations, 1, sums + 16 * r);
}

}  // namespace

const Kernels kPortable{"portable", tile_kernel<Q8>, tile_kernel<Q4>, tile_kernel<Fp4>, token_kernel<Q8>, token_kernel<Q4>, token_kernel<Fp4>, kRowsKernels, kColumnsKernels,
                        {read_streams<1>, read_streams<2>, read_streams<4>}, softmax_kernel, q8_0_columns, softmax_part_kernel};

}  // namespace moei

// 64-bit ARM. Compiled twice: as it is, and with MOEI_DOTPROD for processors with the dot product instructions.
#include <arm_neon.h>

#include "exponential.h"
#include "kernels.h"

namespace moei {
namespace {

struct Lanes {
    float32x4_t v[4];
};
constexpr int kRows = 2, kTokens = 2;
constexpr bool kSums16 = false;
inline Lanes sum16(const Lanes* rows) { return rows[0]; }  // never called

inline Lanes broadcast(float value) {
    const float32x4_t all = vdupq_n_f32(value);
    return {{all, all, all, all}};
}
inline Lanes zero() { return broadcast(0); }
inline Lanes fma(const Lanes& a, const Lanes& b, Lanes c) {
    for (int i = 0; i < 4; ++i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
    return c;
}
inline float sum(const Lanes& lanes) {
    const float32x4_t four = vaddq_f32(vaddq_f32(lanes.v[0], lanes.v[2]), vaddq_f32(lanes.v[1], lanes.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline void store(float* out, const Lanes& lanes) {
    for (int i = 0; i < 4; ++i) vst1q_f32(out + 4 * i, lanes.v[i]);
}
inline Lanes load(F32, const uint8_t* from) {
    Lanes lanes;
    for (int i = 0; i < 4; ++i) lanes.v[i] = vreinterpretq_f32_u8(vld1q_u8(from + 16 * i));
    return lanes;
}
inline Lanes load(F16, const uint8_t* from) {
    Lanes lanes;
    for (int i = 0; i < 4; ++i) lanes.v[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from + 8 * i)));
    return lanes;
}
inline Lanes load(BF16, const uint8_t* from) {
    Lanes lanes;
    for (int i = 0; i < 4; ++i) {
        lanes.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(from + 8 * i)), 16));
    }
    return lanes;
}

using Bits = uint8x16_t;
inline Bits no_bits() { return vdupq_n_u8(0); }
inline Bits flip_bits(Bits bits, const uint8_t* data) { return veorq_u8(bits, vld1q_u8(data)); }

// dot[i] += four weights of each of four rows times the same four activations.
inline int32x4_t add_dots(int32x4_t dot, int8x16_t w, int8x16_t activations) {
#ifdef MOEI_DOTPROD
    return vdotq_s32(dot, w, activations);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(activations));
    const int16x8_t high = vmull_s8(vget_high_s8(w), vget_high_s8(activations));
    return vaddq_s32(dot, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}
inline int8x16_t four(const int8_t* x) { return vreinterpretq_s8_u32(vdupq_n_u32(load_u32(x))); }

// Rows 4 i .. 4 i + 3 are dot[i].
struct Q8 {
    static constexpr int tile_nbytes = 16 * 34, scales_nbytes = 32;
    static Lanes scales(const uint8_t* tile) { return load(F16{}, tile); }
    static constexpr bool corrected = false, wide = true;
    static void dots(const uint8_t* quants, const int8_t* x, int64_t cols, int32x4_t* dot) {
        int32x4_t highs[4];
        for (int32x4_t& part : highs) part = vdupq_n_s32(0);
        for (int k = 0; k < 8; ++k) {
            const int8x16_t high = four(x + 4 * k), low = four(x + cols + 4 * k);
            for (int i = 0; i < 4; ++i) {
                const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(quants + 64 * k + 16 * i));
                highs[i] = add_dots(highs[i], w, high);
                dot[i] = add_dots(dot[i], w, low);
            }
        }
        for (int i = 0; i < 4; ++i) dot[i] = vaddq_s32(dot[i], vshlq_n_s32(highs[i], kWideBits));
    }
};
struct Q4 {
    static constexpr int tile_nbytes = 16 * 18, scales_nbytes = 32;
    static Lanes scales(const uint8_t* tile) { return load(F16{}, tile); }
    static constexpr bool corrected = true, wide = false;
    static void dots(const uint8_t* quants, const int8_t* x, int64_t, int32x4_t* dot) {
        for (int k = 0; k < 4; ++k) {
            const int8x16_t first = four(x + 4 * k), second = four(x + 16 + 4 * k);
            for (int i = 0; i < 4; ++i) {
                const uint8x16_t packed = vld1q_u8(quants + 64 * k + 16 * i);
                dot[i] = add_dots(dot[i], vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15))), first);
                dot[i] = add_dots(dot[i], vreinterpretq_s8_u8(vshrq_n_u8(packed, 4)), second);
            }
        }
    }
};

struct Fp4 {
    static constexpr int tile_nbytes = 16 * 17, scales_nbytes = 16;
    static constexpr bool corrected = false, wide = false;
    static Lanes scales(const uint8_t* tile) {
        const uint8x16_t exponents = vld1q_u8(tile);
        const uint16x8_t halves[2] = {vmovl_u8(vget_low_u8(exponents)), vmovl_u8(vget_high_u8(exponents))};
        Lanes lanes;
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t e = vmovl_u16(i % 2 ? vget_high_u16(halves[i / 2]) : vget_low_u16(halves[i / 2]));
            const uint32x4_t bits = vshlq_n_u32(vsubq_u32(e, vdupq_n_u32(1)), 23);
            const uint32x4_t small = vshlq_u32(vdupq_n_u32(kFp4Subnormal), vreinterpretq_s32_u32(e));
            lanes.v[i] = vreinterpretq_f32_u32(vbslq_u32(vcltq_u32(e, vdupq_n_u32(2)), small, bits));
        }
        return lanes;
    }
    static void dots(const uint8_t* quants, const int8_t* x, int64_t, int32x4_t* dot) {
        const int8x16_t table = vld1q_s8(kFp4Doubled);
        for (int k = 0; k < 4; ++k) {
            const int8x16_t first = four(x + 4 * k), second = four(x + 16 + 4 * k);
            for (int i = 0; i < 4; ++i) {
                const uint8x16_t packed = vld1q_u8(quants + 64 * k + 16 * i);
                dot[i] = add_dots(dot[i], vqtbl1q_s8(table, vandq_u8(packed, vdupq_n_u8(15))), first);
                dot[i] = add_dots(dot[i], vqtbl1q_s8(table, vshrq_n_u8(packed, 4)), second);
            }
        }
    }
};

template <typename Q, int N>
void tile_tokens(const uint8_t* tiles, int64_t first, int64_t count, int64_t cols, const void* const* rows, float* out) {
    const int8_t* x[N];
    for (int t = 0; t < N; ++t) x[t] = static_cast<const int8_t*>(rows[t]);
    Lanes sums[N];
    for (int t = 0; t < N; ++t)
        for (int i = 0; i < 4; ++i) sums[t].v[i] = vld1q_f32(out + 16 * t + 4 * i);
    for (int64_t b = first; b < first + count; ++b, tiles += Q::tile_nbytes) {
        const Lanes scales = Q::scales(tiles);
        const int64_t at_scale = (Q::wide ? 2 : 1) * cols + 4 * b;
        for (int t = 0; t < N; ++t) {
            const int32_t start = Q::corrected ? static_cast<int32_t>(load_u32(x[t] + at_scale + cols / 8)) : 0;
            int32x4_t dot[4];
            for (int32x4_t& part : dot) part = vdupq_n_s32(start);
            Q::dots(tiles + Q::scales_nbytes, x[t] + 32 * b, cols, dot);
            const float activation_scale = load_f32(x[t] + at_scale);
            for (int i = 0; i < 4; ++i) {
                const float32x4_t scale = vmulq_n_f32(scales.v[i], activation_scale);
                sums[t].v[i] = vaddq_f32(sums[t].v[i], vmulq_f32(vcvtq_f32_s32(dot[i]), scale));
            }
        }
    }
    for (int t = 0; t < N; ++t) store(out + 16 * t, sums[t]);
}

template <typename Q>
void tile_kernel(const uint8_t* tiles, int64_t first, int64_t count, int64_t cols, const void* const* x, int64_t n,
                 float* sums) {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) tile_tokens<Q, 4>(tiles, first, count, cols, x + t, sums + 16 * t);
    for (; t < n; ++t) tile_tokens<Q, 1>(tiles, first, count, cols, x + t, sums + 16 * t);
}

template <typename Q>
void token_kernel(const uint8_t* const* tiles, int64_t, int rows, int64_t cols, const void* activations, float* sums) {
    for (int i = 0; i < 16 * rows; ++i) sums[i] = 0;
    for (int r = 0; r < rows; ++r) tile_kernel<Q>(tiles[r], 0, cols / 32, cols, &activations, 1, sums + 16 * r);
}

}  // namespace
}  // namespace moei

#include "float_kernels.h"

#include "column_tiles.h"

namespace moei {

#ifdef MOEI_DOTPROD
const Kernels kNeonDotprod{"neon-dotprod",
#else
const Kernels kNeon{"neon",
#endif
                  tile_kernel<Q8>, tile_kernel<Q4>, tile_kernel<Fp4>, token_kernel<Q8>, token_kernel<Q4>, token_kernel<Fp4>, kRowsKernels, kColumnsKernels,
                  {read_streams<1>, read_streams<2>, read_streams<4>}, softmax_kernel, q8_0_columns, softmax_part_kernel};

}  // namespace moei

// AVX2 with FMA and F16C (Haswell, Zen and later).
#include <immintrin.h>

#include "exponential.h"
#include "kernels.h"

namespace moei {
namespace {

struct Lanes {
    __m256 low, high;
};
constexpr int kRows = 2, kTokens = 2;
constexpr bool kSums16 = false;
inline Lanes sum16(const Lanes* rows) { return rows[0]; }  // never called

inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline float sum(Lanes lanes) {
    const __m256 eight = _mm256_add_ps(lanes.low, lanes.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline void store(float* out, Lanes lanes) {
    _mm256_storeu_ps(out, lanes.low);
    _mm256_storeu_ps(out + 8, lanes.high);
}
inline __m128i load_16(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline __m256i load_32(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Lanes load(F32, const uint8_t* from) {
    return {_mm256_loadu_ps(reinterpret_cast<const float*>(from)), _mm256_loadu_ps(reinterpret_cast<const float*>(from + 32))};
}
inline Lanes load(F16, const uint8_t* from) {
    return {_mm256_cvtph_ps(load_16(from)), _mm256_cvtph_ps(load_16(from + 16))};
}
inline __m256 widen_bf16(const uint8_t* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(from)), 16));
}
inline Lanes load(BF16, const uint8_t* from) { return {widen_bf16(from), widen_bf16(from + 16)}; }

using Bits = __m256i;
inline Bits no_bits() { return _mm256_setzero_si256(); }
inline Bits flip_bits(Bits bits, const uint8_t* data) { return _mm256_xor_si256(bits, load_32(data)); }

// Four activations to every lane: each lane holds four weights of its row.
inline __m256i four(const int8_t* x) { return _mm256_set1_epi32(static_cast<int>(load_u32(x))); }

// Rows 0..7 are scales.low and dot[0], rows 8..15 scales.high and dot[1].
struct Q8 {
    static constexpr int tile_nbytes = 16 * 34, scales_nbytes = 32;
    static Lanes scales(const uint8_t* tile) { return load(F16{}, tile); }
    static constexpr bool corrected = false, wide = true;
    static void dots(const uint8_t* quants, const int8_t* x, int64_t cols, __m256i* dot) {
        const __m256i ones = _mm256_set1_epi16(1), wide = _mm256_set1_epi16(kWide);
        for (int k = 0; k < 8; ++k) {
            const __m256i high = four(x + 4 * k), low = four(x + cols + 4 * k);
            for (int half = 0; half < 2; ++half) {
                // |w| * (x with w's sign): |w| <= 128 and |x| <= 127, so a pair's sum fits into 16 bits.
                const __m256i w = load_32(quants + 64 * k + 32 * half), size = _mm256_abs_epi8(w);
                const __m256i highs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(high, w));
                const __m256i lows = _mm256_maddubs_epi16(size, _mm256_sign_epi8(low, w));
                const __m256i sums = _mm256_add_epi32(_mm256_madd_epi16(highs, wide), _mm256_madd_epi16(lows, ones));
                dot[half] = _mm256_add_epi32(dot[half], sums);
            }
        }
    }
};
struct Q4 {
    static constexpr int tile_nbytes = 16 * 18, scales_nbytes = 32;
    static Lanes scales(const uint8_t* tile) { return load(F16{}, tile); }
    static constexpr bool corrected = true, wide = false;
    static void dots(const uint8_t* quants, const int8_t* x, int64_t, __m256i* dot) {
        // A block's eight pair sums of at most 2 * 15 * 127 fit into 16 bits together.
        const __m256i nibble = _mm256_set1_epi8(15);
        __m256i pairs[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int k = 0; k < 4; ++k) {
            const __m256i first = four(x + 4 * k), second = four(x + 16 + 4 * k);
            for (int half = 0; half < 2; ++half) {
                const __m256i packed = load_32(quants + 64 * k + 32 * half);
                const __m256i low = _mm256_and_si256(packed, nibble);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
                pairs[half] = _mm256_add_epi16(pairs[half], _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second)));
            }
        }
        const __m256i ones = _mm256_set1_epi16(1);
        for (int half = 0; half < 2; ++half) dot[half] = _mm256_add_epi32(dot[half], _mm256_madd_epi16(pairs[half], ones));
    }
};

struct Fp4 {
    static constexpr int tile_nbytes = 16 * 17, scales_nbytes = 16;
    static constexpr bool corrected = true, wide = false;
    static __m256 scales_8(const uint8_t* from) {
        const __m256i exponents = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        const __m256i bits = _mm256_slli_epi32(_mm256_sub_epi32(exponents, _mm256_set1_epi32(1)), 23);
        const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(kFp4Subnormal), exponents);
        return _mm256_castsi256_ps(_mm256_blendv_epi8(bits, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), exponents)));
    }
    static Lanes scales(const uint8_t* tile) { return {scales_8(tile), scales_8(tile + 8)}; }
    static void dots(const uint8_t* quants, const int8_t* x, int64_t, __m256i* dot) {
        // Four pair sums of at most 2 * 24 * 127 fit into 16 bits together, eight do not.
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kFp4Doubled));
        const __m256i table = _mm256_add_epi8(_mm256_broadcastsi128_si256(values), _mm256_set1_epi8(kFp4Offset));
        const __m256i nibble = _mm256_set1_epi8(15);
        __m256i lows[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        __m256i highs[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int k = 0; k < 4; ++k) {
            const __m256i first = four(x + 4 * k), second = four(x + 16 + 4 * k);
            for (int half = 0; half < 2; ++half) {
                const __m256i packed = load_32(quants + 64 * k + 32 * half);
                const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, nibble));
                const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble));
                lows[half] = _mm256_add_epi16(lows[half], _mm256_maddubs_epi16(low, first));
                highs[half] = _mm256_add_epi16(highs[half], _mm256_maddubs_epi16(high, second));
            }
        }
        const __m256i ones = _mm256_set1_epi16(1);
        for (int half = 0; half < 2; ++half) {
            const __m256i sums = _mm256_add_epi32(_mm256_madd_epi16(lows[half], ones), _mm256_madd_epi16(highs[half], ones));
            dot[half] = _mm256_add_epi32(dot[half], sums);
        }
    }
};

template <typename Q, int N>
void tile_tokens(const uint8_t* tiles, int64_t first, int64_t count, int64_t cols, const void* const* rows, float* out) {
    const int8_t* x[N];
    for (int t = 0; t < N; ++t) x[t] = static_cast<const int8_t*>(rows[t]);
    __m256 sums[N][2];
    for (int t = 0; t < N; ++t)
        for (int half = 0; half < 2; ++half) sums[t][half] = _mm256_loadu_ps(out + 16 * t + 8 * half);
    for (int64_t b = first; b < first + count; ++b, tiles += Q::tile_nbytes) {
        const Lanes loaded = Q::scales(tiles);
        const __m256 scales[2] = {loaded.low, loaded.high};
        const int64_t at_scale = (Q::wide ? 2 : 1) * cols + 4 * b;
        for (int t = 0; t < N; ++t) {
            const __m256i start = Q::corrected ? four(x[t] + at_scale + cols / 8) : _mm256_setzero_si256();
            __m256i dot[2] = {start, start};
            Q::dots(tiles + Q::scales_nbytes, x[t] + 32 * b, cols, dot);
            const __m256 activation_scale = _mm256_set1_ps(load_f32(x[t] + at_scale));
            for (int half = 0; half < 2; ++half) {
                const __m256 scale = _mm256_mul_ps(scales[half], activation_scale);
                sums[t][half] = _mm256_add_ps(sums[t][half], _mm256_mul_ps(_mm256_cvtepi32_ps(dot[half]), scale));
            }
        }
    }
    for (int t = 0; t < N; ++t)
        for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + 16 * t + 8 * half, sums[t][half]);
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

const Kernels kAvx2{"avx2", tile_kernel<Q8>, tile_kernel<Q4>, tile_kernel<Fp4>, token_kernel<Q8>, token_kernel<Q4>, token_kernel<Fp4>, kRowsKernels, kColumnsKernels,
                    {read_streams<1>, read_streams<2>, read_streams<4>}, softmax_kernel, q8_0_columns, softmax_part_kernel};

}  // namespace moei

// AVX-512 with VNNI (Ice Lake, Zen 4 and later).
#include "kernels_avx512.h"

#include "exponential.h"

namespace moei {
namespace {

using Lanes = __m512;
constexpr int kRows = 4, kTokens = 4;
constexpr bool kSums16 = true;

inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes broadcast(float value) { return _mm512_set1_ps(value); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Lanes lanes) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
// Lane i: sum(rows[i]). Each step halves the lanes of two vectors at once.
inline __attribute__((always_inline)) Lanes sum16(const Lanes* rows) {
    __m512 fours[4], twos[2];
    for (int i = 0; i < 4; ++i) {
        __m512 eights[2];
        for (int j = 0; j < 2; ++j) {
            const __m512 a = rows[i + 8 * j], b = rows[i + 8 * j + 4];
            eights[j] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
        }
        fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88), _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512 a = fours[2 * i], b = fours[2 * i + 1];
        twos[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(twos[0], twos[1], 0x88), _mm512_shuffle_ps(twos[0], twos[1], 0xdd));
}
inline void store(float* out, Lanes lanes) { _mm512_storeu_ps(out, lanes); }
inline Lanes load(F32, const uint8_t* from) { return _mm512_loadu_ps(from); }
inline Lanes load(F16, const uint8_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Lanes load(BF16, const uint8_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

using Bits = __m512i;
inline Bits no_bits() { return _mm512_setzero_si512(); }
inline Bits flip_bits(Bits bits, const uint8_t* data) { return _mm512_xor_si512(bits, _mm512_loadu_si512(data)); }

// Four activations to every lane: each lane holds four weights of its row.
inline __m512i four(const int8_t* x) { return _mm512_set1_epi32(static_cast<int>(load_u32(x))); }

struct Q8 : Q8Tile {
    template <int N>
    static void dots(const uint8_t* quants, const int8_t* const* x, int64_t at, int64_t cols, __m512i* dot) {
        // Weights become unsigned by flipping the sign bit (adding 128); the correction is in `dot` already.
        const __m512i sign = _mm512_set1_epi8(-128);
        const int64_t low = at + cols;
        __m512i high[N];
        for (int t = 0; t < N; ++t) high[t] = _mm512_setzero_si512();
        for (int k = 0; k < 8; ++k) {
            const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(quants + 64 * k), sign);
            for (int t = 0; t < N; ++t) {
                high[t] = _mm512_dpbusd_epi32(high[t], w, four(x[t] + at + 4 * k));
                dot[t] = _mm512_dpbusd_epi32(dot[t], w, four(x[t] + low + 4 * k));
            }
        }
        for (int t = 0; t < N; ++t) dot[t] = _mm512_add_epi32(dot[t], _mm512_slli_epi32(high[t], kWideBits));
    }
};
struct Q4 : Q4Tile {
    template <int N>
    static void dots(const uint8_t* quants, const int8_t* const* x, int64_t at, int64_t, __m512i* dot) {
        for (int k = 0; k < 4; ++k) {
            const __m512i pairs = _mm512_loadu_si512(quants + 64 * k), low = low_nibbles(pairs), high = high_nibbles(pairs);
            for (int t = 0; t < N; ++t) {
                dot[t] = _mm512_dpbusd_epi32(dot[t], low, four(x[t] + at + 4 * k));
                dot[t] = _mm512_dpbusd_epi32(dot[t], high, four(x[t] + at + 16 + 4 * k));
            }
        }
    }
};

struct Fp4 : Fp4Tile {
    template <int N>
    static void dots(const uint8_t* quants, const int8_t* const* x, int64_t at, int64_t, __m512i* dot) {
        const __m512i table = _mm512_add_epi8(fp4_table(), _mm512_set1_epi8(kFp4Offset));
        for (int k = 0; k < 4; ++k) {
            const __m512i pairs = _mm512_loadu_si512(quants + 64 * k);
            const __m512i low = _mm512_shuffle_epi8(table, low_nibbles(pairs)), high = _mm512_shuffle_epi8(table, high_nibbles(pairs));
            for (int t = 0; t < N; ++t) {
                dot[t] = _mm512_dpbusd_epi32(dot[t], low, four(x[t] + at + 4 * k));
                dot[t] = _mm512_dpbusd_epi32(dot[t], high, four(x[t] + at + 16 + 4 * k));
            }
        }
    }
};

// Few tokens wait for memory. Asking this far ahead, also across the pages where the processor's own prefetching ends,
// brings 7 to 20% where it was measured; 1024 does as well as 2048.
constexpr int64_t kAhead = 2048;

template <typename Q, int N>
void tile_tokens(const uint8_t* tiles, int64_t first, int64_t count, int64_t cols, const void* const* rows, float* out) {
    const int8_t* x[N];
    for (int t = 0; t < N; ++t) x[t] = static_cast<const int8_t*>(rows[t]);
    __m512 sums[N];
    for (int t = 0; t < N; ++t) sums[t] = _mm512_loadu_ps(out + 16 * t);
    for (int64_t b = first; b < first + count; ++b, tiles += Q::tile_nbytes) {
        if constexpr (N <= 4) {
            for (int line = 0; line < Q::tile_nbytes; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(tiles) + kAhead + line, _MM_HINT_T0);
            }
        }
        const __m512 scales = Q::scales(tiles);
        const int64_t at_scale = (Q::wide ? 2 : 1) * cols + 4 * b, at_correction = at_scale + cols / 8;
        __m512i dot[N];
        for (int t = 0; t < N; ++t) dot[t] = four(x[t] + at_correction);
        Q::template dots<N>(tiles + Q::scales_nbytes, x, 32 * b, cols, dot);
        for (int t = 0; t < N; ++t) {
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(load_f32(x[t] + at_scale)));
            sums[t] = _mm512_add_ps(sums[t], _mm512_mul_ps(_mm512_cvtepi32_ps(dot[t]), scale));
        }
    }
    for (int t = 0; t < N; ++t) _mm512_storeu_ps(out + 16 * t, sums[t]);
}

template <typename Q>
void tile_kernel(const uint8_t* tiles, int64_t first, int64_t count, int64_t cols, const void* const* x, int64_t n,
                 float* sums) {
    int64_t t = 0;
    for (; t + 8 <= n; t += 8) tile_tokens<Q, 8>(tiles, first, count, cols, x + t, sums + 16 * t);
    if (n - t >= 4) tile_tokens<Q, 4>(tiles, first, count, cols, x + t, sums + 16 * t), t += 4;
    if (n - t >= 2) tile_tokens<Q, 2>(tiles, first, count, cols, x + t, sums + 16 * t), t += 2;
    if (n - t >= 1) tile_tokens<Q, 1>(tiles, first, count, cols, x + t, sums + 16 * t);
}

template <typename Q, int R>
void token_rows(const uint8_t* const* rows, int64_t skip, int64_t cols, const int8_t* x, float* out) {
    const int64_t nbytes = cols / 32 * Q::tile_nbytes;
    __m512 sums[R];
    const uint8_t* tiles[R];
    for (int r = 0; r < R; ++r) {
        sums[r] = _mm512_setzero_ps();
        tiles[r] = rows[r];
    }
    for (int64_t b = 0, at = 0; at < nbytes; ++b, at += Q::tile_nbytes) {
        const int64_t at_scale = (Q::wide ? 2 : 1) * cols + 4 * b;
        const __m512 x_scale = _mm512_set1_ps(load_f32(x + at_scale));
        const __m512i correction = four(x + at_scale + cols / 8);
        const int64_t ahead = at + kAhead + (at + kAhead < nbytes ? 0 : skip);
        for (int r = 0; r < R; ++r) {
            const uint8_t* const tile = tiles[r] + at;
            for (int line = 0; line < Q::tile_nbytes; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(tiles[r]) + ahead + line, _MM_HINT_T0);
            }
            __m512i dot[1] = {correction};
            Q::template dots<1>(tile + Q::scales_nbytes, &x, 32 * b, cols, dot);
            const __m512 scale = _mm512_mul_ps(Q::scales(tile), x_scale);
            sums[r] = _mm512_add_ps(sums[r], _mm512_mul_ps(_mm512_cvtepi32_ps(dot[0]), scale));
        }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(out + 16 * r, sums[r]);
}

template <typename Q>
void token_kernel(const uint8_t* const* tiles, int64_t skip, int rows, int64_t cols, const void* activations, float* sums) {
    const auto* const x = static_cast<const int8_t*>(activations);
    switch (rows) {
        case 1: return token_rows<Q, 1>(tiles, skip, cols, x, sums);
        case 2: return token_rows<Q, 2>(tiles, skip, cols, x, sums);
        case 3: return token_rows<Q, 3>(tiles, skip, cols, x, sums);
        default: return token_rows<Q, 4>(tiles, skip, cols, x, sums);
    }
}

}  // namespace
}  // namespace moei

#include "float_kernels.h"

#include "column_tiles.h"

namespace moei {

const Kernels kAvx512{"avx512", tile_kernel<Q8>, tile_kernel<Q4>, tile_kernel<Fp4>, token_kernel<Q8>, token_kernel<Q4>, token_kernel<Fp4>, kRowsKernels, kColumnsKernels,
                      {read_streams<1>, read_streams<2>, read_streams<4>}, softmax_kernel, q8_0_columns, softmax_part_kernel};

}  // namespace moei

// How a tile of 16 rows is read with AVX-512, for the files of kernels that are compiled with it.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace moei {
namespace {

struct HalfScales {
    static constexpr int scales_nbytes = 32;
    static __m512 scales(const uint8_t* tile) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile)));
    }
};
struct Q8Tile : HalfScales {
    static constexpr int tile_nbytes = 16 * 34;
    static constexpr bool wide = true;
};
// Four-bit weights: 64 bytes hold columns k to k + 3 of 16 rows in their low bits, k + 16 to k + 19 in the high ones.
struct Q4Tile : HalfScales {
    static constexpr int tile_nbytes = 16 * 18;
    static constexpr bool wide = false;
};
struct Fp4Tile {
    static constexpr int tile_nbytes = 16 * 17, scales_nbytes = 16;
    static constexpr bool wide = false;
    static __m512 scales(const uint8_t* tile) {
        const __m512i exponents = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile)));
        const __m512i bits = _mm512_slli_epi32(_mm512_sub_epi32(exponents, _mm512_set1_epi32(1)), 23);
        const __mmask16 small = _mm512_cmplt_epu32_mask(exponents, _mm512_set1_epi32(2));
        return _mm512_castsi512_ps(_mm512_mask_sllv_epi32(bits, small, _mm512_set1_epi32(kFp4Subnormal), exponents));
    }
};

inline __m512i low_nibbles(__m512i pairs) { return _mm512_and_si512(pairs, _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(__m512i pairs) { return low_nibbles(_mm512_srli_epi16(pairs, 4)); }
inline __m512i fp4_table() { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kFp4Doubled))); }

}  // namespace
}  // namespace moei

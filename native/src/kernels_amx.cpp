// AMX beside AVX-512: products of a matrix with many rows of activations.
//
// A block column of 16 weight rows is a tile of AMX as it is stored, 16 rows of activations are another, and their product
// is 256 integer dots. They pass through memory, for AVX-512 reads no tiles, and are scaled and added there, with the
// operations of kernels_avx512.cpp. That takes longest: beside tile instructions, whatever the order, the processor does
// half as many multiplications as without.
#include "kernels_avx512.h"

namespace moei {
namespace {

struct Q8 : Q8Tile {
    static constexpr bool unpacked = false;
};
struct Q4 : Q4Tile {
    static constexpr bool unpacked = true;
    static __m512i weights(__m512i nibbles) { return _mm512_sub_epi8(nibbles, _mm512_set1_epi8(kQ4Offset)); }
};
struct Fp4 : Fp4Tile {
    static constexpr bool unpacked = true;
    static __m512i weights(__m512i nibbles) { return _mm512_shuffle_epi8(fp4_table(), nibbles); }
};

// Compilers do not know what tile instructions read.
inline void finish_writing() { asm volatile("" ::: "memory"); }

// A group of packed activations: for each block the 16 rows' int8 values (wide: the high ones, then the low ones), 32 bytes
// a row; then for each row the scales of its blocks.
constexpr int kWeightsNbytes = 16 * 32, kValuesNbytes = kGroupTokens * 32;
template <typename Q>
constexpr int kWeightsStep = Q::unpacked ? kWeightsNbytes : Q::tile_nbytes;
template <typename Q>
constexpr int kBlockNbytes = (Q::wide ? 2 : 1) * kValuesNbytes;
template <typename Q>
constexpr int kScalesAt = kGroupBlocks * kBlockNbytes<Q>;
template <typename Q>
constexpr int kGroupStride = kScalesAt<Q> + kGroupTokens * kGroupBlocks * 4;
static_assert(kGroupStride<Q8> == kGroupNbytes);

template <typename Q>
void pack(const void* const* rows, int64_t n, int64_t first, int64_t count, int64_t cols, uint8_t* packed) {
    constexpr int parts = Q::wide ? 2 : 1;
    for (int64_t start = 0; start < n; start += kGroupTokens, rows += kGroupTokens, packed += kGroupStride<Q>) {
        const int64_t tokens = n - start < kGroupTokens ? n - start : kGroupTokens;
        // Two blocks, a line of memory, at a time: a column of one line of each row would fall into few sets of the cache.
        for (int64_t b = 0; b < count; b += 2) {
            const auto width = static_cast<size_t>(b + 1 < count ? 64 : 32);
            for (int64_t t = 0; t < tokens; ++t) {
                for (int part = 0; part < parts; ++part) {
                    const uint8_t* const values = static_cast<const uint8_t*>(rows[t]) + part * cols + 32 * (first + b);
                    uint8_t* const out = packed + b * kBlockNbytes<Q> + part * kValuesNbytes + 32 * t;
                    memcpy(out, values, 32);
                    if (width == 64) memcpy(out + kBlockNbytes<Q>, values + 32, 32);
                }
            }
        }
        for (int64_t t = 0; t < tokens; ++t) {
            const uint8_t* const scales = static_cast<const uint8_t*>(rows[t]) + parts * cols + 4 * first;
            memcpy(packed + kScalesAt<Q> + 4 * t * kGroupBlocks, scales, static_cast<size_t>(4 * count));
        }
    }
}

// Two blocks are under way: the dots of even ones are in tiles 0 and 1, those of odd ones in 2 and 3.
template <typename Q, bool Odd>
inline __attribute__((always_inline)) void multiply(const uint8_t* weights, const uint8_t* x) {
    _tile_loadd(6, weights, 64);
    _tile_loadd(4, x, 32);
    if constexpr (Q::wide) _tile_loadd(5, x + kValuesNbytes, 32);
    if constexpr (Odd) {
        _tile_zero(2);
        _tile_dpbssd(2, 4, 6);
        if constexpr (Q::wide) {
            _tile_zero(3);
            _tile_dpbssd(3, 5, 6);
        }
    } else {
        _tile_zero(0);
        _tile_dpbssd(0, 4, 6);
        if constexpr (Q::wide) {
            _tile_zero(1);
            _tile_dpbssd(1, 5, 6);
        }
    }
}

struct Dots {
    alignas(64) int32_t high[kGroupTokens][16], low[kGroupTokens][16];
};

template <typename Q, bool Odd>
inline __attribute__((always_inline)) void store(Dots& dots) {
    if constexpr (Odd) {
        _tile_stored(2, dots.high, 64);
        if constexpr (Q::wide) _tile_stored(3, dots.low, 64);
    } else {
        _tile_stored(0, dots.high, 64);
        if constexpr (Q::wide) _tile_stored(1, dots.low, 64);
    }
}

// One row of tiles and at most N of a group's rows of activations: out[t * ld + lane] becomes or grows by their product.
// `ahead`: tiles that are wanted soon, or null.
template <typename Q, int N>
void group_tile(const uint8_t* tiles, const uint8_t* weights, const uint8_t* ahead, int64_t count, const uint8_t* x, int64_t n,
                bool start, __mmask16 lanes, float* out, int64_t ld) {
    Dots dots[2];
    __m512 sums[N];
    for (int t = 0; t < N; ++t) sums[t] = start || t >= n ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, out + t * ld);
    const auto multiply_block = [&]<bool Odd>(int64_t b) __attribute__((always_inline)) {
        multiply<Q, Odd>(weights + b * kWeightsStep<Q>, x + b * kBlockNbytes<Q>);
    };
    const auto step = [&]<bool Odd>(int64_t b) __attribute__((always_inline)) {
        if (b + 2 < count) multiply_block.template operator()<Odd>(b + 2);
        if (b + 1 < count) store<Q, !Odd>(dots[!Odd]);
        if (ahead) {
            for (int line = 0; line < Q::tile_nbytes; line += 64) _mm_prefetch(ahead + b * Q::tile_nbytes + line, _MM_HINT_T0);
        }
        const __m512 scales = Q::scales(tiles + b * Q::tile_nbytes);
        const uint8_t* const x_scales = x + kScalesAt<Q> + 4 * b;
        for (int t = 0; t < N; ++t) {
            __m512i dot = _mm512_load_si512(dots[Odd].high[t]);
            if constexpr (Q::wide) dot = _mm512_add_epi32(_mm512_slli_epi32(dot, kWideBits), _mm512_load_si512(dots[Odd].low[t]));
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(load_f32(x_scales + 4 * kGroupBlocks * t)));
            sums[t] = _mm512_add_ps(sums[t], _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale));
        }
    };
    multiply_block.template operator()<false>(0);
    store<Q, false>(dots[0]);
    if (count > 1) multiply_block.template operator()<true>(1);
    for (int64_t b = 0; b < count; b += 2) {
        step.template operator()<false>(b);
        if (b + 1 < count) step.template operator()<true>(b + 1);
    }
    for (int t = 0; t < N; ++t) {
        if (t < n) _mm512_mask_storeu_ps(out + t * ld, lanes, sums[t]);
    }
}

template <typename Q>
void unpack(const uint8_t* tiles, int64_t count, uint8_t* weights) {
    for (int64_t b = 0; b < count; ++b, weights += kWeightsNbytes) {
        for (int k = 0; k < 4; ++k) {
            const __m512i pairs = _mm512_loadu_si512(tiles + b * Q::tile_nbytes + Q::scales_nbytes + 64 * k);
            _mm512_store_si512(weights + 64 * k, Q::weights(low_nibbles(pairs)));
            _mm512_store_si512(weights + 64 * (k + 4), Q::weights(high_nibbles(pairs)));
        }
    }
}

struct TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t colsb[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfiguration) == 64);

template <typename Q>
void multiply_groups(const uint8_t* tiles, int64_t stride, int64_t rows, int64_t count, const uint8_t* packed, int64_t n,
                     bool start, float* out, int64_t ld) {
    alignas(64) TileConfiguration configuration;
    const auto tokens = static_cast<uint8_t>(n < kGroupTokens ? n : kGroupTokens);
    for (int tile = 0; tile < 7; ++tile) {
        configuration.colsb[tile] = tile == 4 || tile == 5 ? 32 : 64;
        configuration.rows[tile] = tile == 6 ? 8 : tokens;
    }
    finish_writing();
    _tile_loadconfig(&configuration);
    alignas(64) uint8_t unpacked[Q::unpacked ? kGroupBlocks * kWeightsNbytes : 1];
    const uint8_t* const end = tiles + count * Q::tile_nbytes;
    for (int64_t row = 0; row < rows; row += 16, tiles += stride) {
        const auto lanes = static_cast<__mmask16>(rows - row < 16 ? (1 << (rows - row)) - 1 : 0xffff);
        const uint8_t* weights = tiles + Q::scales_nbytes;
        if constexpr (Q::unpacked) {
            unpack<Q>(tiles, count, unpacked);
            finish_writing();
            weights = unpacked;
        }
        const uint8_t* ahead = row + 16 < rows ? tiles + stride : end;
        for (int64_t t = 0; t < n; t += kGroupTokens, ahead = nullptr) {
            const uint8_t* const x = packed + t / kGroupTokens * kGroupStride<Q>;
            const auto add = [&]<int N>() {
                group_tile<Q, N>(tiles, weights, ahead, count, x, n - t, start, lanes, out + t * ld + row, ld);
            };
            switch ((n - t + 3) / 4) {
                case 1: add.template operator()<4>(); break;
                case 2: add.template operator()<8>(); break;
                case 3: add.template operator()<12>(); break;
                default: add.template operator()<16>();
            }
        }
    }
    _tile_release();
}

}  // namespace

const GroupKernels kAmxGroups[3]{{pack<Q8>, multiply_groups<Q8>}, {pack<Q4>, multiply_groups<Q4>}, {pack<Fp4>, multiply_groups<Fp4>}};

}  // namespace moei

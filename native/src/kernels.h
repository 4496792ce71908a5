// One table of inner kernels per instruction set, chosen at run time.
//
// Only this header and <cstdint>, <cstring> may be included by the files that are compiled with special flags: an
// inline function of the standard library, compiled there and kept by the linker, would crash older processors.
#pragma once

#include <cstdint>
#include <cstring>

namespace moei {

// A row of activations as integers in blocks of 32: cols int8 values, then a float scale for each block, then for each
// block an int32 correction (minus the sum of its values times the offset of the weight format). Rows for Q8_0 are `wide`:
// a value is kWide * high + low, cols int8 values `high` being followed by cols int8 values `low`, -64 to 63.
static inline int64_t quantized_row_nbytes(int64_t cols, bool wide) { return ((wide ? 2 : 1) * cols + cols / 32 * 8 + 63) / 64 * 64; }
constexpr int kWideBits = 7, kWide = 1 << kWideBits;
constexpr int kQ8Offset = 128;  // what turns Q8_0's signed weights into the unsigned ones that integer dots want
constexpr int kQ4Offset = 8;    // Q4_0's own zero point
constexpr int kFp4Offset = 12;  // what turns the doubled FP4 values, -12 to 12, into unsigned ones

// The FP4 values (E2M1) doubled, by their four bits.
constexpr int8_t kFp4Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr uint32_t kFp4Subnormal = 0x200000;  // 2^-128 as a float
// The bits of 2^(exponent - 128), the scale of doubled FP4 values: a normal float but for the first two exponents.
static inline uint32_t fp4_scale_bits(uint32_t exponent) {
    return exponent < 2 ? kFp4Subnormal << exponent : (exponent - 1) << 23;
}

// Adds the products of one row of tiles, block columns [first, first + count), with n quantised activation rows of `cols`
// values to sums[n][16]. `tiles` points at column `first`. In every kernel each sum is
//     sum += float(integer dot of the block) * (weight scale * activation scale)
// block after block, each operation rounded, so all instruction sets and all n give the same bits.
using TileKernel = void (*)(const uint8_t* tiles, int64_t first, int64_t count, int64_t cols,
                            const void* const* activations, int64_t n, float* sums);
// The same for one activation row and 1 to kStreams rows of tiles at once, all columns; sums[rows][16] need no value before.
// One token waits for memory, which gives more to several streams. What is read after a row begins `skip` bytes behind it.
constexpr int kStreams = 4;
using TokenKernel = void (*)(const uint8_t* const* tiles, int64_t skip, int rows, int64_t cols, const void* activations, float* sums);

// The same for many rows of activations and `rows` rows of a matrix at once, with a matrix unit. `pack` brings n rows,
// block columns [first, first + count), to where the unit wants them: kGroupNbytes for each kGroupTokens rows, the last of
// which may be incomplete. `multiply` is given tiles from column `first` on, `stride` bytes from one row of tiles to the
// next, and adds to out[t * ld + r], or begins there if `start`. The processor must have granted the unit to this process.
constexpr int kGroupTokens = 16, kGroupBlocks = 16;
constexpr int64_t kGroupNbytes = kGroupTokens * kGroupBlocks * (2 * 32 + 4);
struct GroupKernels {
    void (*pack)(const void* const* activations, int64_t n, int64_t first, int64_t count, int64_t cols, uint8_t* packed);
    void (*multiply)(const uint8_t* tiles, int64_t stride, int64_t rows, int64_t count, const uint8_t* packed, int64_t n, bool start, float* out, int64_t ld);
};

// out[t * ld + r] = sum over c of w[r * stride + c] * x[t][c] (rows), or w[c * stride + r] * x[t][c] (columns).
// rows: sixteen partial sums, c modulo 16, each in ascending c with fused multiply-adds (the portable path rounds
// the product), then added in halves: 8, 4, 2, 1. columns: one sum in ascending c.
using FloatKernel = void (*)(const uint8_t* w, int64_t stride, int64_t rows, int64_t cols, const void* const* x,
                             int64_t n, float* out, int64_t ld);

// Reads every byte once and returns something that depends on all of them.
using ReadKernel = uint64_t (*)(const uint8_t* data, int64_t nbytes);

// scores become exp(scale * score - the largest of these), in place; the result times them are probabilities. mask: for
// each whether it counts; the others become 0. null: all count. A score that is no number makes the result NaN.
using SoftmaxKernel = float (*)(float* scores, int64_t count, float scale, const uint8_t* mask);
// The same without the division, for a part of the scores: the largest (of scale * score) and the sum of the exponentials.
struct SoftmaxPart {
    float largest, sum;
};
using SoftmaxPartKernel = SoftmaxPart (*)(float* scores, int64_t count, float scale, const uint8_t* mask);

// out[32] = sum over the rows of `count` Q8_0 tiles of x[row] times the row's 32 weights. tiles: the first; `stride`: bytes
// from one to the next. Sixteen partial sums, row modulo 16, each in ascending row of (scale * x[row]) * quant, every
// operation rounded, then added in halves: all instruction sets give the same bits.
using ColumnTilesKernel = void (*)(const uint8_t* tiles, int64_t stride, int64_t count, const float* x, float* out);

struct FloatKernels {
    FloatKernel f32, f16, bf16;
};

struct Kernels {
    const char* isa;
    TileKernel q8_0, q4_0, mxfp4;
    TokenKernel token_q8_0, token_q4_0, token_mxfp4;
    FloatKernels rows, columns;
    ReadKernel read[3];  // one, two and four streams
    SoftmaxKernel softmax;
    ColumnTilesKernel q8_0_columns;
    SoftmaxPartKernel softmax_part;
    GroupKernels groups[3] = {};  // Q8_0, Q4_0, MXFP4; null without a matrix unit
};

extern const Kernels kPortable;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const GroupKernels kAmxGroups[3];  // where the compiler knows AMX: MOEI_AMX
#elif defined(__aarch64__)
extern const Kernels kNeon;
extern const Kernels kNeonDotprod;
#endif

// The best table that this processor runs, or the one that MOEI_NATIVE_ISA names (portable, avx2, avx512, amx_int8, neon,
// neon-dotprod).
// Throws std::runtime_error if that name is unknown or cannot run here.
const Kernels& kernels();

// Element types, as tags that choose a load.
struct F32 {
    static constexpr int nbytes = 4;
};
struct F16 {
    static constexpr int nbytes = 2;
};
struct BF16 {
    static constexpr int nbytes = 2;
};

// Helpers of the per-instruction-set files; `static` keeps every copy in its own file.
static inline uint32_t load_u32(const void* address) {
    uint32_t value;
    memcpy(&value, address, sizeof value);
    return value;
}
static inline float load_f32(const void* address) {
    float value;
    memcpy(&value, address, sizeof value);
    return value;
}

}  // namespace moei

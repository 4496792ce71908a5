// How weights are stored. Names and block contents follow GGUF (ggml-org/ggml, docs/gguf.md and ggml-common.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace moei {

enum class Format { F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K, MXFP4 };

// Plain: [rows, cols] row by row. Transposed: [cols, rows] row by row (floating formats only).
// Rows16: 16 rows interleaved, a tile for every column of blocks (integer dots only), see docs/kernels.md.
enum class Order { Plain, Transposed, Rows16 };

constexpr int kTileRows = 16;
constexpr int kBlock = 32;  // weights (and activations) that share a scale in the formats with integer dots

struct FormatInfo {
    const char* name;
    int block_weights;
    int block_nbytes;
};

const FormatInfo& format_info(Format format);
Format format_from_name(std::string_view name);  // throws std::invalid_argument
Order order_from_name(std::string_view name);    // throws std::invalid_argument

// The kernels multiply these as integers; every other block format is decoded to float32 rows first.
inline bool is_integer_dot(Format format) {
    return format == Format::Q8_0 || format == Format::Q4_0 || format == Format::MXFP4;
}
// Bytes of the scale that begins a block of a format with integer dots.
inline int scale_nbytes(Format format) { return format == Format::MXFP4 ? 1 : 2; }
inline bool is_float(Format format) {
    return format == Format::F32 || format == Format::F16 || format == Format::BF16;
}

// Bytes of one row of `cols` weights (in Rows16: a sixteenth of a row of tiles).
int64_t row_nbytes(Format format, int64_t cols);
// Bytes of a whole matrix; Rows16 is padded with zero rows to a multiple of 16.
int64_t matrix_nbytes(Format format, Order order, int64_t rows, int64_t cols);

// `count` weights (a multiple of the block) of a row-ordered matrix to float32.
void decode(Format format, const uint8_t* source, int64_t count, float* out);

// Plain to Rows16 and back, without loss. `destination` may not overlap `source`.
void to_rows16(Format format, int64_t rows, int64_t cols, const uint8_t* source, uint8_t* destination);
void from_rows16(Format format, int64_t rows, int64_t cols, const uint8_t* source, uint8_t* destination);
// The tiles of block columns [first, first + count) of at most 16 rows; missing rows become zeros.
void interleave(Format format, int64_t cols, const uint8_t* source, int64_t rows, int64_t first, int64_t count,
                uint8_t* destination);

// Published MXFP4 (moei_core/quant/mxfp4.py) as blocks: scales [rows, cols / 32] and blocks [rows, cols / 32, 16] of which
// byte j holds weights 2 j and 2 j + 1. `destination` may overlap `blocks` if it is rows * cols / 32 bytes before it at least.
void join_mxfp4(Order order, int64_t rows, int64_t cols, const uint8_t* scales, const uint8_t* blocks, uint8_t* destination);

// True if `count` weights of any order hold no NaN and no infinity, neither as a value nor as a scale.
bool all_finite(Format format, Order order, int64_t rows, int64_t cols, const uint8_t* source);

float half_to_float(uint16_t half);
float bfloat_to_float(uint16_t bits);

}  // namespace moei

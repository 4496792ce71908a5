#include "formats.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace moei {
namespace {

constexpr std::array<FormatInfo, 9> kFormats{{{"F32", 1, 4},
                                              {"F16", 1, 2},
                                              {"BF16", 1, 2},
                                              {"Q8_0", 32, 34},
                                              {"Q4_0", 32, 18},
                                              {"Q4_K", 256, 144},
                                              {"Q5_K", 256, 176},
                                              {"Q6_K", 256, 210},
                                              {"MXFP4", 32, 17}}};

template <typename T>
T load(const uint8_t* address) {
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

void decode_q8_0(const uint8_t* block, float* out) {
    const float scale = half_to_float(load<uint16_t>(block));
    for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(block[2 + i]));
}

void decode_q4_0(const uint8_t* block, float* out) {
    const float scale = half_to_float(load<uint16_t>(block));
    for (int i = 0; i < 16; ++i) {
        out[i] = scale * static_cast<float>((block[2 + i] & 15) - 8);
        out[16 + i] = scale * static_cast<float>((block[2 + i] >> 4) - 8);
    }
}

// The eight 6-bit scales and minima of Q4_K and Q5_K: the first four of each in the low bits of bytes 0..7,
// the others split into a nibble of bytes 8..11 and the two high bits of bytes 0..7.
struct ScaleMin {
    int scale, min;
};
ScaleMin k_scale_min(const uint8_t* packed, int j) {
    if (j < 4) return {packed[j] & 63, packed[j + 4] & 63};
    return {(packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)};
}

// Q4_K: scale, min scale, 12 bytes of 6-bit scales, 128 bytes of nibbles. Q5_K has 32 bytes of fifth bits before.
void decode_q45_k(const uint8_t* block, bool five_bits, float* out) {
    const float scale = half_to_float(load<uint16_t>(block));
    const float min_scale = half_to_float(load<uint16_t>(block + 2));
    const uint8_t* high = block + 16;
    const uint8_t* low = block + (five_bits ? 48 : 16);
    for (int j = 0; j < 8; ++j) {
        const ScaleMin sub = k_scale_min(block + 4, j);
        const float d = scale * static_cast<float>(sub.scale), m = min_scale * static_cast<float>(sub.min);
        const uint8_t* nibbles = low + 32 * (j / 2);
        for (int i = 0; i < 32; ++i) {
            int q = j % 2 ? nibbles[i] >> 4 : nibbles[i] & 15;
            if (five_bits) q |= ((high[i] >> j) & 1) << 4;
            out[32 * j + i] = d * static_cast<float>(q) - m;
        }
    }
}

// Q6_K: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 int8 scales, one f16 scale.
void decode_q6_k(const uint8_t* block, float* out) {
    const float scale = half_to_float(load<uint16_t>(block + 208));
    for (int half = 0; half < 2; ++half) {
        const uint8_t* low = block + 64 * half;
        const uint8_t* high = block + 128 + 32 * half;
        const auto* scales = reinterpret_cast<const int8_t*>(block + 192 + 8 * half);
        for (int quarter = 0; quarter < 4; ++quarter) {
            for (int i = 0; i < 32; ++i) {
                const int nibbles = low[32 * (quarter % 2) + i];
                const int q = ((quarter < 2 ? nibbles & 15 : nibbles >> 4) | (((high[i] >> (2 * quarter)) & 3) << 4)) - 32;
                const float d = scale * static_cast<float>(scales[2 * quarter + i / 16]);
                out[128 * half + 32 * quarter + i] = d * static_cast<float>(q);
            }
        }
    }
}

// MXFP4 (OCP Microscaling Formats, 5.4): a power of two for 32 E2M1 values. Halves are kept as integers of twice
// the value, so the scale is 2^(exponent - 128).
void decode_mxfp4(const uint8_t* block, float* out) {
    const uint32_t bits = fp4_scale_bits(block[0]);
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    for (int i = 0; i < 16; ++i) {
        out[i] = scale * static_cast<float>(kFp4Doubled[block[1 + i] & 15]);
        out[16 + i] = scale * static_cast<float>(kFp4Doubled[block[1 + i] >> 4]);
    }
}

bool half_is_finite(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

// Four rows' 16 bytes to four columns of 4 bytes each: one vector of four lanes each, on every architecture.
using Lanes4 = uint32_t __attribute__((vector_size(16)));

void transpose_4x4(const uint8_t* const* rows, int64_t at, uint8_t* out, int64_t stride) {
    Lanes4 r[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&r[i], rows[i] + at, sizeof r[i]);
    const Lanes4 low01 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), high01 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const Lanes4 low23 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), high23 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    const Lanes4 columns[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                               __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) std::memcpy(out + i * stride, &columns[i], sizeof columns[i]);
}

template <int kBlockNbytes, int kScaleNbytes>
void interleave_blocks(const uint8_t* const* rows, int64_t present, int64_t count, uint8_t* destination) {
    constexpr int64_t kTileNbytes = int64_t{kTileRows} * kBlockNbytes;
    constexpr int64_t kPieceNbytes = int64_t{kTileRows} * 4;  // the same four bytes of 16 rows
    static constexpr uint8_t kZeros[kBlockNbytes] = {};
    const uint8_t* at[kTileRows];
    for (int64_t b = 0; b < count; ++b, destination += kTileNbytes) {
        for (int64_t row = 0; row < kTileRows; ++row) {
            at[row] = row < present ? rows[row] + b * kBlockNbytes : kZeros;
            std::memcpy(destination + kScaleNbytes * row, at[row], kScaleNbytes);
        }
        for (int64_t row = 0; row < kTileRows; row += 4) {
            for (int64_t piece = 0; piece < (kBlockNbytes - kScaleNbytes) / 4; piece += 4) {
                transpose_4x4(at + row, kScaleNbytes + 4 * piece,
                              destination + kScaleNbytes * kTileRows + kPieceNbytes * piece + 4 * row, kPieceNbytes);
            }
        }
    }
}

}  // namespace

const FormatInfo& format_info(Format format) { return kFormats[static_cast<size_t>(format)]; }

Format format_from_name(std::string_view name) {
    for (size_t i = 0; i < kFormats.size(); ++i) {
        if (name == kFormats[i].name) return static_cast<Format>(i);
    }
    throw std::invalid_argument("unknown weight format '" + std::string(name) + "'");
}

Order order_from_name(std::string_view name) {
    if (name == "plain") return Order::Plain;
    if (name == "transposed") return Order::Transposed;
    if (name == "rows16") return Order::Rows16;
    throw std::invalid_argument("unknown weight order '" + std::string(name) + "'");
}

int64_t row_nbytes(Format format, int64_t cols) {
    const FormatInfo& info = format_info(format);
    return cols / info.block_weights * info.block_nbytes;
}

int64_t matrix_nbytes(Format format, Order order, int64_t rows, int64_t cols) {
    if (order == Order::Rows16) rows = (rows + kTileRows - 1) / kTileRows * kTileRows;
    return rows * row_nbytes(format, cols);
}

void decode(Format format, const uint8_t* source, int64_t count, float* out) {
    const FormatInfo& info = format_info(format);
    for (int64_t i = 0; i < count; i += info.block_weights, source += info.block_nbytes, out += info.block_weights) {
        switch (format) {
            case Format::F32: *out = load<float>(source); break;
            case Format::F16: *out = half_to_float(load<uint16_t>(source)); break;
            case Format::BF16: *out = bfloat_to_float(load<uint16_t>(source)); break;
            case Format::Q8_0: decode_q8_0(source, out); break;
            case Format::Q4_0: decode_q4_0(source, out); break;
            case Format::Q4_K: decode_q45_k(source, false, out); break;
            case Format::Q5_K: decode_q45_k(source, true, out); break;
            case Format::Q6_K: decode_q6_k(source, out); break;
            case Format::MXFP4: decode_mxfp4(source, out); break;
        }
    }
}

void interleave(Format format, int64_t cols, const uint8_t* source, int64_t rows, int64_t first, int64_t count,
                uint8_t* destination) {
    const uint8_t* starts[kTileRows] = {};
    for (int64_t row = 0; row < rows; ++row) starts[row] = source + row * row_nbytes(format, cols) + row_nbytes(format, first * kBlock);
    switch (format) {
        case Format::Q8_0: return interleave_blocks<34, 2>(starts, rows, count, destination);
        case Format::Q4_0: return interleave_blocks<18, 2>(starts, rows, count, destination);
        default: return interleave_blocks<17, 1>(starts, rows, count, destination);
    }
}

void to_rows16(Format format, int64_t rows, int64_t cols, const uint8_t* source, uint8_t* destination) {
    const int64_t stride = row_nbytes(format, cols);
    for (int64_t row = 0; row < rows; row += kTileRows) {
        interleave(format, cols, source + row * stride, std::min<int64_t>(kTileRows, rows - row), 0, cols / kBlock,
                   destination + row * stride);
    }
}

void from_rows16(Format format, int64_t rows, int64_t cols, const uint8_t* source, uint8_t* destination) {
    const int64_t block_nbytes = format_info(format).block_nbytes, scale = scale_nbytes(format), blocks = cols / kBlock;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t lane = row % kTileRows;
        const uint8_t* tile = source + (row - lane) * blocks * block_nbytes;
        for (int64_t b = 0; b < blocks; ++b, tile += kTileRows * block_nbytes, destination += block_nbytes) {
            std::memcpy(destination, tile + scale * lane, static_cast<size_t>(scale));
            for (int64_t at = scale; at < block_nbytes; at += 4) {
                std::memcpy(destination + at, tile + kTileRows * at + 4 * lane, 4);
            }
        }
    }
}

void join_mxfp4(Order order, int64_t rows, int64_t cols, const uint8_t* scales, const uint8_t* blocks, uint8_t* destination) {
    using Bytes16 = uint8_t __attribute__((vector_size(16)));
    const int64_t count = cols / kBlock, stride = row_nbytes(Format::MXFP4, cols);
    std::vector<uint8_t> group(static_cast<size_t>(kTileRows * stride));
    for (int64_t row = 0; row < rows; row += kTileRows) {
        const int64_t present = std::min<int64_t>(kTileRows, rows - row);
        uint8_t* out = group.data();
        for (int64_t b = row * count; b < (row + present) * count; ++b, out += 17) {
            Bytes16 pairs;
            std::memcpy(&pairs, blocks + 16 * b, sizeof pairs);
            const Bytes16 even = pairs & 15, odd = pairs >> 4;
            const Bytes16 first = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            const Bytes16 second = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            const Bytes16 made = first | (second << 4);
            out[0] = scales[b];
            std::memcpy(out + 1, &made, sizeof made);
        }
        if (order == Order::Rows16) {
            interleave(Format::MXFP4, cols, group.data(), present, 0, count, destination + row * stride);
        } else {
            std::memcpy(destination + row * stride, group.data(), static_cast<size_t>(present * stride));
        }
    }
}

bool all_finite(Format format, Order order, int64_t rows, int64_t cols, const uint8_t* source) {
    const FormatInfo& info = format_info(format);
    const int64_t blocks = matrix_nbytes(format, order, rows, cols) / info.block_nbytes;
    if (order == Order::Rows16) {
        const int64_t tile_nbytes = int64_t{kTileRows} * info.block_nbytes;
        for (int64_t i = 0; i < blocks; ++i) {
            const uint8_t* const scale = source + i / kTileRows * tile_nbytes + scale_nbytes(format) * (i % kTileRows);
            if (format == Format::MXFP4 ? *scale == 255 : !half_is_finite(load<uint16_t>(scale))) return false;
        }
        return true;
    }
    for (int64_t i = 0; i < blocks; ++i, source += info.block_nbytes) {
        bool finite = true;
        switch (format) {
            case Format::F32: finite = (load<uint32_t>(source) & 0x7f800000) != 0x7f800000; break;
            case Format::BF16: finite = (load<uint16_t>(source) & 0x7f80) != 0x7f80; break;
            case Format::F16:
            case Format::Q8_0:
            case Format::Q4_0: finite = half_is_finite(load<uint16_t>(source)); break;
            case Format::Q4_K:
            case Format::Q5_K:
                finite = half_is_finite(load<uint16_t>(source)) && half_is_finite(load<uint16_t>(source + 2));
                break;
            case Format::Q6_K: finite = half_is_finite(load<uint16_t>(source + 208)); break;
            case Format::MXFP4: finite = source[0] != 255; break;
        }
        if (!finite) return false;
    }
    return true;
}

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    float value;
    if (magnitude < 0x400) {
        value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal halves are normal floats
    } else {
        const uint32_t rebias = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;  // infinities and NaN keep their kind
        const uint32_t bits = (magnitude << 13) + rebias;
        std::memcpy(&value, &bits, sizeof value);
    }
    return sign ? -value : value;
}

float bfloat_to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

}  // namespace moei

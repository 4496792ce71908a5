#include "matmul.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "matmul_parts.h"

namespace moei {
namespace {

constexpr int64_t kTokenTile = 64;   // tokens whose results wait on the stack while one strip of weights is used
constexpr int64_t kBlockChunk = 64;  // blocks of a tile row that stay in the first-level cache for all tokens
constexpr int64_t kDecodedRows = 4;
constexpr int64_t kLargestTile = kTileRows * 34;
constexpr int64_t kWideStrip = 4 * kStrip;  // outputs computed together for which packing tokens is worth it

TileKernel tile_kernel(const Kernels& kernels, Format format) {
    return format == Format::Q8_0 ? kernels.q8_0 : format == Format::Q4_0 ? kernels.q4_0 : kernels.mxfp4;
}
TokenKernel token_kernel(const Kernels& kernels, Format format) {
    return format == Format::Q8_0 ? kernels.token_q8_0 : format == Format::Q4_0 ? kernels.token_q4_0 : kernels.token_mxfp4;
}
const GroupKernels& group_kernels(const Kernels& kernels, Format format) {
    return kernels.groups[format == Format::Q8_0 ? 0 : format == Format::Q4_0 ? 1 : 2];
}
FloatKernel float_kernel(const FloatKernels& kernels, Format format) {
    return format == Format::F16 ? kernels.f16 : format == Format::BF16 ? kernels.bf16 : kernels.f32;
}

void project_tiles(const Kernels& kernels, const Matrix& w, int64_t begin, int64_t end, Inputs x, int64_t n, float* out,
                   int64_t ld) {
    const TileKernel kernel = tile_kernel(kernels, w.format);
    const int64_t stride = row_nbytes(w.format, w.cols), blocks = w.cols / kBlock;
    const int64_t tile_nbytes = int64_t{kTileRows} * format_info(w.format).block_nbytes;
    alignas(64) uint8_t interleaved[kBlockChunk * kLargestTile];
    alignas(64) float sums[kTokenTile * kTileRows];
    for (int64_t row = begin; row < end; row += kTileRows) {
        const uint8_t* const data = w.data + row * stride;
        for (int64_t start = 0; start < n; start += kTokenTile) {
            const int64_t tokens = std::min(kTokenTile, n - start);
            std::memset(sums, 0, static_cast<size_t>(tokens * kTileRows) * sizeof(float));
            for (int64_t first = 0; first < blocks; first += kBlockChunk) {
                const int64_t count = std::min(kBlockChunk, blocks - first);
                const uint8_t* tiles = data + first * tile_nbytes;
                if (w.order == Order::Plain) {
                    interleave(w.format, w.cols, data, std::min<int64_t>(kTileRows, w.rows - row), first, count, interleaved);
                    tiles = interleaved;
                }
                kernel(tiles, first, count, w.cols, x + start, tokens, sums);
            }
            const int64_t width = std::min<int64_t>(kTileRows, end - row);
            for (int64_t t = 0; t < tokens; ++t) {
                std::memcpy(out + (start + t) * ld + row - begin, sums + t * kTileRows, static_cast<size_t>(width) * sizeof(float));
            }
        }
    }
}

void project_groups(const Kernels& kernels, const Matrix& w, int64_t begin, int64_t end, Inputs x, int64_t n, float* out,
                    int64_t ld) {
    const GroupKernels& group = group_kernels(kernels, w.format);
    const int64_t stride = row_nbytes(w.format, w.cols), blocks = w.cols / kBlock;
    const int64_t tile_nbytes = int64_t{kTileRows} * format_info(w.format).block_nbytes;
    alignas(64) uint8_t packed[kTokenTile / kGroupTokens * kGroupNbytes];
    alignas(64) uint8_t interleaved[kGroupBlocks * kLargestTile];
    for (int64_t start = 0; start < n; start += kTokenTile) {
        const int64_t tokens = std::min(kTokenTile, n - start);
        float* const own = out + start * ld;
        if (!grouped(kernels, w.format, w.order, tokens)) return project_tiles(kernels, w, begin, end, x + start, tokens, own, ld);
        for (int64_t first = 0; first < blocks; first += kGroupBlocks) {
            const int64_t count = std::min<int64_t>(kGroupBlocks, blocks - first);
            group.pack(x + start, tokens, first, count, w.cols, packed);
            if (w.order == Order::Rows16) {
                const uint8_t* const tiles = w.data + begin * stride + first * tile_nbytes;
                group.multiply(tiles, kTileRows * stride, end - begin, count, packed, tokens, first == 0, own, ld);
                continue;
            }
            for (int64_t row = begin; row < end; row += kTileRows) {
                interleave(w.format, w.cols, w.data + row * stride, std::min<int64_t>(kTileRows, w.rows - row), first, count, interleaved);
                const int64_t rows = std::min<int64_t>(kTileRows, end - row);
                group.multiply(interleaved, 0, rows, count, packed, tokens, first == 0, own + row - begin, ld);
            }
        }
    }
}

// Rows of tiles that one token reads side by side.
struct Streams {
    const uint8_t* tiles[kStreams];
    int count = 0;
    int64_t skip = 0;

    // Up to `most` rows of tiles from row `begin` on, before `end`; the next ones follow in memory.
    void add(const Matrix& w, int64_t begin, int64_t end, int64_t most) {
        const int64_t stride = kTileRows * row_nbytes(w.format, w.cols);
        const int64_t rows = std::min(most, round_up(end - begin, kTileRows) / kTileRows);
        for (int64_t r = 0; r < rows; ++r) tiles[count++] = w.data + (begin / kTileRows + r) * stride;
        skip = (rows - 1) * stride;
    }
};

void project_token(const Kernels& kernels, const Matrix& w, int64_t begin, int64_t end, const void* x, float* out) {
    alignas(64) float sums[kStreams * kTileRows];
    for (int64_t row = begin; row < end; row += kStreams * kTileRows) {
        Streams streams;
        streams.add(w, row, end, kStreams);
        token_kernel(kernels, w.format)(streams.tiles, streams.skip, streams.count, w.cols, x, sums);
        std::memcpy(out + row - begin, sums, static_cast<size_t>(std::min<int64_t>(kStreams * kTileRows, end - row)) * sizeof(float));
    }
}

void project_decoded(const Kernels& kernels, const Matrix& w, int64_t begin, int64_t end, Inputs x, int64_t n,
                     float* out, int64_t ld, float* scratch) {
    const int64_t stride = row_nbytes(w.format, w.cols);
    for (int64_t row = begin; row < end; row += kDecodedRows) {
        const int64_t count = std::min(kDecodedRows, end - row);
        decode(w.format, w.data + row * stride, count * w.cols, scratch);
        kernels.rows.f32(reinterpret_cast<const uint8_t*>(scratch), w.cols, count, w.cols, x, n, out + row - begin, ld);
    }
}

float bias_at(Format format, const uint8_t* bias, int64_t i) {
    float value;
    decode(format, bias + i * format_info(format).block_nbytes, 1, &value);
    return value;
}

void add_bias(Format format, const uint8_t* bias, int64_t begin, int64_t count, float* out, int64_t ld, int64_t n) {
    for (int64_t i = 0; i < count; ++i) {
        const float value = bias_at(format, bias, begin + i);
        for (int64_t t = 0; t < n; ++t) out[t * ld + i] += value;
    }
}

// Bytes of one row of activations for weights of this format.
int64_t input_nbytes(Format format, int64_t cols) {
    return is_integer_dot(format) ? quantized_nbytes(format, cols) : round_up(cols * static_cast<int64_t>(sizeof(float)), 64);
}

const uint8_t* pointer(int64_t address) { return reinterpret_cast<const uint8_t*>(address); }

// One expert's matrices, with gate and up told apart: `step` 2 where their rows alternate.
struct Expert {
    Matrix gate, up, down;
    const uint8_t *gate_bias, *up_bias, *down_bias;
};

Expert expert_of(const FfnLayout& l, const ExpertParts& parts) {
    const int64_t halves = l.gating == Gating::Concatenated || l.gating == Gating::Interleaved ? 2 : 1;
    const int64_t gate_rows = l.gating == Gating::Interleaved ? 2 * l.intermediate : l.intermediate;
    const int64_t stored = halves * l.intermediate;
    Expert expert{};
    expert.gate = {pointer(parts.gate), l.gate_up_format, l.gate_up_order, gate_rows, l.hidden,
                   l.gate_up_order == Order::Transposed ? stored : l.hidden};
    expert.up = expert.gate;
    expert.up.data = pointer(parts.up);
    expert.down = {pointer(parts.down), l.down_format, l.down_order, l.hidden, l.intermediate,
                   l.down_order == Order::Transposed ? l.hidden : l.intermediate};
    expert.gate_bias = pointer(parts.gate_bias);
    expert.up_bias = pointer(parts.up_bias);
    expert.down_bias = pointer(parts.down_bias);
    if (l.gating == Gating::Concatenated) {
        const int64_t row = l.gate_up_order == Order::Transposed ? format_info(l.gate_up_format).block_nbytes
                                                              : row_nbytes(l.gate_up_format, l.hidden);
        expert.up.data = expert.gate.data + l.intermediate * row;
        if (expert.gate_bias) expert.up_bias = expert.gate_bias + l.intermediate * format_info(l.bias_format).block_nbytes;
    }
    return expert;
}

// Where a call keeps its activations: first x as the gate/up weights want it, then the intermediate values as the down
// weights want them, one row a pair, then pointers to both, then scratch of each thread.
struct Plan {
    int64_t x_nbytes, middle_nbytes, middle_at, x_pointers_at, middle_pointers_at, outputs_at, scratch_at, scratch_nbytes, nbytes;
};

// Of x every row is quantised once: those of all tokens, or those of all pairs if that is fewer. placed: with places.
Plan plan_of(const FfnLayout& l, int64_t tokens, int64_t pairs, bool placed, int threads) {
    Plan plan{};
    plan.x_nbytes = quantized_nbytes(l.gate_up_format, l.hidden);
    plan.middle_nbytes = input_nbytes(l.down_format, l.intermediate);
    plan.middle_at = std::min(tokens, pairs) * plan.x_nbytes;
    plan.x_pointers_at = plan.middle_at + pairs * plan.middle_nbytes;
    plan.middle_pointers_at = plan.x_pointers_at + round_up(pairs * 8, 64);
    plan.outputs_at = plan.middle_pointers_at + round_up(pairs * 8, 64);
    plan.scratch_at = plan.outputs_at + (placed ? round_up(pairs * l.hidden * 4, 64) : 0);
    plan.scratch_nbytes = round_up(4 * std::max(scratch_floats(l.gate_up_format, l.hidden), scratch_floats(l.down_format, l.intermediate)), 64);
    plan.nbytes = plan.scratch_at + threads * plan.scratch_nbytes;
    return plan;
}

// Values [begin, end) of the intermediate rows of n pairs.
void gate_up_strip(const Kernels& kernels, const FfnLayout& l, const Expert& expert, int64_t begin, int64_t end, Inputs x,
                   int64_t n, uint8_t* middle, int64_t middle_nbytes, float* scratch) {
    alignas(64) float products[kTokenTile * 2 * kWideStrip];
    alignas(64) float values[kWideStrip];
    const int64_t count = end - begin, width = count > kStrip ? kWideStrip : kStrip, ld = 2 * width;
    for (int64_t start = 0; start < n; start += kTokenTile) {
        const int64_t tokens = std::min(kTokenTile, n - start);
        const Inputs tile = x + start;
        const float *gate = products, *up = products + width;
        int64_t step = 1;
        const bool two = l.gating == Gating::Separate || l.gating == Gating::Concatenated;
        if (n == 1 && two && l.gate_up_order == Order::Rows16) {
            Streams streams;
            streams.add(expert.gate, begin, end, kStreams / 2);
            streams.add(expert.up, begin, end, kStreams / 2);
            token_kernel(kernels, l.gate_up_format)(streams.tiles, streams.skip, streams.count, l.hidden, tile[0], products);
            float* const second = products + streams.count / 2 * kTileRows;
            up = second;
            if (expert.gate_bias) add_bias(l.bias_format, expert.gate_bias, begin, count, products, ld, 1);
            if (expert.up_bias) add_bias(l.bias_format, expert.up_bias, begin, count, second, ld, 1);
        } else if (l.gating == Gating::Interleaved) {
            step = 2;
            up = products + 1;
            project(kernels, expert.gate, 2 * begin, 2 * end, tile, tokens, products, ld, scratch);
            if (expert.gate_bias) add_bias(l.bias_format, expert.gate_bias, 2 * begin, 2 * count, products, ld, tokens);
        } else {
            project(kernels, expert.gate, begin, end, tile, tokens, products, ld, scratch);
            if (expert.gate_bias) add_bias(l.bias_format, expert.gate_bias, begin, count, products, ld, tokens);
            if (l.gating == Gating::None) {
                up = nullptr;
            } else {
                project(kernels, expert.up, begin, end, tile, tokens, products + width, ld, scratch);
                if (expert.up_bias) add_bias(l.bias_format, expert.up_bias, begin, count, products + width, ld, tokens);
            }
        }
        for (int64_t t = 0; t < tokens; ++t) {
            uint8_t* const row = middle + (start + t) * middle_nbytes;
            const bool quantized = is_integer_dot(l.down_format);
            float* const out = quantized ? values : reinterpret_cast<float*>(row) + begin;
            activate(l.activation, gate + t * ld, up ? up + t * ld : nullptr, step, count, out);
            if (quantized) {
                quantize(l.down_format, values, count / kBlock, begin / kBlock, l.intermediate, reinterpret_cast<int8_t*>(row));
            }
        }
    }
}

}  // namespace

bool grouped(const Kernels& kernels, Format format, Order order, int64_t n) {
    // Measured. Plain rows are interleaved for fewer tokens at a time than other kernels do.
    const int64_t least = order == Order::Rows16 ? 8 : format == Format::Q8_0 ? 32 : 64;
    return n >= least && is_integer_dot(format) && group_kernels(kernels, format).multiply;
}

int64_t scratch_floats(Format format, int64_t cols) {
    return is_integer_dot(format) || is_float(format) ? 0 : kDecodedRows * cols;
}

void project(const Kernels& kernels, const Matrix& w, int64_t begin, int64_t end, Inputs x, int64_t n, float* out,
             int64_t ld, float* scratch) {
    const int64_t element = format_info(w.format).block_nbytes;
    if (grouped(kernels, w.format, w.order, n)) {
        project_groups(kernels, w, begin, end, x, n, out, ld);
    } else if (is_integer_dot(w.format) && w.order == Order::Rows16 && n == 1) {
        project_token(kernels, w, begin, end, x[0], out);
    } else if (is_integer_dot(w.format)) {
        project_tiles(kernels, w, begin, end, x, n, out, ld);
    } else if (!is_float(w.format)) {
        project_decoded(kernels, w, begin, end, x, n, out, ld, scratch);
    } else if (w.order == Order::Transposed) {
        float_kernel(kernels.columns, w.format)(w.data + begin * element, w.stride, end - begin, w.cols, x, n, out, ld);
    } else {
        float_kernel(kernels.rows, w.format)(w.data + begin * w.stride * element, w.stride, end - begin, w.cols, x, n, out, ld);
    }
}

Gating gating_from_name(std::string_view name) {
    if (name == "none") return Gating::None;
    if (name == "separate") return Gating::Separate;
    if (name == "concatenated") return Gating::Concatenated;
    if (name == "interleaved") return Gating::Interleaved;
    throw std::invalid_argument("unknown gating '" + std::string(name) + "'");
}

uint8_t* Workspace::reserve(int64_t nbytes) {
    if (nbytes > nbytes_) {
        release();
        memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(round_up(nbytes, 64))));
        if (!memory_) throw std::bad_alloc();
        nbytes_ = nbytes;
    }
    return memory_;
}

void Workspace::release() {
    std::free(memory_);
    memory_ = nullptr;
    nbytes_ = 0;
}

int64_t ffn_workspace_nbytes(const FfnLayout& layout, int64_t tokens, int64_t pairs, int threads) {
    return plan_of(layout, tokens, pairs, true, threads).nbytes;
}

void moe_ffn(const FfnLayout& l, const FfnCall& call, ThreadPool& pool, Workspace& workspace) {
    const Kernels& table = kernels();
    const int64_t pairs = call.offsets[call.experts];
    const Plan plan = plan_of(l, call.tokens, pairs, call.places != nullptr, pool.threads());
    uint8_t* const memory = workspace.reserve(plan.nbytes);
    const DefaultFloatingPoint guard;

    auto** const x_rows = reinterpret_cast<const void**>(memory + plan.x_pointers_at);
    auto** const middle_rows = reinterpret_cast<const void**>(memory + plan.middle_pointers_at);
    const bool by_pair = pairs < call.tokens;
    for (int64_t p = 0; p < pairs; ++p) {
        x_rows[p] = plan.x_nbytes ? static_cast<const void*>(memory + (by_pair ? p : call.rows[p]) * plan.x_nbytes)
                                  : static_cast<const void*>(call.x + call.rows[p] * l.hidden);
        middle_rows[p] = memory + plan.middle_at + p * plan.middle_nbytes;
    }
    const auto scratch_of = [&](int thread) {
        return reinterpret_cast<float*>(memory + plan.scratch_at + thread * plan.scratch_nbytes);
    };

    if (plan.x_nbytes) {
        const auto quantize_row = [&](int64_t row, int) noexcept {
            quantize(l.gate_up_format, call.x + (by_pair ? call.rows[row] : row) * l.hidden, l.hidden / kBlock, 0, l.hidden,
                     reinterpret_cast<int8_t*>(memory + row * plan.x_nbytes));
        };
        const int64_t rows = by_pair ? pairs : call.tokens;
        // A few rows take less time than waking the workers.
        if (rows < 8) {
            for (int64_t row = 0; row < rows; ++row) quantize_row(row, 0);
        } else {
            pool.for_each(rows, quantize_row);
        }
    }

    const auto for_strips = [&](bool wide, int64_t width, int64_t strip_nbytes, int64_t matrices, const auto& body) {
        const int64_t least = wide ? kWideStrip / kStrip : 2 / matrices;
        const int64_t strips = round_up(width, kStrip) / kStrip, per_task = strips_per_task(strip_nbytes, least);
        const int64_t tasks = round_up(strips, per_task) / per_task;
        share(pool, call.experts * tasks, call.experts * strips * strip_nbytes, [&](int64_t task, int thread) noexcept {
            const int64_t e = task / tasks, pair = call.offsets[e], n = call.offsets[e + 1] - pair;
            if (n == 0) return;
            const int64_t first = task % tasks * per_task * kStrip;
            body(expert_of(l, call.parts[e]), pair, n, first, std::min(width, first + per_task * kStrip), scratch_of(thread));
        });
    };

    const int64_t halves = l.gating == Gating::None ? 1 : 2;
    const int64_t average = pairs / std::max<int64_t>(call.experts, 1);
    for_strips(grouped(table, l.gate_up_format, l.gate_up_order, average), l.intermediate,
               halves * kStrip * row_nbytes(l.gate_up_format, l.hidden), halves,
               [&](const Expert& expert, int64_t pair, int64_t n, int64_t first, int64_t last, float* scratch) {
                   const int64_t width = grouped(table, l.gate_up_format, l.gate_up_order, n) ? kWideStrip : kStrip;
                   for (int64_t begin = first; begin < last; begin += width) {
                       gate_up_strip(table, l, expert, begin, std::min(last, begin + width), x_rows + pair, n,
                                     memory + plan.middle_at + pair * plan.middle_nbytes, plan.middle_nbytes, scratch);
                   }
               });
    for_strips(grouped(table, l.down_format, l.down_order, average), l.hidden,
               kStrip * row_nbytes(l.down_format, l.intermediate), 1,
               [&](const Expert& expert, int64_t pair, int64_t n, int64_t first, int64_t last, float* scratch) {
                   float* const outputs = call.places ? reinterpret_cast<float*>(memory + plan.outputs_at) : call.out;
                   float* const out = outputs + pair * l.hidden + first;
                   project(table, expert.down, first, last, middle_rows + pair, n, out, l.hidden, scratch);
                   if (expert.down_bias) add_bias(l.bias_format, expert.down_bias, first, last - first, out, l.hidden, n);
                   if (!call.places) return;
                   for (int64_t i = 0; i < n; ++i) {
                       const float* const row = out + i * l.hidden;
                       float* const place = call.out + call.places[pair + i] * l.hidden + first;
                       const float weight = call.weights[pair + i];
                       for (int64_t j = 0; j < last - first; ++j) place[j] = row[j] * weight;
                   }
               });
}

}  // namespace moei

// The floating-point kernels, over `Lanes`: sixteen float32 of whatever registers the including file has. The including
// file defines Lanes, the loads and kRows, kTokens (the register block) before. Everything is static: see kernels.h.
//
// Lanes needs: Lanes zero(); Lanes fma(a, b, c); float sum(Lanes); Lanes broadcast(float); void store(float*, Lanes);
// and load(F32|F16|BF16, const uint8_t*). Where kSums16: Lanes sum16(const Lanes*), sixteen sums in the order of `sum`.
#pragma once

namespace moei {
namespace {

template <typename T>
Lanes load_some(T, const uint8_t* from, int64_t count) {
    if (count >= 16) return load(T{}, from);
    uint8_t padded[64] = {};
    memcpy(padded, from, static_cast<size_t>(count * T::nbytes));
    return load(T{}, padded);
}

inline const uint8_t* bytes(const void* x, int64_t c) { return static_cast<const uint8_t*>(x) + c * F32::nbytes; }

// Few tokens wait for memory: weights are asked for this far ahead, also across the pages where the processor's own
// prefetching ends.
constexpr int64_t kFloatsAhead = 2048, kChunkNbytes = 16 << 10;
constexpr int64_t ahead_step(int64_t nbytes) { return nbytes < 64 ? nbytes : 64; }

// Adds columns [c, c + 16) of a block to its sums. Whole: none of them lies beyond `cols`. First: nobody has read them.
template <typename T, int R, int N, bool Whole, bool First>
inline __attribute__((always_inline)) void rows_step(const uint8_t* w, int64_t stride, int64_t c, int64_t cols,
                                                     const void* const* x, Lanes (&sums)[N][R]) {
    Lanes weights[R];
    for (int r = 0; r < R; ++r) {
        const uint8_t* const from = w + (r * stride + c) * T::nbytes;
        if constexpr (First) __builtin_prefetch(from + kFloatsAhead);
        weights[r] = Whole ? load(T{}, from) : load_some(T{}, from, cols - c);
    }
    for (int t = 0; t < N; ++t) {
        const Lanes activations = Whole ? load(F32{}, bytes(x[t], c)) : load_some(F32{}, bytes(x[t], c), cols - c);
        for (int r = 0; r < R; ++r) sums[t][r] = fma(weights[r], activations, sums[t][r]);
    }
}

template <typename T, int R, int N, bool First>
void rows_block(const uint8_t* w, int64_t stride, int64_t cols, const void* const* x, float* out, int64_t ld) {
    Lanes sums[N][R];
    for (int t = 0; t < N; ++t)
        for (int r = 0; r < R; ++r) sums[t][r] = zero();
    // The right edge by itself: in one loop with it the sums would not stay in registers.
    const int64_t whole = cols & ~int64_t{15};
    for (int64_t c = 0; c < whole; c += 16) rows_step<T, R, N, true, First>(w, stride, c, cols, x, sums);
    if (whole < cols) rows_step<T, R, N, false, false>(w, stride, whole, cols, x, sums);
    if constexpr (kSums16 && R * N == 16) {
        float all[16];
        store(all, sum16(&sums[0][0]));
        for (int t = 0; t < N; ++t) memcpy(out + t * ld, all + t * R, R * sizeof(float));
    } else {
        for (int t = 0; t < N; ++t)
            for (int r = 0; r < R; ++r) out[t * ld + r] = sum(sums[t][r]);
    }
}

template <typename T, int R, int N>
void rows_tokens_of(const uint8_t* w, int64_t stride, int64_t cols, const void* const* x, int64_t n, float* out, int64_t ld,
                    int64_t& t) {
    if (t == 0 && N <= n) rows_block<T, R, N, true>(w, stride, cols, x, out, ld), t = N;
    for (; t + N <= n; t += N) rows_block<T, R, N, false>(w, stride, cols, x + t, out + t * ld, ld);
}

template <typename T, int R>
void rows_tokens(const uint8_t* w, int64_t stride, int64_t cols, const void* const* x, int64_t n, float* out, int64_t ld) {
    int64_t t = 0;
    if constexpr (R <= kRows) rows_tokens_of<T, R, kTokens>(w, stride, cols, x, n, out, ld, t);
    if constexpr (R == 2 * kRows) rows_tokens_of<T, R, 2>(w, stride, cols, x, n, out, ld, t);
    rows_tokens_of<T, R, 1>(w, stride, cols, x, n, out, ld, t);
}

template <typename T>
void rows_kernel(const uint8_t* w, int64_t stride, int64_t rows, int64_t cols, const void* const* x, int64_t n,
                 float* out, int64_t ld) {
    int64_t r = 0;
    // Adding up lanes takes longer than multiplying rows as short as a small head: sixteen sums at a time then.
    if constexpr (kSums16) {
        // So many heads that share keys meet them in one pass.
        if (n == 2 * kTokens || n == 4 * kTokens) {
            for (; r + kRows / 2 <= rows; r += kRows / 2) {
                int64_t t = 0;
                rows_tokens_of<T, kRows / 2, 2 * kTokens>(w + r * stride * T::nbytes, stride, cols, x, n, out + r, ld, t);
            }
        }
        constexpr int kFew = 2 * kRows;
        const bool few = stride == cols && cols <= 32 && n < kTokens;
        if (few && n == 1)
            for (; r + 16 <= rows; r += 16) rows_tokens<T, 16>(w + r * stride * T::nbytes, stride, cols, x, n, out + r, ld);
        if (few && n > 1)
            for (; r + kFew <= rows; r += kFew) rows_tokens<T, kFew>(w + r * stride * T::nbytes, stride, cols, x, n, out + r, ld);
    }
    for (; r + kRows <= rows; r += kRows) rows_tokens<T, kRows>(w + r * stride * T::nbytes, stride, cols, x, n, out + r, ld);
    for (; r < rows; ++r) rows_tokens<T, 1>(w + r * stride * T::nbytes, stride, cols, x, n, out + r, ld);
}

// V vectors of 16 neighbouring outputs for N tokens, from columns [first, last). What is before `first` is in `out`
// already. Whole: all outputs are there; otherwise V is 1 and only `width` of them are. ahead: what is read next, as
// many bytes as this reads; null: nobody knows.
template <typename T, int V, int N, bool Whole>
void columns_block(const uint8_t* w, int64_t stride, int64_t width, int64_t first, int64_t last, const void* const* x,
                   float* out, int64_t ld, const uint8_t* ahead) {
    Lanes sums[N][V];
    for (int t = 0; t < N; ++t)
        for (int v = 0; v < V; ++v)
            sums[t][v] = Whole && first > 0 ? load(F32{}, reinterpret_cast<const uint8_t*>(out + t * ld + 16 * v)) : zero();
    constexpr int64_t kStep = ahead_step(16 * V * T::nbytes);
    for (int64_t c = first; c < last; ++c) {
        if (ahead)
            for (int64_t line = 0; line < 16 * V * T::nbytes; line += kStep) __builtin_prefetch(ahead + (c - first) * 16 * V * T::nbytes + line);
        Lanes weights[V];
        for (int v = 0; v < V; ++v) {
            const uint8_t* const from = w + (c * stride + 16 * v) * T::nbytes;
            weights[v] = Whole ? load(T{}, from) : load_some(T{}, from, width);
        }
        for (int t = 0; t < N; ++t) {
            const Lanes activation = broadcast(load_f32(bytes(x[t], c)));
            for (int v = 0; v < V; ++v) sums[t][v] = fma(weights[v], activation, sums[t][v]);
        }
    }
    for (int t = 0; t < N; ++t) {
        for (int v = 0; v < V; ++v) {
            if constexpr (Whole) {
                store(out + t * ld + 16 * v, sums[t][v]);
            } else {
                float values[16];
                store(values, sums[t][v]);
                memcpy(out + t * ld, values, static_cast<size_t>(width) * sizeof(float));
            }
        }
    }
}

template <typename T, int V, int N, bool Whole>
void columns_tokens_of(const uint8_t* w, int64_t stride, int64_t width, int64_t first, int64_t last, const void* const* x,
                       int64_t n, float* out, int64_t ld, const uint8_t* ahead, int64_t& t) {
    for (; t + N <= n; t += N)
        columns_block<T, V, N, Whole>(w, stride, width, first, last, x + t, out + t * ld, ld, t == 0 ? ahead : nullptr);
}

template <typename T, int V, bool Whole>
void columns_tokens(const uint8_t* w, int64_t stride, int64_t width, int64_t first, int64_t last, const void* const* x,
                    int64_t n, float* out, int64_t ld, const uint8_t* ahead) {
    int64_t t = 0;
    columns_tokens_of<T, V, kTokens, Whole>(w, stride, width, first, last, x, n, out, ld, ahead, t);
    if constexpr (kTokens > 2) columns_tokens_of<T, V, 2, Whole>(w, stride, width, first, last, x, n, out, ld, ahead, t);
    columns_tokens_of<T, V, 1, Whole>(w, stride, width, first, last, x, n, out, ld, ahead, t);
}

// Columns [first, last) of all outputs.
template <typename T>
void columns_chunk(const uint8_t* w, int64_t stride, int64_t rows, int64_t first, int64_t last, const void* const* x,
                   int64_t n, float* out, int64_t ld, const uint8_t* ahead) {
    int64_t r = 0;
    const auto take = [&](int64_t count) {
        const uint8_t* const own = ahead;
        if (ahead) ahead += count * T::nbytes * (last - first);
        return own;
    };
    if constexpr (kSums16) {
        if (n == 2 * kTokens || n == 4 * kTokens) {
            for (; r + 8 * kRows <= rows; r += 8 * kRows) {
                int64_t t = 0;
                columns_tokens_of<T, kRows / 2, 2 * kTokens, true>(w + r * T::nbytes, stride, 16, first, last, x, n, out + r, ld,
                                                                   take(8 * kRows), t);
            }
        }
    }
    for (; r + 16 * kRows <= rows; r += 16 * kRows)
        columns_tokens<T, kRows, true>(w + r * T::nbytes, stride, 16, first, last, x, n, out + r, ld, take(16 * kRows));
    for (; r + 16 <= rows; r += 16)
        columns_tokens<T, 1, true>(w + r * T::nbytes, stride, 16, first, last, x, n, out + r, ld, take(16));
    if (r < rows) columns_tokens<T, 1, false>(w + r * T::nbytes, stride, rows - r, first, last, x, n, out + r, ld, nullptr);
}

template <typename T>
void columns_kernel(const uint8_t* w, int64_t stride, int64_t rows, int64_t cols, const void* const* x, int64_t n,
                    float* out, int64_t ld) {
    // Where all that is stored is wanted (the values of a head), so much at a time that it stays in the first-level
    // cache: each pass over it asks for a part of what comes next, in the order of memory.
    const int64_t chunk = kChunkNbytes / (stride * T::nbytes);
    if (stride != rows || rows % 16 != 0 || chunk < 1 || n > 4 * kTokens) return columns_chunk<T>(w, stride, rows, 0, cols, x, n, out, ld, nullptr);
    for (int64_t first = 0; first < cols || first == 0; first += chunk) {
        const int64_t last = first + chunk < cols ? first + chunk : cols;
        columns_chunk<T>(w, stride, rows, first, last, x, n, out, ld, w + last * stride * T::nbytes);
    }
}

constexpr FloatKernels kRowsKernels{rows_kernel<F32>, rows_kernel<F16>, rows_kernel<BF16>};
constexpr FloatKernels kColumnsKernels{columns_kernel<F32>, columns_kernel<F16>, columns_kernel<BF16>};

// S sequential streams through one buffer: some processors fetch ahead better with several.
template <int S>
uint64_t read_streams(const uint8_t* data, int64_t nbytes) {
    const int64_t part = nbytes / S / 256 * 256;
    Bits sums[S][4];
    for (int s = 0; s < S; ++s)
        for (int i = 0; i < 4; ++i) sums[s][i] = no_bits();
    for (int64_t at = 0; at < part; at += 4 * static_cast<int64_t>(sizeof(Bits)))
        for (int s = 0; s < S; ++s)
            for (int i = 0; i < 4; ++i)
                sums[s][i] = flip_bits(sums[s][i], data + s * part + at + i * static_cast<int64_t>(sizeof(Bits)));
    uint64_t total = 0;
    for (int s = 0; s < S; ++s)
        for (int i = 0; i < 4; ++i) {
            uint64_t words[sizeof(Bits) / 8];
            memcpy(words, &sums[s][i], sizeof words);
            for (uint64_t word : words) total ^= word;
        }
    return total;
}

}  // namespace
}  // namespace moei

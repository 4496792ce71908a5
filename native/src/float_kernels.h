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

template <typename T, int R, int N>
void rows_block(const uint8_t* w, int64_t stride, int64_t cols, const void* const* x, float* out, int64_t ld) {
    Lanes sums[N][R];
    for (int t = 0; t < N; ++t)
        for (int r = 0; r < R; ++r) sums[t][r] = zero();
    for (int64_t c = 0; c < cols; c += 16) {
        Lanes weights[R];
        for (int r = 0; r < R; ++r) weights[r] = load_some(T{}, w + (r * stride + c) * T::nbytes, cols - c);
        for (int t = 0; t < N; ++t) {
            const Lanes activations = load_some(F32{}, bytes(x[t], c), cols - c);
            for (int r = 0; r < R; ++r) sums[t][r] = fma(weights[r], activations, sums[t][r]);
        }
    }
    if constexpr (kSums16 && R * N == 16) {
        float all[16];
        store(all, sum16(&sums[0][0]));
        for (int t = 0; t < N; ++t) memcpy(out + t * ld, all + t * R, R * sizeof(float));
    } else {
        for (int t = 0; t < N; ++t)
            for (int r = 0; r < R; ++r) out[t * ld + r] = sum(sums[t][r]);
    }
}

template <typename T, int R>
void rows_tokens(const uint8_t* w, int64_t stride, int64_t cols, const void* const* x, int64_t n, float* out, int64_t ld) {
    int64_t t = 0;
    if constexpr (R <= kRows)
        for (; t + kTokens <= n; t += kTokens) rows_block<T, R, kTokens>(w, stride, cols, x + t, out + t * ld, ld);
    if constexpr (R == 2 * kRows)
        for (; t + 2 <= n; t += 2) rows_block<T, R, 2>(w, stride, cols, x + t, out + t * ld, ld);
    for (; t < n; ++t) rows_block<T, R, 1>(w, stride, cols, x + t, out + t * ld, ld);
}

template <typename T>
void rows_kernel(const uint8_t* w, int64_t stride, int64_t rows, int64_t cols, const void* const* x, int64_t n,
                 float* out, int64_t ld) {
    int64_t r = 0;
    // Adding up lanes takes longer than multiplying rows as short as a small head: sixteen sums at a time then.
    if constexpr (kSums16) {
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

// V vectors of 16 neighbouring outputs for N tokens; `width` is less than 16 only at the right edge (with V = 1).
template <typename T, int V, int N>
void columns_block(const uint8_t* w, int64_t stride, int64_t width, int64_t cols, const void* const* x, float* out,
                   int64_t ld) {
    Lanes sums[N][V];
    for (int t = 0; t < N; ++t)
        for (int v = 0; v < V; ++v) sums[t][v] = zero();
    for (int64_t c = 0; c < cols; ++c) {
        Lanes weights[V];
        for (int v = 0; v < V; ++v) weights[v] = load_some(T{}, w + (c * stride + 16 * v) * T::nbytes, width);
        for (int t = 0; t < N; ++t) {
            const Lanes activation = broadcast(load_f32(bytes(x[t], c)));
            for (int v = 0; v < V; ++v) sums[t][v] = fma(weights[v], activation, sums[t][v]);
        }
    }
    for (int t = 0; t < N; ++t) {
        for (int v = 0; v < V; ++v) {
            float values[16];
            store(values, sums[t][v]);
            memcpy(out + t * ld + 16 * v, values, static_cast<size_t>(width < 16 ? width : 16) * sizeof(float));
        }
    }
}

template <typename T, int V>
void columns_tokens(const uint8_t* w, int64_t stride, int64_t width, int64_t cols, const void* const* x, int64_t n,
                    float* out, int64_t ld) {
    int64_t t = 0;
    for (; t + kTokens <= n; t += kTokens) columns_block<T, V, kTokens>(w, stride, width, cols, x + t, out + t * ld, ld);
    for (; t + 2 <= n; t += 2) columns_block<T, V, 2>(w, stride, width, cols, x + t, out + t * ld, ld);
    for (; t < n; ++t) columns_block<T, V, 1>(w, stride, width, cols, x + t, out + t * ld, ld);
}

template <typename T>
void columns_kernel(const uint8_t* w, int64_t stride, int64_t rows, int64_t cols, const void* const* x, int64_t n,
                    float* out, int64_t ld) {
    int64_t r = 0;
    for (; r + 16 * kRows <= rows; r += 16 * kRows)
        columns_tokens<T, kRows>(w + r * T::nbytes, stride, 16, cols, x, n, out + r, ld);
    for (; r < rows; r += 16) columns_tokens<T, 1>(w + r * T::nbytes, stride, rows - r, cols, x, n, out + r, ld);
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

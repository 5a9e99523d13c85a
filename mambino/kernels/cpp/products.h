// Matrix products and transposes of what lies in the cache.
#pragma once
#include <utility>

#include "vectors.h"

#ifdef __AVX512F__
constexpr int WIDE = 4;  // accumulators: 4 x WIDE registers of L
#else
constexpr int WIDE = 1;
#endif

static inline I up(I n, I to) { return (n + to - 1) / to * to; }

template <int R, int W>
static inline void tile(float *c, I sc, const float *a, I ai, I ak, const float *b, I sb, I k0,
                        I k1, bool plus) {
    vec s[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++)
            s[r][w] = plus ? load(c + r * sc + w * L) : vec{};
    for (I k = k0; k < k1; k++) {
        vec row[W];
        for (int w = 0; w < W; w++)
            row[w] = load(b + k * sb + w * L);
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++)
                s[r][w] += a[r * ai + k * ak] * row[w];
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++)
            store(c + r * sc + w * L, s[r][w]);
}

// all of it; a[i][k] is 0 for k > i, or for k < i; only c[i][j <= i] matters
enum Part { FULL, LOWER, UPPER, CAUSAL };

// c[i][j] = sum over k of a[i * ai + k * ak] * b[k][j], or plus it; i < m, j < n (a multiple of L),
// k < K
template <int R>
static inline void strip(I i, I n, I K, float *c, I sc, const float *a, I ai, I ak, const float *b,
                         I sb, bool plus, Part part) {
    I k0 = part == UPPER ? i : 0;
    I k1 = part == LOWER && i + R < K ? i + R : K;
    I j = 0;
    if (part == CAUSAL && i + R < n)
        n = (i + R + L - 1) / L * L;
    for (; j + WIDE * L <= n; j += WIDE * L)
        tile<R, WIDE>(c + i * sc + j, sc, a + i * ai, ai, ak, b + j, sb, k0, k1, plus);
    for (; j < n; j += L)
        tile<R, 1>(c + i * sc + j, sc, a + i * ai, ai, ak, b + j, sb, k0, k1, plus);
}

static void gemm(I m, I n, I K, float *c, I sc, const float *a, I ai, I ak, const float *b, I sb,
                 bool plus = false, Part part = FULL) {
    I i = 0;
    for (; i + 4 <= m; i += 4)
        strip<4>(i, n, K, c, sc, a, ai, ak, b, sb, plus, part);
    for (; i < m; i++)
        strip<1>(i, n, K, c, sc, a, ai, ak, b, sb, plus, part);
}

#ifdef __clang__
template <int D, int... l>
static inline void swap(vec &a, vec &b, std::integer_sequence<int, l...>) {
    vec c = __builtin_shufflevector(a, b, ((l & D) ? L + l - D : l)...);
    b = __builtin_shufflevector(a, b, ((l & D) ? L + l : l + D)...);
    a = c;
}
#else
template <int D, int... l>
static inline void swap(vec &a, vec &b, std::integer_sequence<int, l...>) {
    vec c = __builtin_shuffle(a, b, ivec{((l & D) ? L + l - D : l)...});
    b = __builtin_shuffle(a, b, ivec{((l & D) ? L + l : l + D)...});
    a = c;
}
#endif

template <int D>
static inline void
swap_all(vec *r) {  // of a block of L x L the off-diagonal quarters of each D x D
    for (int i = 0; i < L; i++)
        if (!(i & D))
            swap<D>(r[i], r[i + D], std::make_integer_sequence<int, L>());
}

// to (n, st) = the transpose of from (m, n), times a number a column of `to`; n is a multiple of L;
// columns from m to `full` are 0
static void transpose(float *to, I st, const float *from, I sf, I m, I n, I full,
                      const float *scale = nullptr) {
    for (I i = 0; i < full; i += L) {
        for (I j = 0; j < n; j += L) {
            vec r[L];
            for (int l = 0; l < L; l++)
                r[l] = i + l < m ? load(from + (i + l) * sf + j) : vec{};
            swap_all<8>(r);
            swap_all<4>(r);
            swap_all<2>(r);
            swap_all<1>(r);
            for (int l = 0; l < L; l++)
                store(to + (j + l) * st + i, scale ? r[l] * load(scale + i) : r[l]);
        }
    }
}

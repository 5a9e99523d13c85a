// Matrix products and transposes of what lies in the cache.
#pragma once
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

static inline I up(I n, I to) { return (n + to - 1) / to * to; }

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WIDE = 4;  // accumulators: 6 x WIDE registers, of 32
#else
constexpr int WIDE = 2;  // of 16
#endif

// A product's numbers are fp32, or pairs of bf16 that follow one another in k, the index that is
// summed over: Operands<T> says which, of what is kept in memory as T, is soonest multiplied here.
struct pair {
    bf16 first, second;
};

template <class T>
struct Operands {
    typedef float number, unit;
};

#ifdef __AVX512BF16__
template <>
struct Operands<bf16> {
    typedef bf16 number;
    typedef pair unit;
};
#endif

template <class unit>
constexpr I PER = std::is_same<unit, float>::value ? 1 : 2;  // numbers in a unit

static inline float value(float a) { return a; }

static inline float value(bf16 a) {
    uint32_t u = (uint32_t)a.bits << 16;
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

static inline vec muladd(vec s, const float *a, vec b) { return s + *a * b; }

static inline vec muladd(vec s, const pair *a, vec b) {
    uint32_t both;
    memcpy(&both, a, sizeof both);
    return dot(s, pairs{} + both, (pairs)b);
}

template <int R, int W, class unit>
static inline void tile(float *c, I sc, const unit *a, I ai, I ak, const unit *b, I sb, I k0, I k1,
                        float keep) {
    vec s[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++)
            s[r][w] = keep ? load(c + r * sc + w * L) * keep : vec{};
    for (I k = k0; k < k1; k++) {
        vec row[W];
        for (int w = 0; w < W; w++)
            row[w] = load((const float *)(b + k * sb + w * L));
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++)
                s[r][w] = muladd(s[r][w], a + r * ai + k * ak, row[w]);
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++)
            store(c + r * sc + w * L, s[r][w]);
}

// all of it; a[i][k] is 0 for k > i, or for k < i; only c[i][j <= i] matters
enum Part { FULL, LOWER, UPPER, CAUSAL };

template <int R, class unit>
static inline void strip(I i, I n, I K, float *c, I sc, const unit *a, I ai, I ak, const unit *b,
                         I sb, float keep, Part part) {
    I k0 = part == UPPER ? i / PER<unit> : 0;
    I k1 = part == LOWER && i + R < K ? i + R : K;
    k1 = (k1 + PER<unit> - 1) / PER<unit>;
    I j = 0;
    if (part == CAUSAL && i + R < n)
        n = up(i + R, L);
    for (; j + WIDE * L <= n; j += WIDE * L)
        tile<R, WIDE>(c + i * sc + j, sc, a + i * ai, ai, ak, b + j, sb, k0, k1, keep);
    for (; j < n; j += L)
        tile<R, 1>(c + i * sc + j, sc, a + i * ai, ai, ak, b + j, sb, k0, k1, keep);
}

// c[i][j] = sum over k of a[i][k] * b[k][j], plus `keep` times what was there; i < m, j < n (a
// multiple of L), k < K numbers. ai, ak and sb are distances in units, and b[k] is a row of them
template <class unit>
__attribute__((noinline)) static void gemm(I m, I n, I K, float *c, I sc, const unit *a, I ai, I ak,
                                           const unit *b, I sb, float keep = 0, Part part = FULL) {
    I i = 0;
    for (; i + 6 <= m; i += 6)
        strip<6>(i, n, K, c, sc, a, ai, ak, b, sb, keep, part);
    for (; i + 4 <= m; i += 4)
        strip<4>(i, n, K, c, sc, a, ai, ak, b, sb, keep, part);
    for (; i < m; i++)
        strip<1>(i, n, K, c, sc, a, ai, ak, b, sb, keep, part);
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
swap_all(vec *r) {  // of a block of L x L the off-diagonal quarters of each 2 D x 2 D, of those of D x D, ...
    for (int i = 0; i < L; i++)
        if (!(i & D))
            swap<D>(r[i], r[i + D], std::make_integer_sequence<int, L>());
    if constexpr (D > 1)
        swap_all<D / 2>(r);
}

// to (n, st) = the transpose of from (m, n), numbers or pairs; n is a multiple of L; columns from m
// to `full` are 0
template <class unit>
static void transpose(unit *to, I st, const unit *from, I sf, I m, I n, I full) {
    for (I i = 0; i < full; i += L) {
        for (I j = 0; j < n; j += L) {
            vec r[L];
            for (int l = 0; l < L; l++)
                r[l] = i + l < m ? load((const float *)(from + (i + l) * sf + j)) : vec{};
            swap_all<L / 2>(r);
            for (int l = 0; l < L; l++)
                store((float *)(to + (j + l) * st + i), r[l]);
        }
    }
}

// to (m / 2, n) = pairs of what lies one below the other in rows (m, n), s apart; the last of an odd
// number of rows with 0
static inline void stack(pair *to, const bf16 *rows, I s, I m, I n) {
    for (I i = 0; i < m; i += 2) {
        for (I j = 0; j < n; j += L) {
            uvec upper = (uvec)load(rows + i * s + j);
            uvec lower = i + 1 < m ? (uvec)load(rows + (i + 1) * s + j) : uvec{};
            store((float *)(to + i / 2 * n + j), (vec)(upper >> 16 | lower));
        }
    }
}

// rows (m, n) of numbers as rows (m / PER, n) of units: of fp32 numbers they themselves; of bf16 as
// `stack` has them
static inline const float *stacked(std::vector<float> &, const float *rows, I, I) { return rows; }

static inline const pair *stacked(std::vector<pair> &room, const bf16 *rows, I m, I n) {
    stack(room.data(), rows, n, m, n);
    return room.data();
}

// rows (m, n), s apart, one after another as numbers
template <class T, class number>
static inline void gather(number *to, const T *rows, I s, I m, I n) {
    for (I i = 0; i < m; i++)
        for (I j = 0; j < n; j += L)
            store(to + i * n + j, load(rows + i * s + j));
}

// n numbers of type T as those a product takes: themselves, or each turned into one in `room`
template <class number>
static inline const number *as_numbers(std::vector<number> &, const number *from, I) {
    return from;
}

template <class number, class T>
static inline const number *as_numbers(std::vector<number> &room, const T *from, I n) {
    gather(room.data(), from, n, 1, n);
    return room.data();
}

// asks for a row of n that is read some microseconds later: the processor does not see it coming where
// each row lies in a page of its own. It waits where it has asked for ten lines that have not come yet,
// so that of many rows one is asked for at a time, between other work
template <class T>
static inline void prefetch(const T *row, I n) {
    for (I j = 0; j < n; j += 64 / sizeof(T))
        __builtin_prefetch(row + j, 0, 2);
}

// Matrices (rows, columns) by a few vectors, read once, as they are stored; products and sums are in
// fp32.
//
// INT8  scales: fp32, one a row
// INT4  scales: two bf16 for 64 columns of a row, scale and zero; the low half of their byte i is
//       column i, the high half column i + 32
#pragma once
#include <vector>

#include "products.h"
#include "threads.h"
#include "tokens.h"

enum Format { FP32, BF16, INT8, INT4 };

// as decode.py's Matrix fills it
struct Matrix {
    I format, rows, columns;
    const char *data;
    const void *scales;
};

constexpr I BYTES[] = {4 * GROUP, 2 * GROUP, GROUP, GROUP / 2};  // of GROUP columns

template <class V>
static inline V as(const void *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

#ifdef __AVX512F__  // L integers; gcc would take them apart one by one
static inline ivec integers(const int8_t *p) { return (ivec)_mm512_cvtepi8_epi32(as<__m128i>(p)); }
static inline ivec integers(const uint8_t *p) { return (ivec)_mm512_cvtepu8_epi32(as<__m128i>(p)); }

static inline ivec integers(const uint16_t *p) {
    return (ivec)_mm512_cvtepu16_epi32(as<__m256i>(p));
}
#else
template <class T>
static inline ivec integers(const T *p) {
    typedef T narrow __attribute__((vector_size(sizeof(T) * L)));
    typedef int16_t between __attribute__((vector_size(2 * L)));
    typedef uint16_t ubetween __attribute__((vector_size(2 * L)));
    if (sizeof(T) == 2)
        return __builtin_convertvector(as<ubetween>(p), ivec);
    return __builtin_convertvector(__builtin_convertvector(as<narrow>(p), between), ivec);
}
#endif

// what the 16 nibbles stand for in a group
struct Levels {
    vec table;
    float scale, zero;
};

static inline Levels levels(const void *scales, I group) {
    uint32_t both = ((const uint32_t *)scales)[group];
    uint32_t low = both << 16;
    uint32_t high = both & 0xffff0000u;
    float scale = as<float>(&low), zero = as<float>(&high);
    return {__builtin_convertvector(LANE, vec) * scale + zero, scale, zero};
}

static inline float scale_of(const Matrix &a, int format, I row) {
    return format == INT8 ? ((const float *)a.scales)[row] : 1.f;
}

static inline vec pick(const Levels &l, ivec bits) {  // by the low 4 bits
#ifdef __AVX512F__
    return (vec)_mm512_permutexvar_ps((__m512i)bits, (__m512)l.table);
#else
    return __builtin_convertvector(bits & 15, vec) * l.scale + l.zero;
#endif
}

// 16 of a group's columns, of INT8 without its scale
template <int F>
static inline vec columns(const char *group, int j, const Levels &l) {
    if (F == FP32)
        return as<vec>(group + 4 * L * j);
    if (F == BF16)
        return (vec)(integers((const uint16_t *)group + L * j) << 16);
    if (F == INT8)
        return __builtin_convertvector(integers((const int8_t *)group + L * j), vec);
    return pick(l, integers((const uint8_t *)group + L * (j % 2)) >> (j / 2 * 4));
}

static inline vec sums(vec *r) {  // lane i: the sum of r[i]
    swap_all<8>(r);
    swap_all<4>(r);
    swap_all<2>(r);
    swap_all<1>(r);
    for (int n = L / 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            r[i] += r[i + n];
    return r[0];
}

// out[m * so + r] = row r + first times x[m], r < R, m < M. x (M, columns up to GROUP, the rest 0)
template <int F, int R, int M>
static inline void products(const Matrix &a, I first, const float *x, I sx, float *out, I so) {
    I groups = (a.columns + GROUP - 1) / GROUP;
    I step = F == INT4 ? groups * BYTES[F] : a.columns * BYTES[F] / GROUP;
    const char *row = a.data + first * step;
    vec s[R][M]{};
    for (I g = 0; g < groups; g++) {
        bool cut = F != INT4 && (g + 1) * GROUP > a.columns;
        char rest[R][BYTES[F]];
        const char *p[R];
        Levels l[R];
        for (int r = 0; r < R; r++) {
            p[r] = row + r * step + g * BYTES[F];
            if (cut) {
                memset(rest[r], 0, BYTES[F]);
                memcpy(rest[r], p[r], step - g * BYTES[F]);
                p[r] = rest[r];
            } else if (F != FP32 || M == 1) {
                for (I i = 0; i < BYTES[F]; i += 64)
                    __builtin_prefetch(p[r] + R * step + i);  // the next rows
            }
            if (F == INT4)
                l[r] = levels(a.scales, (first + r) * groups + g);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vec w[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
                w[r] = columns<F>(p[r], j, l[r]);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                vec v = load(x + m * sx + g * GROUP + j * L);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    s[r][m] += w[r] * v;
            }
        }
    }
    if (R * M == L) {
        vec all = sums(s[0]);
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                out[m * so + r] = all[r * M + m] * scale_of(a, F, first + r);
    } else {
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++)
                out[m * so + r] = sum(s[r][m]) * scale_of(a, F, first + r);
    }
}

template <int F, int R>
static inline void products(const Matrix &a, I first, I tokens, const float *x, I sx, float *out,
                            I so, float *room) {
    if (tokens > 4 && F != FP32) {  // unpacked once, for all tokens
        I wide = up(a.columns, GROUP);
        I step = F == INT4 ? wide / 2 : a.columns * BYTES[F] / GROUP;
        for (int r = 0; r < R; r++) {
            for (I k = 0; k < wide; k += GROUP) {
                const char *p = a.data + (first + r) * step + k * BYTES[F] / GROUP;
                char rest[BYTES[F]]{};
                if (F != INT4 && k + GROUP > a.columns) {
                    memcpy(rest, p, step - k * BYTES[F] / GROUP);
                    p = rest;
                }
                Levels l{};
                if (F == INT4)
                    l = levels(a.scales, ((first + r) * wide + k) / GROUP);
                for (int j = 0; j < 4; j++) {
                    store(room + r * wide + k + j * L,
                          columns<F>(p, j, l) * scale_of(a, F, first + r));
                }
            }
        }
        return products<FP32, R>({FP32, R, wide, (const char *)room, nullptr}, 0, tokens, x, sx,
                                 out, so, nullptr);
    }
    for (; tokens >= 4; tokens -= 4, x += 4 * sx, out += 4 * so)
        products<F, R, 4>(a, first, x, sx, out, so);
    if (tokens == 3)
        products<F, R, 3>(a, first, x, sx, out, so);
    if (tokens == 2)
        products<F, R, 2>(a, first, x, sx, out, so);
    if (tokens == 1)
        products<F, R, 1>(a, first, x, sx, out, so);
}

template <int F>
static void rows(const Matrix &a, I lo, I hi, I tokens, const float *x, I sx, float *y,
                 float *room) {
    I r = lo;
    for (; r + 4 <= hi; r += 4)
        products<F, 4>(a, r, tokens, x, sx, y + r, a.rows, room);
    for (; r < hi; r++)
        products<F, 1>(a, r, tokens, x, sx, y + r, a.rows, room);
}

// y[i] (tokens, rows of matrix i) = x (tokens, columns) @ matrix i, transposed; all of the same
// columns
template <int n>
static void linear(I threads, const Matrix *const (&a)[n], I tokens, const float *x,
                   float *const (&y)[n]) {
    I K = a[0]->columns;
    I sx = up(K, GROUP);
    I parts = 0;
    std::vector<float> padded(sx > K ? tokens * sx : 0);
    for (I i = 0; i < tokens && sx > K; i++)
        memcpy(&padded[i * sx], x + i * K, 4 * K);
    if (sx > K)
        x = padded.data();
    for (auto m : a)
        parts += up(m->rows, 4) / 4;
    parallel(4 * parts * K * tokens < 32768 ? 1 : threads, parts, [&](I lo, I hi) {
        Flush flush;
        std::vector<float> room(tokens > 4 ? 4 * sx : 0);
        for (int i = 0; i < n; i++) {
            I quads = up(a[i]->rows, 4) / 4;
            I from = 4 * std::max<I>(lo, 0);
            I to = std::min(4 * hi, a[i]->rows);
            auto multiply = a[i]->format == FP32   ? rows<FP32>
                            : a[i]->format == BF16 ? rows<BF16>
                            : a[i]->format == INT8 ? rows<INT8>
                                                   : rows<INT4>;
            if (from < to)
                multiply(*a[i], from, to, tokens, x, sx, y[i], room.data());
            lo -= quads;
            hi -= quads;
        }
    });
}

API linear_step(I threads, I tokens, const Matrix *a, const float *x, float *y) {
    linear<1>(threads, {a}, tokens, x, {y});
}

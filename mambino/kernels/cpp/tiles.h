// Rounded matrices (rows, columns) by many vectors, the tokens of prompts.
//
// A panel of rows is unpacked once, into what the processor multiplies fastest, its rows side by side:
// a lane of a vector is a row. Then it is multiplied by all tokens, six at once, whose sums stay in
// registers. What a 32-bit lane holds, and one instruction multiplies:
//
//     matrix        lane                              x is rounded to
//     bf16          2 bf16                            bf16
//     int8, int4    4 bytes, or 2 16-bit integers     as many bits, 64 columns of a token sharing a scale
//
// Where a processor has no such instruction the numbers are unpacked to fp32, and x is not rounded. The
// sums of 64 columns' integers are exact; those are added up in fp32.
#pragma once
#include <algorithm>
#include <vector>

#include "matrices.h"

namespace tiles {

constexpr int PANEL = 2;  // vectors of L rows
constexpr int PARTS = GROUP / L;  // of a group of x
#ifdef __AVX512BF16__
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool HAS_BYTES = true;
#else
constexpr bool HAS_BYTES = false;
#endif
#ifdef __SSE2__
constexpr bool HAS_INTEGERS = true;
#else
constexpr bool HAS_INTEGERS = false;
#endif

constexpr int INTEGERS = HAS_BYTES ? 4 : HAS_INTEGERS ? 2 : 1;
constexpr int PACKED[] = {1, HAS_BF16 ? 2 : 1, INTEGERS, INTEGERS};  // numbers of a lane
constexpr bool has_integers(int format) { return format >= INT8 && HAS_INTEGERS; }
constexpr float MOST_X = HAS_BYTES ? 127 : 32767;

typedef uint8_t bytes __attribute__((vector_size(4 * L)));
typedef uint8_t half_bytes __attribute__((vector_size(2 * L)));
typedef int8_t half_chars __attribute__((vector_size(2 * L)));
typedef int8_t chars __attribute__((vector_size(L)));

// s + each lane's four products, of a's bytes without and b's with a sign
static inline ivec dot_bytes(ivec s, ivec a, ivec b) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)s, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)s, (__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < 32; i += 8)
        s += (a >> i & 255) * (b << (24 - i) >> 24);
    return s;
#endif
}

static inline words longer(half_chars c) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // gcc would take them apart
    return (words)_mm256_cvtepi8_epi16((__m128i)c);
#else
    return __builtin_convertvector(c, words);
#endif
}

// --- panels

template <int F>
static inline I row_bytes(const Matrix &a) {
    return F == INT4 ? up(a.columns, GROUP) / 2 : a.columns * BYTES[F] / GROUP;
}

// what 64 columns of a row in int4 are multiplied by, and what is added
static inline void levels(const Matrix &a, I row, I groups, I g, float &scale, float &zero) {
    uint32_t both = ((const uint32_t *)a.scales)[row * groups + g];
    uint32_t low = both << 16;
    uint32_t high = both & 0xffff0000u;
    scale = as<float>(&low);
    zero = as<float>(&high);
}

// lanes L j to L j + L - 1 of a row's group; of integers without their scale
template <int F>
static inline vec lanes(const char *group, int j) {
    if (F == FP32 || (F == BF16 && HAS_BF16))
        return as<vec>(group + 4 * L * j);
    if (F == BF16)
        return load((const bf16 *)group + L * j);
    if (F == INT8 && HAS_BYTES)  // without a sign: 128 is added
        return (vec)(as<bytes>(group + 4 * L * j) ^ (uint8_t)128);
    if (F == INT8 && HAS_INTEGERS)
        return (vec)longer(as<half_chars>(group + 2 * L * j));
    if (F == INT8)
        return __builtin_convertvector(as<chars>(group + L * j), vec);
    if (HAS_BYTES && 4 * L == GROUP) {
        half_bytes both = as<half_bytes>(group);
        half_bytes nibbles[2] = {both & 15, both >> 4};
        return as<vec>(nibbles);
    }
    int first = PACKED[INT4] * L * j;  // column, and its half of the bytes
    const char *at = group + first % (GROUP / 2);
    int shift = first / (GROUP / 2) * 4;
    if (HAS_BYTES)
        return (vec)(as<bytes>(at) >> shift & 15);
    if (HAS_INTEGERS)
        return (vec)longer((half_chars)(as<half_bytes>(at) >> shift & 15));
    return __builtin_convertvector(as<chars>(at) >> shift & 15, vec);
}

struct Panel {
    std::vector<float> lanes;       // (groups, lanes of a group, PANEL, L)
    std::vector<float> scales;      // (groups, 2, PANEL, L) of int4: scale and zero
};

// rows from `first`, in which the last is repeated where there are no more
template <int F>
static void unpack(const Matrix &a, I first, Panel &panel) {
    constexpr int steps = GROUP / PACKED[F];
    I groups = up(a.columns, GROUP) / GROUP;
    I step = row_bytes<F>(a);
    panel.lanes.resize(groups * steps * PANEL * L);
    panel.scales.resize(F == INT4 ? groups * 2 * PANEL * L : 0);
    for (I g = 0; g < groups; g++) {
        bool cut = F != INT4 && (g + 1) * GROUP > a.columns;
        for (int p = 0; p < PANEL; p++) {
            char rest[L][BYTES[F]];
            const char *at[L];
            for (int r = 0; r < L; r++) {
                I row = std::min(first + p * L + r, a.rows - 1);
                at[r] = a.data + row * step + g * BYTES[F];
                if (cut) {
                    memset(rest[r], 0, BYTES[F]);
                    memcpy(rest[r], at[r], step - g * BYTES[F]);
                    at[r] = rest[r];
                } else {
                    for (I i = 0; i < BYTES[F]; i += 64)  // the next panel's
                        __builtin_prefetch(at[r] + PANEL * L * step + i, 0, 2);
                }
                float *scales = panel.scales.data() + (g * 2 * PANEL + p) * L + r;
                if (F == INT4)
                    levels(a, row, groups, g, scales[0], scales[PANEL * L]);
            }
            for (int j = 0; j < steps / L; j++) {
                vec t[L];
                for (int r = 0; r < L; r++) {
                    t[r] = lanes<F>(at[r], j);
                    const float *scales = panel.scales.data() + (g * 2 * PANEL + p) * L + r;
                    if (F == INT4 && !HAS_INTEGERS)
                        t[r] = t[r] * scales[0] + scales[PANEL * L];
                }
                swap_all<L / 2>(t);
                for (int i = 0; i < L; i++)
                    store(&panel.lanes[((g * steps + j * L + i) * PANEL + p) * L], t[i]);
            }
        }
    }
}

// --- tokens

static inline void store_bytes(int32_t *p, ivec v) {
#ifdef __AVX512F__  // gcc would take them apart one by one
    chars c = (chars)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
    __m256i u = (__m256i)v;
    __m128i both = _mm_packs_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
    int64_t c = _mm_cvtsi128_si64(_mm_packs_epi16(both, both));
#else
    chars c = __builtin_convertvector(v, chars);
#endif
    memcpy(p, &c, sizeof c);
}

// a group of x, n columns of it and then zeros, as integers; sets their sum, returns their scale: NaN
// where x holds one, or an infinity
static inline float round_group(const float *x, I n, int32_t *to, int32_t *sum) {
    vec v[PARTS];
    ivec high{};
    for (int j = 0; j < PARTS; j++) {
        v[j] = load(x + j * L, std::max<I>(0, n - j * L));
        ivec bits = (ivec)v[j] & 0x7fffffff;
        high = bits > high ? bits : high;
    }
    float most = largest(high);
    bool sound = most < INFINITY;
    float inverse = sound && most >= 1e-30f ? MOST_X / most : 0;
    ivec total{};
    for (int j = 0; j < PARTS; j++) {
        vec scaled = sound ? v[j] * inverse : vec{};
        ivec c = nearest(scaled);
        total += c;
        if (HAS_BYTES)
            store_bytes(to + j * L / 4, c);
        else
            store((int16_t *)to + j * L, c);
    }
    *sum = 0;
    for (int i = 0; i < L; i++)
        *sum += total[i];
    return !sound ? NAN : inverse ? most / MOST_X : 0;
}

struct Tokens {  // x as panels are multiplied by it
    I count, groups;             // after the last row there may be one of zeros, or three
    std::vector<int32_t> lanes;  // (count, groups, lanes of a group)
    std::vector<float> scales;   // (count, groups) of integers
    std::vector<int32_t> sums;   // (count, groups) of integers

    template <int F>
    void read(I threads, I tokens, I columns, const float *x) {
        constexpr I steps = GROUP / PACKED[F];
        count = std::max<I>(4, up(tokens, 2));
        groups = up(columns, GROUP) / GROUP;
        lanes.resize(count * groups * steps);
        if (has_integers(F)) {
            scales.resize(count * groups);
            sums.resize(count * groups);
        }
        parallel(tokens * columns < 32768 ? 1 : threads, tokens, [&](I lo, I hi) {
            for (I i = lo * groups; i < hi * groups; i++) {
                I k = i % groups * GROUP;
                I n = std::min(GROUP, columns - k);
                const float *from = x + i / groups * columns + k;
                int32_t *to = &lanes[i * steps];
                if (has_integers(F)) {
                    scales[i] = round_group(from, n, to, &sums[i]);
                    continue;
                }
                for (int j = 0; j < PARTS; j++) {
                    vec v = load(from + j * L, std::max<I>(0, n - j * L));
                    if (PACKED[F] == 2)
                        store((bf16 *)to + j * L, v);
                    else
                        store((float *)to + j * L, v);
                }
            }
        });
    }
};

// --- products

// a panel, from row `first`, times tokens m to m + M - 1. out(m, p, v): v is row first + p L, and the
// L - 1 after it, times token m
template <int F, int M, class Out>
static inline void tile(const Matrix &a, I first, const Panel &panel, const Tokens &t, I m, Out out) {
    constexpr I steps = GROUP / PACKED[F];
    I next = t.groups * steps;  // from a token's lane to the next token's
    const float *w = panel.lanes.data();
    vec s[M][PANEL]{};
    for (I g = 0; g < t.groups; g++) {
        const int32_t *x = &t.lanes[m * next + g * steps];
        const int32_t *sums = t.sums.data() + m * t.groups + g;
        const float *scales = t.scales.data() + m * t.groups + g;
        ivec n[M][PANEL]{};
        for (I k = 0; k < steps; k++, w += PANEL * L) {
            vec row[PANEL];
#pragma GCC unroll 2
            for (int p = 0; p < PANEL; p++)
                row[p] = load(w + p * L);
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                ivec v = ivec{} + x[i * next + k];
#pragma GCC unroll 2
                for (int p = 0; p < PANEL; p++) {
                    if (has_integers(F) && HAS_BYTES)
                        n[i][p] = dot_bytes(n[i][p], (ivec)row[p], v);
                    else if (has_integers(F))
                        n[i][p] = dot(n[i][p], (ivec)row[p], v);
                    else if (PACKED[F] == 2)
                        s[i][p] = dot(s[i][p], (pairs)row[p], (pairs)v);
                    else
                        s[i][p] += row[p] * (vec)v;
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < M && has_integers(F); i++) {
            float scale = scales[i * t.groups];
            int32_t sum = sums[i * t.groups];
#pragma GCC unroll 2
            for (int p = 0; p < PANEL; p++) {
                if (F == INT8 && HAS_BYTES)
                    n[i][p] -= 128 * sum;  // which the bytes have more than the numbers
                vec v = __builtin_convertvector(n[i][p], vec);
                if (F == INT4) {
                    const float *levels = &panel.scales[(g * 2 * PANEL + p) * L];
                    s[i][p] += load(levels + PANEL * L) * (scale * sum);
                    v *= load(levels);
                }
                s[i][p] += v * scale;
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
#pragma GCC unroll 2
        for (int p = 0; p < PANEL; p++) {
            vec v = s[i][p];
            if (F == INT8) {
                I row = first + p * L;
                v *= load((const float *)a.scales + row, std::max<I>(0, a.rows - row));
            }
            out(m + i, p, v);
        }
    }
}

template <int F>
static void product(I threads, I tokens, const Matrix &a, const float *x, float *y) {
    Tokens t;
    t.read<F>(threads, tokens, a.columns, x);
    constexpr I R = PANEL * L;
    parallel(threads, up(a.rows, R) / R, [&](I lo, I hi) {
        Flush flush;
        Panel panel;
        for (I first = lo * R; first < std::min(hi * R, a.rows); first += R) {
            unpack<F>(a, first, panel);
            auto out = [&](I m, int p, vec v) {
                I n = std::min<I>(L, a.rows - first - p * L);
                if (m < tokens && n > 0)
                    store(y + m * a.rows + first + p * L, v, n);
            };
            I m = 0;
            for (; t.count - m >= 6 && t.count - m != 8; m += 6)
                tile<F, 6>(a, first, panel, t, m, out);
            for (; m < t.count; m += 4)
                tile<F, 4>(a, first, panel, t, m, out);
        }
    });
}

}  // namespace tiles

// y (tokens, rows) = x (tokens, columns) @ a, transposed
API tiles_product(I threads, I tokens, const Matrix *a, const float *x, float *y) {
    auto product = a->format == BF16   ? tiles::product<BF16>
                   : a->format == INT8 ? tiles::product<INT8>
                                       : tiles::product<INT4>;
    product(threads, tokens, *a, x, y);
}

// Matrices (rows, columns) by a few vectors, read once, as they are stored.
//
// FP32, BF16  products and sums are in fp32
// INT8        scales: fp32, one a row
// INT4        scales: two bf16 for 64 columns of a row, scale and zero; the low half of their byte
//             i is column i, the high half column i + 32
//
// int8 and int4 are multiplied by x in 16-bit integers (tokens.h), int4 where the processor can in
// their two bytes: unpacking its codes to 16 bits takes longer than the products. A row of x gives
// the same numbers whatever rows are beside it.
#pragma once
#include "products.h"
#include "threads.h"
#include "tokens.h"

// as decode.py's Matrix fills it
struct Matrix {
    I format, rows, columns;
    const char *data;
    const void *scales;
};

constexpr I DISTANCE = 16;  // rows, from those that are multiplied to those that are fetched
constexpr I BYTES[] = {4 * GROUP, 2 * GROUP, GROUP, GROUP / 2};  // of GROUP columns

template <class V>
static inline V as(const void *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

// --- what is stored, and x, as what is multiplied: registers of L lanes

template <int F>
constexpr bool INTEGER = F == INT8 || F == INT4;
template <int F>
constexpr int PIECES = GROUP / L / (INTEGER<F> ? 2 : 1);  // registers for GROUP columns of x
template <int F>
using Lanes = std::conditional_t<INTEGER<F>, ivec, vec>;
typedef uint16_t uwords __attribute__((vector_size(4 * L)));

// even columns, the first 32 and the second, then the odd ones
static inline ivec nibbles(const char *group, int j) {
#ifdef __AVX512F__
    uvec16 half = as<uvec16>(group) >> 8 * j;
    uvec16 both[] = {half & 15, half >> 4 & 15};
    return as<ivec>(both);
#else
    constexpr int PARTS = GROUP / 2 / sizeof(ivec);
    return (ivec)(as<uwords>(group + j % PARTS * sizeof(ivec)) >> 4 * (j / PARTS) & 15);
#endif
}

template <int F>
static inline Lanes<F> piece(const char *group, int j) {
    if constexpr (F == FP32) {
        return as<vec>(group + sizeof(vec) * j);
    } else if constexpr (F == BF16) {  // even columns, then odd ones
        uvec u = as<uvec>(group + sizeof(vec) * (j / 2));
        return (vec)(j % 2 ? u & 0xffff0000u : u << 16);
    } else if constexpr (F == INT8) {
        constexpr int HALF = PIECES<F> / 2;
        words w = as<words>(group + sizeof(vec) * (j % HALF));
        return (ivec)(j < HALF ? w << 8 >> 8 : w >> 8);
    } else {
        return nibbles(group, j);
    }
}

static inline uvec first_of(const uint32_t *p, I n) {  // at most L; the rest is 0
#ifdef __AVX512F__
    return (uvec)load((const float *)p, std::min<I>(n, L));
#else
    if (n >= L)
        return as<uvec>(p);
    uvec v{};
    for (int i = 0; i < n; i++)
        v[i] = p[i];
    return v;
#endif
}

// rounded once where the processor can: left to choose, gcc does so for some numbers of tokens and not for
// others, and a row would depend on those beside it
static inline vec multiply(vec s, vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)s);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)s);
#else
    return s + a * b;
#endif
}
static inline ivec multiply(ivec s, ivec a, ivec b) { return dot(s, a, b); }
static inline vec real(vec v) { return v; }
static inline vec real(ivec v) { return __builtin_convertvector(v, vec); }

template <class V>
static inline void keep(V &v) {  // in a register: gcc would load it for each product again
#ifdef __AVX512F__
    asm("" : "+v"(v));
#elif defined(__SSE2__)
    asm("" : "+x"(v));
#endif
}

// --- sums of lanes

// lane l: a[l] + a[l + D], or b[l - D] + b[l] where l has the bit D
template <int D, class V, int... l>
static inline V halved(V a, V b, std::integer_sequence<int, l...>) {
    constexpr int N = sizeof...(l);
#ifdef __clang__
    return __builtin_shufflevector(a, b, ((l & D) ? N + l - D : l)...) +
           __builtin_shufflevector(a, b, ((l & D) ? N + l : l + D)...);
#else
    typedef int32_t lanes __attribute__((vector_size(4 * N)));
    return __builtin_shuffle(a, b, lanes{((l & D) ? N + l - D : l)...}) +
           __builtin_shuffle(a, b, lanes{((l & D) ? N + l : l + D)...});
#endif
}

template <int D, class V>
static inline void halve(V *r) {
    for (int i = 0; i < D; i++)
        r[i] = halved<D>(r[i], r[i + D], std::make_integer_sequence<int, sizeof(V) / 4>());
    if constexpr (D > 1)
        halve<D / 2>(r);
}

template <class V>
static inline V sums(V *r) {  // lane i: the sum of r[i]
    halve<sizeof(V) / 8>(r);
    return r[0];
}

// --- products

// int4: what the zeros of a row give, added to f[m], m < M
template <int M>
static inline void add_zeros(const uint32_t *levels, const Tokens &x, I token, vec *f) {
    for (I g = 0; g < x.groups; g += L) {
        uvec both = first_of(levels + g, x.groups - g);
        vec zeros = (vec)(both & 0xffff0000u);
        const float *codes = &x.sums[token * up(x.groups, L) + g];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
            f[m] = multiply(f[m], zeros, as<vec>(codes + m * up(x.groups, L)));
    }
}

// int4: the codes of BESIDE groups, or of the last one and nothing
static inline uvec some_codes(const char *p, I n) {
#ifdef __AVX512BW__
    return (uvec)_mm512_maskz_loadu_epi8(n < BESIDE ? 0xffffffffull : ~0ull, p);
#else
    return as<uvec>(p);
#endif
}

// and their scales, each in the lanes of its group
static inline vec some_scales(const uint32_t *levels, I n) {
#ifdef __AVX512BW__
    __m128i both = n < BESIDE ? _mm_cvtsi32_si128((int)levels[0])  // gcc 11 has another one wrong
                              : _mm_loadl_epi64((const __m128i *)levels);
    __m512i places = _mm512_inserti64x4(__m512i{}, _mm256_set1_epi32(2 << 16), 1);  // words 0, 2
    return (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, _mm512_castsi128_si512(both));
#else
    return (vec)((uvec{} + levels[0]) << 16);
#endif
}

// what `tile` does, of int4 by x in bytes
template <int R, int M>
static inline void tile_of_bytes(const Matrix &a, I first, const Tokens &x, I token, vec *all,
                                 int rows) {
    I step = x.groups * BYTES[INT4];
    I share = R > 1 ? BESIDE * R * BYTES[INT4] * M / x.count : 0;  // of what is fetched ahead
    const char *p[R];
    const uint32_t *levels[R];
    typedef ivec stored __attribute__((may_alias));  // as other numbers
    const stored *v = (const stored *)(x.data + token * x.stride);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        I row = std::min(first + r, a.rows - 1);
        p[r] = a.data + row * step;
        levels[r] = (const uint32_t *)a.scales + row * x.groups;
    }
    const char *ahead = p[0] + DISTANCE * step + token / M * share / BESIDE * x.groups;
    const char *until = ahead;
    vec f[R][M]{};
    auto add = [&](I g, I n) __attribute__((always_inline)) {  // what n groups give
        for (until += share; ahead < until; ahead += 64)
            __builtin_prefetch(ahead, 0, 2);
        ivec low[R], high[R];
        vec scale[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            uvec codes = some_codes(p[r] + g * BYTES[INT4], n);
            low[r] = (ivec)(codes & 0x0f0f0f0fu);
            high[r] = (ivec)(codes >> 4 & 0x0f0f0f0fu);
            scale[r] = some_scales(levels[r] + g, n);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++, v++) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                ivec s = dot_bytes(low[r], high[r], v[0], v[M], v[2 * M], v[3 * M]);
                f[r][m] = multiply(f[r][m], real(s), scale[r]);
            }
        }
        v += 3 * M;
    };
    I g = 0;
    for (; g + BESIDE <= x.groups; g += BESIDE)
        add(g, BESIDE);
    if (g < x.groups)
        add(g, x.groups - g);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        add_zeros<M>(levels[r], x, token, f[r]);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
            all[m * rows + r] = f[r][m] * x.scales[token + m];
    }
}

// all[m * rows + r], in lanes, of R rows from the first by M tokens
template <int F, int R, int M>
static inline void tile(const Matrix &a, I first, const Tokens &x, I token, vec *all, int rows) {
    constexpr I BLOCK = 512 * L / GROUP;  // 512 numbers a lane, times 128 * 32767: below 2^31
    I whole = F == INT4 ? x.groups : a.columns / GROUP;
    I step = F == INT4 ? x.groups * BYTES[F] : a.columns * BYTES[F] / GROUP;
    I share = R > 1 ? R * BYTES[F] * M / x.count : 0;  // of what is fetched ahead
    const char *p[R];
    const char *v = x.data + token * x.stride;
    const uint32_t *levels[R];
    char rest[R][BYTES[F]];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        I row = std::min(first + r, a.rows - 1);
        p[r] = a.data + row * step;
        levels[r] = (const uint32_t *)a.scales + row * x.groups;
    }
    const char *ahead = p[0] + DISTANCE * step + token / M * share * x.groups;
    const char *until = ahead;
    Lanes<F> s[R][M]{};
    vec f[R][M]{};
    for (I g = 0; g < x.groups;) {
        I end = g < whole ? whole : x.groups;
        if (F == INT8)
            end = std::min(end, g + BLOCK);
        if (g == whole) {
            for (int r = 0; r < R; r++) {
                memset(rest[r], 0, BYTES[F]);
                memcpy(rest[r], p[r], step - g * BYTES[F]);
                p[r] = rest[r];
            }
        }
        for (; g < end; g++) {
            for (until += share; ahead < until; ahead += 64)
                __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 16
            for (int j = 0; j < PIECES<F>; j++) {
                Lanes<F> w[R];
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    w[r] = piece<F>(p[r], j);
                    if (M > 1)
                        keep(w[r]);
                }
#pragma GCC unroll 4
                for (int m = 0; m < M; m++, v += sizeof(vec)) {
                    Lanes<F> u = as<Lanes<F>>(v);
                    if (R > 1)
                        keep(u);
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        s[r][m] = multiply(s[r][m], w[r], u);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                p[r] += BYTES[F];
                if (F != INT4)
                    continue;
                vec scale = (vec)((uvec{} + levels[r][g]) << 16);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                    f[r][m] = multiply(f[r][m], real(s[r][m]), scale);
                    s[r][m] = Lanes<F>{};
                }
            }
        }
        if (F != INT4) {
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
                for (int m = 0; m < M && F == INT8; m++) {
                    f[r][m] += real(s[r][m]);
                    s[r][m] = Lanes<F>{};
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        if (F == INT4)
            add_zeros<M>(levels[r], x, token, f[r]);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
            all[m * rows + r] = INTEGER<F> ? f[r][m] * x.scales[token + m] : real(s[r][m]);
    }
}

// y[token + m][first + r], m < M; R rows at once. Returns the next row
template <int F, int R, int M>
static inline I products(const Matrix &a, I first, const Tokens &x, I token, float *y) {
    constexpr int ROWS = R * M < L ? L / M : R;
    I n = std::min<I>(ROWS, a.rows - first);
    vec all[ROWS * M];
    float out[ROWS * M];
    float scale[ROWS];
    for (int r = 0; r < ROWS; r += R) {
        if constexpr (F == INT4 && MULTIPLIES_BYTES)
            tile_of_bytes<R, M>(a, first + r, x, token, all + r, ROWS);
        else
            tile<F, R, M>(a, first + r, x, token, all + r, ROWS);
    }
    for (int i = 0; i < ROWS * M; i += L) {
        vec v = sums(all + i);
        memcpy(out + i, &v, sizeof v);
    }
    for (int r = 0; r < ROWS && F == INT8; r++)
        scale[r] = r < n ? ((const float *)a.scales)[first + r] : 0;
    for (int m = 0; m < M && token + m < x.count; m++) {
        for (int r = 0; r < ROWS && F == INT8; r++)
            out[m * ROWS + r] *= scale[r];
        float *to = y + (token + m) * a.rows + first;
        if (n == ROWS)
            memcpy(to, out + m * ROWS, 4 * ROWS);
        else
            memcpy(to, out + m * ROWS, 4 * n);
    }
    return first + ROWS;
}

// y (tokens, rows lo to hi)
template <int F>
static void rows(const Matrix &a, I lo, I hi, const Tokens &x, float *y) {
#if defined(__AVX512F__) || defined(__aarch64__)  // with 32 registers
    constexpr int R = F == INT4 ? 2 : 4;
#else
    constexpr int R = F == INT4 ? 1 : 2;
#endif
    I whole = (x.count + 1) / SIDE * SIDE;
    for (I r = lo, next; r < hi && whole; r = next)
        for (I token = 0; token < whole; token += SIDE)
            next = products<F, R, SIDE>(a, r, x, token, y);
    if (x.count - whole == 2)
        for (I r = lo; r < hi;)
            r = products<F, F == FP32 ? 1 : 2, 2>(a, r, x, whole, y);
    if (x.count - whole == 1)
        for (I r = lo; r < hi;)
            r = products<F, 1, 1>(a, r, x, whole, y);
}

// y[i] (tokens, rows of matrix i) = x (tokens, columns) @ matrix i, transposed; all of the same
// columns
template <int n>
static void linear(I threads, const Matrix *const (&a)[n], I tokens, const float *x,
                   float *const (&y)[n]) {
    I K = a[0]->columns;
    Tokens all(a[0]->format, tokens, K, x);
    I blocks = 0;
    for (int i = 0; i < n; i++) {
        if (a[i]->format == a[0]->format)
            blocks += up(a[i]->rows, L) / L;
        else
            linear<1>(threads, {a[i]}, tokens, x, {y[i]});
    }
    parallel(L * blocks * K * tokens < 32768 ? 1 : threads, blocks, [&](I lo, I hi) {
        Flush flush;
        for (int i = 0; i < n; i++) {
            if (a[i]->format != a[0]->format)
                continue;
            I own = up(a[i]->rows, L) / L;
            I from = L * std::max<I>(lo, 0);
            I to = std::min(L * hi, a[i]->rows);
            auto multiply = a[i]->format == FP32   ? rows<FP32>
                            : a[i]->format == BF16 ? rows<BF16>
                            : a[i]->format == INT8 ? rows<INT8>
                                                   : rows<INT4>;
            if (from < to)
                multiply(*a[i], from, to, all, y[i]);
            lo -= own;
            hi -= own;
        }
    });
}

API linear_step(I threads, I tokens, const Matrix *a, const float *x, float *y) {
    linear<1>(threads, {a}, tokens, x, {y});
}

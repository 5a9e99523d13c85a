// Vectors of L numbers, and exp, sigmoid, softplus of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __SSE2__
#include <immintrin.h>
#endif

typedef int64_t I;
#if defined(__AVX512F__)  // a register; of larger vectors gcc makes code that goes by way of memory
constexpr int L = 16;
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
typedef double dvec __attribute__((vector_size(4 * L)));  // L / 2 of them
#define API extern "C" void

template <int... l>
constexpr ivec lanes_in_order(std::integer_sequence<int, l...>) {
    return ivec{l...};
}
constexpr ivec LANE = lanes_in_order(std::make_integer_sequence<int, L>());

struct Flush {  // numbers below 1e-38 as 0, while it lives: on x86 they take 100 times as long
#ifdef __SSE__
    unsigned before = __builtin_ia32_stmxcsr();

    Flush() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~Flush() { __builtin_ia32_ldmxcsr(before); }
#else
    Flush() {}
    ~Flush() {}
#endif
};

static inline vec all(float a) { return vec{} + a; }

static inline vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }

static inline vec load(const float *p, int n) {  // the first n; the rest is 0
    if (n >= L)
        return load(p);
#ifdef __AVX512F__
    return (vec)_mm512_maskz_loadu_ps((1u << n) - 1, p);
#else
    vec v{};
    for (int i = 0; i < n; i++)
        v[i] = p[i];
    return v;
#endif
}

static inline void store(float *p, vec v, int n) {
    if (n >= L)
        return store(p, v);
    for (int i = 0; i < n; i++)
        p[i] = v[i];
}

static inline dvec load(const double *p) {
    dvec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(double *p, dvec v) { memcpy(p, &v, sizeof v); }

static inline dvec wide(const float *p) {
    float half __attribute__((vector_size(2 * L)));
    memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, dvec);
}

static inline void narrow(float *p, dvec v) {  // L / 2 of them
    float half __attribute__((vector_size(2 * L)));
    half = __builtin_convertvector(v, decltype(half));
    memcpy(p, &half, sizeof half);
}

static inline dvec rounded(dvec v) { return v + 6755399441055744. - 6755399441055744.; }

static inline void add(float *p, vec v, int n = L) { store(p, load(p, n) + v, n); }
static inline vec max(vec a, vec b) { return a > b ? a : b; }

// f of all numbers of v: of the two halves, of the halves of that, and so on
template <class F>
static inline float folded(vec v, F f) {
    float s[L];
    store(s, v);
    for (int n = L / 2; n; n /= 2)
        for (int i = 0; i < n; i++)
            s[i] = f(s[i], s[i + n]);
    return s[0];
}

static inline float sum(vec v) {
#ifdef __AVX512F__  // gcc would take it apart
    return _mm512_reduce_add_ps((__m512)v);
#else
    return folded(v, [](float a, float b) { return a + b; });
#endif
}

static inline double sum(dvec v) {
    double s = 0;
    for (int i = 0; i < L / 4; i++)
        s += v[i] + v[i + L / 4];
    return s;
}

static inline float largest(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    return folded(v, [](float a, float b) { return a > b ? a : b; });
#endif
}

// --- bf16: the upper 16 bits of an fp32 number

struct bf16 {
    uint16_t bits;
};
typedef uint16_t uvec16 __attribute__((vector_size(2 * L)));
typedef uint32_t uvec __attribute__((vector_size(4 * L)));
// 2 L of them, two in a lane, the lower one first
typedef uint32_t pairs __attribute__((vector_size(4 * L)));

// to the nearest bf16, of two the even, in the upper 16 bits. A NaN stays one if its lower bits are 0
static inline uvec nearest_bits(vec v) {
    uvec u = (uvec)v;
    return u + 0x7fffu + (u >> 16 & 1u);
}

static inline uvec rounded_bits(vec v) {  // in the lower 16 bits; any NaN stays one
    return v == v ? nearest_bits(v) >> 16 : ((uvec)v >> 16 | 0x40u);
}

static inline vec load(const bf16 *p) {
    uvec16 u;
    memcpy(&u, p, sizeof u);
#ifdef __AVX512F__  // gcc would take them apart one by one
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)u), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)u), 16);
#else
    return (vec)(__builtin_convertvector(u, uvec) << 16);
#endif
}

static inline void store(bf16 *p, vec v) {
#ifdef __AVX512BF16__
    uvec16 u = (uvec16)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)
    uvec16 u = (uvec16)_mm512_cvtepi32_epi16((__m512i)rounded_bits(v));
#elif defined(__AVX2__)
    __m256i r = (__m256i)rounded_bits(v);
    uvec16 u = (uvec16)_mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
#else
    uvec16 u = __builtin_convertvector(rounded_bits(v), uvec16);
#endif
    memcpy(p, &u, sizeof u);
}

static inline vec load(const bf16 *p, int n) {  // the first n; the rest is 0
    if (n >= L)
        return load(p);
    bf16 a[L]{};
    memcpy(a, p, n * sizeof *p);
    return load(a);
}

static inline void store(bf16 *p, vec v, int n) {
    if (n >= L)
        return store(p, v);
    bf16 a[L];
    store(a, v);
    memcpy(p, a, n * sizeof *p);
}

static inline pairs load_pairs(const bf16 *p) {
    pairs v;
    memcpy(&v, p, sizeof v);
    return v;
}

// s + the sum of each lane's two products, in fp32: one instruction where the processor has it
static inline vec dot(vec s, pairs a, pairs b) {
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)s, (__m512bh)a, (__m512bh)b);
#else
    s += (vec)(a << 16) * (vec)(b << 16);
    return s + (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
#endif
}

// --- functions, to 2 units in the last place: a polynomial on one octave, the octave put into the
// exponent's bits

static inline vec exp2v(vec x) {  // 2^x for x <= 127; a NaN stays one if its lower 9 bits are 0
    x = x < -125.f ? all(-125.f) : x;
    vec shifted = x + 12582912.f, r = x - (shifted - 12582912.f);
    vec p = all(1.535336188319500e-4f);
    p = p * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
constexpr double TAU = 6.283185307179586;  // a whole turn

static inline vec expv(vec x) {
    x = x > 87.f ? all(87.f) : x;
    return exp2v(x * LOG2E);
}

static inline vec sigmoid(vec x) { return 1.f / (1.f + expv(-x)); }

static inline vec log1pv(vec u) {  // of 0 to 1
    vec w = u + 1.f;
    ivec e = ((ivec)w - 0x3f3504f3) >> 23;
    vec m = (vec)((ivec)w - (e << 23)) - 1.f;
    vec n = __builtin_convertvector(e, vec);
    vec p = all(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    vec y = m * m * m * p - n * 2.12194440e-4f - 0.5f * m * m + m + n * 0.693359375f;
    vec d = w - 1.f;
    return d == 0.f ? u : y * u / d;  // what 1 + u has lost of u (Kahan)
}

static inline vec softplus(vec x) {
    return (x > 0.f ? x : all(0.f)) + log1pv(expv(x > 0.f ? -x : x));
}

static inline vec softplus(vec x, vec &slope) {  // and its derivative, sigmoid(x)
    vec e = expv(x > 0.f ? -x : x);
    slope = (x > 0.f ? all(1.f) : e) / (1.f + e);
    return (x > 0.f ? x : all(0.f)) + log1pv(e);
}

// of |x| to 2 pi, to 1e-7: polynomials on a quarter turn (Moshier's), which is swapped and negated
static inline void sincos(vec x, vec &sine, vec &cosine) {
    vec shifted = x * 0.63661977f + 12582912.f, n = shifted - 12582912.f;
    ivec quarter = (ivec)shifted;
    vec r = x - n * 1.5703125f - n * 4.837512969970703e-4f - n * 7.549789948768648e-8f;
    vec z = r * r;
    vec s = ((z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
    vec c = (z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
    c = c * z * z - 0.5f * z + 1.f;
    sine = (vec)((ivec)((quarter & 1) != 0 ? c : s) ^ (quarter & 2) << 30);
    cosine = (vec)((ivec)((quarter & 1) != 0 ? s : c) ^ (quarter + 1 & 2) << 30);
}

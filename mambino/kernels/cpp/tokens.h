// Rows of x as a matrix by a few of them takes them; for int8 and int4 as 16-bit integers, 32 products
// an instruction, and their sums are exact.
//
//     x[k] = scale * codes[k], to half of the scale, max |x| / 65534
//
// The codes of 64 columns lie as the matrices are unpacked: first the even columns, then the odd
// ones. Read as 32-bit lanes they are pairs for `dot`: columns 0 and 2, 4 and 6, ... For int4 a
// processor that multiplies bytes takes them in two bytes each, split_row's.
#pragma once
#include <utility>
#include <vector>

#include "products.h"

constexpr I GROUP = 64;      // columns whose codes lie together, and that share a scale in int4
constexpr int MOST = 32767;  // the largest code
typedef int16_t codes16 __attribute__((vector_size(2 * L)));

static inline void store(int16_t *p, ivec v) {
#ifdef __AVX512F__  // gcc would take them apart one by one
    codes16 c = (codes16)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
    __m256i u = (__m256i)v;
    codes16 c = (codes16)_mm_packs_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
#else
    codes16 c = __builtin_convertvector(v, codes16);
#endif
    memcpy(p, &c, sizeof c);
}

// n numbers in another order: those at even places, then those at odd ones; n is GROUP at most
template <class T>
static inline void evens_first(I n, T *x) {
    T before[GROUP];
    memcpy(before, x, n * sizeof *x);
    for (I i = 0; i < n / 2; i++) {
        x[i] = before[2 * i];
        x[n / 2 + i] = before[2 * i + 1];
    }
}

// the largest |x|, of whose bits `high` has lanes; a NaN's are above an infinity's
static inline float largest(ivec high) {
    int32_t bits = 0;
    for (int i = 0; i < L; i++)
        bits = bits > high[i] ? bits : high[i];
    float most;
    memcpy(&most, &bits, sizeof most);
    return most;
}

static inline ivec nearest(vec v) { return (ivec)(v + 12582912.f) - 0x4b400000; }  // integers

// codes (columns up to whole groups, the rest 0), and the sum of each group's; returns the scale. A
// row with an infinity or a NaN gets a scale that makes NaNs of all products
static float round_row(I columns, const float *x, int16_t *codes, float *sums,
                       bool even_first = true) {
    ivec high{};
    for (I k = 0; k < columns; k += L) {
        ivec bits = (ivec)load(x + k, columns - k < L ? columns - k : L) & 0x7fffffff;
        high = bits > high ? bits : high;
    }
    float most = largest(high);
    if (!(most < INFINITY))
        most = NAN;
    float scale = most < 1e-30f ? 0 : most / MOST;
    float inverse = most >= 1e-30f ? MOST / most : 0;
    for (I k = 0; k < columns; k += GROUP) {
        ivec total{};
        for (int j = 0; j < GROUP; j += L) {
            I left = columns - k - j;
            vec v = load(x + k + j, left < 0 ? 0 : left < L ? left : L);
            ivec c = nearest(inverse ? v * inverse : vec{});
            total += c;
            store(codes + k + j, c);
        }
        if (even_first)
            evens_first(GROUP, codes + k);
        int32_t group = 0;
        for (int i = 0; i < L; i++)
            group += total[i];
        sums[k / GROUP] = group;
    }
    return scale;
}

// --- products in one register

typedef int16_t words __attribute__((vector_size(4 * L)));

// s + each lane's two products of 16-bit numbers
static inline ivec dot(ivec s, ivec a, ivec b) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpwssd_epi32((__m512i)s, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return s + (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (ivec)_mm256_dpwssd_avx_epi32((__m256i)s, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
    return s + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return s + (ivec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return s + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// --- products of bytes

#if defined(__AVX512BW__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr bool MULTIPLIES_BYTES = true;  // with AVX2 alone they take as long as 16 bits
#else
constexpr bool MULTIPLIES_BYTES = false;
#endif
constexpr I HALF_GROUP = GROUP / 2;        // bytes, of int4: the low halves are columns 0 to 31
constexpr I BESIDE = L == 16 ? 2 : 1;  // groups whose bytes fill a register

// Each lane's products of 8 int4 codes, the bytes of `low` and `high`, by 256 times the bytes of x0
// and x1, signed, plus those of x2 and x3, which are not
static inline ivec dot_bytes(ivec low, ivec high, ivec x0, ivec x1, ivec x2, ivec x3) {
#if defined(__AVX512VNNI__)
    auto dot4 = [](__m512i s, ivec a, ivec b) {  // a unsigned, b signed; codes are either
        return _mm512_dpbusd_epi32(s, (__m512i)a, (__m512i)b);
    };
    ivec upper = (ivec)dot4(dot4(__m512i{}, low, x0), high, x1);
    return (upper << 8) + (ivec)dot4(dot4(__m512i{}, x2, low), x3, high);
#elif defined(__AVXVNNI__)
    auto dot4 = [](__m256i s, ivec a, ivec b) {
        return _mm256_dpbusd_avx_epi32(s, (__m256i)a, (__m256i)b);
    };
    ivec upper = (ivec)dot4(dot4(__m256i{}, low, x0), high, x1);
    return (upper << 8) + (ivec)dot4(dot4(__m256i{}, x2, low), x3, high);
#elif defined(__AVX512BW__)
    auto dot2 = [](ivec a, ivec b) {  // in 16 bits, at most 2 * 15 * 255
        return (words)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
    };
    ivec upper = dot(ivec{}, (ivec)(dot2(low, x0) + dot2(high, x1)), (ivec)(words{} + 256));
    return dot(upper, (ivec)(dot2(x2, low) + dot2(x3, high)), (ivec)(words{} + 1));
#else
    ivec s{};
    for (int j = 0; j < 32; j += 8) {
        s += (low >> j & 255) * ((x0 << (24 - j) >> 24) * 256 + (x2 >> j & 255));
        s += (high >> j & 255) * ((x1 << (24 - j) >> 24) * 256 + (x3 >> j & 255));
    }
    return s;
#endif
}

// codes of groups in order → of each BESIDE groups four registers: the high bytes of all their
// first 32 columns, of all their second ones, then the low bytes so. code = 256 high + low, high
// signed, low not
static void split_row(I groups, const int16_t *codes, uint8_t *bytes) {
    for (I g = 0; g < groups; g++, codes += GROUP) {
        uint8_t *to = bytes + g / BESIDE * BESIDE * 2 * GROUP + g % BESIDE * HALF_GROUP;
        for (I half = 0; half < 2; half++, to += BESIDE * HALF_GROUP)
            for (I i = 0; i < HALF_GROUP; i++) {
                to[i] = codes[half * HALF_GROUP + i] >> 8;
                to[i + BESIDE * GROUP] = codes[half * HALF_GROUP + i];
            }
    }
}

// --- x, as a matrix of a format takes it

enum Format { FP32, BF16, INT8, INT4 };  // of a matrix, see matrices.h

constexpr int SIDE = 4;  // tokens at once

struct Tokens {
    I count, columns, groups, stride;  // stride: bytes of a token
    std::vector<vec> room;
    // SIDE tokens by each other, or two, or one: a register of each, then the next of each. BF16:
    // the even ones of 2 L columns first. INT8, INT4: codes, or their bytes
    const char *data;
    std::vector<float> scales, sums;  // (count,), (count, groups up to whole vectors), of codes

    Tokens(int format, I count, I columns, const float *x)
        : count(count), columns(columns), groups(up(columns, GROUP) / GROUP) {
        bool integers = format == INT8 || format == INT4;
        bool bytes = format == INT4 && MULTIPLIES_BYTES;
        I places_of_groups = bytes ? up(groups, BESIDE) : groups;
        stride = places_of_groups * GROUP * (integers ? sizeof(int16_t) : sizeof(float));
        data = (const char *)x;
        if (format == FP32 && count == 1 && columns % GROUP == 0)
            return;
        I whole = (count + 1) / SIDE * SIDE;  // three are four with nothing
        I places = std::max(whole, count);
        room.resize(places * stride / sizeof(vec));
        data = (const char *)room.data();
        scales.resize(integers ? places : 0);
        sums.resize(integers ? places * up(groups, L) : 0);
        std::vector<vec> row(stride / sizeof(vec)), codes(bytes ? row.size() : 0);
        for (I i = 0; i < count; i++, x += columns) {
            int16_t *to_codes = (int16_t *)(bytes ? codes : row).data();
            if (integers)
                scales[i] = round_row(columns, x, to_codes, &sums[i * up(groups, L)], !bytes);
            else
                copy_row(x, (float *)row.data(), format == BF16);
            if (bytes)
                split_row(groups, to_codes, (uint8_t *)row.data());
            I side = i < whole ? SIDE : count - whole;
            I first = i < whole ? i / SIDE * SIDE : whole;
            vec *to = (vec *)(data + first * stride) + (i - first);
            for (I j = 0; j < stride / (I)sizeof(vec); j++)
                to[j * side] = ((vec *)row.data())[j];
        }
    }

    void copy_row(const float *x, float *row, bool even_first) {
        memcpy(row, x, 4 * columns);
        memset(row + columns, 0, 4 * (groups * GROUP - columns));
        for (I k = 0; k < groups * GROUP && even_first; k += 2 * L)
            evens_first(2 * L, row + k);
    }
};

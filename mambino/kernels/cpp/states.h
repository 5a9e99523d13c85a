// States of recurrences, in fp32 or bf16: 2 L numbers in two registers, of bf16 the even ones and the odd
// ones, which no instruction need put in order.
#pragma once
#include <memory>

#include "matrices.h"

struct Room : std::unique_ptr<float[]> {  // for n numbers; a vector would write zeros into it
    Room(I n) : std::unique_ptr<float[]>(new float[n]) {}
};

constexpr I AHEAD = 1024;  // bytes: what is read of a state is fetched so much earlier

static inline void get(const float *p, vec &a, vec &b) {
    a = as<vec>(p);
    b = as<vec>(p + L);
}

static inline void put(float *p, vec a, vec b) {
    memcpy(p, &a, sizeof a);
    memcpy(p + L, &b, sizeof b);
}

static inline void get(const bf16 *p, vec &a, vec &b) {
    uvec both = as<uvec>(p);
    a = (vec)(both << 16);
    b = (vec)(both & 0xffff0000u);
}

// of sound numbers, and of what comes of them: a NaN of theirs has no lower bits
static inline void put(bf16 *p, vec a, vec b) {
    uvec both = nearest_bits(a) >> 16 | (nearest_bits(b) & 0xffff0000u);
    memcpy(p, &both, sizeof both);
}

static inline float sound(float a) { return a == a ? a : NAN; }
static inline vec sound(vec v) { return v == v ? v : all(NAN); }

// n sound numbers as `get` has those of a state that is kept in bf16
static void even_first(I n, float *x) {
    for (I i = 0; i < n; i += L)
        store(x + i, sound(load(x + i)));
    for (I i = 0; i + 2 * L <= n; i += 2 * L)
        evens_first(2 * L, x + i);
}

// (K, L) of each L channels, the last ones filled up, of a convolution's weight (E, K)
static Room taps_of(I E, I K, const float *weight) {
    Room taps(up(E, L) * K);
    float *to = taps.get();
    for (I e = 0; e < E; e += L)
        for (I j = 0; j < K; j++)
            for (int l = 0; l < L; l++)
                *to++ = weight[std::min(e + l, E - 1) * K + j];
    return taps;
}

// y (rows lo to hi, E) = silu of the convolution of one token of each sequence, x in rows of sx, which
// moves into the state (B, K - 1, E)
static void conv_steps(I lo, I hi, I E, I K, const float *x, I sx, const Room &taps,
                       const float *bias, float *state, float *y) {
    for (I b = lo; b < hi; b++) {
        for (I e = 0; e < E; e += L) {
            int n = std::min<I>(L, E - e);
            const float *tap = taps.get() + e * K;
            vec in = load(x + b * sx + e, n);
            vec out = load(bias + e, n) + load(tap + (K - 1) * L) * in;
            float *before = state + b * (K - 1) * E + e;
            for (I j = 0; j < K - 1; j++) {
                vec v = load(before + j * E, n);
                out += load(tap + j * L) * v;
                if (j)
                    store(before + (j - 1) * E, v, n);
            }
            if (K > 1)
                store(before + (K - 2) * E, in, n);
            store(y + b * E + e, out * sigmoid(out), n);
        }
    }
}

// h (P, N) of a head = decay h + (dt u) B; y (P) = h C + D u, in one pass over h. Bs, Cs (N), for
// bf16 `even_first`; P and N are multiples of L
template <class T>
static inline void head_step(I P, I N, float dt, float decay, float D, const float *u,
                             const float *Bs, const float *Cs, T *h, float *y) {
    decay = sound(decay);
    for (I p = 0; p < P; p += L) {
        vec s[L];
        for (int l = 0; l < L; l++) {
            T *state = h + (p + l) * N;
            float in = sound(dt * u[p + l]);
            vec even{}, odd{}, rest{};
            I n = 0;
            for (; n + 2 * L <= N; n += 2 * L) {
                for (I i = 0; i < 2 * L; i += 64 / sizeof(T))
                    __builtin_prefetch((char *)(state + n + i) + AHEAD, 1, 2);
                vec a, b;
                get(state + n, a, b);
                a = a * decay + as<vec>(Bs + n) * in;
                b = b * decay + as<vec>(Bs + n + L) * in;
                put(state + n, a, b);
                even += a * as<vec>(Cs + n);
                odd += b * as<vec>(Cs + n + L);
            }
            if (n < N) {
                rest = load(state + n) * decay + load(Bs + n) * in;
                store(state + n, rest);
                rest *= load(Cs + n);
            }
            s[l] = even + odd + rest;
        }
        vec out = sums(s) + as<vec>(u + p) * D;
        memcpy(y + p, &out, sizeof out);
    }
}

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

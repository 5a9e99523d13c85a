// Attention of one token of each sequence to the keys and values before it.
//
// A cache is cut into blocks of so many slots, whatever the number of threads. A block is read once,
// in the order of memory, for all query heads of its key head, and gives partial sums; those of a
// head are put together in order. So few sequences, too, keep all threads busy, and the numbers are
// the same with any.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "matrices.h"
#include "threads.h"

constexpr I KEYS = 256;  // of a block

template <class T>
static inline void copy(I n, const float *from, T *to) {  // n: a multiple of L
    for (I i = 0; i < n; i += L)
        store(to + i, load(from + i));
}

// --- attention

// s[j] = scale * q . K[j] of L keys K (L, P); from the n-th on -infinity, and not read
template <bool whole, class T>
static inline void scores(I n, I P, float scale, const float *q, const T *K, float *s) {
    vec dots[L]{};
#pragma GCC unroll 16
    for (int l = 0; l < L; l++) {
        const T *key = K + (whole ? l : std::min<I>(l, n - 1)) * P;
        for (I p = 0; p < P; p += L)
            dots[l] += as<vec>(q + p) * load(key + p);
    }
    vec v = sums(dots) * scale;
    memcpy(s, &v, sizeof v);
    for (int l = n; !whole && l < L; l++)
        s[l] = -INFINITY;
}

// y[p] = the sum of w[j] * V[j][p], j < n, of W * L columns; V (n, P)
template <int W, class T>
static inline void weigh(I n, I P, const float *w, const T *V, float *y) {
    vec s[W]{};
    for (I j = 0; j < n; j++)
#pragma GCC unroll 8
        for (int i = 0; i < W; i++)
            s[i] += w[j] * load(V + j * P + i * L);
    memcpy(y, s, sizeof s);
}

// What a head has of a block: the largest score, the sum of exp(score - largest), and that of the
// values, y (P)
struct Partial {
    float most, total;
    float *y;
};

// q (R, P) by the n keys and values of a block, each (n, P); s: room for R of KEYS
template <class T>
static void attend_to_block(I R, I n, I P, const float *q, const T *K, const T *V, float *s,
                            Partial *partials, I step) {
    float scale = 1 / std::sqrt((float)P);
    for (I j = 0; j < up(n, L); j += L) {
        for (I r = 0; r < R; r++)
            (n - j < L ? scores<false, T> : scores<true, T>)(n - j, P, scale, q + r * P,
                                                                 K + j * P, s + r * KEYS + j);
        for (I i = j * P; i < std::min(n, j + L) * P; i += 64 / sizeof(T))
            __builtin_prefetch(V + i, 0, 2);
    }
    for (I r = 0; r < R; r++, s += KEYS, partials += step) {
        vec top = all(-INFINITY), total{};
        for (I j = 0; j < n; j += L)
            top = max(load(s + j), top);
        float most = top[0];
        for (int l = 1; l < L; l++)
            most = std::max(most, top[l]);
        for (I j = 0; j < n; j += L) {
            vec w = expv(load(s + j) - most);
            store(s + j, w);
            total += w;
        }
        I p = 0;
        for (; p + 4 * L <= P; p += 4 * L)
            weigh<4>(n, P, s, V + p, partials->y + p);
        for (; p < P; p += L)
            weigh<1>(n, P, s, V + p, partials->y + p);
        partials->most = most;
        partials->total = sum(total);
    }
}

// y (P) = a head's partial sums of n blocks, put together
static void combine(I n, I P, const Partial *partials, float *y) {
    float most = -INFINITY, total = 0;
    for (I i = 0; i < n; i++)
        most = std::max(most, partials[i].most);
    for (I p = 0; p < P; p += L)
        store(y + p, vec{});
    for (I i = 0; i < n; i++) {
        float share = std::exp(partials[i].most - most);
        total += share * partials[i].total;
        for (I p = 0; p < P; p += L)
            add(y + p, load(partials[i].y + p) * share);
    }
    for (I p = 0; p < P; p += L)
        store(y + p, load(y + p) * (1 / total));
}

// y (B, H, P) of queries q (B, H, P), when the caches (B, G, S, P) have got keys k and values v (B,
// G, P) of positions pos; slots 0 to pos, or all of a ring, are attended to. P is a multiple of L
template <class T>
static void attend(I threads, I B, I H, I G, I P, I S, const I *pos, const float *q, const float *k,
                   const float *v, T *keys, T *values, float *y) {
    I R = H / G;
    I longest = std::min(*std::max_element(pos, pos + B) + 1, S);
    I blocks = up(longest, KEYS) / KEYS;
    std::unique_ptr<float[]> room(new float[B * H * blocks * P]);
    std::vector<Partial> partials(B * H * blocks);
    for (I i = 0; i < B * H * blocks; i++)
        partials[i].y = &room[i * P];
    parallel(B * H * longest * P < 200000 ? 1 : threads, B * G * blocks, [&](I lo, I hi) {
        Flush flush;
        std::vector<float> s(R * KEYS);
        for (I u = lo; u < hi; u++) {
            I i = u / blocks;  // b G + g
            I b = i / G;
            I first = u % blocks * KEYS;
            I n = std::min(std::min(pos[b] + 1, S) - first, KEYS);
            if (n <= 0)
                continue;
            I slot = pos[b] % S - first;
            T *K = keys + (i * S + first) * P;
            T *V = values + (i * S + first) * P;
            if (0 <= slot && slot < n) {
                copy(P, k + i * P, K + slot * P);
                copy(P, v + i * P, V + slot * P);
            }
            Partial *own = &partials[i * R * blocks + u % blocks];
            attend_to_block<T>(R, n, P, q + i * R * P, K, V, s.data(), own, blocks);
        }
    });
    Flush flush;
    for (I h = 0; h < B * H; h++) {
        I n = up(std::min(pos[h / H] + 1, S), KEYS) / KEYS;
        combine(n, P, &partials[h * blocks], y + h * P);
    }
}

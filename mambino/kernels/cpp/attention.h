// Attention, causal, with or without a window, in blocks of BLOCK queries by BLOCK keys with a
// running softmax (Dao et al. 2022), so that no (T, T) matrix exists; blocks that a window hides
// are never looked at. Items are key heads, all sequences' in one row.
#pragma once
#include <algorithm>
#include <vector>

#include "products.h"

constexpr I BLOCK = 64;

struct Heads {
    I T, H, G, P, window;
    const float *q, *k, *v;
    I sq, sk;
    float scale, drop;
    uint32_t seed;
};

// 1 / (1 - drop) where dropout leaves the weight of key j for query i, else 0
static inline vec kept(const Heads &m, I head, I i, I j) {
    typedef uint32_t uvec __attribute__((vector_size(4 * L)));
    uvec x = (uvec)(LANE + (int32_t)j) * 0x9e3779b1u + (uint32_t)i * 0x85ebca77u +
             ((uint32_t)head * 0xc2b2ae3du ^ m.seed);
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;  // a mixing function of Wellons
    return __builtin_convertvector((ivec)(x >> 8), vec) < m.drop * 16777216.f
               ? vec{}
               : all(1 / (1 - m.drop));
}

// exp(scale q k - less) of a block where it is visible, else 0. less: a number a row
static void weights(const Heads &m, I i0, I j0, I rows, I keys, float *s, const float *less) {
    bool visible = keys == BLOCK && j0 + BLOCK <= i0 + 1 &&
                   (!m.window || j0 > i0 + rows - 1 - m.window);
    for (I i = 0; i < rows; i++) {
        for (I j = 0; j < BLOCK; j += L) {
            vec w = expv(load(s + i * BLOCK + j) * m.scale - less[i]);
            ivec key = LANE + (int)(j0 + j);
            if (!visible) {
                w = key <= (int)(i0 + i) ? w : vec{};
                if (m.window)
                    w = key > (int)(i0 + i - m.window) ? w : vec{};
            }
            store(s + i * BLOCK + j, w);
        }
    }
}

API attention_forward(I lo, I hi, I thread, I T, I H, I G, I P, I window, const float *q,
                      const float *k, const float *v, I sq, I sk, float scale, float drop, I seed,
                      float *kT, float *y, float *lse) {
    Flush flush;
    Heads m{T, H, G, P, window, q, k, v, sq, sk, scale, drop, (uint32_t)seed};
    I R = H / G, blocks = up(T, BLOCK) / BLOCK;
    kT += thread * blocks * P * BLOCK;
    std::vector<float> s(BLOCK * BLOCK), out(BLOCK * P), top(BLOCK), less(BLOCK), total(BLOCK);
    for (I item = lo; item < hi; item++) {
        I b = item / G, g = item % G;
        const float *keys = k + b * T * sk + g * P;
        const float *values = v + b * T * sk + g * P;
        for (I c = 0; c < blocks; c++) {
            transpose(&kT[c * P * BLOCK], BLOCK, keys + c * BLOCK * sk, sk,
                      std::min(BLOCK, T - c * BLOCK), P, BLOCK);
        }
        for (I h = g * R; h < (g + 1) * R; h++) {
            for (I c = 0; c < blocks; c++) {
                I i0 = c * BLOCK;
                I rows = std::min(BLOCK, T - i0);
                I begin = window ? std::max<I>(0, i0 - window + 1) / BLOCK : 0;
                for (I i = 0; i < BLOCK; i++) {
                    top[i] = -INFINITY;
                    total[i] = 0;
                }
                memset(out.data(), 0, 4 * BLOCK * P);
                for (I d = begin; d <= c; d++) {
                    I j0 = d * BLOCK, n = std::min(BLOCK, T - j0);
                    gemm(rows, BLOCK, P, s.data(), BLOCK, q + (b * T + i0) * sq + h * P, sq, 1,
                         &kT[d * P * BLOCK], BLOCK);
                    for (I i = 0; i < rows; i++) {
                        I from = window ? std::max<I>(0, i0 + i - window + 1 - j0) : 0;
                        I to = std::min(n, i0 + i - j0 + 1);
                        if (from >= to)
                            continue;
                        vec most = all(-INFINITY);
                        for (I j = from / L * L; j < to; j += L) {
                            ivec key = LANE + (int)j;
                            vec w = load(&s[i * BLOCK + j]);
                            w = key < (int)to ? w : all(-INFINITY);
                            w = key >= (int)from ? w : all(-INFINITY);
                            most = max(w, most);
                        }
                        float now = top[i];
                        for (int l = 0; l < L; l++)
                            now = most[l] * scale > now ? most[l] * scale : now;
                        if (now > top[i]) {
                            float shrink = std::exp(top[i] - now);
                            for (I p = 0; p < P; p += L)
                                store(&out[i * P + p], load(&out[i * P + p]) * shrink);
                            total[i] *= shrink;
                            top[i] = now;
                        }
                    }
                    for (I i = 0; i < rows; i++) {
                        less[i] = top[i] == -INFINITY
                                      ? 0
                                      : top[i];  // of a row that has seen no key yet
                    }
                    weights(m, i0, j0, rows, n, s.data(), less.data());
                    for (I i = 0; i < rows; i++) {
                        vec t{};
                        for (I j = 0; j < BLOCK; j += L) {
                            vec w = load(&s[i * BLOCK + j]);
                            t += w;
                            if (drop > 0)
                                store(&s[i * BLOCK + j], w * kept(m, b * H + h, i0 + i, j0 + j));
                        }
                        total[i] += sum(t);
                    }
                    gemm(rows, P, n, out.data(), P, s.data(), BLOCK, 1, values + j0 * sk, sk, true);
                }
                for (I i = 0; i < rows; i++) {
                    lse[(b * H + h) * T + i0 + i] = top[i] + std::log(total[i]);
                    for (I p = 0; p < P; p += L) {
                        store(y + (b * T + i0 + i) * H * P + h * P + p,
                              load(&out[i * P + p]) * (1 / total[i]));
                    }
                }
            }
        }
    }
}

// gq (B, T, H, P), gk and gv (B, T, G, P) start as zeros
API attention_backward(I lo, I hi, I, I T, I H, I G, I P, I window, const float *q, const float *k,
                       const float *v, I sq, I sk, float scale, float drop, I seed, const float *y,
                       const float *lse, const float *gy, float *gq, float *gk, float *gv) {
    Flush flush;
    Heads m{T, H, G, P, window, q, k, v, sq, sk, scale, drop, (uint32_t)seed};
    I R = H / G, blocks = up(T, BLOCK) / BLOCK;
    std::vector<float> kT(P * BLOCK), vT(P * BLOCK), s(BLOCK * BLOCK), d(BLOCK * BLOCK), dot(T);
    for (I item = lo; item < hi; item++) {
        for (I h = item % G * R; h < (item % G + 1) * R; h++) {
            I b = item / G, g = item % G;
            const float *less = lse + (b * H + h) * T;
            for (I i = 0; i < T; i++) {
                vec t{};
                for (I p = 0; p < P; p += L) {
                    t += load(y + ((b * T + i) * H + h) * P + p) *
                         load(gy + ((b * T + i) * H + h) * P + p);
                }
                dot[i] = sum(t);
            }
            for (I c = 0; c < blocks; c++) {
                I j0 = c * BLOCK;
                I n = std::min(BLOCK, T - j0);
                I end = window ? std::min(blocks, (j0 + n - 1 + window - 1) / BLOCK + 1) : blocks;
                const float *keys = k + (b * T + j0) * sk + g * P;
                transpose(kT.data(), BLOCK, keys, sk, n, P, BLOCK);
                transpose(vT.data(), BLOCK, v + (b * T + j0) * sk + g * P, sk, n, P, BLOCK);
                for (I e = c; e < end; e++) {
                    I i0 = e * BLOCK, rows = std::min(BLOCK, T - i0);
                    const float *queries = q + (b * T + i0) * sq + h * P;
                    const float *grad = gy + ((b * T + i0) * H + h) * P;
                    gemm(rows, BLOCK, P, s.data(), BLOCK, queries, sq, 1, kT.data(), BLOCK);
                    weights(m, i0, j0, rows, n, s.data(), less + i0);
                    gemm(rows, BLOCK, P, d.data(), BLOCK, grad, H * P, 1, vT.data(), BLOCK);
                    for (I i = 0; i < rows; i++) {
                        for (I j = 0; j < BLOCK; j += L) {
                            vec w = load(&s[i * BLOCK + j]), t = load(&d[i * BLOCK + j]);
                            if (drop > 0) {
                                vec keep = kept(m, b * H + h, i0 + i, j0 + j);
                                t *= keep;
                                store(&s[i * BLOCK + j], w * keep);
                            }
                            store(&d[i * BLOCK + j], w * (t - dot[i0 + i]) * scale);
                        }
                    }
                    gemm(n, P, rows, gv + ((b * T + j0) * G + g) * P, G * P, s.data(), 1, BLOCK,
                         grad, H * P, true);
                    gemm(n, P, rows, gk + ((b * T + j0) * G + g) * P, G * P, d.data(), 1, BLOCK,
                         queries, sq, true);
                    gemm(rows, P, n, gq + ((b * T + i0) * H + h) * P, H * P, d.data(), BLOCK, 1,
                         keys, sk, true);
                }
            }
        }
    }
}

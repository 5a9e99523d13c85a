// Attention, causal, with or without a window, or as a table says, in blocks of BLOCK queries by
// BLOCK keys with a running softmax (Dao et al. 2022), so that no (T, T) matrix exists; blocks that
// a window or the table hides are never looked at. Items are key heads, all sequences' in one row.
//
// q, k, v, y and their gradients are numbers T: fp32, or bf16 where the processor multiplies pairs
// of them; weights, then, are rounded for the products. Softmax and sums are fp32.
#pragma once
#include <algorithm>
#include <vector>

#include "products.h"

constexpr I BLOCK = 64;

struct Heads {
    I T, S, H, G, P, window;
    float scale, drop;
    uint32_t seed;
    // what queries see, 1 or 0, (…, T, S up to a multiple of BLOCK); its blocks, NONE, SOME or ALL;
    // each table is that of so many sequences. Null: what is causal
    const float *seen;
    const I *kinds;
    I share;

    I key_blocks() const { return up(S, BLOCK) / BLOCK; }
    const float *seen_from(I b, I i, I j) const {
        return seen ? seen + (b / share * T + i) * key_blocks() * BLOCK + j : nullptr;
    }
    I kind(I b, I c, I d) const {
        return kinds[(b / share * (up(T, BLOCK) / BLOCK) + c) * key_blocks() + d];
    }
};

enum Kind { NONE, SOME, ALL };

// rows (m, n), s apart, as `stacked` has them; `s` of what is returned is in units
template <class unit>
struct Rows {
    const unit *at;
    I s;

    const unit *from(I row) const { return at + row / PER<unit> * s; }
};

static inline Rows<float> rows_of(float *, const float *rows, I s, I, I) { return {rows, s}; }

static inline Rows<pair> rows_of(pair *room, const bf16 *rows, I s, I m, I n) {
    stack(room, rows, s, m, n);
    return {room, n};
}

template <class unit, class T>
static inline const unit *units(const T *numbers) {
    return (const unit *)numbers;
}

// 1 / (1 - drop) where dropout leaves the weight of key j for query i, else 0
static inline vec kept(const Heads &m, I head, I i, I j) {
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

// exp(scale q k - less) of row i of a block where it is visible, else 0
struct Weights {
    const Heads &m;
    I b, i0, j0, rows, keys;
    const float *seen = m.seen_from(b, i0, j0);
    bool visible = seen ? m.kind(b, i0 / BLOCK, j0 / BLOCK) == ALL
                        : keys == BLOCK && j0 + BLOCK <= i0 + 1 &&
                              (!m.window || j0 > i0 + rows - 1 - m.window);

    // those of row i that see, of L scores from key j
    vec shown(I i, I j, vec scores, vec hidden) const {
        return load(seen + i * m.key_blocks() * BLOCK + j) > 0.f ? scores : hidden;
    }

    vec operator()(I i, I j, vec score, float less) const {
        vec w = expv(score * m.scale - less);
        if (seen)
            return visible ? w : shown(i, j, w, vec{});
        if (!visible) {
            ivec key = LANE + (int)(j0 + j);
            w = key <= (int)(i0 + i) ? w : vec{};
            if (m.window)
                w = key > (int)(i0 + i - m.window) ? w : vec{};
        }
        return w;
    }
};

template <class T, class unit = typename Operands<T>::unit>
static void attend(I lo, I hi, const Heads &m, const T *q, const T *k, const T *v, T *y,
                   float *lse) {
    Flush flush;
    I H = m.H, G = m.G, P = m.P, N = m.T;
    I R = H / G;
    I blocks = up(N, BLOCK) / BLOCK, key_blocks = m.key_blocks();
    I sq = H * P, sk = G * P;
    I width = P / PER<unit>;
    std::vector<unit> kT(key_blocks * BLOCK * width);
    std::vector<unit> room(PER<unit> == 2 ? key_blocks * BLOCK / 2 * P : 0);
    std::vector<float> s(BLOCK * BLOCK), out(BLOCK * P), top(BLOCK), total(BLOCK);
    std::vector<T> w(BLOCK * BLOCK);
    for (I item = lo; item < hi; item++) {
        I b = item / G;
        I g = item % G;
        const T *keys = k + b * m.S * sk + g * P;
        for (I d = 0; d < key_blocks; d++) {
            transpose(&kT[d * width * BLOCK], BLOCK, units<unit>(keys + d * BLOCK * sk),
                      sk / PER<unit>, std::min(BLOCK, m.S - d * BLOCK), width, BLOCK);
        }
        auto values = rows_of(room.data(), v + b * m.S * sk + g * P, sk, m.S, P);
        for (I h = g * R; h < (g + 1) * R; h++) {
            for (I c = 0; c < blocks; c++) {
                I i0 = c * BLOCK;
                I rows = std::min(BLOCK, N - i0);
                I begin = m.window ? std::max<I>(0, i0 - m.window + 1) / BLOCK : 0;
                for (I i = 0; i < BLOCK; i++) {
                    top[i] = -INFINITY;
                    total[i] = 0;
                }
                memset(out.data(), 0, 4 * BLOCK * P);
                for (I d = begin; d < (m.seen ? key_blocks : c + 1); d++) {
                    if (m.seen && m.kind(b, c, d) == NONE)
                        continue;
                    bool diagonal = !m.seen && d == c;
                    I j0 = d * BLOCK;
                    I n = std::min(BLOCK, m.S - j0);
                    const T *queries = q + (b * N + i0) * sq + h * P;
                    gemm(rows, BLOCK, P, s.data(), BLOCK, units<unit>(queries), sq / PER<unit>, 1,
                         &kT[d * width * BLOCK], BLOCK, 0, diagonal ? CAUSAL : FULL);
                    Weights weight{m, b, i0, j0, rows, n};
                    for (I i = 0; i < rows; i++) {
                        I from = m.window ? std::max<I>(0, i0 + i - m.window + 1 - j0) : 0;
                        I to = m.seen ? n : std::min(n, i0 + i - j0 + 1);
                        vec most = all(-INFINITY);
                        for (I j = from / L * L; j < to; j += L) {
                            vec u = load(&s[i * BLOCK + j]);
                            if (m.seen && !weight.visible) {
                                u = weight.shown(i, j, u, all(-INFINITY));
                            } else if (j < from || j + L > to) {
                                ivec key = LANE + (int)j;
                                u = key < (int)to ? u : all(-INFINITY);
                                u = key >= (int)from ? u : all(-INFINITY);
                            }
                            most = max(u, most);
                        }
                        float now = std::max(top[i], largest(most) * m.scale);
                        if (now > top[i]) {
                            float shrink = std::exp(top[i] - now);
                            for (I p = 0; p < P; p += L)
                                store(&out[i * P + p], load(&out[i * P + p]) * shrink);
                            total[i] *= shrink;
                            top[i] = now;
                        }
                        float less = now == -INFINITY ? 0 : now;  // a row that has seen no key yet
                        vec t{};
                        for (I j = 0; j < BLOCK; j += L) {
                            vec u = weight(i, j, load(&s[i * BLOCK + j]), less);
                            t += u;
                            if (m.drop > 0)
                                u *= kept(m, b * H + h, i0 + i, j0 + j);
                            store(&w[i * BLOCK + j], u);
                        }
                        total[i] += sum(t);
                    }
                    gemm(rows, P, n, out.data(), P, units<unit>(w.data()), BLOCK / PER<unit>, 1,
                         values.from(j0), values.s, 1, diagonal ? LOWER : FULL);
                }
                for (I i = 0; i < rows; i++) {
                    lse[(b * H + h) * N + i0 + i] = top[i] + std::log(total[i]);
                    for (I p = 0; p < P; p += L) {
                        store(y + (b * N + i0 + i) * sq + h * P + p,
                              load(&out[i * P + p]) * (1 / total[i]));
                    }
                }
            }
        }
    }
}

template <class T, class unit = typename Operands<T>::unit>
static void attend_grad(I lo, I hi, const Heads &m, const T *q, const T *k, const T *v, const T *y,
                        const float *lse, const T *gy, T *gq, T *gk, T *gv) {
    Flush flush;
    I H = m.H, G = m.G, P = m.P, N = m.T;
    I R = H / G;
    I blocks = up(N, BLOCK) / BLOCK, key_blocks = m.key_blocks();
    I sq = H * P, sk = G * P;
    I width = P / PER<unit>;
    I stack_size = PER<unit> == 2 ? up(N, 2) / 2 * P : 0;
    std::vector<unit> kT(BLOCK * width), vT(BLOCK * width);
    std::vector<unit> key_room(BLOCK * P), w_room(BLOCK * BLOCK);
    std::vector<unit> query_room(stack_size), grad_room(stack_size);
    std::vector<float> s(BLOCK * BLOCK), d(BLOCK * BLOCK), dot(N);
    std::vector<float> gqs(N * P), gks(m.S * P), gvs(m.S * P);
    std::vector<T> w(BLOCK * BLOCK), dw(BLOCK * BLOCK);
    auto gather = [&](T *to, I stride, const std::vector<float> &from) {
        for (I i = 0; i < (I)from.size() / P; i++)
            for (I p = 0; p < P; p += L)
                store(to + i * stride + p, load(&from[i * P + p]));
    };
    for (I item = lo; item < hi; item++) {
        I b = item / G;
        I g = item % G;
        std::fill(gks.begin(), gks.end(), 0.f);
        std::fill(gvs.begin(), gvs.end(), 0.f);
        for (I h = g * R; h < (g + 1) * R; h++) {
            const float *less = lse + (b * H + h) * N;
            const T *queries = q + b * N * sq + h * P;
            const T *grads = gy + b * N * sq + h * P;
            auto stacked_queries = rows_of(query_room.data(), queries, sq, N, P);
            auto stacked_grads = rows_of(grad_room.data(), grads, sq, N, P);
            std::fill(gqs.begin(), gqs.end(), 0.f);
            for (I i = 0; i < N; i++) {
                vec t{};
                for (I p = 0; p < P; p += L)
                    t += load(y + (b * N + i) * sq + h * P + p) * load(grads + i * sq + p);
                dot[i] = sum(t);
            }
            for (I c = 0; c < key_blocks; c++) {
                I j0 = c * BLOCK;
                I n = std::min(BLOCK, m.S - j0);
                I end = blocks;
                if (m.window)
                    end = std::min(blocks, (j0 + n - 1 + m.window - 1) / BLOCK + 1);
                const T *keys = k + (b * m.S + j0) * sk + g * P;
                const T *values = v + (b * m.S + j0) * sk + g * P;
                transpose(kT.data(), BLOCK, units<unit>(keys), sk / PER<unit>, n, width, BLOCK);
                transpose(vT.data(), BLOCK, units<unit>(values), sk / PER<unit>, n, width, BLOCK);
                auto stacked_keys = rows_of(key_room.data(), keys, sk, n, P);
                for (I e = m.seen ? 0 : c; e < end; e++) {
                    if (m.seen && m.kind(b, e, c) == NONE)
                        continue;
                    I i0 = e * BLOCK;
                    I rows = std::min(BLOCK, N - i0);
                    bool diagonal = !m.seen && e == c;
                    gemm(rows, BLOCK, P, s.data(), BLOCK, units<unit>(queries + i0 * sq),
                         sq / PER<unit>, 1, kT.data(), BLOCK, 0, diagonal ? CAUSAL : FULL);
                    gemm(rows, BLOCK, P, d.data(), BLOCK, units<unit>(grads + i0 * sq),
                         sq / PER<unit>, 1, vT.data(), BLOCK, 0, diagonal ? CAUSAL : FULL);
                    Weights weight{m, b, i0, j0, rows, n};
                    for (I i = 0; i < rows; i++) {
                        for (I j = 0; j < BLOCK; j += L) {
                            vec u = weight(i, j, load(&s[i * BLOCK + j]), less[i0 + i]);
                            vec t = load(&d[i * BLOCK + j]);
                            t = u == 0.f ? vec{} : t;  // what is not visible was not computed
                            vec kept_u = u;
                            if (m.drop > 0) {
                                vec keep = kept(m, b * H + h, i0 + i, j0 + j);
                                t *= keep;
                                kept_u *= keep;
                            }
                            store(&w[i * BLOCK + j], kept_u);
                            store(&dw[i * BLOCK + j], u * (t - dot[i0 + i]) * m.scale);
                        }
                    }
                    Part turned = diagonal ? UPPER : FULL;
                    auto w_rows = rows_of(w_room.data(), w.data(), BLOCK, rows, BLOCK);
                    gemm(n, P, rows, &gvs[j0 * P], P, w_rows.at, 1, BLOCK,
                         stacked_grads.from(i0), stacked_grads.s, 1, turned);
                    w_rows = rows_of(w_room.data(), dw.data(), BLOCK, rows, BLOCK);
                    gemm(n, P, rows, &gks[j0 * P], P, w_rows.at, 1, BLOCK,
                         stacked_queries.from(i0), stacked_queries.s, 1, turned);
                    gemm(rows, P, n, &gqs[i0 * P], P, units<unit>(dw.data()), BLOCK / PER<unit>, 1,
                         stacked_keys.at, stacked_keys.s, 1, diagonal ? LOWER : FULL);
                }
            }
            gather(gq + b * N * sq + h * P, sq, gqs);
        }
        gather(gk + b * m.S * sk + g * P, sk, gks);
        gather(gv + b * m.S * sk + g * P, sk, gvs);
    }
}

#define ATTENTION(kind, X)                                                                       \
    API attention_forward##kind(I lo, I hi, I, I T, I S, I H, I G, I P, I window, float scale,   \
                                float drop, I seed, const float *seen, const I *kinds, I share,  \
                                const X *q, const X *k, const X *v, X *y, float *lse) {          \
        Heads m{T, S, H, G, P, window, scale, drop, (uint32_t)seed, seen, kinds, share};         \
        attend(lo, hi, m, q, k, v, y, lse);                                                      \
    }                                                                                            \
    API attention_backward##kind(I lo, I hi, I, I T, I S, I H, I G, I P, I window, float scale,  \
                                 float drop, I seed, const float *seen, const I *kinds, I share, \
                                 const X *q, const X *k, const X *v, const X *y,                 \
                                 const float *lse, const X *gy, X *gq, X *gk, X *gv) {           \
        Heads m{T, S, H, G, P, window, scale, drop, (uint32_t)seed, seen, kinds, share};         \
        attend_grad(lo, hi, m, q, k, v, y, lse, gy, gq, gk, gv);                                 \
    }
ATTENTION(, float)

#ifdef __AVX512BF16__
ATTENTION(_bf16, bf16)
#endif

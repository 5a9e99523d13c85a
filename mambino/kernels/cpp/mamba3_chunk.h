// Mamba-3: what both passes need of a chunk, for one head. Its rows are tokens' columns of B and C, R of
// each token; N's channels lie so that those turned together are half of N apart.
//
// s = sums of log-decays in a chunk; W[i][j] = q_i k_j exp(s_i - s_j), j of an earlier token than i
#pragma once
#include <algorithm>

#include "products.h"

struct Mamba3 {  // a task: x has rows of (H, P), sx apart; B, C (R, G, N), the rest (H), rate (A)
    I T, R, H, G, P, N, A, tokens, parts;  // `tokens` of a chunk; a group's heads are `parts` items
    I interleaved;                         // which channels are turned together: 2i, 2i + 1
    const void *x;
    I sx;
    const void *B, *C;
    const float *a, *s, *gamma, *dt, *rate;  // log-decay, weights of a token's input: later, and now
    const float *B_bias, *C_bias, *D, *mimo;  // (H, R, N) twice, (H), (H, R, P) or null

    I heads() const { return H / G / parts; }
    I chunks() const { return (T + tokens - 1) / tokens; }
    I rows() const { return up(tokens * R, 32); }  // of a chunk, and what completes vectors of them
    I angles() const { return up(A, L); }

    // where a channel, counted as they lie here, stands in a row of N
    I place(I n) const { return interleaved ? n % (N / 2) * 2 + n / (N / 2) : n; }

    template <class X>
    void take(float *to, const X *row) const {
        for (I n = 0; n < N / 2; n++) {
            to[n] = value(row[interleaved ? 2 * n : n]);
            to[N / 2 + n] = value(row[interleaved ? 2 * n + 1 : N / 2 + n]);
        }
    }

    void give(float *row, const float *from) const {
        for (I n = 0; n < N / 2; n++) {
            row[interleaved ? 2 * n : n] = from[n];
            row[interleaved ? 2 * n + 1 : N / 2 + n] = from[N / 2 + n];
        }
    }

    // the states of a sequence's heads from `first`, or their gradients, (P, N) each, as (N, P);
    // zeros where there are none
    void take_states(I b, I first, const float *from, float *to) const {
        std::vector<float> turned(N * P);
        for (I i = 0; i < heads(); i++) {
            float *state = to + i * N * P;
            if (!from) {
                std::fill_n(state, N * P, 0.f);
                continue;
            }
            transpose(turned.data(), P, from + (b * H + first + i) * N * P, N, P, N, P);
            for (I n = 0; n < N; n++)
                memcpy(state + n * P, &turned[place(n) * P], P * sizeof(float));
        }
    }

    void give_states(I b, I first, const float *from, float *to) const {
        std::vector<float> turned(N * P);
        for (I i = 0; i < heads(); i++) {
            for (I n = 0; n < N; n++)
                memcpy(&turned[place(n) * P], from + (i * N + n) * P, P * sizeof(float));
            transpose(to + (b * H + first + i) * N * P, N, turned.data(), P, N, P, N);
        }
    }

    // the biases of heads from `first`, (R, N) each
    void take_biases(I first, float *of_B, float *of_C) const {
        for (I i = 0; i < heads() * R; i++) {
            take(of_B + i * N, B_bias + (first * R + i) * N);
            take(of_C + i * N, C_bias + (first * R + i) * N);
        }
    }
};

template <class T>
struct Turned : Decays {
    typedef typename Operands<T>::number number;
    typedef typename Operands<T>::unit unit;
    const Mamba3 &m;
    I R, P, N, A, Q, tokens, q;  // tokens of this chunk, and its rows
    std::vector<float> B, C, cosine, sine, S, decay, X;
    std::vector<number> k, qs, W, xs, xe;
    std::vector<unit> kT, kroom, room;
    const unit *stacked_k;

    explicit Turned(const Mamba3 &m)
        : Decays(m.rows()), m(m), R(m.R), P(m.P), N(m.N), A(m.angles()), Q(m.rows()), B(Q * N), C(Q * N),
          cosine(Q * A), sine(Q * A), S(Q * Q), decay(Q * Q), X(Q * P), k(Q * N), qs(Q * N), W(Q * Q),
          xs(Q * P), xe(Q * P), kT(N * Q), kroom(Q * N), room(std::max(Q, N) * P) {}

    static const unit *units(const std::vector<number> &rows) { return (const unit *)rows.data(); }

    I own(I i) const { return i / R * R; }  // the first row of row i's token

    void group(I count, I token, I g) {
        tokens = count;
        q = count * R;
        for (I i = 0; i < q; i++) {
            I row = ((token * R + i) * m.G + g) * N;
            m.take(&B[i * N], (const T *)m.B + row);
            m.take(&C[i * N], (const T *)m.C + row);
        }
    }

    // adds up the turns of a head's tokens, mod 2 pi
    void turn(double *turns, I token, I e) {
        for (I t = 0; t < tokens; t++) {
            double dt = m.dt[(token + t) * m.H + e];
            for (I a = 0; a < A; a += L) {
                float angles[L];
                store(angles, load(m.rate + (token + t) * m.A + a, std::min<I>(L, m.A - a)));
                for (I l = 0; l < L; l += L / 2) {
                    dvec sum = load(turns + a + l) + wide(angles + l) * dt;
                    sum -= rounded(sum * (1 / TAU)) * TAU;
                    store(turns + a + l, sum);
                    narrow(angles + l, sum);
                }
                vec sin, cos;
                sincos(load(angles), sin, cos);
                store(&sine[t * A + a], sin);
                store(&cosine[t * A + a], cos);
            }
        }
    }

    void rotate(number *to, const float *rows, const float *bias) const {
        I half = N / 2;
        for (I i = 0; i < q; i++) {
            const float *c = &cosine[i / R * A], *s = &sine[i / R * A];
            const float *first = rows + i * N, *more = bias + i % R * N;
            for (I n = 0; n < half; n += L) {
                vec u = load(first + n) + load(more + n);
                vec v = load(first + half + n) + load(more + half + n);
                if (n < A) {
                    vec w = u;
                    u = w * load(c + n) - v * load(s + n);
                    v = w * load(s + n) + v * load(c + n);
                }
                store(to + i * N + n, u);
                store(to + i * N + half + n, v);
            }
        }
    }

    // turns: those before the chunk, and after it
    void head(I token, I e, double *turns, const float *bias_B, const float *bias_C) {
        I K = N / PER<unit>;
        turn(turns, token, e);
        rotate(k.data(), B.data(), bias_B);
        rotate(qs.data(), C.data(), bias_C);
        stacked_k = stacked(kroom, k.data(), q, N);
        transpose(kT.data(), Q, units(k), K, q, K, Q);
        gemm(q, Q, N, S.data(), Q, units(qs), K, 1, kT.data(), Q, 0, L % R ? FULL : CAUSAL);
        double total = 0;
        for (I i = 0; i < q; i++) {
            if (i % R == 0)
                total += m.a[(token + i / R) * m.H + e];
            s[i] = total;
        }
        add_up(q);
        each(q, [&](I i, I j, vec d) {  // exp(s_i - s_j) and W; from the own token on both stay 0
            d = earlier(i, j, d);
            store(&decay[i * Q + j], d);
            store(&W[i * Q + j], d * load(&S[i * Q + j]));
        });
        inputs(token, e);
    }

    void inputs(I token, I e) {
        const T *x = (const T *)m.x + token * m.sx + e * P;
        for (I i = 0; i < q; i++) {
            I t = i / R;
            float s = m.s[(token + t) * m.H + e];
            const float *mimo = m.mimo ? m.mimo + (e * R + i % R) * P : nullptr;
            prefetch(x + t * m.sx + P, P);  // the next head's
            for (I p = 0; p < P; p += L) {
                vec v = load(x + t * m.sx + p);
                if (mimo)
                    v *= load(mimo + p);
                store(&X[i * P + p], v);
                store(&xs[i * P + p], v * s);
                store(&xe[i * P + p], v * s * to_end[i]);
            }
        }
    }

    vec earlier(I i, I j, vec d) const { return LANE + (int)j < (int)own(i) ? d : vec{}; }
};

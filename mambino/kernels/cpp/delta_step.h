// One token of each of a few sequences through a layer of the gated delta rule.
#pragma once
#include "elementwise.h"
#include "matrices.h"
#include "states.h"

// h (P, N) of a head: what it answers to k, decayed, goes by beta towards v; y (P) = h q, in one pass over h. k, q
// (N), of length 1 and 1 / sqrt(N), for bf16 `even_first`; P and N are multiples of L
template <class T>
static inline void delta_head(I P, I N, float decay, float beta, const float *v, const float *k,
                              const float *q, T *h, float *y) {
    vec same{};
    for (I n = 0; n < N; n += L)
        same += as<vec>(k + n) * as<vec>(q + n);
    float kq = sum(same);
    for (I p = 0; p < P; p += L) {
        vec to_k[L], to_q[L];
        for (int l = 0; l < L; l++) {
            T *state = h + (p + l) * N;
            vec ks{}, qs{};
            I n = 0;
            for (; n + 2 * L <= N; n += 2 * L) {
                for (I i = 0; i < 2 * L; i += 64 / sizeof(T))
                    __builtin_prefetch((char *)(state + n + i) + AHEAD, 1, 2);
                vec a, b;
                get(state + n, a, b);
                ks += a * as<vec>(k + n) + b * as<vec>(k + n + L);
                qs += a * as<vec>(q + n) + b * as<vec>(q + n + L);
            }
            if (n < N) {
                vec a = load(state + n);
                ks += a * as<vec>(k + n);
                qs += a * as<vec>(q + n);
            }
            to_k[l] = ks;
            to_q[l] = qs;
        }
        vec written = (as<vec>(v + p) - sums(to_k) * decay) * beta;
        vec out = sums(to_q) * decay + written * kq;
        memcpy(y + p, &out, sizeof out);
        for (int l = 0; l < L; l++) {
            T *state = h + (p + l) * N;
            float w = sound(written[l]);
            I n = 0;
            for (; n + 2 * L <= N; n += 2 * L) {
                vec a, b;
                get(state + n, a, b);
                put(state + n, a * decay + as<vec>(k + n) * w, b * decay + as<vec>(k + n + L) * w);
            }
            if (n < N)
                store(state + n, load(state + n) * decay + as<vec>(k + n) * w);
        }
    }
}

// a mixer of the gated delta rule, v and out (B, D): conv (B, K - 1, 2 G N + H P) and h (B, H, P, N) are
// updated; norm (P). P and N are multiples of L
API delta_step(I threads, I precision, I B, I H, I G, I P, I N, I K, const Matrix *in_proj,
               const Matrix *out_proj, const float *weight, const float *bias, const float *dt_bias,
               const float *A_log, float most, const float *norm, float eps, float *conv, void *h,
               const float *v, float *out) {
    I E = H * P, W = 2 * G * N + E, sx = E + W + 2 * H;
    Room room(B * (sx + W + E + H));
    float *x = room.get(), *mixed = x + B * sx;  // x: rows of [z; q, k, v; beta; dt]
    float *y = mixed + B * W, *rstd = y + B * E;
    linear<1>(threads, {in_proj}, B, v, {x});
    Room taps = taps_of(W, K, weight);
    parallel(B * W < 8192 ? 1 : threads, B, [&](I lo, I hi) {
        Flush flush;
        conv_steps(lo, hi, W, K, x + E, sx, taps, bias, conv, mixed);
        for (I b = lo; b < hi; b++) {
            for (I g = 0; g < 2 * G; g++) {
                float *row = mixed + b * W + g * N;
                vec squares{};
                for (I n = 0; n < N; n += L)
                    squares += as<vec>(row + n) * as<vec>(row + n);
                float r = 1 / std::sqrt(sum(squares) + 1e-6f);
                for (I n = 0; n < N; n += L)
                    store(row + n, as<vec>(row + n) * (g < G ? r / std::sqrt((float)N) : r));
                if (precision == BF16)
                    even_first(N, row);
            }
        }
    });
    parallel(B * H * P * N < 32768 ? 1 : threads, B * H, [&](I lo, I hi) {
        Flush flush;
        for (I i = lo; i < hi; i++) {
            I b = i / H;
            I head = i % H;
            I g = head / (H / G);
            const float *q = mixed + b * W + g * N, *k = q + G * N;
            const float *u = mixed + b * W + 2 * G * N + head * P;
            const float *scalars = x + b * sx + E + W;
            float dt = softplus(all(sound(scalars[H + head] + dt_bias[head])))[0];
            float decay = sound(std::exp(-dt * std::exp(A_log[head])));
            float beta = most * sigmoid(all(sound(scalars[head])))[0];
            if (precision == BF16)
                delta_head(P, N, decay, beta, u, k, q, (bf16 *)h + i * P * N, y + i * P);
            else
                delta_head(P, N, decay, beta, u, k, q, (float *)h + i * P * N, y + i * P);
            norm_forward(0, 1, 0, 1, P, eps, y + i * P, nullptr, 0, norm, y + i * P, rstd + i);
            for (I p = 0; p < P; p += L) {
                vec z = as<vec>(x + b * sx + head * P + p);
                store(y + i * P + p, as<vec>(y + i * P + p) * z * sigmoid(z));
            }
        }
    });
    linear<1>(threads, {out_proj}, B, y, {out});
}

// Mamba-2: state-space duality. Items are heads, all sequences' in one row; a state is (N, P), kept
// at chunk starts.
//
// s = sums of dt A in a chunk; W[i][j] = C_i B_j exp(s_i - s_j), j <= i
// y = W (dt x) + exp(s) C h + D x; h' = exp(s_end) h + ...
#pragma once
#include <algorithm>
#include <vector>

#include "products.h"

struct Chunk {  // what both passes need of a chunk, for one head
    I q, Q, P, N;
    std::vector<float> raw, dt, grow, to_end, S, decay, W, xdt, xe, BT, CT;
    std::vector<double> s;
    float kept;

    Chunk(I Q, I P, I N)
        : Q(Q), P(P), N(N), raw(Q), dt(Q), grow(Q), to_end(Q), S(Q * Q), decay(Q * Q), W(Q * Q),
          xdt(Q * P), xe(Q * P), BT(N * Q), CT(N * Q), s(Q) {}

    void group(I tokens, const float *B, const float *C, I sx) {
        q = tokens;
        transpose(BT.data(), Q, B, sx, q, N, Q);
        gemm(q, Q, N, S.data(), Q, C, sx, 1, BT.data(), Q, false, CAUSAL);
    }

    void head(const float *x, I sx, const float *r, I sr, float bias, float A) {
        for (I i = 0; i < q; i++)
            raw[i] = r[i * sr] + bias;
        for (I i = 0; i < Q; i += L)
            store(&dt[i], softplus(load(&raw[i])));
        double total = 0;
        for (I i = 0; i < q; i++)
            s[i] = total += (double)dt[i] * A;
        for (I i = 0; i < Q; i++) {
            grow[i] = i < q ? s[i] : 0;
            to_end[i] = i < q ? total - s[i] : 0;
        }
        for (I i = 0; i < Q; i += L) {
            store(&grow[i], expv(load(&grow[i])));
            store(&to_end[i], expv(load(&to_end[i])));
        }
        kept = std::exp(total);
        for (I i = 0; i < q; i++) {
            for (I j = 0; j < Q;
                 j += L) {  // differences in double: of large sums fp32 loses the small ones
                vec d{};
                if (j <= i)
                    d = expv(narrow(s[i] - load(&s[j])));
                d = LANE + (int)j <= (int)i ? d : vec{};
                store(&decay[i * Q + j], d);
                store(&W[i * Q + j], j <= i ? d * load(&S[i * Q + j]) : d);
            }
            for (I p = 0; p < P; p += L) {
                vec v = load(x + i * sx + p) * dt[i];
                store(&xdt[i * P + p], v);
                store(&xe[i * P + p], v * to_end[i]);
            }
        }
    }
};

#define SSD                                                                                        \
    I T, I H, I G, I P, I N, I Q, const float *x, I sx, const float *raw, I sr, const float *bias, \
        const float *A, const float *D

// x: rows of [x (H, P), B (G, N), C (G, N)]. starts (B, H, chunks + 1, N, P), the first of them
// given
API ssd_forward(I lo, I hi, I, SSD, float *starts, float *y) {
    Flush flush;
    I chunks = (T + Q - 1) / Q;
    I R = H / G;
    I size = N * P;
    Chunk k(Q, P, N);
    for (I first = lo, last; first < hi; first = last) {  // heads of one group
        I b = first / H, g = first % H / R;
        last = std::min(hi, b * H + (g + 1) * R);
        for (I c = 0; c < chunks; c++) {
            const float *row = x + (b * T + c * Q) * sx;
            const float *B = row + H * P + g * N;
            const float *C = B + G * N;
            k.group(T - c * Q < Q ? T - c * Q : Q, B, C, sx);
            for (I i = first; i < last; i++) {
                I h = i - b * H, token = b * T + c * Q;
                float *now = starts + (i * (chunks + 1) + c) * size;
                float *next = now + size;
                float *out = y + token * H * P + h * P;
                k.head(row + h * P, sx, raw + token * sr + h, sr, bias[h], A[h]);
                gemm(k.q, P, N, out, H * P, C, sx, 1, now, P);
                for (I t = 0; t < k.q; t++) {
                    for (I p = 0; p < P; p += L) {
                        store(out + t * H * P + p, load(out + t * H * P + p) * k.grow[t] +
                                                       load(row + t * sx + h * P + p) * D[h]);
                    }
                }
                gemm(k.q, P, k.q, out, H * P, k.W.data(), Q, 1, k.xdt.data(), P, true, LOWER);
                for (I j = 0; j < size; j += L)
                    store(next + j, load(now + j) * k.kept);
                gemm(N, P, k.q, next, P, B, 1, sx, k.xe.data(), P, true);
            }
        }
    }
}

// gh: the gradient of the last state, on return of the first. gx has x's rows; B's and C's part of
// it is a copy a thread: gBC
API ssd_backward(I lo, I hi, I thread, I batch, SSD, const float *starts, const float *gy,
                 float *gh, float *gx, float *gBC, float *graw, float *gA, float *gD) {
    Flush flush;
    I chunks = (T + Q - 1) / Q;
    I R = H / G;
    I size = N * P;
    Chunk k(Q, P, N);
    std::vector<float> gW(Q * Q), gS(Q * Q), xT(P * Q), gT(P * Q), ge(Q * P), gu(Q * P), BG(Q * P),
        gB(N * Q), gC(N * Q), one(N * Q), v(Q);
    std::vector<double> gs(Q);
    gBC += thread * batch * T * 2 * G * N;
    for (I first = lo, last; first < hi; first = last) {
        I b = first / H, g = first % H / R;
        last = std::min(hi, b * H + (g + 1) * R);
        for (I c = chunks - 1; c >= 0; c--) {
            const float *row = x + (b * T + c * Q) * sx;
            const float *B = row + H * P + g * N;
            const float *C = B + G * N;
            I token = b * T + c * Q;
            k.group(T - c * Q < Q ? T - c * Q : Q, B, C, sx);
            I q = k.q;
            transpose(k.CT.data(), Q, C, sx, q, N, Q);
            memset(gS.data(), 0, 4 * Q * Q);
            memset(gB.data(), 0, 4 * N * Q);
            memset(gC.data(), 0, 4 * N * Q);
            for (I i = first; i < last; i++) {
                I h = i - b * H;
                const float *now = starts + (i * (chunks + 1) + c) * size;
                const float *grad = gy + token * H * P + h * P;
                const float *xh = row + h * P;
                float *G_ = gh + i * size;
                k.head(xh, sx, raw + token * sr + h, sr, bias[h], A[h]);
                for (I t = 0; t < Q; t++)
                    gs[t] = 0;
                // inside the chunk: of W, of S = C B^T and of the sums
                transpose(xT.data(), Q, k.xdt.data(), P, q, P, Q);
                gemm(q, Q, P, gW.data(), Q, grad, H * P, 1, xT.data(), Q, false, CAUSAL);
                for (I t = 0; t < q; t++) {
                    dvec total{};
                    for (I j = 0; j <= t; j += L) {
                        vec d = load(&gW[t * Q + j]);
                        d = LANE + (int)j <= (int)t ? d : vec{};
                        dvec both = wide(d * load(&k.W[t * Q + j]));
                        total += both;
                        store(&gs[j], load(&gs[j]) - both);
                        add(&gS[t * Q + j], d * load(&k.decay[t * Q + j]));
                    }
                    for (int l = 0; l < L; l++)
                        gs[t] += total[l];
                }
                gemm(q, P, q, gu.data(), P, k.W.data(), 1, Q, grad, H * P, false, UPPER);
                // by way of the state the chunk leaves
                gemm(q, P, N, BG.data(), P, B, sx, 1, G_, P);
                double last_sum = 0;
                for (I t = 0; t < q; t++) {
                    vec dot{};
                    for (I p = 0; p < P; p += L) {
                        vec w = load(&BG[t * P + p]);
                        dot += w * load(&k.xe[t * P + p]);
                        add(&gu[t * P + p], w * k.to_end[t]);
                    }
                    float d = sum(dot);
                    last_sum += d;
                    gs[t] -= d;
                }
                transpose(xT.data(), Q, k.xe.data(), P, q, P, Q);
                gemm(N, Q, P, gB.data(), Q, G_, P, 1, xT.data(), Q, true);
                // by way of the state it starts from
                transpose(gT.data(), Q, grad, H * P, q, P, Q, k.grow.data());
                gemm(N, Q, P, one.data(), Q, now, P, 1, gT.data(), Q);
                memset(v.data(), 0, 4 * Q);
                for (I n = 0; n < N; n++) {
                    for (I j = 0; j < Q; j += L) {
                        vec w = load(&one[n * Q + j]);
                        add(&v[j], w * load(&k.CT[n * Q + j]));
                        add(&gC[n * Q + j], w);
                    }
                }
                vec dot{};
                for (I j = 0; j < size; j += L) {
                    vec w = load(G_ + j) * k.kept;
                    dot += w * load(now + j);
                    store(G_ + j, w);
                }
                last_sum += sum(dot);
                for (I t = 0; t < q; t++)
                    for (I p = 0; p < P; p += L)
                        store(&ge[t * P + p], load(grad + t * H * P + p) * k.grow[t]);
                gemm(N, P, q, G_, P, C, 1, sx, ge.data(), P, true);
                // x, dt, A, D
                double later = last_sum;
                vec skip{};
                for (I t = q - 1; t >= 0; t--) {
                    later += gs[t] + v[t];
                    vec dt{};
                    for (I p = 0; p < P; p += L) {
                        vec u = load(&gu[t * P + p]);
                        vec xt = load(xh + t * sx + p);
                        vec d = load(grad + t * H * P + p);
                        dt += u * xt;
                        skip += d * xt;
                        store(gx + (token + t) * sx + h * P + p, u * k.dt[t] + d * D[h]);
                    }
                    graw[(token + t) * H + h] = (sum(dt) + A[h] * later) *
                                                (1 / (1 + std::exp(-k.raw[t])));
                    gA[i] += later * k.dt[t];
                }
                gD[i] += sum(skip);
            }
            float *toB = gBC + (b * T + c * Q) * 2 * G * N + g * N;
            float *toC = toB + G * N;
            gemm(q, N, q, toC, 2 * G * N, gS.data(), Q, 1, B, sx, false, LOWER);
            gemm(q, N, q, toB, 2 * G * N, gS.data(), 1, Q, C, sx, false, UPPER);
            for (I t = 0; t < q; t++) {
                for (I n = 0; n < N; n++) {
                    toB[t * 2 * G * N + n] += gB[n * Q + t];
                    toC[t * 2 * G * N + n] += gC[n * Q + t];
                }
            }
        }
    }
}

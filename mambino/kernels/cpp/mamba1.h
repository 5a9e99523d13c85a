// Mamba-1: the selective scan, one tile of L channels after another, their N states in registers.
// Items are tiles.
//
// h = exp(dt A) h + dt B x; y = (C h + D x) silu(z); dt = softplus(raw + bias)
// starts: the state before each chunk of CHUNK tokens
#pragma once
#include <algorithm>

#include "vectors.h"

constexpr int CHUNK = 8;

struct Scan {
    I T, E;
    const float *x, *raw;
    I sraw;
    const float *bias, *A, *B, *C;
    I sbc;
    const float *D, *z;
    I sz;
};

template <int N>
static void scan_forward(I lo, I hi, I batch, Scan m, float *h, float *starts, float *y) {
    I E = m.E;
    for (I b = 0; b < batch; b++) {
        for (I t0 = 0; t0 < m.T; t0 += CHUNK) {
            for (I e = lo * L; e < hi * L && e < E; e += L) {
                int n = E - e < L ? E - e : L;
                vec s[N], A[N], bias = load(m.bias + e, n), skip = load(m.D + e, n);
                for (int j = 0; j < N; j++) {
                    s[j] = load(h + (b * N + j) * E + e, n);
                    A[j] = load(m.A + j * E + e, n) * LOG2E;
                    if (starts)
                        store(starts + ((t0 / CHUNK * batch + b) * N + j) * E + e, s[j], n);
                }
                for (I r = b * m.T + t0; r < b * m.T + std::min(m.T, t0 + CHUNK); r++) {
                    vec x = load(m.x + r * E + e, n);
                    vec dt = softplus(load(m.raw + r * m.sraw + e, n) + bias);
                    vec u = dt * x;
                    vec out = skip * x;
                    const float *B = m.B + r * m.sbc, *C = m.C + r * m.sbc;
                    for (int j = 0; j < N; j++) {
                        s[j] = exp2v(dt * A[j]) * s[j] + u * B[j];
                        out += s[j] * C[j];
                    }
                    vec z = load(m.z + r * m.sz + e, n);
                    store(y + r * E + e, out * z * sigmoid(z), n);
                }
                for (int j = 0; j < N; j++)
                    store(h + (b * N + j) * E + e, s[j], n);
            }
        }
    }
}

template <int N>
static void scan_backward(I lo, I hi, I batch, Scan m, const float *starts, const float *gy,
                          float *gh, float *gx, float *graw, float *gbias, float *gA, float *gB,
                          float *gC, float *gD, float *gz) {
    I E = m.E;
    for (I b = 0; b < batch; b++) {
        for (I t0 = (m.T - 1) / CHUNK * CHUNK; t0 >= 0; t0 -= CHUNK) {
            int k = m.T - t0 < CHUNK ? m.T - t0 : CHUNK;
            vec sumB[CHUNK][N], sumC[CHUNK][N];
            memset(sumB, 0, sizeof sumB);
            memset(sumC, 0, sizeof sumC);
            for (I e = lo * L; e < hi * L && e < E; e += L) {
                int n = E - e < L ? E - e : L;
                vec s[CHUNK + 1][N], decay[CHUNK][N], A[N], g[N], dA[N], dt[CHUNK], x[CHUNK],
                    grad[CHUNK], slope[CHUNK];
                vec bias = load(m.bias + e, n);
                vec skip = load(m.D + e, n);
                vec dskip{};
                vec dbias{};
                for (int j = 0; j < N; j++) {
                    A[j] = load(m.A + j * E + e, n) * LOG2E;
                    dA[j] = vec{};
                    s[0][j] = load(starts + ((t0 / CHUNK * batch + b) * N + j) * E + e, n);
                    g[j] = load(gh + (b * N + j) * E + e, n);
                }
                for (int i = 0; i < k; i++) {  // the states once more
                    I r = b * m.T + t0 + i;
                    const float *B = m.B + r * m.sbc, *C = m.C + r * m.sbc;
                    x[i] = load(m.x + r * E + e, n);
                    dt[i] = softplus(load(m.raw + r * m.sraw + e, n) + bias, slope[i]);
                    vec u = dt[i] * x[i], out = skip * x[i];
                    for (int j = 0; j < N; j++) {
                        decay[i][j] = exp2v(dt[i] * A[j]);
                        s[i + 1][j] = decay[i][j] * s[i][j] + u * B[j];
                        out += s[i + 1][j] * C[j];
                    }
                    vec z = load(m.z + r * m.sz + e, n);
                    vec open = sigmoid(z);
                    vec go = load(gy + r * E + e, n);
                    store(gz + r * E + e, go * out * open * (1.f + z * (1.f - open)), n);
                    grad[i] = go * z * open;
                    dskip += grad[i] * x[i];
                }
                for (int i = k - 1; i >= 0; i--) {
                    I r = b * m.T + t0 + i;
                    const float *B = m.B + r * m.sbc, *C = m.C + r * m.sbc;
                    vec du{};
                    vec ddt{};
                    vec u = dt[i] * x[i];
                    for (int j = 0; j < N; j++) {
                        vec gs = g[j] + grad[i] * C[j];
                        sumC[i][j] += s[i + 1][j] * grad[i];
                        sumB[i][j] += gs * u;
                        du += gs * B[j];
                        g[j] = gs * decay[i][j];
                        vec w = g[j] * s[i][j];  // of dt A
                        dA[j] += w * dt[i];
                        ddt += w * A[j];
                    }
                    store(gx + r * E + e, du * dt[i] + grad[i] * skip, n);
                    vec draw = (ddt * LN2 + du * x[i]) * slope[i];
                    store(graw + r * E + e, draw, n);
                    dbias += draw;
                }
                for (int j = 0; j < N; j++) {
                    store(gh + (b * N + j) * E + e, g[j], n);
                    add(gA + j * E + e, dA[j], n);
                }
                add(gD + e, dskip, n);
                add(gbias + e, dbias, n);
            }
            for (int i = 0; i < k; i++) {
                for (int j = 0; j < N; j++) {
                    gB[(b * m.T + t0 + i) * N + j] = sum(sumB[i][j]);
                    gC[(b * m.T + t0 + i) * N + j] = sum(sumC[i][j]);
                }
            }
        }
    }
}

#define SCAN                                                                                       \
    I N, I batch, I T, I E, const float *x, const float *raw, I sraw, const float *bias,           \
        const float *A, const float *B, const float *C, I sbc, const float *D, const float *z,     \
        I sz

#define FOR_N(call) \
    switch (N) { \
    case 8: call(8); break; \
    case 16: call(16); break; \
    case 32: call(32); break; \
    case 64: call(64); \
    }

API mamba1_forward(I lo, I hi, I, SCAN, float *h, float *starts, float *y) {
    Flush flush;
    Scan m{T, E, x, raw, sraw, bias, A, B, C, sbc, D, z, sz};
#define CALL(n) scan_forward<n>(lo, hi, batch, m, h, starts, y)
    FOR_N(CALL)
#undef CALL
}

API mamba1_backward(I lo, I hi, I thread, SCAN, const float *starts, const float *gy, float *gh,
                    float *gx, float *graw, float *gbias, float *gA, float *gB, float *gC,
                    float *gD, float *gz) {
    Flush flush;
    Scan m{T, E, x, raw, sraw, bias, A, B, C, sbc, D, z, sz};
    gB += thread * batch * T * N;
    gC += thread * batch * T * N;
#define CALL(n)                                                                                    \
    scan_backward<n>(lo, hi, batch, m, starts, gy, gh, gx, graw, gbias, gA, gB, gC, gD, gz)
    FOR_N(CALL)
#undef CALL
}

// Mamba-1: the selective scan, one tile of L channels after another, their N states in registers.
// Items are tiles.
//
// h = exp(dt A) h + dt B x; y = (C h + D x) silu(z); dt = softplus(raw + bias)
// starts: the state before each chunk of CHUNK tokens
//
// x, raw, B, C, z, y and their gradients are all fp32 or all bf16; what is computed is fp32.
#pragma once
#include <algorithm>

#include "vectors.h"

constexpr int CHUNK = 8;

struct Numbers {  // fp32 or bf16: a tile has N exponentials for each, so to ask which costs nothing
    void *at;
    bool is_bf16;

    vec load(I i, int n) const {
        return is_bf16 ? ::load((const bf16 *)at + i, n) : ::load((const float *)at + i, n);
    }

    void store(I i, vec v, int n) const {
        if (is_bf16)
            ::store((bf16 *)at + i, v, n);
        else
            ::store((float *)at + i, v, n);
    }

    // n of each of k rows, s apart, as fp32
    void rows(float *to, I i, I s, I k, I n) const {
        for (I r = 0; r < k; r++)
            for (I j = 0; j < n; j += L)
                ::store(to + r * n + j, load(i + r * s + j, n - j), n - j);
    }
};

struct Scan {
    I T, E;
    Numbers x, raw;
    I sraw;
    const float *bias, *A;
    Numbers B, C;
    I sbc;
    const float *D;
    Numbers z;
    I sz;
};

template <int N>
static void scan_forward(I lo, I hi, I batch, Scan m, float *h, float *starts,
                         Numbers y) {
    I E = m.E;
    for (I b = 0; b < batch; b++) {
        for (I t0 = 0; t0 < m.T; t0 += CHUNK) {
            I row = b * m.T + t0;
            I k = std::min<I>(CHUNK, m.T - t0);
            float Bs[CHUNK * N], Cs[CHUNK * N];
            m.B.rows(Bs, row * m.sbc, m.sbc, k, N);
            m.C.rows(Cs, row * m.sbc, m.sbc, k, N);
            for (I e = lo * L; e < hi * L && e < E; e += L) {
                int n = E - e < L ? E - e : L;
                vec s[N], A[N], bias = load(m.bias + e, n), skip = load(m.D + e, n);
                for (int j = 0; j < N; j++) {
                    s[j] = load(h + (b * N + j) * E + e, n);
                    A[j] = load(m.A + j * E + e, n) * LOG2E;
                    if (starts)
                        store(starts + ((t0 / CHUNK * batch + b) * N + j) * E + e, s[j], n);
                }
                for (I r = row; r < row + k; r++) {
                    vec x = m.x.load(r * E + e, n);
                    vec dt = softplus(m.raw.load(r * m.sraw + e, n) + bias);
                    vec u = dt * x;
                    vec out = skip * x;
                    const float *B = Bs + (r - row) * N, *C = Cs + (r - row) * N;
                    for (int j = 0; j < N; j++) {
                        s[j] = exp2v(dt * A[j]) * s[j] + u * B[j];
                        out += s[j] * C[j];
                    }
                    vec z = m.z.load(r * m.sz + e, n);
                    y.store(r * E + e, out * z * sigmoid(z), n);
                }
                for (int j = 0; j < N; j++)
                    store(h + (b * N + j) * E + e, s[j], n);
            }
        }
    }
}

template <int N>
static void scan_backward(I lo, I hi, I batch, Scan m, const float *starts, Numbers gy, float *gh,
                          Numbers gx, Numbers graw, float *gbias, float *gA, float *gB, float *gC,
                          float *gD, Numbers gz) {
    I E = m.E;
    for (I b = 0; b < batch; b++) {
        for (I t0 = (m.T + CHUNK - 1) / CHUNK * CHUNK - CHUNK; t0 >= 0; t0 -= CHUNK) {
            int k = m.T - t0 < CHUNK ? m.T - t0 : CHUNK;
            vec sumB[CHUNK][N], sumC[CHUNK][N];
            float Bs[CHUNK * N], Cs[CHUNK * N];
            m.B.rows(Bs, (b * m.T + t0) * m.sbc, m.sbc, k, N);
            m.C.rows(Cs, (b * m.T + t0) * m.sbc, m.sbc, k, N);
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
                    const float *B = Bs + i * N, *C = Cs + i * N;
                    x[i] = m.x.load(r * E + e, n);
                    dt[i] = softplus(m.raw.load(r * m.sraw + e, n) + bias, slope[i]);
                    vec u = dt[i] * x[i], out = skip * x[i];
                    for (int j = 0; j < N; j++) {
                        decay[i][j] = exp2v(dt[i] * A[j]);
                        s[i + 1][j] = decay[i][j] * s[i][j] + u * B[j];
                        out += s[i + 1][j] * C[j];
                    }
                    vec z = m.z.load(r * m.sz + e, n);
                    vec open = sigmoid(z);
                    vec go = gy.load(r * E + e, n);
                    gz.store(r * E + e, go * out * open * (1.f + z * (1.f - open)), n);
                    grad[i] = go * z * open;
                    dskip += grad[i] * x[i];
                }
                for (int i = k - 1; i >= 0; i--) {
                    I r = b * m.T + t0 + i;
                    const float *B = Bs + i * N, *C = Cs + i * N;
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
                    gx.store(r * E + e, du * dt[i] + grad[i] * skip, n);
                    vec draw = (ddt * LN2 + du * x[i]) * slope[i];
                    graw.store(r * E + e, draw, n);
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

#define FOR_N(call) \
    switch (N) { \
    case 8: call(8); break; \
    case 16: call(16); break; \
    case 32: call(32); break; \
    case 64: call(64); \
    }

static void scan_forward(I N, I lo, I hi, I batch, Scan m, float *h, float *starts, Numbers y) {
    Flush flush;
#define CALL(n) scan_forward<n>(lo, hi, batch, m, h, starts, y)
    FOR_N(CALL)
#undef CALL
}

static void scan_backward(I N, I lo, I hi, I batch, Scan m, const float *starts, Numbers gy,
                          float *gh, Numbers gx, Numbers graw, float *gbias, float *gA, float *gB,
                          float *gC, float *gD, Numbers gz) {
    Flush flush;
#define CALL(n)                                                                                    \
    scan_backward<n>(lo, hi, batch, m, starts, gy, gh, gx, graw, gbias, gA, gB, gC, gD, gz)
    FOR_N(CALL)
#undef CALL
}

#define SCAN                                                                                       \
    I N, I batch, I T, I E, void *x, void *raw, I sraw, const float *bias, const float *A,         \
        void *B, void *C, I sbc, const float *D, void *z, I sz
#define SCAN_OF(is_bf16)                                                                           \
    {T, E, {x, is_bf16}, {raw, is_bf16}, sraw, bias, A, {B, is_bf16}, {C, is_bf16}, sbc, D,        \
     {z, is_bf16}, sz}

API mamba1_forward(I lo, I hi, I, SCAN, float *h, float *starts, void *y) {
    scan_forward(N, lo, hi, batch, SCAN_OF(false), h, starts, {y, false});
}

API mamba1_forward_bf16(I lo, I hi, I, SCAN, float *h, float *starts, void *y) {
    scan_forward(N, lo, hi, batch, SCAN_OF(true), h, starts, {y, true});
}

#define GRADIENTS                                                                                  \
    const float *starts, void *gy, float *gh, void *gx, void *graw, float *gbias, float *gA,       \
        float *gB, float *gC, float *gD, void *gz
#define BACKWARD(is_bf16)                                                                          \
    scan_backward(N, lo, hi, batch, SCAN_OF(is_bf16), starts, {gy, is_bf16}, gh, {gx, is_bf16},    \
                  {graw, is_bf16}, gbias, gA, gB + thread * batch * T * N,                         \
                  gC + thread * batch * T * N, gD, {gz, is_bf16})

API mamba1_backward(I lo, I hi, I thread, SCAN, GRADIENTS) { BACKWARD(false); }

API mamba1_backward_bf16(I lo, I hi, I thread, SCAN, GRADIENTS) { BACKWARD(true); }

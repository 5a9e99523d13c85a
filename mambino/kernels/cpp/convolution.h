// The causal depthwise convolution of 4 taps, and silu. Items are sequences times strips of
// channels, which are wide so that memory is read row by row. x, y and their gradients are T, fp32
// or bf16; the taps and all sums are fp32.
#pragma once
#include <algorithm>
#include <vector>

#include "products.h"

constexpr I STRIP = 256;     // channels, as cpu_mamba.py says
constexpr I BLOCK_T = 8;     // tokens that a vector of channels goes through in registers

struct Conv {  // x (B, T, E), rows sx apart; weight (4, E)
    I T, E, sx;
    const float *weight, *bias;

    I strips() { return up(E, STRIP) / STRIP; }
};

struct Taps {  // what the channels e to e + n of a token are made of
    vec w[4], bias;
    int n;

    Taps(Conv &m, I e) : bias(load(m.bias + e, m.E - e)), n(std::min<I>(L, m.E - e)) {
        for (int j = 0; j < 4; j++)
            w[j] = load(m.weight + j * m.E + e, n);
    }

    vec sum(const vec *x, I t) {  // x[0] is token t's, before it are those of the tokens before
        vec v = bias;
        for (int j = 0; j < 4 && j <= t; j++)
            v += w[3 - j] * x[-j];
        return v;
    }
};

// to rows t0 - 3 to t1 of one vector of channels
template <class T>
static inline void load_rows(vec *to, const T *x, I sx, I t0, I t1, int n) {
    for (I t = t0 < 3 ? 0 : t0 - 3; t < t1; t++)
        to[t - t0 + 3] = load(x + t * sx, n);
}

template <class T>
static void convolve(I lo, I hi, Conv m, const T *x, T *y) {
    Flush flush;
    for (I i = lo; i < hi; i++) {
        const T *from = x + i / m.strips() * m.T * m.sx;
        T *to = y + i / m.strips() * m.T * m.E;
        I begin = i % m.strips() * STRIP, end = std::min(m.E, begin + STRIP);
        for (I t0 = 0; t0 < m.T; t0 += BLOCK_T) {
            I t1 = std::min(m.T, t0 + BLOCK_T);
            for (I e = begin; e < end; e += L) {
                Taps taps(m, e);
                vec rows[BLOCK_T + 3];
                load_rows(rows, from + e, m.sx, t0, t1, taps.n);
                for (I t = t0; t < t1; t++) {
                    vec v = taps.sum(rows + t - t0 + 3, t);
                    store(to + t * m.E + e, v * sigmoid(v), taps.n);
                }
            }
        }
    }
}

template <class T>
static void convolve_backward(I lo, I hi, Conv m, const T *x, const T *gy, T *gx, float *gw,
                              float *gb) {
    Flush flush;
    // of a strip's channels: sums over the tokens, those of the weights and of the bias, and the
    // gradients of the three tokens after the block, before they are multiplied by the taps
    std::vector<float> sums(5 * STRIP), after(3 * STRIP);
    for (I i = lo; i < hi; i++) {
        const T *from = x + i / m.strips() * m.T * m.sx;
        I row = i / m.strips() * m.T;
        I begin = i % m.strips() * STRIP, end = std::min(m.E, begin + STRIP);
        std::fill(sums.begin(), sums.end(), 0.f);
        std::fill(after.begin(), after.end(), 0.f);
        for (I t1 = m.T; t1 > 0; t1 = (t1 - 1) / BLOCK_T * BLOCK_T) {
            I t0 = (t1 - 1) / BLOCK_T * BLOCK_T;
            for (I e = begin; e < end; e += L) {
                Taps taps(m, e);
                vec rows[BLOCK_T + 3], g[BLOCK_T + 3], dw[5];
                load_rows(rows, from + e, m.sx, t0, t1, taps.n);
                float *sum = &sums[e - begin], *next = &after[e - begin];
                for (int j = 0; j < 5; j++)
                    dw[j] = load(sum + j * STRIP);
                for (int j = 0; j < 3; j++)
                    g[t1 - t0 + j] = load(next + j * STRIP);
                for (I t = t1 - 1; t >= t0; t--) {
                    const vec *xt = rows + t - t0 + 3;
                    vec *f = g + t - t0;  // the gradients of tokens t, t+1, t+2, t+3
                    vec v = taps.sum(xt, t);
                    vec s = sigmoid(v);
                    f[0] = load(gy + (row + t) * m.E + e, taps.n) * s * (1.f + v * (1.f - s));
                    store(gx + (row + t) * m.E + e,
                          f[0] * taps.w[3] + f[1] * taps.w[2] + f[2] * taps.w[1] + f[3] * taps.w[0],
                          taps.n);
                    for (int j = 0; j < 4 && j <= t; j++)
                        dw[3 - j] += f[0] * xt[-j];
                    dw[4] += f[0];
                }
                for (int j = 0; j < 5; j++)
                    store(sum + j * STRIP, dw[j]);
                for (int j = 0; j < 3; j++)
                    store(next + j * STRIP, g[j]);
            }
        }
        for (I e = begin; e < end; e += L) {
            int n = std::min<I>(L, m.E - e);
            for (int j = 0; j < 4; j++)
                add(gw + j * m.E + e, load(&sums[j * STRIP + e - begin]), n);
            add(gb + e, load(&sums[4 * STRIP + e - begin]), n);
        }
    }
}

#define CONV I T, I E, I sx, const float *weight, const float *bias

API conv_forward(I lo, I hi, I, CONV, const float *x, float *y) {
    convolve(lo, hi, {T, E, sx, weight, bias}, x, y);
}

API conv_forward_bf16(I lo, I hi, I, CONV, const bf16 *x, bf16 *y) {
    convolve(lo, hi, {T, E, sx, weight, bias}, x, y);
}

API conv_backward(I lo, I hi, I thread, CONV, const float *x, const float *gy, float *gx, float *gw,
                  float *gb) {
    convolve_backward(lo, hi, {T, E, sx, weight, bias}, x, gy, gx, gw + thread * 4 * E,
                      gb + thread * E);
}

API conv_backward_bf16(I lo, I hi, I thread, CONV, const bf16 *x, const bf16 *gy, bf16 *gx,
                       float *gw, float *gb) {
    convolve_backward(lo, hi, {T, E, sx, weight, bias}, x, gy, gx, gw + thread * 4 * E,
                      gb + thread * E);
}

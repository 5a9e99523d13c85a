// The causal depthwise convolution of 4 taps, and silu. Items are sequences times tiles of 4 L
// channels.
#pragma once
#include <algorithm>

#include "products.h"

constexpr I TILE = 4 * L;

static inline vec taps(const float *x, I sx, I t, int n, const vec *w, vec bias) {
    for (int j = 0; j < 4 && j <= t; j++)
        bias += w[3 - j] * load(x + (t - j) * sx, n);
    return bias;
}

API conv_forward(I lo, I hi, I, I T, I E, const float *x, I sx, const float *weight,
                 const float *bias, float *y) {
    Flush flush;
    I tiles = up(E, TILE) / TILE;
    for (I i = lo; i < hi; i++) {
        I b = i / tiles;
        I begin = i % tiles * TILE;
        I end = std::min(E, begin + TILE);
        vec w[4][4], start[4];
        for (I e = begin, c = 0; e < end; e += L, c++) {
            int n = end - e < L ? end - e : L;
            start[c] = load(bias + e, n);
            for (int j = 0; j < 4; j++)
                w[c][j] = load(weight + j * E + e, n);
        }
        for (I t = 0; t < T; t++) {
            for (I e = begin, c = 0; e < end; e += L, c++) {
                int n = end - e < L ? end - e : L;
                vec v = taps(x + b * T * sx + e, sx, t, n, w[c], start[c]);
                store(y + (b * T + t) * E + e, v * sigmoid(v), n);
            }
        }
    }
}

API conv_backward(I lo, I hi, I thread, I T, I E, const float *x, I sx, const float *weight,
                  const float *bias, const float *gy, float *gx, float *gw, float *gb) {
    Flush flush;
    I tiles = up(E, TILE) / TILE;
    gw += thread * 4 * E;
    gb += thread * E;
    for (I i = lo; i < hi; i++) {
        I b = i / tiles;
        I begin = i % tiles * TILE;
        I end = std::min(E, begin + TILE);
        vec w[4][4];
        vec dw[4][4]{};
        vec db[4]{};
        vec later[4][4]{};
        vec start[4];
        for (I e = begin, c = 0; e < end; e += L, c++) {
            int n = end - e < L ? end - e : L;
            start[c] = load(bias + e, n);
            for (int j = 0; j < 4; j++)
                w[c][j] = load(weight + j * E + e, n);
        }
        for (I t = T - 1; t >= 0; t--) {
            for (I e = begin, c = 0; e < end; e += L, c++) {
                int n = end - e < L ? end - e : L;
                const float *xb = x + b * T * sx + e;
                vec *f = later[c];  // the gradients of tokens t, t+1, t+2, t+3
                vec v = taps(xb, sx, t, n, w[c], start[c]);
                vec s = sigmoid(v);
                vec g = load(gy + (b * T + t) * E + e, n) * s * (1.f + v * (1.f - s));
                f[3] = f[2];
                f[2] = f[1];
                f[1] = f[0];
                f[0] = g;
                store(gx + (b * T + t) * E + e,
                      f[0] * w[c][3] + f[1] * w[c][2] + f[2] * w[c][1] + f[3] * w[c][0], n);
                for (int j = 0; j < 4 && j <= t; j++)
                    dw[c][3 - j] += g * load(xb + (t - j) * sx, n);
                db[c] += g;
            }
        }
        for (I e = begin, c = 0; e < end; e += L, c++) {
            int n = end - e < L ? end - e : L;
            for (int j = 0; j < 4; j++)
                add(gw + j * E + e, dw[c][j], n);
            add(gb + e, db[c], n);
        }
    }
}

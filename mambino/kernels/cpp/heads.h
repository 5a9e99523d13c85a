// The gate of heads: rows of y (R, H, P) and z (H, P), sz apart → rows of (H, P), the sum over R of y o
// silu(z w), each head of y normed before if there is a norm. w, o (H, R, P) and norm (H, P) may be null.
#pragma once
#include "vectors.h"

struct Gate {
    I R, H, P;
    float eps;
    I sz;
    const float *w, *o, *norm;

    static vec times(vec v, const float *by, I i) { return by ? v * load(by + i) : v; }

    template <class X>
    float scale(const X *y) const {
        if (!norm)
            return 1;
        vec square{};
        for (I p = 0; p < P; p += L)
            square += load(y + p) * load(y + p);
        return 1 / std::sqrt(sum(square) / P + eps);
    }
};

template <class X>
static void heads_gated(I lo, I hi, Gate m, const X *y, const X *z, X *out) {
    Flush flush;
    I R = m.R, P = m.P, E = m.H * P;
    std::vector<float> total(P);
    for (I t = lo; t < hi; t++) {
        for (I e = 0; e < m.H; e++) {
            const X *zr = z + t * m.sz + e * P;
            for (I r = 0; r < R; r++) {
                const X *yr = y + (t * R + r) * E + e * P;
                I at = (e * R + r) * P;
                float scale = m.scale(yr);
                for (I p = 0; p < P; p += L) {
                    vec gate = m.times(load(zr + p), m.w, at + p);
                    vec u = m.times(load(yr + p) * scale, m.norm, e * P + p);
                    u = m.times(u, m.o, at + p) * gate * sigmoid(gate);
                    store(&total[p], r ? load(&total[p]) + u : u);
                }
            }
            for (I p = 0; p < P; p += L)
                store(out + t * E + e * P + p, load(&total[p]));
        }
    }
}

// gw, go (H, R, P), gnorm (H, P): of the thread, added to
template <class X>
static void heads_gate_grad(I lo, I hi, I thread, Gate m, const X *y, const X *z, const X *g, X *gy, X *gz,
                            float *gw, float *go, float *gnorm) {
    Flush flush;
    I R = m.R, P = m.P, E = m.H * P;
    gw += thread * R * E;
    go += thread * R * E;
    gnorm += thread * E;
    std::vector<float> to_z(P), to_y(P);
    for (I t = lo; t < hi; t++) {
        for (I e = 0; e < m.H; e++) {
            const X *zr = z + t * m.sz + e * P;
            for (I r = 0; r < R; r++) {
                I row = (t * R + r) * E + e * P, at = (e * R + r) * P;
                float scale = m.scale(y + row);
                vec dot{};
                for (I p = 0; p < P; p += L) {
                    vec grad = load(g + t * E + e * P + p), zp = load(zr + p);
                    vec gate = m.times(zp, m.w, at + p), s = sigmoid(gate), a = gate * s;
                    vec normed = load(y + row + p) * scale;
                    vec u = m.times(normed, m.norm, e * P + p);
                    vec of_gate = m.times(grad * u, m.o, at + p) * s * (1.f + gate * (1.f - s));
                    vec of_u = m.times(grad * a, m.o, at + p);
                    vec of_z = m.times(of_gate, m.w, at + p);
                    if (m.w)
                        add(gw + at + p, of_gate * zp);
                    if (m.o)
                        add(go + at + p, grad * u * a);
                    if (m.norm)
                        add(gnorm + e * P + p, of_u * normed);
                    of_u = m.times(of_u, m.norm, e * P + p);
                    dot += of_u * normed;
                    store(&to_y[p], of_u);
                    store(&to_z[p], r ? load(&to_z[p]) + of_z : of_z);
                }
                float mean = m.norm ? sum(dot) / P * scale : 0;
                for (I p = 0; p < P; p += L)
                    store(gy + row + p, (load(&to_y[p]) - load(y + row + p) * mean) * scale);
            }
            for (I p = 0; p < P; p += L)
                store(gz + t * E + e * P + p, load(&to_z[p]));
        }
    }
}

#define GATE I R, I H, I P, float eps, I sz, const float *w, const float *o, const float *norm
#define HEADS(kind, X)                                                                            \
    API heads_forward##kind(I lo, I hi, I, GATE, const X *y, const X *z, X *out) {                \
        heads_gated<X>(lo, hi, {R, H, P, eps, sz, w, o, norm}, y, z, out);                        \
    }                                                                                             \
    API heads_backward##kind(I lo, I hi, I thread, GATE, const X *y, const X *z, const X *g,      \
                             X *gy, X *gz, float *gw, float *go, float *gnorm) {                  \
        heads_gate_grad<X>(lo, hi, thread, {R, H, P, eps, sz, w, o, norm}, y, z, g, gy, gz, gw,   \
                           go, gnorm);                                                            \
    }
HEADS(, float)
HEADS(_bf16, bf16)

// What is computed element by element or row by row: SwiGLU, RoPE, norms, the loss. Items are L
// elements, tokens, rows.
#pragma once
#include <algorithm>
#include <vector>

#include "products.h"

// Those that a training step in bf16 calls exist in two or three kinds, of the types of their numbers:
// all are read as fp32, computed with and rounded once.
template <class X>
static inline void swiglu_of(I lo, I hi, const X *g, const X *u, X *y) {
    Flush flush;
    for (I i = lo * L; i < hi * L; i += L) {
        vec x = load(g + i);
        store(y + i, x * sigmoid(x) * load(u + i));
    }
}

template <class X>
static inline void swiglu_grad(I lo, I hi, const X *g, const X *u, const X *gy, X *gg, X *gu) {
    Flush flush;
    for (I i = lo * L; i < hi * L; i += L) {
        vec x = load(g + i);
        vec s = sigmoid(x);
        vec grad = load(gy + i);
        store(gu + i, grad * x * s);
        store(gg + i, grad * load(u + i) * s * (1.f + x * (1.f - s)));
    }
}

// rows of heads (heads, P) and tables (positions, P / 2); token i is at position i % T
template <class X>
static inline void rotated(I lo, I hi, I T, I heads, I P, const X *x, const float *cosine,
                           const float *sine, float sign, X *y) {
    Flush flush;
    for (I i = lo; i < hi; i++) {
        for (I h = 0; h < heads; h++) {
            const X *a = x + (i * heads + h) * P;
            const float *c = cosine + i % T * (P / 2);
            const float *s = sine + i % T * (P / 2);
            X *out = y + (i * heads + h) * P;
            for (I j = 0; j < P / 2; j += L) {
                int n = P / 2 - j < L ? P / 2 - j : L;
                vec u = load(a + j, n);
                vec v = load(a + P / 2 + j, n);
                vec cj = load(c + j, n);
                vec sj = load(s + j, n) * sign;
                store(out + j, u * cj - v * sj, n);
                store(out + P / 2 + j, v * cj + u * sj, n);
            }
        }
    }
}

// rms-norm of x, or of x * silu(z), in `groups` groups of D channels
template <class X, class Y>
static void norm_of(I lo, I hi, I groups, I D, float eps, const X *x, const Y *z, I sz, const float *w,
                    Y *y, float *rstd) {
    Flush flush;
    std::vector<float> row(up(D, L));
    for (I r = lo; r < hi; r++) {
        for (I g = 0; g < groups; g++) {
            const X *xr = x + (r * groups + g) * D;
            const Y *zr = z + r * sz + g * D;
            const float *wg = w + g * D;
            Y *out = y + (r * groups + g) * D;
            vec square{};
            for (I j = 0; j < D; j += L) {
                int n = D - j < L ? D - j : L;
                vec u = load(xr + j, n);
                if (z) {
                    vec v = load(zr + j, n);
                    u *= v * sigmoid(v);
                }
                store(&row[j], u);
                square += u * u;
            }
            float scale = rstd[r * groups + g] = 1 / std::sqrt(sum(square) / D + eps);
            for (I j = 0; j < D; j += L) {
                int n = D - j < L ? D - j : L;
                store(out + j, load(&row[j]) * scale * load(wg + j, n), n);
            }
        }
    }
}

template <class X, class Y>
static void norm_grad(I lo, I hi, I thread, I groups, I D, const X *x, const Y *z, I sz, const float *w,
                      const float *rstd, const Y *gy, X *gx, Y *gz, float *gw) {
    Flush flush;
    gw += thread * groups * D;
    for (I r = lo; r < hi; r++) {
        for (I g = 0; g < groups; g++) {
            I row = (r * groups + g) * D;
            const Y *zr = z + r * sz + g * D;
            const float *wg = w + g * D;
            float scale = rstd[r * groups + g];
            vec dot{};
            for (I j = 0; j < D; j += L) {
                int n = D - j < L ? D - j : L;
                vec u = load(x + row + j, n), grad = load(gy + row + j, n);
                if (z) {
                    vec v = load(zr + j, n);
                    u *= v * sigmoid(v);
                }
                dot += u * grad * load(wg + j, n);
                add(gw + g * D + j, u * grad * scale, n);
            }
            float mean = sum(dot) / D * scale * scale;
            for (I j = 0; j < D; j += L) {
                int n = D - j < L ? D - j : L;
                vec u = load(x + row + j, n);
                vec grad = load(gy + row + j, n) * load(wg + j, n);
                if (!z) {
                    store(gx + row + j, (grad - u * mean) * scale, n);
                    continue;
                }
                vec v = load(zr + j, n);
                vec s = sigmoid(v);
                vec a = v * s;
                grad = (grad - u * a * mean) * scale;
                store(gx + row + j, grad * a, n);
                store(gz + row + j, grad * u * s * (1.f + v * (1.f - s)), n);
            }
        }
    }
}

// each under its name for these types: x's, and that of all else that is no weight nor statistic
#define NORM(kind, X, Y)                                                                          \
    API norm_forward##kind(I lo, I hi, I, I groups, I D, float eps, const X *x, const Y *z, I sz, \
                           const float *w, Y *y, float *rstd) {                                   \
        norm_of(lo, hi, groups, D, eps, x, z, sz, w, y, rstd);                                    \
    }                                                                                             \
    API norm_backward##kind(I lo, I hi, I thread, I groups, I D, const X *x, const Y *z, I sz,    \
                            const float *w, const float *rstd, const Y *gy, X *gx, Y *gz,         \
                            float *gw) {                                                          \
        norm_grad(lo, hi, thread, groups, D, x, z, sz, w, rstd, gy, gx, gz, gw);                  \
    }
NORM(, float, float)
NORM(_to_bf16, float, bf16)
NORM(_bf16, bf16, bf16)

#define ELEMENTWISE(kind, X)                                                                      \
    API swiglu_forward##kind(I lo, I hi, I, const X *g, const X *u, X *y) {                       \
        swiglu_of(lo, hi, g, u, y);                                                               \
    }                                                                                             \
    API swiglu_backward##kind(I lo, I hi, I, const X *g, const X *u, const X *gy, X *gg, X *gu) { \
        swiglu_grad(lo, hi, g, u, gy, gg, gu);                                                    \
    }                                                                                             \
    API rope##kind(I lo, I hi, I, I T, I heads, I P, const X *x, const float *cosine,             \
                   const float *sine, float sign, X *y) {                                         \
        rotated(lo, hi, T, heads, P, x, cosine, sine, sign, y);                                   \
    }
ELEMENTWISE(, float)
ELEMENTWISE(_bf16, bf16)

// logits (rows, V) become the gradient of the sum of their cross-entropies; a target below 0 does
// not count
template <class X>
static void cross_entropy_of(I lo, I hi, I V, X *logits, const I *targets, float *loss) {
    Flush flush;
    std::vector<float> row(V);
    for (I r = lo; r < hi; r++) {
        X *x = logits + r * V;
        if (targets[r] < 0) {
            memset(x, 0, sizeof(X) * V);
            loss[r] = 0;
            continue;
        }
        float *e = row.data();
        vec top = all(-INFINITY), total{};
        I even = V / L * L;
        for (I j = 0; j < even; j += L) {
            vec u = load(x + j);
            store(e + j, u);
            top = max(u, top);
        }
        if (even < V)
            store(e + even, load(x + even, V - even), V - even);
        float most = -INFINITY;
        float rest = 0;
        float own = e[targets[r]];
        for (int l = 0; l < L; l++)
            most = top[l] > most ? top[l] : most;
        for (I j = even; j < V; j++)
            most = e[j] > most ? e[j] : most;
        for (I j = 0; j < even; j += L) {
            vec u = expv(load(e + j) - most);
            store(e + j, u);
            total += u;
        }
        for (I j = even; j < V; j++)
            rest += e[j] = std::exp(e[j] - most);
        rest += sum(total);
        loss[r] = std::log(rest) + most - own;
        float share = 1 / rest;
        for (I j = 0; j < V; j++)
            e[j] *= share;
        e[targets[r]] -= 1;
        for (I j = 0; j < V; j += L) {
            int n = V - j < L ? V - j : L;
            store(x + j, load(e + j, n), n);
        }
    }
}

API cross_entropy(I lo, I hi, I, I V, float *logits, const I *targets, float *loss) {
    cross_entropy_of(lo, hi, V, logits, targets, loss);
}

API cross_entropy_bf16(I lo, I hi, I, I V, bf16 *logits, const I *targets, float *loss) {
    cross_entropy_of(lo, hi, V, logits, targets, loss);
}

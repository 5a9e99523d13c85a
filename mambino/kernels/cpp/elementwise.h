// What is computed element by element or row by row: SwiGLU, RoPE, norms, the loss. Items are L
// elements, tokens, rows.
#pragma once
#include <algorithm>

#include "vectors.h"

API swiglu_forward(I lo, I hi, I, const float *g, const float *u, float *y) {
    Flush flush;
    for (I i = lo * L; i < hi * L; i += L) {
        vec x = load(g + i);
        store(y + i, x * sigmoid(x) * load(u + i));
    }
}

API swiglu_backward(I lo, I hi, I, const float *g, const float *u, const float *gy, float *gg,
                    float *gu) {
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
API rope(I lo, I hi, I, I T, I heads, I P, const float *x, const float *cosine, const float *sine,
         float sign, float *y) {
    Flush flush;
    for (I i = lo; i < hi; i++) {
        for (I h = 0; h < heads; h++) {
            const float *a = x + (i * heads + h) * P;
            const float *c = cosine + i % T * (P / 2);
            const float *s = sine + i % T * (P / 2);
            float *out = y + (i * heads + h) * P;
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
API norm_forward(I lo, I hi, I, I groups, I D, float eps, const float *x, const float *z, I sz,
                 const float *w, float *y, float *rstd) {
    Flush flush;
    for (I r = lo; r < hi; r++) {
        for (I g = 0; g < groups; g++) {
            const float *xr = x + (r * groups + g) * D;
            const float *zr = z + r * sz + g * D;
            const float *wg = w + g * D;
            float *out = y + (r * groups + g) * D;
            vec square{};
            for (I j = 0; j < D; j += L) {
                int n = D - j < L ? D - j : L;
                vec u = load(xr + j, n);
                if (z) {
                    vec v = load(zr + j, n);
                    u *= v * sigmoid(v);
                }
                store(out + j, u, n);
                square += u * u;
            }
            float scale = rstd[r * groups + g] = 1 / std::sqrt(sum(square) / D + eps);
            for (I j = 0; j < D; j += L) {
                int n = D - j < L ? D - j : L;
                store(out + j, load(out + j, n) * scale * load(wg + j, n), n);
            }
        }
    }
}

API norm_backward(I lo, I hi, I thread, I groups, I D, const float *x, const float *z, I sz,
                  const float *w, const float *rstd, const float *gy, float *gx, float *gz,
                  float *gw) {
    Flush flush;
    gw += thread * groups * D;
    for (I r = lo; r < hi; r++) {
        for (I g = 0; g < groups; g++) {
            I row = (r * groups + g) * D;
            const float *zr = z + r * sz + g * D, *wg = w + g * D;
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

// logits (rows, V) become the gradient of the sum of their cross-entropies; a target below 0 does
// not count
API cross_entropy(I lo, I hi, I, I V, float *logits, const I *targets, float *loss) {
    Flush flush;
    for (I r = lo; r < hi; r++) {
        float *x = logits + r * V;
        if (targets[r] < 0) {
            memset(x, 0, 4 * V);
            loss[r] = 0;
            continue;
        }
        vec top = all(-INFINITY), total{};
        I even = V / L * L;
        for (I j = 0; j < even; j += L)
            top = max(load(x + j), top);
        float most = -INFINITY;
        float rest = 0;
        float own = x[targets[r]];
        for (int l = 0; l < L; l++)
            most = top[l] > most ? top[l] : most;
        for (I j = even; j < V; j++)
            most = x[j] > most ? x[j] : most;
        for (I j = 0; j < even; j += L) {
            vec e = expv(load(x + j) - most);
            store(x + j, e);
            total += e;
        }
        for (I j = even; j < V; j++)
            rest += x[j] = std::exp(x[j] - most);
        rest += sum(total);
        for (I j = 0; j < even; j += L)
            store(x + j, load(x + j) * (1 / rest));
        for (I j = even; j < V; j++)
            x[j] *= 1 / rest;
        loss[r] = std::log(rest) + most - own;
        x[targets[r]] -= 1;
    }
}

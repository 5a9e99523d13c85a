// One token of each of a few sequences, what generation computes again and again. Each function does
// all of its task, on `threads` threads; decode.py writes down their calls, and `replay` makes them.
//
// precision: FP32 or BF16, in which keys, values and the recurrences' h are kept; what is computed
// of them is fp32.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "caches.h"
#include "delta_step.h"
#include "elementwise.h"
#include "mamba3_step.h"
#include "matrices.h"
#include "states.h"

API mlp_step(I threads, I tokens, const Matrix *gate, const Matrix *up_, const Matrix *down,
             const float *x, float *y) {
    I inner = gate->rows;
    Room room(2 * tokens * inner);
    float *g = room.get(), *u = g + tokens * inner;
    linear<2>(threads, {gate, up_}, tokens, x, {g, u});
    parallel(tokens * inner < 8192 ? 1 : threads, up(tokens * inner, L) / L, [&](I lo, I hi) {
        Flush flush;
        for (I i = lo * L; i < std::min(hi * L, tokens * inner); i += L) {
            int n = std::min<I>(L, tokens * inner - i);
            vec v = load(g + i, n);
            store(g + i, v * sigmoid(v) * load(u + i, n), n);
        }
    });
    linear<1>(threads, {down}, tokens, g, {y});
}

// rope's tables (B, P / 2) of positions pos (B); frequencies (P / 2)
API rope_step(I B, I P, const I *pos, const float *frequencies, float amplitude, float *cosine,
              float *sine) {
    for (I i = 0; i < B * (P / 2); i++) {
        float angle = (float)pos[i / (P / 2)] * frequencies[i % (P / 2)];
        cosine[i] = std::cos(angle) * amplitude;
        sine[i] = std::sin(angle) * amplitude;
    }
}

// x (B, D) += bias (D), if there is one
static void add_bias(I B, I D, const float *bias, float *x) {
    for (I i = 0; bias && i < B * D; i++)
        x[i] += bias[i % D];
}

// attention of one token of each sequence, x and y (B, D): the caches (B, G, S, P) get its key and
// value, and slots 0 to pos, or all of a ring, are attended to. P is a multiple of L; tables
// (B, P / 2), or null where nothing turns; biases, or null; norms of heads, of all at once if `whole`,
// or null
API attention_step(I threads, I precision, I B, I H, I G, I P, I S, const Matrix *qm,
                   const Matrix *km, const Matrix *vm, const Matrix *om, const float *q_bias,
                   const float *k_bias, const float *v_bias, const float *o_bias, I whole,
                   const float *q_norm, const float *k_norm, float eps, const I *pos,
                   const float *cosine, const float *sine, void *keys, void *values,
                   const float *x, float *out) {
    Room room(B * (2 * H + 2 * G) * P + B * H);
    I nq = whole ? 1 : H, nk = whole ? 1 : G;  // norms of a token
    float *q = room.get();
    float *k = q + B * H * P;
    float *v = k + B * G * P;
    float *y = v + B * G * P;
    float *rstd = y + B * H * P;
    linear<3>(threads, {qm, km, vm}, B, x, {q, k, v});
    add_bias(B, H * P, q_bias, q);
    add_bias(B, G * P, k_bias, k);
    add_bias(B, G * P, v_bias, v);
    if (q_norm) {
        norm_forward(0, B * nq, 0, 1, H * P / nq, eps, q, nullptr, 0, q_norm, q, rstd);
        norm_forward(0, B * nk, 0, 1, G * P / nk, eps, k, nullptr, 0, k_norm, k, rstd);
    }
    if (cosine) {
        rope(0, B, 0, B, H, P, q, cosine, sine, 1, q);
        rope(0, B, 0, B, G, P, k, cosine, sine, 1, k);
    }
    if (precision == BF16)
        attend(threads, B, H, G, P, S, pos, q, k, v, (bf16 *)keys, (bf16 *)values, y);
    else
        attend(threads, B, H, G, P, S, pos, q, k, v, (float *)keys, (float *)values, y);
    linear<1>(threads, {om}, B, y, {out});
    add_bias(B, om->rows, o_bias, out);
}

// a Mamba-2's mixer, v and out (B, D): conv (B, K - 1, H P + 2 G N) and h (B, H, P, N) are updated.
// P and N are multiples of L. norm: null for the gate alone
API mamba2_step(I threads, I precision, I B, I H, I G, I P, I N, I K, const Matrix *in_proj,
                const Matrix *out_proj, const float *weight, const float *bias,
                const float *dt_bias, const float *A_log, const float *D, const float *norm,
                float eps, float *conv, void *h, const float *v, float *out) {
    I E = H * P;
    I W = E + 2 * G * N;
    I sx = E + W + H;
    Room room(B * (sx + W + E + G));
    float *x = room.get(), *mixed = x + B * sx;  // x: rows of [z; x, B, C; dt]
    float *y = mixed + B * W, *rstd = y + B * E;
    linear<1>(threads, {in_proj}, B, v, {x});
    Room taps = taps_of(W, K, weight);
    auto convolve = [&](I lo, I hi) {
        conv_steps(lo, hi, W, K, x + E, sx, taps, bias, conv, mixed);
        for (I b = lo; b < hi && precision == BF16; b++)
            for (I g = 0; g < 2 * G; g++)
                even_first(N, mixed + b * W + E + g * N);
    };
    auto scan = [&](I lo, I hi) {
        for (I i = lo; i < hi; i++) {
            I b = i / H;
            I head = i % H;
            I g = head / (H / G);
            const float *u = mixed + b * W + head * P;
            const float *Bs = mixed + b * W + E + g * N;
            const float *Cs = Bs + G * N;
            float dt = softplus(all(x[b * sx + E + W + head] + dt_bias[head]))[0];
            float decay = std::exp(-dt * std::exp(A_log[head]));
            if (precision == BF16)
                head_step(P, N, dt, decay, D[head], u, Bs, Cs, (bf16 *)h + i * P * N, y + i * P);
            else
                head_step(P, N, dt, decay, D[head], u, Bs, Cs, (float *)h + i * P * N, y + i * P);
        }
    };
    auto gate = [&](I lo, I hi) {
        if (norm)
            return norm_forward(lo, hi, 0, G, E / G, eps, y, x, sx, norm, y, rstd);
        for (I b = lo; b < hi; b++) {
            for (I e = 0; e < E; e += L) {
                vec z = load(x + b * sx + e);
                store(y + b * E + e, load(y + b * E + e) * z * sigmoid(z));
            }
        }
    };
    I shared = B * H * P * N < 32768 ? 1 : threads;
    if (B >= 4 * threads) {  // a row is one thread's: nothing goes from core to core
        parallel(shared, B, [&](I lo, I hi) {
            Flush flush;
            convolve(lo, hi);
            scan(lo * H, hi * H);
            gate(lo, hi);
        });
    } else {
        parallel(B * W < 8192 ? 1 : threads, B, [&](I lo, I hi) {
            Flush flush;
            convolve(lo, hi);
        });
        parallel(shared, B * H, [&](I lo, I hi) {
            Flush flush;
            scan(lo, hi);
        });
        parallel(B * E < 8192 ? 1 : threads, B, gate);
    }
    linear<1>(threads, {out_proj}, B, y, {out});
}

// a Mamba-1's mixer, v and out (B, D): conv (B, K - 1, E) and h (B, N, E) are updated. part_eps: dt, B
// and C are normed, 0: they are not
API mamba1_step(I threads, I precision, I B, I E, I N, I K, I R, const Matrix *in_proj,
                const Matrix *x_proj, const Matrix *dt_proj, const Matrix *out_proj,
                const float *weight, const float *conv_bias, const float *bias, const float *A_log,
                const float *D, float part_eps, float *conv, void *h, const float *v, float *out) {
    I sbc = R + 2 * N, sz = 2 * E;
    Room room(B * (5 * E + sbc + R));
    float *both = room.get();
    float *x = both + B * 2 * E;
    float *raw = x + B * E;
    float *y = raw + B * E;
    float *parts = y + B * E;
    float *low = parts + B * sbc;
    const float *z = both + E;
    const float *Bs = parts + R;
    const float *Cs = Bs + N;
    linear<1>(threads, {in_proj}, B, v, {both});  // rows of [x; z]
    Room taps = taps_of(E, K, weight);
    parallel(B * E < 8192 ? 1 : threads, B, [&](I lo, I hi) {
        Flush flush;
        conv_steps(lo, hi, E, K, both, 2 * E, taps, conv_bias, conv, x);
    });
    linear<1>(threads, {x_proj}, B, x, {parts});  // rows of [dt; B; C]
    for (I b = 0; part_eps && b < B; b++) {
        float *part = parts + b * sbc;
        for (I n : {R, N, N}) {
            float squares = 0;
            for (I i = 0; i < n; i++)
                squares += part[i] * part[i];
            float scale = 1 / std::sqrt(squares / n + part_eps);
            for (I i = 0; i < n; i++)
                *part++ *= scale;
        }
    }
    for (I b = 0; b < B; b++)
        memcpy(low + b * R, parts + b * sbc, 4 * R);
    linear<1>(threads, {dt_proj}, B, low, {raw});
    auto scan = [&](auto *h) {
        parallel(B * E * N < 8192 ? 1 : threads, up(E, L) / L, [&](I lo, I hi) {
            Flush flush;
            std::vector<vec> A(N);
            std::vector<float> logs(N * L);
            for (I e = lo * L; e < std::min(hi * L, E); e += L) {
                int n = E - e < L ? E - e : L;
                for (int l = 0; l < n; l++)
                    for (I j = 0; j < N; j++)
                        logs[j * L + l] = A_log[(e + l) * N + j];
                for (I j = 0; j < N; j++)
                    A[j] = -expv(load(&logs[j * L])) * LOG2E;
                for (I b = 0; b < B; b++) {
                    vec in = load(x + b * E + e, n);
                    vec dt = softplus(load(raw + b * E + e, n) + load(bias + e, n));
                    vec sum = in * load(D + e, n);
                    for (I j = 0; j < N; j++) {
                        auto *state = h + (b * N + j) * E + e;
                        vec now = exp2v(dt * A[j]) * load(state, n) + dt * in * Bs[b * sbc + j];
                        store(state, now, n);
                        sum += now * Cs[b * sbc + j];
                    }
                    vec gate = load(z + b * sz + e, n);
                    store(y + b * E + e, sum * gate * sigmoid(gate), n);
                }
            }
        });
    };
    if (precision == BF16)
        scan((bf16 *)h);
    else
        scan((float *)h);
    linear<1>(threads, {out_proj}, B, y, {out});
}

// y = x + scale * the sum of a hybrid's branches (B, D), at most 3, each normed if `norms` has
// weights, by the controller's softmax of h or all the same
API mix_step(I B, I D, I n, const float *a, const float *b, const float *c, const float *norm_a,
             const float *norm_b, const float *norm_c, float eps, const float *controller,
             const float *bias, const float *scale, const float *h, const float *x, float *y) {
    Flush flush;
    const float *branches[] = {a, b, c};
    const float *norms[] = {norm_a, norm_b, norm_c};
    std::vector<float> normed(D);
    for (I r = 0; r < B * D; r += D) {
        float share[3], most = -INFINITY, total = 0, rstd;
        for (I i = 0; i < n; i++) {
            vec dot{};
            for (I j = 0; controller && j < D; j += L) {
                int m = D - j < L ? D - j : L;
                dot += load(controller + i * D + j, m) * load(h + r + j, m);
            }
            share[i] = controller ? sum(dot) + bias[i] : 0;
            most = std::max(most, share[i]);
        }
        for (I i = 0; i < n; i++)
            total += share[i] = std::exp(share[i] - most);
        for (I i = 0; i < n; i++) {
            const float *from = branches[i] + r;
            if (norms[i]) {
                norm_forward(0, 1, 0, 1, D, eps, from, nullptr, 0, norms[i], normed.data(), &rstd);
                from = normed.data();
            }
            for (I j = 0; j < D; j += L) {
                int m = D - j < L ? D - j : L;
                vec before = load((i ? y : x) + r + j, m);
                store(y + r + j,
                      before + load(from + j, m) * load(scale + j, m) * (share[i] / total), m);
            }
        }
    }
}

API add_step(I n, const float *x, const float *y, float *out) {
    for (I i = 0; i < n; i++)
        out[i] = x[i] + y[i];
}

// n calls: each is the number of a function, below, and its arguments, floats by their bits; decode.py
// writes them down
template <class T>
static T from(I a) {
    if constexpr (std::is_same_v<T, float>)
        return as<float>(&a);
    else
        return (T)a;
}

template <class... A, size_t... i>
static I invoke(void (*f)(A...), const I *a, std::index_sequence<i...>) {
    f(from<A>(a[i])...);
    return sizeof...(A);
}

template <class... A>
static I invoke(void (*f)(A...), const I *a) {
    return invoke(f, a, std::index_sequence_for<A...>{});
}

API replay(I n, const I *a) {
    while (n--) {
        switch (*a++) {
        case 0: a += invoke(norm_forward, a); break;
        case 1: a += invoke(add_step, a); break;
        case 2: a += invoke(mlp_step, a); break;
        case 3: a += invoke(attention_step, a); break;
        case 4: a += invoke(mamba1_step, a); break;
        case 5: a += invoke(mamba2_step, a); break;
        case 6: a += invoke(mix_step, a); break;
        case 7: a += invoke(rope_step, a); break;
        case 8: a += invoke(linear_step, a); break;
        case 9: a += invoke(mamba3_step, a); break;
        case 10: a += invoke(delta_step, a); break;
        }
    }
}

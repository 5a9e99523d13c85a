// The gated delta rule. Items are parts of a group's heads, all sequences' in one row; a state is (N, P)
// while it is worked with, (P, N) where it comes from and goes to.
//
// s = sums of the log decay in a chunk; D[i][j] = exp(s_i - s_j), j <= i; q, k normed, of a group
// A[i][j] = beta_i D[i][j] k_i k_j, j < i;  (I + A) u = beta (v - exp(s) k h), what is written
// y = exp(s) q h + (q k^T D) u;  h' = exp(s_end) h + k^T (exp(s_end - s) u)
//
// T is what q, k, v and y are kept as, fp32 or bf16; all that is computed is fp32, sums fp64.
#pragma once
#include <algorithm>

#include "mamba2.h"

struct Delta {  // a task: x has rows of [q (G, N), k (G, N), v (H, P)], sx apart; decay, beta (H)
    I T, H, G, P, N, Q, parts;  // a group's heads are `parts` items
    const void *x;
    I sx;
    const float *decay, *beta;

    I heads() const { return H / G / parts; }
    I chunks() const { return (T + Q - 1) / Q; }
};

template <class T>
struct DeltaChunk : Decays {  // what both passes need of a chunk, for one head
    static constexpr I BLOCK = 6;  // rows that are solved for at once
    static constexpr float EPS = 1e-6f;
    I q, Q, P, N;
    std::vector<float> qn, kn, kT, r_q, r_k, qk, kk, decay, M, A, proj, rest, u;

    DeltaChunk(I Q, I P, I N)
        : Decays(Q), Q(Q), P(P), N(N), qn(Q * N), kn(Q * N), kT(N * Q), r_q(Q), r_k(Q), qk(Q * Q),
          kk(Q * Q), decay(Q * Q), M(Q * Q), A(Q * Q), proj(Q * P), rest(Q * P), u(Q * P) {}

    // rows (q, N) over their length, times `scale`
    void normed(float *to, float *r, const T *rows, I sx, float scale) {
        for (I t = 0; t < q; t++) {
            vec squares{};
            for (I n = 0; n < N; n += L) {
                vec v = load(rows + t * sx + n);
                squares += v * v;
            }
            r[t] = 1 / std::sqrt(sum(squares) + EPS);
            for (I n = 0; n < N; n += L)
                store(to + t * N + n, load(rows + t * sx + n) * (r[t] * scale));
        }
    }

    void group(I tokens, const T *rows_q, const T *rows_k, I sx) {
        q = tokens;
        normed(qn.data(), r_q.data(), rows_q, sx, 1 / std::sqrt((float)N));
        normed(kn.data(), r_k.data(), rows_k, sx, 1);
        transpose(kT.data(), Q, kn.data(), N, q, N, Q);
        gemm(q, Q, N, qk.data(), Q, qn.data(), N, 1, kT.data(), Q, 0, CAUSAL);
        gemm(q, Q, N, kk.data(), Q, kn.data(), N, 1, kT.data(), Q, 0, CAUSAL);
    }

    // of log decays and betas, sr apart, and the state h: all that is above, with -A for A
    void head(const T *v, I sx, const float *a, const float *beta, I sr, const float *h) {
        double total = 0;
        for (I i = 0; i < q; i++)
            s[i] = total += a[i * sr];
        add_up(q);
        each(q, [&](I i, I j, vec d) {
            d = LANE + (int)j <= (int)i ? d : vec{};
            store(&decay[i * Q + j], d);
            store(&M[i * Q + j], d * load(&qk[i * Q + j]));
            vec below = LANE + (int)j < (int)i ? d * load(&kk[i * Q + j]) : vec{};
            store(&A[i * Q + j], below * -beta[i * sr]);
        });
        gemm(q, P, N, proj.data(), P, kn.data(), N, 1, h, P);
        for (I t = 0; t < q; t++) {
            for (I p = 0; p < P; p += L) {
                vec w = load(v + t * sx + p) - load(&proj[t * P + p]) * grow[t];
                store(&rest[t * P + p], w);
                store(&u[t * P + p], w * beta[t * sr]);
            }
        }
        solve();
    }

    // u = (I + A)^-1 u, from the first row on
    void solve() {
        for (I i = 0; i < q; i += BLOCK) {
            I end = std::min(q, i + BLOCK);
            gemm(end - i, P, i, &u[i * P], P, &A[i * Q], Q, 1, u.data(), P, 1);
            for (I t = i + 1; t < end; t++)
                for (I j = i; j < t; j++)
                    for (I p = 0; p < P; p += L)
                        add(&u[t * P + p], load(&u[j * P + p]) * A[t * Q + j]);
        }
    }

    // g = (I + A^T)^-1 g, from the last row on
    void solve_transposed(float *g) {
        for (I end = q; end > 0; end -= std::min(end, BLOCK)) {
            I i = std::max<I>(0, end - BLOCK);
            gemm(end - i, P, q - end, g + i * P, P, A.data() + end * Q + i, 1, Q, g + end * P, P, 1);
            for (I t = end - 2; t >= i; t--)
                for (I j = t + 1; j < end; j++)
                    for (I p = 0; p < P; p += L)
                        add(g + t * P + p, load(g + j * P + p) * A[j * Q + t]);
        }
    }
};

// the states of a sequence's heads: as turn_states
static void turn_states(const Delta &m, I b, I first, const float *from, float *to) {
    Ssd same{m.T, m.H, m.G, m.P, m.N, m.Q, m.parts};
    turn_states(same, b, first, from, to);
}

// state (B, H, P, N), null for zeros → y, the last state, and for the backward pass, unless null,
// starts (B, H, chunks, N, P): the state before each chunk
template <class T>
static void delta_by_chunks(I lo, I hi, Delta m, const float *state, T *starts, T *y, float *last) {
    Flush flush;
    I P = m.P, N = m.N, Q = m.Q, size = N * P, heads = m.heads();
    DeltaChunk<T> k(Q, P, N);
    std::vector<float> h(heads * size), out(Q * P);
    for (I item = lo; item < hi; item++) {
        I b = item / (m.G * m.parts), g = item / m.parts % m.G;
        I first = item % (m.G * m.parts) * heads;
        turn_states(m, b, first, state, h.data());
        for (I c = 0; c < m.chunks(); c++) {
            I token = b * m.T + c * Q;
            const T *row = (const T *)m.x + token * m.sx;
            k.group(std::min(Q, m.T - c * Q), row + g * N, row + (m.G + g) * N, m.sx);
            for (I i = 0; i < heads; i++) {
                I e = first + i, r = token * m.H + e;
                float *now = &h[i * size];
                if (starts) {
                    T *start = starts + ((b * m.H + e) * m.chunks() + c) * size;
                    for (I j = 0; j < size; j += L)
                        store(start + j, load(now + j));
                }
                k.head(row + 2 * m.G * N + e * P, m.sx, m.decay + r, m.beta + r, m.H, now);
                gemm(k.q, P, N, out.data(), P, k.qn.data(), N, 1, now, P);
                for (I t = 0; t < k.q; t++)
                    for (I p = 0; p < P; p += L)
                        store(&out[t * P + p], load(&out[t * P + p]) * k.grow[t]);
                gemm(k.q, P, k.q, out.data(), P, k.M.data(), Q, 1, k.u.data(), P, 1, LOWER);
                for (I t = 0; t < k.q; t++) {
                    for (I p = 0; p < P; p += L) {
                        store(y + ((token + t) * m.H + e) * P + p, load(&out[t * P + p]));
                        store(&k.u[t * P + p], load(&k.u[t * P + p]) * k.to_end[t]);
                    }
                }
                gemm(N, P, k.q, now, P, k.kn.data(), 1, N, k.u.data(), P, k.kept);
            }
        }
        for (I i = 0; i < heads; i++)
            transpose(last + (b * m.H + first + i) * size, N, &h[i * size], P, N, P, N);
    }
}

// to (rows, N) at `sx`, or unless null the copy at `sc`: the gradient of rows of which `normed` made n,
// of g, that of n: r scale (g - n (n g)) with n of length 1
template <class T>
static void norm_backward(I q, I N, const float *n, const float *r, float scale, const float *g,
                          T *to, I sx, float *copy, I sc) {
    for (I t = 0; t < q; t++) {
        vec dot{};
        for (I j = 0; j < N; j += L)
            dot += load(n + t * N + j) * load(g + t * N + j);
        float along = sum(dot) / (scale * scale);
        for (I j = 0; j < N; j += L) {
            vec w = (load(g + t * N + j) - load(n + t * N + j) * along) * (r[t] * scale);
            if (copy)
                store(copy + t * sc + j, w);
            else
                store(to + t * sx + j, w);
        }
    }
}

// grad_last: the gradient of the last state, null for zeros; gstate: of the first, unless null. gx has
// rows as x, without gaps; where a group's heads are several items, each has q's and k's part of it in
// a copy of its own
template <class T>
static void delta_backward_by_chunks(I lo, I hi, I batch, Delta m, const T *starts, const T *gy,
                                     const float *grad_last, float *gstate, T *gx, float *copies,
                                     float *gdecay, float *gbeta) {
    Flush flush;
    I P = m.P, N = m.N, Q = m.Q, size = N * P, heads = m.heads(), width = m.H * P + 2 * m.G * N;
    DeltaChunk<T> k(Q, P, N);
    std::vector<float> grad(Q * P), gu(Q * P), part(Q * P), ge(Q * P), gW(Q * Q), gqk(Q * Q), gkk(Q * Q),
        across(P * Q), gq(N * Q), gk(N * Q), one(N * Q), v(Q), products(Q), start(size), gh(heads * size),
        sums(Q * N), back(Q * N), qT(N * Q);
    std::vector<double> gs(Q);
    for (I item = lo; item < hi; item++) {
        I b = item / (m.G * m.parts), g = item / m.parts % m.G;
        I first = item % (m.G * m.parts) * heads;
        turn_states(m, b, first, grad_last, gh.data());
        for (I c = m.chunks() - 1; c >= 0; c--) {
            I token = b * m.T + c * Q;
            const T *row = (const T *)m.x + token * m.sx;
            k.group(std::min(Q, m.T - c * Q), row + g * N, row + (m.G + g) * N, m.sx);
            I q = k.q;
            transpose(qT.data(), Q, k.qn.data(), N, q, N, Q);
            for (auto *sums_of : {&gqk, &gkk, &gq, &gk})
                std::fill(sums_of->begin(), sums_of->end(), 0.f);
            for (I i = 0; i < heads; i++) {
                I e = first + i, r = token * m.H + e;
                float *G = &gh[i * size];
                const float *now = as_numbers(start, starts + ((b * m.H + e) * m.chunks() + c) * size, size);
                const float *beta = m.beta + r;
                k.head(row + 2 * m.G * N + e * P, m.sx, m.decay + r, beta, m.H, now);
                gather(grad.data(), gy + (token * m.H + e) * P, m.H * P, q, P);
                std::fill(gs.begin(), gs.end(), 0.);
                // of u: by way of y, and of the state the chunk leaves; then of what u is solved from
                gemm(q, P, q, gu.data(), P, k.M.data(), 1, Q, grad.data(), P, 0, UPPER);
                gemm(q, P, N, part.data(), P, k.kn.data(), N, 1, G, P);
                double last_sum = 0;
                for (I t = 0; t < q; t++) {
                    vec dot{};
                    for (I p = 0; p < P; p += L) {
                        vec w = load(&part[t * P + p]) * k.to_end[t];
                        dot += w * load(&k.u[t * P + p]);
                        add(&gu[t * P + p], w);
                    }
                    float d = sum(dot);
                    last_sum += d;
                    gs[t] -= d;
                }
                k.solve_transposed(gu.data());
                // inside the chunk: of M, and of -A
                transpose(across.data(), Q, k.u.data(), P, q, P, Q);
                gemm(q, Q, P, gW.data(), Q, grad.data(), P, 1, across.data(), Q, 0, CAUSAL);
                for (I t = 0; t < q; t++) {
                    for (I j = 0; j <= t; j += L) {
                        vec d = load(&gW[t * Q + j]);
                        d = LANE + (int)j <= (int)t ? d : vec{};
                        store(&products[j], d * load(&k.M[t * Q + j]));
                        add(&gqk[t * Q + j], d * load(&k.decay[t * Q + j]));
                    }
                    count(t, products, gs);
                }
                gemm(q, Q, P, gW.data(), Q, gu.data(), P, 1, across.data(), Q, 0, CAUSAL);
                for (I t = 0; t < q; t++) {
                    vec strength{};
                    for (I j = 0; j <= t; j += L) {
                        vec d = load(&gW[t * Q + j]);
                        d = LANE + (int)j < (int)t ? d : vec{};
                        store(&products[j], d * load(&k.A[t * Q + j]));
                        d *= load(&k.decay[t * Q + j]);
                        strength += d * load(&k.kk[t * Q + j]);
                        add(&gkk[t * Q + j], d * -beta[t * m.H]);
                    }
                    count(t, products, gs);
                    gbeta[r + t * m.H] = -sum(strength);
                }
                // what u is solved from: beta (v - exp(s) k h)
                for (I t = 0; t < q; t++) {
                    vec strength{}, past{};
                    for (I p = 0; p < P; p += L) {
                        vec w = load(&gu[t * P + p]);
                        strength += w * load(&k.rest[t * P + p]);
                        w *= beta[t * m.H];
                        store(gx + (token + t) * width + 2 * m.G * N + e * P + p, w);
                        w *= -k.grow[t];
                        past += w * load(&k.proj[t * P + p]);
                        store(&part[t * P + p], w);
                        store(&ge[t * P + p], load(&grad[t * P + p]) * k.grow[t]);
                        store(&k.u[t * P + p], load(&k.u[t * P + p]) * k.to_end[t]);
                    }
                    gbeta[r + t * m.H] += sum(strength);
                    gs[t] += sum(past);
                }
                // k, by way of h and of the state the chunk leaves; q, by way of h
                transpose(across.data(), Q, part.data(), P, q, P, Q);
                gemm(N, Q, P, gk.data(), Q, now, P, 1, across.data(), Q, 1);
                transpose(across.data(), Q, k.u.data(), P, q, P, Q);
                gemm(N, Q, P, gk.data(), Q, G, P, 1, across.data(), Q, 1);
                transpose(across.data(), Q, ge.data(), P, q, P, Q);
                gemm(N, Q, P, one.data(), Q, now, P, 1, across.data(), Q);
                std::fill(v.begin(), v.end(), 0.f);
                for (I j = 0; j < Q; j += L) {
                    vec total{};
                    for (I n = 0; n < N; n++) {
                        vec w = load(&one[n * Q + j]);
                        total += w * load(&qT[n * Q + j]);
                        add(&gq[n * Q + j], w);
                    }
                    store(&v[j], total);
                }
                // the state before, and the decay
                vec dots[4]{};
                for (I j = 0; j < size; j += L)
                    dots[j / L % 4] += load(G + j) * load(now + j);
                last_sum += sum(dots[0] + dots[1] + (dots[2] + dots[3])) * k.kept;
                gemm(N, P, q, G, P, k.qn.data(), 1, N, ge.data(), P, k.kept);
                gemm(N, P, q, G, P, k.kn.data(), 1, N, part.data(), P, 1);
                double later = last_sum;
                for (I t = q - 1; t >= 0; t--)
                    gdecay[r + t * m.H] = later += gs[t] + v[t];
            }
            // q and k, by way of their products with each other, then of their norms
            for (I n = 0; n < 2; n++) {  // of q, and of k
                if (n == 0) {
                    gemm(q, N, q, sums.data(), N, gqk.data(), Q, 1, k.kn.data(), N, 0, LOWER);
                } else {
                    gemm(q, N, q, sums.data(), N, gqk.data(), 1, Q, k.qn.data(), N, 0, UPPER);
                    gemm(q, N, q, sums.data(), N, gkk.data(), Q, 1, k.kn.data(), N, 1, LOWER);
                    gemm(q, N, q, sums.data(), N, gkk.data(), 1, Q, k.kn.data(), N, 1, UPPER);
                }
                transpose(back.data(), N, n ? gk.data() : gq.data(), Q, N, Q, N);
                for (I j = 0; j < q * N; j += L)
                    add(&sums[j], load(&back[j]));
                const float *rows = n ? k.kn.data() : k.qn.data();
                float scale = n ? 1 : 1 / std::sqrt((float)N);
                T *to = gx + token * width + (n * m.G + g) * N;
                I tokens = item % m.parts * batch * m.T + token;
                float *copy = copies ? copies + tokens * 2 * m.G * N + (n * m.G + g) * N : nullptr;
                norm_backward(q, N, rows, n ? k.r_k.data() : k.r_q.data(), scale, sums.data(), to, width,
                              copy, 2 * m.G * N);
            }
        }
        for (I i = 0; gstate && i < heads; i++)
            transpose(gstate + (b * m.H + first + i) * size, N, &gh[i * size], P, N, P, N);
    }
}

#define DELTA                                                                                      \
    I T, I H, I G, I P, I N, I Q, I parts, const void *x, I sx, const float *decay, const float *beta
#define DELTA_TASK {T, H, G, P, N, Q, parts, x, sx, decay, beta}

API delta_forward(I lo, I hi, I, DELTA, const float *state, float *starts, float *y, float *last) {
    delta_by_chunks<float>(lo, hi, DELTA_TASK, state, starts, y, last);
}

API delta_forward_bf16(I lo, I hi, I, DELTA, const float *state, bf16 *starts, bf16 *y, float *last) {
    delta_by_chunks<bf16>(lo, hi, DELTA_TASK, state, starts, y, last);
}

API delta_backward(I lo, I hi, I, I batch, DELTA, const float *starts, const float *gy,
                   const float *grad_last, float *gstate, float *gx, float *copies, float *gdecay,
                   float *gbeta) {
    delta_backward_by_chunks<float>(lo, hi, batch, DELTA_TASK, starts, gy, grad_last, gstate, gx, copies,
                                    gdecay, gbeta);
}

API delta_backward_bf16(I lo, I hi, I, I batch, DELTA, const bf16 *starts, const bf16 *gy,
                        const float *grad_last, float *gstate, bf16 *gx, float *copies, float *gdecay,
                        float *gbeta) {
    delta_backward_by_chunks<bf16>(lo, hi, batch, DELTA_TASK, starts, gy, grad_last, gstate, gx, copies,
                                   gdecay, gbeta);
}

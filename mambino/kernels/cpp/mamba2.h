// Mamba-2: state-space duality. Items are parts of a group's heads, all sequences' in one row; a
// state is (N, P) while it is worked with, (P, N) where it comes from and goes to.
//
// s = sums of dt A in a chunk; W[i][j] = C_i B_j exp(s_i - s_j), j <= i
// y = W (dt x) + exp(s) C h + D x; h' = exp(s_end) h + B (exp(s_end - s) dt x)
//
// T is what x, B, C, dt's raw values and y are kept as, fp32 or bf16; `number` what products take
// (products.h); dt, the sums, the decay, states and all that is added up are fp32 or fp64.
#pragma once
#include <algorithm>

#include "decays.h"
#include "products.h"

struct Ssd {  // a task: x has rows of [x (H, P), B (G, N), C (G, N)], sx apart; raw ones of (H), sr
    I T, H, G, P, N, Q, parts;  // a group's heads are `parts` items
    const void *x;
    I sx;
    const void *raw;
    I sr;
    const float *bias, *A, *D;

    I heads() const { return H / G / parts; }
    I chunks() const { return (T + Q - 1) / Q; }
};

// the states of a sequence's heads from `first`, or their gradients, (P, N) each, as (N, P); zeros
// where there are none
static void turn_states(const Ssd &m, I b, I first, const float *from, float *to) {
    I size = m.N * m.P;
    for (I i = 0; i < m.heads(); i++) {
        if (from)
            transpose(to + i * size, m.P, from + (b * m.H + first + i) * size, m.N, m.P, m.N, m.P);
        else
            std::fill_n(to + i * size, size, 0.f);
    }
}

template <class T>
struct Chunk : Decays {  // what both passes need of a chunk, for one head
    typedef typename Operands<T>::number number;
    typedef typename Operands<T>::unit unit;
    I q, Q, P, N;
    std::vector<float> raw, dt, slope, S, decay;
    std::vector<number> B, C, W, xdt, xe;
    std::vector<unit> BT;
    std::vector<unit> Broom, Croom, Wroom, room;  // for what is stacked
    const unit *stacked_B;

    Chunk(I Q, I P, I N)
        : Decays(Q), Q(Q), P(P), N(N), raw(Q), dt(Q), slope(Q), S(Q * Q), decay(Q * Q), B(Q * N),
          C(Q * N), W(Q * Q), xdt(Q * P), xe(Q * P), BT(N * Q), Broom(Q * N), Croom(Q * N),
          Wroom(Q * Q), room(std::max(Q, N) * P) {}

    static const unit *units(const std::vector<number> &rows) { return (const unit *)rows.data(); }

    void group(I tokens, const T *rows_B, const T *rows_C, I sx) {
        I K = N / PER<unit>;
        q = tokens;
        gather(B.data(), rows_B, sx, q, N);
        gather(C.data(), rows_C, sx, q, N);
        stacked_B = stacked(Broom, B.data(), q, N);
        transpose(BT.data(), Q, units(B), K, q, K, Q);
        gemm(q, Q, N, S.data(), Q, units(C), K, 1, BT.data(), Q, 0, CAUSAL);
    }

    // prefetches `next`, the rows of the next head
    void head(const T *x, const T *next, I sx, const T *r, I sr, float bias, float A) {
        for (I i = 0; i < q; i++)
            raw[i] = value(r[i * sr]) + bias;
        for (I i = 0; i < Q; i += L) {
            vec derivative;
            store(&dt[i], softplus(load(&raw[i]), derivative));
            store(&slope[i], derivative);
        }
        double total = 0;
        for (I i = 0; i < q; i++)
            s[i] = total += (double)dt[i] * A;
        add_up(q);
        each(q, [&](I i, I j, vec d) {  // exp(s_i - s_j) and W; above the diagonal both stay 0
            if (i < j + L)
                d = LANE + (int)j <= (int)i ? d : vec{};
            store(&decay[i * Q + j], d);
            store(&W[i * Q + j], d * load(&S[i * Q + j]));
        });
        for (I i = 0; i < q; i++) {
            prefetch(next + i * sx, P);
            for (I p = 0; p < P; p += L) {
                vec v = load(x + i * sx + p) * dt[i];
                store(&xdt[i * P + p], v);
                store(&xe[i * P + p], v * to_end[i]);
            }
        }
    }
};

// state (B, H, P, N), null for zeros → y, the last state, and for the backward pass, unless null,
// starts (B, H, chunks, N, P): the state before each chunk
template <class T>
static void forward_by_chunks(I lo, I hi, Ssd m, const float *state, T *starts, T *y, float *last) {
    typedef typename Chunk<T>::number number;
    typedef typename Chunk<T>::unit unit;
    Flush flush;
    I P = m.P, N = m.N, Q = m.Q, size = N * P, heads = m.heads();
    Chunk<T> k(Q, P, N);
    std::vector<float> h(heads * size), out(Q * P);
    std::vector<number> rounded(size);
    for (I item = lo; item < hi; item++) {
        I b = item / (m.G * m.parts), g = item / m.parts % m.G;
        I first = item % (m.G * m.parts) * heads;
        turn_states(m, b, first, state, h.data());
        for (I c = 0; c < m.chunks(); c++) {
            I token = b * m.T + c * Q;
            const T *row = (const T *)m.x + token * m.sx;
            const T *B = row + m.H * P + g * N;
            k.group(std::min(Q, m.T - c * Q), B, B + m.G * N, m.sx);
            for (I i = 0; i < heads; i++) {
                I e = first + i;
                float *now = &h[i * size];
                const T *x = row + e * P;
                const T *raw = (const T *)m.raw + token * m.sr + e;
                k.head(x, x + P, m.sx, raw, m.sr, m.bias[e], m.A[e]);
                if (starts) {
                    T *start = starts + ((b * m.H + e) * m.chunks() + c) * size;
                    for (I j = 0; j < size; j += L)
                        store(start + j, load(now + j));
                }
                const number *operand = as_numbers(rounded, now, size);
                gemm(k.q, P, N, out.data(), P, k.units(k.C), N / PER<unit>, 1,
                     stacked(k.room, operand, N, P), P);
                for (I t = 0; t < k.q; t++) {
                    for (I p = 0; p < P; p += L)
                        store(&out[t * P + p], load(&out[t * P + p]) * k.grow[t] +
                                                   load(x + t * m.sx + p) * m.D[e]);
                }
                gemm(k.q, P, k.q, out.data(), P, k.units(k.W), Q / PER<unit>, 1,
                     stacked(k.room, k.xdt.data(), k.q, P), P, 1, LOWER);
                for (I t = 0; t < k.q; t++)
                    for (I p = 0; p < P; p += L)
                        store(y + ((token + t) * m.H + e) * P + p, load(&out[t * P + p]));
                gemm(N, P, k.q, now, P, k.stacked_B, 1, N, stacked(k.room, k.xe.data(), k.q, P), P,
                     k.kept);
            }
        }
        for (I i = 0; i < heads; i++)
            transpose(last + (b * m.H + first + i) * size, N, &h[i * size], P, N, P, N);
    }
}

// grad_last: the gradient of the last state, null for zeros; gstate: of the first, unless null. gx
// has rows as x, without gaps; where a group's heads are several items, each has B's and C's part of
// it in a copy of its own, gBC
template <class T>
static void backward_by_chunks(I lo, I hi, I batch, Ssd m, const T *starts, const T *gy,
                         const float *grad_last, float *gstate, T *gx, float *gBC, float *graw,
                         float *gA, float *gD) {
    typedef typename Chunk<T>::number number;
    typedef typename Chunk<T>::unit unit;
    Flush flush;
    I P = m.P, N = m.N, Q = m.Q, size = N * P, heads = m.heads();
    I KP = P / PER<unit>, KN = N / PER<unit>, KQ = Q / PER<unit>, width = m.H * P + 2 * m.G * N;
    Chunk<T> k(Q, P, N);
    std::vector<float> gW(Q * Q), gS(Q * Q), gu(Q * P), BG(Q * P), gB(N * Q), gC(N * Q), one(N * Q),
        v(Q), products(Q), gh(heads * size), sums(Q * N), turned(Q * N);
    std::vector<number> grad(Q * P), ge(Q * P), gS_rounded(Q * Q), G(size), start(size);
    std::vector<unit> across(KP * Q), CT(KQ * N);
    std::vector<double> gs(Q);
    for (I item = lo; item < hi; item++) {
        I b = item / (m.G * m.parts), g = item / m.parts % m.G;
        I first = item % (m.G * m.parts) * heads;
        turn_states(m, b, first, grad_last, gh.data());
        for (I c = m.chunks() - 1; c >= 0; c--) {
            I token = b * m.T + c * Q;
            const T *row = (const T *)m.x + token * m.sx;
            const T *B = row + m.H * P + g * N;
            k.group(std::min(Q, m.T - c * Q), B, B + m.G * N, m.sx);
            I q = k.q;
            const unit *stacked_C = stacked(k.Croom, k.C.data(), q, N);
            transpose(CT.data(), KQ, stacked_C, N, up(q, PER<unit>) / PER<unit>, N, KQ);
            std::fill(gS.begin(), gS.end(), 0.f);
            std::fill(gB.begin(), gB.end(), 0.f);
            std::fill(gC.begin(), gC.end(), 0.f);
            for (I i = 0; i < heads; i++) {
                I e = first + i;
                const T *x = row + e * P;
                float *G_ = &gh[i * size];
                const number *now = as_numbers(
                    start, starts + ((b * m.H + e) * m.chunks() + c) * size, size);
                const T *raw = (const T *)m.raw + token * m.sr + e;
                k.head(x, x + P, m.sx, raw, m.sr, m.bias[e], m.A[e]);
                gather(grad.data(), gy + (token * m.H + e) * P, m.H * P, q, P);
                std::fill(gs.begin(), gs.end(), 0.);
                // inside the chunk: of W, of S = C B^T and of the sums
                transpose(across.data(), Q, k.units(k.xdt), KP, q, KP, Q);
                gemm(q, Q, P, gW.data(), Q, k.units(grad), KP, 1, across.data(), Q, 0, CAUSAL);
                for (I t = 0; t < q; t++) {
                    prefetch(gy + ((token + t) * m.H + e + 1) * P, P);  // the next head's
                    for (I j = 0; j <= t; j += L) {
                        vec d = load(&gW[t * Q + j]);
                        d = LANE + (int)j <= (int)t ? d : vec{};
                        store(&products[j], d * load(&k.W[t * Q + j]));
                        add(&gS[t * Q + j], d * load(&k.decay[t * Q + j]));
                    }
                    count(t, products, gs);
                }
                gemm(q, P, q, gu.data(), P, stacked(k.Wroom, k.W.data(), q, Q), 1, Q,
                     stacked(k.room, grad.data(), q, P), P, 0, UPPER);
                // by way of the state the chunk leaves
                const number *G_now = as_numbers(G, G_, size);
                gemm(q, P, N, BG.data(), P, k.units(k.B), KN, 1, stacked(k.room, G_now, N, P), P);
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
                transpose(across.data(), Q, k.units(k.xe), KP, q, KP, Q);
                gemm(N, Q, P, gB.data(), Q, (const unit *)G_now, KP, 1, across.data(), Q, 1);
                // by way of the state it starts from
                for (I t = 0; t < q; t++)
                    for (I p = 0; p < P; p += L)
                        store(&ge[t * P + p], load(&grad[t * P + p]) * k.grow[t]);
                transpose(across.data(), Q, k.units(ge), KP, q, KP, Q);
                gemm(N, Q, P, one.data(), Q, (const unit *)now, KP, 1, across.data(), Q);
                std::fill(v.begin(), v.end(), 0.f);
                for (I j = 0; j < Q; j += L) {
                    vec total{};
                    for (I n = 0; n < N; n++) {
                        vec w = load(&one[n * Q + j]);
                        total += w * load((const number *)CT.data() + n * Q + j);
                        add(&gC[n * Q + j], w);
                    }
                    store(&v[j], total);
                }
                vec dots[4]{};
                for (I j = 0; j < size; j += 4 * L)
                    for (I l = 0; l < 4; l++)
                        dots[l] += load(G_ + j + l * L) * load(now + j + l * L);
                last_sum += sum(dots[0] + dots[1] + (dots[2] + dots[3])) * k.kept;
                gemm(N, P, q, G_, P, stacked_C, 1, N, stacked(k.room, ge.data(), q, P), P, k.kept);
                // x, dt, A, D
                double later = last_sum;
                vec skip{};
                for (I t = q - 1; t >= 0; t--) {
                    later += gs[t] + v[t];
                    vec dt{};
                    for (I p = 0; p < P; p += L) {
                        vec u = load(&gu[t * P + p]);
                        vec xt = load(x + t * m.sx + p);
                        vec d = load(&grad[t * P + p]);
                        dt += u * xt;
                        skip += d * xt;
                        store(gx + (token + t) * width + e * P + p, u * k.dt[t] + d * m.D[e]);
                    }
                    graw[(token + t) * m.H + e] =
                        (sum(dt) + m.A[e] * later) * k.slope[t];
                    gA[b * m.H + e] += later * k.dt[t];
                }
                gD[b * m.H + e] += sum(skip);
            }
            const number *gS_now = as_numbers(gS_rounded, gS.data(), Q * Q);
            const unit *gS_rows = (const unit *)gS_now;
            const unit *gS_across = stacked(k.Wroom, gS_now, q, Q);
            for (I n = 0; n < 2; n++) {  // of B, and of C
                if (n == 0)
                    gemm(q, N, q, sums.data(), N, gS_across, 1, Q, stacked_C, N, 0, UPPER);
                else
                    gemm(q, N, q, sums.data(), N, gS_rows, KQ, 1, k.stacked_B, N, 0, LOWER);
                transpose(turned.data(), N, n ? gC.data() : gB.data(), Q, N, Q, N);
                for (I t = 0; t < q; t++) {
                    T *to = gx + (token + t) * width + m.H * P + (n * m.G + g) * N;
                    I tokens = item % m.parts * batch * m.T + token + t;
                    float *copy = gBC + ((tokens * 2 + n) * m.G + g) * N;
                    for (I j = 0; j < N; j += L) {
                        vec w = load(&sums[t * N + j]) + load(&turned[t * N + j]);
                        if (gBC)
                            store(copy + j, w);
                        else
                            store(to + j, w);
                    }
                }
            }
        }
        for (I i = 0; gstate && i < heads; i++)
            transpose(gstate + (b * m.H + first + i) * size, N, &gh[i * size], P, N, P, N);
    }
}

#define SSD                                                                                        \
    I T, I H, I G, I P, I N, I Q, I parts, const void *x, I sx, const void *raw, I sr,             \
        const float *bias, const float *A, const float *D
#define TASK {T, H, G, P, N, Q, parts, x, sx, raw, sr, bias, A, D}

API ssd_forward(I lo, I hi, I, SSD, const float *state, float *starts, float *y, float *last) {
    forward_by_chunks<float>(lo, hi, TASK, state, starts, y, last);
}

API ssd_forward_bf16(I lo, I hi, I, SSD, const float *state, bf16 *starts, bf16 *y, float *last) {
    forward_by_chunks<bf16>(lo, hi, TASK, state, starts, y, last);
}

API ssd_backward(I lo, I hi, I, I batch, SSD, const float *starts, const float *gy,
                 const float *grad_last, float *gstate, float *gx, float *gBC, float *graw,
                 float *gA, float *gD) {
    backward_by_chunks<float>(lo, hi, batch, TASK, starts, gy, grad_last, gstate, gx, gBC, graw, gA,
                              gD);
}

API ssd_backward_bf16(I lo, I hi, I, I batch, SSD, const bf16 *starts, const bf16 *gy,
                      const float *grad_last, float *gstate, bf16 *gx, float *gBC, float *graw,
                      float *gA, float *gD) {
    backward_by_chunks<bf16>(lo, hi, batch, TASK, starts, gy, grad_last, gstate, gx, gBC, graw, gA,
                             gD);
}

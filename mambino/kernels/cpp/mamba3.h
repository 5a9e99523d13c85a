// Mamba-3: a state that turns, in chunks as Mamba-2 (mamba2.h). Items are parts of a group's heads; a
// state is (N, P) while it is worked with, (P, N) where it comes from and goes to.
//
// y = W (s x) + exp(s) q h + gamma (q k of the own token) x + D x; h' = exp(s_end) h + k (exp(s_end - s) s x)
//
// T is what x, B, C and y are kept as, fp32 or bf16; `number` what products take (products.h); the
// rest is fp32, sums of decays and turns fp64.
#pragma once
#include "mamba3_chunk.h"

// state (B, H, P, N), null for zeros, turns (B, H, A), which are changed → y (B, T, R, H, P), the last
// state, and for the backward pass, unless null, of each chunk the state before it, starts (B, H,
// chunks, N, P), and the turns before it (B, H, chunks, A)
template <class T>
static void mamba3_by_chunks(I lo, I hi, Mamba3 m, const float *state, double *turns, T *starts,
                             double *start_turns, T *y, float *last) {
    typedef typename Turned<T>::number number;
    typedef typename Turned<T>::unit unit;
    Flush flush;
    I P = m.P, N = m.N, R = m.R, size = N * P, heads = m.heads(), A = m.angles();
    Turned<T> k(m);
    I Q = k.Q;
    std::vector<float> h(heads * size), out(Q * P), bias_B(heads * R * N), bias_C(heads * R * N);
    std::vector<number> room(size);
    std::vector<double> turn(heads * A);
    for (I item = lo; item < hi; item++) {
        I b = item / (m.G * m.parts), g = item / m.parts % m.G;
        I first = item % (m.G * m.parts) * heads;
        m.take_states(b, first, state, h.data());
        m.take_biases(first, bias_B.data(), bias_C.data());
        for (I i = 0; i < heads; i++)
            std::copy_n(turns + (b * m.H + first + i) * m.A, m.A, &turn[i * A]);
        for (I c = 0; c < m.chunks(); c++) {
            I token = b * m.T + c * m.tokens;
            k.group(std::min(m.tokens, m.T - c * m.tokens), token, g);
            for (I i = 0; i < heads; i++) {
                I e = first + i;
                float *now = &h[i * size];
                if (starts) {
                    I chunk = (b * m.H + e) * m.chunks() + c;
                    std::copy_n(&turn[i * A], m.A, start_turns + chunk * m.A);
                    for (I j = 0; j < size; j += L)
                        store(starts + chunk * size + j, load(now + j));
                }
                k.head(token, e, &turn[i * A], &bias_B[i * R * N], &bias_C[i * R * N]);
                const number *operand = as_numbers(room, now, size);
                gemm(k.q, P, N, out.data(), P, k.units(k.qs), N / PER<unit>, 1,
                     stacked(k.room, operand, N, P), P);
                for (I t = 0; t < k.q; t++) {
                    float gamma = m.gamma[(token + t / R) * m.H + e];
                    for (I p = 0; p < P; p += L)
                        store(&out[t * P + p],
                              load(&out[t * P + p]) * k.grow[t] + load(&k.X[t * P + p]) * m.D[e]);
                    for (I j = k.own(t); j < k.own(t) + R; j++)
                        for (I p = 0; p < P; p += L)
                            add(&out[t * P + p], load(&k.X[j * P + p]) * (gamma * k.S[t * Q + j]));
                }
                gemm(k.q, P, k.q, out.data(), P, k.units(k.W), Q / PER<unit>, 1,
                     stacked(k.room, k.xs.data(), k.q, P), P, 1, LOWER);
                for (I t = 0; t < k.q; t++)
                    for (I p = 0; p < P; p += L)
                        store(y + ((token * R + t) * m.H + e) * P + p, load(&out[t * P + p]));
                gemm(N, P, k.q, now, P, k.stacked_k, 1, N, stacked(k.room, k.xe.data(), k.q, P), P,
                     k.kept);
            }
        }
        for (I i = 0; i < heads; i++)
            std::copy_n(&turn[i * A], m.A, turns + (b * m.H + first + i) * m.A);
        m.give_states(b, first, h.data(), last);
    }
}

struct Mamba3Grads {  // of states and turns, null for zeros; what is asked for, zeros before where it is added to
    const float *last;     // (B, H, P, N)
    double *turns;         // (B, H, A): of the last turns, then of the first
    float *state, *x;      // (B, H, P, N), null if not asked for; (B, T, H, P)
    float *B, *C, *rate;   // a copy for each of G's parts: (parts, B, T, R, G, N) twice, (G parts, B, T, A)
    float *a, *s, *gamma, *dt;                   // (B, T, H)
    float *B_bias, *C_bias, *D, *mimo;  // (B, H, R, N) twice, (B, H), (B, H, R, P) or null
};

template <class T>
struct Mamba3Backward {
    typedef typename Turned<T>::number number;
    typedef typename Turned<T>::unit unit;
    const Mamba3 &m;
    const Mamba3Grads &to;
    I R, P, N, A, Q, KP, KN, KQ;
    Turned<T> k;
    std::vector<float> gW, gS, gu, gX, kG, gk, gq, gB, gC, own, products;
    std::vector<number> grad, ge, gS_rounded, G_room, start_room;
    std::vector<unit> across, GT, startT, Wroom, qroom;
    std::vector<double> gs;
    I e, token;  // where this head and chunk are

    Mamba3Backward(const Mamba3 &m, const Mamba3Grads &to)
        : m(m), to(to), R(m.R), P(m.P), N(m.N), A(m.angles()), Q(m.rows()), KP(P / PER<unit>),
          KN(N / PER<unit>), KQ(Q / PER<unit>), k(m), gW(Q * Q), gS(Q * Q), gu(Q * P), gX(Q * P),
          kG(Q * P), gk(Q * N), gq(Q * N), gB(Q * N), gC(Q * N), own(Q * R), products(Q), grad(Q * P), ge(Q * P),
          gS_rounded(Q * Q), G_room(N * P), start_room(N * P), across(KP * Q), GT(KP * N),
          startT(KP * N), Wroom(Q * Q), qroom(Q * N), gs(Q) {}

    const unit *units(const std::vector<number> &rows) const { return (const unit *)rows.data(); }

    // inside the chunk: of W, of S = q k^T and of the sums
    void inside() {
        I q = k.q;
        std::fill(gs.begin(), gs.end(), 0.);
        transpose(across.data(), Q, k.units(k.xs), KP, q, KP, Q);
        gemm(q, Q, P, gW.data(), Q, units(grad), KP, 1, across.data(), Q, 0, CAUSAL);
        for (I t = 0; t < q; t++) {
            for (I j = 0; j <= t; j += L) {
                vec d = k.earlier(t, j, load(&gW[t * Q + j]));
                store(&products[j], d * load(&k.W[t * Q + j]));
                store(&gS[t * Q + j], d * load(&k.decay[t * Q + j]));
            }
            count(t, products, gs);
        }
        gemm(q, P, q, gu.data(), P, stacked(Wroom, k.W.data(), q, Q), 1, Q,
             stacked(k.room, grad.data(), q, P), P, 0, UPPER);
    }

    // of each token's own input. Its q k turns with none: what they have of it is kept for later
    void own_tokens() {
        std::fill(gX.begin(), gX.end(), 0.f);
        double skip = 0;
        for (I first = 0; first < k.q; first += R) {
            I place = (token + first / R) * m.H + e;
            float gamma = m.gamma[place], total = 0;
            for (I t = first; t < first + R; t++) {
                for (I j = first; j < first + R; j++) {
                    float weight = gamma * k.S[t * Q + j] + (t == j ? m.D[e] : 0);
                    vec dot{};
                    for (I p = 0; p < P; p += L) {
                        vec d = load(&grad[t * P + p]);
                        dot += d * load(&k.X[j * P + p]);
                        add(&gX[j * P + p], d * weight);
                    }
                    float d = sum(dot);
                    total += d * k.S[t * Q + j];
                    skip += t == j ? d : 0;
                    own[t * R + j - first] = d * gamma;
                }
            }
            to.gamma[place] = total;
        }
        to.D[token / m.T * m.H + e] += skip;
    }

    // by way of the state the chunk leaves, whose gradient is G, and of that it starts from. Returns
    // what the sum of the log-decays has of both
    double by_states(float *G, const T *start) {
        I q = k.q, size = N * P;
        const number *G_now = as_numbers(G_room, G, size), *now = as_numbers(start_room, start, size);
        transpose(GT.data(), N, (const unit *)G_now, KP, N, KP, N);
        transpose(startT.data(), N, (const unit *)now, KP, N, KP, N);
        gemm(q, P, N, kG.data(), P, k.units(k.k), KN, 1, stacked(k.room, G_now, N, P), P);
        double last = 0;
        for (I t = 0; t < q; t++) {
            vec dot{};
            for (I p = 0; p < P; p += L) {
                vec w = load(&kG[t * P + p]);
                dot += w * load(&k.xe[t * P + p]);
                add(&gu[t * P + p], w * k.to_end[t]);
                store(&ge[t * P + p], load(&grad[t * P + p]) * k.grow[t]);
            }
            float d = sum(dot);
            last += d;
            gs[t] -= d;
        }
        gemm(q, N, P, gk.data(), N, k.units(k.xe), KP, 1, GT.data(), N);
        gemm(q, N, P, gq.data(), N, units(ge), KP, 1, startT.data(), N);
        for (I t = 0; t < q; t++) {
            vec dot{};
            for (I n = 0; n < N; n += L)
                dot += load(&gq[t * N + n]) * load(&k.qs[t * N + n]);
            gs[t] += sum(dot);
        }
        vec dots[4]{};
        for (I j = 0; j < size; j += 4 * L)
            for (I l = 0; l < 4; l++)
                dots[l] += load(G + j + l * L) * load(now + j + l * L);
        last += sum(dots[0] + dots[1] + (dots[2] + dots[3])) * k.kept;
        return last;
    }

    // of k and q, turned, and of the state's gradient before the chunk
    void columns(float *G) {
        I q = k.q;
        const unit *stacked_q = stacked(qroom, k.qs.data(), q, N);
        const number *gS_now = as_numbers(gS_rounded, gS.data(), Q * Q);
        gemm(q, N, q, gq.data(), N, (const unit *)gS_now, KQ, 1, k.stacked_k, N, 1, LOWER);
        gemm(q, N, q, gk.data(), N, stacked(Wroom, gS_now, q, Q), 1, Q, stacked_q, N, 1, UPPER);
        gemm(N, P, q, G, P, stacked_q, 1, N, stacked(k.room, ge.data(), q, P), P, k.kept);
    }

    // of x, mimo_x, the log-decays and the weights of inputs
    void inputs(double later) {
        I b = token / m.T;
        for (I t = k.tokens - 1; t >= 0; t--) {
            I place = (token + t) * m.H + e;
            float s = m.s[place];
            const T *x = (const T *)m.x + (token + t) * m.sx + e * P;
            float *gx = to.x + place * P;
            vec weight{};
            for (I r = 0; r < R; r++) {
                I i = t * R + r;
                later += gs[i];
                for (I p = 0; p < P; p += L) {
                    vec u = load(&gu[i * P + p]);
                    vec d = u * s + load(&gX[i * P + p]);
                    weight += u * load(&k.X[i * P + p]);
                    if (m.mimo) {
                        add(to.mimo + ((b * m.H + e) * R + r) * P + p, d * load(x + p));
                        d *= load(m.mimo + (e * R + r) * P + p);
                    }
                    store(gx + p, r ? load(gx + p) + d : d);
                }
            }
            to.s[place] = sum(weight);
            to.a[place] = later;
        }
    }

    // turns k's and q's gradients back, into those of B, C and their biases; of the turns: `turns` has
    // the gradient of those after the chunk, then of those before it
    void turned(double *turns, float *grad_rate, float *bias_B, float *bias_C) {
        std::vector<float> angles(A);
        for (I t = k.tokens - 1; t >= 0; t--) {
            std::fill(angles.begin(), angles.end(), 0.f);
            for (I i = t * R; i < (t + 1) * R; i++) {
                I first = k.own(i);
                back(i, k.k, &gk[i * N], k.qs, &own[first * R + i - first], R, &gB[i * N], bias_B, angles.data());
                back(i, k.qs, &gq[i * N], k.k, &own[i * R], 1, &gC[i * N], bias_C, angles.data());
            }
            float dt = m.dt[(token + t) * m.H + e];
            const float *rate = m.rate + (token + t) * m.A;
            float *to_rate = grad_rate + (token + t) * m.A;
            double total = 0;
            for (I a = 0; a < m.A; a++) {
                turns[a] += angles[a];
                total += turns[a] * rate[a];
                to_rate[a] += turns[a] * dt;
            }
            to.dt[(token + t) * m.H + e] = total;
        }
    }

    // row i's gradient g, but for what it has of its own token: `weights`, `step` apart, of the others
    void back(I i, const std::vector<number> &rows, const float *g, const std::vector<number> &others,
              const float *weights, I step, float *sums, float *bias, float *angles) const {
        const float *c = &k.cosine[i / R * A], *s = &k.sine[i / R * A];
        const number *row = &rows[i * N], *other = &others[k.own(i) * N];
        I half = N / 2;
        bias += i % R * N;
        for (I n = 0; n < half; n += L) {
            vec u = load(g + n), v = load(g + half + n);
            if (n < A)
                add(angles + n, load(row + n) * v - load(row + half + n) * u);
            for (I r = 0; r < R; r++) {
                u += load(other + r * N + n) * weights[r * step];
                v += load(other + r * N + half + n) * weights[r * step];
            }
            if (n < A) {
                vec w = u;
                u = w * load(c + n) + v * load(s + n);
                v = v * load(c + n) - w * load(s + n);
            }
            add(sums + n, u);
            add(sums + half + n, v);
            add(bias + n, u);
            add(bias + half + n, v);
        }
    }
};

template <class T>
static void mamba3_gradients(I lo, I hi, I batch, Mamba3 m, const T *starts, const double *start_turns,
                             const T *gy, Mamba3Grads to) {
    typedef typename Turned<T>::number number;
    Flush flush;
    I P = m.P, N = m.N, R = m.R, size = N * P, heads = m.heads(), A = m.angles(), biases = R * N;
    Mamba3Backward<T> w(m, to);
    std::vector<float> gh(heads * size), bias_B(heads * biases), bias_C(heads * biases),
        grad_B(heads * biases), grad_C(heads * biases);
    std::vector<double> turns(heads * A), turn(A);
    for (I item = lo; item < hi; item++) {
        I b = item / (m.G * m.parts), g = item / m.parts % m.G;
        I first = item % (m.G * m.parts) * heads;
        m.take_states(b, first, to.last, gh.data());
        m.take_biases(first, bias_B.data(), bias_C.data());
        std::fill(grad_B.begin(), grad_B.end(), 0.f);
        std::fill(grad_C.begin(), grad_C.end(), 0.f);
        for (I i = 0; i < heads; i++)
            std::copy_n(to.turns + (b * m.H + first + i) * m.A, m.A, &turns[i * A]);
        for (I c = m.chunks() - 1; c >= 0; c--) {
            I token = w.token = b * m.T + c * m.tokens;
            w.k.group(std::min(m.tokens, m.T - c * m.tokens), token, g);
            std::fill(w.gB.begin(), w.gB.end(), 0.f);
            std::fill(w.gC.begin(), w.gC.end(), 0.f);
            for (I i = 0; i < heads; i++) {
                I e = w.e = first + i;
                I chunk = (b * m.H + e) * m.chunks() + c;
                std::copy_n(start_turns + chunk * m.A, m.A, turn.data());
                std::fill(turn.begin() + m.A, turn.end(), 0.);
                w.k.head(token, e, turn.data(), &bias_B[i * biases], &bias_C[i * biases]);
                gather(w.grad.data(), gy + (token * R * m.H + e) * P, m.H * P, w.k.q, P);
                w.inside();
                w.own_tokens();
                double last = w.by_states(&gh[i * size], starts + chunk * size);
                w.columns(&gh[i * size]);
                w.inputs(last);
                w.turned(&turns[i * A], to.rate + item % (m.G * m.parts) * batch * m.T * m.A,
                         &grad_B[i * biases], &grad_C[i * biases]);
            }
            for (I i = 0; i < w.k.q; i++) {
                I row = (((item % m.parts * batch * m.T + token) * R + i) * m.G + g) * N;
                m.give(to.B + row, &w.gB[i * N]);
                m.give(to.C + row, &w.gC[i * N]);
            }
        }
        for (I i = 0; i < heads; i++) {
            I e = b * m.H + first + i;
            std::copy_n(&turns[i * A], m.A, to.turns + e * m.A);
            for (I r = 0; r < R; r++) {
                m.give(to.B_bias + (e * R + r) * N, &grad_B[(i * R + r) * N]);
                m.give(to.C_bias + (e * R + r) * N, &grad_C[(i * R + r) * N]);
            }
        }
        if (to.state)
            m.give_states(b, first, gh.data(), to.state);
    }
}

#define MAMBA3                                                                                     \
    I T, I R, I H, I G, I P, I N, I A, I tokens, I parts, I interleaved, const void *x, I sx,      \
        const void *B, const void *C, const float *a, const float *s, const float *gamma,          \
        const float *dt, const float *rate, const float *B_bias, const float *C_bias,              \
        const float *D, const float *mimo
#define MAMBA3_TASK                                                                                \
    {T, R, H, G, P, N, A, tokens, parts, interleaved, x, sx, B, C, a, s, gamma, dt, rate, B_bias, C_bias, D, mimo}
#define MAMBA3_GRADS                                                                               \
    const float *last, double *turns, float *gstate, float *gx, float *gB, float *gC,              \
        float *grate, float *ga, float *gs, float *ggamma, float *gdt, float *gB_bias,             \
        float *gC_bias, float *gD, float *gmimo
#define MAMBA3_TO                                                                                  \
    {last, turns, gstate, gx, gB, gC, grate, ga, gs, ggamma, gdt, gB_bias, gC_bias, gD, gmimo}

#define MAMBA3_OF(kind, X)                                                                         \
    API mamba3_forward##kind(I lo, I hi, I, MAMBA3, const float *state, double *turns, X *starts,  \
                             double *start_turns, X *y, float *last) {                             \
        mamba3_by_chunks<X>(lo, hi, MAMBA3_TASK, state, turns, starts, start_turns, y, last);      \
    }                                                                                              \
    API mamba3_backward##kind(I lo, I hi, I, I batch, MAMBA3, const X *starts,                     \
                              const double *start_turns, const X *gy, MAMBA3_GRADS) {              \
        mamba3_gradients<X>(lo, hi, batch, MAMBA3_TASK, starts, start_turns, gy, MAMBA3_TO);       \
    }
MAMBA3_OF(, float)
MAMBA3_OF(_bf16, bf16)

// One token of each of a few sequences by a Mamba-3's mixer; precision as in steps.h. Beside native.cpp's
// letters: R rank of B and C, A angles.
#pragma once
#include <algorithm>

#include "matrices.h"
#include "states.h"

constexpr float PI = 3.14159265f;
constexpr int MOST_RANKS = 16;

static inline vec tanhv(vec x) {
    vec x2 = x * x;
    vec p = all(2.1869488e-2f);
    p = p * x2 - 5.3968254e-2f;
    p = p * x2 + 1.3333333e-1f;
    p = p * x2 - 3.3333333e-1f;
    vec near_zero = x + x * x2 * p;
    vec far = 2.f * sigmoid(2.f * x) - 1.f;
    return x2 < 0.09f ? near_zero : far;
}

// turn (A) goes on by rate (A) times dt; the cosines and sines by which `turned` turns: of neighbours
// (interleaved) 2 A each, or else A
static inline void go_on_turning(I A, bool interleaved, const float *rate, float dt, double *turn,
                                 float *cosine, float *sine) {
    float angle[L];
    for (I j = 0; j < A; j += L) {
        int n = std::min<I>(L, A - j);
        for (int l = 0; l < n; l++) {
            double sum = turn[j + l] + (double)rate[j + l] * dt;
            sum -= std::floor(sum / TAU) * TAU;
            turn[j + l] = sum;
            angle[l] = sum;
        }
        vec s, c;
        sincos(load(angle, n), s, c);
        for (int l = 0; l < n; l++) {
            if (interleaved) {
                I i = 2 * (j + l);
                cosine[i] = cosine[i + 1] = c[l];
                sine[i] = -s[l];
                sine[i + 1] = s[l];
            } else {
                cosine[j + l] = c[l];
                sine[j + l] = s[l];
            }
        }
    }
}

template <int... l>
static inline vec neighbours(vec v, std::integer_sequence<int, l...>) {  // 1, 0, 3, 2, …
#ifdef __clang__
    return __builtin_shufflevector(v, v, (l ^ 1)...);
#else
    return __builtin_shuffle(v, ivec{(l ^ 1)...});
#endif
}

// x (N), of whose channels A pairs are turned: (2 i, 2 i + 1) if interleaved, or (i, i + N / 2)
static inline void turned(I N, I A, bool interleaved, const float *cosine, const float *sine,
                          float *x) {
    if (interleaved) {
        for (I i = 0; i < 2 * A; i += L) {
            int n = std::min<I>(L, 2 * A - i);
            vec v = load(x + i, n);
            vec other = neighbours(v, std::make_integer_sequence<int, L>());
            store(x + i, v * load(cosine + i, n) + other * load(sine + i, n), n);
        }
        return;
    }
    for (I i = 0; i < A; i += L) {
        int n = std::min<I>(L, A - i);
        vec a = load(x + i, n);
        vec b = load(x + N / 2 + i, n);
        vec c = load(cosine + i, n);
        vec s = load(sine + i, n);
        store(x + i, a * c - b * s, n);
        store(x + N / 2 + i, a * s + b * c, n);
    }
}

// 1 / rms of x (n), a multiple of L
static inline float inverse_rms(I n, const float *x, float eps) {
    vec square{};
    for (I i = 0; i < n; i += L)
        square += load(x + i) * load(x + i);
    return 1 / std::sqrt(sum(square) / n + eps);
}

// h (P, N) of a head = decay h + the sum of in[j] (P) keys[j] (N), j < 2 ranks; y[r] (P) = h queries[r],
// r < ranks, in one pass over h. R: ranks, 0 for any; keys and queries for bf16 `even_first`
template <int R, class T>
static inline void head_of_ranks(I P, I N, int ranks, float decay, const float *in,
                                 const float *keys, const float *queries, T *h, float *y) {
    constexpr int SIZE = R ? R : MOST_RANKS;
    ranks = R ? R : ranks;
    for (I p = 0; p < P; p += L) {
        vec s[SIZE][L];
        for (int l = 0; l < L; l++) {
            T *state = h + (p + l) * N;
            float factors[2 * SIZE];
            for (int j = 0; j < 2 * ranks; j++)
                factors[j] = in[j * P + p + l];
            vec even[SIZE]{}, odd[SIZE]{};
            I n = 0;
            for (; n + 2 * L <= N; n += 2 * L) {
                for (I i = 0; i < 2 * L; i += 64 / sizeof(T))
                    __builtin_prefetch((char *)(state + n + i) + AHEAD, 1, 2);
                vec a, b;
                get(state + n, a, b);
                a *= decay;
                b *= decay;
#pragma GCC unroll 8
                for (int j = 0; j < 2 * ranks; j++) {
                    a += as<vec>(keys + j * N + n) * factors[j];
                    b += as<vec>(keys + j * N + n + L) * factors[j];
                }
                put(state + n, a, b);
#pragma GCC unroll 4
                for (int r = 0; r < ranks; r++) {
                    even[r] += a * as<vec>(queries + r * N + n);
                    odd[r] += b * as<vec>(queries + r * N + n + L);
                }
            }
            vec rest{};
            if (n < N) {
                rest = load(state + n) * decay;
                for (int j = 0; j < 2 * ranks; j++)
                    rest += load(keys + j * N + n) * factors[j];
                store(state + n, rest);
            }
            for (int r = 0; r < ranks; r++) {
                s[r][l] = even[r] + odd[r];
                if (n < N)
                    s[r][l] += rest * load(queries + r * N + n);
            }
        }
        for (int r = 0; r < ranks; r++)
            store(y + r * P + p, sums(s[r]));
    }
}

template <class T>
static inline void head_of_ranks(I P, I N, int ranks, float decay, const float *in,
                                 const float *keys, const float *queries, T *h, float *y) {
    auto step = ranks == 1   ? head_of_ranks<1, T>
                : ranks == 2 ? head_of_ranks<2, T>
                : ranks == 4 ? head_of_ranks<4, T>
                             : head_of_ranks<0, T>;
    step(P, N, ranks, decay, in, keys, queries, h, y);
}

// a Mamba-3's mixer, v and out (B, D): h (B, H, P, N), turn (B, H, A), last_b (B, R, H, N) and last_x
// (B, H, P) are updated. P and N are multiples of L. scalars: the last rows of in_proj, from dt on, or
// null where in_proj has them itself; mimo_x, _z, _o (H, R, P), norm (H P): or null
API mamba3_step(I threads, I precision, I B, I H, I G, I P, I N, I R, I A, I interleaved,
                const Matrix *in_proj, const Matrix *scalars, const Matrix *out_proj,
                const float *dt_bias, const float *B_bias, const float *C_bias,
                const float *B_norm, const float *C_norm, float eps, const float *D,
                const float *mimo_x, const float *mimo_z, const float *mimo_o, const float *norm,
                float norm_eps, void *h, double *turn, float *last_b, float *last_x,
                const float *v, float *out) {
    I E = H * P;
    I wide = in_proj->rows;  // of [z; x; B; C], or with [dt; A; trap; angles]
    I narrow = scalars ? scalars->rows : wide;
    Room room(B * (wide + E + A + 3 * H + A));
    float *rows = room.get(), *y = rows + B * wide, *rates = y + B * E;
    float *own = rates + B * A;
    const float *few = scalars ? own : rows + 2 * E + 2 * R * G * N;
    if (scalars)
        linear<2>(threads, {in_proj, scalars}, B, v, {rows, own});
    else
        linear<1>(threads, {in_proj}, B, v, {rows});
    for (I b = 0; b < B; b++) {
        for (I j = 0; j < A; j += L) {
            int n = std::min<I>(L, A - j);
            store(rates + b * A + j, PI * tanhv(load(few + b * narrow + 3 * H + j, n)), n);
        }
    }
    parallel(B * H * P * N < 32768 ? 1 : threads, B * H, [&](I lo, I hi) {
        Flush flush;
        Room scratch(3 * R * N + 3 * R * P + 4 * A);
        float *keys = scratch.get();            // (2 R, N): of the last token, and of this one
        float *queries = keys + 2 * R * N;      // (R, N)
        float *in = queries + R * N;            // (2 R, P)
        float *read = in + 2 * R * P;           // (R, P)
        float *cosine = read + R * P, *sine = cosine + 2 * A;
        for (I i = lo; i < hi; i++) {
            I b = i / H, head = i % H, g = head / (H / G);
            const float *z = rows + b * wide + head * P;
            const float *x = z + E;
            const float *Bs = rows + b * wide + 2 * E + g * N;
            const float *Cs = Bs + R * G * N;
            const float *raw = few + b * narrow + head;
            float dt = softplus(all(raw[0] + dt_bias[head]))[0];
            float tail = std::max(raw[H], 0.f) + 1 / (1 + std::max(-raw[H], 0.f));
            float decay = std::exp(-dt * std::max(tail, 1e-4f));
            float trap = 1 / (1 + std::exp(-raw[2 * H]));
            float before = decay * (1 - trap) * dt, now = trap * dt;
            go_on_turning(A, interleaved, rates + b * A, dt, turn + i * A, cosine, sine);

            for (I r = 0; r < R; r++) {
                float *key = keys + (R + r) * N, *query = queries + r * N;
                float *last = last_b + ((b * R + r) * H + head) * N;
                float scale_B = inverse_rms(N, Bs + r * G * N, eps);
                float scale_C = inverse_rms(N, Cs + r * G * N, eps);
                const float *own_B = B_bias + (head * R + r) * N;
                const float *own_C = C_bias + (head * R + r) * N;
                for (I n = 0; n < N; n += L) {
                    store(key + n, load(Bs + r * G * N + n) * scale_B * load(B_norm + n) + load(own_B + n));
                    store(query + n, load(Cs + r * G * N + n) * scale_C * load(C_norm + n) + load(own_C + n));
                }
                turned(N, A, interleaved, cosine, sine, key);
                turned(N, A, interleaved, cosine, sine, query);
                memcpy(keys + r * N, last, 4 * N);
                memcpy(last, key, 4 * N);
                for (I p = 0; p < P; p += L) {
                    vec scale = mimo_x ? load(mimo_x + (head * R + r) * P + p) : all(1);
                    store(in + r * P + p, sound(load(last_x + i * P + p) * scale * before));
                    store(in + (R + r) * P + p, sound(load(x + p) * scale * now));
                }
            }
            memcpy(last_x + i * P, x, 4 * P);
            if (precision == BF16) {
                for (I j = 0; j < 3 * R; j++)
                    even_first(N, keys + j * N);
                head_of_ranks(P, N, R, sound(decay), in, keys, queries, (bf16 *)h + i * P * N, read);
            } else {
                head_of_ranks(P, N, R, sound(decay), in, keys, queries, (float *)h + i * P * N, read);
            }

            for (I p = 0; p < P; p += L)
                store(y + i * P + p, vec{});
            for (I r = 0; r < R; r++) {
                float *yr = read + r * P;
                I at = (head * R + r) * P;
                for (I p = 0; p < P; p += L) {
                    vec u = load(x + p) * D[head];
                    store(yr + p, load(yr + p) + (mimo_x ? u * load(mimo_x + at + p) : u));
                }
                float scale = norm ? inverse_rms(P, yr, norm_eps) : 1;
                for (I p = 0; p < P; p += L) {
                    vec u = load(yr + p) * scale;
                    vec gate = load(z + p);
                    if (norm)
                        u *= load(norm + head * P + p);
                    if (mimo_z) {
                        u *= load(mimo_o + at + p);
                        gate *= load(mimo_z + at + p);
                    }
                    add(y + i * P + p, u * gate * sigmoid(gate));
                }
            }
        }
    });
    linear<1>(threads, {out_proj}, B, y, {out});
}

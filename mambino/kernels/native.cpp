// The parts of the models that are no plain matrix products, for a CPU: each in one pass over memory, its sums in registers.
//
// native.py compiles this file when a compiler is there; ops.py has each function a second time in PyTorch, says what it computes, and names
// the papers. Conventions: all numbers are fp32 and a row's elements lie side by side; `s...` is the distance from one row to the next.
// Every function does items lo to hi of its task, so that threads share it, each with a number of its own; what several threads would
// add to the same place, each adds to a copy of its own, and the caller sums the copies.
// Those of the last part, which generation calls for every token, do all of their task and share it among threads themselves.
// B batch, T time, H heads, G key heads or groups, P head size, N state size, E inner width, Q chunk, S cache slots.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>
#include <unistd.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef int64_t I;
constexpr int L = 16;                                       // a register of AVX-512, or two of AVX, or four of NEON
typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
typedef double dvec __attribute__((vector_size(8 * L)));
constexpr ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#define API extern "C" void

struct Flush {                                              // numbers below 1e-38 as 0, while it lives: on x86 they take 100 times as long
#ifdef __SSE__
    unsigned before = __builtin_ia32_stmxcsr();
    Flush() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~Flush() { __builtin_ia32_ldmxcsr(before); }
#else
    Flush() {}
    ~Flush() {}
#endif
};

static inline vec all(float a) { return vec{} + a; }
static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec load(const float *p, int n) {             // the first n; the rest is 0
    if (n >= L) return load(p);
    vec v{};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
}
static inline void store(float *p, vec v, int n) {
    if (n >= L) return store(p, v);
    for (int i = 0; i < n; i++) p[i] = v[i];
}
static inline dvec load(const double *p) { dvec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(double *p, dvec v) { memcpy(p, &v, sizeof v); }
static inline dvec wide(vec v) { return __builtin_convertvector(v, dvec); }
static inline vec narrow(dvec v) { return __builtin_convertvector(v, vec); }
static inline void add(float *p, vec v, int n = L) { store(p, load(p, n) + v, n); }
static inline vec max(vec a, vec b) { return a > b ? a : b; }
static inline float sum(vec v) {
    float s[L / 2];
    for (int i = 0; i < L / 2; i++) s[i] = v[i] + v[i + L / 2];
    for (int n = L / 4; n; n /= 2) for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
}

// --- functions, to 2 units in the last place: a polynomial on one octave, the octave put into the exponent's bits

static inline vec exp2v(vec x) {                            // 2^x for x <= 127; a NaN stays one
    x = x < -125.f ? all(-125.f) : x;
    vec shifted = x + 12582912.f, r = x - (shifted - 12582912.f);
    vec p = all(1.535336188319500e-4f);
    p = p * r + 1.339887440266574e-3f; p = p * r + 9.618437357674640e-3f; p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f; p = p * r + 6.931472028550421e-1f; p = p * r + 1.f;
    return (vec)((ivec)p + ((ivec)shifted << 23));
}
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
static inline vec expv(vec x) { x = x > 87.f ? all(87.f) : x; return exp2v(x * LOG2E); }
static inline vec sigmoid(vec x) { return 1.f / (1.f + expv(-x)); }
static inline vec log1pv(vec u) {                           // of 0 to 1
    vec w = u + 1.f;
    ivec e = ((ivec)w - 0x3f3504f3) >> 23;
    vec m = (vec)((ivec)w - (e << 23)) - 1.f, n = __builtin_convertvector(e, vec), p = all(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f; p = p * m + 1.1676998740e-1f; p = p * m - 1.2420140846e-1f; p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f; p = p * m + 2.0000714765e-1f; p = p * m - 2.4999993993e-1f; p = p * m + 3.3333331174e-1f;
    vec y = m * m * m * p - n * 2.12194440e-4f - 0.5f * m * m + m + n * 0.693359375f, d = w - 1.f;
    return d == 0.f ? u : y * u / d;                        // what 1 + u has lost of u (Kahan)
}
static inline vec softplus(vec x) { return (x > 0.f ? x : all(0.f)) + log1pv(expv(x > 0.f ? -x : x)); }
static inline vec softplus(vec x, vec &slope) {             // and its derivative, sigmoid(x)
    vec e = expv(x > 0.f ? -x : x);
    slope = (x > 0.f ? all(1.f) : e) / (1.f + e);
    return (x > 0.f ? x : all(0.f)) + log1pv(e);
}

// --- matrix products on what lies in the cache

#ifdef __AVX512F__
constexpr int WIDE = 4;                                     // accumulators: 4 x WIDE registers of L
#else
constexpr int WIDE = 1;
#endif
template <int R, int W> static inline void tile(float *c, I sc, const float *a, I ai, I ak, const float *b, I sb, I k0, I k1, bool plus) {
    vec s[R][W];
    for (int r = 0; r < R; r++) for (int w = 0; w < W; w++) s[r][w] = plus ? load(c + r * sc + w * L) : vec{};
    for (I k = k0; k < k1; k++) {
        vec row[W];
        for (int w = 0; w < W; w++) row[w] = load(b + k * sb + w * L);
        for (int r = 0; r < R; r++) for (int w = 0; w < W; w++) s[r][w] += a[r * ai + k * ak] * row[w];
    }
    for (int r = 0; r < R; r++) for (int w = 0; w < W; w++) store(c + r * sc + w * L, s[r][w]);
}
enum Part { FULL, LOWER, UPPER, CAUSAL };                   // all of it; a[i][k] is 0 for k > i, or for k < i; only c[i][j <= i] matters
// c[i][j] = sum over k of a[i * ai + k * ak] * b[k][j], or plus it; i < m, j < n (a multiple of L), k < K
template <int R> static inline void strip(I i, I n, I K, float *c, I sc, const float *a, I ai, I ak, const float *b, I sb, bool plus, Part part) {
    I k0 = part == UPPER ? i : 0, k1 = part == LOWER && i + R < K ? i + R : K, j = 0;
    if (part == CAUSAL && i + R < n) n = (i + R + L - 1) / L * L;
    for (; j + WIDE * L <= n; j += WIDE * L) tile<R, WIDE>(c + i * sc + j, sc, a + i * ai, ai, ak, b + j, sb, k0, k1, plus);
    for (; j < n; j += L) tile<R, 1>(c + i * sc + j, sc, a + i * ai, ai, ak, b + j, sb, k0, k1, plus);
}
static void gemm(I m, I n, I K, float *c, I sc, const float *a, I ai, I ak, const float *b, I sb, bool plus = false, Part part = FULL) {
    I i = 0;
    for (; i + 4 <= m; i += 4) strip<4>(i, n, K, c, sc, a, ai, ak, b, sb, plus, part);
    for (; i < m; i++) strip<1>(i, n, K, c, sc, a, ai, ak, b, sb, plus, part);
}
#ifdef __clang__
template <int D, int... l> static inline void swap(vec &a, vec &b, std::integer_sequence<int, l...>) {
    vec c = __builtin_shufflevector(a, b, ((l & D) ? L + l - D : l)...);
    b = __builtin_shufflevector(a, b, ((l & D) ? L + l : l + D)...), a = c;
}
#else
template <int D, int... l> static inline void swap(vec &a, vec &b, std::integer_sequence<int, l...>) {
    vec c = __builtin_shuffle(a, b, ivec{((l & D) ? L + l - D : l)...});
    b = __builtin_shuffle(a, b, ivec{((l & D) ? L + l : l + D)...}), a = c;
}
#endif
template <int D> static inline void swap_all(vec *r) {      // of a block of L x L the off-diagonal quarters of each D x D
    for (int i = 0; i < L; i++) if (!(i & D)) swap<D>(r[i], r[i + D], std::make_integer_sequence<int, L>());
}
// to (n, st) = the transpose of from (m, n), times a number a column of `to`; n is a multiple of L; columns from m to `full` are 0
static void transpose(float *to, I st, const float *from, I sf, I m, I n, I full, const float *scale = nullptr) {
    for (I i = 0; i < full; i += L) for (I j = 0; j < n; j += L) {
        vec r[L];
        for (int l = 0; l < L; l++) r[l] = i + l < m ? load(from + (i + l) * sf + j) : vec{};
        swap_all<8>(r), swap_all<4>(r), swap_all<2>(r), swap_all<1>(r);
        for (int l = 0; l < L; l++) store(to + (j + l) * st + i, scale ? r[l] * load(scale + i) : r[l]);
    }
}
static inline I up(I n, I to) { return (n + to - 1) / to * to; }

// --- elementwise and by rows

API swiglu_forward(I lo, I hi, I, const float *g, const float *u, float *y) {
    Flush flush;
    for (I i = lo * L; i < hi * L; i += L) { vec x = load(g + i); store(y + i, x * sigmoid(x) * load(u + i)); }
}
API swiglu_backward(I lo, I hi, I, const float *g, const float *u, const float *gy, float *gg, float *gu) {
    Flush flush;
    for (I i = lo * L; i < hi * L; i += L) {
        vec x = load(g + i), s = sigmoid(x), grad = load(gy + i);
        store(gu + i, grad * x * s);
        store(gg + i, grad * load(u + i) * s * (1.f + x * (1.f - s)));
    }
}
// rows of heads (heads, P) and tables (positions, P / 2); token i is at position i % T
API rope(I lo, I hi, I, I T, I heads, I P, const float *x, const float *cosine, const float *sine, float sign, float *y) {
    Flush flush;
    for (I i = lo; i < hi; i++) for (I h = 0; h < heads; h++) {
        const float *a = x + (i * heads + h) * P, *c = cosine + i % T * (P / 2), *s = sine + i % T * (P / 2);
        float *out = y + (i * heads + h) * P;
        for (I j = 0; j < P / 2; j += L) {
            int n = P / 2 - j < L ? P / 2 - j : L;
            vec u = load(a + j, n), v = load(a + P / 2 + j, n), cj = load(c + j, n), sj = load(s + j, n) * sign;
            store(out + j, u * cj - v * sj, n);
            store(out + P / 2 + j, v * cj + u * sj, n);
        }
    }
}
// rms-norm of x, or of x * silu(z), in `groups` groups of D channels
API norm_forward(I lo, I hi, I, I groups, I D, float eps, const float *x, const float *z, I sz, const float *w, float *y, float *rstd) {
    Flush flush;
    for (I r = lo; r < hi; r++) for (I g = 0; g < groups; g++) {
        const float *xr = x + (r * groups + g) * D, *zr = z + r * sz + g * D, *wg = w + g * D;
        float *out = y + (r * groups + g) * D;
        vec square{};
        for (I j = 0; j < D; j += L) {
            int n = D - j < L ? D - j : L;
            vec u = load(xr + j, n);
            if (z) { vec v = load(zr + j, n); u *= v * sigmoid(v); }
            store(out + j, u, n);
            square += u * u;
        }
        float scale = rstd[r * groups + g] = 1 / std::sqrt(sum(square) / D + eps);
        for (I j = 0; j < D; j += L) { int n = D - j < L ? D - j : L; store(out + j, load(out + j, n) * scale * load(wg + j, n), n); }
    }
}
API norm_backward(I lo, I hi, I thread, I groups, I D, const float *x, const float *z, I sz, const float *w, const float *rstd,
                  const float *gy, float *gx, float *gz, float *gw) {
    Flush flush;
    gw += thread * groups * D;
    for (I r = lo; r < hi; r++) for (I g = 0; g < groups; g++) {
        I row = (r * groups + g) * D;
        const float *zr = z + r * sz + g * D, *wg = w + g * D;
        float scale = rstd[r * groups + g];
        vec dot{};
        for (I j = 0; j < D; j += L) {
            int n = D - j < L ? D - j : L;
            vec u = load(x + row + j, n), grad = load(gy + row + j, n);
            if (z) { vec v = load(zr + j, n); u *= v * sigmoid(v); }
            dot += u * grad * load(wg + j, n);
            add(gw + g * D + j, u * grad * scale, n);
        }
        float mean = sum(dot) / D * scale * scale;
        for (I j = 0; j < D; j += L) {
            int n = D - j < L ? D - j : L;
            vec u = load(x + row + j, n), grad = load(gy + row + j, n) * load(wg + j, n);
            if (!z) { store(gx + row + j, (grad - u * mean) * scale, n); continue; }
            vec v = load(zr + j, n), s = sigmoid(v), a = v * s;
            grad = (grad - u * a * mean) * scale;
            store(gx + row + j, grad * a, n);
            store(gz + row + j, grad * u * s * (1.f + v * (1.f - s)), n);
        }
    }
}
// logits (rows, V) become the gradient of the sum of their cross-entropies; a target below 0 does not count
API cross_entropy(I lo, I hi, I, I V, float *logits, const I *targets, float *loss) {
    Flush flush;
    for (I r = lo; r < hi; r++) {
        float *x = logits + r * V;
        if (targets[r] < 0) { memset(x, 0, 4 * V); loss[r] = 0; continue; }
        vec top = all(-INFINITY), total{};
        I whole = V / L * L;
        for (I j = 0; j < whole; j += L) top = max(load(x + j), top);
        float most = -INFINITY, rest = 0, own = x[targets[r]];
        for (int l = 0; l < L; l++) most = top[l] > most ? top[l] : most;
        for (I j = whole; j < V; j++) most = x[j] > most ? x[j] : most;
        for (I j = 0; j < whole; j += L) { vec e = expv(load(x + j) - most); store(x + j, e); total += e; }
        for (I j = whole; j < V; j++) rest += x[j] = std::exp(x[j] - most);
        rest += sum(total);
        for (I j = 0; j < whole; j += L) store(x + j, load(x + j) * (1 / rest));
        for (I j = whole; j < V; j++) x[j] *= 1 / rest;
        loss[r] = std::log(rest) + most - own;
        x[targets[r]] -= 1;
    }
}

// --- the causal depthwise convolution of 4 taps, and silu. Items are sequences times tiles of 4 L channels

constexpr I TILE = 4 * L;
static inline vec taps(const float *x, I sx, I t, int n, const vec *w, vec bias) {
    for (int j = 0; j < 4 && j <= t; j++) bias += w[3 - j] * load(x + (t - j) * sx, n);
    return bias;
}
API conv_forward(I lo, I hi, I, I T, I E, const float *x, I sx, const float *weight, const float *bias, float *y) {
    Flush flush;
    I tiles = up(E, TILE) / TILE;
    for (I i = lo; i < hi; i++) {
        I b = i / tiles, begin = i % tiles * TILE, end = std::min(E, begin + TILE);
        vec w[4][4], start[4];
        for (I e = begin, c = 0; e < end; e += L, c++) {
            int n = end - e < L ? end - e : L;
            start[c] = load(bias + e, n);
            for (int j = 0; j < 4; j++) w[c][j] = load(weight + j * E + e, n);
        }
        for (I t = 0; t < T; t++) for (I e = begin, c = 0; e < end; e += L, c++) {
            int n = end - e < L ? end - e : L;
            vec v = taps(x + b * T * sx + e, sx, t, n, w[c], start[c]);
            store(y + (b * T + t) * E + e, v * sigmoid(v), n);
        }
    }
}
API conv_backward(I lo, I hi, I thread, I T, I E, const float *x, I sx, const float *weight, const float *bias, const float *gy,
                  float *gx, float *gw, float *gb) {
    Flush flush;
    I tiles = up(E, TILE) / TILE;
    gw += thread * 4 * E, gb += thread * E;
    for (I i = lo; i < hi; i++) {
        I b = i / tiles, begin = i % tiles * TILE, end = std::min(E, begin + TILE);
        vec w[4][4], dw[4][4]{}, db[4]{}, later[4][4]{}, start[4];
        for (I e = begin, c = 0; e < end; e += L, c++) {
            int n = end - e < L ? end - e : L;
            start[c] = load(bias + e, n);
            for (int j = 0; j < 4; j++) w[c][j] = load(weight + j * E + e, n);
        }
        for (I t = T - 1; t >= 0; t--) for (I e = begin, c = 0; e < end; e += L, c++) {
            int n = end - e < L ? end - e : L;
            const float *xb = x + b * T * sx + e;
            vec *f = later[c];                              // the gradients of tokens t, t+1, t+2, t+3
            vec v = taps(xb, sx, t, n, w[c], start[c]), s = sigmoid(v), g = load(gy + (b * T + t) * E + e, n) * s * (1.f + v * (1.f - s));
            f[3] = f[2], f[2] = f[1], f[1] = f[0], f[0] = g;
            store(gx + (b * T + t) * E + e, f[0] * w[c][3] + f[1] * w[c][2] + f[2] * w[c][1] + f[3] * w[c][0], n);
            for (int j = 0; j < 4 && j <= t; j++) dw[c][3 - j] += g * load(xb + (t - j) * sx, n);
            db[c] += g;
        }
        for (I e = begin, c = 0; e < end; e += L, c++) {
            int n = end - e < L ? end - e : L;
            for (int j = 0; j < 4; j++) add(gw + j * E + e, dw[c][j], n);
            add(gb + e, db[c], n);
        }
    }
}

// --- Mamba-1: the selective scan, one tile of L channels after another, their N states in registers. Items are tiles
// h = exp(dt A) h + dt B x; y = (C h + D x) silu(z); dt = softplus(raw + bias). starts: the state before each chunk of K tokens

constexpr int K = 8;
struct Scan { I T, E; const float *x, *raw; I sraw; const float *bias, *A, *B, *C; I sbc; const float *D, *z; I sz; };

template <int N> static void scan_forward(I lo, I hi, I batch, Scan m, float *h, float *starts, float *y) {
    I E = m.E;
    for (I b = 0; b < batch; b++) for (I t0 = 0; t0 < m.T; t0 += K) for (I e = lo * L; e < hi * L && e < E; e += L) {
        int n = E - e < L ? E - e : L;
        vec s[N], A[N], bias = load(m.bias + e, n), skip = load(m.D + e, n);
        for (int j = 0; j < N; j++) {
            s[j] = load(h + (b * N + j) * E + e, n), A[j] = load(m.A + j * E + e, n) * LOG2E;
            if (starts) store(starts + ((t0 / K * batch + b) * N + j) * E + e, s[j], n);
        }
        for (I r = b * m.T + t0; r < b * m.T + std::min(m.T, t0 + K); r++) {
            vec x = load(m.x + r * E + e, n), dt = softplus(load(m.raw + r * m.sraw + e, n) + bias), u = dt * x, out = skip * x;
            const float *B = m.B + r * m.sbc, *C = m.C + r * m.sbc;
            for (int j = 0; j < N; j++) {
                s[j] = exp2v(dt * A[j]) * s[j] + u * B[j];
                out += s[j] * C[j];
            }
            vec z = load(m.z + r * m.sz + e, n);
            store(y + r * E + e, out * z * sigmoid(z), n);
        }
        for (int j = 0; j < N; j++) store(h + (b * N + j) * E + e, s[j], n);
    }
}
template <int N> static void scan_backward(I lo, I hi, I batch, Scan m, const float *starts, const float *gy, float *gh, float *gx,
                                           float *graw, float *gbias, float *gA, float *gB, float *gC, float *gD, float *gz) {
    I E = m.E;
    for (I b = 0; b < batch; b++) for (I t0 = (m.T - 1) / K * K; t0 >= 0; t0 -= K) {
        int k = m.T - t0 < K ? m.T - t0 : K;
        vec sumB[K][N], sumC[K][N];
        memset(sumB, 0, sizeof sumB), memset(sumC, 0, sizeof sumC);
        for (I e = lo * L; e < hi * L && e < E; e += L) {
            int n = E - e < L ? E - e : L;
            vec s[K + 1][N], decay[K][N], A[N], g[N], dA[N], dt[K], x[K], grad[K], slope[K];
            vec bias = load(m.bias + e, n), skip = load(m.D + e, n), dskip{}, dbias{};
            for (int j = 0; j < N; j++) {
                A[j] = load(m.A + j * E + e, n) * LOG2E, dA[j] = vec{};
                s[0][j] = load(starts + ((t0 / K * batch + b) * N + j) * E + e, n);
                g[j] = load(gh + (b * N + j) * E + e, n);
            }
            for (int i = 0; i < k; i++) {                   // the states once more
                I r = b * m.T + t0 + i;
                const float *B = m.B + r * m.sbc, *C = m.C + r * m.sbc;
                x[i] = load(m.x + r * E + e, n), dt[i] = softplus(load(m.raw + r * m.sraw + e, n) + bias, slope[i]);
                vec u = dt[i] * x[i], out = skip * x[i];
                for (int j = 0; j < N; j++) {
                    decay[i][j] = exp2v(dt[i] * A[j]);
                    s[i + 1][j] = decay[i][j] * s[i][j] + u * B[j];
                    out += s[i + 1][j] * C[j];
                }
                vec z = load(m.z + r * m.sz + e, n), open = sigmoid(z), go = load(gy + r * E + e, n);
                store(gz + r * E + e, go * out * open * (1.f + z * (1.f - open)), n);
                grad[i] = go * z * open;
                dskip += grad[i] * x[i];
            }
            for (int i = k - 1; i >= 0; i--) {
                I r = b * m.T + t0 + i;
                const float *B = m.B + r * m.sbc, *C = m.C + r * m.sbc;
                vec du{}, ddt{}, u = dt[i] * x[i];
                for (int j = 0; j < N; j++) {
                    vec gs = g[j] + grad[i] * C[j];
                    sumC[i][j] += s[i + 1][j] * grad[i];
                    sumB[i][j] += gs * u;
                    du += gs * B[j];
                    g[j] = gs * decay[i][j];
                    vec w = g[j] * s[i][j];                 // of dt A
                    dA[j] += w * dt[i];
                    ddt += w * A[j];
                }
                store(gx + r * E + e, du * dt[i] + grad[i] * skip, n);
                vec draw = (ddt * LN2 + du * x[i]) * slope[i];
                store(graw + r * E + e, draw, n);
                dbias += draw;
            }
            for (int j = 0; j < N; j++) store(gh + (b * N + j) * E + e, g[j], n), add(gA + j * E + e, dA[j], n);
            add(gD + e, dskip, n), add(gbias + e, dbias, n);
        }
        for (int i = 0; i < k; i++) for (int j = 0; j < N; j++) {
            gB[(b * m.T + t0 + i) * N + j] = sum(sumB[i][j]);
            gC[(b * m.T + t0 + i) * N + j] = sum(sumC[i][j]);
        }
    }
}
#define SCAN I N, I batch, I T, I E, const float *x, const float *raw, I sraw, const float *bias, const float *A, const float *B, \
    const float *C, I sbc, const float *D, const float *z, I sz
#define FOR_N(call) switch (N) { case 8: call(8); break; case 16: call(16); break; case 32: call(32); break; case 64: call(64); }
API mamba1_forward(I lo, I hi, I, SCAN, float *h, float *starts, float *y) {
    Flush flush;
    Scan m{T, E, x, raw, sraw, bias, A, B, C, sbc, D, z, sz};
#define CALL(n) scan_forward<n>(lo, hi, batch, m, h, starts, y)
    FOR_N(CALL)
#undef CALL
}
API mamba1_backward(I lo, I hi, I thread, SCAN, const float *starts, const float *gy, float *gh, float *gx, float *graw, float *gbias,
                    float *gA, float *gB, float *gC, float *gD, float *gz) {
    Flush flush;
    Scan m{T, E, x, raw, sraw, bias, A, B, C, sbc, D, z, sz};
    gB += thread * batch * T * N, gC += thread * batch * T * N;
#define CALL(n) scan_backward<n>(lo, hi, batch, m, starts, gy, gh, gx, graw, gbias, gA, gB, gC, gD, gz)
    FOR_N(CALL)
#undef CALL
}

// --- Mamba-2: state-space duality. Items are heads, all sequences' in one row; a state is (N, P), kept at chunk starts
// s = sums of dt A in a chunk; W[i][j] = C_i B_j exp(s_i - s_j), j <= i; y = W (dt x) + exp(s) C h + D x; h' = exp(s_end) h + ...

struct Chunk {                                              // what both passes need of a chunk, for one head
    I q, Q, P, N;
    std::vector<float> raw, dt, grow, to_end, S, decay, W, xdt, xe, BT, CT;
    std::vector<double> s;
    float kept;
    Chunk(I Q, I P, I N) : Q(Q), P(P), N(N), raw(Q), dt(Q), grow(Q), to_end(Q), S(Q * Q), decay(Q * Q), W(Q * Q), xdt(Q * P), xe(Q * P), BT(N * Q),
                           CT(N * Q), s(Q) {}
    void group(I tokens, const float *B, const float *C, I sx) {
        q = tokens;
        transpose(BT.data(), Q, B, sx, q, N, Q);
        gemm(q, Q, N, S.data(), Q, C, sx, 1, BT.data(), Q, false, CAUSAL);
    }
    void head(const float *x, I sx, const float *r, I sr, float bias, float A) {
        for (I i = 0; i < q; i++) raw[i] = r[i * sr] + bias;
        for (I i = 0; i < Q; i += L) store(&dt[i], softplus(load(&raw[i])));
        double total = 0;
        for (I i = 0; i < q; i++) s[i] = total += (double)dt[i] * A;
        for (I i = 0; i < Q; i++) grow[i] = i < q ? s[i] : 0, to_end[i] = i < q ? total - s[i] : 0;
        for (I i = 0; i < Q; i += L) store(&grow[i], expv(load(&grow[i]))), store(&to_end[i], expv(load(&to_end[i])));
        kept = std::exp(total);
        for (I i = 0; i < q; i++) {
            for (I j = 0; j < Q; j += L) {                  // differences in double: of large sums fp32 loses the small ones
                vec d{};
                if (j <= i) d = expv(narrow(s[i] - load(&s[j])));
                d = LANE + (int)j <= (int)i ? d : vec{};
                store(&decay[i * Q + j], d), store(&W[i * Q + j], j <= i ? d * load(&S[i * Q + j]) : d);
            }
            for (I p = 0; p < P; p += L) {
                vec v = load(x + i * sx + p) * dt[i];
                store(&xdt[i * P + p], v), store(&xe[i * P + p], v * to_end[i]);
            }
        }
    }
};
#define SSD I T, I H, I G, I P, I N, I Q, const float *x, I sx, const float *raw, I sr, const float *bias, const float *A, const float *D
// x: rows of [x (H, P), B (G, N), C (G, N)]. starts (B, H, chunks + 1, N, P), the first of them given
API ssd_forward(I lo, I hi, I, SSD, float *starts, float *y) {
    Flush flush;
    I chunks = (T + Q - 1) / Q, R = H / G, size = N * P;
    Chunk k(Q, P, N);
    for (I first = lo, last; first < hi; first = last) {    // heads of one group
        I b = first / H, g = first % H / R;
        last = std::min(hi, b * H + (g + 1) * R);
        for (I c = 0; c < chunks; c++) {
            const float *row = x + (b * T + c * Q) * sx, *B = row + H * P + g * N, *C = B + G * N;
            k.group(T - c * Q < Q ? T - c * Q : Q, B, C, sx);
            for (I i = first; i < last; i++) {
                I h = i - b * H, token = b * T + c * Q;
                float *now = starts + (i * (chunks + 1) + c) * size, *next = now + size, *out = y + token * H * P + h * P;
                k.head(row + h * P, sx, raw + token * sr + h, sr, bias[h], A[h]);
                gemm(k.q, P, N, out, H * P, C, sx, 1, now, P);
                for (I t = 0; t < k.q; t++) for (I p = 0; p < P; p += L)
                    store(out + t * H * P + p, load(out + t * H * P + p) * k.grow[t] + load(row + t * sx + h * P + p) * D[h]);
                gemm(k.q, P, k.q, out, H * P, k.W.data(), Q, 1, k.xdt.data(), P, true, LOWER);
                for (I j = 0; j < size; j += L) store(next + j, load(now + j) * k.kept);
                gemm(N, P, k.q, next, P, B, 1, sx, k.xe.data(), P, true);
            }
        }
    }
}
// gh: the gradient of the last state, on return of the first. gx has x's rows; B's and C's part of it is a copy a thread: gBC
API ssd_backward(I lo, I hi, I thread, I batch, SSD, const float *starts, const float *gy, float *gh, float *gx, float *gBC, float *graw,
                 float *gA, float *gD) {
    Flush flush;
    I chunks = (T + Q - 1) / Q, R = H / G, size = N * P;
    Chunk k(Q, P, N);
    std::vector<float> gW(Q * Q), gS(Q * Q), xT(P * Q), gT(P * Q), ge(Q * P), gu(Q * P), BG(Q * P), gB(N * Q), gC(N * Q), one(N * Q), v(Q);
    std::vector<double> gs(Q);
    gBC += thread * batch * T * 2 * G * N;
    for (I first = lo, last; first < hi; first = last) {
        I b = first / H, g = first % H / R;
        last = std::min(hi, b * H + (g + 1) * R);
        for (I c = chunks - 1; c >= 0; c--) {
            const float *row = x + (b * T + c * Q) * sx, *B = row + H * P + g * N, *C = B + G * N;
            I token = b * T + c * Q;
            k.group(T - c * Q < Q ? T - c * Q : Q, B, C, sx);
            I q = k.q;
            transpose(k.CT.data(), Q, C, sx, q, N, Q);
            memset(gS.data(), 0, 4 * Q * Q), memset(gB.data(), 0, 4 * N * Q), memset(gC.data(), 0, 4 * N * Q);
            for (I i = first; i < last; i++) {
                I h = i - b * H;
                const float *now = starts + (i * (chunks + 1) + c) * size, *grad = gy + token * H * P + h * P, *xh = row + h * P;
                float *G_ = gh + i * size;
                k.head(xh, sx, raw + token * sr + h, sr, bias[h], A[h]);
                for (I t = 0; t < Q; t++) gs[t] = 0;
                // inside the chunk: of W, of S = C B^T and of the sums
                transpose(xT.data(), Q, k.xdt.data(), P, q, P, Q);
                gemm(q, Q, P, gW.data(), Q, grad, H * P, 1, xT.data(), Q, false, CAUSAL);
                for (I t = 0; t < q; t++) {
                    dvec total{};
                    for (I j = 0; j <= t; j += L) {
                        vec d = load(&gW[t * Q + j]);
                        d = LANE + (int)j <= (int)t ? d : vec{};
                        dvec both = wide(d * load(&k.W[t * Q + j]));
                        total += both, store(&gs[j], load(&gs[j]) - both);
                        add(&gS[t * Q + j], d * load(&k.decay[t * Q + j]));
                    }
                    for (int l = 0; l < L; l++) gs[t] += total[l];
                }
                gemm(q, P, q, gu.data(), P, k.W.data(), 1, Q, grad, H * P, false, UPPER);
                // by way of the state the chunk leaves
                gemm(q, P, N, BG.data(), P, B, sx, 1, G_, P);
                double last_sum = 0;
                for (I t = 0; t < q; t++) {
                    vec dot{};
                    for (I p = 0; p < P; p += L) {
                        vec w = load(&BG[t * P + p]);
                        dot += w * load(&k.xe[t * P + p]);
                        add(&gu[t * P + p], w * k.to_end[t]);
                    }
                    float d = sum(dot);
                    last_sum += d, gs[t] -= d;
                }
                transpose(xT.data(), Q, k.xe.data(), P, q, P, Q);
                gemm(N, Q, P, gB.data(), Q, G_, P, 1, xT.data(), Q, true);
                // by way of the state it starts from
                transpose(gT.data(), Q, grad, H * P, q, P, Q, k.grow.data());
                gemm(N, Q, P, one.data(), Q, now, P, 1, gT.data(), Q);
                memset(v.data(), 0, 4 * Q);
                for (I n = 0; n < N; n++) for (I j = 0; j < Q; j += L) {
                    vec w = load(&one[n * Q + j]);
                    add(&v[j], w * load(&k.CT[n * Q + j])), add(&gC[n * Q + j], w);
                }
                vec dot{};
                for (I j = 0; j < size; j += L) { vec w = load(G_ + j) * k.kept; dot += w * load(now + j); store(G_ + j, w); }
                last_sum += sum(dot);
                for (I t = 0; t < q; t++) for (I p = 0; p < P; p += L) store(&ge[t * P + p], load(grad + t * H * P + p) * k.grow[t]);
                gemm(N, P, q, G_, P, C, 1, sx, ge.data(), P, true);
                // x, dt, A, D
                double later = last_sum;
                vec skip{};
                for (I t = q - 1; t >= 0; t--) {
                    later += gs[t] + v[t];
                    vec dt{};
                    for (I p = 0; p < P; p += L) {
                        vec u = load(&gu[t * P + p]), xt = load(xh + t * sx + p), d = load(grad + t * H * P + p);
                        dt += u * xt, skip += d * xt;
                        store(gx + (token + t) * sx + h * P + p, u * k.dt[t] + d * D[h]);
                    }
                    graw[(token + t) * H + h] = (sum(dt) + A[h] * later) * (1 / (1 + std::exp(-k.raw[t])));
                    gA[i] += later * k.dt[t];
                }
                gD[i] += sum(skip);
            }
            float *toB = gBC + (b * T + c * Q) * 2 * G * N + g * N, *toC = toB + G * N;
            gemm(q, N, q, toC, 2 * G * N, gS.data(), Q, 1, B, sx, false, LOWER);
            gemm(q, N, q, toB, 2 * G * N, gS.data(), 1, Q, C, sx, false, UPPER);
            for (I t = 0; t < q; t++) for (I n = 0; n < N; n++)
                toB[t * 2 * G * N + n] += gB[n * Q + t], toC[t * 2 * G * N + n] += gC[n * Q + t];
        }
    }
}

// --- attention, causal, with or without a window, in blocks of Q queries by Q keys with a running softmax (Dao et al. 2022), so
// that no (T, T) matrix exists; blocks a window hides are never looked at. Items are key heads, all sequences' in one row

constexpr I Q = 64;
struct Heads { I T, H, G, P, window; const float *q, *k, *v; I sq, sk; float scale, drop; uint32_t seed; };

static inline vec kept(const Heads &m, I head, I i, I j) {  // 1 / (1 - drop) where dropout leaves the weight of key j for query i, else 0
    typedef uint32_t uvec __attribute__((vector_size(4 * L)));
    uvec x = (uvec)(LANE + (int32_t)j) * 0x9e3779b1u + (uint32_t)i * 0x85ebca77u + ((uint32_t)head * 0xc2b2ae3du ^ m.seed);
    x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu; x ^= x >> 16;     // a mixing function of Wellons
    return __builtin_convertvector((ivec)(x >> 8), vec) < m.drop * 16777216.f ? vec{} : all(1 / (1 - m.drop));
}
// exp(scale q k - less) of a block where it is visible, else 0. less: a number a row
static void weights(const Heads &m, I i0, I j0, I rows, I keys, float *s, const float *less) {
    bool whole = keys == Q && j0 + Q <= i0 + 1 && (!m.window || j0 > i0 + rows - 1 - m.window);
    for (I i = 0; i < rows; i++) for (I j = 0; j < Q; j += L) {
        vec w = expv(load(s + i * Q + j) * m.scale - less[i]);
        ivec key = LANE + (int)(j0 + j);
        if (!whole) {
            w = key <= (int)(i0 + i) ? w : vec{};
            if (m.window) w = key > (int)(i0 + i - m.window) ? w : vec{};
        }
        store(s + i * Q + j, w);
    }
}
API attention_forward(I lo, I hi, I thread, I T, I H, I G, I P, I window, const float *q, const float *k, const float *v, I sq, I sk,
                      float scale, float drop, I seed, float *kT, float *y, float *lse) {
    Flush flush;
    Heads m{T, H, G, P, window, q, k, v, sq, sk, scale, drop, (uint32_t)seed};
    I R = H / G, blocks = up(T, Q) / Q;
    kT += thread * blocks * P * Q;
    std::vector<float> s(Q * Q), out(Q * P), top(Q), less(Q), total(Q);
    for (I item = lo; item < hi; item++) {
        I b = item / G, g = item % G;
        const float *keys = k + b * T * sk + g * P, *values = v + b * T * sk + g * P;
        for (I c = 0; c < blocks; c++) transpose(&kT[c * P * Q], Q, keys + c * Q * sk, sk, std::min(Q, T - c * Q), P, Q);
        for (I h = g * R; h < (g + 1) * R; h++) for (I c = 0; c < blocks; c++) {
            I i0 = c * Q, rows = std::min(Q, T - i0), begin = window ? std::max<I>(0, i0 - window + 1) / Q : 0;
            for (I i = 0; i < Q; i++) top[i] = -INFINITY, total[i] = 0;
            memset(out.data(), 0, 4 * Q * P);
            for (I d = begin; d <= c; d++) {
                I j0 = d * Q, n = std::min(Q, T - j0);
                gemm(rows, Q, P, s.data(), Q, q + (b * T + i0) * sq + h * P, sq, 1, &kT[d * P * Q], Q);
                for (I i = 0; i < rows; i++) {
                    I from = window ? std::max<I>(0, i0 + i - window + 1 - j0) : 0, to = std::min(n, i0 + i - j0 + 1);
                    if (from >= to) continue;
                    vec most = all(-INFINITY);
                    for (I j = from / L * L; j < to; j += L) {
                        ivec key = LANE + (int)j;
                        vec w = load(&s[i * Q + j]);
                        w = key < (int)to ? w : all(-INFINITY);
                        w = key >= (int)from ? w : all(-INFINITY);
                        most = max(w, most);
                    }
                    float now = top[i];
                    for (int l = 0; l < L; l++) now = most[l] * scale > now ? most[l] * scale : now;
                    if (now > top[i]) {
                        float shrink = std::exp(top[i] - now);
                        for (I p = 0; p < P; p += L) store(&out[i * P + p], load(&out[i * P + p]) * shrink);
                        total[i] *= shrink, top[i] = now;
                    }
                }
                for (I i = 0; i < rows; i++) less[i] = top[i] == -INFINITY ? 0 : top[i];     // of a row that has seen no key yet
                weights(m, i0, j0, rows, n, s.data(), less.data());
                for (I i = 0; i < rows; i++) {
                    vec t{};
                    for (I j = 0; j < Q; j += L) {
                        vec w = load(&s[i * Q + j]);
                        t += w;
                        if (drop > 0) store(&s[i * Q + j], w * kept(m, b * H + h, i0 + i, j0 + j));
                    }
                    total[i] += sum(t);
                }
                gemm(rows, P, n, out.data(), P, s.data(), Q, 1, values + j0 * sk, sk, true);
            }
            for (I i = 0; i < rows; i++) {
                lse[(b * H + h) * T + i0 + i] = top[i] + std::log(total[i]);
                for (I p = 0; p < P; p += L) store(y + (b * T + i0 + i) * H * P + h * P + p, load(&out[i * P + p]) * (1 / total[i]));
            }
        }
    }
}
// gq (B, T, H, P), gk and gv (B, T, G, P) start as zeros
API attention_backward(I lo, I hi, I, I T, I H, I G, I P, I window, const float *q, const float *k, const float *v, I sq, I sk, float scale,
                       float drop, I seed, const float *y, const float *lse, const float *gy, float *gq, float *gk, float *gv) {
    Flush flush;
    Heads m{T, H, G, P, window, q, k, v, sq, sk, scale, drop, (uint32_t)seed};
    I R = H / G, blocks = up(T, Q) / Q;
    std::vector<float> kT(P * Q), vT(P * Q), s(Q * Q), d(Q * Q), dot(T);
    for (I item = lo; item < hi; item++) for (I h = item % G * R; h < (item % G + 1) * R; h++) {
        I b = item / G, g = item % G;
        const float *less = lse + (b * H + h) * T;
        for (I i = 0; i < T; i++) {
            vec t{};
            for (I p = 0; p < P; p += L) t += load(y + ((b * T + i) * H + h) * P + p) * load(gy + ((b * T + i) * H + h) * P + p);
            dot[i] = sum(t);
        }
        for (I c = 0; c < blocks; c++) {
            I j0 = c * Q, n = std::min(Q, T - j0), end = window ? std::min(blocks, (j0 + n - 1 + window - 1) / Q + 1) : blocks;
            const float *keys = k + (b * T + j0) * sk + g * P;
            transpose(kT.data(), Q, keys, sk, n, P, Q);
            transpose(vT.data(), Q, v + (b * T + j0) * sk + g * P, sk, n, P, Q);
            for (I e = c; e < end; e++) {
                I i0 = e * Q, rows = std::min(Q, T - i0);
                const float *queries = q + (b * T + i0) * sq + h * P, *grad = gy + ((b * T + i0) * H + h) * P;
                gemm(rows, Q, P, s.data(), Q, queries, sq, 1, kT.data(), Q);
                weights(m, i0, j0, rows, n, s.data(), less + i0);
                gemm(rows, Q, P, d.data(), Q, grad, H * P, 1, vT.data(), Q);
                for (I i = 0; i < rows; i++) for (I j = 0; j < Q; j += L) {
                    vec w = load(&s[i * Q + j]), t = load(&d[i * Q + j]);
                    if (drop > 0) { vec keep = kept(m, b * H + h, i0 + i, j0 + j); t *= keep; store(&s[i * Q + j], w * keep); }
                    store(&d[i * Q + j], w * (t - dot[i0 + i]) * scale);
                }
                gemm(n, P, rows, gv + ((b * T + j0) * G + g) * P, G * P, s.data(), 1, Q, grad, H * P, true);
                gemm(n, P, rows, gk + ((b * T + j0) * G + g) * P, G * P, d.data(), 1, Q, queries, sq, true);
                gemm(rows, P, n, gq + ((b * T + i0) * H + h) * P, H * P, d.data(), Q, 1, keys, sk, true);
            }
        }
    }
}

// --- one token of each of a few sequences: what generation computes again and again. Each function does all of its task, on `threads`
// threads. Its pieces take microseconds, so threads wait for them awake, and sleep when for 20 us there have been none. To wait longer slows
// what Python does between: on 2 cores of a virtual machine a step of 50M parameters in int8 took 5.9 ms, with 100 us 6.4, with 1,000 us 12

struct Pool {                                               // parallel(n, f): f(lo, hi) on parts of 0 to n, whoever is free takes the next
    std::atomic<I> posted{0}, next{0};
    std::atomic<int> inside{0}, sleepers{0};
    std::atomic<bool> open{false};
    std::mutex busy, door;
    std::condition_variable wake;
    int workers = 0, wanted = 0, pid = getpid();
    I n = 0, part = 1;
    void (*run)(void *, I, I) = nullptr;
    void *what = nullptr;

    void share() { for (I lo; (lo = next.fetch_add(part)) < n;) run(what, lo, std::min(n, lo + part)); }
    static void pause() {
#ifdef __SSE__
        __builtin_ia32_pause();
#else
        std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
    }
    void work(int number) {
        for (I seen = 0;;) {
            auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(20);
            for (int i = 1; posted.load() == seen; i++) {
                pause();
                if (i % 64 || std::chrono::steady_clock::now() < until) continue;
                std::unique_lock<std::mutex> lock(door);
                sleepers++;
                wake.wait(lock, [&] { return posted.load() != seen; });
                sleepers--;
            }
            seen = posted.load();
            inside++;                                       // before looking: whoever closes the door waits for those inside
            if (open.load() && number < wanted) share();
            inside--;
        }
    }
    void start(int threads) {
        for (; workers < threads - 1; workers++) std::thread(&Pool::work, this, workers).detach();
    }
};
template <class F> static void parallel(I threads, I n, F f) {
    static Pool *pool = new Pool;                           // never deleted: threads may wait in it to the end
    if (threads > n) threads = n;
    if (threads < 2 || !pool->busy.try_lock()) return f((I)0, n);
    if (pool->pid != getpid()) pool = new Pool, pool->busy.lock();              // threads do not come along into a child
    Pool &p = *pool;
    p.start(threads);
    p.run = [](void *g, I lo, I hi) { (*(F *)g)(lo, hi); }, p.what = &f, p.n = n, p.part = std::max<I>(1, n / (4 * threads));
    p.wanted = threads - 1, p.next = 0, p.open = true, p.posted++;
    if (p.sleepers.load()) { std::lock_guard<std::mutex> lock(p.door); p.wake.notify_all(); }
    p.share();
    p.open = false;
    for (int i = 0; p.inside.load(); i++) if (i < 1000) Pool::pause(); else std::this_thread::yield();     // its core may be this one
    p.busy.unlock();
}

// matrices (rows, columns) by a few vectors, read once, as they are stored; products and sums are fp32
// BF16; INT8: scales, fp32, one a row; INT4: two bf16 a row and 64 columns, scale and zero; there byte i is column i and, times 16, column i + 32
enum Format { FP32, BF16, INT8, INT4 };
struct Matrix { I format, rows, columns; const char *data; const void *scales; };      // as native.py's `matrix` fills it
constexpr I GROUP = 64;
constexpr I BYTES[] = {4 * GROUP, 2 * GROUP, GROUP, GROUP / 2};                 // of GROUP columns
template <class V> static inline V as(const void *p) { V v; memcpy(&v, p, sizeof v); return v; }
#ifdef __AVX512F__                                          // L integers; gcc would take them apart one by one
static inline ivec whole(const int8_t *p) { return (ivec)_mm512_cvtepi8_epi32(as<__m128i>(p)); }
static inline ivec whole(const uint8_t *p) { return (ivec)_mm512_cvtepu8_epi32(as<__m128i>(p)); }
static inline ivec whole(const uint16_t *p) { return (ivec)_mm512_cvtepu16_epi32(as<__m256i>(p)); }
#else
template <class T> static inline ivec whole(const T *p) {
    typedef T narrow __attribute__((vector_size(sizeof(T) * L)));
    typedef int16_t between __attribute__((vector_size(2 * L)));
    typedef uint16_t ubetween __attribute__((vector_size(2 * L)));
    if (sizeof(T) == 2) return __builtin_convertvector(as<ubetween>(p), ivec);
    return __builtin_convertvector(__builtin_convertvector(as<narrow>(p), between), ivec);
}
#endif

struct Levels { vec table; float scale, zero; };            // what the 16 nibbles stand for in a group
static inline Levels levels(const void *scales, I group) {
    uint32_t both = ((const uint32_t *)scales)[group], low = both << 16, high = both & 0xffff0000u;
    float scale = as<float>(&low), zero = as<float>(&high);
    return {__builtin_convertvector(LANE, vec) * scale + zero, scale, zero};
}
static inline float scale_of(const Matrix &a, int format, I row) { return format == INT8 ? ((const float *)a.scales)[row] : 1.f; }
static inline vec pick(const Levels &l, ivec bits) {        // by the low 4 bits
#ifdef __AVX512F__
    return (vec)_mm512_permutexvar_ps((__m512i)bits, (__m512)l.table);
#else
    return __builtin_convertvector(bits & 15, vec) * l.scale + l.zero;
#endif
}
template <int F> static inline vec columns(const char *group, int j, const Levels &l) {  // 16 of a group's columns, of INT8 without its scale
    if (F == FP32) return as<vec>(group + 4 * L * j);
    if (F == BF16) return (vec)(whole((const uint16_t *)group + L * j) << 16);
    if (F == INT8) return __builtin_convertvector(whole((const int8_t *)group + L * j), vec);
    return pick(l, whole((const uint8_t *)group + L * (j % 2)) >> (j / 2 * 4));
}
static inline vec sums(vec *r) {                            // lane i: the sum of r[i]
    swap_all<8>(r), swap_all<4>(r), swap_all<2>(r), swap_all<1>(r);
    for (int n = L / 2; n; n /= 2) for (int i = 0; i < n; i++) r[i] += r[i + n];
    return r[0];
}
// out[m * so + r] = row r + first times x[m], r < R, m < M. x (M, columns up to GROUP, the rest 0)
template <int F, int R, int M> static inline void products(const Matrix &a, I first, const float *x, I sx, float *out, I so) {
    I groups = (a.columns + GROUP - 1) / GROUP, step = F == INT4 ? groups * BYTES[F] : a.columns * BYTES[F] / GROUP;
    const char *row = a.data + first * step;
    vec s[R][M]{};
    for (I g = 0; g < groups; g++) {
        bool cut = F != INT4 && (g + 1) * GROUP > a.columns;
        char rest[R][BYTES[F]];
        const char *p[R];
        Levels l[R];
        for (int r = 0; r < R; r++) {
            p[r] = row + r * step + g * BYTES[F];
            if (cut) memset(rest[r], 0, BYTES[F]), memcpy(rest[r], p[r], step - g * BYTES[F]), p[r] = rest[r];
            else if (F != FP32 || M == 1) for (I i = 0; i < BYTES[F]; i += 64) __builtin_prefetch(p[r] + R * step + i);   // the next rows
            if (F == INT4) l[r] = levels(a.scales, (first + r) * groups + g);
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            vec w[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) w[r] = columns<F>(p[r], j, l[r]);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                vec v = load(x + m * sx + g * GROUP + j * L);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) s[r][m] += w[r] * v;
            }
        }
    }
    if (R * M == L) {
        vec all = sums(s[0]);
        for (int r = 0; r < R; r++) for (int m = 0; m < M; m++) out[m * so + r] = all[r * M + m] * scale_of(a, F, first + r);
    } else for (int r = 0; r < R; r++) for (int m = 0; m < M; m++) out[m * so + r] = sum(s[r][m]) * scale_of(a, F, first + r);
}
template <int F, int R> static inline void products(const Matrix &a, I first, I tokens, const float *x, I sx, float *out, I so, float *room) {
    if (tokens > 4 && F != FP32) {                          // unpacked once, for all tokens
        I wide = up(a.columns, GROUP), step = F == INT4 ? wide / 2 : a.columns * BYTES[F] / GROUP;
        for (int r = 0; r < R; r++) for (I k = 0; k < wide; k += GROUP) {
            const char *p = a.data + (first + r) * step + k * BYTES[F] / GROUP;
            char rest[BYTES[F]]{};
            if (F != INT4 && k + GROUP > a.columns) memcpy(rest, p, step - k * BYTES[F] / GROUP), p = rest;
            Levels l{};
            if (F == INT4) l = levels(a.scales, ((first + r) * wide + k) / GROUP);
                for (int j = 0; j < 4; j++) store(room + r * wide + k + j * L, columns<F>(p, j, l) * scale_of(a, F, first + r));
        }
        return products<FP32, R>({FP32, R, wide, (const char *)room, nullptr}, 0, tokens, x, sx, out, so, nullptr);
    }
    for (; tokens >= 4; tokens -= 4, x += 4 * sx, out += 4 * so) products<F, R, 4>(a, first, x, sx, out, so);
    if (tokens == 3) products<F, R, 3>(a, first, x, sx, out, so);
    if (tokens == 2) products<F, R, 2>(a, first, x, sx, out, so);
    if (tokens == 1) products<F, R, 1>(a, first, x, sx, out, so);
}
template <int F> static void rows(const Matrix &a, I lo, I hi, I tokens, const float *x, I sx, float *y, float *room) {
    I r = lo;
    for (; r + 4 <= hi; r += 4) products<F, 4>(a, r, tokens, x, sx, y + r, a.rows, room);
    for (; r < hi; r++) products<F, 1>(a, r, tokens, x, sx, y + r, a.rows, room);
}
// y[i] (tokens, rows of matrix i) = x (tokens, columns) @ matrix i, transposed; all of the same columns
template <int n> static void linear(I threads, const Matrix *const (&a)[n], I tokens, const float *x, float *const (&y)[n]) {
    I K = a[0]->columns, sx = up(K, GROUP), parts = 0;
    std::vector<float> padded(sx > K ? tokens * sx : 0);
    for (I i = 0; i < tokens && sx > K; i++) memcpy(&padded[i * sx], x + i * K, 4 * K);
    if (sx > K) x = padded.data();
    for (auto m : a) parts += up(m->rows, 4) / 4;
    parallel(4 * parts * K * tokens < 32768 ? 1 : threads, parts, [&](I lo, I hi) {
        Flush flush;
        std::vector<float> room(tokens > 4 ? 4 * sx : 0);
        for (int i = 0; i < n; i++) {
            I mine = up(a[i]->rows, 4) / 4, from = 4 * std::max<I>(lo, 0), to = std::min(4 * hi, a[i]->rows);
            if (from < to) (a[i]->format == FP32 ? rows<FP32> : a[i]->format == BF16 ? rows<BF16> : a[i]->format == INT8 ? rows<INT8> : rows<INT4>)(
                *a[i], from, to, tokens, x, sx, y[i], room.data());
            lo -= mine, hi -= mine;
        }
    });
}
API linear_step(I threads, I tokens, const Matrix *a, const float *x, float *y) { linear<1>(threads, {a}, tokens, x, {y}); }

API mlp_step(I threads, I tokens, const Matrix *gate, const Matrix *up_, const Matrix *down, const float *x, float *y) {
    I inner = gate->rows;
    std::vector<float> room(2 * tokens * inner);
    float *g = room.data(), *u = g + tokens * inner;
    linear<2>(threads, {gate, up_}, tokens, x, {g, u});
    for (I i = 0; i < tokens * inner; i += L) { int n = std::min<I>(L, tokens * inner - i); vec v = load(g + i, n); store(g + i, v * sigmoid(v) * load(u + i, n), n); }
    linear<1>(threads, {down}, tokens, g, {y});
}

// attention of one token of each sequence, x and y (B, D): the caches (B, G, S, P) get its key and value, and slots 0 to pos, or all of a
// ring, are attended to. P a multiple of L, tables (B, P / 2), norms of heads or null
API attention_step(I threads, I B, I H, I G, I P, I S, const Matrix *qm, const Matrix *km, const Matrix *vm, const Matrix *om, const float *q_norm,
                   const float *k_norm, float eps, const I *pos, const float *cosine, const float *sine, float *keys, float *values, const float *x,
                   float *out) {
    std::vector<float> room(B * (2 * H + 2 * G) * P + B * H);
    float *q = room.data(), *k = q + B * H * P, *v = k + B * G * P, *y = v + B * G * P, *rstd = y + B * H * P;
    linear<3>(threads, {qm, km, vm}, B, x, {q, k, v});
    if (q_norm) norm_forward(0, B * H, 0, 1, P, eps, q, nullptr, 0, q_norm, q, rstd), norm_forward(0, B * G, 0, 1, P, eps, k, nullptr, 0, k_norm, k, rstd);
    rope(0, B, 0, B, H, P, q, cosine, sine, 1, q);
    rope(0, B, 0, B, G, P, k, cosine, sine, 1, k);
    I longest = *std::max_element(pos, pos + B) + 1, R = H / G;
    float scale = 1 / std::sqrt((float)P);
    parallel(B * H * std::min(longest, S) * P < 200000 ? 1 : threads, B * G, [&](I lo, I hi) {
        Flush flush;
        std::vector<float> s(up(std::min(longest, S), L));
        for (I i = lo; i < hi; i++) {
            I b = i / G, slot = pos[b] % S, n = std::min(pos[b] + 1, S);
            float *K = keys + i * S * P, *V = values + i * S * P;
            memcpy(K + slot * P, k + i * P, 4 * P), memcpy(V + slot * P, v + i * P, 4 * P);
            for (I h = i * R; h < (i + 1) * R; h++) {       // i = b G + g, h = b H + its head
                float most = -INFINITY, total = 0;
                for (I j = 0; j < n; j++) {
                    vec dot{};
                    for (I p = 0; p < P; p += L) dot += load(q + h * P + p) * load(K + j * P + p);
                    s[j] = sum(dot) * scale, most = std::max(most, s[j]);
                }
                for (I j = n; j < up(n, L); j++) s[j] = -INFINITY;
                for (I j = 0; j < n; j += L) { vec w = expv(load(&s[j]) - most); store(&s[j], w); }
                for (I j = 0; j < n; j++) total += s[j];
                for (I p = 0; p < P; p += L) {
                    vec sum{};
                    for (I j = 0; j < n; j++) sum += s[j] * load(V + j * P + p);
                    store(y + h * P + p, sum * (1 / total));
                }
            }
        }
    });
    linear<1>(threads, {om}, B, y, {out});
}

// silu of the convolution of one token of so many channels, whose input moves into the state (K - 1, E). weight (E, K)
static void conv_step(I E, I K, const float *x, const float *weight, const float *bias, float *state, float *y) {
    for (I e = 0; e < E; e++) {
        float out = bias[e] + weight[e * K + K - 1] * x[e];
        for (I j = 0; j < K - 1; j++) out += weight[e * K + j] * state[j * E + e];
        y[e] = out;
    }
    if (K > 1) memmove(state, state + E, 4 * (K - 2) * E), memcpy(state + (K - 2) * E, x, 4 * E);
    for (I e = 0; e < E; e += L) { int n = E - e < L ? E - e : L; vec v = load(y + e, n); store(y + e, v * sigmoid(v), n); }
}
static void conv_steps(I threads, I B, I E, I K, const float *x, I sx, const float *weight, const float *bias, float *state, float *y) {
    parallel(B * E < 8192 ? 1 : threads, B, [&](I lo, I hi) {
        Flush flush;
        for (I b = lo; b < hi; b++) conv_step(E, K, x + b * sx, weight, bias, state + b * (K - 1) * E, y + b * E);
    });
}
// a Mamba-2's mixer, v and out (B, D): conv (B, K - 1, H P + 2 G N) and h (B, H, P, N) are updated. P and N are multiples of L
API mamba2_step(I threads, I B, I H, I G, I P, I N, I K, const Matrix *in_proj, const Matrix *out_proj, const float *weight, const float *bias,
                const float *dt_bias, const float *A_log, const float *D, const float *norm, float eps, float *conv, float *h, const float *v, float *out) {
    I E = H * P, W = E + 2 * G * N, sx = E + W + H;
    std::vector<float> mixed(B * W), rstd(B * G), room(B * (sx + E));
    float *x = room.data(), *y = x + B * sx;                // x: rows of [z; x, B, C; dt]
    linear<1>(threads, {in_proj}, B, v, {x});
    conv_steps(threads, B, W, K, x + E, sx, weight, bias, conv, mixed.data());
    parallel(B * H * P * N < 32768 ? 1 : threads, B * H, [&](I lo, I hi) {
        Flush flush;
        for (I i = lo; i < hi; i++) {
            I b = i / H, head = i % H, g = head / (H / G);
            const float *u = &mixed[b * W + head * P], *Bs = &mixed[b * W + E + g * N], *Cs = Bs + G * N;
            float dt = softplus(all(x[b * sx + E + W + head] + dt_bias[head]))[0], decay = std::exp(-dt * std::exp(A_log[head]));
            for (I p = 0; p < P; p += L) {
                float *state = h + (i * P + p) * N;
                vec s[L]{}, in = load(u + p), scaled = in * dt;
                for (I n = 0; n < N; n += L) {
                    vec c = load(Cs + n), add = load(Bs + n);
#pragma GCC unroll 16
                    for (int l = 0; l < L; l++) {
                        vec now = load(state + l * N + n) * decay + add * scaled[l];
                        store(state + l * N + n, now), s[l] += now * c;
                    }
                }
                store(y + i * P + p, sums(s) + in * D[head]);
            }
        }
    });
    parallel(B * E < 8192 ? 1 : threads, B, [&](I lo, I hi) { norm_forward(lo, hi, 0, G, E / G, eps, y, x, sx, norm, y, rstd.data()); });
    linear<1>(threads, {out_proj}, B, y, {out});
}
// a Mamba-1's mixer, v and out (B, D): conv (B, K - 1, E) and h (B, N, E) are updated
API mamba1_step(I threads, I B, I E, I N, I K, I R, const Matrix *in_proj, const Matrix *x_proj, const Matrix *dt_proj, const Matrix *out_proj,
                const float *weight, const float *conv_bias, const float *bias, const float *A_log, const float *D, float *conv, float *h, const float *v,
                float *out) {
    I sbc = R + 2 * N, sz = 2 * E;
    std::vector<float> room(B * (5 * E + sbc + R));
    float *both = room.data(), *x = both + B * 2 * E, *raw = x + B * E, *y = raw + B * E, *parts = y + B * E, *low = parts + B * sbc;
    const float *z = both + E, *Bs = parts + R, *Cs = Bs + N;
    linear<1>(threads, {in_proj}, B, v, {both});            // rows of [x; z]
    conv_steps(threads, B, E, K, both, 2 * E, weight, conv_bias, conv, x);
    linear<1>(threads, {x_proj}, B, x, {parts});            // rows of [dt; B; C]
    for (I b = 0; b < B; b++) memcpy(low + b * R, parts + b * sbc, 4 * R);
    linear<1>(threads, {dt_proj}, B, low, {raw});
    parallel(B * E * N < 8192 ? 1 : threads, up(E, L) / L, [&](I lo, I hi) {
        Flush flush;
        std::vector<vec> A(N);
        for (I e = lo * L; e < std::min(hi * L, E); e += L) {
            int n = E - e < L ? E - e : L;
            for (I j = 0; j < N; j++) {
                for (int l = 0; l < n; l++) A[j][l] = A_log[(e + l) * N + j];
                A[j] = -expv(A[j]) * LOG2E;
            }
            for (I b = 0; b < B; b++) {
                vec in = load(x + b * E + e, n), dt = softplus(load(raw + b * E + e, n) + load(bias + e, n)), sum = in * load(D + e, n);
                for (I j = 0; j < N; j++) {
                    float *state = h + (b * N + j) * E + e;
                    vec now = exp2v(dt * A[j]) * load(state, n) + dt * in * Bs[b * sbc + j];
                    store(state, now, n), sum += now * Cs[b * sbc + j];
                }
                vec gate = load(z + b * sz + e, n);
                store(y + b * E + e, sum * gate * sigmoid(gate), n);
            }
        }
    });
    linear<1>(threads, {out_proj}, B, y, {out});
}

// y = x + scale * the sum of a hybrid's branches (B, D), at most 3, each normed if `norms` has weights, by the controller's softmax of h or
// all the same
API mix_step(I B, I D, I n, const float *a, const float *b, const float *c, const float *norm_a, const float *norm_b, const float *norm_c, float eps,
             const float *controller, const float *bias, const float *scale, const float *h, const float *x, float *y) {
    Flush flush;
    const float *branches[] = {a, b, c}, *norms[] = {norm_a, norm_b, norm_c};
    std::vector<float> normed(D);
    for (I r = 0; r < B * D; r += D) {
        float share[3], most = -INFINITY, total = 0, rstd;
        for (I i = 0; i < n; i++) {
            vec dot{};
            for (I j = 0; controller && j < D; j += L) { int m = D - j < L ? D - j : L; dot += load(controller + i * D + j, m) * load(h + r + j, m); }
            share[i] = controller ? sum(dot) + bias[i] : 0, most = std::max(most, share[i]);
        }
        for (I i = 0; i < n; i++) total += share[i] = std::exp(share[i] - most);
        for (I i = 0; i < n; i++) {
            const float *from = branches[i] + r;
            if (norms[i]) norm_forward(0, 1, 0, 1, D, eps, from, nullptr, 0, norms[i], normed.data(), &rstd), from = normed.data();
            for (I j = 0; j < D; j += L) {
                int m = D - j < L ? D - j : L;
                vec before = load((i ? y : x) + r + j, m);
                store(y + r + j, before + load(from + j, m) * load(scale + j, m) * (share[i] / total), m);
            }
        }
    }
}

API add_step(I n, const float *x, const float *y, float *out) { for (I i = 0; i < n; i++) out[i] = x[i] + y[i]; }

// n calls of the functions above, as native.py's Tape notes them: a number of REPLAYED and the arguments, floats by their bits
template <class T> static T from(I a) { if constexpr (std::is_same_v<T, float>) return as<float>(&a); else return (T)a; }
template <class... A, size_t... i> static I invoke(void (*f)(A...), const I *a, std::index_sequence<i...>) { f(from<A>(a[i])...); return sizeof...(A); }
template <class... A> static I invoke(void (*f)(A...), const I *a) { return invoke(f, a, std::index_sequence_for<A...>{}); }
API replay(I n, const I *a) {
    while (n--) switch (*a++) {
        case 0: a += invoke(norm_forward, a); break;
        case 1: a += invoke(add_step, a); break;
        case 2: a += invoke(mlp_step, a); break;
        case 3: a += invoke(attention_step, a); break;
        case 4: a += invoke(mamba1_step, a); break;
        case 5: a += invoke(mamba2_step, a); break;
        case 6: a += invoke(mix_step, a); break;
    }
}

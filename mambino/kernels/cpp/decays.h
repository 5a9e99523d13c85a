// How a state decays within a chunk of rows, and the gradient of that: what the recurrences that are computed
// by chunks have in common.
#pragma once
#include <algorithm>
#include <vector>

#include "vectors.h"

struct Decays {
    std::vector<double> s;                   // sums of the log decay up to each row
    std::vector<float> high, low, from;      // of `difference`
    std::vector<float> grow, to_end;         // exp(s_i), exp(s_end - s_i)
    float kept;                              // exp(s_end)

    explicit Decays(I Q) : s(Q), high(Q), low(Q), from(Q), grow(Q), to_end(Q) {}

    // of s, those of q rows, all the rest
    void add_up(I q) {
        I Q = s.size();
        double total = s[q - 1];
        for (I i = 0; i < Q; i++) {
            grow[i] = i < q ? s[i] : 0;
            to_end[i] = i < q ? total - s[i] : 0;
            high[i] = grow[i];
            low[i] = i < q ? s[i] - high[i] : 0;
        }
        for (I i = 0; i < Q; i += L) {
            store(&grow[i], expv(load(&grow[i])));
            store(&to_end[i], expv(load(&to_end[i])));
        }
        kept = std::exp(total);
    }

    // s_i - s_j: of large sums fp32 loses the small ones, so that each is kept as two numbers' sum
    vec difference(I i, vec upper, vec lower) const { return high[i] - upper + (low[i] - lower); }

    // put(i, j, exp(s_i - s_j)) of L columns from j on, in rows i >= j; what lies above the diagonal is for
    // `put` to leave out. Rows below a block of columns have it as exp(s_i - s_end) exp(s_end - s_j), of the
    // block's end
    template <class Put>
    void each(I q, Put put) {
        for (I j = 0; j < q; j += L) {
            I end = j + L;
            vec upper = load(&high[j]), lower = load(&low[j]);
            for (I i = j; i < std::min(end, q); i++)
                put(i, j, expv(difference(i, upper, lower)));
            if (end >= q)
                break;
            vec to_last = expv(difference(end - 1, upper, lower));
            for (I i = end; i < q; i += L)
                store(&from[i], expv(-difference(end - 1, load(&high[i]), load(&low[i]))));
            for (I i = end; i < q; i++)
                put(i, j, to_last * from[i]);
        }
    }
};

// of products (t + 1), row t's of a matrix of exp(s_t - s_j): what they add to the gradient of s
static void count(I t, const std::vector<float> &products, std::vector<double> &gs) {
    dvec total{};
    for (I j = 0; j <= t; j += L / 2) {
        dvec both = wide(&products[j]);
        total += both;
        store(&gs[j], load(&gs[j]) - both);
    }
    gs[t] += sum(total);
}

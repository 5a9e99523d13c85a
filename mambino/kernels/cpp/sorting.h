// Sorting what may be drawn: some thousand of a row's probabilities.
#pragma once
#include <vector>

#include "vectors.h"

struct Item {
    uint32_t key;
    int32_t place;
};

// by 11 of the keys' bits, equal ones as they stand
static void sort_by(int shift, I n, const Item *from, Item *to) {
    I places[2049]{};
    for (I i = 0; i < n; i++)
        places[(from[i].key >> shift & 2047) + 1]++;
    for (int i = 0; i < 2048; i++)
        places[i + 1] += places[i];
    for (I i = 0; i < n; i++)
        to[places[from[i].key >> shift & 2047]++] = from[i];
}

// values and places (rows, k): of each row of x (rows, V), none below 0, what is no less than its
// `least`, the largest first, equal ones as they stand; the rest is 0. k: at least as many as there are
API sort_above(I lo, I hi, I, I V, I k, const float *x, const float *least, float *values,
               I *places) {
    std::vector<Item> items(k + 1), others(k + 1);
    for (I r = lo; r < hi; r++) {
        I n = 0;
        for (I j = 0; j < V; j++) {
            float v = x[r * V + j];
            uint32_t bits;
            memcpy(&bits, &v, sizeof bits);
            items[n] = {~bits, (int32_t)j};
            n += v >= least[r] && n < k;
        }
        sort_by(0, n, items.data(), others.data());
        sort_by(11, n, others.data(), items.data());
        sort_by(22, n, items.data(), others.data());
        for (I i = 0; i < k; i++) {
            I j = i < n ? others[i].place : 0;
            values[r * k + i] = i < n ? x[r * V + j] : 0;
            places[r * k + i] = j;
        }
    }
}

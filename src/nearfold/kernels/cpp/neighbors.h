// A whole layer of nearest neighbours. Shape legend: as in engine.h.
#pragma once
#include <cstdint>

#include "local.h"

namespace nearfold {

template <class T>
struct NeighborsArgs {
    Flat<T> query, key, value;   // (B, H * E, Q), (B, H * E, N), (B, C, N)
    const int64_t *places;       // (M,): the positions of Q that are queries, ascending; null: all of them, M = Q
    int64_t B, H, M, Q, N, E, C, k, O, G;
    int metric;
    bool unit, squared;          // unit: features are scaled to unit vectors first
    bool own;                    // slot 0 is the query's own position
    bool weighted;               // by softmax of scale * score, otherwise by ones
    T scale;
    const T *weight;             // (O, C / G, k) contiguous, or null
    const T *bias;               // (O,) or null
    int64_t *index;              // (B, H, M, k), or null where nobody wants it
    T *alpha;                    // (B, H, M, k), or null
    T *out;                      // (B, M, O)
    int threads;
};

template <class T>
struct NeighborsBackwardArgs {
    NeighborsArgs<T> of;         // with index, and alpha where weighted; `bias` and `out` unused
    Flat<T> grad;                 // (B, O, M)
    T *d_value;                  // (B, N, C)
    T *d_query, *d_key;          // (B, M, H * E), (B, N, H * E) where weighted
    T *d_weight, *d_bias;        // as weight, (O,); or null
};

}  // namespace nearfold

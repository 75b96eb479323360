// Arguments of the search among points, and of the largest of neighbours. Included by engine.h.
#pragma once
#include <cstdint>

namespace nearfold {

template <class T>
struct PointsArgs {
    const T *key;    // (N, E) contiguous, finite
    const T *query;  // (M, E) contiguous, finite
    const int64_t *key_first, *query_first;  // (clouds + 1,): cloud b has the rows first[b] .. first[b + 1]
    int64_t N, M, E, clouds, k;
    bool own;        // query i is key i, and not its own neighbour
    int64_t *index;  // (M, k)
    int threads;
};

template <class T>
struct LargestArgs {
    const T *value;      // (B, N, C) contiguous
    const int64_t *at;   // (B, M, S) contiguous; negative reads nothing
    int64_t B, N, C, M, S;
    T *out;              // (B, M, C): the largest of each channel, zero where nothing is read
    int64_t *where;      // (B, M, C): its position, the first among equals; -1 where nothing is read
    int threads;
};

template <class T>
struct LargestBackwardArgs {
    LargestArgs<T> of;  // `value`, `at` and `out` unused
    const T *grad;      // (B, M, C) contiguous
    T *d_value;         // (B, N, C) contiguous
};

}  // namespace nearfold

// Arguments of the search among points. Included by engine.h.
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

}  // namespace nearfold

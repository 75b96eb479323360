// Arguments of sums over points between the positions of one map or of several. Included by engine.h.
#pragma once
#include <cstdint>

namespace nearfold {

// Shape legend as in engine.h; S points of a query and head, the same number on each of L maps, one map after the other.
template <class T>
struct SampledArgs {
    const T *value;  // (B, N, C), channels contiguous: the maps' positions one after another
    int64_t value_stride[2];
    const T *place;       // (B, M, H, S, axes) contiguous, in positions of the point's own map
    const T *share;       // (B, M, H, S) contiguous
    const int64_t *grid;  // (L, axes): positions of every map, N of them together
    int64_t B, N, C, M, H, S, L;
    int axes;
    T *out;  // (B, M, C) contiguous
    int threads;
};

template <class T>
struct SampledBackwardArgs {
    SampledArgs<T> of;  // `out` unused
    const T *grad;      // (B, M, C) contiguous
    T *d_value;         // (B, N, C) contiguous
    T *d_place, *d_share;
};

}  // namespace nearfold

// Arguments of the selective scan. Included by engine.h.
#pragma once
#include <cstdint>

namespace nearfold {

template <class T>
struct ScanArgs {
    const T *u, *delta;  // (B, N, C), channels contiguous
    int64_t u_stride[2], delta_stride[2];
    const T *A;      // (C, S) contiguous
    const T *in, *out;  // (B, N, S), the arguments B and C of the scan, states contiguous
    int64_t in_stride[2], out_stride[2];
    int64_t B, N, C, S, chunk;
    T *y;       // (B, N, C) contiguous
    T *states;  // (B, ceil(N / chunk), S, C) contiguous: the state before the first position of every chunk;
                // null where the forward need not keep them
    int threads;
};

template <class T>
struct ScanBackwardArgs {
    ScanArgs<T> of;  // `y` unused, `states` read
    const T *grad;   // (B, N, C) contiguous
    T *d_u, *d_delta;  // (B, N, C) contiguous
    T *d_A;            // (C, S) contiguous
    T *d_in, *d_out;   // (B, N, S) contiguous
};

}  // namespace nearfold

// A whole layer over a window whose slots are moved. Shape legend: as in engine.h; I channels of the input that the
// offsets are made of, D = S * (axes, and one more where there is a mask) numbers of a moved group at an output.
#pragma once
#include <cstdint>

#include "local.h"

namespace nearfold {

template <class T>
struct DeformedArgs {
    Window window;
    int axes;                    // the last ones of the window's three
    Flat<T> input, value;        // (B, I, N), (B, C, N)
    int64_t B, N, M, S, I, C, O, G;
    int64_t H;                   // groups of channels whose slots are moved on their own
    const T *offset_weight, *offset_bias;  // (H * S * axes, I, S) contiguous, (H * S * axes,) or null
    const T *mask_weight, *mask_bias;      // (H * S, I, S) contiguous, (H * S,); null where there is no mask
    const T *weight, *bias;      // (O, C / G, S) contiguous, (O,); or null
    T *moved;                    // (B, H, S, axes, M) offsets, behind them (B, H, S, M) masks; forward: null where unwanted
    T *out;                      // (B, M, O)
    int threads;
};

template <class T>
struct DeformedBackwardArgs {
    DeformedArgs<T> of;          // `moved` is read; `bias` and `out` unused
    Flat<T> grad;                // (B, O, M)
    T *d_input;                  // (B, N, I), or null where the input is the value: d_value then is of both
    T *d_value;                  // (B, N, C)
    T *d_offset_weight, *d_offset_bias, *d_mask_weight, *d_mask_bias, *d_weight, *d_bias;  // null for what is null
};

}  // namespace nearfold

// Arguments of fast weights. Included by engine.h.
#pragma once
#include <cstdint>

namespace nearfold {

// A missing operand is a null pointer. All are contiguous.
template <class T>
struct FastArgs {
    const T *query, *key;  // (B, N, H, s)
    const T *value;        // (B, N, H, p)
    const T *log_decay;    // (B, N, H, decays), decays 1 or s; or missing: no decay
    const T *beta;         // (B, N, H): the delta rule; or missing
    const T *left, *right;  // (B, N, H, s): any correction of rank one; or missing
    int64_t B, N, H, s, p, decays, chunk;
    T *y;       // (B, N, H, p)
    T *reads;   // (B, N, H, p): what a correction reads; missing where nothing is kept, or there is none
    T *states;  // (B, H, ceil(N / chunk), s, p): before every chunk; missing where nothing is kept
    int threads;
};

template <class T>
struct FastBackwardArgs {
    FastArgs<T> of;  // `y` unused, `reads` and `states` read
    const T *grad;   // (B, N, H, p)
    T *d_query, *d_key, *d_value, *d_log_decay, *d_beta, *d_left, *d_right;  // as the operands; missing where they are
};

}  // namespace nearfold

// What the recurrences share.
#pragma once
#include "simd.h"

namespace nearfold {
namespace {

// Numbers below the smallest normal one are zero while this lives: a state that decays would otherwise end in a long row
// of them, each of which costs the processor a hundred cycles.
struct FlushTiny {
#if defined(__SSE2__)
    const unsigned before = _mm_getcsr();
    FlushTiny() { _mm_setcsr(before | 0x8040); }
    ~FlushTiny() { _mm_setcsr(before); }
#else
    FlushTiny() {}
#endif
};

// The first n lanes, zero in the others.
template <class T>
inline Vec<T> load_some(const T *from, int64_t n) {
    if (n >= lanes<T>) return load<T>(from);
    T some[lanes<T>] = {};
    memcpy(some, from, n * sizeof(T));
    return load<T>(some);
}
template <class T>
inline void store_some(T *to, Vec<T> v, int64_t n) {
    if (n >= lanes<T>) return store<T>(to, v);
    memcpy(to, &v, n * sizeof(T));
}

// to[i] = sum over g of from[g * stride + i], in order.
template <class T>
void add_up(int threads, const T *from, int64_t groups, int64_t stride, int64_t n, T *to) {
    constexpr int64_t run = 4096;
    parallel(threads, ceil_div(n, run), [&](int64_t item, int) {
        const int64_t begin = item * run, end = smaller(n, begin + run);
        for (int64_t i = begin; i < end; ++i) to[i] = from[i];
        for (int64_t g = 1; g < groups; ++g)
            for (int64_t i = begin; i < end; ++i) to[i] += from[g * stride + i];
    });
}

}  // namespace
}  // namespace nearfold

// The largest value of neighbours, channel by channel, and where it stands. Rows of channels stay in cache over the slots.
#include <limits>

#include "engine.h"
#include "simd.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int64_t block = 64;  // queries of one piece of work

template <class T>
int largest(const LargestArgs<T> &a) {
    const int64_t blocks = ceil_div(a.M, block);
    int failed = 0, *const bad = &failed;
    parallel(a.threads, a.B * blocks, [&](int64_t item, int) {
        const int64_t b = item / blocks, first = item % blocks * block;
        for (int64_t m = first; m < smaller(first + block, a.M); ++m) {
            const int64_t row = b * a.M + m, *at = a.at + row * a.S;
            const T *value = a.value + b * a.N * a.C;
            T *out = a.out + row * a.C;
            int64_t *where = a.where + row * a.C;
            bool any = false;
            for (int64_t s = 0; s < a.S; ++s) {
                if (at[s] >= a.N) __atomic_store_n(bad, 1, __ATOMIC_RELAXED);
                any |= at[s] >= 0;
            }
            if (!any || __atomic_load_n(bad, __ATOMIC_RELAXED)) {
                fill(out, a.C, T(0));
                fill<int64_t>(where, a.C, invalid);
                continue;
            }
            const auto take = [&](int64_t c, int64_t n) {  // n channels from c on, at most a vector of them
                Vec<T> best{};
                IntVec<T> slot = IntVec<T>{} - 1;
                for (int64_t s = 0; s < a.S; ++s) {
                    if (at[s] < 0) continue;
                    const T *from = value + at[s] * a.C + c;
                    Vec<T> read{};
                    if (n == lanes<T>)
                        read = load<T>(from);
                    else
                        for (int64_t i = 0; i < n; ++i) read[i] = from[i];
                    // a NaN is the largest, and stays
                    const IntVec<T> better = (slot < 0) | (read > best) | ((read != read) & (best == best));
                    best = better ? read : best;
                    slot = better ? IntVec<T>{} + static_cast<Int<T>>(s) : slot;
                }
                for (int64_t i = 0; i < n; ++i) {
                    out[c + i] = best[i];
                    where[c + i] = at[slot[i]];
                }
            };
            int64_t c = 0;
            for (; c + lanes<T> <= a.C; c += lanes<T>) take(c, lanes<T>);
            if (c < a.C) take(c, a.C - c);
        }
    });
    return failed ? bad_index : ok;
}

// Every thread adds to channels of its own: no two of them write one number.
template <class T>
int largest_backward(const LargestBackwardArgs<T> &a) {
    const int64_t N = a.of.N, C = a.of.C, M = a.of.M, wide = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t parts = smaller(ceil_div(C, wide), larger<int64_t>(1, ceil_div(a.of.threads, a.of.B)));
    int failed = 0, *const bad = &failed;
    parallel(a.of.threads, a.of.B * parts, [&](int64_t item, int) {
        const int64_t b = item / parts, part = item % parts, each = round_up(ceil_div(C, parts), wide);
        const int64_t c0 = smaller(part * each, C), c1 = smaller(c0 + each, C);
        T *to = a.d_value + b * N * C;
        for (int64_t n = 0; n < N; ++n) fill(to + n * C + c0, c1 - c0, T(0));
        for (int64_t m = b * M; m < (b + 1) * M; ++m)
            for (int64_t c = c0; c < c1; ++c) {
                const int64_t n = a.of.where[m * C + c];
                if (n >= N)
                    __atomic_store_n(bad, 1, __ATOMIC_RELAXED);
                else if (n >= 0)
                    to[n * C + c] += a.grad[m * C + c];
            }
    });
    return failed ? bad_index : ok;
}

}  // namespace

int largest_float(const LargestArgs<float> &a) { return largest(a); }
int largest_double(const LargestArgs<double> &a) { return largest(a); }
int largest_backward_float(const LargestBackwardArgs<float> &a) { return largest_backward(a); }
int largest_backward_double(const LargestBackwardArgs<double> &a) { return largest_backward(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

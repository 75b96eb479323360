// exp of a vector.
#pragma once
#include "simd.h"

namespace nearfold {
namespace {

template <class T>
struct ExpOf;
template <>
struct ExpOf<float> {
    static constexpr float low = -87.3f, log2e = 1.44269504088896341f;
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, magic = 12582912.0f + 127;
    static constexpr int mantissa = 23, terms = 7;
};
template <>
struct ExpOf<double> {
    static constexpr double low = -708.3, log2e = 1.44269504088896340736;
    static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
    static constexpr double magic = 6755399441055744.0 + 1023;
    static constexpr int mantissa = 52, terms = 13;
};

// exp of what is not large (softmax subtracts the largest), to about an ulp: 2^n times the series of the remainder.
// Zero below the normal numbers; keeps NaN.
template <class T>
inline Vec<T> exponential(Vec<T> x) {
    using C = ExpOf<T>;
    constexpr T inverse[] = {T(1),           T(1),            T(1) / 2,         T(1) / 6,         T(1) / 24,
                             T(1) / 120,     T(1) / 720,      T(1) / 5040,      T(1) / 40320,     T(1) / 362880,
                             T(1) / 3628800, T(1) / 39916800, T(1) / 479001600, T(1) / 6227020800};
    // adding the magic number rounds to an integer, n, and leaves n + the exponent's bias in the low bits
    const Vec<T> shifted = fused<T>(x, splat<T>(C::log2e), splat<T>(C::magic));
    const Vec<T> n = shifted - splat<T>(C::magic);
    const Vec<T> y = fused<T>(n, splat<T>(-C::ln2_low), fused<T>(n, splat<T>(-C::ln2_high), x));
    Vec<T> series = splat<T>(inverse[C::terms]);
#pragma GCC unroll 16
    for (int i = C::terms - 1; i >= 0; --i) series = fused<T>(series, y, splat<T>(inverse[i]));
    IntVec<T> bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits <<= C::mantissa;
    Vec<T> power;
    memcpy(&power, &bits, sizeof bits);
    return x < splat<T>(C::low) ? Vec<T>{} : series * power;
}

}  // namespace
}  // namespace nearfold

// exp of a vector.
#pragma once
#include "simd.h"

namespace nearfold {
namespace {

template <class T>
struct ExpOf;
template <>
struct ExpOf<float> {
    static constexpr float low = -87.3f, high = 88.7f, log2e = 1.44269504088896341f;
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, magic = 12582912.0f;
    static constexpr int bias = 127, mantissa = 23, terms = 7;
};
template <>
struct ExpOf<double> {
    static constexpr double low = -708.3, high = 709.7, log2e = 1.44269504088896340736;
    static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
    static constexpr double magic = 6755399441055744.0;
    static constexpr int bias = 1023, mantissa = 52, terms = 13;
};

// exp, to about an ulp: 2^n times the series of the remainder. Zero below the normal numbers; keeps NaN.
template <class T>
inline Vec<T> exponential(Vec<T> x) {
    using C = ExpOf<T>;
    constexpr T inverse[] = {T(1),           T(1),           T(1) / 2,        T(1) / 6,         T(1) / 24,
                             T(1) / 120,     T(1) / 720,     T(1) / 5040,     T(1) / 40320,     T(1) / 362880,
                             T(1) / 3628800, T(1) / 39916800, T(1) / 479001600, T(1) / 6227020800};
    const Vec<T> low = splat<T>(C::low), high = splat<T>(C::high), magic = splat<T>(C::magic);
    Vec<T> y = x < low ? low : x;
    y = y > high ? high : y;
    const Vec<T> shifted = fused<T>(y, splat<T>(C::log2e), magic);  // its low bits are n
    const Vec<T> n = shifted - magic;
    y = fused<T>(n, splat<T>(-C::ln2_low), fused<T>(n, splat<T>(-C::ln2_high), y));
    Vec<T> series = splat<T>(inverse[C::terms]);
#pragma GCC unroll 16
    for (int i = C::terms - 1; i >= 0; --i) series = fused<T>(series, y, splat<T>(inverse[i]));
    IntVec<T> bits, magic_bits;
    memcpy(&bits, &shifted, sizeof bits);
    memcpy(&magic_bits, &magic, sizeof bits);
    bits = (bits - magic_bits + C::bias) << C::mantissa;
    Vec<T> power;
    memcpy(&power, &bits, sizeof bits);
    return x < low ? Vec<T>{} : series * power;
}

}  // namespace
}  // namespace nearfold

// Vectors of one instruction set, by the compiler's vector extension, and what it has no word for.
//
// Everything here has internal linkage: the sources are compiled once per instruction set, and the linker must never
// choose one set's copy of a function for another.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "threads.h"

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

// Clang says nothing of how fast a fused product is on x86.
#if (defined(__FP_FAST_FMAF) && defined(__FP_FAST_FMA)) || defined(__FMA__)
#define NEARFOLD_FUSES
#endif

namespace nearfold {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int tile_vectors = 4;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int tile_vectors = 2;
#else
constexpr int vector_bytes = 16;
constexpr int tile_vectors = 2;
#endif
constexpr int tile_rows = 6;  // tile_rows x tile_vectors accumulators fill the registers

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float Vec __attribute__((vector_size(vector_bytes)));
    typedef int32_t Int;
    typedef int32_t IntVec __attribute__((vector_size(vector_bytes)));
    static constexpr Int sign = 0x7fffffff;
};
template <>
struct Simd<double> {
    typedef double Vec __attribute__((vector_size(vector_bytes)));
    typedef int64_t Int;
    typedef int64_t IntVec __attribute__((vector_size(vector_bytes)));
    static constexpr Int sign = 0x7fffffffffffffff;
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using IntVec = typename Simd<T>::IntVec;
template <class T>
using Int = typename Simd<T>::Int;
template <class T>
constexpr int lanes = vector_bytes / sizeof(T);
template <class T>
constexpr int tile_columns = tile_vectors * lanes<T>;

template <class T>
inline Vec<T> load(const T *from) {
    Vec<T> v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class T>
inline void store(T *to, Vec<T> v) {
    memcpy(to, &v, sizeof v);
}
// One value in every lane. (`Vec<T>{} + x` would be an addition: the compiler keeps it for the sake of -0.)
template <class T>
inline Vec<T> splat(T x) {
    Vec<T> v;
    for (int i = 0; i < lanes<T>; ++i) v[i] = x;
    return v;
}
#if defined(__AVX512F__)
template <>
inline Vec<float> splat<float>(float x) {
    return (Vec<float>)_mm512_set1_ps(x);
}
template <>
inline Vec<double> splat<double>(double x) {
    return (Vec<double>)_mm512_set1_pd(x);
}
#elif defined(__AVX2__)
template <>
inline Vec<float> splat<float>(float x) {
    return (Vec<float>)_mm256_set1_ps(x);
}
template <>
inline Vec<double> splat<double>(double x) {
    return (Vec<double>)_mm256_set1_pd(x);
}
#endif

// a * b + c, rounded once where the machine can.
template <class T>
inline Vec<T> fused(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(NEARFOLD_FUSES)
    for (int i = 0; i < lanes<T>; ++i) c[i] = sizeof(T) == 4 ? __builtin_fmaf(a[i], b[i], c[i]) : __builtin_fma(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}
#if defined(__AVX512F__)
template <>
inline Vec<float> fused<float>(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
template <>
inline Vec<double> fused<double>(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
template <>
inline Vec<float> fused<float>(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
template <>
inline Vec<double> fused<double>(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#endif

// The same of one number, with the same bits.
template <class T>
inline T fused_one(T a, T b, T c) {
#if defined(NEARFOLD_FUSES)
    return sizeof(T) == 4 ? __builtin_fmaf(a, b, c) : __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

template <class T>
inline T sum(Vec<T> v) {
    T total = 0;
    for (int i = 0; i < lanes<T>; ++i) total += v[i];
    return total;
}
#if defined(__AVX512F__)
template <>
inline float sum<float>(Vec<float> v) {
    return _mm512_reduce_add_ps((__m512)v);
}
#endif

// One bit per lane where a > b; NaN is never greater. Masks become numbers by _cvtmask*_u32 and not by a conversion: GCC
// 12 may spill an 8-bit mask as one byte and let popcnt read eight.
template <class T>
inline uint64_t greater(Vec<T> a, Vec<T> b) {
    const IntVec<T> hit = a > b;
    uint64_t bits = 0;
    for (int i = 0; i < lanes<T>; ++i) bits |= static_cast<uint64_t>(hit[i] != 0) << i;
    return bits;
}
#if defined(__AVX512F__)
template <>
inline uint64_t greater<float>(Vec<float> a, Vec<float> b) {
    return _cvtmask16_u32(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ));
}
template <>
inline uint64_t greater<double>(Vec<double> a, Vec<double> b) {
    return _cvtmask8_u32(_mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ));
}
#elif defined(__AVX2__)
template <>
inline uint64_t greater<float>(Vec<float> a, Vec<float> b) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
}
template <>
inline uint64_t greater<double>(Vec<double> a, Vec<double> b) {
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ));
}
#elif defined(__SSE2__)
template <>
inline uint64_t greater<float>(Vec<float> a, Vec<float> b) {
    return _mm_movemask_ps(_mm_cmpgt_ps((__m128)a, (__m128)b));
}
template <>
inline uint64_t greater<double>(Vec<double> a, Vec<double> b) {
    return _mm_movemask_pd(_mm_cmpgt_pd((__m128d)a, (__m128d)b));
}
#endif

template <class T, int vectors>
inline bool any_greater(const Vec<T> *a, Vec<T> b) {
    uint64_t bits = 0;
    for (int v = 0; v < vectors; ++v) bits |= greater<T>(a[v], b);
    return bits != 0;
}
#if defined(__AVX512F__)
template <>
inline bool any_greater<float, 4>(const Vec<float> *a, Vec<float> b) {
    const __m512 bound = (__m512)b;
    const __mmask16 low = _kor_mask16(_mm512_cmp_ps_mask((__m512)a[0], bound, _CMP_GT_OQ),
                                      _mm512_cmp_ps_mask((__m512)a[1], bound, _CMP_GT_OQ));
    const __mmask16 high = _kor_mask16(_mm512_cmp_ps_mask((__m512)a[2], bound, _CMP_GT_OQ),
                                       _mm512_cmp_ps_mask((__m512)a[3], bound, _CMP_GT_OQ));
    return !_kortestz_mask16_u8(low, high);
}
#endif

// One bit per lane where a >= level.
template <class T>
inline uint64_t at_least(IntVec<T> a, Int<T> level) {
    const IntVec<T> hit = a >= (IntVec<T>{} + level);
    uint64_t bits = 0;
    for (int i = 0; i < lanes<T>; ++i) bits |= static_cast<uint64_t>(hit[i] != 0) << i;
    return bits;
}
#if defined(__AVX512F__)
template <>
inline uint64_t at_least<float>(IntVec<float> a, int32_t level) {
    return _cvtmask16_u32(_mm512_cmpge_epi32_mask((__m512i)a, _mm512_set1_epi32(level)));
}
template <>
inline uint64_t at_least<double>(IntVec<double> a, int64_t level) {
    return _cvtmask8_u32(_mm512_cmpge_epi64_mask((__m512i)a, _mm512_set1_epi64(level)));
}
#elif defined(__AVX2__)
template <>
inline uint64_t at_least<float>(IntVec<float> a, int32_t level) {
    return 0xff & ~_mm256_movemask_ps((__m256)_mm256_cmpgt_epi32(_mm256_set1_epi32(level), (__m256i)a));
}
template <>
inline uint64_t at_least<double>(IntVec<double> a, int64_t level) {
    return 0xf & ~_mm256_movemask_pd((__m256d)_mm256_cmpgt_epi64(_mm256_set1_epi64x(level), (__m256i)a));
}
#endif

// Writes the lanes of the set bits next to one another, and how many they are; may write a whole vector.
template <class T>
inline int64_t compress(Int<T> *to, IntVec<T> v, uint64_t bits) {
    Int<T> each[lanes<T>];
    memcpy(each, &v, sizeof v);
    int64_t n = 0;
    for (; bits; bits &= bits - 1) to[n++] = each[__builtin_ctzll(bits)];
    return n;
}
#if defined(__AVX512F__)
template <>
inline int64_t compress<float>(int32_t *to, IntVec<float> v, uint64_t bits) {
    const __mmask16 mask = static_cast<__mmask16>(bits);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, (__m512i)v));
    return __builtin_popcount(_cvtmask16_u32(mask));
}
template <>
inline int64_t compress<double>(int64_t *to, IntVec<double> v, uint64_t bits) {
    const __mmask8 mask = static_cast<__mmask8>(bits);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(mask, (__m512i)v));
    return __builtin_popcount(_cvtmask8_u32(mask));
}
#endif

template <class T>
inline Int<T> least(IntVec<T> v) {
    Int<T> low = v[0];
    for (int i = 1; i < lanes<T>; ++i) low = v[i] < low ? v[i] : low;
    return low;
}
template <class T>
inline Int<T> most(IntVec<T> v) {
    return ~least<T>(~v);
}
#if defined(__AVX512F__)
template <>
inline int32_t least<float>(IntVec<float> v) {
    return _mm512_reduce_min_epi32((__m512i)v);
}
template <>
inline int64_t least<double>(IntVec<double> v) {
    return _mm512_reduce_min_epi64((__m512i)v);
}
#endif

// to += a * x. Whole vectors first: rows are short, and what a compiler puts around a plain loop costs as much as it.
template <class T>
inline void add_scaled(T *to, T a, const T *x, int64_t n) {
    const Vec<T> factor = splat<T>(a);
    int64_t i = 0;
    for (; i + 4 * lanes<T> <= n; i += 4 * lanes<T>)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            T *at = to + i + v * lanes<T>;
            store<T>(at, fused<T>(factor, load<T>(x + i + v * lanes<T>), load<T>(at)));
        }
    for (; i + lanes<T> <= n; i += lanes<T>) store<T>(to + i, fused<T>(factor, load<T>(x + i), load<T>(to + i)));
    for (; i < n; ++i) to[i] += a * x[i];
}

template <class T>
inline T dot_product(const T *x, const T *y, int64_t n) {
    Vec<T> acc{}, other{};
    int64_t i = 0;
    for (; i + 2 * lanes<T> <= n; i += 2 * lanes<T>) {
        acc = fused<T>(load<T>(x + i), load<T>(y + i), acc);
        other = fused<T>(load<T>(x + i + lanes<T>), load<T>(y + i + lanes<T>), other);
    }
    for (; i + lanes<T> <= n; i += lanes<T>) acc = fused<T>(load<T>(x + i), load<T>(y + i), acc);
    T total = sum<T>(acc + other);
    for (; i < n; ++i) total += x[i] * y[i];
    return total;
}

// Lane i: the sum of v[i]. Each sum adds its lanes in the same order, wherever it stands.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define NEARFOLD_SHUFFLES
#endif
#endif
#if defined(NEARFOLD_SHUFFLES)
// Where bit `step` of the lane is clear: a[lane] + a[lane ^ step], elsewhere the same of b.
template <class T, int step, size_t... lane>
inline Vec<T> add_halves(Vec<T> a, Vec<T> b, std::index_sequence<lane...>) {
    constexpr int n = lanes<T>;
    return __builtin_shufflevector(a, b, (lane & step ? n + lane : lane)...) +
           __builtin_shufflevector(a, b, (lane & step ? n + (lane ^ step) : lane ^ step)...);
}
template <class T, int step>
inline void add_all_halves(Vec<T> *v) {
#pragma GCC unroll 16
    for (int i = 0; i < step; ++i) v[i] = add_halves<T, step>(v[i], v[i + step], std::make_index_sequence<lanes<T>>());
    if constexpr (step > 1) add_all_halves<T, step / 2>(v);
}
template <class T>
inline Vec<T> sums(Vec<T> *v) {
    add_all_halves<T, lanes<T> / 2>(v);
    return v[0];
}
#else
template <class T>
inline Vec<T> sums(Vec<T> *v) {
    Vec<T> total;
    for (int i = 0; i < lanes<T>; ++i) total[i] = sum<T>(v[i]);
    return total;
}
#endif

// Lane i: the dot product of x(i) and y(i).
template <class T, class X, class Y>
inline Vec<T> dot_products(const X &x, const Y &y, int64_t n) {
    Vec<T> acc[lanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < lanes<T>; ++i) {
        Vec<T> a{};
        for (int64_t c = 0; c + lanes<T> <= n; c += lanes<T>) a = fused<T>(load<T>(x(i) + c), load<T>(y(i) + c), a);
        acc[i] = a;
    }
    Vec<T> total = sums<T>(acc);
    for (int64_t c = n / lanes<T> * lanes<T>; c < n; ++c)
        for (int i = 0; i < lanes<T>; ++i) total[i] += x(i)[c] * y(i)[c];
    return total;
}

// Dot products that wait for one another, to be computed together.
template <class T>
struct Dots {
    const T *x[lanes<T>], *y[lanes<T>];
    T *to[lanes<T>];
    int count = 0;

    // *where += one . other over n numbers, at the latest when `flush` is called with the same n.
    void push(const T *one, const T *other, int64_t n, T *where) {
        x[count] = one, y[count] = other, to[count] = where;
        if (++count == lanes<T>) flush(n);
    }
    void flush(int64_t n) {
        if (count == 0) return;
        for (int i = count; i < lanes<T>; ++i) x[i] = x[0], y[i] = y[0];
        T found[lanes<T>];
        store<T>(found, dot_products<T>([&](int i) { return x[i]; }, [&](int i) { return y[i]; }, n));
        for (int i = 0; i < count; ++i) *to[i] += found[i];
        count = 0;
    }
};

// Asks for a row that is read soon: rows of neighbours lie where no hardware foresees.
template <class T>
inline void prefetch(const T *row, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}
constexpr int64_t ahead = 6;  // slots between the request and the use

template <class T>
inline void fill(T *to, int64_t n, T x) {
    for (int64_t i = 0; i < n; ++i) to[i] = x;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class A>
constexpr A smaller(A a, A b) {
    return b < a ? b : a;
}
template <class A>
constexpr A larger(A a, A b) {
    return a < b ? b : a;
}

// A number that is a type: a loop's body is compiled once for each.
template <int number>
struct Count {
    static constexpr int n = number;
};

// Calls with the number of vectors that `columns` columns fill, as a compile-time constant.
template <class T, class F>
inline void with_vectors(int64_t columns, const F &call) {
    switch (ceil_div(columns, lanes<T>)) {
        case 1: return call(Count<1>{});
        case 2: return call(Count<2>{});
        case 3: return call(Count<smaller(3, tile_vectors)>{});
        default: return call(Count<smaller(4, tile_vectors)>{});
    }
}

// Columns 0..n in panels of at most tile_columns: how wide the one is that starts at `first`.
template <class T>
inline int64_t panel_width(int64_t n, int64_t first) {
    return round_up(smaller<int64_t>(tile_columns<T>, n - first), lanes<T>);
}
// Memory of one call: aligned, freed at the end of its scope, `ok()` false when there was none.
class Scratch {
   public:
    explicit Scratch(int64_t bytes) : data_(::operator new(static_cast<size_t>(round_up(bytes + 1, 64)), line, std::nothrow)) {}
    ~Scratch() { ::operator delete(data_, line); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    bool ok() const { return data_ != nullptr; }
    template <class A>
    A *at(int64_t byte = 0) const {
        return reinterpret_cast<A *>(static_cast<char *>(data_) + byte);
    }

   private:
    static constexpr std::align_val_t line{64};
    void *data_;
};

// body(item, worker) for every item, on the threads of run_items.
template <class F>
inline void parallel(int threads, int64_t items, const F &body) {
    run_items(
        threads, items,
        [](void *context, int64_t item, int worker) { (*static_cast<const F *>(context))(item, worker); },
        const_cast<void *>(static_cast<const void *>(&body)));
}

}  // namespace
}  // namespace nearfold

// Bindings of the search among points, and of the largest of neighbours.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nearfold {
namespace {

template <class T, size_t ndim>
using Array = nb::ndarray<T, nb::ndim<ndim>, nb::device::cpu>;

constexpr int64_t most_rows = (int64_t(1) << 31) - 1;

void require_firsts(const Array<const int64_t, 1> &first, int64_t clouds, int64_t rows) {
    require(static_cast<int64_t>(first.shape(0)) == clouds + 1 && contiguous(first),
            "points: the clouds' first rows must be (clouds + 1,), contiguous, of query and key alike");
    require(first.data()[0] == 0 && first.data()[clouds] == rows, "points: the clouds must hold every row");
    for (int64_t b = 0; b < clouds; ++b)
        require(first.data()[b] <= first.data()[b + 1], "points: a cloud must not end before it begins");
}

template <class T>
struct Table;
template <>
struct Table<float> {
    static constexpr auto points = &Engine::points_float;
    static constexpr auto largest = &Engine::largest_float;
    static constexpr auto largest_backward = &Engine::largest_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto points = &Engine::points_double;
    static constexpr auto largest = &Engine::largest_double;
    static constexpr auto largest_backward = &Engine::largest_backward_double;
};

template <class T>
void points(Array<const T, 2> query, Array<const T, 2> key, Array<const int64_t, 1> query_first,
            Array<const int64_t, 1> key_first, bool own, Array<int64_t, 2> index, int threads) {
    PointsArgs<T> a;
    a.M = query.shape(0), a.N = key.shape(0), a.E = query.shape(1), a.k = index.shape(1), a.threads = threads;
    require(static_cast<int64_t>(key.shape(1)) == a.E && a.E >= 1 && a.E <= 64 && contiguous(query) && contiguous(key),
            "points: query must be (M, e) and key (N, e), contiguous, e from 1 to 64");
    require(a.k >= 1 && threads >= 1 && a.k <= most_rows && a.N <= most_rows, "points: k and threads are at least 1");
    require(static_cast<int64_t>(index.shape(0)) == a.M && contiguous(index), "points: index must be (M, k), contiguous");
    require(key_first.shape(0) >= 1, "points: the clouds' first rows must be (clouds + 1,)");
    a.clouds = static_cast<int64_t>(key_first.shape(0)) - 1;
    require_firsts(query_first, a.clouds, a.M);
    require_firsts(key_first, a.clouds, a.N);
    if (own)
        for (int64_t b = 0; b <= a.clouds; ++b)
            require(query_first.data()[b] == key_first.data()[b], "points: own needs the queries to be the keys");
    a.query = query.data(), a.key = key.data(), a.own = own, a.index = index.data();
    a.query_first = query_first.data(), a.key_first = key_first.data();
    run(Table<T>::points, a);
}

template <class A>
bool is(const A &array, int64_t one, int64_t other, int64_t last) {
    return static_cast<int64_t>(array.shape(0)) == one && static_cast<int64_t>(array.shape(1)) == other &&
           static_cast<int64_t>(array.shape(2)) == last && contiguous(array);
}

template <class T>
void largest(Array<const T, 3> value, Array<const int64_t, 3> at, Array<T, 3> out, Array<int64_t, 3> where, int threads) {
    LargestArgs<T> a;
    a.B = value.shape(0), a.N = value.shape(1), a.C = value.shape(2), a.M = at.shape(1), a.S = at.shape(2);
    require(contiguous(value) && is(at, a.B, a.M, a.S), "largest: value must be (B, N, C) and at (B, M, S), contiguous");
    require(is(out, a.B, a.M, a.C) && is(where, a.B, a.M, a.C), "largest: out and where must be (B, M, C), contiguous");
    require(threads >= 1 && a.S <= most_rows, "largest: threads is at least 1");
    a.value = value.data(), a.at = at.data(), a.out = out.data(), a.where = where.data(), a.threads = threads;
    run(Table<T>::largest, a);
}

template <class T>
void largest_backward(Array<const T, 3> grad, Array<const int64_t, 3> where, Array<T, 3> d_value, int threads) {
    LargestBackwardArgs<T> a{};
    a.of.B = d_value.shape(0), a.of.N = d_value.shape(1), a.of.C = d_value.shape(2), a.of.M = grad.shape(1);
    require(contiguous(d_value) && is(grad, a.of.B, a.of.M, a.of.C) && is(where, a.of.B, a.of.M, a.of.C),
            "largest: grad and where must be (B, M, C), contiguous, next to value");
    require(threads >= 1, "largest: threads is at least 1");
    if (a.of.B == 0 || a.of.C == 0) return;
    a.of.where = const_cast<int64_t *>(where.data()), a.of.threads = threads;
    a.grad = grad.data(), a.d_value = d_value.data();
    run(Table<T>::largest_backward, a);
}

template <class T>
void bind(nb::module_ &m) {
    m.def("largest", &largest<T>, "value"_a.noconvert(), "at"_a.noconvert(), "out"_a.noconvert(), "where"_a.noconvert(),
          "threads"_a);
    m.def("largest_backward", &largest_backward<T>, "grad"_a.noconvert(), "where"_a.noconvert(), "d_value"_a.noconvert(),
          "threads"_a);
    m.def("points", &points<T>, "query"_a.noconvert(), "key"_a.noconvert(), "query_first"_a.noconvert(),
          "key_first"_a.noconvert(), "own"_a, "index"_a.noconvert(), "threads"_a);
}

}  // namespace

void bind_points(nb::module_ &m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace nearfold

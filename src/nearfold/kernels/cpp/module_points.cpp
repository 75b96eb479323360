// Bindings of the search among points.
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
};
template <>
struct Table<double> {
    static constexpr auto points = &Engine::points_double;
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

template <class T>
void bind(nb::module_ &m) {
    m.def("points", &points<T>, "query"_a.noconvert(), "key"_a.noconvert(), "query_first"_a.noconvert(),
          "key_first"_a.noconvert(), "own"_a, "index"_a.noconvert(), "threads"_a);
}

}  // namespace

void bind_points(nb::module_ &m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace nearfold

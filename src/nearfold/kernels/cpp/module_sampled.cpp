// Bindings of sums over points between positions.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <nanobind/stl/vector.h>

#include <vector>

#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nearfold {
namespace {

template <class T, size_t ndim>
using Array = nb::ndarray<T, nb::ndim<ndim>, nb::device::cpu>;
using Sizes = std::vector<int64_t>;

constexpr int64_t limit = int64_t{1} << 27;  // of the positions of all maps: what lies beside them is a 32-bit number, too

template <class A>
bool is(const A &array, const Sizes &shape) {
    for (size_t x = 0; x < shape.size(); ++x)
        if (static_cast<int64_t>(array.shape(x)) != shape[x]) return false;
    return contiguous(array);
}

template <class T>
SampledArgs<T> arguments(const Array<const T, 3> &value, const Array<const T, 5> &place, const Array<const T, 4> &share,
                         const Sizes &grid, int threads) {
    SampledArgs<T> a;
    a.B = value.shape(0), a.N = value.shape(1), a.C = value.shape(2), a.M = place.shape(1), a.H = place.shape(2);
    a.S = place.shape(3), a.axes = static_cast<int>(place.shape(4)), a.threads = threads;
    require(place.shape(4) >= 1 && place.shape(4) <= 3 && threads >= 1, "sampled: 1 to 3 axes, and at least one thread");
    require(is(place, {a.B, a.M, a.H, a.S, a.axes}) && is(share, {a.B, a.M, a.H, a.S}),
            "sampled: place must be (B, M, H, S, axes) and share (B, M, H, S), contiguous");
    require(a.H >= 1 && a.S >= 1 && a.C >= 1 && a.C % a.H == 0, "sampled: heads must divide the channels");
    require(!grid.empty() && grid.size() % a.axes == 0, "sampled: grid must be one number for every map and axis");
    a.L = static_cast<int64_t>(grid.size()) / a.axes;
    require(a.S % a.L == 0, "sampled: the maps must have the same number of points");
    int64_t all = 0;
    for (int64_t l = 0; l < a.L; ++l) {
        int64_t positions = 1;
        for (int x = 0; x < a.axes; ++x) {
            const int64_t n = grid[l * a.axes + x];
            require(n >= 1 && n < limit && positions * n < limit, "sampled: grid must be positive, its maps below 2^27");
            positions *= n;
        }
        all += positions;
        require(all < limit, "sampled: all maps together must be below 2^27 positions");
    }
    require(all == a.N, "sampled: value must have as many positions as the maps of grid together");
    const bool rows = (a.C <= 1 || value.stride(2) == 1) && (a.N <= 1 || value.stride(1) >= a.C) && value.stride(0) >= 0;
    require(rows, "sampled: the channels of value must be contiguous");
    a.value = value.data(), a.value_stride[0] = value.stride(0), a.value_stride[1] = value.stride(1);
    a.place = place.data(), a.share = share.data(), a.grid = grid.data(), a.out = nullptr;
    return a;
}

template <class T>
struct Table;
template <>
struct Table<float> {
    static constexpr auto sampled = &Engine::sampled_float;
    static constexpr auto backward = &Engine::sampled_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto sampled = &Engine::sampled_double;
    static constexpr auto backward = &Engine::sampled_backward_double;
};

template <class T>
void sampled(Array<const T, 3> value, Array<const T, 5> place, Array<const T, 4> share, Sizes grid, Array<T, 3> out,
             int threads) {
    SampledArgs<T> a = arguments<T>(value, place, share, grid, threads);
    require(is(out, {a.B, a.M, a.C}), "sampled: out must be (B, M, C), contiguous");
    a.out = out.data();
    run(Table<T>::sampled, a);
}

template <class T>
void sampled_backward(Array<const T, 3> grad, Array<const T, 3> value, Array<const T, 5> place, Array<const T, 4> share,
                      Sizes grid, Array<T, 3> d_value, Array<T, 5> d_place, Array<T, 4> d_share, int threads) {
    SampledBackwardArgs<T> a;
    a.of = arguments<T>(value, place, share, grid, threads);
    require(is(grad, {a.of.B, a.of.M, a.of.C}), "sampled: grad must be (B, M, C), contiguous");
    require(is(d_value, {a.of.B, a.of.N, a.of.C}), "sampled: d_value must be (B, N, C), contiguous");
    require(is(d_place, {a.of.B, a.of.M, a.of.H, a.of.S, a.of.axes}) && is(d_share, {a.of.B, a.of.M, a.of.H, a.of.S}),
            "sampled: d_place and d_share must be as place and share");
    a.grad = grad.data(), a.d_value = d_value.data(), a.d_place = d_place.data(), a.d_share = d_share.data();
    run(Table<T>::backward, a);
}

template <class T>
void bind(nb::module_ &m) {
    m.def("sampled", &sampled<T>, "value"_a.noconvert(), "place"_a.noconvert(), "share"_a.noconvert(), "grid"_a,
          "out"_a.noconvert(), "threads"_a);
    m.def("sampled_backward", &sampled_backward<T>, "grad"_a.noconvert(), "value"_a.noconvert(), "place"_a.noconvert(),
          "share"_a.noconvert(), "grid"_a, "d_value"_a.noconvert(), "d_place"_a.noconvert(), "d_share"_a.noconvert(),
          "threads"_a);
}

}  // namespace

void bind_sampled(nb::module_ &m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace nearfold

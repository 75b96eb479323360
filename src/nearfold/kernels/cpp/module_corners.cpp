// Bindings of the fractional positions.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nearfold {
namespace {

template <class T, size_t ndim>
using Array = nb::ndarray<T, nb::ndim<ndim>, nb::device::cpu>;
using Sizes = std::vector<int64_t>;

constexpr int64_t limit = int64_t{1} << 28;  // of a number, and of the positions of a grid: products stay integers

// Axes that are not there come first, with one position.
void take(int64_t *to, const Sizes &from, size_t axes, int64_t least, int64_t missing, const char *what) {
    require(from.size() == axes, what);
    for (size_t a = 0; a < 3; ++a) {
        to[a] = a + axes < 3 ? missing : from[a + axes - 3];
        require(to[a] >= least && to[a] < limit, what);
    }
}

template <class T>
CornersArgs<T> arguments(const Array<const T, 4> &offset, const std::optional<Array<const T, 3>> &mask, const Sizes &grid,
                         const Sizes &out, const Sizes &size, const Sizes &stride, const Sizes &dilation,
                         const Sizes &before, int threads) {
    CornersArgs<T> a;
    a.axes = static_cast<int>(grid.size()), a.threads = threads;
    require(a.axes >= 1 && a.axes <= 3 && threads >= 1, "corners: 1 to 3 axes, and at least one thread");
    const size_t axes = grid.size();
    take(a.window.grid, grid, axes, 1, 1, "corners: grid is one positive number per axis");
    take(a.window.out, out, axes, 1, 1, "corners: out is one positive number per axis");
    take(a.window.size, size, axes, 1, 1, "corners: size is one positive number per axis");
    take(a.window.stride, stride, axes, 1, 1, "corners: stride is one positive number per axis");
    take(a.window.dilation, dilation, axes, 1, 1, "corners: dilation is one positive number per axis");
    take(a.window.before, before, axes, 0, 0, "corners: before is one number per axis");
    a.window.reflect = false;
    a.planes = offset.shape(0), a.S = 1, a.M = 1;
    int64_t positions = 1;
    for (size_t x = 0; x < axes; ++x) {
        a.S *= size[x], a.M *= out[x], positions *= grid[x] + 2;
        require(std::max({a.S, a.M, positions, out[x] * stride[x], size[x] * dilation[x], before[x]}) < limit,
                "corners: the grid, the outputs and the window must be below 2^28 positions");
    }
    const auto is = [](size_t n, int64_t m) { return static_cast<int64_t>(n) == m; };
    require(is(offset.shape(1), a.S) && is(offset.shape(2), a.axes) && is(offset.shape(3), a.M) && contiguous(offset),
            "corners: offset must be (planes, slots, axes, outputs), contiguous");
    a.offset = offset.data(), a.mask = nullptr, a.index = nullptr, a.share = nullptr;
    if (mask) {
        require(is(mask->shape(0), a.planes) && is(mask->shape(1), a.S) && is(mask->shape(2), a.M) && contiguous(*mask),
                "corners: mask must be (planes, slots, outputs), contiguous");
        a.mask = mask->data();
    }
    return a;
}

template <class T>
struct Table;
template <>
struct Table<float> {
    static constexpr auto corners = &Engine::corners_float;
    static constexpr auto backward = &Engine::corners_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto corners = &Engine::corners_double;
    static constexpr auto backward = &Engine::corners_backward_double;
};

template <class A, class T>
bool entries(const A &array, const CornersArgs<T> &a) {
    return static_cast<int64_t>(array.shape(0)) == a.planes && static_cast<int64_t>(array.shape(1)) == (a.S << a.axes) &&
           static_cast<int64_t>(array.shape(2)) == a.M && contiguous(array);
}

template <class T>
void corners(Array<const T, 4> offset, std::optional<Array<const T, 3>> mask, Sizes grid, Sizes out, Sizes size,
             Sizes stride, Sizes dilation, Sizes before, Array<int64_t, 3> index, Array<T, 3> share, int threads) {
    CornersArgs<T> a = arguments<T>(offset, mask, grid, out, size, stride, dilation, before, threads);
    require(entries(index, a) && entries(share, a), "corners: index and share must be (planes, entries, outputs)");
    a.index = index.data(), a.share = share.data();
    run(Table<T>::corners, a);
}

template <class T>
void corners_backward(Array<const T, 3> grad, Array<const T, 4> offset, std::optional<Array<const T, 3>> mask, Sizes grid,
                      Sizes out, Sizes size, Sizes stride, Sizes dilation, Sizes before, Array<T, 4> d_offset,
                      std::optional<Array<T, 3>> d_mask, int threads) {
    CornersBackwardArgs<T> a;
    a.of = arguments<T>(offset, mask, grid, out, size, stride, dilation, before, threads);
    require(entries(grad, a.of), "corners: grad must be (planes, entries, outputs), contiguous");
    require(contiguous(d_offset) && d_offset.size() == offset.size(), "corners: d_offset must be as offset");
    require(d_mask.has_value() == mask.has_value() && (!d_mask || (contiguous(*d_mask) && d_mask->size() == mask->size())),
            "corners: d_mask must be as mask");
    a.grad = grad.data(), a.d_offset = d_offset.data(), a.d_mask = d_mask ? d_mask->data() : nullptr;
    run(Table<T>::backward, a);
}

template <class T>
void bind(nb::module_ &m) {
    m.def("corners", &corners<T>, "offset"_a.noconvert(), "mask"_a.noconvert().none(), "grid"_a, "out"_a, "size"_a,
          "stride"_a, "dilation"_a, "before"_a, "index"_a.noconvert(), "share"_a.noconvert(), "threads"_a);
    m.def("corners_backward", &corners_backward<T>, "grad"_a.noconvert(), "offset"_a.noconvert(),
          "mask"_a.noconvert().none(), "grid"_a, "out"_a, "size"_a, "stride"_a, "dilation"_a, "before"_a,
          "d_offset"_a.noconvert(), "d_mask"_a.noconvert().none(), "threads"_a);
}

}  // namespace

void bind_corners(nb::module_ &m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace nearfold

// Bindings of the fractional positions, and of the layer that reads at them.
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

// What `a` and `DeformedArgs` have in common: the window, its axes, slots and outputs.
template <class A>
void take_window(A &a, const Sizes &grid, const Sizes &out, const Sizes &size, const Sizes &stride, const Sizes &dilation,
                 const Sizes &before, int threads) {
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
    a.S = 1, a.M = 1;
    int64_t positions = 1;
    for (size_t x = 0; x < axes; ++x) {
        a.S *= size[x], a.M *= out[x], positions *= grid[x] + 2;
        require(std::max({a.S, a.M, positions, out[x] * stride[x], size[x] * dilation[x], before[x]}) < limit,
                "corners: the grid, the outputs and the window must be below 2^28 positions");
    }
}

bool is(size_t n, int64_t m) { return static_cast<int64_t>(n) == m; }

template <class T>
CornersArgs<T> arguments(const Array<const T, 4> &offset, const std::optional<Array<const T, 3>> &mask, const Sizes &grid,
                         const Sizes &out, const Sizes &size, const Sizes &stride, const Sizes &dilation,
                         const Sizes &before, int threads) {
    CornersArgs<T> a;
    take_window(a, grid, out, size, stride, dilation, before, threads);
    a.planes = offset.shape(0);
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
    static constexpr auto deformed = &Engine::deformed_float;
    static constexpr auto deformed_backward = &Engine::deformed_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto corners = &Engine::corners_double;
    static constexpr auto backward = &Engine::corners_backward_double;
    static constexpr auto deformed = &Engine::deformed_double;
    static constexpr auto deformed_backward = &Engine::deformed_backward_double;
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
using Any = nb::ndarray<T, nb::device::cpu>;
template <class T>
using Maybe = std::optional<Any<T>>;

// Parameters of a map of the channels: contiguous, so many numbers in so many rows; missing where that is allowed.
template <class T>
T *parameter(const Maybe<T> &array, bool wanted, int64_t rows, int64_t numbers, const char *what) {
    require(array.has_value() == wanted, what);
    if (!array) return nullptr;
    require(array->ndim() >= 1 && is(array->shape(0), rows) && is(array->size(), rows * numbers) && contiguous(*array), what);
    return array->data();
}

// The layer's operands, but for what it writes; false where the strides of a map's grid are not those of one axis.
template <class T>
bool layer(const Maybe<const T> &input, const Any<const T> &value, const Any<const T> &offset_weight,
           const Maybe<const T> &offset_bias, const Maybe<const T> &mask_weight, const Maybe<const T> &mask_bias,
           const Maybe<const T> &weight, int64_t outputs, int64_t heads, int64_t groups, DeformedArgs<T> &a) {
    const Any<const T> &from = input ? *input : value;
    int64_t positions;
    if (!take(value, a.value, a.N) || !take(from, a.input, positions)) return false;
    const int64_t *grid = a.window.grid, reads = a.S << a.axes, most = int64_t{1} << 31;
    a.B = value.shape(0), a.C = value.shape(1), a.I = from.shape(1), a.H = heads, a.G = groups, a.O = outputs;
    require(a.N == grid[0] * grid[1] * grid[2] && positions == a.N && is(from.shape(0), a.B) && a.B >= 1,
            "deformed: input and value must be (B, channels, *grid)");
    require(a.C >= 1 && a.I >= 1 && heads >= 1 && a.C % heads == 0 && groups >= 1 && a.C % groups == 0 && a.O >= 1 &&
                a.O % groups == 0,
            "deformed: channels must be divisible by heads and groups");
    require(a.N < most / reads && a.M < most / reads && a.S * (a.axes + 1) < most / heads, "deformed: too many slots");
    const int64_t made = heads * a.S;
    a.offset_weight = parameter<const T>(offset_weight, true, made * a.axes, a.I * a.S,
                                         "deformed: offset_weight must be (heads * slots * axes, I, slots), contiguous");
    a.offset_bias = parameter(offset_bias, offset_bias.has_value(), made * a.axes, 1,
                              "deformed: offset_bias must be (heads * slots * axes,)");
    a.mask_weight = parameter(mask_weight, mask_weight.has_value(), made, a.I * a.S,
                              "deformed: mask_weight must be (heads * slots, I, slots), contiguous");
    a.mask_bias = parameter(mask_bias, mask_weight && mask_bias, made, 1,
                            "deformed: mask_bias must be (heads * slots,), and goes with mask_weight");
    a.weight = parameter(weight, weight.has_value(), a.O, a.C / groups * a.S,
                         "deformed: weight must be (O, C / groups, slots), contiguous");
    require(weight || a.O == a.C, "deformed: without a weight there are as many channels out as in");
    a.bias = nullptr, a.moved = nullptr, a.out = nullptr;
    return true;
}

// How many numbers move the slots: offsets, and masks.
template <class T>
int64_t moves(const DeformedArgs<T> &a) {
    return a.B * a.H * a.S * (a.axes + (a.mask_weight ? 1 : 0)) * a.M;
}

template <class T>
bool deformed(Maybe<const T> input, Any<const T> value, Any<const T> offset_weight, Maybe<const T> offset_bias,
              Maybe<const T> mask_weight, Maybe<const T> mask_bias, Maybe<const T> weight, Maybe<const T> bias,
              int64_t heads, int64_t groups, Sizes grid, Sizes out_grid, Sizes size, Sizes stride, Sizes dilation,
              Sizes before, std::optional<Array<T, 1>> moved, Any<T> out, int threads) {
    DeformedArgs<T> a;
    take_window(a, grid, out_grid, size, stride, dilation, before, threads);
    require(out.ndim() >= 3, "deformed: out must be (B, O, *out)");
    if (!layer<T>(input, value, offset_weight, offset_bias, mask_weight, mask_bias, weight, out.shape(1), heads, groups, a))
        return false;
    a.bias = parameter(bias, bias.has_value(), a.O, 1, "deformed: bias must be (O,)");
    require(!moved || (is(moved->shape(0), moves(a)) && contiguous(*moved)), "deformed: moved must hold every offset and mask");
    require(is_view_of_rows(out, a.B, a.O, a.M), "deformed: out must be (B, O, *out), a view of rows (B, M, O)");
    a.moved = moved ? moved->data() : nullptr, a.out = out.data();
    run(Table<T>::deformed, a);
    return true;
}

template <class T>
bool deformed_backward(Any<const T> grad, Maybe<const T> input, Any<const T> value, Any<const T> offset_weight,
                       Maybe<const T> offset_bias, Maybe<const T> mask_weight, Maybe<const T> mask_bias,
                       Maybe<const T> weight, Array<const T, 1> moved, int64_t heads, int64_t groups, Sizes grid,
                       Sizes out_grid, Sizes size, Sizes stride, Sizes dilation, Sizes before,
                       std::optional<Array<T, 3>> d_input, Array<T, 3> d_value, Any<T> d_offset_weight,
                       Maybe<T> d_offset_bias, Maybe<T> d_mask_weight, Maybe<T> d_mask_bias, Maybe<T> d_weight,
                       Maybe<T> d_bias, int threads) {
    DeformedBackwardArgs<T> all;
    DeformedArgs<T> &a = all.of;
    take_window(a, grid, out_grid, size, stride, dilation, before, threads);
    int64_t outputs;
    if (!take(grad, all.grad, outputs)) return false;
    if (!layer<T>(input, value, offset_weight, offset_bias, mask_weight, mask_bias, weight, grad.shape(1), heads, groups, a))
        return false;
    require(is(grad.shape(0), a.B) && outputs == a.M, "deformed: grad must be (B, O, *out)");
    require(is(moved.shape(0), moves(a)) && contiguous(moved), "deformed: moved must hold every offset and mask");
    const auto rows = [&](const Array<T, 3> &array, int64_t channels) {
        return is(array.shape(0), a.B) && is(array.shape(1), a.N) && is(array.shape(2), channels) && contiguous(array);
    };
    require(rows(d_value, a.C) && d_input.has_value() == input.has_value() && (!d_input || rows(*d_input, a.I)),
            "deformed: d_input and d_value must be rows (B, positions, channels), contiguous");
    const char *what = "deformed: gradients must be as the parameters, contiguous";
    const int64_t made = a.H * a.S;
    all.d_offset_weight = parameter<T>(d_offset_weight, true, made * a.axes, a.I * a.S, what);
    all.d_offset_bias = parameter(d_offset_bias, offset_bias.has_value(), made * a.axes, 1, what);
    all.d_mask_weight = parameter(d_mask_weight, mask_weight.has_value(), made, a.I * a.S, what);
    all.d_mask_bias = parameter(d_mask_bias, mask_bias.has_value(), made, 1, what);
    all.d_weight = parameter(d_weight, weight.has_value(), a.O, a.C / a.G * a.S, what);
    all.d_bias = parameter(d_bias, d_bias.has_value(), a.O, 1, what);
    all.d_input = d_input ? d_input->data() : nullptr, all.d_value = d_value.data();
    a.moved = const_cast<T *>(moved.data());
    run(Table<T>::deformed_backward, all);
    return true;
}

template <class T>
void bind(nb::module_ &m) {
    m.def("corners", &corners<T>, "offset"_a.noconvert(), "mask"_a.noconvert().none(), "grid"_a, "out"_a, "size"_a,
          "stride"_a, "dilation"_a, "before"_a, "index"_a.noconvert(), "share"_a.noconvert(), "threads"_a);
    m.def("corners_backward", &corners_backward<T>, "grad"_a.noconvert(), "offset"_a.noconvert(),
          "mask"_a.noconvert().none(), "grid"_a, "out"_a, "size"_a, "stride"_a, "dilation"_a, "before"_a,
          "d_offset"_a.noconvert(), "d_mask"_a.noconvert().none(), "threads"_a);
    m.def("deformed", &deformed<T>, "input"_a.noconvert().none(), "value"_a.noconvert(), "offset_weight"_a.noconvert(),
          "offset_bias"_a.noconvert().none(), "mask_weight"_a.noconvert().none(), "mask_bias"_a.noconvert().none(),
          "weight"_a.noconvert().none(), "bias"_a.noconvert().none(), "heads"_a, "groups"_a, "grid"_a, "out_grid"_a,
          "size"_a, "stride"_a, "dilation"_a, "before"_a, "moved"_a.noconvert().none(), "out"_a.noconvert(), "threads"_a);
    m.def("deformed_backward", &deformed_backward<T>, "grad"_a.noconvert(), "input"_a.noconvert().none(),
          "value"_a.noconvert(), "offset_weight"_a.noconvert(), "offset_bias"_a.noconvert().none(),
          "mask_weight"_a.noconvert().none(), "mask_bias"_a.noconvert().none(), "weight"_a.noconvert().none(),
          "moved"_a.noconvert(), "heads"_a, "groups"_a, "grid"_a, "out_grid"_a, "size"_a, "stride"_a, "dilation"_a,
          "before"_a, "d_input"_a.noconvert().none(), "d_value"_a.noconvert(), "d_offset_weight"_a.noconvert(),
          "d_offset_bias"_a.noconvert().none(), "d_mask_weight"_a.noconvert().none(), "d_mask_bias"_a.noconvert().none(),
          "d_weight"_a.noconvert().none(), "d_bias"_a.noconvert().none(), "threads"_a);
}

}  // namespace

void bind_corners(nb::module_ &m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace nearfold

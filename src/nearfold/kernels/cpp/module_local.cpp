// Bindings of the kernels that read a window of the grid.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nearfold {
namespace {

template <class T>
using Any = nb::ndarray<T, nb::device::cpu>;
using Numbers = std::vector<int64_t>;

// (B, H, features, *axes) with one to three axes -> six axes, those that are not there of size one.
template <class T>
Map<T> map_of(const Any<T> &array) {
    Map<T> map{array.data(), {}};
    const size_t missing = 6 - array.ndim();
    for (size_t i = 0; i < array.ndim(); ++i) map.stride[i < 3 ? i : i + missing] = array.stride(i);
    return map;
}

template <class A>
int64_t size_of(const A &array, int axis) {  // of six axes
    const int missing = 6 - static_cast<int>(array.ndim());
    if (axis >= 3 && axis < 3 + missing) return 1;
    return static_cast<int64_t>(array.shape(axis < 3 ? axis : axis - missing));
}

template <class A>
bool has_sizes(const A &array, size_t ndim, int64_t B, int64_t H, int64_t features, const int64_t *axes) {
    return array.ndim() == ndim && size_of(array, 0) == B && size_of(array, 1) == H && size_of(array, 2) == features &&
           size_of(array, 3) == axes[0] && size_of(array, 4) == axes[1] && size_of(array, 5) == axes[2];
}

// The window that reads maps of the grid of `key` for outputs of the grid of `query`.
template <class Q, class K>
Window window_of(const Q &query, const K &key, const Numbers &size, const Numbers &stride, const Numbers &dilation,
                 const Numbers &before, bool reflect) {
    const size_t axes = size.size();
    require(axes >= 1 && axes <= 3 && query.ndim() == axes + 3 && key.ndim() == axes + 3,
            "window: one to three grid axes, and as many in query, key and the window");
    require(stride.size() == axes && dilation.size() == axes && before.size() == axes,
            "window: size, stride, dilation and before need one number per grid axis");
    Window w{{1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, reflect};
    constexpr int64_t most = int64_t(1) << 24;
    for (size_t i = 0; i < axes; ++i) {
        const size_t axis = i + 3 - axes;
        w.grid[axis] = size_of(key, static_cast<int>(axis) + 3);
        w.out[axis] = size_of(query, static_cast<int>(axis) + 3);
        w.size[axis] = size[i], w.stride[axis] = stride[i], w.dilation[axis] = dilation[i], w.before[axis] = before[i];
        for (const int64_t n : {w.grid[axis], w.out[axis], w.size[axis], w.stride[axis], w.dilation[axis]})
            require(n >= 1 && n < most, "window: sizes, strides and dilations are at least 1, and below 2^24");
        require(before[i] >= 0 && before[i] < most, "window: before is at least 0, and below 2^24");
    }
    double slots = 1;
    for (int axis = 0; axis < 3; ++axis) slots *= static_cast<double>(w.size[axis]);
    require(slots < most, "window: too many slots");
    return w;
}

template <class T>
LocalArgs<T> local_args(const Any<const T> &query, const Any<const T> &key, const Any<const T> &value, const Any<T> &stats,
                        const Window &window, int metric, bool squared, double scale, int threads) {
    LocalArgs<T> a;
    const size_t ndim = query.ndim();
    a.window = window;
    a.B = size_of(query, 0), a.H = size_of(query, 1), a.E = size_of(query, 2), a.D = size_of(value, 2);
    require(has_sizes(key, ndim, a.B, a.H, a.E, window.grid), "local: key must be (B, H, E, *grid) as query is (B, H, E, *out)");
    require(value.ndim() == ndim && has_sizes(value, ndim, a.B, a.H, a.D, window.grid), "local: value must be (B, H, D, *grid)");
    require(has_sizes(stats, ndim, a.B, a.H, 2, window.out), "local: stats must be (B, H, 2, *out)");
    require(metric == dot || metric == euclidean, "local: metric is dot or euclidean");
    require(threads >= 1, "local: threads are at least 1");
    a.query = map_of(query), a.key = map_of(key), a.value = map_of(value), a.stats = map_of(stats);
    a.out = {};
    a.metric = metric, a.squared = squared, a.scale = static_cast<T>(scale), a.threads = threads;
    return a;
}

template <class T>
struct Table;
template <>
struct Table<float> {
    static constexpr auto local = &Engine::local_float;
    static constexpr auto local_backward = &Engine::local_backward_float;
    static constexpr auto grouped = &Engine::grouped_float;
    static constexpr auto grouped_backward = &Engine::grouped_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto local = &Engine::local_double;
    static constexpr auto local_backward = &Engine::local_backward_double;
    static constexpr auto grouped = &Engine::grouped_double;
    static constexpr auto grouped_backward = &Engine::grouped_backward_double;
};

template <class T>
void local(Any<const T> query, Any<const T> key, Any<const T> value, const Numbers &size, const Numbers &stride,
           const Numbers &dilation, const Numbers &before, bool reflect, int metric, bool squared, double scale, Any<T> out,
           Any<T> stats, int threads) {
    require(value.ndim() == query.ndim() && stats.ndim() == query.ndim(), "local: all maps need the same axes");
    const Window window = window_of(query, key, size, stride, dilation, before, reflect);
    LocalArgs<T> a = local_args<T>(query, key, value, stats, window, metric, squared, scale, threads);
    require(has_sizes(out, query.ndim(), a.B, a.H, a.D, window.out), "local: out must be (B, H, D, *out)");
    a.out = map_of(out);
    run(Table<T>::local, a);
}

template <class T>
void local_backward(Any<const T> grad, Any<const T> query, Any<const T> key, Any<const T> value, Any<T> stats,
                    const Numbers &size, const Numbers &stride, const Numbers &dilation, const Numbers &before, bool reflect,
                    int metric, bool squared, double scale, Any<T> d_query, Any<T> d_key, Any<T> d_value, int threads) {
    require(value.ndim() == query.ndim() && stats.ndim() == query.ndim(), "local: all maps need the same axes");
    const Window window = window_of(query, key, size, stride, dilation, before, reflect);
    LocalBackwardArgs<T> a;
    a.of = local_args<T>(query, key, value, stats, window, metric, squared, scale, threads);
    const size_t ndim = query.ndim();
    require(has_sizes(grad, ndim, a.of.B, a.of.H, a.of.D, window.out), "local: grad must be (B, H, D, *out)");
    require(has_sizes(d_query, ndim, a.of.B, a.of.H, a.of.E, window.out) &&
                has_sizes(d_key, ndim, a.of.B, a.of.H, a.of.E, window.grid) &&
                has_sizes(d_value, ndim, a.of.B, a.of.H, a.of.D, window.grid),
            "local: gradients must have the shapes of query, key and value");
    a.grad = map_of(grad), a.d_query = map_of(d_query), a.d_key = map_of(d_key), a.d_value = map_of(d_value);
    run(Table<T>::local_backward, a);
}

template <class T, class O>
GroupedArgs<T> grouped_args(const std::vector<Any<const T>> &maps, const Any<const T> &weight, const Any<O> &out,
                            const Numbers &stride, const Numbers &dilation, const Numbers &before, bool reflect, int threads) {
    GroupedArgs<T> a;
    require(!maps.empty() && maps.size() <= most_maps, "grouped: one to four maps");
    const size_t ndim = maps[0].ndim();
    require(ndim >= 4 && ndim <= 6 && weight.ndim() == ndim && out.ndim() == ndim,
            "grouped: one to three grid axes, in maps (B, G, inputs, *grid), weight (G, O, I, *size) and out (B, O, G, *out)");
    Numbers size;
    for (size_t i = 3; i < ndim; ++i) size.push_back(static_cast<int64_t>(weight.shape(i)));
    a.window = window_of(out, maps[0], size, stride, dilation, before, reflect);
    a.B = size_of(maps[0], 0), a.G = size_of(maps[0], 1), a.O = size_of(weight, 1), a.I = 0;
    a.maps = static_cast<int64_t>(maps.size());
    for (size_t m = 0; m < maps.size(); ++m) {
        a.inputs[m] = size_of(maps[m], 2);
        a.I += a.inputs[m];
        require(has_sizes(maps[m], ndim, a.B, a.G, a.inputs[m], a.window.grid), "grouped: maps must be (B, G, inputs, *grid)");
        a.map[m] = map_of(maps[m]);
    }
    require(has_sizes(weight, ndim, a.G, a.O, a.I, a.window.size) && contiguous(weight),
            "grouped: weight must be (G, O, I, *size), contiguous");
    require(has_sizes(out, ndim, a.B, a.O, a.G, a.window.out), "grouped: out must be (B, O, G, *out)");
    require(threads >= 1, "grouped: threads are at least 1");
    a.weight = weight.data(), a.out = {}, a.threads = threads;
    return a;
}

template <class T>
void grouped(const std::vector<Any<const T>> &maps, Any<const T> weight, const Numbers &stride, const Numbers &dilation,
             const Numbers &before, bool reflect, Any<T> out, int threads) {
    GroupedArgs<T> a = grouped_args<T>(maps, weight, out, stride, dilation, before, reflect, threads);
    a.out = map_of(out);
    run(Table<T>::grouped, a);
}

template <class T>
void grouped_backward(Any<const T> grad, const std::vector<Any<const T>> &maps, Any<const T> weight, const Numbers &stride,
                      const Numbers &dilation, const Numbers &before, bool reflect, const std::vector<Any<T>> &d_maps,
                      Any<T> d_weight, int threads) {
    GroupedBackwardArgs<T> a;
    a.of = grouped_args<T>(maps, weight, grad, stride, dilation, before, reflect, threads);
    require(d_maps.size() == maps.size(), "grouped: a gradient for every map");
    for (size_t m = 0; m < maps.size(); ++m) {
        require(has_sizes(d_maps[m], maps[m].ndim(), a.of.B, a.of.G, a.of.inputs[m], a.of.window.grid),
                "grouped: gradients must have the shapes of the maps");
        a.d_map[m] = map_of(d_maps[m]);
    }
    require(has_sizes(d_weight, weight.ndim(), a.of.G, a.of.O, a.of.I, a.of.window.size) && contiguous(d_weight),
            "grouped: d_weight must be as weight, contiguous");
    a.grad = map_of(grad), a.d_weight = d_weight.data();
    run(Table<T>::grouped_backward, a);
}

template <class T>
void bind(nb::module_ &m) {
    m.def("local", &local<T>, "query"_a.noconvert(), "key"_a.noconvert(), "value"_a.noconvert(), "size"_a, "stride"_a,
          "dilation"_a, "before"_a, "reflect"_a, "metric"_a, "squared"_a, "scale"_a, "out"_a.noconvert(),
          "stats"_a.noconvert(), "threads"_a);
    m.def("local_backward", &local_backward<T>, "grad"_a.noconvert(), "query"_a.noconvert(), "key"_a.noconvert(),
          "value"_a.noconvert(), "stats"_a.noconvert(), "size"_a, "stride"_a, "dilation"_a, "before"_a, "reflect"_a,
          "metric"_a, "squared"_a, "scale"_a, "d_query"_a.noconvert(), "d_key"_a.noconvert(), "d_value"_a.noconvert(),
          "threads"_a);
    m.def("grouped", &grouped<T>, "maps"_a.noconvert(), "weight"_a.noconvert(), "stride"_a, "dilation"_a, "before"_a,
          "reflect"_a, "out"_a.noconvert(), "threads"_a);
    m.def("grouped_backward", &grouped_backward<T>, "grad"_a.noconvert(), "maps"_a.noconvert(), "weight"_a.noconvert(),
          "stride"_a, "dilation"_a, "before"_a, "reflect"_a, "d_maps"_a.noconvert(), "d_weight"_a.noconvert(), "threads"_a);
}

}  // namespace

void bind_local(nb::module_ &m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace nearfold

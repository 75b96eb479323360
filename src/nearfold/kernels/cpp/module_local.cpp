// Bindings of the kernels that read a window of the grid.
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

template <class T>
using Any = nb::ndarray<T, nb::device::cpu>;
using Numbers = std::vector<int64_t>;

// A map (B, channels, *axes) whose channels are read as two axes of these sizes and strides.
template <class T>
struct Split {
    const Any<T> &map;
    int64_t size[2], step[2];

    size_t ndim() const { return map.ndim() + 1; }
    int64_t shape(size_t axis) const {
        return axis == 0 ? map.shape(0) : axis < 3 ? size[axis - 1] : map.shape(axis - 1);
    }
    int64_t stride(size_t axis) const {
        return axis == 0 ? map.stride(0) : axis < 3 ? step[axis - 1] : map.stride(axis - 1);
    }
    T *data() const { return map.data(); }
};

// Its channels in as many groups, one behind the other; with `inner`, the groups of a group's channels come first.
template <class T>
Split<T> split(const Any<T> &map, int64_t groups, bool inner = false) {
    require(map.ndim() >= 3 && map.ndim() <= 5, "window: maps are (B, channels, *grid) of one to three axes");
    const int64_t channels = map.shape(1), step = map.stride(1);
    require(groups >= 1 && channels >= 1 && channels % groups == 0, "window: channels must be divisible by heads");
    const int64_t each = channels / groups;
    if (inner) return {map, {each, groups}, {step, each * step}};
    return {map, {groups, each}, {each * step, step}};
}

// (B, H, features, *axes) with one to three axes -> six axes, those that are not there of size one.
template <class T, class A>
Map<T> map_of(const A &array) {
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

template <class T, class Q, class K>
LocalArgs<T> local_args(const Q &query, const K &key, const K &value, const Any<T> &stats, const Window &window, int metric,
                        bool squared, double scale, int threads) {
    LocalArgs<T> a;
    const size_t ndim = query.ndim();
    a.window = window;
    a.B = size_of(query, 0), a.H = size_of(query, 1), a.E = size_of(query, 2), a.D = size_of(value, 2);
    require(has_sizes(key, ndim, a.B, a.H, a.E, window.grid), "local: key must be (B, H, E, *grid) as query is (B, H, E, *out)");
    require(value.ndim() == ndim && has_sizes(value, ndim, a.B, a.H, a.D, window.grid), "local: value must be (B, H, D, *grid)");
    require(has_sizes(stats, ndim, a.B, a.H, 2, window.out), "local: stats must be (B, H, 2, *out)");
    require(metric == dot || metric == euclidean, "local: metric is dot or euclidean");
    require(threads >= 1, "local: threads are at least 1");
    a.query = map_of<const T>(query), a.key = map_of<const T>(key), a.value = map_of<const T>(value);
    a.stats = map_of<T>(stats), a.out = {}, a.position = {};
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
    static constexpr auto shift = &Engine::shift_float;
    static constexpr auto shift_backward = &Engine::shift_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto local = &Engine::local_double;
    static constexpr auto local_backward = &Engine::local_backward_double;
    static constexpr auto grouped = &Engine::grouped_double;
    static constexpr auto grouped_backward = &Engine::grouped_backward_double;
    static constexpr auto shift = &Engine::shift_double;
    static constexpr auto shift_backward = &Engine::shift_backward_double;
};

template <class T>
void local(Any<const T> query, Any<const T> key, Any<const T> value, const Numbers &size, const Numbers &stride,
           const Numbers &dilation, const Numbers &before, bool reflect, int metric, bool squared, double scale, Any<T> out,
           Any<T> stats, int threads) {
    require(value.ndim() == query.ndim() && stats.ndim() == query.ndim(), "local: all maps need the same axes");
    const Window window = window_of(query, key, size, stride, dilation, before, reflect);
    LocalArgs<T> a = local_args<T>(query, key, value, stats, window, metric, squared, scale, threads);
    require(has_sizes(out, query.ndim(), a.B, a.H, a.D, window.out), "local: out must be (B, H, D, *out)");
    a.out = map_of<T>(out);
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
    a.grad = map_of<const T>(grad), a.d_query = map_of<T>(d_query), a.d_key = map_of<T>(d_key);
    a.d_value = map_of<T>(d_value);
    run(Table<T>::local_backward, a);
}

template <class T, class M, class W, class O>
GroupedArgs<T> grouped_args(const std::vector<M> &maps, const W &weight, const O &out, const Numbers &stride,
                            const Numbers &dilation, const Numbers &before, bool reflect, int threads) {
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
        a.map[m] = map_of<const T>(maps[m]);
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
    a.out = map_of<T>(out);
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
        a.d_map[m] = map_of<T>(d_maps[m]);
    }
    require(has_sizes(d_weight, weight.ndim(), a.of.G, a.of.O, a.of.I, a.of.window.size) && contiguous(d_weight),
            "grouped: d_weight must be as weight, contiguous");
    a.grad = map_of<const T>(grad), a.d_weight = d_weight.data();
    run(Table<T>::grouped_backward, a);
}

// Attention in a window over maps (B, heads * features, *grid) as they are; query at `home` and every `stride`-th position
// from there on, `position` (features, *grid) subtracted from the keys of every head.
template <class T>
LocalArgs<T> layer_args(const Any<const T> &query, const Any<const T> &key, const Any<const T> &value,
                        const std::optional<Any<const T>> &position, const Any<T> &stats, const Split<const T> &out,
                        int64_t heads, const Numbers &home, const Numbers &size, const Numbers &stride,
                        const Numbers &dilation, const Numbers &before, bool reflect, double scale, int threads) {
    const Split<const T> q = split(query, heads), k = split(key, heads), v = split(value, heads);
    require(k.ndim() == q.ndim() && v.ndim() == q.ndim() && out.ndim() == q.ndim() && stats.ndim() == q.ndim() &&
                home.size() + 3 == q.ndim(),
            "window: all maps need the same axes, and home one number for each");
    const Window window = window_of(out, k, size, stride, dilation, before, reflect);
    LocalArgs<T> a = local_args<T>(q, k, v, stats, window, dot, false, scale, threads);
    for (size_t i = 0; i < home.size(); ++i) {
        const size_t axis = i + 6 - home.size();
        require(home[i] >= 0 && home[i] + (window.out[axis - 3] - 1) * stride[i] < size_of(q, static_cast<int>(axis)),
                "window: home lies within the grid, and so do all queries");
        a.query.data += home[i] * a.query.stride[axis];
        a.query.stride[axis] *= stride[i];
    }
    if (position) {
        const size_t ndim = position->ndim();
        require(ndim + 2 == q.ndim() && static_cast<int64_t>(position->shape(0)) == a.E,
                "window: position must be (features, *grid)");
        a.position = {position->data(), {0, 0, position->stride(0), 0, 0, 0}};
        for (size_t i = 1; i < ndim; ++i) {
            require(static_cast<int64_t>(position->shape(i)) == window.grid[i + 3 - ndim],
                    "window: position must be (features, *grid)");
            a.position.stride[i + 6 - ndim] = position->stride(i);
        }
    }
    return a;
}

template <class T>
void window_attention(Any<const T> query, Any<const T> key, Any<const T> value, std::optional<Any<const T>> position,
                      int64_t heads, const Numbers &home, const Numbers &size, const Numbers &stride,
                      const Numbers &dilation, const Numbers &before, bool reflect, double scale, Any<T> out, Any<T> stats,
                      int threads) {
    const Any<const T> read = Any<const T>(out);
    LocalArgs<T> a = layer_args<T>(query, key, value, position, stats, split(read, heads), heads, home, size, stride,
                                   dilation, before, reflect, scale, threads);
    const Split<T> to = split(out, heads);
    require(has_sizes(to, to.ndim(), a.B, a.H, a.D, a.window.out), "window: out must be (B, heads * features, *out)");
    a.out = map_of<T>(to);
    run(Table<T>::local, a);
}

template <class T>
void window_attention_backward(Any<const T> grad, Any<const T> query, Any<const T> key, Any<const T> value,
                               std::optional<Any<const T>> position, Any<T> stats, int64_t heads, const Numbers &home,
                               const Numbers &size, const Numbers &stride, const Numbers &dilation, const Numbers &before,
                               bool reflect, double scale, Any<T> d_query, Any<T> d_key, Any<T> d_value, int threads) {
    LocalBackwardArgs<T> a;
    a.of = layer_args<T>(query, key, value, position, stats, split(grad, heads), heads, home, size, stride, dilation,
                         before, reflect, scale, threads);
    const Split<const T> g = split(grad, heads);
    const Split<T> q = split(d_query, heads), k = split(d_key, heads), v = split(d_value, heads);
    const size_t ndim = g.ndim();
    require(has_sizes(g, ndim, a.of.B, a.of.H, a.of.D, a.of.window.out), "window: grad must be as out");
    require(has_sizes(q, ndim, a.of.B, a.of.H, a.of.E, a.of.window.out) &&
                has_sizes(k, ndim, a.of.B, a.of.H, a.of.E, a.of.window.grid) &&
                has_sizes(v, ndim, a.of.B, a.of.H, a.of.D, a.of.window.grid),
            "window: gradients must have the shapes of the queries read, of key and of value");
    a.grad = map_of<const T>(g), a.d_query = map_of<T>(q), a.d_key = map_of<T>(k), a.d_value = map_of<T>(v);
    run(Table<T>::local_backward, a);
}

// (G, heads, inputs, *size) beside its sizes, as `grouped_args` takes a kernel.
template <class T>
struct Kernel {
    std::vector<int64_t> sizes;

    size_t ndim() const { return sizes.size(); }
    size_t shape(size_t axis) const { return static_cast<size_t>(sizes[axis]); }
    int64_t stride(size_t axis) const {
        int64_t step = 1;
        for (size_t i = axis + 1; i < sizes.size(); ++i) step *= sizes[i];
        return step;
    }
    T *data() const { return nullptr; }  // it is made later
};

template <class T>
Kernel<T> kernel_of(const Any<const T> &shift, int64_t heads, int64_t inputs) {
    Kernel<T> kernel{{static_cast<int64_t>(shift.shape(0)) / heads, heads, inputs}};
    for (size_t i = 2; i < shift.ndim(); ++i) kernel.sizes.push_back(shift.shape(i));
    return kernel;
}

template <class T>
std::vector<Split<const T>> shares(const std::vector<Any<const T>> &maps, int64_t heads) {
    std::vector<Split<const T>> found;
    for (const Any<const T> &map : maps) found.push_back(split(map, heads, true));
    return found;
}

// ACmix's convolution of maps (B, heads * G, *grid): every group of heads channels is mapped (t, inputs), and the maps are
// shifted (heads * G, t, *size) and summed. Both make one kernel (G, heads, inputs, *size). `of` is the output or its gradient.
template <class T>
ShiftArgs<T> shift_args(const std::vector<Any<const T>> &maps, const Any<const T> &weight, const Any<const T> &shift,
                        int64_t heads, const Split<const T> &of, const Numbers &stride, const Numbers &dilation,
                        const Numbers &before, bool reflect, int threads) {
    const int64_t inputs = heads * static_cast<int64_t>(maps.size());
    require(weight.ndim() == 2 && shift.ndim() >= 3 && contiguous(weight) && contiguous(shift) &&
                weight.shape(0) == shift.shape(1) && static_cast<int64_t>(weight.shape(1)) == inputs,
            "shift: weight must be (t, inputs) and shift (O, t, *size), contiguous");
    ShiftArgs<T> a;
    a.of = grouped_args<T>(shares(maps, heads), kernel_of(shift, heads, inputs), of, stride, dilation, before, reflect, threads);
    a.mix = weight.data(), a.shift = shift.data(), a.t = weight.shape(0);
    return a;
}

template <class T>
void shift_conv(const std::vector<Any<const T>> &maps, Any<const T> weight, Any<const T> shift, int64_t heads,
                const Numbers &stride, const Numbers &dilation, const Numbers &before, bool reflect, bool interleaved,
                Any<T> out, int threads) {
    require(heads >= 1 && shift.ndim() >= 3 && shift.shape(0) % heads == 0, "shift: heads must divide the channels");
    const int64_t groups = shift.shape(0) / heads;
    const Any<const T> read = Any<const T>(out);
    const Split<const T> of = interleaved ? split(read, groups, true) : split(read, heads);
    const Split<T> to = interleaved ? split(out, groups, true) : split(out, heads);
    ShiftArgs<T> a = shift_args<T>(maps, weight, shift, heads, of, stride, dilation, before, reflect, threads);
    a.of.out = map_of<T>(to);
    run(Table<T>::shift, a);
}

template <class T>
void shift_conv_backward(Any<const T> grad, const std::vector<Any<const T>> &maps, Any<const T> weight, Any<const T> shift,
                         int64_t heads, const Numbers &stride, const Numbers &dilation, const Numbers &before, bool reflect,
                         bool interleaved, const std::vector<Any<T>> &d_maps, Any<T> d_weight, Any<T> d_shift, int threads) {
    require(heads >= 1 && shift.ndim() >= 3 && shift.shape(0) % heads == 0, "shift: heads must divide the channels");
    const int64_t groups = shift.shape(0) / heads;
    const Split<const T> from = interleaved ? split(grad, groups, true) : split(grad, heads);
    ShiftBackwardArgs<T> a;
    a.by = shift_args<T>(maps, weight, shift, heads, from, stride, dilation, before, reflect, threads);
    const GroupedArgs<T> &of = a.by.of;
    require(d_maps.size() == maps.size(), "shift: a gradient for every map");
    for (size_t m = 0; m < maps.size(); ++m) {
        const Split<T> to = split(d_maps[m], heads, true);
        require(has_sizes(to, to.ndim(), of.B, of.G, of.inputs[m], of.window.grid) && from.ndim() == to.ndim(),
                "shift: gradients must have the shapes of the maps");
        a.of.d_map[m] = map_of<T>(to);
    }
    require(d_weight.size() == weight.size() && contiguous(d_weight) && d_shift.size() == shift.size() &&
                contiguous(d_shift),
            "shift: d_weight and d_shift must be as weight and shift, contiguous");
    a.of.grad = map_of<const T>(from), a.d_mix = d_weight.data(), a.d_shift = d_shift.data();
    run(Table<T>::shift_backward, a);
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
    m.def("window_attention", &window_attention<T>, "query"_a.noconvert(), "key"_a.noconvert(), "value"_a.noconvert(),
          "position"_a.noconvert().none(), "heads"_a, "home"_a, "size"_a, "stride"_a, "dilation"_a, "before"_a, "reflect"_a,
          "scale"_a, "out"_a.noconvert(), "stats"_a.noconvert(), "threads"_a);
    m.def("window_attention_backward", &window_attention_backward<T>, "grad"_a.noconvert(), "query"_a.noconvert(),
          "key"_a.noconvert(), "value"_a.noconvert(), "position"_a.noconvert().none(), "stats"_a.noconvert(), "heads"_a,
          "home"_a, "size"_a, "stride"_a, "dilation"_a, "before"_a, "reflect"_a, "scale"_a, "d_query"_a.noconvert(),
          "d_key"_a.noconvert(), "d_value"_a.noconvert(), "threads"_a);
    m.def("shift_conv", &shift_conv<T>, "maps"_a.noconvert(), "weight"_a.noconvert(), "shift"_a.noconvert(), "heads"_a,
          "stride"_a, "dilation"_a, "before"_a, "reflect"_a, "interleaved"_a, "out"_a.noconvert(), "threads"_a);
    m.def("shift_conv_backward", &shift_conv_backward<T>, "grad"_a.noconvert(), "maps"_a.noconvert(), "weight"_a.noconvert(),
          "shift"_a.noconvert(), "heads"_a, "stride"_a, "dilation"_a, "before"_a, "reflect"_a, "interleaved"_a,
          "d_maps"_a.noconvert(), "d_weight"_a.noconvert(), "d_shift"_a.noconvert(), "threads"_a);
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

// Bindings of a whole layer of nearest neighbours.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nearfold {
namespace {

template <class T>
using Any = nb::ndarray<T, nb::device::cpu>;  // (B, channels, *grid)
template <class T, size_t axes>
using Array = nb::ndarray<T, nb::ndim<axes>, nb::device::cpu>;

template <class A, class T>
bool rows(const A &array, const NeighborsArgs<T> &a, int64_t positions, int64_t channels) {
    return static_cast<int64_t>(array.shape(0)) == a.B && static_cast<int64_t>(array.shape(1)) == positions &&
           static_cast<int64_t>(array.shape(2)) == channels && contiguous(array);
}

template <class A, class T>
bool slots(const A &array, const NeighborsArgs<T> &a) {
    return static_cast<int64_t>(array.shape(0)) == a.B && static_cast<int64_t>(array.shape(1)) == a.H &&
           static_cast<int64_t>(array.shape(2)) == a.M && static_cast<int64_t>(array.shape(3)) == a.k && contiguous(array);
}

template <class T>
bool arguments(const std::optional<Any<const T>> &query, const std::optional<Any<const T>> &key, const Any<const T> &value,
               const std::optional<Array<const T, 3>> &weight, const std::optional<Array<const int64_t, 1>> &places,
               int64_t heads, int64_t groups, int64_t k, int threads, NeighborsArgs<T> &a) {
    const Any<const T> &q = query ? *query : value, &r = key ? *key : q;
    int64_t keys;
    if (!take(q, a.query, a.Q) || !take(r, a.key, keys) || !take(value, a.value, a.N)) return false;
    a.B = value.shape(0), a.C = value.shape(1), a.H = heads, a.G = groups, a.k = k, a.threads = threads;
    a.M = places ? places->shape(0) : a.Q, a.places = places ? places->data() : nullptr;
    require(!places || contiguous(*places), "neighbors: places must be (M,), contiguous");
    for (int64_t m = 0; places && m < a.M; ++m)
        require(a.places[m] >= 0 && a.places[m] < a.Q, "neighbors: a place beyond the queries");
    const int64_t width = q.shape(1), most = int64_t{1} << 31;
    require(static_cast<int64_t>(q.shape(0)) == a.B && static_cast<int64_t>(r.shape(0)) == a.B && keys == a.N &&
                static_cast<int64_t>(r.shape(1)) == width,
            "neighbors: query, key and value do not fit one another");
    require(heads >= 1 && width >= 1 && width % heads == 0 && a.C >= 1 && a.C % heads == 0,
            "neighbors: channels must be divisible by heads");
    require(k >= 1 && k < (int64_t{1} << 24) && a.M >= 1 && a.N >= 1 && threads >= 1,
            "neighbors: positions, k and threads are at least 1");
    if (k > a.N + 1) return false;  // what nothing can fill is left out before
    require(a.N < most / k && a.M < most / k, "neighbors: too many slots");
    a.E = width / heads;
    a.O = weight ? weight->shape(0) : a.C;
    require(groups >= 1 && a.C % groups == 0 && a.O >= 1 && a.O % groups == 0,
            "neighbors: channels must be divisible by groups");
    if (weight)
        require(static_cast<int64_t>(weight->shape(1)) == a.C / groups && static_cast<int64_t>(weight->shape(2)) == k &&
                    contiguous(*weight),
                "neighbors: weight must be (O, C / groups, k), contiguous");
    a.weight = weight ? weight->data() : nullptr;
    a.bias = nullptr, a.index = nullptr, a.alpha = nullptr, a.out = nullptr;
    a.unit = a.own = a.weighted = a.squared = false, a.metric = dot, a.scale = 1;
    return true;
}

template <class T>
struct Table;
template <>
struct Table<float> {
    static constexpr auto forward = &Engine::neighbors_float;
    static constexpr auto backward = &Engine::neighbors_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto forward = &Engine::neighbors_double;
    static constexpr auto backward = &Engine::neighbors_backward_double;
};

// Whether it ran: where a grid's strides are not those of one axis, it does not.
template <class T>
bool neighbors(std::optional<Any<const T>> query, std::optional<Any<const T>> key, Any<const T> value,
               std::optional<Array<const T, 3>> weight, std::optional<Array<const T, 1>> bias,
               std::optional<Array<const int64_t, 1>> places, int64_t heads, int64_t groups, int64_t k, int metric, bool unit, bool squared, bool own, std::optional<double> scale,
               std::optional<Array<int64_t, 4>> index, std::optional<Array<T, 4>> alpha, Any<T> out, int threads) {
    NeighborsArgs<T> a;
    if (!arguments<T>(query, key, value, weight, places, heads, groups, k, threads, a)) return false;
    require(metric >= dot && metric <= euclidean, "neighbors: unknown metric");
    require(!own || (a.Q == a.N && k >= 2), "neighbors: the own position needs queries that are keys, and k of at least 2");
    require(!bias || (static_cast<int64_t>(bias->shape(0)) == a.O && contiguous(*bias)), "neighbors: bias must be (O,)");
    require(!index || slots(*index, a), "neighbors: index must be (B, heads, M, k), contiguous");
    require(!alpha || (scale && slots(*alpha, a)), "neighbors: alpha must be (B, heads, M, k), contiguous, with a scale");
    require(is_view_of_rows(out, a.B, a.O, a.M), "neighbors: out must be (B, O, *grid), a view of rows (B, M, O)");
    a.bias = bias ? bias->data() : nullptr;
    a.index = index ? index->data() : nullptr, a.alpha = alpha ? alpha->data() : nullptr, a.out = out.data();
    a.metric = metric, a.unit = unit, a.squared = squared, a.own = own;
    a.weighted = scale.has_value(), a.scale = static_cast<T>(scale.value_or(1));
    run(Table<T>::forward, a);
    return true;
}

// The same, of the gradients.
template <class T>
bool neighbors_backward(Any<const T> grad, std::optional<Any<const T>> query, std::optional<Any<const T>> key,
                        Any<const T> value, std::optional<Array<const T, 3>> weight, int64_t heads, int64_t groups,
                        int metric, bool squared, std::optional<double> scale, Array<const int64_t, 4> index,
                        std::optional<Array<const T, 4>> alpha, std::optional<Array<T, 3>> d_query,
                        std::optional<Array<T, 3>> d_key, Array<T, 3> d_value, std::optional<Array<T, 3>> d_weight,
                        std::optional<Array<T, 1>> d_bias, int threads) {
    NeighborsBackwardArgs<T> a;
    NeighborsArgs<T> &of = a.of;
    // without scores nothing flows to the queries: whatever they are, they have index's positions
    if (!arguments<T>(query, key, value, weight, {}, heads, groups, index.shape(3), threads, of)) return false;
    if (!scale) of.M = index.shape(2);
    require(of.M >= 1 && of.M < (int64_t{1} << 31) / of.k, "neighbors: too many slots");
    int64_t positions;
    if (!take(grad, a.grad, positions)) return false;
    require(metric >= dot && metric <= euclidean, "neighbors: unknown metric");
    require(static_cast<int64_t>(grad.shape(0)) == of.B && static_cast<int64_t>(grad.shape(1)) == of.O && positions == of.M,
            "neighbors: grad must be (B, O, *grid)");
    require(slots(index, of) && scale.has_value() == alpha.has_value() && (!alpha || slots(*alpha, of)),
            "neighbors: index and alpha must be (B, heads, M, k), contiguous");
    require(scale.has_value() == d_query.has_value() && scale.has_value() == d_key.has_value(),
            "neighbors: d_query and d_key go with scores that weigh");
    require(rows(d_value, of, of.N, of.C) && (!d_query || rows(*d_query, of, of.M, of.H * of.E)) &&
                (!d_key || rows(*d_key, of, of.N, of.H * of.E)),
            "neighbors: gradients must be rows (B, positions, channels), contiguous");
    require(weight.has_value() == d_weight.has_value() &&
                (!d_weight || (d_weight->size() == weight->size() && contiguous(*d_weight))),
            "neighbors: d_weight must be as weight");
    require(!d_bias || (static_cast<int64_t>(d_bias->shape(0)) == of.O && contiguous(*d_bias)),
            "neighbors: d_bias must be (O,)");
    of.index = const_cast<int64_t *>(index.data()), of.alpha = alpha ? const_cast<T *>(alpha->data()) : nullptr;
    of.metric = metric, of.squared = squared, of.weighted = scale.has_value(), of.scale = static_cast<T>(scale.value_or(1));
    a.d_value = d_value.data(), a.d_query = d_query ? d_query->data() : nullptr, a.d_key = d_key ? d_key->data() : nullptr;
    a.d_weight = d_weight ? d_weight->data() : nullptr, a.d_bias = d_bias ? d_bias->data() : nullptr;
    run(Table<T>::backward, a);
    return true;
}

template <class T>
void bind(nb::module_ &m) {
    m.def("neighbors", &neighbors<T>, "query"_a.noconvert().none(), "key"_a.noconvert().none(), "value"_a.noconvert(),
          "weight"_a.noconvert().none(), "bias"_a.noconvert().none(),
          "places"_a.noconvert().none(), "heads"_a, "groups"_a, "k"_a, "metric"_a, "unit"_a,
          "squared"_a, "own"_a, "scale"_a.none(), "index"_a.noconvert().none(), "alpha"_a.noconvert().none(),
          "out"_a.noconvert(), "threads"_a);
    m.def("neighbors_backward", &neighbors_backward<T>, "grad"_a.noconvert(), "query"_a.noconvert().none(),
          "key"_a.noconvert().none(), "value"_a.noconvert(), "weight"_a.noconvert().none(), "heads"_a, "groups"_a,
          "metric"_a, "squared"_a, "scale"_a.none(), "index"_a.noconvert(), "alpha"_a.noconvert().none(),
          "d_query"_a.noconvert().none(), "d_key"_a.noconvert().none(), "d_value"_a.noconvert(),
          "d_weight"_a.noconvert().none(), "d_bias"_a.noconvert().none(), "threads"_a);
}

}  // namespace

void bind_neighbors(nb::module_ &m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace nearfold

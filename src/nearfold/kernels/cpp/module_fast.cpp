// Bindings of fast weights.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <nanobind/stl/optional.h>

#include <initializer_list>
#include <optional>

#include "module.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace nearfold {
namespace {

template <class T>
using Array = nb::ndarray<T, nb::device::cpu>;
template <class T>
using Maybe = std::optional<Array<T>>;

// The data of an array of these sizes, contiguous.
template <class T>
T *data_of(const Array<T> &array, std::initializer_list<int64_t> sizes, const char *what) {
    require(array.ndim() == sizes.size() && contiguous(array), what);
    size_t i = 0;
    for (const int64_t size : sizes) require(static_cast<int64_t>(array.shape(i++)) == size, what);
    return array.data();
}
template <class T>
T *data_of(const Maybe<T> &array, std::initializer_list<int64_t> sizes, const char *what) {
    return array ? data_of(*array, sizes, what) : nullptr;
}

template <class T>
FastArgs<T> fast_args(const Array<const T> &query, const Array<const T> &key, const Array<const T> &value,
                      const Maybe<const T> &log_decay, const Maybe<const T> &beta, const Maybe<const T> &left,
                      const Maybe<const T> &right, int64_t chunk, const Maybe<T> &reads, const Maybe<T> &states, int threads) {
    FastArgs<T> a;
    require(query.ndim() == 4 && value.ndim() == 4, "fast: query must be (B, N, H, s) and value (B, N, H, p)");
    a.B = query.shape(0), a.N = query.shape(1), a.H = query.shape(2), a.s = query.shape(3), a.p = value.shape(3);
    a.chunk = chunk, a.threads = threads, a.decays = 1, a.y = nullptr;
    require(a.B >= 1 && a.N >= 1 && a.H >= 1 && a.s >= 1 && a.p >= 1, "fast: no operand may be empty");
    require(chunk >= 1 && chunk <= 4096 && threads >= 1, "fast: threads and chunk are at least 1, chunk at most 4096");
    const std::initializer_list<int64_t> row = {a.B, a.N, a.H, a.s}, column = {a.B, a.N, a.H, a.p};
    a.query = data_of(query, row, "fast: query must be (B, N, H, s), contiguous");
    a.key = data_of(key, row, "fast: key must be (B, N, H, s) as query, contiguous");
    a.value = data_of(value, column, "fast: value must be (B, N, H, p), contiguous");
    if (log_decay) {
        require(log_decay->ndim() == 4, "fast: log_decay must have four axes");
        a.decays = log_decay->shape(3);
    }
    require(a.decays == 1 || a.decays == a.s, "fast: log_decay must be (B, N, H, 1 or s)");
    a.log_decay = data_of(log_decay, {a.B, a.N, a.H, a.decays}, "fast: log_decay must be (B, N, H, 1 or s), contiguous");
    a.beta = data_of(beta, {a.B, a.N, a.H}, "fast: beta must be (B, N, H), contiguous");
    a.left = data_of(left, row, "fast: left must be (B, N, H, s), contiguous");
    a.right = data_of(right, row, "fast: right must be (B, N, H, s), contiguous");
    require((a.left != nullptr) == (a.right != nullptr) && !(a.beta && a.left),
            "fast: left and right go together, and not with beta");
    a.reads = data_of(reads, column, "fast: reads must be (B, N, H, p), contiguous");
    a.states = data_of(states, {a.B, a.H, (a.N + chunk - 1) / chunk, a.s, a.p},
                       "fast: states must be (B, H, chunks, s, p), contiguous");
    return a;
}

template <class T>
struct Table;
template <>
struct Table<float> {
    static constexpr auto fast = &Engine::fast_float;
    static constexpr auto fast_backward = &Engine::fast_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto fast = &Engine::fast_double;
    static constexpr auto fast_backward = &Engine::fast_backward_double;
};

template <class T>
void fast(Array<const T> query, Array<const T> key, Array<const T> value, Maybe<const T> log_decay, Maybe<const T> beta,
          Maybe<const T> left, Maybe<const T> right, int64_t chunk, Array<T> y, Maybe<T> reads, Maybe<T> states,
          int threads) {
    FastArgs<T> a = fast_args<T>(query, key, value, log_decay, beta, left, right, chunk, reads, states, threads);
    a.y = data_of(y, {a.B, a.N, a.H, a.p}, "fast: y must be (B, N, H, p), contiguous");
    run(Table<T>::fast, a);
}

template <class T>
void fast_backward(Array<const T> grad, Array<const T> query, Array<const T> key, Array<const T> value,
                   Maybe<const T> log_decay, Maybe<const T> beta, Maybe<const T> left, Maybe<const T> right, int64_t chunk,
                   Maybe<T> reads, Array<T> states, Array<T> d_query, Array<T> d_key, Array<T> d_value,
                   Maybe<T> d_log_decay, Maybe<T> d_beta, Maybe<T> d_left, Maybe<T> d_right, int threads) {
    FastBackwardArgs<T> a;
    a.of = fast_args<T>(query, key, value, log_decay, beta, left, right, chunk, reads, Maybe<T>(states), threads);
    const FastArgs<T> &of = a.of;
    require(of.reads || !(of.beta || of.left), "fast: the backward of a correction needs what it read");
    const std::initializer_list<int64_t> row = {of.B, of.N, of.H, of.s}, column = {of.B, of.N, of.H, of.p};
    const char *what = "fast: gradients must have the shapes of the operands, contiguous, and be missing as they are";
    a.grad = data_of(grad, column, "fast: grad must be (B, N, H, p), contiguous");
    a.d_query = data_of(d_query, row, what), a.d_key = data_of(d_key, row, what), a.d_value = data_of(d_value, column, what);
    a.d_log_decay = data_of(d_log_decay, {of.B, of.N, of.H, of.decays}, what);
    a.d_beta = data_of(d_beta, {of.B, of.N, of.H}, what);
    a.d_left = data_of(d_left, row, what), a.d_right = data_of(d_right, row, what);
    require((a.d_log_decay != nullptr) == (of.log_decay != nullptr) && (a.d_beta != nullptr) == (of.beta != nullptr) &&
                (a.d_left != nullptr) == (of.left != nullptr) && (a.d_right != nullptr) == (of.right != nullptr),
            what);
    run(Table<T>::fast_backward, a);
}

template <class T>
void bind(nb::module_ &m) {
    m.def("fast", &fast<T>, "query"_a.noconvert(), "key"_a.noconvert(), "value"_a.noconvert(),
          "log_decay"_a.noconvert().none(), "beta"_a.noconvert().none(), "left"_a.noconvert().none(),
          "right"_a.noconvert().none(), "chunk"_a, "y"_a.noconvert(), "reads"_a.noconvert().none(),
          "states"_a.noconvert().none(), "threads"_a);
    m.def("fast_backward", &fast_backward<T>, "grad"_a.noconvert(), "query"_a.noconvert(), "key"_a.noconvert(),
          "value"_a.noconvert(), "log_decay"_a.noconvert().none(), "beta"_a.noconvert().none(),
          "left"_a.noconvert().none(), "right"_a.noconvert().none(), "chunk"_a, "reads"_a.noconvert().none(),
          "states"_a.noconvert(), "d_query"_a.noconvert(), "d_key"_a.noconvert(), "d_value"_a.noconvert(),
          "d_log_decay"_a.noconvert().none(), "d_beta"_a.noconvert().none(), "d_left"_a.noconvert().none(),
          "d_right"_a.noconvert().none(), "threads"_a);
}

}  // namespace

void bind_fast(nb::module_ &m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace nearfold

// Bindings of the selective scan.
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

template <class T, size_t ndim>
using Array = nb::ndarray<T, nb::ndim<ndim>, nb::device::cpu>;

template <class A>
bool is(const A &array, std::initializer_list<int64_t> sizes) {
    size_t i = 0;
    for (const int64_t size : sizes)
        if (static_cast<int64_t>(array.shape(i++)) != size) return false;
    return true;
}

template <class T>
void rows_of(const Array<const T, 3> &array, const T *&data, int64_t *stride, const char *what) {
    require(array.shape(2) <= 1 || array.stride(2) == 1, what);
    data = array.data();
    stride[0] = array.stride(0), stride[1] = array.stride(1);
}

template <class T>
ScanArgs<T> scan_args(const Array<const T, 3> &u, const Array<const T, 3> &delta, const Array<const T, 2> &A,
                      const Array<const T, 3> &in, const Array<const T, 3> &out, int64_t chunk, int threads) {
    ScanArgs<T> a;
    a.B = u.shape(0), a.N = u.shape(1), a.C = u.shape(2), a.S = A.shape(1), a.chunk = chunk, a.threads = threads;
    require(a.B >= 1 && a.N >= 1 && a.C >= 1 && a.S >= 1, "scan: no operand may be empty");
    require(chunk >= 1 && chunk <= 4096 && threads >= 1, "scan: threads and chunk are at least 1, chunk at most 4096");
    require(is(delta, {a.B, a.N, a.C}), "scan: delta must be (B, N, C) as u");
    require(is(A, {a.C, a.S}) && contiguous(A), "scan: A must be (C, S), contiguous");
    require(is(in, {a.B, a.N, a.S}) && is(out, {a.B, a.N, a.S}), "scan: B and C must be (B, N, S)");
    rows_of<T>(u, a.u, a.u_stride, "scan: the channels of u must be next to one another");
    rows_of<T>(delta, a.delta, a.delta_stride, "scan: the channels of delta must be next to one another");
    rows_of<T>(in, a.in, a.in_stride, "scan: the states of B must be next to one another");
    rows_of<T>(out, a.out, a.out_stride, "scan: the states of C must be next to one another");
    a.A = A.data(), a.y = nullptr, a.states = nullptr;
    return a;
}

template <class T>
struct Table;
template <>
struct Table<float> {
    static constexpr auto scan = &Engine::scan_float;
    static constexpr auto scan_backward = &Engine::scan_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto scan = &Engine::scan_double;
    static constexpr auto scan_backward = &Engine::scan_backward_double;
};

template <class T>
void take_states(ScanArgs<T> &a, const Array<T, 4> &states) {
    require(is(states, {a.B, (a.N + a.chunk - 1) / a.chunk, a.S, a.C}) && contiguous(states),
            "scan: states must be (B, chunks, S, C), contiguous");
    a.states = states.data();
}

template <class T>
void scan(Array<const T, 3> u, Array<const T, 3> delta, Array<const T, 2> A, Array<const T, 3> in, Array<const T, 3> out,
          int64_t chunk, Array<T, 3> y, std::optional<Array<T, 4>> states, int threads) {
    ScanArgs<T> a = scan_args<T>(u, delta, A, in, out, chunk, threads);
    require(is(y, {a.B, a.N, a.C}) && contiguous(y), "scan: y must be (B, N, C), contiguous");
    if (states) take_states<T>(a, *states);
    a.y = y.data();
    run(Table<T>::scan, a);
}

template <class T>
void scan_backward(Array<const T, 3> grad, Array<const T, 3> u, Array<const T, 3> delta, Array<const T, 2> A,
                   Array<const T, 3> in, Array<const T, 3> out, Array<T, 4> states, int64_t chunk, Array<T, 3> d_u,
                   Array<T, 3> d_delta, Array<T, 2> d_A, Array<T, 3> d_in, Array<T, 3> d_out, int threads) {
    ScanBackwardArgs<T> a;
    a.of = scan_args<T>(u, delta, A, in, out, chunk, threads);
    take_states<T>(a.of, states);
    const int64_t B = a.of.B, N = a.of.N, C = a.of.C, S = a.of.S;
    require(is(grad, {B, N, C}) && contiguous(grad), "scan: grad must be (B, N, C), contiguous");
    require(is(d_u, {B, N, C}) && contiguous(d_u) && is(d_delta, {B, N, C}) && contiguous(d_delta) && is(d_A, {C, S}) &&
                contiguous(d_A) && is(d_in, {B, N, S}) && contiguous(d_in) && is(d_out, {B, N, S}) && contiguous(d_out),
            "scan: gradients must have the shapes of the operands, contiguous");
    a.grad = grad.data(), a.d_u = d_u.data(), a.d_delta = d_delta.data(), a.d_A = d_A.data();
    a.d_in = d_in.data(), a.d_out = d_out.data();
    run(Table<T>::scan_backward, a);
}

template <class T>
void bind(nb::module_ &m) {
    m.def("scan", &scan<T>, "u"_a.noconvert(), "delta"_a.noconvert(), "A"_a.noconvert(), "B"_a.noconvert(),
          "C"_a.noconvert(), "chunk"_a, "y"_a.noconvert(), "states"_a.noconvert().none(), "threads"_a);
    m.def("scan_backward", &scan_backward<T>, "grad"_a.noconvert(), "u"_a.noconvert(), "delta"_a.noconvert(),
          "A"_a.noconvert(), "B"_a.noconvert(), "C"_a.noconvert(), "states"_a.noconvert(), "chunk"_a, "d_u"_a.noconvert(),
          "d_delta"_a.noconvert(), "d_A"_a.noconvert(), "d_B"_a.noconvert(), "d_C"_a.noconvert(), "threads"_a);
}

}  // namespace

void bind_scan(nb::module_ &m) {
    bind<float>(m);
    bind<double>(m);
}

}  // namespace nearfold

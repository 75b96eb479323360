// What the files of bindings share.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <new>

#include "engine.h"
#include "threads.h"

namespace nearfold {

const Engine *chosen_engine();
void bind_local(nanobind::module_ &m);  // module_local.cpp
void bind_neighbors(nanobind::module_ &m);  // module_neighbors.cpp
void bind_corners(nanobind::module_ &m);  // module_corners.cpp
void bind_scan(nanobind::module_ &m);   // module_scan.cpp
void bind_fast(nanobind::module_ &m);   // module_fast.cpp
void bind_points(nanobind::module_ &m);  // module_points.cpp
void bind_sampled(nanobind::module_ &m);  // module_sampled.cpp

inline void require(bool holds, const char *what) {
    if (!holds) throw nanobind::value_error(what);
}

// Runs a kernel of the chosen set without the interpreter's lock; Ctrl-C ends it.
template <class K, class A>
void run(K kernel, const A &args) {
    const Engine *engine = chosen_engine();
    int status;
    try {
        nanobind::gil_scoped_release release;
        status = (engine->*kernel)(args);
    } catch (const Stopped &) {
        throw nanobind::python_error();  // what the signal's handler raised
    }
    if (status == out_of_memory) throw std::bad_alloc();
    if (status == bad_index) throw nanobind::value_error("index holds a position beyond the input");
}

template <class A>
bool contiguous(const A &array) {
    for (size_t i = 0; i < array.ndim(); ++i)
        if (array.shape(i) == 0) return true;  // whatever its strides
    int64_t stride = 1;
    for (size_t i = array.ndim(); i-- > 0;) {
        if (array.shape(i) > 1 && array.stride(i) != stride) return false;
        stride *= static_cast<int64_t>(array.shape(i));
    }
    return true;
}

// The grid as one axis; whether its strides allow it.
template <class A, class T>
bool take(const A &array, Flat<T> &to, int64_t &positions) {
    require(array.ndim() >= 3, "maps are (B, channels, *grid)");
    to.at = array.data();
    to.stride[0] = array.stride(0), to.stride[1] = array.stride(1), to.stride[2] = 1;
    positions = 1;
    for (size_t axis = array.ndim(); axis-- > 2;) {
        const int64_t n = array.shape(axis);
        if (n != 1) {
            if (positions == 1)
                to.stride[2] = array.stride(axis);
            else if (array.stride(axis) != positions * to.stride[2])
                return false;
        }
        positions *= n;
    }
    return true;
}

// Whether a map (B, channels, *grid) is a view of rows (B, positions, channels), contiguous.
template <class T>
bool is_view_of_rows(const nanobind::ndarray<T, nanobind::device::cpu> &array, int64_t B, int64_t channels, int64_t positions) {
    Flat<T> map;
    int64_t found;
    return take(array, map, found) && found == positions && static_cast<int64_t>(array.shape(0)) == B &&
           static_cast<int64_t>(array.shape(1)) == channels && (channels == 1 || map.stride[1] == 1) &&
           (positions == 1 || map.stride[2] == channels) && (B == 1 || map.stride[0] == positions * channels);
}

}  // namespace nearfold

// The kernels of one instruction set, each by the name of its place in the table.
#pragma once
#include "engine.h"

namespace nearfold {

// NEARFOLD_BASE: a set that adds to another one searches otherwise in float32; all else is the other one's.
#if defined(NEARFOLD_BASE)
namespace NEARFOLD_BASE {
#include "kernels.inc"
}  // namespace NEARFOLD_BASE
#endif

namespace NEARFOLD_ISA {

#if defined(NEARFOLD_BASE)
using namespace NEARFOLD_BASE;  // hidden by what is declared here
int select_float(const SelectArgs<float> &);
int neighbors_float(const NeighborsArgs<float> &);
#else
#include "kernels.inc"
#endif

// The kernels that layers are made of, by the type of their numbers.
template <class T>
struct Kernels;
template <>
struct Kernels<float> {
    static constexpr auto select = &select_float;
    static constexpr auto select_backward = &select_backward_float;
    static constexpr auto aggregate = &aggregate_float;
    static constexpr auto aggregate_backward = &aggregate_backward_float;
    static constexpr auto softmax = &softmax_float;
    static constexpr auto softmax_backward = &softmax_backward_float;
    static constexpr auto grouped = &grouped_float;
    static constexpr auto grouped_backward = &grouped_backward_float;
    static constexpr auto corners = &corners_float;
    static constexpr auto corners_backward = &corners_backward_float;
};
template <>
struct Kernels<double> {
    static constexpr auto select = &select_double;
    static constexpr auto select_backward = &select_backward_double;
    static constexpr auto aggregate = &aggregate_double;
    static constexpr auto aggregate_backward = &aggregate_backward_double;
    static constexpr auto softmax = &softmax_double;
    static constexpr auto softmax_backward = &softmax_backward_double;
    static constexpr auto grouped = &grouped_double;
    static constexpr auto grouped_backward = &grouped_backward_double;
    static constexpr auto corners = &corners_double;
    static constexpr auto corners_backward = &corners_backward_double;
};

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

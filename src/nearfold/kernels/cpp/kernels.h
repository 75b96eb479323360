// The kernels of one instruction set, each by the name of its place in the table.
#pragma once
#include "engine.h"

namespace nearfold {
namespace NEARFOLD_ISA {

int select_float(const SelectArgs<float> &);
int select_double(const SelectArgs<double> &);
int select_backward_float(const SelectBackwardArgs<float> &);
int select_backward_double(const SelectBackwardArgs<double> &);
int aggregate_float(const AggregateArgs<float> &);
int aggregate_double(const AggregateArgs<double> &);
int aggregate_backward_float(const AggregateBackwardArgs<float> &);
int aggregate_backward_double(const AggregateBackwardArgs<double> &);
int softmax_float(const SoftmaxArgs<float> &);
int softmax_double(const SoftmaxArgs<double> &);
int softmax_backward_float(const SoftmaxBackwardArgs<float> &);
int softmax_backward_double(const SoftmaxBackwardArgs<double> &);
int neighbors_float(const NeighborsArgs<float> &);
int neighbors_double(const NeighborsArgs<double> &);
int neighbors_backward_float(const NeighborsBackwardArgs<float> &);
int neighbors_backward_double(const NeighborsBackwardArgs<double> &);
int local_float(const LocalArgs<float> &);
int local_double(const LocalArgs<double> &);
int local_backward_float(const LocalBackwardArgs<float> &);
int local_backward_double(const LocalBackwardArgs<double> &);
int grouped_float(const GroupedArgs<float> &);
int grouped_double(const GroupedArgs<double> &);
int grouped_backward_float(const GroupedBackwardArgs<float> &);
int grouped_backward_double(const GroupedBackwardArgs<double> &);
int shift_float(const ShiftArgs<float> &);
int shift_double(const ShiftArgs<double> &);
int shift_backward_float(const ShiftBackwardArgs<float> &);
int shift_backward_double(const ShiftBackwardArgs<double> &);
int corners_float(const CornersArgs<float> &);
int corners_double(const CornersArgs<double> &);
int corners_backward_float(const CornersBackwardArgs<float> &);
int corners_backward_double(const CornersBackwardArgs<double> &);
int deformed_float(const DeformedArgs<float> &);
int deformed_double(const DeformedArgs<double> &);
int deformed_backward_float(const DeformedBackwardArgs<float> &);
int deformed_backward_double(const DeformedBackwardArgs<double> &);
int scan_float(const ScanArgs<float> &);
int scan_double(const ScanArgs<double> &);
int scan_backward_float(const ScanBackwardArgs<float> &);
int scan_backward_double(const ScanBackwardArgs<double> &);
int fast_float(const FastArgs<float> &);
int fast_double(const FastArgs<double> &);
int fast_backward_float(const FastBackwardArgs<float> &);
int fast_backward_double(const FastBackwardArgs<double> &);
int points_float(const PointsArgs<float> &);
int points_double(const PointsArgs<double> &);
int largest_float(const LargestArgs<float> &);
int largest_double(const LargestArgs<double> &);
int largest_backward_float(const LargestBackwardArgs<float> &);
int largest_backward_double(const LargestBackwardArgs<double> &);
int sampled_float(const SampledArgs<float> &);
int sampled_double(const SampledArgs<double> &);
int sampled_backward_float(const SampledBackwardArgs<float> &);
int sampled_backward_double(const SampledBackwardArgs<double> &);

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

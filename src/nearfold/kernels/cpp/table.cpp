// The table of one instruction set.
#include "kernels.h"

namespace nearfold {

#define NEARFOLD_JOIN_(a, b) a##b
#define NEARFOLD_JOIN(a, b) NEARFOLD_JOIN_(a, b)
#define NEARFOLD_TEXT_(a) #a
#define NEARFOLD_TEXT(a) NEARFOLD_TEXT_(a)

extern const Engine NEARFOLD_JOIN(engine_, NEARFOLD_ISA) = {
    NEARFOLD_TEXT(NEARFOLD_ISA),
    NEARFOLD_ISA::select_float,
    NEARFOLD_ISA::select_double,
    NEARFOLD_ISA::select_backward_float,
    NEARFOLD_ISA::select_backward_double,
    NEARFOLD_ISA::aggregate_float,
    NEARFOLD_ISA::aggregate_double,
    NEARFOLD_ISA::aggregate_backward_float,
    NEARFOLD_ISA::aggregate_backward_double,
    NEARFOLD_ISA::softmax_float,
    NEARFOLD_ISA::softmax_double,
    NEARFOLD_ISA::softmax_backward_float,
    NEARFOLD_ISA::softmax_backward_double,
    NEARFOLD_ISA::neighbors_float,
    NEARFOLD_ISA::neighbors_double,
    NEARFOLD_ISA::neighbors_backward_float,
    NEARFOLD_ISA::neighbors_backward_double,
    NEARFOLD_ISA::local_float,
    NEARFOLD_ISA::local_double,
    NEARFOLD_ISA::local_backward_float,
    NEARFOLD_ISA::local_backward_double,
    NEARFOLD_ISA::grouped_float,
    NEARFOLD_ISA::grouped_double,
    NEARFOLD_ISA::grouped_backward_float,
    NEARFOLD_ISA::grouped_backward_double,
    NEARFOLD_ISA::shift_float,
    NEARFOLD_ISA::shift_double,
    NEARFOLD_ISA::shift_backward_float,
    NEARFOLD_ISA::shift_backward_double,
    NEARFOLD_ISA::corners_float,
    NEARFOLD_ISA::corners_double,
    NEARFOLD_ISA::corners_backward_float,
    NEARFOLD_ISA::corners_backward_double,
    NEARFOLD_ISA::deformed_float,
    NEARFOLD_ISA::deformed_double,
    NEARFOLD_ISA::deformed_backward_float,
    NEARFOLD_ISA::deformed_backward_double,
    NEARFOLD_ISA::scan_float,
    NEARFOLD_ISA::scan_double,
    NEARFOLD_ISA::scan_backward_float,
    NEARFOLD_ISA::scan_backward_double,
    NEARFOLD_ISA::fast_float,
    NEARFOLD_ISA::fast_double,
    NEARFOLD_ISA::fast_backward_float,
    NEARFOLD_ISA::fast_backward_double,
    NEARFOLD_ISA::points_float,
    NEARFOLD_ISA::points_double,
    NEARFOLD_ISA::largest_float,
    NEARFOLD_ISA::largest_double,
    NEARFOLD_ISA::largest_backward_float,
    NEARFOLD_ISA::largest_backward_double,
    NEARFOLD_ISA::sampled_float,
    NEARFOLD_ISA::sampled_double,
    NEARFOLD_ISA::sampled_backward_float,
    NEARFOLD_ISA::sampled_backward_double,
};

}  // namespace nearfold

// The table of kernels. Every instruction set compiles the same sources into a table of its own.
//
// Shape legend: B batch, H heads, M queries or outputs, R keys, N positions, E embedded features, C value channels,
// O output channels, S slots, G groups. Strides count elements. A missing operand is a null pointer.
#pragma once
#include <cstdint>

#include "deformed.h"
#include "fast.h"
#include "local.h"
#include "neighbors.h"
#include "points.h"
#include "sampled.h"
#include "scan.h"

namespace nearfold {

enum Status { ok = 0, out_of_memory = 1, bad_index = 2 };
enum Metric { dot = 0, cosine = 1, euclidean = 2, chebyshev = 3 };

constexpr int64_t max_axes = 8;  // of an index of which nothing is copied

constexpr int64_t invalid = -1;  // a slot that reads nothing
constexpr int64_t lost = -2;     // a slot of a query that was NaN

template <class T>
struct SelectArgs {
    const T *query, *key;
    int64_t query_stride[4], key_stride[4];  // B, H, M or R, E
    int64_t B, H, M, R, E, k;
    int metric;
    bool squared;
    const int64_t *query_index, *key_index;  // positions on the grid, key_index ascending
    const int64_t *grid;
    int64_t axes;
    bool causal;
    int64_t reach, dilation;  // reach -1: any
    bool own;                 // the query's own position scores `again`
    T again;
    T *score;        // (B, H, M, k)
    int64_t *index;  // (B, H, M, k)
    int threads;
};

template <class T>
struct SelectBackwardArgs {
    const T *grad;  // (B, H, M, k), contiguous; zero where the score was a constant
    const T *query, *key;
    int64_t query_stride[3], key_stride[3];  // B, H, M or R; features are contiguous
    const int64_t *index;                    // (B, H, M, k)
    T *d_query, *d_key;
    int64_t d_query_stride[3], d_key_stride[3];
    int64_t B, H, M, R, E, k;
    int metric;
    bool squared;
    int threads;
};

template <class T>
struct AggregateArgs {
    const T *value;  // (B, N, C), channels contiguous
    int64_t value_stride[2];
    const int64_t *index;  // (B, M, S * entries, H)
    int64_t index_stride[4];
    const T *alpha;  // (B, M, S * entries, H) or null
    int64_t alpha_stride[4];
    const T *weight;  // (O, C / G, S) contiguous, or null
    int64_t B, N, C, M, S, H, O, G;
    int64_t entries;  // rows of value that a slot adds up; one without a weight
    T *out;  // (B, M, O) contiguous
    int threads;
};

template <class T>
struct AggregateBackwardArgs {
    AggregateArgs<T> of;  // `out` unused
    const T *grad;        // (B, M, O) contiguous
    T *d_value;           // (B, N, C) contiguous; without a dense kernel it may be null
    T *d_alpha;           // (B, M, S * entries, H); there with alpha, and without a weight wherever it is wanted
    int64_t d_alpha_stride[4];
    T *d_weight;  // (O, C / G, S) contiguous

    int64_t d_alpha_at(int64_t b, int64_t m, int64_t h) const {
        return b * d_alpha_stride[0] + m * d_alpha_stride[1] + h * d_alpha_stride[3];
    }
};

template <class T>
struct SoftmaxArgs {
    const T *score;        // (rows, k)
    const int64_t *index;  // (rows, k), the rows over `axes` axes; negative reads nothing
    int64_t axes, index_size[max_axes], index_stride[max_axes], index_step;
    T scale;
    int64_t rows, k;
    T *alpha;  // (rows, k)
    int threads;
};

template <class T>
struct SoftmaxBackwardArgs {
    const T *grad, *alpha;  // (rows, k)
    T scale;
    int64_t rows, k;
    T *d_score;  // (rows, k)
    int threads;
};

struct Engine {
    const char *name;
    int (*select_float)(const SelectArgs<float> &);
    int (*select_double)(const SelectArgs<double> &);
    int (*select_backward_float)(const SelectBackwardArgs<float> &);
    int (*select_backward_double)(const SelectBackwardArgs<double> &);
    int (*aggregate_float)(const AggregateArgs<float> &);
    int (*aggregate_double)(const AggregateArgs<double> &);
    int (*aggregate_backward_float)(const AggregateBackwardArgs<float> &);
    int (*aggregate_backward_double)(const AggregateBackwardArgs<double> &);
    int (*softmax_float)(const SoftmaxArgs<float> &);
    int (*softmax_double)(const SoftmaxArgs<double> &);
    int (*softmax_backward_float)(const SoftmaxBackwardArgs<float> &);
    int (*softmax_backward_double)(const SoftmaxBackwardArgs<double> &);
    int (*neighbors_float)(const NeighborsArgs<float> &);
    int (*neighbors_double)(const NeighborsArgs<double> &);
    int (*neighbors_backward_float)(const NeighborsBackwardArgs<float> &);
    int (*neighbors_backward_double)(const NeighborsBackwardArgs<double> &);
    int (*local_float)(const LocalArgs<float> &);
    int (*local_double)(const LocalArgs<double> &);
    int (*local_backward_float)(const LocalBackwardArgs<float> &);
    int (*local_backward_double)(const LocalBackwardArgs<double> &);
    int (*grouped_float)(const GroupedArgs<float> &);
    int (*grouped_double)(const GroupedArgs<double> &);
    int (*grouped_backward_float)(const GroupedBackwardArgs<float> &);
    int (*grouped_backward_double)(const GroupedBackwardArgs<double> &);
    int (*shift_float)(const ShiftArgs<float> &);
    int (*shift_double)(const ShiftArgs<double> &);
    int (*shift_backward_float)(const ShiftBackwardArgs<float> &);
    int (*shift_backward_double)(const ShiftBackwardArgs<double> &);
    int (*corners_float)(const CornersArgs<float> &);
    int (*corners_double)(const CornersArgs<double> &);
    int (*corners_backward_float)(const CornersBackwardArgs<float> &);
    int (*corners_backward_double)(const CornersBackwardArgs<double> &);
    int (*deformed_float)(const DeformedArgs<float> &);
    int (*deformed_double)(const DeformedArgs<double> &);
    int (*deformed_backward_float)(const DeformedBackwardArgs<float> &);
    int (*deformed_backward_double)(const DeformedBackwardArgs<double> &);
    int (*scan_float)(const ScanArgs<float> &);
    int (*scan_double)(const ScanArgs<double> &);
    int (*scan_backward_float)(const ScanBackwardArgs<float> &);
    int (*scan_backward_double)(const ScanBackwardArgs<double> &);
    int (*fast_float)(const FastArgs<float> &);
    int (*fast_double)(const FastArgs<double> &);
    int (*fast_backward_float)(const FastBackwardArgs<float> &);
    int (*fast_backward_double)(const FastBackwardArgs<double> &);
    int (*points_float)(const PointsArgs<float> &);
    int (*points_double)(const PointsArgs<double> &);
    int (*largest_float)(const LargestArgs<float> &);
    int (*largest_double)(const LargestArgs<double> &);
    int (*largest_backward_float)(const LargestBackwardArgs<float> &);
    int (*largest_backward_double)(const LargestBackwardArgs<double> &);
    int (*sampled_float)(const SampledArgs<float> &);
    int (*sampled_double)(const SampledArgs<double> &);
    int (*sampled_backward_float)(const SampledBackwardArgs<float> &);
    int (*sampled_backward_double)(const SampledBackwardArgs<double> &);
};

extern const Engine engine_generic;
// those that are compiled, see CMakeLists.txt
extern const Engine engine_avx2;
extern const Engine engine_avx512;
extern const Engine engine_amx;

}  // namespace nearfold

// Arguments of the kernels that read a window of the grid. Included by engine.h.
#pragma once
#include <cstdint>

namespace nearfold {

// A window on a grid of three axes, the last one fastest; axes that are not there have one position. Slot k of output
// o reads position o * stride + k * dilation - before of an axis: outside the grid nothing, or the mirrored position.
struct Window {
    int64_t grid[3], out[3], size[3], stride[3], dilation[3], before[3];
    bool reflect;
};

// A map (B, H, features, *axes) of any strides.
template <class T>
struct Map {
    T *data;
    int64_t stride[6];
};

// A map, its grid as one axis: (B, channels, positions), of any strides.
template <class T>
struct Flat {
    const T *at;
    int64_t stride[3];
};

template <class T>
struct LocalArgs {
    Window window;
    int64_t B, H, E, D;
    Map<const T> query, key, value;  // (B, H, E, *out), (B, H, E, *grid), (B, H, D, *grid)
    Map<const T> position;           // (1, 1, E, *grid), subtracted from every key, or without data
    Map<T> out;                      // (B, H, D, *out)
    Map<T> stats;                    // (B, H, 2, *out): the largest score, and one over the sum of exponentials
    int metric;                      // dot or euclidean
    bool squared;
    T scale;
    int threads;
};

template <class T>
struct LocalBackwardArgs {
    LocalArgs<T> of;  // `out` unused, `stats` read
    Map<const T> grad;
    Map<T> d_query, d_key, d_value;
};

// Fractional positions of a window whose slots are moved.
template <class T>
struct CornersArgs {
    Window window;
    int axes;  // the last ones of the window's three
    int64_t planes, S, M;  // samples and groups, slots, outputs
    const T *offset;  // (planes, S, axes, M) contiguous
    const T *mask;    // (planes, S, M) contiguous, or null
    int64_t *index;   // (planes, S, 2^axes, M) contiguous
    T *share;         // as index
    int threads;
};

template <class T>
struct CornersBackwardArgs {
    CornersArgs<T> of;  // `index` and `share` unused
    const T *grad;      // as share
    T *d_offset, *d_mask;
};

// A grouped convolution whose input channels lie in several maps, (B, G, inputs of a group, *grid) each.
constexpr int most_maps = 4;

template <class T>
struct GroupedArgs {
    Window window;
    int64_t B, G, I, O, maps;  // I: inputs of a group, over all maps
    Map<const T> map[most_maps];
    int64_t inputs[most_maps];
    const T *weight;  // (G, O, I, *size) contiguous
    Map<T> out;       // (B, O, G, *out)
    int threads;
};

template <class T>
struct GroupedBackwardArgs {
    GroupedArgs<T> of;  // `out` unused
    Map<const T> grad;
    Map<T> d_map[most_maps];
    T *d_weight;  // as weight
};

// The same whose kernel is made of a map of the inputs, and of how the maps are shifted and summed.
template <class T>
struct ShiftArgs {
    GroupedArgs<T> of;  // `weight` unused
    const T *mix, *shift;  // (t, I), (G * O, t, *size), contiguous
    int64_t t;
};

template <class T>
struct ShiftBackwardArgs {
    ShiftArgs<T> by;
    GroupedBackwardArgs<T> of;  // its `of` and `d_weight` unused
    T *d_mix, *d_shift;
};

}  // namespace nearfold

// Maps as rows of channels, for the layers that are one call.
#pragma once
#include "engine.h"
#include "simd.h"

namespace nearfold {
namespace {

constexpr int64_t together = 64;  // positions that are worked on at a time

// Whether the channels of a map lie next to one another, and its rows apart.
template <class T>
bool has_rows(const Flat<T> &map, int64_t channels, int64_t positions) {
    return (channels <= 1 || map.stride[1] == 1) && (positions <= 1 || map.stride[2] >= channels);
}

// (B, channels, positions) -> rows (B, positions, channels), contiguous.
template <class T>
void to_rows(const Flat<T> &map, int64_t B, int64_t channels, int64_t positions, T *to, int threads) {
    const int64_t blocks = ceil_div(positions, together);
    parallel(threads, B * blocks, [&](int64_t item, int) {
        const int64_t b = item / blocks, n0 = item % blocks * together, n1 = smaller(n0 + together, positions);
        const T *from = map.at + b * map.stride[0];
        T *rows = to + b * positions * channels;
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t n = n0; n < n1; ++n) rows[n * channels + c] = from[c * map.stride[1] + n * map.stride[2]];
    });
}

// Rows as they are or as copies, by their strides over B and positions.
template <class T>
struct Rows {
    const T *at;
    int64_t stride[2];
};

// `copy` holds the map where it has no rows.
template <class T>
Rows<T> rows_of(const Flat<T> &map, int64_t B, int64_t channels, int64_t positions, T *copy, int threads) {
    if (has_rows(map, channels, positions)) return {map.at, {map.stride[0], map.stride[2]}};
    to_rows(map, B, channels, positions, copy, threads);
    return {copy, {positions * channels, channels}};
}

// Whether a map is rows without gaps: (B, positions, channels), contiguous.
template <class T>
bool is_rows(const Flat<T> &map, int64_t channels, int64_t positions) {
    return has_rows(map, channels, positions) && map.stride[2] == channels && map.stride[0] == positions * channels;
}

template <class T>
bool same_map(const Flat<T> &x, const Flat<T> &y) {
    return x.at == y.at && !memcmp(x.stride, y.stride, sizeof x.stride);
}

// rows (rows, O) += bias (O,).
template <class T>
void add_to_rows(const T *bias, int64_t rows, int64_t O, T *to, int threads) {
    parallel(threads, ceil_div(rows, together), [&](int64_t item, int) {
        for (int64_t row = item * together; row < smaller((item + 1) * together, rows); ++row)
            for (int64_t o = 0; o < O; ++o) to[row * O + o] += bias[o];
    });
}

// Sums over rows (rows, O), the same on any number of threads.
template <class T>
int sum_rows(const T *from, int64_t rows, int64_t O, T *to, int threads) {
    const int64_t blocks = ceil_div(rows, together);
    const Scratch parts(blocks * O * sizeof(T));
    if (!parts.ok()) return out_of_memory;
    parallel(threads, blocks, [&](int64_t item, int) {
        T *part = parts.at<T>() + item * O;
        fill(part, O, T(0));
        for (int64_t row = item * together; row < smaller((item + 1) * together, rows); ++row)
            for (int64_t o = 0; o < O; ++o) part[o] += from[row * O + o];
    });
    for (int64_t o = 0; o < O; ++o) {
        double total = 0;
        for (int64_t block = 0; block < blocks; ++block) total += parts.at<T>()[block * O + o];
        to[o] = static_cast<T>(total);
    }
    return ok;
}

}  // namespace
}  // namespace nearfold

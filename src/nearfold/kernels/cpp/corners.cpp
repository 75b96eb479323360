// Fractional positions: for every slot that an offset has moved, the corners of the cell around it, and how much of each.
//
// A line is the outputs of one slot along the last axis: plain loops over arrays, which the compiler turns into vectors.
#include <limits>

#include "engine.h"
#include "simd.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int64_t most = 256;  // outputs of a line that are worked on at once

// The cells of a line's slots: lowest corner, and how far into the cell, on each of the last `axes` axes.
template <class T, int axes>
struct Line {
    int64_t count;
    int32_t low[axes][most], grid[axes], lost[most];
    T share[axes][most];

    // Outputs first.. of the line: `row` counts the outputs' coordinates but the last, `offset` is that of the slot.
    void place(const Window &w, int64_t row, int64_t first, int64_t slot, const T *offset, int64_t M) {
        const int last = axes - 1;
        count = smaller<int64_t>(most, w.out[2] - first);
        for (int64_t x = 0; x < count; ++x) lost[x] = 0;
        int64_t rest = row;
        for (int a = last; a >= 0; --a) {
            const int b = 3 - axes + a;
            const int64_t k = slot % w.size[b], o = a == last ? first : rest % w.out[b], step = a == last ? w.stride[b] : 0;
            slot /= w.size[b];
            if (a != last) rest /= w.out[b];
            grid[a] = static_cast<int32_t>(w.grid[b]);
            const T *by = offset + a * M + row * w.out[2] + first;
            const int32_t from = static_cast<int32_t>(o * w.stride[b] + k * w.dilation[b] - w.before[b]);
            const int32_t by_output = static_cast<int32_t>(step);
            const T end = static_cast<T>(w.grid[b] + 1);
            for (int32_t x = 0; x < count; ++x) {
                const T at = static_cast<T>(from + x * by_output) + by[x], below = __builtin_floor(at);
                lost[x] |= at != at;
                share[a][x] = at - below;
                // far outside there is no corner on the grid, and no integer overflows
                const T capped = below < end ? below : end;
                low[a][x] = static_cast<int32_t>(capped > -2 ? capped : -2);
            }
        }
    }
    // Bit `axes - 1 - a` of a corner says which side on axis a.
    static bool upper(int corner, int a) { return corner >> (axes - 1 - a) & 1; }

    // Raster indices of a corner, -1 where it is outside; 0 for a place that is NaN.
    void index(int corner, int32_t *to) const {
        for (int64_t x = 0; x < count; ++x) {
            int32_t flat = 0, inside = 1;
            for (int a = 0; a < axes; ++a) {
                const int32_t at = low[a][x] + upper(corner, a);
                inside &= at >= 0 && at < grid[a];
                flat = flat * grid[a] + at;
            }
            to[x] = lost[x] ? 0 : inside ? flat : -1;
        }
    }
    // What of every axis but one belongs to a corner.
    void parts(int corner, int but, T *to) const {
        for (int64_t x = 0; x < count; ++x) to[x] = 1;
        for (int a = 0; a < axes; ++a) {
            if (a == but) continue;
            const T sign = upper(corner, a) ? 1 : -1, from = upper(corner, a) ? 0 : 1;
            for (int64_t x = 0; x < count; ++x) to[x] *= from + sign * share[a][x];
        }
    }
};

// body(line, plane, slot, where the line begins among the M outputs) for all of them.
template <class T, int axes, class F>
void for_lines(const CornersArgs<T> &a, const F &body) {
    const int64_t rows = a.M / a.window.out[2];
    parallel(a.threads, a.planes * a.S, [&](int64_t item, int) {
        Line<T, axes> line;
        const int64_t plane = item / a.S, s = item % a.S;
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t first = 0; first < a.window.out[2]; first += most) {
                line.place(a.window, row, first, s, a.offset + (plane * a.S + s) * axes * a.M, a.M);
                body(line, plane, s, row * a.window.out[2] + first);
            }
    });
}

template <class T, int axes>
void forward(const CornersArgs<T> &a) {
    constexpr int E = 1 << axes;
    for_lines<T, axes>(a, [&](const Line<T, axes> &line, int64_t plane, int64_t s, int64_t at) {
        const T *mask = a.mask ? a.mask + (plane * a.S + s) * a.M + at : nullptr;
        int32_t index[most];
        T part[most];
        for (int e = 0; e < E; ++e) {
            const int64_t to = ((plane * a.S + s) * E + e) * a.M + at;
            line.index(e, index);
            line.parts(e, -1, part);
            if (mask)
                for (int64_t x = 0; x < line.count; ++x) part[x] *= mask[x];
            for (int64_t x = 0; x < line.count; ++x) a.index[to + x] = index[x];
            for (int64_t x = 0; x < line.count; ++x)
                a.share[to + x] = line.lost[x] ? std::numeric_limits<T>::quiet_NaN() : index[x] < 0 ? 0 : part[x];
        }
    });
}

template <class T, int axes>
void backward(const CornersBackwardArgs<T> &all) {
    constexpr int E = 1 << axes;
    const CornersArgs<T> &a = all.of;
    for_lines<T, axes>(a, [&](const Line<T, axes> &line, int64_t plane, int64_t s, int64_t at) {
        const int64_t slot = plane * a.S + s;
        const T *mask = a.mask ? a.mask + slot * a.M + at : nullptr;
        int32_t index[most];
        T part[most], grad[most], sum[axes + 1][most] = {};  // by axis, and at last for the mask
        for (int e = 0; e < E; ++e) {
            const T *from = all.grad + (slot * E + e) * a.M + at;
            line.index(e, index);
            for (int64_t x = 0; x < line.count; ++x) grad[x] = index[x] < 0 || line.lost[x] ? 0 : from[x];
            for (int x_axis = 0; x_axis <= axes; ++x_axis) {
                if (x_axis == axes && !mask) break;
                line.parts(e, x_axis < axes ? x_axis : -1, part);
                const T sign = x_axis == axes || Line<T, axes>::upper(e, x_axis) ? 1 : -1;
                for (int64_t x = 0; x < line.count; ++x)  // a share that is NaN has no gradient, not a NaN one
                    sum[x_axis][x] += line.lost[x] ? 0 : sign * grad[x] * part[x];
            }
        }
        for (int x_axis = 0; x_axis < axes; ++x_axis) {
            T *to = all.d_offset + (slot * axes + x_axis) * a.M + at;
            for (int64_t x = 0; x < line.count; ++x) to[x] = mask ? sum[x_axis][x] * mask[x] : sum[x_axis][x];
        }
        if (mask)
            for (int64_t x = 0; x < line.count; ++x) all.d_mask[slot * a.M + at + x] = sum[axes][x];
    });
}

template <class T>
int corners(const CornersArgs<T> &a) {
    if (a.axes == 1) forward<T, 1>(a);
    if (a.axes == 2) forward<T, 2>(a);
    if (a.axes == 3) forward<T, 3>(a);
    return ok;
}

template <class T>
int corners_backward(const CornersBackwardArgs<T> &a) {
    if (a.of.axes == 1) backward<T, 1>(a);
    if (a.of.axes == 2) backward<T, 2>(a);
    if (a.of.axes == 3) backward<T, 3>(a);
    return ok;
}

}  // namespace

int corners_float(const CornersArgs<float> &a) { return corners(a); }
int corners_double(const CornersArgs<double> &a) { return corners(a); }
int corners_backward_float(const CornersBackwardArgs<float> &a) { return corners_backward(a); }
int corners_backward_double(const CornersBackwardArgs<double> &a) { return corners_backward(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

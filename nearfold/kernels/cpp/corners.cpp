// Fractional positions: for every slot that an offset has moved, the corners of the cell around it, and how much of each.
#include <limits>

#include "engine.h"
#include "simd.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int64_t block_outputs = 256;

// Where one moved slot lies: the cell's lowest corner, and how far into the cell it is, on the last `axes` axes.
template <class T, int axes>
struct Place {
    int64_t low[axes];
    T share[axes];
    bool lost;  // NaN

    Place(const Window &w, const int64_t *output, const int64_t *slot, const T *offset, int64_t step) {
        lost = false;
        for (int a = 0; a < axes; ++a) {
            const int b = 3 - axes + a;
            const T from = static_cast<T>(output[a] * w.stride[b] - w.before[b] + slot[a] * w.dilation[b]);
            const T at = from + offset[a * step], below = __builtin_floor(at), end = static_cast<T>(w.grid[b] + 1);
            lost |= at != at;
            share[a] = at - below;
            // far outside there is no corner on the grid, and no integer overflows
            low[a] = static_cast<int64_t>(below > -2 ? (below < end ? below : end) : -2);
        }
    }
    // Raster index of a corner (bit `axes - 1 - a` says which side on axis a), or -1 where it is outside.
    int64_t index(const Window &w, int corner) const {
        int64_t flat = 0;
        bool inside = true;
        for (int a = 0; a < axes; ++a) {
            const int64_t n = w.grid[3 - axes + a], at = low[a] + (corner >> (axes - 1 - a) & 1);
            inside &= at >= 0 && at < n;
            flat = flat * n + at;
        }
        return inside ? flat : invalid;
    }
    T part(int corner, int a) const { return corner >> (axes - 1 - a) & 1 ? share[a] : 1 - share[a]; }
};

// body(output in raster order, its coordinates, slot, its coordinates) for every output of a block and every slot.
template <int axes, class F>
void for_block(const Window &w, int64_t block, int64_t M, const F &body) {
    for (int64_t m = block * block_outputs; m < smaller((block + 1) * block_outputs, M); ++m) {
        int64_t output[axes], slot[axes] = {}, rest = m;
        for (int a = axes - 1; a >= 0; --a) {
            output[a] = rest % w.out[3 - axes + a];
            rest /= w.out[3 - axes + a];
        }
        int64_t count = 1;
        for (int a = 0; a < axes; ++a) count *= w.size[3 - axes + a];
        for (int64_t s = 0; s < count; ++s) {
            body(m, output, s, slot);
            for (int a = axes - 1; a >= 0 && ++slot[a] == w.size[3 - axes + a]; --a) slot[a] = 0;
        }
    }
}

template <class T, int axes>
void forward(const CornersArgs<T> &a) {
    constexpr int E = 1 << axes;
    const int64_t blocks = ceil_div(a.M, block_outputs);
    parallel(a.threads, a.planes * blocks, [&](int64_t item, int) {
        const int64_t plane = item / blocks;
        const T *offset = a.offset + plane * a.S * axes * a.M, *mask = a.mask + plane * a.S * a.M;
        for_block<axes>(a.window, item % blocks, a.M, [&](int64_t m, const int64_t *output, int64_t s, const int64_t *slot) {
            const Place<T, axes> at(a.window, output, slot, offset + s * axes * a.M + m, a.M);
            const T turned = a.mask ? mask[s * a.M + m] : 1;
            const int64_t to = ((plane * a.M + m) * a.S + s) * E;
            for (int e = 0; e < E; ++e) {
                T share = turned;
                for (int x = 0; x < axes; ++x) share *= at.part(e, x);
                const int64_t index = at.index(a.window, e);
                a.index[to + e] = at.lost ? 0 : index;
                a.share[to + e] = at.lost ? std::numeric_limits<T>::quiet_NaN() : index < 0 ? 0 : share;
            }
        });
    });
}

template <class T, int axes>
void backward(const CornersBackwardArgs<T> &all) {
    constexpr int E = 1 << axes;
    const CornersArgs<T> &a = all.of;
    const int64_t blocks = ceil_div(a.M, block_outputs);
    parallel(a.threads, a.planes * blocks, [&](int64_t item, int) {
        const int64_t plane = item / blocks, from = plane * a.S * axes * a.M;
        const T *mask = a.mask + plane * a.S * a.M;
        for_block<axes>(a.window, item % blocks, a.M, [&](int64_t m, const int64_t *output, int64_t s, const int64_t *slot) {
            const Place<T, axes> at(a.window, output, slot, a.offset + from + s * axes * a.M + m, a.M);
            const T *grad = all.grad + ((plane * a.M + m) * a.S + s) * E;
            T d_share[axes] = {}, d_mask = 0;
            for (int e = 0; e < E && !at.lost; ++e) {
                if (at.index(a.window, e) < 0) continue;
                T whole = grad[e];
                for (int x = 0; x < axes; ++x) whole *= at.part(e, x);
                d_mask += whole;
                for (int x = 0; x < axes; ++x) {
                    T others = e >> (axes - 1 - x) & 1 ? grad[e] : -grad[e];
                    for (int y = 0; y < axes; ++y)
                        if (y != x) others *= at.part(e, y);
                    d_share[x] += others;
                }
            }
            const T turned = a.mask ? mask[s * a.M + m] : 1;
            for (int x = 0; x < axes; ++x) all.d_offset[from + (s * axes + x) * a.M + m] = d_share[x] * turned;
            if (a.mask) all.d_mask[(plane * a.S + s) * a.M + m] = d_mask;
        });
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

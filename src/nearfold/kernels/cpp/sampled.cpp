// Sums over points between positions: each reads the corners of the cell around it, and nothing of size points x channels
// is kept.
#include <limits>

#include "engine.h"
#include "simd.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int64_t most = 128;     // points whose cells are found at once: plain loops, which become vectors
constexpr int64_t queries = 256;  // of one piece of work

// The cells around some points: the rows of their corners, -1 outside a map, and how much each corner counts.
template <class T, int axes>
struct Cells {
    static constexpr int corners = 1 << axes;
    int32_t row[corners][most], lost[most];
    T part[corners][most], inside[axes][most];

    // Points first .. first + each of head h, of queries m .. m + count; their places are taken out of what lies apart.
    void take(const SampledArgs<T> &a, int64_t b, int64_t h, int64_t m, int64_t count, int64_t first, int64_t each) {
        const int64_t points = a.S / a.L, n = count * each;
        T at[axes][most];
        int32_t grid[axes][most], start[most];
        for (int64_t i = 0; i < each; ++i) {
            int64_t begin = 0;
            const int64_t level = (first + i) / points;
            for (int64_t l = 0; l < level; ++l) {
                int64_t size = 1;
                for (int x = 0; x < axes; ++x) size *= a.grid[l * axes + x];
                begin += size;
            }
            start[i] = static_cast<int32_t>(begin);
            for (int x = 0; x < axes; ++x) grid[x][i] = static_cast<int32_t>(a.grid[level * axes + x]);
        }
        for (int64_t q = 1; q < count; ++q) {
            memcpy(start + q * each, start, each * sizeof *start);
            for (int x = 0; x < axes; ++x) memcpy(grid[x] + q * each, grid[x], each * sizeof *start);
        }
        for (int64_t q = 0; q < count; ++q) {
            const T *from = a.place + (((b * a.M + m + q) * a.H + h) * a.S + first) * axes;
            for (int64_t i = 0; i < each; ++i)
                for (int x = 0; x < axes; ++x) at[x][q * each + i] = from[i * axes + x];
        }
        int32_t low[axes][most];
        for (int64_t i = 0; i < n; ++i) lost[i] = 0;
        for (int x = 0; x < axes; ++x)
            for (int64_t i = 0; i < n; ++i) {
                const T place = at[x][i], below = __builtin_floor(place), end = static_cast<T>(grid[x][i] + 1);
                lost[i] |= place != place;
                inside[x][i] = place - below;
                // far outside there is no corner on the grid, and no integer overflows
                const T capped = below < end ? below : end;
                low[x][i] = static_cast<int32_t>(capped > -2 ? capped : -2);
            }
        for (int e = 0; e < corners; ++e)
            for (int64_t i = 0; i < n; ++i) {
                int32_t flat = 0, there = !lost[i];
                T product = 1;
                for (int x = 0; x < axes; ++x) {
                    const int32_t place = low[x][i] + upper(e, x);
                    there &= (place >= 0) & (place < grid[x][i]);
                    flat = flat * grid[x][i] + place;
                    product *= upper(e, x) ? inside[x][i] : 1 - inside[x][i];
                }
                row[e][i] = there ? start[i] + flat : -1;
                part[e][i] = product;
            }
    }
    // Bit `axes - 1 - x` of a corner says which side on axis x.
    static constexpr bool upper(int corner, int x) { return corner >> (axes - 1 - x) & 1; }
    // How a corner's part changes with the place on one axis.
    T slope(int corner, int axis, int64_t i) const {
        T product = upper(corner, axis) ? 1 : -1;
        for (int x = 0; x < axes; ++x)
            if (x != axis) product *= upper(corner, x) ? inside[x][i] : 1 - inside[x][i];
        return product;
    }
};

// body(cells, query, its first point, how many, where they begin among the cells) for queries begin .. end.
template <class T, int axes, class F>
void for_queries(const SampledArgs<T> &a, int64_t b, int64_t h, int64_t begin, int64_t end, const F &body) {
    const int64_t each = smaller(a.S, most), many = each < a.S ? 1 : most / each;
    Cells<T, axes> cells;
    for (int64_t m = begin; m < end; m += many) {
        const int64_t count = smaller(many, end - m);
        for (int64_t s = 0; s < a.S; s += each) {
            const int64_t n = smaller(each, a.S - s);
            cells.take(a, b, h, m, count, s, n);
            for (int64_t q = 0; q < count; ++q) body(cells, m + q, s, n, q * n);
        }
    }
}

// to += sum of weight[i] * row[i], a few vectors of channels at a time.
template <class T>
void add_rows(T *to, const T *const *row, const T *weight, int64_t entries, int64_t channels) {
    int64_t c = 0;
    const auto vectors = [&](auto count) {
        constexpr int n = decltype(count)::n;
        for (; c + n * lanes<T> <= channels; c += n * lanes<T>) {
            Vec<T> sum[n];
            for (int v = 0; v < n; ++v) sum[v] = load<T>(to + c + v * lanes<T>);
            for (int64_t i = 0; i < entries; ++i) {
                const Vec<T> w = splat<T>(weight[i]);
                for (int v = 0; v < n; ++v) sum[v] = fused<T>(w, load<T>(row[i] + c + v * lanes<T>), sum[v]);
            }
            for (int v = 0; v < n; ++v) store<T>(to + c + v * lanes<T>, sum[v]);
        }
    };
    vectors(Count<4>{}), vectors(Count<2>{}), vectors(Count<1>{});
    for (; c < channels; ++c) {
        T sum = to[c];
        for (int64_t i = 0; i < entries; ++i) sum = fused_one<T>(weight[i], row[i][c], sum);
        to[c] = sum;
    }
}

template <class T, int axes>
void forward(const SampledArgs<T> &a) {
    constexpr int corners = 1 << axes;
    const int64_t blocks = ceil_div(a.M, queries), d = a.C / a.H;
    parallel(a.threads, a.B * a.H * blocks, [&](int64_t item, int) {
        const int64_t b = item / blocks / a.H, h = item / blocks % a.H, begin = item % blocks * queries;
        const T *value = a.value + b * a.value_stride[0] + h * d;
        const auto add = [&](const Cells<T, axes> &cells, int64_t m, int64_t s, int64_t n, int64_t at) {
            const T *share = a.share + ((b * a.M + m) * a.H + h) * a.S + s;
            T *to = a.out + (b * a.M + m) * a.C + h * d;
            if (s == 0) fill(to, d, T(0));
            const T *row[most * corners];
            T weight[most * corners];
            int64_t entries = 0;
            bool lost = false;
            for (int64_t i = 0; i < n; ++i) {
                lost |= cells.lost[at + i];
                for (int e = 0; e < corners; ++e) {
                    const int32_t from = cells.row[e][at + i];
                    row[entries] = value + larger<int64_t>(from, 0) * a.value_stride[1];
                    weight[entries] = share[i] * cells.part[e][at + i];
                    entries += from >= 0;
                }
            }
            add_rows(to, row, weight, entries, d);
            if (lost) fill(to, d, std::numeric_limits<T>::quiet_NaN());  // and what is added to it stays NaN
        };
        for_queries<T, axes>(a, b, h, begin, smaller(begin + queries, a.M), add);
    });
}

// Every thread adds to the channels of a head of its own: no two of them write one number.
template <class T, int axes>
void backward(const SampledBackwardArgs<T> &all) {
    constexpr int corners = 1 << axes;
    const SampledArgs<T> &a = all.of;
    const int64_t d = a.C / a.H;
    parallel(a.threads, a.B * a.H, [&](int64_t item, int) {
        const int64_t b = item / a.H, h = item % a.H;
        const T *value = a.value + b * a.value_stride[0] + h * d;
        T *d_value = all.d_value + b * a.N * a.C + h * d;
        for (int64_t n = 0; n < a.N; ++n) fill(d_value + n * a.C, d, T(0));
        const auto add = [&](const Cells<T, axes> &cells, int64_t m, int64_t s, int64_t n, int64_t at) {
            const int64_t first = ((b * a.M + m) * a.H + h) * a.S + s;
            const T *grad = all.grad + (b * a.M + m) * a.C + h * d;
            T product[most * corners];
            Dots<T> dots;
            for (int64_t i = 0; i < n; ++i) {
                // as if it had read the first position with shares that are NaN
                if (cells.lost[at + i]) fill(d_value, d, std::numeric_limits<T>::quiet_NaN());
                for (int e = 0; e < corners; ++e) {
                    product[i * corners + e] = 0;
                    const int32_t from = cells.row[e][at + i];
                    if (from < 0) continue;
                    dots.push(grad, value + from * a.value_stride[1], d, product + i * corners + e);
                    add_scaled(d_value + from * a.C, a.share[first + i] * cells.part[e][at + i], grad, d);
                }
            }
            dots.flush(d);
            for (int64_t i = 0; i < n; ++i) {
                T d_share = 0, d_place[axes] = {};
                for (int e = 0; e < corners; ++e) {
                    if (cells.row[e][at + i] < 0) continue;
                    d_share += cells.part[e][at + i] * product[i * corners + e];
                    for (int x = 0; x < axes; ++x) d_place[x] += cells.slope(e, x, at + i) * product[i * corners + e];
                }
                all.d_share[first + i] = d_share;
                for (int x = 0; x < axes; ++x) all.d_place[(first + i) * axes + x] = a.share[first + i] * d_place[x];
            }
        };
        for_queries<T, axes>(a, b, h, 0, a.M, add);
    });
}

template <class T>
int sampled(const SampledArgs<T> &a) {
    if (a.axes == 1) forward<T, 1>(a);
    if (a.axes == 2) forward<T, 2>(a);
    if (a.axes == 3) forward<T, 3>(a);
    return ok;
}

template <class T>
int sampled_backward(const SampledBackwardArgs<T> &a) {
    if (a.of.axes == 1) backward<T, 1>(a);
    if (a.of.axes == 2) backward<T, 2>(a);
    if (a.of.axes == 3) backward<T, 3>(a);
    return ok;
}

}  // namespace

int sampled_float(const SampledArgs<float> &a) { return sampled(a); }
int sampled_double(const SampledArgs<double> &a) { return sampled(a); }
int sampled_backward_float(const SampledBackwardArgs<float> &a) { return sampled_backward(a); }
int sampled_backward_double(const SampledBackwardArgs<double> &a) { return sampled_backward(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

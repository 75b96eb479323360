// Sums over points between positions: each reads the corners of the cell around it, and nothing of size points x channels
// is kept. A head's channels are worked on for many queries before the next head's, so that its part of the maps stays in
// cache.
#include <limits>

#include "engine.h"
#include "simd.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int64_t queries = 64;  // of one piece of work
constexpr int64_t together = 16;  // points whose corners are found before any is read

// Where one point lies: the rows of its corners, -1 outside its map, and how much each of them counts.
template <class T, int axes>
struct Spot {
    static constexpr int corners = 1 << axes;
    int64_t row[corners];
    T part[corners], inside[axes];
    bool lost = false;  // its place is NaN

    Spot(const T *place, const int64_t *grid, int64_t first) {
        int64_t low[axes];
        for (int a = 0; a < axes; ++a) {
            const T at = place[a], end = static_cast<T>(grid[a] + 1);
            lost |= at != at;
            // far outside there is no corner on the grid, and no integer overflows
            const T below_end = at < end ? at : end, capped = below_end > -2 ? below_end : -2;
            low[a] = static_cast<int64_t>(capped);
            low[a] -= static_cast<T>(low[a]) > capped;
            inside[a] = at - static_cast<T>(low[a]);
        }
        for (int e = 0; e < corners; ++e) {
            int64_t flat = 0;
            bool there = !lost;
            T product = 1;
            for (int a = 0; a < axes; ++a) {
                const int64_t x = low[a] + upper(e, a);
                there &= x >= 0 && x < grid[a];
                flat = flat * grid[a] + x;
                product *= upper(e, a) ? inside[a] : 1 - inside[a];
            }
            row[e] = there ? first + flat : -1;
            part[e] = there ? product : 0;
        }
    }
    // Bit `axes - 1 - a` of a corner says which side on axis a.
    static bool upper(int corner, int a) { return corner >> (axes - 1 - a) & 1; }
    // How a corner's part changes with the place on one axis.
    T slope(int corner, int axis) const {
        T product = upper(corner, axis) ? 1 : -1;
        for (int a = 0; a < axes; ++a)
            if (a != axis) product *= upper(corner, a) ? inside[a] : 1 - inside[a];
        return product;
    }
};

// A walk over the points of one query and head, map by map.
template <class T>
struct Points {
    const SampledArgs<T> &a;
    const int64_t each = a.S / a.L;

    // body(point, its map's grid, its map's first row) for points from `s` on, at most `together`; the next point.
    template <class F>
    int64_t some(int64_t s, const F &body) const {
        const int64_t end = smaller(s + together, a.S);
        int64_t level = s / each, first = 0;
        for (int64_t l = 0; l < level; ++l) first += size(l);
        for (; s < end; ++s) {
            if (s / each != level) first += size(level), ++level;
            body(s, a.grid + level * a.axes, first);
        }
        return end;
    }
    int64_t size(int64_t level) const {
        int64_t n = 1;
        for (int x = 0; x < a.axes; ++x) n *= a.grid[level * a.axes + x];
        return n;
    }
};

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
    const int64_t blocks = ceil_div(a.M, queries), d = a.C / a.H;
    const Points<T> points{a};
    parallel(a.threads, a.B * a.H * blocks, [&](int64_t item, int) {
        const int64_t b = item / blocks / a.H, h = item / blocks % a.H, begin = item % blocks * queries;
        const T *value = a.value + b * a.value_stride[0] + h * d;
        for (int64_t m = begin; m < smaller(begin + queries, a.M); ++m) {
            const int64_t at = ((b * a.M + m) * a.H + h) * a.S;
            T *to = a.out + (b * a.M + m) * a.C + h * d;
            fill(to, d, T(0));
            bool lost = false;
            for (int64_t s = 0; s < a.S;) {
                const T *row[together << axes];
                T weight[together << axes];
                int64_t entries = 0;
                s = points.some(s, [&](int64_t p, const int64_t *grid, int64_t first) {
                    const Spot<T, axes> spot(a.place + (at + p) * axes, grid, first);
                    lost |= spot.lost;
                    for (int e = 0; e < spot.corners; ++e) {
                        if (spot.row[e] < 0) continue;
                        row[entries] = value + spot.row[e] * a.value_stride[1];
                        weight[entries++] = a.share[at + p] * spot.part[e];
                    }
                });
                add_rows(to, row, weight, entries, d);
            }
            if (lost) fill(to, d, std::numeric_limits<T>::quiet_NaN());
        }
    });
}

// Every thread adds to the channels of a head of its own: no two of them write one number.
template <class T, int axes>
void backward(const SampledBackwardArgs<T> &all) {
    const SampledArgs<T> &a = all.of;
    const int64_t d = a.C / a.H;
    const Points<T> points{a};
    parallel(a.threads, a.B * a.H, [&](int64_t item, int) {
        const int64_t b = item / a.H, h = item % a.H;
        const T *value = a.value + b * a.value_stride[0] + h * d;
        T *d_value = all.d_value + b * a.N * a.C + h * d;
        for (int64_t n = 0; n < a.N; ++n) fill(d_value + n * a.C, d, T(0));
        for (int64_t m = 0; m < a.M; ++m) {
            const int64_t at = ((b * a.M + m) * a.H + h) * a.S;
            const T *grad = all.grad + (b * a.M + m) * a.C + h * d;
            for (int64_t s = 0; s < a.S;) {
                s = points.some(s, [&](int64_t p, const int64_t *grid, int64_t first) {
                    const Spot<T, axes> spot(a.place + (at + p) * axes, grid, first);
                    const T share = a.share[at + p];
                    T d_share = 0, d_place[axes] = {};
                    for (int e = 0; e < spot.corners; ++e) {
                        if (spot.row[e] < 0) continue;
                        const T product = dot_product(grad, value + spot.row[e] * a.value_stride[1], d);
                        add_scaled(d_value + spot.row[e] * a.C, share * spot.part[e], grad, d);
                        d_share += spot.part[e] * product;
                        for (int x = 0; x < axes; ++x) d_place[x] += spot.slope(e, x) * product;
                    }
                    all.d_share[at + p] = d_share;
                    for (int x = 0; x < axes; ++x) all.d_place[(at + p) * axes + x] = share * d_place[x];
                });
            }
        }
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

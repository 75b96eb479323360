// A whole layer of nearest neighbours in one call: rows, unit vectors, search, weights, sums and bias. On small maps what
// lies between these kernels costs more than they do.
#include <cstring>
#include <limits>

#include "kernels.h"
#include "rows.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

// What all steps of a call share: rows of the value, and features as `select` takes them.
template <class T>
struct Work {
    const NeighborsArgs<T> &a;
    Rows<T> value;
    const T *query, *key;
    int64_t query_stride[4], key_stride[4];  // B, H, M or N, E

    explicit Work(const NeighborsArgs<T> &args) : a(args) {}

    bool value_is_query() const { return same_map(a.value, a.query) && a.C == a.H * a.E && a.Q == a.N; }
    bool key_is_query() const { return same_map(a.key, a.query) && a.Q == a.N; }

    int64_t rows_size() const { return has_rows(a.value, a.C, a.N) ? 0 : a.B * a.N * a.C; }
    int64_t query_size() const { return needs_copy(a.query, a.Q) && !value_is_query() ? a.B * a.Q * a.H * a.E : 0; }
    int64_t key_size() const { return needs_copy(a.key, a.N) && !key_is_query() ? a.B * a.N * a.H * a.E : 0; }
    bool needs_copy(const Flat<T> &map, int64_t positions) const { return !has_rows(map, a.H * a.E, positions); }

    Rows<T> rows(const Flat<T> &map, int64_t channels, int64_t positions, T *copy) const {
        return rows_of(map, a.B, channels, positions, copy, a.threads);
    }

    static void set(const Rows<T> &rows, int64_t E, const T *&at, int64_t (&stride)[4]) {
        at = rows.at;
        stride[0] = rows.stride[0], stride[1] = E, stride[2] = rows.stride[1], stride[3] = 1;
    }

    // `memory` holds rows_size numbers.
    void begin_value(T *memory) { value = rows(a.value, a.C, a.N, memory); }

    // Numbers of the features of all heads at so many positions.
    int64_t features(int64_t positions) const { return a.B * a.H * positions * a.E; }

    // After it: `memory` holds query_size + key_size; `units` features(M) + features(N), where they are scaled or some
    // positions only are queries.
    void begin_features(T *memory, T *units) {
        const int64_t width = a.H * a.E;
        const Rows<T> of_query = value_is_query() ? value : rows(a.query, width, a.Q, memory);
        const Rows<T> of_key = key_is_query() ? of_query : rows(a.key, width, a.N, memory + query_size());
        set(of_query, a.E, query, query_stride);
        set(of_key, a.E, key, key_stride);
        if (a.unit) {
            to_units(of_key, nullptr, a.N, units + features(a.M));
            pack(units + features(a.M), a.N, key, key_stride);
        }
        if (a.unit && key_is_query() && !a.places) {
            query = key;
            memcpy(query_stride, key_stride, sizeof query_stride);
        } else if (a.unit || a.places) {
            to_units(of_query, a.places, a.M, units);
            pack(units, a.M, query, query_stride);
        }
    }

   private:
    void pack(const T *from, int64_t positions, const T *&at, int64_t (&stride)[4]) const {
        at = from;
        stride[0] = a.H * positions * a.E, stride[1] = positions * a.E, stride[2] = a.E, stride[3] = 1;
    }

    // The features of every head (B, H, positions, E), as unit vectors where that is asked for: a zero vector stays zero.
    void to_units(const Rows<T> &rows, const int64_t *places, int64_t positions, T *to) const {
        const int64_t blocks = ceil_div(positions, together);
        parallel(a.threads, a.B * a.H * blocks, [&](int64_t item, int) {
            const int64_t problem = item / blocks, b = problem / a.H, h = problem % a.H, n0 = item % blocks * together;
            for (int64_t n = n0; n < smaller(n0 + together, positions); ++n) {
                const T *x = rows.at + b * rows.stride[0] + (places ? places[n] : n) * rows.stride[1] + h * a.E;
                T *unit = to + (problem * positions + n) * a.E;
                const T norm = a.unit ? __builtin_sqrt(dot_product(x, x, a.E)) : T(1);
                const T by = norm == 0 ? T(1) : norm < T(1e-12) ? T(1e-12) : norm;
                for (int64_t e = 0; e < a.E; ++e) unit[e] = x[e] / by;
            }
        });
    }
};

template <class T>
AggregateArgs<T> sums_of(const Work<T> &work, const int64_t *index, const T *alpha) {
    const NeighborsArgs<T> &a = work.a;
    AggregateArgs<T> sums;
    sums.value = work.value.at;
    sums.value_stride[0] = work.value.stride[0], sums.value_stride[1] = work.value.stride[1];
    sums.index = index, sums.alpha = alpha, sums.weight = a.weight;
    const int64_t stride[4] = {a.H * a.M * a.k, a.k, 1, a.M * a.k};
    memcpy(sums.index_stride, stride, sizeof stride);
    memcpy(sums.alpha_stride, stride, sizeof stride);
    sums.B = a.B, sums.N = a.N, sums.C = a.C, sums.M = a.M, sums.S = a.k, sums.H = a.H, sums.O = a.O, sums.G = a.G;
    sums.entries = 1, sums.out = a.out, sums.threads = a.threads;
    return sums;
}

template <class T>
T distance(const T *x, const T *y, const NeighborsArgs<T> &a) {
    T total = 0;
    for (int64_t e = 0; e < a.E; ++e) total += (x[e] - y[e]) * (x[e] - y[e]);
    return a.squared ? total : __builtin_sqrt(total);
}

// Slot 0 is the query's own position, the others are those found: in place, from the last query on.
template <class T>
void put_own(const Work<T> &work, int64_t *index, T *score) {
    const NeighborsArgs<T> &a = work.a;
    const int64_t found = a.k - 1;
    for (int64_t row = a.B * a.H * a.M; row-- > 0;) {
        memmove(index + row * a.k + 1, index + row * found, found * sizeof(int64_t));
        index[row * a.k] = a.places ? a.places[row % a.M] : row % a.M;
    }
    if (!a.weighted) return;
    for (int64_t row = a.B * a.H * a.M; row-- > 0;) {
        const int64_t b = row / (a.H * a.M), h = row / a.M % a.H, m = row % a.M;
        memmove(score + row * a.k + 1, score + row * found, found * sizeof(T));
        const T *q = work.query + b * work.query_stride[0] + h * work.query_stride[1] + m * work.query_stride[2];
        const T *k = work.key + b * work.key_stride[0] + h * work.key_stride[1] + index[row * a.k] * work.key_stride[2];
        score[row * a.k] = a.metric == euclidean ? -distance(q, k, a) : dot_product(q, k, a.E);
    }
}

template <class T>
int neighbors(const NeighborsArgs<T> &a) {
    const int64_t slots = a.B * a.H * a.M * a.k, most = larger(a.Q, a.N);
    Work<T> work(a);
    const int64_t rows = work.rows_size() + work.query_size() + work.key_size();
    const Scratch copies(rows * sizeof(T)), units(a.unit || a.places ? (work.features(a.M) + work.features(a.N)) * sizeof(T) : 0);
    const Scratch scores(slots * sizeof(T)), own_index(a.index ? 0 : slots * sizeof(int64_t));
    const Scratch own_alpha(a.weighted && !a.alpha ? slots * sizeof(T) : 0), places((most + 1) * sizeof(int64_t));
    for (const Scratch *each : {&copies, &units, &scores, &own_index, &own_alpha, &places})
        if (!each->ok()) return out_of_memory;
    work.begin_value(copies.at<T>());
    work.begin_features(copies.at<T>() + work.rows_size(), units.at<T>());
    int64_t *index = a.index ? a.index : own_index.at<int64_t>(), *place = places.at<int64_t>();
    T *score = scores.at<T>(), *alpha = !a.weighted ? nullptr : a.alpha ? a.alpha : own_alpha.at<T>();
    for (int64_t n = 0; n < most; ++n) place[n] = n;
    place[most] = most;

    SelectArgs<T> search;
    search.query = work.query, search.key = work.key;
    memcpy(search.query_stride, work.query_stride, sizeof work.query_stride);
    memcpy(search.key_stride, work.key_stride, sizeof work.key_stride);
    search.B = a.B, search.H = a.H, search.M = a.M, search.R = a.N, search.E = a.E, search.k = a.k - a.own;
    search.metric = a.metric, search.squared = a.squared;
    search.query_index = a.places ? a.places : place, search.key_index = place;
    search.grid = place + most, search.axes = 1;
    search.causal = false, search.reach = -1, search.dilation = 1;
    search.own = a.own, search.again = -std::numeric_limits<T>::infinity();
    search.score = score, search.index = index, search.threads = a.threads;
    int status = Kernels<T>::select(search);
    if (status != ok) return status;
    if (a.own) put_own(work, index, score);
    if (a.weighted) {
        SoftmaxArgs<T> soft;
        soft.score = score, soft.index = index, soft.alpha = alpha;
        soft.rows = slots / a.k, soft.k = a.k, soft.axes = 1, soft.index_size[0] = soft.rows;
        soft.index_stride[0] = a.k, soft.index_step = 1, soft.scale = a.scale, soft.threads = a.threads;
        status = Kernels<T>::softmax(soft);
        if (status != ok) return status;
    }
    status = Kernels<T>::aggregate(sums_of(work, index, alpha));
    if (status != ok || !a.bias) return status;
    add_to_rows(a.bias, a.B * a.M, a.O, a.out, a.threads);
    return ok;
}

template <class T>
int neighbors_backward(const NeighborsBackwardArgs<T> &args) {
    const NeighborsArgs<T> &a = args.of;
    const int64_t slots = a.B * a.H * a.M * a.k, made = a.B * a.M * a.O;
    Work<T> work(a);
    const int64_t rows = work.rows_size() + (a.weighted ? work.query_size() + work.key_size() : 0);
    const bool direct = is_rows(args.grad, a.O, a.M);
    const Scratch copies(rows * sizeof(T)), grads(direct ? 0 : made * sizeof(T)), slopes(a.weighted ? slots * sizeof(T) : 0);
    for (const Scratch *each : {&copies, &grads, &slopes})
        if (!each->ok()) return out_of_memory;
    work.begin_value(copies.at<T>());
    const T *grad = direct ? args.grad.at : grads.at<T>();
    if (!direct) to_rows(args.grad, a.B, a.O, a.M, grads.at<T>(), a.threads);
    int status = args.d_bias ? sum_rows(grad, a.B * a.M, a.O, args.d_bias, a.threads) : ok;
    if (status != ok) return status;
    AggregateBackwardArgs<T> sums;
    sums.of = sums_of(work, a.index, a.weighted ? a.alpha : nullptr);
    sums.grad = grad, sums.d_value = args.d_value, sums.d_weight = args.d_weight;
    sums.d_alpha = a.weighted ? slopes.at<T>() : nullptr;
    memcpy(sums.d_alpha_stride, sums.of.alpha_stride, sizeof sums.d_alpha_stride);
    status = Kernels<T>::aggregate_backward(sums);
    if (status != ok || !a.weighted) return status;
    work.begin_features(copies.at<T>() + work.rows_size(), nullptr);
    SoftmaxBackwardArgs<T> soft;
    soft.grad = slopes.at<T>(), soft.alpha = a.alpha, soft.d_score = slopes.at<T>();
    soft.scale = a.scale, soft.rows = slots / a.k, soft.k = a.k, soft.threads = a.threads;
    status = Kernels<T>::softmax_backward(soft);
    if (status != ok) return status;
    SelectBackwardArgs<T> search;
    search.grad = slopes.at<T>(), search.query = work.query, search.key = work.key, search.index = a.index;
    for (int i = 0; i < 3; ++i) search.query_stride[i] = work.query_stride[i], search.key_stride[i] = work.key_stride[i];
    search.d_query = args.d_query, search.d_key = args.d_key;
    const auto packed = [&](int64_t (&stride)[3], int64_t n) {
        stride[0] = n * a.H * a.E, stride[1] = a.E, stride[2] = a.H * a.E;
    };
    packed(search.d_query_stride, a.M);
    packed(search.d_key_stride, a.N);
    search.B = a.B, search.H = a.H, search.M = a.M, search.R = a.N, search.E = a.E, search.k = a.k;
    search.metric = a.metric, search.squared = a.squared, search.threads = a.threads;
    return Kernels<T>::select_backward(search);
}

}  // namespace

int neighbors_float(const NeighborsArgs<float> &a) { return neighbors(a); }
#if !defined(NEARFOLD_BASE)
int neighbors_double(const NeighborsArgs<double> &a) { return neighbors(a); }
int neighbors_backward_float(const NeighborsBackwardArgs<float> &a) { return neighbors_backward(a); }
int neighbors_backward_double(const NeighborsBackwardArgs<double> &a) { return neighbors_backward(a); }
#endif

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

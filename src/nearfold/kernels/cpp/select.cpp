// The k best keys of every query. A tile of scores lives in registers, is compared with the rows' thresholds there, and
// only what passes is ever written: neither time nor memory goes into storing M x R scores.
//
// Cost: M R E multiply-adds, and per query k ln(R / k) insertions.
#include "keep.h"
#include "kernels.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int64_t block_groups = 16;  // groups of tile_rows queries that share one pass over the keys
constexpr int64_t first_keys = 1024;  // keys whose scores are held to find a first threshold

// Scores of tile_rows queries with a panel of keys, packed (E, vectors * lanes).
template <class T, int metric, int vectors>
inline void score_tile(const T *const *rows, const T *key, int64_t E, Vec<T> (&acc)[tile_rows][vectors]) {
    Vec<T> a[tile_rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) a[r][v] = Vec<T>{};
    const T *at[tile_rows];
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r) at[r] = rows[r];
    for (int64_t e = 0; e < E; ++e) {
        Vec<T> b[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) b[v] = load<T>(key + (e * vectors + v) * lanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < tile_rows; ++r) {
            const Vec<T> q = splat<T>(at[r][e]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                if constexpr (metric == euclidean) {
                    const Vec<T> apart = q - b[v];
                    a[r][v] += apart * apart;  // rounded twice: a^2 + b^2 must equal b^2 + a^2
                } else if constexpr (metric == chebyshev) {
                    Vec<T> apart = q - b[v];
                    apart = apart < Vec<T>{} ? -apart : apart;
                    // a NaN enters, and stays: nothing compares with it
                    a[r][v] = ((apart > a[r][v]) | (apart != apart)) ? apart : a[r][v];
                } else {
                    a[r][v] = fused<T>(q, b[v], a[r][v]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) acc[r][v] = metric >= euclidean ? -a[r][v] : a[r][v];
}

// The same for one pair of contiguous rows.
template <class T, int metric>
inline T score_pair(const T *query, const T *key, int64_t E) {
    Vec<T> acc{};
    T rest = 0;
    int64_t e = 0;
    for (; e + lanes<T> <= E; e += lanes<T>) {
        const Vec<T> q = load<T>(query + e), k = load<T>(key + e);
        if constexpr (metric == euclidean)
            acc += (q - k) * (q - k);
        else if constexpr (metric == chebyshev) {
            Vec<T> apart = q - k;
            apart = apart < Vec<T>{} ? -apart : apart;
            acc = ((apart > acc) | (apart != apart)) ? apart : acc;
        } else
            acc = fused<T>(q, k, acc);
    }
    for (; e < E; ++e) {
        const T apart = query[e] - key[e];
        if constexpr (metric == euclidean)
            rest += apart * apart;
        else if constexpr (metric == chebyshev) {
            const T far = apart < 0 ? -apart : apart;
            rest = far > rest || far != far ? far : rest;
        } else
            rest += query[e] * key[e];
    }
    if constexpr (metric == chebyshev) {
        for (int l = 0; l < lanes<T>; ++l) rest = acc[l] > rest || acc[l] != acc[l] ? acc[l] : rest;
        return -rest;
    } else {
        rest += sum<T>(acc);
        return metric == euclidean ? -rest : rest;
    }
}

template <class T>
struct Rows {  // the queries of one block
    Keep<T> *keep;
    const T **at;  // their features
    int64_t *own;  // column of the query's own key, or -1
    bool *lost;

    static int64_t state_bytes(int64_t block) {
        return round_up(block * (sizeof(Keep<T>) + sizeof(T *) + sizeof(int64_t) + sizeof(bool)), 64);
    }
    static int64_t buffer_bytes(int64_t block, int64_t capacity) { return block * capacity * 2 * sizeof(T); }

    Rows(const Scratch &memory, int64_t base, int64_t block, int64_t capacity) {
        keep = memory.at<Keep<T>>(base);
        at = reinterpret_cast<const T **>(keep + block);
        own = reinterpret_cast<int64_t *>(at + block);
        lost = reinterpret_cast<bool *>(own + block);
        auto *buffer = memory.at<Int<T>>(base + state_bytes(block));
        for (int64_t i = 0; i < block; ++i) {
            keep[i].score = buffer + i * 2 * capacity;
            keep[i].index = buffer + (i * 2 + 1) * capacity;
        }
    }
};

// Scores rank as the tile holds them, a cosine clamped to [-1, 1]. Distances rank by their squares: a root rounds
// different ones to one value.
template <class T, int metric>
inline void offer(Keep<T> &keep, T score, int64_t column) {
    if constexpr (metric == cosine) score = score > 1 ? T(1) : score < -1 ? T(-1) : score;
    if (score > keep.threshold) keep.add(score, column);
}

template <class T>
constexpr uint64_t lane_mask = (uint64_t(1) << lanes<T>) - 1;

template <class T, int metric>
inline void offer_some(Keep<T> &keep, Vec<T> score, int64_t first, uint64_t bits) {
    if constexpr (metric == cosine) {
        score = score > splat<T>(1) ? splat<T>(1) : score;
        score = score < splat<T>(-1) ? splat<T>(-1) : score;
        bits &= greater<T>(score, splat<T>(keep.threshold));
    }
    keep.add(score, first, bits);
}

template <class T>
inline bool has_nan(const T *row, int64_t E) {
    Vec<T> nan{};
    int64_t e = 0;
    for (; e + lanes<T> <= E; e += lanes<T>) {
        const Vec<T> x = load<T>(row + e);
        nan = x != x ? splat<T>(1) : nan;
    }
    bool found = greater<T>(nan, Vec<T>{}) != 0;
    for (; e < E; ++e) found |= row[e] != row[e];
    return found;
}

inline int64_t own_column(const int64_t *key_index, int64_t R, int64_t position) {
    int64_t low = 0, high = R;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (key_index[middle] < position)
            low = middle + 1;
        else
            high = middle;
    }
    return low < R && key_index[low] == position ? low : invalid;
}

// Keys r0.. of a problem as a panel (E, width), zero beyond the last.
template <class T>
void pack_keys(const SelectArgs<T> &a, int64_t b, int64_t h, int64_t r0, T *to) {
    const int64_t width = panel_width<T>(a.R, r0), n = smaller(width, a.R - r0);
    const T *from = a.key + b * a.key_stride[0] + h * a.key_stride[1] + r0 * a.key_stride[2];
    for (int64_t e = 0; e < a.E; ++e) {
        const T *feature = from + e * a.key_stride[3];
        if (a.key_stride[2] == 1)
            for (int64_t r = 0; r < n; ++r) to[e * width + r] = feature[r];
        else
            for (int64_t r = 0; r < n; ++r) to[e * width + r] = feature[r * a.key_stride[2]];
        for (int64_t r = n; r < width; ++r) to[e * width + r] = 0;
    }
}

// The queries m0.. of problem (b, h): their state, and where their features are, or a copy where they lie apart.
template <class T>
void begin_rows(const SelectArgs<T> &a, int64_t b, int64_t h, int64_t m0, int64_t n, Rows<T> &rows, T *copies) {
    const T infinity = std::numeric_limits<T>::infinity();
    const T *from = a.query + b * a.query_stride[0] + h * a.query_stride[1] + m0 * a.query_stride[2];
    for (int64_t i = 0; i < round_up(n, tile_rows); ++i) {
        const bool real = i < n;
        rows.at[i] = from + (real ? i : 0) * a.query_stride[2];
        if (a.query_stride[3] != 1) {
            for (int64_t e = 0; e < a.E; ++e) copies[i * a.E + e] = rows.at[i][e * a.query_stride[3]];
            rows.at[i] = copies + i * a.E;
        }
        rows.lost[i] = real && has_nan(rows.at[i], a.E);
        rows.keep[i].begin(real && !rows.lost[i] ? -infinity : infinity);
        rows.own[i] = real && a.own ? own_column(a.key_index, a.R, a.query_index[m0 + i]) : invalid;
    }
}

template <class T, int metric>
void finish_rows(const SelectArgs<T> &a, int64_t problem, int64_t m0, int64_t n, Rows<T> &rows) {
    for (int64_t i = 0; i < n; ++i) {
        T *score = a.score + (problem * a.M + m0 + i) * a.k;
        int64_t *index = a.index + (problem * a.M + m0 + i) * a.k;
        if (!rows.lost[i]) {
            rows.keep[i].finish(a.k, score, index);
            if (metric == euclidean && !a.squared)
                for (int64_t s = 0; s < a.k && index[s] >= 0; ++s)
                    score[s] = index[s] == rows.own[i] ? a.again : -__builtin_sqrt(-score[s]);
            continue;
        }
        for (int64_t s = 0; s < a.k; ++s) {
            score[s] = std::numeric_limits<T>::quiet_NaN();
            index[s] = lost;
        }
    }
}

template <class T, int metric>
T rank_of_again(const SelectArgs<T> &a) {
    return metric == euclidean && !a.squared && a.again < 0 ? -a.again * a.again : a.again;
}

// The scores of one query with n keys from r0 on: what is above its threshold enters its buffer.
template <class T, int metric, int vectors>
inline void scan_row(const SelectArgs<T> &a, const Vec<T> *tile, int64_t r0, int64_t n, int64_t m0, int64_t row,
                     Rows<T> &rows, T again) {
    const int64_t own = rows.own[row] - r0;
    Keep<T> &keep = rows.keep[row];
    const bool own_here = own >= 0 && own < n && !rows.lost[row];
    if (!own_here && !any_greater<T, vectors>(tile, splat<T>(keep.threshold))) return;
    uint64_t passed = 0;
    for (int v = 0; v < vectors; ++v) passed |= greater<T>(tile[v], splat<T>(keep.threshold)) << (v * lanes<T>);
    if (n < 64) passed &= (uint64_t(1) << n) - 1;
    if (!own_here && (!a.causal || a.key_index[r0 + n - 1] <= a.query_index[m0 + row])) {
        for (int v = 0; v < vectors; ++v)  // without a branch: which vectors have any cannot be foreseen
            offer_some<T, metric>(keep, tile[v], r0 + v * lanes<T>, passed >> (v * lanes<T>) & lane_mask<T>);
    } else {
        if (own_here) passed |= uint64_t(1) << own;
        T score[vectors * lanes<T>];
        for (int v = 0; v < vectors; ++v) store<T>(score + v * lanes<T>, tile[v]);
        for (; passed; passed &= passed - 1) {
            const int column = __builtin_ctzll(passed);
            if (a.causal && a.key_index[r0 + column] > a.query_index[m0 + row]) continue;
            if (!own_here || column != own)
                offer<T, metric>(keep, score[column], r0 + column);
            else if (again > keep.threshold)
                keep.add(again, r0 + column);
        }
    }
    keep.settle(a.k);
}

// A group of queries against one panel of keys.
template <class T, int metric, int vectors>
void search_panel(const SelectArgs<T> &a, const T *keys, int64_t r0, int64_t m0, int64_t first, Rows<T> &rows, T again) {
    Vec<T> acc[tile_rows][vectors];
    score_tile<T, metric, vectors>(rows.at + first, keys, a.E, acc);
    const int64_t n = smaller<int64_t>(vectors * lanes<T>, a.R - r0);
    for (int64_t i = 0; i < tile_rows; ++i)
        scan_row<T, metric, vectors>(a, acc[i], r0, n, m0, first + i, rows, again);
}

template <class T>
int64_t newest_of(const SelectArgs<T> &a, int64_t m0, int64_t n) {
    int64_t newest = -1;
    for (int64_t i = 0; i < n; ++i) newest = larger(newest, a.query_index[m0 + i]);
    return newest;
}

// Whether the scores of the first keys are worth holding.
template <class T>
inline bool holds_first(const SelectArgs<T> &a) {
    return !a.causal && a.k <= most_expected && (a.R >= first_keys / 2 || (a.R >= 32 && a.k <= 10));
}

// The held scores of a query: (columns,) of the first keys. `check` sees the row after every tile.
template <class T, int metric, class F>
inline void scan_first(const SelectArgs<T> &a, const T *scores, int64_t columns, int64_t m0, int64_t row, Rows<T> &rows,
                       T again, const F &check) {
    if (rows.lost[row]) return;
    // the own key may rank lower than its score says
    const T ceiling = metric == cosine ? T(1) : std::numeric_limits<T>::infinity();
    rows.keep[row].expect(scores, columns, a.k + (rows.own[row] >= 0), ceiling, columns < a.R);
    Keep<T> &keep = rows.keep[row];
    for (int64_t r0 = 0; r0 < columns; r0 += tile_columns<T>) {
        Vec<T> tile[tile_vectors];
        uint64_t passed = 0;
        for (int v = 0; v < tile_vectors; ++v) {
            tile[v] = load<T>(scores + r0 + v * lanes<T>);
            passed |= greater<T>(tile[v], splat<T>(keep.threshold)) << (v * lanes<T>);
        }
        const int64_t n = smaller<int64_t>(tile_columns<T>, columns - r0), own = rows.own[row] - r0;
        if ((own >= 0 && own < n) || __builtin_popcountll(passed) > 8) {
            scan_row<T, metric, tile_vectors>(a, tile, r0, n, m0, row, rows, again);
        } else {  // few pass, and the scores are in memory: one by one is sooner done than whole vectors
            if (n < 64) passed &= (uint64_t(1) << n) - 1;
            for (; passed; passed &= passed - 1) {
                const int64_t column = r0 + __builtin_ctzll(passed);
                offer<T, metric>(keep, scores[column], column);
            }
            keep.settle(a.k);
        }
        check(row);
    }
}

// Queries against every key, tile by tile.
template <class T, int metric>
void search_all(const SelectArgs<T> &a, const T *keys, int64_t m0, int64_t n, Rows<T> &rows, T *held) {
    const T again = rank_of_again<T, metric>(a);
    const int64_t newest = newest_of(a, m0, n);
    int64_t r0 = 0;
    if (holds_first(a)) {
        for (; r0 < smaller(first_keys, a.R); r0 += tile_columns<T>)
            with_vectors<T>(panel_width<T>(a.R, r0), [&](auto v) {
                for (int64_t first = 0; first < n; first += tile_rows) {
                    Vec<T> acc[tile_rows][v.n];
                    score_tile<T, metric, v.n>(rows.at + first, keys + r0 * a.E, a.E, acc);
                    for (int64_t i = 0; i < tile_rows; ++i)
                        for (int w = 0; w < v.n; ++w)
                            store<T>(held + (first + i) * first_keys + r0 + w * lanes<T>, acc[i][w]);
                }
            });
        for (int64_t row = 0; row < n; ++row)
            scan_first<T, metric>(a, held + row * first_keys, smaller(first_keys, a.R), m0, row, rows, again,
                                  [](int64_t) {});
    }
    for (; r0 < a.R; r0 += tile_columns<T>) {
        if (a.causal && a.key_index[r0] > newest) break;
        with_vectors<T>(panel_width<T>(a.R, r0), [&](auto v) {
            for (int64_t first = 0; first < n; first += tile_rows)
                search_panel<T, metric, v.n>(a, keys + r0 * a.E, r0, m0, first, rows, again);
        });
    }
}

// Queries against the keys within reach on the grid: every position is a key, column = position.
template <class T, int metric>
void search_near(const SelectArgs<T> &a, const T *keys, int64_t m0, int64_t n, Rows<T> &rows, int64_t *at) {
    const T again = rank_of_again<T, metric>(a);
    for (int64_t row = 0; row < n; ++row) {
        if (rows.lost[row]) continue;
        const int64_t position = a.query_index[m0 + row];
        // `at` counts through the box around the query: first, last and current coordinate of every axis
        int64_t *first = at, *last = at + a.axes, *now = at + 2 * a.axes;
        for (int64_t axis = a.axes - 1, rest = position; axis >= 0; --axis) {
            const int64_t here = rest % a.grid[axis];
            rest /= a.grid[axis];
            const int64_t back = a.reach < 0 ? here : smaller(here, a.reach);
            const int64_t ahead = a.grid[axis] - 1 - here;
            first[axis] = now[axis] = here - back / a.dilation * a.dilation;
            last[axis] = here + (a.reach < 0 ? ahead : smaller(ahead, a.reach));
        }
        for (bool more = true; more;) {
            int64_t column = 0;
            for (int64_t axis = 0; axis < a.axes; ++axis) column = column * a.grid[axis] + now[axis];
            if (a.causal && column > position) break;  // they ascend
            if (a.own && column == position) {
                if (again > rows.keep[row].threshold) rows.keep[row].add(again, column);
            } else {
                const T raw = score_pair<T, metric>(rows.at[row], keys + column * a.E, a.E);
                offer<T, metric>(rows.keep[row], raw, column);
            }
            rows.keep[row].settle(a.k);
            more = false;
            for (int64_t axis = a.axes - 1; axis >= 0 && !more; --axis) {
                now[axis] += a.dilation;
                more = now[axis] <= last[axis];
                if (!more) now[axis] = first[axis];
            }
        }
    }
}

template <class T, int metric>
int select_with(const SelectArgs<T> &a) {
    const int64_t problems = a.B * a.H;
    const bool near = a.reach >= 0 || a.dilation > 1;
    int64_t groups = block_groups;
    while (groups > 1 && problems * ceil_div(a.M, groups * tile_rows) < 4 * a.threads) groups /= 2;
    const int64_t block = groups * tile_rows, blocks = ceil_div(a.M, block);
    const int64_t panels = ceil_div(a.R, tile_columns<T>), problem_keys = round_up(a.R, lanes<T>) * a.E;
    const int64_t capacity = Keep<T>::capacity(a.k);
    // per worker: the rows' state, their buffers, copies of their features, held scores, a position on the grid
    const int64_t state_bytes = Rows<T>::state_bytes(block), buffer_bytes = Rows<T>::buffer_bytes(block, capacity);
    const int64_t copy_bytes = a.query_stride[3] == 1 ? 0 : round_up(block * a.E * sizeof(T), 64);
    const int64_t held_bytes = !near && holds_first(a) ? block * first_keys * sizeof(T) : 0;
    const int64_t worker_bytes =
        state_bytes + buffer_bytes + copy_bytes + held_bytes + round_up(3 * a.axes * sizeof(int64_t), 64);
    const Scratch keys(problems * problem_keys * sizeof(T)), workers(a.threads * worker_bytes);
    if (!keys.ok() || !workers.ok()) return out_of_memory;

    parallel(a.threads, near ? problems : problems * panels, [&](int64_t item, int) {
        const int64_t problem = near ? item : item / panels, b = problem / a.H, h = problem % a.H;
        T *to = keys.at<T>() + problem * problem_keys;
        if (!near) {
            const int64_t r0 = item % panels * tile_columns<T>;
            return pack_keys(a, b, h, r0, to + r0 * a.E);
        }
        const T *from = a.key + b * a.key_stride[0] + h * a.key_stride[1];
        for (int64_t r = 0; r < a.R; ++r)
            for (int64_t e = 0; e < a.E; ++e) to[r * a.E + e] = from[r * a.key_stride[2] + e * a.key_stride[3]];
    });

    parallel(a.threads, problems * blocks, [&](int64_t item, int worker) {
        const int64_t problem = item / blocks, m0 = item % blocks * block, n = smaller(block, a.M - m0);
        const int64_t base = worker * worker_bytes;
        Rows<T> rows(workers, base, block, capacity);
        begin_rows<T>(a, problem / a.H, problem % a.H, m0, n, rows, workers.at<T>(base + state_bytes + buffer_bytes));
        const T *own_keys = keys.at<T>() + problem * problem_keys;
        if (near)
            search_near<T, metric>(a, own_keys, m0, n, rows,
                                   workers.at<int64_t>(base + state_bytes + buffer_bytes + copy_bytes));
        else
            search_all<T, metric>(a, own_keys, m0, n, rows, workers.at<T>(base + state_bytes + buffer_bytes + copy_bytes));
        finish_rows<T, metric>(a, problem, m0, n, rows);
    });
    return ok;
}

#if defined(NEARFOLD_BASE)
#include "select_amx.inc"
#endif

template <class T>
int select(const SelectArgs<T> &a) {
    switch (a.metric) {
        case dot: return select_with<T, dot>(a);
        case cosine: return select_with<T, cosine>(a);
        case euclidean: return select_with<T, euclidean>(a);
        default: return select_with<T, chebyshev>(a);
    }
}

// to += a * (x - y)
template <class T>
inline void add_scaled_apart(T *to, T a, const T *x, const T *y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] += a * (x[i] - y[i]);
}

// d_query by queries; d_key by ranges of keys, each adding its queries in their order: the same sums on any number of
// threads.
template <class T>
int select_backward(const SelectBackwardArgs<T> &a) {
    const int64_t problems = a.B * a.H, row_block = 64;
    const int64_t blocks = ceil_div(a.M, row_block);
    const bool apart = a.metric == euclidean;
    const Scratch factors(problems * a.M * a.k * sizeof(T)), wrong(sizeof(int));
    if (!factors.ok() || !wrong.ok()) return out_of_memory;
    int *bad = wrong.at<int>();
    *bad = 0;
    T *factor = factors.at<T>();

    parallel(a.threads, problems * blocks, [&](int64_t item, int) {
        const int64_t problem = item / blocks, b = problem / a.H, h = problem % a.H, m0 = item % blocks * row_block;
        const T *key = a.key + b * a.key_stride[0] + h * a.key_stride[1];
        for (int64_t m = m0; m < smaller(m0 + row_block, a.M); ++m) {
            const T *q = a.query + b * a.query_stride[0] + h * a.query_stride[1] + m * a.query_stride[2];
            T *d = a.d_query + b * a.d_query_stride[0] + h * a.d_query_stride[1] + m * a.d_query_stride[2];
            for (int64_t e = 0; e < a.E; ++e) d[e] = 0;
            for (int64_t s = 0; s < a.k; ++s) {
                const int64_t at = (problem * a.M + m) * a.k + s, j = a.index[at];
                factor[at] = 0;
                if (j < 0) continue;
                if (j >= a.R) {
                    __atomic_store_n(bad, 1, __ATOMIC_RELAXED);
                    continue;
                }
                T g = a.grad[at];
                const T *k = key + j * a.key_stride[2];
                if (s + ahead < a.k && a.index[at + ahead] >= 0 && a.index[at + ahead] < a.R)
                    prefetch(key + a.index[at + ahead] * a.key_stride[2], a.E);
                if (!apart) {
                    add_scaled(d, g, k, a.E);
                } else {
                    if (a.squared) {
                        g *= -2;
                    } else {
                        const T length = __builtin_sqrt(-score_pair<T, euclidean>(q, k, a.E));
                        g = length > 0 ? -g / length : T(0);
                    }
                    add_scaled_apart(d, g, q, k, a.E);
                }
                factor[at] = g;
            }
        }
    });
    if (*bad) return bad_index;

    int64_t ranges = problems >= a.threads ? 1 : ceil_div(2 * a.threads, problems);
    ranges = smaller(ranges, larger<int64_t>(1, a.R));
    parallel(a.threads, problems * ranges, [&](int64_t item, int) {
        const int64_t problem = item / ranges, b = problem / a.H, h = problem % a.H, part = item % ranges;
        const int64_t j0 = a.R * part / ranges, j1 = a.R * (part + 1) / ranges;
        const T *query = a.query + b * a.query_stride[0] + h * a.query_stride[1];
        const T *key = a.key + b * a.key_stride[0] + h * a.key_stride[1];
        T *d_key = a.d_key + b * a.d_key_stride[0] + h * a.d_key_stride[1];
        for (int64_t j = j0; j < j1; ++j)
            for (int64_t e = 0; e < a.E; ++e) d_key[j * a.d_key_stride[2] + e] = 0;
        for (int64_t m = 0; m < a.M; ++m) {
            const T *q = query + m * a.query_stride[2];
            for (int64_t s = 0; s < a.k; ++s) {
                const int64_t at = (problem * a.M + m) * a.k + s, j = a.index[at];
                if (s + ahead < a.k && a.index[at + ahead] >= j0 && a.index[at + ahead] < j1)
                    prefetch(d_key + a.index[at + ahead] * a.d_key_stride[2], a.E);
                if (j < j0 || j >= j1) continue;
                T *d = d_key + j * a.d_key_stride[2];
                if (apart)
                    add_scaled_apart(d, factor[at], key + j * a.key_stride[2], q, a.E);
                else
                    add_scaled(d, factor[at], q, a.E);
            }
        }
    });
    return ok;
}

}  // namespace

#if defined(NEARFOLD_BASE)
int select_float(const SelectArgs<float> &a) {
    if (!amx_serves(a)) return NEARFOLD_BASE::select_float(a);
    return a.metric == dot ? select_amx<dot>(a) : select_amx<cosine>(a);
}
#else
int select_float(const SelectArgs<float> &a) { return select(a); }
int select_double(const SelectArgs<double> &a) { return select(a); }
int select_backward_float(const SelectBackwardArgs<float> &a) { return select_backward(a); }
int select_backward_double(const SelectBackwardArgs<double> &a) { return select_backward(a); }
#endif

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

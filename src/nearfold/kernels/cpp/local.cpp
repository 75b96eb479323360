// Attention in a window. A tile is one vector of outputs in each of a few rows: its scores, one vector per slot, stay in
// cache from the first product to the last sum, and nothing of size slots x positions exists. What a slot reads is not
// aligned, and such loads are the dearest instruction here: rows that read the same one share it.
//
// The backward computes the scores again, twice: by queries for d_query, by keys for d_key and d_value. Every element
// of a gradient is thus a sum in an order of its own, the same on any number of threads, and nothing is scattered.
//
// Packed rows (window.h). Keys: key (E), value (D), inside (1). Queries, in the backward: query (E), gradient (D),
// largest score, one over the sum, delta; their margins are zero, so that what lies there has weight zero.
#include <limits>

#include "engine.h"
#include "exponential.h"
#include "window.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

enum Kind { product, squared_distance, distance };

// body(Count<kind>): what depends on the kind of score is compiled for each, and all around it once.
template <class T, class F>
inline void with_kind(const LocalArgs<T> &a, const F &body) {
    if (a.metric == dot) return body(Count<product>{});
    if (a.squared) return body(Count<squared_distance>{});
    body(Count<distance>{});
}

// The larger; `b` where `a` is NaN.
template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_round_ps((__m512)a, (__m512)b, _MM_FROUND_CUR_DIRECTION);
    if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_max_round_pd((__m512d)a, (__m512d)b, _MM_FROUND_CUR_DIRECTION);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
    if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    return a > b ? a : b;
#endif
}

template <class T>
inline Vec<T> root(Vec<T> x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
    if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
    if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#else
    for (int i = 0; i < lanes<T>; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
#endif
}

#if defined(__AVX512F__)
constexpr int at_once = 4;  // slots, or features, of up to rows_at_once rows that the registers hold
#else
constexpr int at_once = 2;
#endif

// body(Count<n>) for n = 1 to 4.
template <class F>
inline void with_count(int64_t n, const F &body) {
    static_assert(rows_at_once == 4 && at_once <= 4);
    if (n == 4) return body(Count<4>{});
    if (n == 3) return body(Count<3>{});
    if (n == 2) return body(Count<2>{});
    body(Count<1>{});
}

// A row of the other side that several rows of a tile read: one load serves them all.
template <class T>
struct Met {
    const T *near;  // its first feature, for slot index 0
    int64_t n;      // rows of the tile
    int64_t row[rows_at_once], base[rows_at_once];  // which, and where their slots with it begin
    const T *kept[rows_at_once];                    // by keys: where the queries' tiles left these slots, if they did

    bool same_rows(const Met &other) const {
        bool same = n == other.n;
        for (int64_t i = 0; same && i < n; ++i) same = row[i] == other.row[i];
        return same;
    }
};

// to[i][c] = own[i] . near[c] of n rows and m slots, or the squared distance.
template <class T, bool apart, int n, int m>
inline void score_block(const T *const *own, int64_t own_pitch, const T *near, const int64_t *column, int64_t pitch,
                        int64_t E, T *const *to) {
    Vec<T> acc[n][m];
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
        for (int c = 0; c < m; ++c) acc[i][c] = Vec<T>{};
    for (int64_t e = 0; e < E; ++e) {
        Vec<T> q[n];
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) q[i] = load<T>(own[i] + e * own_pitch);
#pragma GCC unroll 4
        for (int c = 0; c < m; ++c) {
            const Vec<T> k = load_once<T>(near + column[c] + e * pitch);
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) {
                const Vec<T> a = apart ? q[i] - k : q[i], b = apart ? q[i] - k : k;
                acc[i][c] = fused<T>(a, b, acc[i][c]);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
        for (int c = 0; c < m; ++c) store<T>(to[i] + c * lanes<T>, acc[i][c]);
}

// What one met row adds to a sum: its first feature, and the weights of its slots for every row of the tile that meets it.
template <class T>
struct Addend {
    const T *near;
    const T *weight[rows_at_once];
};

// to[i][d] += sum over met rows and slots c of weight[i][c] * near[c][d], or * (own[i][d] - near[c][d]), of n rows and m
// features.
template <class T, bool apart, int n, int m>
inline void sum_block(const Addend<T> *addends, int64_t count, const int64_t *weight_column, const T *const *own,
                      int64_t own_pitch, int64_t skip, const int64_t *column, int64_t columns, int64_t pitch, T *const *to) {
    Vec<T> acc[n][m];
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
        for (int d = 0; d < m; ++d) acc[i][d] = load<T>(to[i] + d * lanes<T>);
    for (int64_t j = 0; j < count; ++j) {
        const T *near = addends[j].near + skip, *weight[n];
#pragma GCC unroll 4
        for (int i = 0; i < n; ++i) weight[i] = addends[j].weight[i];
        for (int64_t c = 0; c < columns; ++c) {
            const T *from = near + column[c];
            Vec<T> w[n];
#pragma GCC unroll 4
            for (int i = 0; i < n; ++i) w[i] = load<T>(weight[i] + weight_column[c]);
#pragma GCC unroll 4
            for (int d = 0; d < m; ++d) {
                const Vec<T> v = load_once<T>(from + d * pitch);
#pragma GCC unroll 4
                for (int i = 0; i < n; ++i) {
                    const Vec<T> x = apart ? load<T>(own[i] + d * own_pitch) - v : v;
                    acc[i][d] = fused<T>(w[i], x, acc[i][d]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
        for (int d = 0; d < m; ++d) store<T>(to[i] + d * lanes<T>, acc[i][d]);
}

// What a product or a sum of squares says about a slot: its scaled score.
template <class T, int kind>
inline Vec<T> scaled(Vec<T> raw, T scale) {
    if constexpr (kind == product) return raw * splat<T>(scale);
    if constexpr (kind == squared_distance) return raw * splat<T>(-scale);
    return root<T>(raw) * splat<T>(-scale);
}
// The score's derivative: times the other vector (product), or times how far they are apart. Zero at distance zero.
template <class T, int kind>
inline Vec<T> slope(Vec<T> raw, T scale) {
    if constexpr (kind == product) return splat<T>(scale);
    if constexpr (kind == squared_distance) return splat<T>(-2 * scale);
    const Vec<T> length = root<T>(raw);
    return length > Vec<T>{} ? splat<T>(-scale) / length : (length == Vec<T>{} ? Vec<T>{} : length);
}

// A tile: one vector of up to rows_at_once rows of outputs (or, by keys, of keys), the rows of the other side they
// meet, and the slots of the last axis. Memory of one worker.
template <class T>
struct Tile {
    static constexpr int L = lanes<T>, R = rows_at_once;

    int64_t rows, mets, columns;
    const T *own[R];  // the first feature of every row
    int64_t own_pitch, pitch;
    int64_t slots[R];  // of every row
    Met<T> *met;
    int64_t *column;       // where a slot's first feature lies from Met::near
    int64_t *kept_column;  // and its weights from Met::kept
    int64_t *tile_column;  // and from where the tile itself holds them
    Addend<T> *addend;
    T *weight, *grad, *slope, *result;
    int64_t most_slots, features;

    static int64_t met_bytes(int64_t most_mets) { return round_up(most_mets * (sizeof(Met<T>) + sizeof(Addend<T>)), 64); }
    static int64_t column_bytes(int64_t most_columns) { return round_up(3 * most_columns * sizeof(int64_t), 64); }
    static int64_t bytes(int64_t most_mets, int64_t most_columns, int64_t most_slots, int64_t features) {
        return met_bytes(most_mets) + column_bytes(most_columns) + R * (3 * most_slots + features) * vector_bytes;
    }
    Tile(const Scratch &memory, int64_t at, int64_t most_mets, int64_t most_columns, int64_t most, int64_t of)
        : most_slots(most), features(of) {
        met = memory.at<Met<T>>(at);
        addend = reinterpret_cast<Addend<T> *>(met + most_mets);
        column = memory.at<int64_t>(at + met_bytes(most_mets));
        kept_column = column + most_columns;
        tile_column = kept_column + most_columns;
        for (int64_t c = 0; c < most_columns; ++c) tile_column[c] = c * L;
        weight = memory.at<T>(at + met_bytes(most_mets) + column_bytes(most_columns));
        grad = weight + R * most * L;
        slope = grad + R * most * L;
        result = slope + R * most * L;
    }

    T *of_row(T *memory, int64_t r) const { return memory + r * most_slots * L; }
    T *result_of(int64_t r) const { return result + r * features * L; }

    void begin(int64_t count) {
        rows = count;
        mets = columns = 0;
        for (int64_t r = 0; r < R; ++r) slots[r] = 0;
    }
    Met<T> &meet(const T *near, const RowMeeting &rows) {
        Met<T> &m = met[mets++];
        m.near = near;
        m.n = rows.n;
        for (int64_t i = 0; i < rows.n; ++i) {
            m.row[i] = rows.row[i];
            m.base[i] = slots[rows.row[i]];
            slots[rows.row[i]] += columns;
        }
        return m;
    }

    // to[slot] = own . what the slot reads, from feature `first` on, or the squared distance.
    void score(bool apart, int64_t first, int64_t count, T *to) const {
        return apart ? score<true>(first, count, to) : score<false>(first, count, to);
    }
    template <bool apart>
    void score(int64_t first, int64_t count, T *to) const {
        for (int64_t j = 0; j < mets; ++j) {
            const Met<T> &m = met[j];
            const T *from[R];
            T *into[R];
            for (int64_t i = 0; i < m.n; ++i) {
                from[i] = own[m.row[i]] + first * own_pitch;
                into[i] = of_row(to, m.row[i]) + m.base[i] * L;
            }
            with_count(m.n, [&](auto n) {
                constexpr int rows = decltype(n)::n;
                const T *near = m.near + first * pitch;
                int64_t c = 0;
                const auto step = [&](auto count_c) {
                    constexpr int slots = decltype(count_c)::n;
                    score_block<T, apart, rows, slots>(from, own_pitch, near, column + c, pitch, count, into);
                    c += slots;
                    for (int i = 0; i < rows; ++i) into[i] += slots * L;
                };
                while (c + at_once <= columns) step(Count<at_once>{});
                if (at_once > 3 && c + 3 <= columns) step(Count<3>{});
                if (at_once > 2 && c + 2 <= columns) step(Count<2>{});
                if (c < columns) step(Count<1>{});
            });
        }
    }
    // result[to..] = sum over slots of by[slot] * what the slot reads, from feature `first` on. Without `by` the weights
    // are those kept, from `skip` on.
    void sum(bool apart, T *by, int64_t first, int64_t count, int64_t to, int64_t skip = 0) const {
        return apart ? sum<true>(by, first, count, to, skip) : sum<false>(by, first, count, to, skip);
    }
    template <bool apart>
    void sum(T *by, int64_t first, int64_t count, int64_t to, int64_t skip) const {
        for (int64_t r = 0; r < rows; ++r) memset(result_of(r) + to * L, 0, count * L * sizeof(T));
        const int64_t *weight_column = by == nullptr ? kept_column : tile_column;
        for (int64_t j = 0, end; j < mets; j = end) {  // met rows that the same rows meet, together
            const Met<T> &m = met[j];
            for (end = j; end < mets && met[end].same_rows(m); ++end) {
                Addend<T> &each = addend[end - j];
                each.near = met[end].near;
                for (int64_t i = 0; i < m.n; ++i)
                    each.weight[i] = by == nullptr ? met[end].kept[i] + skip : of_row(by, m.row[i]) + met[end].base[i] * L;
            }
            const T *from[R];
            T *into[R];
            for (int64_t i = 0; i < m.n; ++i) {
                from[i] = own[m.row[i]] + first * own_pitch;
                into[i] = result_of(m.row[i]) + to * L;
            }
            with_count(m.n, [&](auto n) {
                constexpr int rows = decltype(n)::n;
                int64_t d = 0;
                const auto step = [&](auto count_d) {
                    constexpr int features = decltype(count_d)::n;
                    sum_block<T, apart, rows, features>(addend, end - j, weight_column, from, own_pitch,
                                                        (first + d) * pitch, column, columns, pitch, into);
                    d += features;
                    for (int i = 0; i < rows; ++i) into[i] += features * L, from[i] += features * own_pitch;
                };
                while (d + at_once <= count) step(Count<at_once>{});
                if (at_once > 3 && d + 3 <= count) step(Count<3>{});
                if (at_once > 2 && d + 2 <= count) step(Count<2>{});
                if (d < count) step(Count<1>{});
            });
        }
    }
};

template <class T>
struct Problem {
    static constexpr int L = lanes<T>;
    const LocalArgs<T> &a;
    const Layout<T> &l;
    const Meetings &by_query;
    const int64_t *at;  // where every slot of the last axis lies in a packed key row: its phase, its shift
    int64_t b, h;
    T *keys, *queries;

    const Window &w() const { return a.window; }
    bool apart() const { return a.metric != dot; }
    int64_t key_row() const { return (a.E + a.D + 1) * l.pitch; }
    int64_t query_row() const { return (a.E + a.D + 3) * l.query_pitch; }
    const T *inside() const { return keys + (a.E + a.D) * l.pitch; }  // the same in every row

    void pack_keys(int64_t r) const {
        const auto pack = [&](const Map<const T> &map, int64_t features, T *to) {
            pack_key_row(w(), l, row_of(map, b, h, r, w().grid[1]), map.stride[2], map.stride[5], features, to);
        };
        T *key = keys + r * key_row();
        pack(a.key, a.E, key);
        pack(a.value, a.D, key + a.E * l.pitch);
        if (!a.position.data) return;
        const Map<const T> &map = a.position;
        const T *from = row_of(map, 0, 0, r, w().grid[1]);
        each_column(w(), l, 0, l.columns, [&](int64_t at, int64_t x) {
            for (int64_t e = 0; e < a.E; ++e) key[e * l.pitch + at] -= from[e * map.stride[2] + x * map.stride[5]];
        });
    }

    // What the outputs x0.. of the rows (o0, first..) read; false for columns that none of them does.
    void list(int64_t o0, int64_t group, int64_t x0, int64_t n, Tile<T> &t) const {
        t.begin(smaller<int64_t>(rows_at_once, w().out[1] - group * rows_at_once));
        for (int64_t k = 0; k < w().size[2]; ++k) {
            const int64_t from = x0 * w().stride[2] + k * w().dilation[2] - w().before[2];
            if (w().reflect || (from + (n - 1) * w().stride[2] >= 0 && from < w().grid[2]))
                t.column[t.columns] = at[2 * k] * l.length + at[2 * k + 1] + x0, t.kept_column[t.columns++] = k;
        }
        t.pitch = l.pitch;
        for (int64_t k0 = 0; k0 < w().size[0]; ++k0) {
            const int64_t i0 = reads(w(), 0, o0, k0);
            if (i0 < 0) continue;
            for (int64_t m = by_query.begin(group); m < by_query.end(group); ++m)
                t.meet(keys + (i0 * w().grid[1] + by_query.at(m).other) * key_row(), by_query.at(m));
        }
    }
    // Whether some of these outputs have slots outside the grid on the last axis.
    bool at_border(int64_t x0, int64_t n) const {
        const int64_t reach = (w().size[2] - 1) * w().dilation[2];
        return !w().reflect && (x0 * w().stride[2] < w().before[2] ||
                                (x0 + n - 1) * w().stride[2] + reach - w().before[2] >= w().grid[2]);
    }

    // The outputs x0.. of the group of rows `group` of plane o0.
    void forward_tile(int64_t o0, int64_t group, int64_t x0, Tile<T> &t) const {
        const int64_t n = smaller<int64_t>(L, w().out[2] - x0), r0 = o0 * w().out[1] + group * rows_at_once;
        list(o0, group, x0, n, t);
        t.own_pitch = L;
        for (int64_t r = 0; r < t.rows; ++r) {
            T *own = t.result_of(r);
            gather_rows(row_of(a.query, b, h, r0 + r, w().out[1]) + x0 * a.query.stride[5], a.query.stride[2],
                        a.query.stride[5], a.E, n, own, L);
            t.own[r] = own;
        }
        t.score(apart(), 0, a.E, t.weight);
        T *stats[rows_at_once];
        for (int64_t r = 0; r < t.rows; ++r) stats[r] = t.of_row(t.grad, r);
        with_kind(a, [&](auto kind) {
            for (int64_t r = 0; r < t.rows; ++r)
                softmax<kind.n>(t, t.of_row(t.weight, r), t.slots[r], at_border(x0, n), stats[r]);
        });
        t.sum(false, t.weight, a.E, a.D, 0);
        for (int64_t r = 0; r < t.rows; ++r) {
            T *y = t.result_of(r);
            const Vec<T> inverse = load<T>(stats[r] + L);
            for (int64_t d = 0; d < a.D; ++d) store<T>(y + d * L, load<T>(y + d * L) * inverse);
            scatter_rows(y, L, a.D, n, row_of(a.out, b, h, r0 + r, w().out[1]) + x0 * a.out.stride[5], a.out.stride[2],
                         a.out.stride[5]);
            scatter_rows(stats[r], L, 2, n, row_of(a.stats, b, h, r0 + r, w().out[1]) + x0 * a.stats.stride[5],
                         a.stats.stride[2], a.stats.stride[5]);
        }
    }

    // Products -> exponentials; and the largest score, and one over their sum.
    template <int kind>
    void softmax(const Tile<T> &t, T *slot, int64_t slots, bool border, T *stats) const {
        const Vec<T> lowest = splat<T>(-std::numeric_limits<T>::infinity());
        Vec<T> most = lowest, total{};
        for (int64_t s = 0, c = 0; s < slots; ++s, c = c + 1 == t.columns ? 0 : c + 1) {
            Vec<T> score = scaled<T, kind>(load<T>(slot + s * L), a.scale);
            if (border) score = load<T>(inside() + t.column[c]) > Vec<T>{} ? score : lowest;
            store<T>(slot + s * L, score);
            most = maximum<T>(score, most);
        }
        most = most == lowest ? Vec<T>{} : most;
        for (int64_t s = 0; s < slots; ++s) {
            const Vec<T> weight = exponential<T>(load<T>(slot + s * L) - most);
            total += weight;
            store<T>(slot + s * L, weight);
        }
        store<T>(stats, most);
        store<T>(stats + L, total == Vec<T>{} ? total : splat<T>(1) / total);
    }
};

template <class T>
struct Backward : Problem<T> {
    using P = Problem<T>;
    using P::a, P::l, P::b, P::h, P::keys, P::queries, P::w, P::at, P::apart;
    static constexpr int L = P::L;
    const LocalBackwardArgs<T> &all;
    const Meetings &by_key;
    const Readers &planes;  // of the first axis
    T *kept;  // (rows of outputs, slots, 2, length): weights and factors where a key's vector finds them, or null

    int64_t kept_row() const { return l.slots * 2 * l.length; }
    int64_t stat() const { return (a.E + a.D) * l.query_pitch; }

    void pack_queries(int64_t r) const {
        const auto pack = [&](const auto &map, int64_t features, T *to) {
            gather_rows(row_of(map, b, h, r, w().out[1]), map.stride[2], map.stride[5], features, w().out[2], to,
                        l.query_pitch);
        };
        T *to = queries + r * P::query_row() + l.left;
        pack(a.query, a.E, to);
        pack(all.grad, a.D, to + a.E * l.query_pitch);
        pack(a.stats, 2, to + stat());
    }

    // The outputs of a tile: their d_query, and delta for the tiles of keys.
    void query_tile(int64_t o0, int64_t group, int64_t x0, Tile<T> &t) const {
        const int64_t n = smaller<int64_t>(L, w().out[2] - x0), r0 = o0 * w().out[1] + group * rows_at_once;
        P::list(o0, group, x0, n, t);
        t.own_pitch = l.query_pitch;
        for (int64_t r = 0; r < t.rows; ++r) t.own[r] = queries + (r0 + r) * P::query_row() + l.left + x0;
        t.score(apart(), 0, a.E, t.weight);
        t.score(false, a.E, a.D, t.grad);
        with_kind(a, [&](auto kind) { factors<kind.n>(r0, x0, n, t); });
        if (kept != nullptr) keep(o0, group, x0, n, t);
        t.sum(apart(), t.grad, 0, a.E, 0);
        for (int64_t r = 0; r < t.rows; ++r)
            scatter_rows(t.result_of(r), L, a.E, n,
                         row_of(all.d_query, b, h, r0 + r, w().out[1]) + x0 * all.d_query.stride[5],
                         all.d_query.stride[2], all.d_query.stride[5]);
    }
    // Scores -> weights, and products with the gradient -> the factors of d_query.
    template <int kind>
    void factors(int64_t r0, int64_t x0, int64_t n, Tile<T> &t) const {
        const bool border = P::at_border(x0, n);
        for (int64_t r = 0; r < t.rows; ++r) {
            T *own = queries + (r0 + r) * P::query_row() + l.left + x0 + stat();
            T *weight = t.of_row(t.weight, r), *grad = t.of_row(t.grad, r), *by = t.of_row(t.slope, r);
            const Vec<T> most = load<T>(own), inverse = load<T>(own + l.query_pitch);
            Vec<T> delta{};
            for (int64_t s = 0, c = 0; s < t.slots[r]; ++s, c = c + 1 == t.columns ? 0 : c + 1) {
                const Vec<T> raw = load<T>(weight + s * L);
                Vec<T> alpha = exponential<T>(scaled<T, kind>(raw, a.scale) - most) * inverse;
                if (border) alpha = load<T>(P::inside() + t.column[c]) > Vec<T>{} ? alpha : Vec<T>{};
                delta = fused<T>(alpha, load<T>(grad + s * L), delta);
                store<T>(weight + s * L, alpha);
                if (kind == distance) store<T>(by + s * L, slope<T, kind>(raw, a.scale));
            }
            for (int64_t s = 0; s < t.slots[r]; ++s) {
                const Vec<T> times = kind == distance ? load<T>(by + s * L) : slope<T, kind>(Vec<T>{}, a.scale);
                store<T>(grad + s * L, load<T>(weight + s * L) * (load<T>(grad + s * L) - delta) * times);
            }
            store_some<T>(own + 2 * l.query_pitch, delta, n);
        }
    }

    void keep(int64_t o0, int64_t group, int64_t x0, int64_t n, const Tile<T> &t) const {
        int64_t j = 0;
        for (int64_t k0 = 0; k0 < w().size[0]; ++k0) {
            if (reads(w(), 0, o0, k0) < 0) continue;
            for (int64_t m = P::by_query.begin(group); m < P::by_query.end(group); ++m, ++j)
                for (int64_t i = 0; i < t.met[j].n; ++i) {
                    const int64_t r = t.met[j].row[i], base = t.met[j].base[i];
                    T *row = kept + (o0 * w().out[1] + group * rows_at_once + r) * kept_row() + x0 +
                             (k0 * w().size[1] + P::by_query.at(m).slot[i]) * w().size[2] * 2 * l.length;
                    for (int64_t c = 0; c < t.columns; ++c) {
                        T *to = row + t.kept_column[c] * 2 * l.length + at[2 * t.kept_column[c] + 1];
                        store_some<T>(to, load<T>(t.of_row(t.weight, r) + (base + c) * L), n);
                        store_some<T>(to + l.length, load<T>(t.of_row(t.grad, r) + (base + c) * L), n);
                    }
                }
        }
    }

    // One vector of keys of the rows of a group: their gradients, in the place of the packed keys and values.
    void key_tile(int64_t i0, int64_t group, int64_t phase, int64_t i, Tile<T> &t) const {
        const int64_t first = group * rows_at_once, pitch = l.query_pitch;
        t.begin(smaller<int64_t>(rows_at_once, w().grid[1] - first));
        for (int64_t k = 0; k < w().size[2]; ++k) {
            const int64_t shift = at[2 * k + 1];
            if (at[2 * k] != phase || i + L <= shift || i - shift >= w().out[2]) continue;
            t.column[t.columns] = l.left + i - shift;
            t.kept_column[t.columns++] = k * 2 * l.length + i;
        }
        t.pitch = pitch, t.own_pitch = l.pitch;
        T *own = keys + (i0 * w().grid[1] + first) * P::key_row() + phase * l.length + i;
        for (int64_t r = 0; r < t.rows; ++r) t.own[r] = own + r * P::key_row();
        for (int64_t p = planes.begin(i0); p < planes.end(i0); ++p)
            for (int64_t m = by_key.begin(group); m < by_key.end(group); ++m) {
                const RowMeeting &rows = by_key.at(m);
                const int64_t r = planes.output(p) * w().out[1] + rows.other;
                Met<T> &met = t.meet(queries + r * P::query_row(), rows);
                for (int64_t q = 0; q < rows.n; ++q)
                    met.kept[q] = kept + r * kept_row() +
                                  (planes.slot(p) * w().size[1] + rows.slot[q]) * w().size[2] * 2 * l.length;
            }
        if (kept == nullptr) with_kind(a, [&](auto kind) { again<kind.n>(t); });
        t.sum(apart(), kept == nullptr ? t.grad : nullptr, 0, a.E, 0, l.length);
        t.sum(false, kept == nullptr ? t.weight : nullptr, a.E, a.D, a.E);
        const Vec<T> here = load<T>(P::inside() + phase * l.length + i);
        for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t f = 0; f < a.E + a.D; ++f)
                store<T>(own + r * P::key_row() + f * l.pitch,
                         here > Vec<T>{} ? load<T>(t.result_of(r) + f * L) : Vec<T>{});
    }
    // The weights and factors of a tile of keys, computed again.
    template <int kind>
    void again(const Tile<T> &t) const {
        const int64_t pitch = t.pitch;
        t.score(kind != product, 0, a.E, t.grad);
        t.score(false, a.E, a.D, t.slope);
        for (int64_t j = 0; j < t.mets; ++j) {
            const Met<T> &m = t.met[j];
            for (int64_t c = 0; c < t.columns; ++c) {
                const T *stats = m.near + stat() + t.column[c];
                const Vec<T> most = load<T>(stats), inverse = load<T>(stats + pitch), delta = load<T>(stats + 2 * pitch);
                for (int64_t q = 0; q < m.n; ++q) {
                    const int64_t slot = (m.base[q] + c) * L;
                    T *grad = t.of_row(t.grad, m.row[q]) + slot;
                    const Vec<T> raw = load<T>(grad);
                    Vec<T> alpha = exponential<T>(scaled<T, kind>(raw, a.scale) - most) * inverse;
                    alpha = inverse == Vec<T>{} ? inverse : alpha;  // no such output
                    const Vec<T> times = load<T>(t.of_row(t.slope, m.row[q]) + slot) - delta;
                    store<T>(t.of_row(t.weight, m.row[q]) + slot, alpha);
                    store<T>(grad, alpha * times * slope<T, kind>(raw, a.scale));
                }
            }
        }
    }
    void key_tiles(int64_t i0, int64_t group, Tile<T> &t) const {
        each_key_vector(w(), l, 1, [&](int64_t phase, int64_t i, int) { key_tile(i0, group, phase, i, t); });
    }

    void unpack_keys(int64_t r) const {
        const auto unpack = [&](const Map<T> &map, int64_t features, T *from) {
            unpack_key_row(w(), l, from, features, row_of(map, b, h, r, w().grid[1]), map.stride[2], map.stride[5]);
        };
        unpack(all.d_key, a.E, keys + r * P::key_row());
        unpack(all.d_value, a.D, keys + r * P::key_row() + a.E * l.pitch);
    }
};

// Packed rows start as zeros, with their feature "inside".
template <class T>
void clear_keys(const Window &w, const Layout<T> &l, int64_t features, T *keys) {
    const int64_t row = (features + 1) * l.pitch;
    memset(keys, 0, l.rows * row * sizeof(T));
    for (int64_t r = 0; r < l.rows; ++r)
        each_column(w, l, 0, l.columns, [&](int64_t at, int64_t) { keys[r * row + features * l.pitch + at] = 1; });
}

template <class T>
int local(const LocalArgs<T> &a) {
    const Window &w = a.window;
    const Layout<T> l(w);
    const Work work(a.B, a.H, a.threads);
    const int64_t features = a.E + a.D, key_bytes = round_up(l.rows * (features + 1) * l.pitch * sizeof(T), 64);
    const Scratch slots(2 * w.size[2] * sizeof(int64_t)), table(Meetings::bytes(w));
    if (!slots.ok() || !table.ok()) return out_of_memory;
    place_slots(w, slots.at<int64_t>());
    const Meetings by_query(w, table);
    const int64_t mets = w.size[0] * by_query.most, width = larger(larger(a.E, a.D), int64_t(1));
    const int64_t tile_bytes = round_up(Tile<T>::bytes(mets, w.size[2], larger<int64_t>(l.slots, 2), width), 64);
    const Scratch packed(work.at_once() * key_bytes), tiles(a.threads * tile_bytes);
    if (!packed.ok() || !tiles.ok()) return out_of_memory;
    for (int64_t i = 0; i < work.at_once(); ++i) clear_keys(w, l, features, packed.at<T>(i * key_bytes));
    const int64_t groups = ceil_div(w.out[1], rows_at_once);
    work.each_problem([&](int64_t b, int64_t h, int of) {
        const Problem<T> problem{a, l, by_query, slots.at<int64_t>(), b, h, packed.at<T>(of * key_bytes), nullptr};
        work.each(l.rows, of, [&](int64_t r, int) { problem.pack_keys(r); });
        work.each(w.out[0] * groups * l.tiles, of, [&](int64_t item, int worker) {
            Tile<T> tile(tiles, worker * tile_bytes, mets, w.size[2], larger<int64_t>(l.slots, 2), width);
            problem.forward_tile(item / l.tiles / groups, item / l.tiles % groups, item % l.tiles * lanes<T>, tile);
        });
    });
    return ok;
}

// A problem's weights and factors up to this size are kept from the tiles of queries for those of keys; beyond it the
// caches do not hold them, and computing them again is faster.
constexpr int64_t most_kept = int64_t(1) << 20;

template <class T>
int local_backward(const LocalBackwardArgs<T> &all) {
    const LocalArgs<T> &a = all.of;
    const Window &w = a.window;
    const Layout<T> l(w);
    const Work work(a.B, a.H, a.threads);
    const int64_t features = a.E + a.D;
    const int64_t key_bytes = round_up(l.rows * (features + 1) * l.pitch * sizeof(T), 64);
    const int64_t query_bytes = round_up(l.out_rows * (features + 3) * l.query_pitch * sizeof(T), 64);
    const int64_t slot_bytes = round_up(l.out_rows * l.slots * 2 * l.length * sizeof(T), 64);
    const int64_t kept_bytes = slot_bytes <= most_kept ? slot_bytes : 0;
    const int64_t packed_bytes = key_bytes + query_bytes + kept_bytes;
    const Scratch slots(2 * w.size[2] * sizeof(int64_t)), query_table(Meetings::bytes(w)), key_table(Meetings::bytes(w)),
        rows(Readers::bytes(w, 1)), plane_table(Readers::bytes(w, 0));
    if (!slots.ok() || !query_table.ok() || !key_table.ok() || !rows.ok() || !plane_table.ok()) return out_of_memory;
    place_slots(w, slots.at<int64_t>());
    const Readers planes(w, 0, plane_table.at<int64_t>()), readers(w, 1, rows.at<int64_t>());
    const Meetings by_query(w, query_table), by_key(w, readers, key_table);
    const int64_t mets = larger(w.size[0] * by_query.most, planes.most * by_key.most);
    const int64_t most_slots = larger(l.slots, planes.most * readers.most * w.size[2]);
    const int64_t tile_bytes = round_up(Tile<T>::bytes(mets, w.size[2], most_slots, features), 64);
    const Scratch packed(work.at_once() * packed_bytes), tiles(a.threads * tile_bytes);
    if (!packed.ok() || !tiles.ok()) return out_of_memory;
    for (int64_t i = 0; i < work.at_once(); ++i) {
        clear_keys(w, l, features, packed.at<T>(i * packed_bytes));
        memset(packed.at<T>(i * packed_bytes + key_bytes), 0, packed_bytes - key_bytes);
    }
    const int64_t out_groups = ceil_div(w.out[1], rows_at_once), groups = ceil_div(w.grid[1], rows_at_once);
    work.each_problem([&](int64_t b, int64_t h, int of) {
        const Backward<T> problem{
            {a, l, by_query, slots.at<int64_t>(), b, h, packed.at<T>(of * packed_bytes),
             packed.at<T>(of * packed_bytes + key_bytes)},
            all, by_key, planes,
            kept_bytes > 0 ? packed.at<T>(of * packed_bytes + key_bytes + query_bytes) : nullptr};
        const auto tile_of = [&](int worker) {
            return Tile<T>(tiles, worker * tile_bytes, mets, w.size[2], most_slots, features);
        };
        work.each(l.rows, of, [&](int64_t r, int) { problem.pack_keys(r); });
        work.each(l.out_rows, of, [&](int64_t r, int) { problem.pack_queries(r); });
        work.each(w.out[0] * out_groups * l.tiles, of, [&](int64_t item, int worker) {
            Tile<T> tile = tile_of(worker);
            problem.query_tile(item / l.tiles / out_groups, item / l.tiles % out_groups, item % l.tiles * lanes<T>, tile);
        });
        work.each(w.grid[0] * groups, of, [&](int64_t item, int worker) {
            Tile<T> tile = tile_of(worker);
            problem.key_tiles(item / groups, item % groups, tile);
        });
        work.each(l.rows, of, [&](int64_t r, int) { problem.unpack_keys(r); });
    });
    return ok;
}

}  // namespace

int local_float(const LocalArgs<float> &a) { return local(a); }
int local_double(const LocalArgs<double> &a) { return local(a); }
int local_backward_float(const LocalBackwardArgs<float> &a) { return local_backward(a); }
int local_backward_double(const LocalBackwardArgs<double> &a) { return local_backward(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

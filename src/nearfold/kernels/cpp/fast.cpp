// Fast weights: a matrix S (s, p) for every head, S_t = (diag(decay_t) + left_t right_t^T) S_{t-1} + key_t value_t^T and
// y_t = S_t^T query_t. Under the delta rule left is -beta key and right is decay * key, so that
// S_t = diag(decay_t) S_{t-1} + key_t z_t^T with z_t = beta_t (value_t - S_{t-1}^T (decay_t key_t)).
//
// One step after the other, exactly: the columns of S know nothing of one another, so a panel of them stays in the first
// cache, and a step is four or five products for each number of it, where the same in chunks of matrix products is about
// twice as many. Decays are only ever multiplied.
//
// Forward: the lanes of a vector are columns. One pass over S makes the state, what the query reads of it, and what the
// next step's correction will. Backward: the lanes are rows. It walks the chunks from the last to the first, makes their
// states again from what the forward kept, and goes back over them. Nothing depends on the number of threads: heads and
// columns are cut by the shape alone, and what several found is added in order.
#include <cmath>

#include "engine.h"
#include "exponential.h"
#include "recurrence.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

enum Rule { plain = 0, delta = 1, any = 2 };  // no correction, the delta rule, left right^T

// The rows of one chunk of one head, filled up to whole vectors with zeros. left is only there under `any`.
template <class T>
struct Rows {
    T *decay, *query, *key, *right, *left;
    Rows(T *at, int64_t size) {
        for (T **list : {&decay, &query, &key, &right, &left}) *list = at, at += size;
    }
};

template <class T>
inline Vec<T> exponential_of_any(Vec<T> x) {
    constexpr T most = sizeof(T) == 4 ? T(88) : T(709);
    const Vec<T> made = exponential<T>(x > splat<T>(most) ? splat<T>(most) : x);
    return x > splat<T>(most) ? splat<T>(T(__builtin_inf())) : made;
}

template <class T>
void copy_row(const T *from, int64_t n, int64_t width, T *to) {
    memcpy(to, from, n * sizeof(T));
    fill<T>(to + n, width - n, T(0));
}

template <class T, int rule>
void pack(const FastArgs<T> &a, int64_t b, int64_t h, int64_t start, int64_t steps, int64_t width, const Rows<T> &rows) {
    const int64_t L = lanes<T>;
    for (int64_t t = 0; t < steps; ++t) {
        const int64_t at = (b * a.N + start + t) * a.H + h, to = t * width;
        copy_row(a.query + at * a.s, a.s, width, rows.query + to);
        copy_row(a.key + at * a.s, a.s, width, rows.key + to);
        T *decay = rows.decay + to;
        if (!a.log_decay) {
            fill<T>(decay, width, T(1));
        } else if (a.decays == 1) {
            const Vec<T> made = exponential_of_any<T>(splat<T>(a.log_decay[at]));
            for (int64_t i = 0; i < width; i += L) store<T>(decay + i, made);
        } else {
            copy_row(a.log_decay + at * a.s, a.s, width, decay);
            for (int64_t i = 0; i < width; i += L) store<T>(decay + i, exponential_of_any<T>(load<T>(decay + i)));
        }
        if (rule == delta)
            for (int64_t i = 0; i < width; i += L)
                store<T>(rows.right + to + i, load<T>(decay + i) * load<T>(rows.key + to + i));
        if (rule == any) {
            copy_row(a.right + at * a.s, a.s, width, rows.right + to);
            copy_row(a.left + at * a.s, a.s, width, rows.left + to);
        }
    }
}

// Where the vectors of a panel of columns begin in a row of `columns` numbers, and how many lanes of each there are.
template <class T>
inline int64_t lanes_of(int64_t columns, int vector) {
    return smaller<int64_t>(lanes<T>, larger<int64_t>(0, columns - vector * lanes<T>));
}

// One chunk of a panel of columns: state (s, vectors) goes from before its first step to after its last.
template <class T, int rule, int vectors>
void chunk_forward(const FastArgs<T> &a, const Rows<T> &rows, int64_t steps, int64_t width, const T *value, const T *beta,
                   T *y, T *reads, int64_t columns, Vec<T> *state) {
    const int64_t stride = a.H * a.p;
    Vec<T> u[vectors] = {};
    if (rule != plain)
        for (int64_t c = 0; c < a.s; ++c) {
            const Vec<T> right = splat<T>(rows.right[c]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) u[v] = fused<T>(right, state[c * vectors + v], u[v]);
        }
    for (int64_t t = 0; t < steps; ++t) {
        const T *decays = rows.decay + t * width, *keys = rows.key + t * width, *queries = rows.query + t * width;
        const T *lefts = rows.left + t * width, *rights = rows.right + (t + 1 < steps ? t + 1 : t) * width;
        Vec<T> z[vectors], out[vectors] = {}, next[vectors] = {};
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            z[v] = load_some<T>(value + t * stride + v * lanes<T>, lanes_of<T>(columns, v));
            if (rule == delta) z[v] = splat<T>(beta[t * a.H]) * (z[v] - u[v]);
            if (rule != plain && reads) store_some<T>(reads + t * stride + v * lanes<T>, u[v], lanes_of<T>(columns, v));
        }
        for (int64_t c = 0; c < a.s; ++c) {
            const Vec<T> decay = splat<T>(decays[c]), key = splat<T>(keys[c]), query = splat<T>(queries[c]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
                Vec<T> now = fused<T>(key, z[v], decay * state[c * vectors + v]);
                if (rule == any) now = fused<T>(splat<T>(lefts[c]), u[v], now);
                state[c * vectors + v] = now;
                out[v] = fused<T>(query, now, out[v]);
                if (rule != plain) next[v] = fused<T>(splat<T>(rights[c]), now, next[v]);
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            u[v] = next[v];
            store_some<T>(y + t * stride + v * lanes<T>, out[v], lanes_of<T>(columns, v));
        }
    }
}

constexpr int64_t most_items = 16;  // so many threads have work at least

template <class T>
int64_t row_width(const FastArgs<T> &a) {
    return round_up(a.s, lanes<T>);
}

template <class T, int rule>
int forward(const FastArgs<T> &a) {
    const int64_t L = lanes<T>, width = row_width(a), heads = a.B * a.H, chunks = ceil_div(a.N, a.chunk);
    const int64_t vectors = ceil_div(a.p, L);
    const int64_t panels = smaller(vectors, larger(ceil_div(most_items, heads), ceil_div(vectors, tile_vectors)));
    const int64_t rows_size = 5 * a.chunk * width, bytes = rows_size * sizeof(T) + a.s * tile_vectors * sizeof(Vec<T>);
    const Scratch workers(a.threads * round_up(bytes, 64));
    if (!workers.ok()) return out_of_memory;
    parallel(a.threads, heads * panels, [&](int64_t item, int worker) {
        const FlushTiny flush;
        const int64_t b = item / panels / a.H, h = item / panels % a.H, panel = item % panels;
        T *memory = workers.at<T>(worker * round_up(bytes, 64));
        const Rows<T> rows(memory, a.chunk * width);
        Vec<T> *state = reinterpret_cast<Vec<T> *>(memory + rows_size);
        int64_t first = panel * vectors / panels * L;
        const int64_t end = smaller(a.p, (panel + 1) * vectors / panels * L);
        for (; first < end; first += tile_columns<T>)
            with_vectors<T>(smaller<int64_t>(tile_columns<T>, end - first), [&](auto count) {
                constexpr int n = decltype(count)::n;
                const int64_t columns = smaller<int64_t>(n * L, end - first);
                for (int64_t i = 0; i < a.s * n; ++i) state[i] = Vec<T>{};
                for (int64_t k = 0; k < chunks; ++k) {
                    const int64_t start = k * a.chunk, steps = smaller(a.chunk, a.N - start);
                    const int64_t row = (b * a.N + start) * a.H + h, at = row * a.p + first;
                    if (a.states) {
                        T *to = a.states + ((b * a.H + h) * chunks + k) * a.s * a.p + first;
                        for (int64_t c = 0; c < a.s; ++c)
                            for (int v = 0; v < n; ++v)
                                store_some<T>(to + c * a.p + v * L, state[c * n + v], lanes_of<T>(columns, v));
                    }
                    pack<T, rule>(a, b, h, start, steps, width, rows);
                    chunk_forward<T, rule, n>(a, rows, steps, width, a.value + at, rule == delta ? a.beta + row : nullptr,
                                              a.y + at, a.reads ? a.reads + at : nullptr, columns, state);
                }
            });
    });
    return ok;
}

// What one worker of the backward holds of a chunk; L columns at a time.
template <class T>
struct Chunk {
    Rows<T> rows, grads;  // grads.decay is at the decay, grads.right at right
    T *states;            // (chunk + 1, L, width), the first before the chunk
    T *grad, *z, *u, *d_value;  // (chunk, L) each
    Vec<T> *part;         // (2, L): sums that are not through
    T *of_beta;           // (chunk,)
    static int64_t size(int64_t chunk, int64_t width) {
        const int64_t L = lanes<T>;
        return 10 * chunk * width + (chunk + 1) * L * width + 4 * chunk * L + 2 * L * L + round_up(chunk, L);
    }
    Chunk(T *at, int64_t chunk, int64_t width)
        : rows(at, chunk * width), grads(at + 5 * chunk * width, chunk * width), states(at + 10 * chunk * width) {
        at = states + (chunk + 1) * lanes<T> * width;
        for (T **list : {&grad, &z, &u, &d_value}) *list = at, at += chunk * lanes<T>;
        part = reinterpret_cast<Vec<T> *>(at), of_beta = at + 2 * lanes<T> * lanes<T>;
    }
};

// The states of L columns after each step of a chunk, of that before it.
template <class T, int rule, int vectors>
void states_again(const Chunk<T> &c, int64_t steps, int64_t width, int64_t i) {
    constexpr int64_t L = lanes<T>;
    for (int64_t t = 0; t < steps; ++t) {
        const int64_t row = t * width + i;
        Vec<T> decay[vectors], key[vectors], left[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            decay[v] = load<T>(c.rows.decay + row + v * L), key[v] = load<T>(c.rows.key + row + v * L);
            if (rule == any) left[v] = load<T>(c.rows.left + row + v * L);
        }
        const T *from = c.states + t * L * width + i;
        T *to = c.states + (t + 1) * L * width + i;
        for (int64_t j = 0; j < L; ++j) {
            const Vec<T> z = splat<T>(c.z[t * L + j]), u = splat<T>(c.u[t * L + j]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
                Vec<T> now = fused<T>(key[v], z, decay[v] * load<T>(from + j * width + v * L));
                if (rule == any) now = fused<T>(left[v], u, now);
                store<T>(to + j * width + v * L, now);
            }
        }
    }
}

// Half a step back: the adjoint of the state takes in what the query read, and gives to query, key, left, and z and u.
template <class T, int rule, int vectors>
void read_back(const Chunk<T> &c, int64_t t, int64_t width, int64_t i, T *adjoint) {
    constexpr int64_t L = lanes<T>;
    const int64_t row = t * width + i;
    Vec<T> query[vectors], key[vectors], left[vectors], d_query[vectors], d_key[vectors], d_left[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
        const int64_t at = row + v * L;
        query[v] = load<T>(c.rows.query + at), d_query[v] = load<T>(c.grads.query + at);
        key[v] = load<T>(c.rows.key + at), d_key[v] = load<T>(c.grads.key + at);
        if (rule == any) left[v] = load<T>(c.rows.left + at), d_left[v] = load<T>(c.grads.left + at);
    }
    const T *state = c.states + (t + 1) * L * width + i;
    for (int64_t j = 0; j < L; ++j) {
        const Vec<T> grad = splat<T>(c.grad[t * L + j]), z = splat<T>(c.z[t * L + j]), u = splat<T>(c.u[t * L + j]);
        Vec<T> of_z = i ? c.part[j] : Vec<T>{}, of_u = rule == any && i ? c.part[L + j] : Vec<T>{};
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            T *at = adjoint + j * width + i + v * L;
            const Vec<T> back = fused<T>(query[v], grad, load<T>(at));
            store<T>(at, back);
            d_query[v] = fused<T>(load<T>(state + j * width + v * L), grad, d_query[v]);
            d_key[v] = fused<T>(back, z, d_key[v]);
            of_z = fused<T>(back, key[v], of_z);
            if (rule == any) d_left[v] = fused<T>(back, u, d_left[v]), of_u = fused<T>(back, left[v], of_u);
        }
        c.part[j] = of_z;
        if (rule == any) c.part[L + j] = of_u;
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
        store<T>(c.grads.query + row + v * L, d_query[v]), store<T>(c.grads.key + row + v * L, d_key[v]);
        if (rule == any) store<T>(c.grads.left + row + v * L, d_left[v]);
    }
}

// The other half: on to the state before, through decay and right.
template <class T, int rule, int vectors>
void decay_back(const Chunk<T> &c, int64_t t, int64_t width, int64_t i, const T *d_u, T *adjoint) {
    constexpr int64_t L = lanes<T>;
    const int64_t row = t * width + i;
    Vec<T> decay[vectors], right[vectors], d_decay[vectors], d_right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
        const int64_t at = row + v * L;
        decay[v] = load<T>(c.rows.decay + at), d_decay[v] = load<T>(c.grads.decay + at);
        if (rule != plain) right[v] = load<T>(c.rows.right + at), d_right[v] = load<T>(c.grads.right + at);
    }
    const T *state = c.states + t * L * width + i;
    for (int64_t j = 0; j < L; ++j) {
        const Vec<T> of_u = rule == plain ? Vec<T>{} : splat<T>(d_u[j]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            T *at = adjoint + j * width + i + v * L;
            const Vec<T> back = load<T>(at), before = load<T>(state + j * width + v * L);
            d_decay[v] = fused<T>(back, before, d_decay[v]);
            Vec<T> next = decay[v] * back;
            if (rule != plain) next = fused<T>(right[v], of_u, next), d_right[v] = fused<T>(before, of_u, d_right[v]);
            store<T>(at, next);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
        store<T>(c.grads.decay + row + v * L, d_decay[v]);
        if (rule != plain) store<T>(c.grads.right + row + v * L, d_right[v]);
    }
}

// Calls with every panel of a row: (vectors, where it begins).
template <class T, class F>
inline void panels_of(int64_t width, const F &call) {
    for (int64_t i = 0; i < width; i += tile_columns<T>)
        with_vectors<T>(smaller<int64_t>(tile_columns<T>, width - i), [&](auto count) { call(count, i); });
}

// L columns of a chunk, from `first`; n of them are there. adjoint (L, width): from after the chunk to before it.
template <class T, int rule>
void columns_backward(const FastBackwardArgs<T> &args, const Chunk<T> &c, int64_t b, int64_t h, int64_t k, int64_t first,
                      int64_t n, int64_t width, T *d_value, T *adjoint) {
    const FastArgs<T> &a = args.of;
    constexpr int64_t L = lanes<T>;
    const int64_t start = k * a.chunk, steps = smaller(a.chunk, a.N - start), chunks = ceil_div(a.N, a.chunk);
    const int64_t row = (b * a.N + start) * a.H + h;
    for (int64_t t = 0; t < steps; ++t) {
        const int64_t at = (row + t * a.H) * a.p + first;
        store<T>(c.grad + t * L, load_some<T>(args.grad + at, n));
        const Vec<T> value = load_some<T>(a.value + at, n), u = rule == plain ? Vec<T>{} : load_some<T>(a.reads + at, n);
        store<T>(c.u + t * L, u);
        store<T>(c.z + t * L, rule == delta ? splat<T>(a.beta[row + t * a.H]) * (value - u) : value);
    }
    const T *kept = a.states + ((b * a.H + h) * chunks + k) * a.s * a.p + first;
    fill<T>(c.states, L * width, T(0));
    for (int64_t i = 0; i < a.s; ++i)
        for (int64_t j = 0; j < n; ++j) c.states[j * width + i] = kept[i * a.p + j];
    panels_of<T>(width, [&](auto v, int64_t i) { states_again<T, rule, decltype(v)::n>(c, steps, width, i); });
    for (int64_t t = steps - 1; t >= 0; --t) {
        panels_of<T>(width, [&](auto v, int64_t i) { read_back<T, rule, decltype(v)::n>(c, t, width, i, adjoint); });
        Vec<T> of_value = sums<T>(c.part);
        T d_u[lanes<T>];
        if (rule == delta) {
            const T beta = a.beta[row + t * a.H];
            const int64_t at = (row + t * a.H) * a.p + first;
            c.of_beta[t] += sum<T>(of_value * (load_some<T>(a.value + at, n) - load<T>(c.u + t * L)));
            of_value = splat<T>(beta) * of_value;
            store<T>(d_u, -of_value);
        }
        if (rule == any) store<T>(d_u, sums<T>(c.part + L));
        store_some<T>(d_value + (row + t * a.H) * a.p + first, of_value, n);
        panels_of<T>(width, [&](auto v, int64_t i) { decay_back<T, rule, decltype(v)::n>(c, t, width, i, d_u, adjoint); });
    }
}

// The gradients of one chunk's rows, of those at decay, key and right as the recurrence has them.
template <class T, int rule>
void unpack(const FastBackwardArgs<T> &args, const Chunk<T> &c, int64_t b, int64_t h, int64_t k, int64_t width) {
    const FastArgs<T> &a = args.of;
    const int64_t start = k * a.chunk, steps = smaller(a.chunk, a.N - start);
    for (int64_t t = 0; t < steps; ++t) {
        const int64_t at = (b * a.N + start + t) * a.H + h, from = t * width;
        const T *decay = c.rows.decay + from, *key = c.rows.key + from, *d_right = c.grads.right + from;
        T *d_key = c.grads.key + from, *d_decay = c.grads.decay + from;
        if (rule == delta) {
            for (int64_t i = 0; i < a.s; ++i) {
                d_decay[i] += d_right[i] * key[i];
                d_key[i] += d_right[i] * decay[i];
            }
            args.d_beta[at] = c.of_beta[t];
        }
        if (a.log_decay) {
            T total = 0;
            for (int64_t i = 0; i < a.s; ++i) total += d_decay[i] *= decay[i];
            if (a.decays == 1)
                args.d_log_decay[at] = total;
            else
                memcpy(args.d_log_decay + at * a.s, d_decay, a.s * sizeof(T));
        }
        memcpy(args.d_query + at * a.s, c.grads.query + from, a.s * sizeof(T));
        memcpy(args.d_key + at * a.s, d_key, a.s * sizeof(T));
        if (rule == any) {
            memcpy(args.d_left + at * a.s, c.grads.left + from, a.s * sizeof(T));
            memcpy(args.d_right + at * a.s, d_right, a.s * sizeof(T));
        }
    }
}

template <class T, int rule>
int backward(const FastBackwardArgs<T> &args) {
    const FastArgs<T> &a = args.of;
    const int64_t L = lanes<T>, width = row_width(a), heads = a.B * a.H, chunks = ceil_div(a.N, a.chunk);
    const int64_t blocks = ceil_div(a.p, L), groups = smaller(blocks, ceil_div(most_items, heads));
    const int64_t worker_size = round_up((Chunk<T>::size(a.chunk, width) + blocks * L * width) * sizeof(T), 64);
    // gradients at all operands but the value, which several groups of columns add to: each its own, then their sum
    T *const to[] = {args.d_query, args.d_key, args.d_log_decay, args.d_beta, args.d_left, args.d_right};
    const int64_t numbers = a.B * a.N * a.H;
    const int64_t sizes[] = {numbers * a.s, numbers * a.s, numbers * a.decays, numbers, numbers * a.s, numbers * a.s};
    int64_t all = 0;
    for (int i = 0; i < 6; ++i) all += to[i] ? sizes[i] : 0;
    const Scratch workers(a.threads * worker_size), found(groups > 1 ? groups * all * sizeof(T) : 0);
    if (!workers.ok() || !found.ok()) return out_of_memory;
    parallel(a.threads, heads * groups, [&](int64_t item, int worker) {
        const FlushTiny flush;
        const int64_t b = item / groups / a.H, h = item / groups % a.H, g = item % groups;
        const int64_t begin = g * blocks / groups, end = (g + 1) * blocks / groups;
        FastBackwardArgs<T> own = args;
        if (groups > 1) {
            T *at = found.at<T>() + g * all;
            T **lists[] = {&own.d_query, &own.d_key, &own.d_log_decay, &own.d_beta, &own.d_left, &own.d_right};
            for (int i = 0; i < 6; ++i)
                if (to[i]) *lists[i] = at, at += sizes[i];
        }
        T *memory = workers.at<T>(worker * worker_size);
        const Chunk<T> c(memory, a.chunk, width);
        T *adjoint = memory + Chunk<T>::size(a.chunk, width);
        fill<T>(adjoint, (end - begin) * L * width, T(0));
        for (int64_t k = chunks - 1; k >= 0; --k) {
            const int64_t start = k * a.chunk;
            pack<T, rule>(a, b, h, start, smaller(a.chunk, a.N - start), width, c.rows);
            fill<T>(c.grads.decay, 5 * a.chunk * width, T(0));
            fill<T>(c.of_beta, a.chunk, T(0));
            for (int64_t block = begin; block < end; ++block)
                columns_backward<T, rule>(args, c, b, h, k, block * L, smaller(L, a.p - block * L), width, args.d_value,
                                          adjoint + (block - begin) * L * width);
            unpack<T, rule>(own, c, b, h, k, width);
        }
    });
    if (groups > 1)
        for (int64_t i = 0, at = 0; i < 6; ++i)
            if (to[i]) {
                add_up<T>(a.threads, found.at<T>() + at, groups, all, sizes[i], to[i]);
                at += sizes[i];
            }
    return ok;
}

template <class T>
int forward_of(const FastArgs<T> &a) {
    return a.beta ? forward<T, delta>(a) : a.left ? forward<T, any>(a) : forward<T, plain>(a);
}
template <class T>
int backward_of(const FastBackwardArgs<T> &a) {
    return a.of.beta ? backward<T, delta>(a) : a.of.left ? backward<T, any>(a) : backward<T, plain>(a);
}

}  // namespace

int fast_float(const FastArgs<float> &a) { return forward_of<float>(a); }
int fast_double(const FastArgs<double> &a) { return forward_of<double>(a); }
int fast_backward_float(const FastBackwardArgs<float> &a) { return backward_of<float>(a); }
int fast_backward_double(const FastBackwardArgs<double> &a) { return backward_of<double>(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

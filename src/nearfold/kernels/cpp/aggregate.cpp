// y = sum over slots of alpha * W_s * value[index], and its gradients, without the gathered (B, C, N, k).
//
// With a dense kernel this is an implicit GEMM: rows of six outputs read their neighbours through pointers, where a GEMM
// would read a packed matrix. Where alpha or several entries make a slot's row, it is computed into a tile that stays in
// cache. Every position adds its terms in a fixed order: results do not depend on the number of threads.
//
// An output and head reads S * entries rows of value; entry e of slot s is number s * entries + e.
#include <limits>

#include "engine.h"
#include "simd.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int64_t block_rows = 8 * tile_rows;  // rows that share a panel of the kernel while it is in L1
constexpr int64_t reduce_rows = 64;            // outputs that one step of the kernel's gradient takes
constexpr int64_t panels_together = 4;         // panels of the kernel that one gathering of rows serves
constexpr int64_t blended_together = 8;        // entries whose sum stays in registers
constexpr int64_t slope_bytes = 4 << 20;       // of gradients at slots that threads share

// acc[r] += rows[r] . panel, for tile_rows rows of K values and a panel (K, vectors * lanes).
template <class T, int vectors>
inline void multiply(const T *const *rows, const T *panel, int64_t K, T *const *acc) {
    Vec<T> a[tile_rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) a[r][v] = load<T>(acc[r] + v * lanes<T>);
    const T *at[tile_rows];
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r) at[r] = rows[r];
    for (int64_t i = 0; i < K; ++i) {
        Vec<T> b[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) b[v] = load<T>(panel + (i * vectors + v) * lanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < tile_rows; ++r) {
            const Vec<T> x = splat<T>(at[r][i]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) a[r][v] = fused<T>(x, b[v], a[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) store<T>(acc[r] + v * lanes<T>, a[r][v]);
}

// acc[r] += sum over i of rows[i][r] * panel[i], for r < tile_rows; panel rows are `stride` apart.
template <class T, int vectors>
inline void multiply_outer(const T *const *rows, int64_t first, const T *panel, int64_t stride, int64_t n, T *acc) {
    Vec<T> a[tile_rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) a[r][v] = load<T>(acc + (r * vectors + v) * lanes<T>);
    for (int64_t i = 0; i < n; ++i) {
        const T *row = rows[i] + first;
        Vec<T> b[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) b[v] = load<T>(panel + i * stride + v * lanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < tile_rows; ++r) {
            const Vec<T> x = splat<T>(row[r]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) a[r][v] = fused<T>(x, b[v], a[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < tile_rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) store<T>(acc + (r * vectors + v) * lanes<T>, a[r][v]);
}

template <class T>
inline int64_t packed_size(int64_t K, int64_t n) {
    return K * round_up(n, lanes<T>);
}

template <class T>
struct Reader {  // the operands of one call, by coordinates
    const AggregateArgs<T> &a;
    int64_t head_channels, group_channels, group_out;

    explicit Reader(const AggregateArgs<T> &args)
        : a(args), head_channels(args.C / args.H), group_channels(args.C / args.G), group_out(args.O / args.G) {}
    int64_t entries() const { return a.S * a.entries; }
    int64_t index(int64_t b, int64_t m, int64_t s, int64_t h) const {
        return a.index[b * a.index_stride[0] + m * a.index_stride[1] + s * a.index_stride[2] + h * a.index_stride[3]];
    }
    int64_t alpha_at(int64_t b, int64_t m, int64_t s, int64_t h) const {
        return b * a.alpha_stride[0] + m * a.alpha_stride[1] + s * a.alpha_stride[2] + h * a.alpha_stride[3];
    }
    const T *value(int64_t b, int64_t n) const { return a.value + b * a.value_stride[0] + n * a.value_stride[1]; }
    bool depthwise() const { return a.weight != nullptr && a.O == a.G && a.G == a.C; }
    bool dense() const { return a.weight != nullptr && !depthwise(); }
};

// What one output and head reads.
template <class T>
struct Slots {
    const int64_t *index;
    const T *alphas;
    int64_t index_step, alpha_step;

    Slots(const Reader<T> &read, int64_t b, int64_t m, int64_t h)
        : index(read.a.index + b * read.a.index_stride[0] + m * read.a.index_stride[1] + h * read.a.index_stride[3]),
          alphas(read.a.alpha ? read.a.alpha + read.alpha_at(b, m, 0, h) : nullptr), index_step(read.a.index_stride[2]),
          alpha_step(read.a.alpha_stride[2]) {}
    int64_t at(int64_t s) const { return index[s * index_step]; }
    T alpha(int64_t s) const { return alphas ? alphas[s * alpha_step] : T(1); }
};

template <class T>
int check_index(const AggregateArgs<T> &a) {
    const Reader<T> read(a);
    // an axis that an expanded index repeats is looked at once
    const int64_t B = a.index_stride[0] ? a.B : smaller<int64_t>(a.B, 1), H = a.index_stride[3] ? a.H : 1;
    int bad = 0;
    parallel(a.threads, B * ceil_div(a.M, block_rows), [&](int64_t item, int) {
        const int64_t b = item / ceil_div(a.M, block_rows), m0 = item % ceil_div(a.M, block_rows) * block_rows;
        bool beyond = false;
        for (int64_t h = 0; h < H; ++h)
            for (int64_t m = m0; m < smaller(m0 + block_rows, a.M); ++m) {
                const Slots<T> slots(read, b, m, h);
                if (slots.index_step == 1)
                    for (int64_t s = 0; s < read.entries(); ++s) beyond |= slots.index[s] >= a.N;
                else
                    for (int64_t s = 0; s < read.entries(); ++s) beyond |= slots.at(s) >= a.N;
            }
        if (beyond) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
    });
    return bad ? bad_index : ok;
}

// Whether an output's query was NaN, which only the index can say when there is no alpha.
template <class T>
bool is_lost(const Reader<T> &read, int64_t b, int64_t m) {
    if (read.a.alpha != nullptr) return false;
    for (int64_t s = 0; s < read.entries(); ++s)
        for (int64_t h = 0; h < read.a.H; ++h)
            if (read.index(b, m, s, h) == lost) return true;
    return false;
}

// Channels that one head reads and one group takes.
struct Segment {
    int64_t head, group, first, size;
};

inline int64_t segments_of(int64_t C, int64_t H, int64_t G, Segment *to) {
    int64_t n = 0;
    for (int64_t c = 0; c < C;) {
        const int64_t h = c / (C / H), g = c / (C / G);
        const int64_t end = smaller((h + 1) * (C / H), (g + 1) * (C / G));
        to[n++] = {h, g, c, end - c};
        c = end;
    }
    return n;
}

template <class T>
inline void scale_to(T *to, T a, const T *x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = a * x[i];
}

template <class T, int vectors>
inline void blend_vectors(const T *const *rows, const T *alphas, int64_t count, int64_t first, bool onto, T *to) {
    Vec<T> acc[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) acc[v] = onto ? load<T>(to + first + v * lanes<T>) : Vec<T>{};
    for (int64_t e = 0; e < count; ++e) {
        const Vec<T> alpha = splat<T>(alphas[e]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) acc[v] = fused<T>(alpha, load<T>(rows[e] + first + v * lanes<T>), acc[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store<T>(to + first + v * lanes<T>, acc[v]);
}

// to = sum over the entries of a slot of alpha * value, for n channels from `value` on. A channel's bits do not depend on
// where the channels begin and end, for how they are split may depend on the number of threads.
template <class T>
inline void blend(const Reader<T> &read, const Slots<T> &slots, int64_t s, const T *value, const T *zero, int64_t n, T *to) {
    const int64_t end = (s + 1) * read.a.entries, start = s * read.a.entries;
    for (int64_t first = start; first < end; first += blended_together) {
        const T *rows[blended_together];
        T alphas[blended_together];
        int64_t count = 0;
        for (int64_t e = first; e < smaller(first + blended_together, end); ++e) {
            const int64_t at = slots.at(e);
            const T alpha = slots.alpha(e);
            if (at < 0 && alpha == alpha) continue;  // NaN is the output's, whatever the slot reads
            rows[count] = at < 0 ? zero : value + at * read.a.value_stride[1];
            alphas[count++] = alpha;
        }
        const bool onto = first > start;
        int64_t c = 0;
        for (; c + 4 * lanes<T> <= n; c += 4 * lanes<T>) blend_vectors<T, 4>(rows, alphas, count, c, onto, to);
        while (c + lanes<T> <= n) {
            const int64_t width = smaller<int64_t>(tile_columns<T>, (n - c) / lanes<T> * lanes<T>);
            with_vectors<T>(width, [&](auto v) { blend_vectors<T, v.n>(rows, alphas, count, c, onto, to); });
            c += width;
        }
        for (; c < n; ++c) {
            T total = onto ? to[c] : T(0);
            for (int64_t e = 0; e < count; ++e) total = fused_one(alphas[e], rows[e][c], total);
            to[c] = total;
        }
    }
}

// What slot s of n outputs from m0 on reads in a segment: rows of value, or rows of `tile` where they have to be computed.
template <class T>
inline void slot_rows(const Reader<T> &read, int64_t b, int64_t m0, int64_t n, int64_t s, const Segment &seg, const T *zero,
                      T *tile, int64_t stride, const T **rows) {
    const T *value = read.value(b, 0) + seg.first;
    if (read.a.entries > 1) {
        for (int64_t i = 0; i < n; ++i) {
            blend(read, Slots<T>(read, b, m0 + i, seg.head), s, value, zero, seg.size, tile + i * stride);
            rows[i] = tile + i * stride;
        }
        return;
    }
    const int64_t *index = read.a.index + b * read.a.index_stride[0] + m0 * read.a.index_stride[1] +
                           s * read.a.index_stride[2] + seg.head * read.a.index_stride[3];
    const T *alphas = read.a.alpha ? read.a.alpha + read.alpha_at(b, m0, s, seg.head) : nullptr;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = index[i * read.a.index_stride[1]];
        rows[i] = at < 0 ? zero : value + at * read.a.value_stride[1];
        if (alphas == nullptr) continue;
        const T alpha = alphas[i * read.a.alpha_stride[1]];
        if (at < 0 && alpha == alpha) continue;  // NaN is the output's, whatever the slot reads
        scale_to(tile + i * stride, alpha, rows[i], seg.size);
        rows[i] = tile + i * stride;
    }
}

// ---- a dense kernel -------------------------------------------------------------------------------------------------

constexpr int64_t packed_together = 16;  // channels whose numbers are read in one go

// Kernel (O, c, S) -> by group and panel of output columns (S * c, width), zero beyond the group's columns. A row of the
// kernel is read as it lies: what is written in between stays in the cache.
template <class T>
void pack_forward(const AggregateArgs<T> &a, T *to) {
    const Reader<T> read(a);
    const int64_t c = read.group_channels, o = read.group_out, size = packed_size<T>(a.S * c, o);
    const int64_t panels = ceil_div(o, tile_columns<T>), parts = ceil_div(c, packed_together);
    parallel(a.threads, a.G * panels * parts, [&](int64_t item, int) {
        const int64_t g = item / (panels * parts), o0 = item / parts % panels * tile_columns<T>;
        const int64_t i0 = item % parts * packed_together, i1 = smaller(i0 + packed_together, c);
        const int64_t width = panel_width<T>(o, o0);
        T *panel = to + g * size + a.S * c * o0;
        for (int64_t j = 0; j < width; ++j) {
            const T *from = o0 + j < o ? a.weight + ((g * o + o0 + j) * c + i0) * a.S : nullptr;
            for (int64_t i = i0; i < i1; ++i)
                for (int64_t s = 0; s < a.S; ++s) panel[(s * c + i) * width + j] = from ? *from++ : T(0);
        }
    });
}

// The same turned round: by segment and panel of its channels (S * o, width).
template <class T>
void pack_backward(const AggregateArgs<T> &a, const Segment *segments, int64_t count, T *to) {
    const Reader<T> read(a);
    const int64_t c = read.group_channels, o = read.group_out;
    parallel(a.threads, count * a.S, [&](int64_t item, int) {
        const int64_t q = item / a.S, s = item % a.S;
        T *base = to;
        for (int64_t before = 0; before < q; ++before) base += packed_size<T>(a.S * o, segments[before].size);
        const Segment seg = segments[q];
        for (int64_t c0 = 0; c0 < seg.size; c0 += tile_columns<T>) {
            const int64_t width = panel_width<T>(seg.size, c0);
            T *panel = base + a.S * o * c0 + s * o * width;
            for (int64_t i = 0; i < o; ++i) {
                const T *row = a.weight + (seg.group * o + i) * c * a.S + s;
                const int64_t first = seg.first + c0 - seg.group * c;
                for (int64_t j = 0; j < width; ++j)
                    panel[i * width + j] = c0 + j < seg.size ? row[(first + j) * a.S] : T(0);
            }
        }
    });
}

template <class T>
int dense_forward(const AggregateArgs<T> &a) {
    const Reader<T> read(a);
    const int64_t c = read.group_channels, o = read.group_out, size = packed_size<T>(a.S * c, o);
    const int64_t blocks = ceil_div(a.M, block_rows), together = panels_together * tile_columns<T>;
    const int64_t acc_size = block_rows * smaller(together, round_up(o, lanes<T>));
    const bool plain = a.alpha == nullptr && a.entries == 1;
    const int64_t worker_size = round_up(acc_size + (1 + (plain ? 0 : block_rows)) * a.C, 16);
    const Scratch packed(a.G * size * sizeof(T)), workers(a.threads * worker_size * sizeof(T));
    const Scratch segment_memory((a.H + a.G) * sizeof(Segment));
    if (!packed.ok() || !workers.ok() || !segment_memory.ok()) return out_of_memory;
    Segment *segments = segment_memory.at<Segment>();
    const int64_t count = segments_of(a.C, a.H, a.G, segments);
    pack_forward(a, packed.at<T>());

    parallel(a.threads, a.B * blocks, [&](int64_t item, int worker) {
        const int64_t b = item / blocks, m0 = item % blocks * block_rows, n = smaller(block_rows, a.M - m0);
        const int64_t padded = round_up(n, tile_rows);
        T *acc = workers.at<T>() + worker * worker_size, *zero = acc + acc_size, *tile = zero + a.C;
        fill(zero, a.C, T(0));
        const T *rows[block_rows];
        for (int64_t i = n; i < padded; ++i) rows[i] = zero;
        for (int64_t q0 = 0, q1; q0 < count; q0 = q1) {
            const int64_t g = segments[q0].group;
            for (q1 = q0; q1 < count && segments[q1].group == g;) ++q1;
            for (int64_t from = 0; from < o; from += together) {
                const int64_t to = smaller(o, from + together);
                fill(acc, padded * round_up(to - from, lanes<T>), T(0));
                for (int64_t s = 0; s < a.S; ++s)
                    for (int64_t q = q0; q < q1; ++q) {
                        const Segment seg = segments[q];
                        slot_rows(read, b, m0, n, s, seg, zero, tile, seg.size, rows);
                        for (int64_t o0 = from; o0 < to; o0 += tile_columns<T>) {
                            const int64_t width = panel_width<T>(o, o0);
                            const T *kernel = packed.at<T>() + g * size + a.S * c * o0 + (s * c + seg.first - g * c) * width;
                            for (int64_t i0 = 0; i0 < n; i0 += tile_rows) {
                                T *sums[tile_rows];
                                for (int64_t r = 0; r < tile_rows; ++r)
                                    sums[r] = acc + padded * (o0 - from) + (i0 + r) * width;
                                with_vectors<T>(width, [&](auto v) { multiply<T, v.n>(rows + i0, kernel, seg.size, sums); });
                            }
                        }
                    }
                for (int64_t o0 = from; o0 < to; o0 += tile_columns<T>)
                    for (int64_t i = 0; i < n; ++i)
                        memcpy(a.out + (b * a.M + m0 + i) * a.O + g * o + o0,
                               acc + padded * (o0 - from) + i * panel_width<T>(o, o0),
                               smaller(panel_width<T>(o, o0), o - o0) * sizeof(T));
            }
        }
        for (int64_t i = 0; i < n; ++i)
            if (is_lost(read, b, m0 + i))
                fill(a.out + (b * a.M + m0 + i) * a.O, a.O, std::numeric_limits<T>::quiet_NaN());
    });
    return ok;
}

// For a few outputs it costs more to pack the kernel than to multiply with it: what each of them reads is laid out as a
// row of the kernel is (c, S), and rows are multiplied where they lie.
constexpr int64_t few = 50;
constexpr int few_rows = 4, few_reads = vector_bytes == 64 ? 4 : 2;  // sums that are kept in registers together

template <class T>
void lay_out(const Reader<T> &read, const Segment *segments, int64_t count, int64_t b, int64_t m, int64_t row, int64_t rows,
             T *to) {
    const AggregateArgs<T> &a = read.a;
    const int64_t c = read.group_channels;
    for (int64_t q = 0; q < count; ++q) {
        const Segment seg = segments[q];
        const Slots<T> slots(read, b, m, seg.head);
        T *group = to + (seg.group * rows + row) * c * a.S + (seg.first - seg.group * c) * a.S;
        for (int64_t s = 0; s < a.S; ++s) {
            const int64_t at = slots.at(s);
            const T alpha = slots.alpha(s), none = alpha == alpha ? T(0) : alpha;  // NaN is the output's
            const T *value = at < 0 ? nullptr : read.value(b, at) + seg.first;
            for (int64_t i = 0; i < seg.size; ++i) group[i * a.S + s] = value ? alpha * value[i] : none;
        }
    }
}

template <class T>
int few_forward(const AggregateArgs<T> &a) {
    const Reader<T> read(a);
    const int64_t K = read.group_channels * a.S, o = read.group_out, outputs = a.B * a.M;
    const int64_t rows = round_up(outputs, few_reads), blocks = ceil_div(o, few_rows);
    const Scratch laid(a.G * rows * K * sizeof(T)), segment_memory((a.H + a.G) * sizeof(Segment));
    if (!laid.ok() || !segment_memory.ok()) return out_of_memory;
    Segment *segments = segment_memory.at<Segment>();
    const int64_t count = segments_of(a.C, a.H, a.G, segments);
    parallel(a.threads, rows, [&](int64_t row, int) {
        if (row < outputs) return lay_out(read, segments, count, row / a.M, row % a.M, row, rows, laid.at<T>());
        for (int64_t g = 0; g < a.G; ++g) fill(laid.at<T>() + (g * rows + row) * K, K, T(0));
    });
    parallel(a.threads, a.G * blocks, [&](int64_t item, int) {
        const int64_t g = item / blocks, o0 = item % blocks * few_rows, n = smaller<int64_t>(few_rows, o - o0);
        const T *kernel[few_rows];
        for (int64_t j = 0; j < few_rows; ++j) kernel[j] = a.weight + (g * o + o0 + smaller(j, n - 1)) * K;
        for (int64_t r0 = 0; r0 < rows; r0 += few_reads) {
            const T *reads = laid.at<T>() + (g * rows + r0) * K;
            Vec<T> acc[few_rows][few_reads] = {};
            T rest[few_rows][few_reads] = {};
            int64_t e = 0;
            for (; e + lanes<T> <= K; e += lanes<T>) {
                Vec<T> x[few_reads];
#pragma GCC unroll 4
                for (int r = 0; r < few_reads; ++r) x[r] = load<T>(reads + r * K + e);
#pragma GCC unroll 4
                for (int j = 0; j < few_rows; ++j) {
                    const Vec<T> w = load<T>(kernel[j] + e);
#pragma GCC unroll 4
                    for (int r = 0; r < few_reads; ++r) acc[j][r] = fused<T>(w, x[r], acc[j][r]);
                }
            }
            for (; e < K; ++e)
                for (int j = 0; j < few_rows; ++j)
                    for (int r = 0; r < few_reads; ++r) rest[j][r] += kernel[j][e] * reads[r * K + e];
            for (int64_t j = 0; j < n; ++j)
                for (int64_t r = 0; r < smaller<int64_t>(few_reads, outputs - r0); ++r)
                    a.out[(r0 + r) * a.O + g * o + o0 + j] = sum<T>(acc[j][r]) + rest[j][r];
        }
    });
    for (int64_t row = 0; row < outputs; ++row)
        if (is_lost(read, row / a.M, row % a.M)) fill(a.out + row * a.O, a.O, std::numeric_limits<T>::quiet_NaN());
    return ok;
}

// Which outputs read a position, by slot: the entries of (j, s) are members[start[j * S + s] .. start[j * S + s + 1]].
struct Inverse {
    int32_t *start, *members;
};

template <class T>
void invert(const Reader<T> &read, int64_t b, int64_t h, Inverse to) {
    const int64_t S = read.a.S, E = read.a.entries, bins = read.a.N * S;
    fill<int32_t>(to.start, bins + 1, 0);
    for (int64_t m = 0; m < read.a.M; ++m)
        for (int64_t s = 0; s < S; ++s)
            for (int64_t e = s * E; e < (s + 1) * E; ++e) {
                const int64_t j = read.index(b, m, e, h);
                if (j >= 0) ++to.start[j * S + s + 1];
            }
    for (int64_t i = 0; i < bins; ++i) to.start[i + 1] += to.start[i];
    for (int64_t m = 0; m < read.a.M; ++m)
        for (int64_t s = 0; s < S; ++s)
            for (int64_t e = s * E; e < (s + 1) * E; ++e) {
                const int64_t j = read.index(b, m, e, h);
                if (j >= 0) to.members[to.start[j * S + s]++] = static_cast<int32_t>(m);
            }
    for (int64_t i = bins; i > 0; --i) to.start[i] = to.start[i - 1];  // filling moved every start to its end
    to.start[0] = 0;
}

// Where there is no alpha: all outputs that read a position through one slot send it one product.
template <class T>
int dense_value_gradient(const AggregateBackwardArgs<T> &b_args, const Segment *segments, int64_t count, const T *packed) {
    const AggregateArgs<T> &a = b_args.of;
    const Reader<T> read(a);
    const int64_t o = read.group_out, blocks = ceil_div(a.N, block_rows), problems = a.B * a.H;
    const int64_t inverse_size = round_up(a.N * a.S + 1 + a.M * read.entries(), 16);
    const int64_t tile = (block_rows + 1) * tile_columns<T>, worker_size = round_up(tile + (1 + tile_rows) * o, 16);
    const Scratch inverses(problems * inverse_size * sizeof(int32_t)), workers(a.threads * worker_size * sizeof(T));
    if (!inverses.ok() || !workers.ok()) return out_of_memory;
    const auto inverse_of = [&](int64_t problem) {
        int32_t *start = inverses.at<int32_t>() + problem * inverse_size;
        return Inverse{start, start + a.N * a.S + 1};
    };
    parallel(a.threads, problems,
             [&](int64_t problem, int) { invert(read, problem / a.H, problem % a.H, inverse_of(problem)); });

    parallel(a.threads, problems * blocks, [&](int64_t item, int worker) {
        const int64_t problem = item / blocks, b = problem / a.H, h = problem % a.H;
        const int64_t j0 = item % blocks * block_rows, n = smaller(block_rows, a.N - j0);
        T *acc = workers.at<T>() + worker * worker_size, *spare = acc + block_rows * tile_columns<T>;
        T *zero = acc + tile, *summed = zero + o;
        fill(zero, o, T(0));
        const Inverse inverse = inverse_of(problem);
        const T *base = packed;
        for (int64_t q = 0; q < count; base += packed_size<T>(a.S * o, segments[q].size), ++q) {
            const Segment seg = segments[q];
            if (seg.head != h) continue;
            for (int64_t c0 = 0; c0 < seg.size; c0 += tile_columns<T>) {
                const int64_t width = panel_width<T>(seg.size, c0);
                fill(acc, n * width, T(0));
                for (int64_t s = 0; s < a.S; ++s) {
                    const T *kernel = base + a.S * o * c0 + s * o * width;
                    const T *rows[tile_rows];
                    T *sums[tile_rows];
                    int64_t filled = 0;
                    // six positions that anybody reads through this slot, then the next six
                    const auto flush = [&] {
                        for (int64_t r = filled; r < tile_rows; ++r) rows[r] = zero, sums[r] = spare;
                        with_vectors<T>(width, [&](auto v) { multiply<T, v.n>(rows, kernel, o, sums); });
                        filled = 0;
                    };
                    for (int64_t i = 0; i < n; ++i) {
                        const int32_t *start = inverse.start + (j0 + i) * a.S + s;
                        if (start[0] == start[1]) continue;
                        T *sum = summed + filled * o;
                        sums[filled] = acc + i * width;
                        rows[filled] = sum;
                        for (int32_t at = start[0]; at < start[1]; ++at) {
                            const int64_t m = inverse.members[at];
                            const T *grad = b_args.grad + (b * a.M + m) * a.O + seg.group * o;
                            if (start[1] - start[0] == 1)
                                rows[filled] = grad;
                            else if (at == start[0])
                                memcpy(sum, grad, o * sizeof(T));
                            else
                                add_scaled(sum, T(1), grad, o);
                        }
                        if (++filled == tile_rows) flush();
                    }
                    if (filled) flush();
                }
                for (int64_t i = 0; i < n; ++i)
                    memcpy(b_args.d_value + (b * a.N + j0 + i) * a.C + seg.first + c0, acc + i * width,
                           smaller(width, seg.size - c0) * sizeof(T));
            }
        }
    });
    return ok;
}

// Some channels of a segment, and where their part of the kernel lies.
template <class T>
struct Panel {
    int64_t head, group, first, size, width, before;  // `before`: the widths of the panels before it
    const T *kernel;
};

// Where there is alpha: slopes = W_s^T grad by tiles of outputs, d_alpha = value[index] . slopes, and every entry adds
// alpha * slopes to the position it reads. One product serves both.
template <class T>
int dense_reads_gradient(const AggregateBackwardArgs<T> &b_args, const Segment *segments, int64_t count, const T *packed) {
    const AggregateArgs<T> &a = b_args.of;
    const Reader<T> read(a);
    const int64_t o = read.group_out, blocks = ceil_div(a.M, block_rows);
    const Scratch panel_memory(a.C * sizeof(Panel<T>));
    if (!panel_memory.ok()) return out_of_memory;
    Panel<T> *panels = panel_memory.at<Panel<T>>();
    int64_t panel_count = 0, widths = 0;
    for (int64_t q = 0; q < count; packed += packed_size<T>(a.S * o, segments[q].size), ++q)
        for (int64_t c0 = 0; c0 < segments[q].size; c0 += tile_columns<T>) {
            const int64_t width = panel_width<T>(segments[q].size, c0);
            panels[panel_count++] = {segments[q].head, segments[q].group, segments[q].first + c0,
                                     smaller(width, segments[q].size - c0), width, widths, packed + a.S * o * c0};
            widths += width;
        }

    // a thread that has a sample to itself adds at once; those that share one compute for some blocks, and then add
    const bool apart = a.threads == 1 || (a.B >= a.threads && (a.B % a.threads == 0 || a.B >= 4 * a.threads));
    const int64_t tile = larger<int64_t>(1, block_rows * widths * a.S);
    int64_t shared = larger<int64_t>(a.threads, slope_bytes / (tile * static_cast<int64_t>(sizeof(T))));
    shared = smaller(shared, larger<int64_t>(1, blocks));
    const Scratch slopes((apart ? a.threads * block_rows * tile_columns<T> : shared * tile) * sizeof(T));
    const Scratch zero(o * sizeof(T));
    if (!slopes.ok() || !zero.ok()) return out_of_memory;
    fill(zero.at<T>(), o, T(0));

    const auto compute = [&](int64_t b, int64_t m0, const Panel<T> &panel, int64_t s, T *to) {
        const int64_t n = smaller(block_rows, a.M - m0), E = a.entries;
        fill(to, round_up(n, tile_rows) * panel.width, T(0));
        for (int64_t i0 = 0; i0 < n; i0 += tile_rows) {
            const T *rows[tile_rows];
            T *sums[tile_rows];
            for (int64_t r = 0; r < tile_rows; ++r) {
                rows[r] = i0 + r < n ? b_args.grad + (b * a.M + m0 + i0 + r) * a.O + panel.group * o : zero.at<T>();
                sums[r] = to + (i0 + r) * panel.width;
            }
            const T *kernel = panel.kernel + s * o * panel.width;
            with_vectors<T>(panel.width, [&](auto v) { multiply<T, v.n>(rows, kernel, o, sums); });
        }
        const T *value = read.value(b, 0) + panel.first;
        const bool begins = panel.first == panel.head * read.head_channels;
        Dots<T> dots;
        for (int64_t i = 0; i < n; ++i) {
            const Slots<T> slots(read, b, m0 + i, panel.head);
            T *d_alpha = b_args.d_alpha + b_args.d_alpha_at(b, m0 + i, panel.head);
            for (int64_t e = s * E; e < (s + 1) * E; ++e) {
                const int64_t at = slots.at(e);
                T &slope = d_alpha[e * b_args.d_alpha_stride[2]];
                if (begins) slope = 0;
                if (at >= 0) dots.push(to + i * panel.width, value + at * a.value_stride[1], panel.size, &slope);
            }
        }
        dots.flush(panel.size);
    };
    const auto add = [&](int64_t b, int64_t m0, const Panel<T> &panel, int64_t s, const T *from, int64_t j0, int64_t j1) {
        const int64_t n = smaller(block_rows, a.M - m0), E = a.entries;
        T *d_value = b_args.d_value + b * a.N * a.C + panel.first;
        for (int64_t i = 0; i < n; ++i) {
            const Slots<T> slots(read, b, m0 + i, panel.head);
            for (int64_t e = s * E; e < (s + 1) * E; ++e) {
                const int64_t at = slots.at(e);
                if (at >= j0 && at < j1) add_scaled(d_value + at * a.C, slots.alpha(e), from + i * panel.width, panel.size);
            }
        }
    };

    if (apart) {
        parallel(a.threads, a.B, [&](int64_t b, int worker) {
            T *mine = slopes.at<T>() + worker * block_rows * tile_columns<T>;
            fill(b_args.d_value + b * a.N * a.C, a.N * a.C, T(0));
            for (int64_t block = 0; block < blocks; ++block)
                for (int64_t p = 0; p < panel_count; ++p)
                    for (int64_t s = 0; s < a.S; ++s) {
                        compute(b, block * block_rows, panels[p], s, mine);
                        add(b, block * block_rows, panels[p], s, mine, 0, a.N);
                    }
        });
        return ok;
    }
    const int64_t ranges = smaller<int64_t>(2 * a.threads, larger<int64_t>(1, a.N));
    const auto slopes_of = [&](int64_t block, const Panel<T> &panel, int64_t s) {
        return slopes.at<T>() + block * tile + block_rows * (panel.before * a.S + s * panel.width);
    };
    for (int64_t b = 0; b < a.B; ++b) {
        fill(b_args.d_value + b * a.N * a.C, a.N * a.C, T(0));
        for (int64_t first = 0; first < blocks; first += shared) {
            const int64_t some = smaller(shared, blocks - first);
            parallel(a.threads, some, [&](int64_t block, int) {
                for (int64_t p = 0; p < panel_count; ++p)
                    for (int64_t s = 0; s < a.S; ++s)
                        compute(b, (first + block) * block_rows, panels[p], s, slopes_of(block, panels[p], s));
            });
            parallel(a.threads, ranges, [&](int64_t range, int) {
                for (int64_t block = 0; block < some; ++block)
                    for (int64_t p = 0; p < panel_count; ++p)
                        for (int64_t s = 0; s < a.S; ++s)
                            add(b, (first + block) * block_rows, panels[p], s, slopes_of(block, panels[p], s),
                                a.N * range / ranges, a.N * (range + 1) / ranges);
            });
        }
    }
    return ok;
}

// d_W[s] = sum over outputs of (the slot's row)^T grad: every item owns some rows of it.
template <class T>
int dense_weight_gradient(const AggregateBackwardArgs<T> &b_args, const Segment *segments, int64_t count) {
    const AggregateArgs<T> &a = b_args.of;
    const Reader<T> read(a);
    const int64_t c = read.group_channels, o = read.group_out, together = panels_together * tile_columns<T>;
    int64_t chunk = block_rows;  // channels of an item
    while (chunk > tile_rows && a.S * ceil_div(a.C, chunk) < 4 * a.threads) chunk = round_up(chunk / 2, tile_rows);
    // a panel of grad, accumulators (chunk, width) by panel, rows of zeros, rows that were computed or copied
    const int64_t grad_size = reduce_rows * tile_columns<T>, acc_size = chunk * smaller(together, round_up(o, lanes<T>));
    const int64_t spare = round_up(chunk + tile_rows, 16);
    const int64_t worker_size = grad_size + acc_size + spare * (1 + reduce_rows);
    const Scratch workers(a.threads * worker_size * sizeof(T));
    const Scratch item_memory(a.C * 2 * sizeof(Segment));
    if (!workers.ok() || !item_memory.ok()) return out_of_memory;
    Segment *items = item_memory.at<Segment>();
    int64_t item_count = 0;
    for (int64_t q = 0; q < count; ++q)
        for (int64_t c0 = 0; c0 < segments[q].size; c0 += chunk)
            items[item_count++] = {segments[q].head, segments[q].group, segments[q].first + c0,
                                   smaller(chunk, segments[q].size - c0)};
    const bool plain = a.alpha == nullptr && a.entries == 1;

    parallel(a.threads, item_count * a.S, [&](int64_t item, int worker) {
        const Segment seg = items[item / a.S];
        const int64_t s = item % a.S, padded = round_up(seg.size, tile_rows);
        T *grads = workers.at<T>() + worker * worker_size, *acc = grads + grad_size, *zero = acc + acc_size;
        T *copies = zero + spare;
        fill(zero, spare * (1 + reduce_rows), T(0));
        // the last six may reach past their channels, into rows that follow: rows with too little behind them are copied
        const T *last = read.value(0, a.N - 1) + a.C - padded;
        for (int64_t from = 0; from < o; from += together) {
            const int64_t to = smaller(o, from + together);
            fill(acc, padded * round_up(to - from, lanes<T>), T(0));
            for (int64_t b = 0; b < a.B; ++b)
                for (int64_t m0 = 0; m0 < a.M; m0 += reduce_rows) {
                    const int64_t n = smaller(reduce_rows, a.M - m0);
                    const T *rows[reduce_rows];
                    slot_rows(read, b, m0, n, s, seg, zero, copies, spare, rows);
                    if (plain)
                        for (int64_t i = 0; i < n; ++i) {
                            if (rows[i] <= last + b * a.value_stride[0] || rows[i] == zero) continue;
                            memcpy(copies + i * spare, rows[i], seg.size * sizeof(T));
                            rows[i] = copies + i * spare;
                        }
                    for (int64_t o0 = from; o0 < to; o0 += tile_columns<T>) {
                        const int64_t width = panel_width<T>(o, o0), real = smaller(width, o - o0);
                        const T *panel = b_args.grad + (b * a.M + m0) * a.O + seg.group * o + o0;
                        int64_t stride = a.O;
                        if (real < width) {
                            for (int64_t i = 0; i < n; ++i)
                                for (int64_t j = 0; j < width; ++j)
                                    grads[i * width + j] = j < real ? panel[i * stride + j] : 0;
                            panel = grads;
                            stride = width;
                        }
                        T *sums = acc + padded * (o0 - from);
                        for (int64_t i = 0; i < seg.size; i += tile_rows)
                            with_vectors<T>(width, [&](auto v) {
                                multiply_outer<T, v.n>(rows, i, panel, stride, n, sums + i * width);
                            });
                    }
                }
            for (int64_t o0 = from; o0 < to; o0 += tile_columns<T>) {
                const int64_t width = panel_width<T>(o, o0), real = smaller(width, o - o0);
                const T *sums = acc + padded * (o0 - from);
                for (int64_t i = 0; i < seg.size; ++i)
                    for (int64_t j = 0; j < real; ++j)
                        b_args.d_weight[((seg.group * o + o0 + j) * c + seg.first + i - seg.group * c) * a.S + s] =
                            sums[i * width + j];
            }
        }
    });
    return ok;
}

template <class T>
int dense_backward(const AggregateBackwardArgs<T> &b_args) {
    const AggregateArgs<T> &a = b_args.of;
    const Reader<T> read(a);
    const Scratch segment_memory((a.H + a.G) * sizeof(Segment));
    if (!segment_memory.ok()) return out_of_memory;
    Segment *segments = segment_memory.at<Segment>();
    const int64_t count = segments_of(a.C, a.H, a.G, segments);
    int64_t size = 0;
    for (int64_t q = 0; q < count; ++q) size += packed_size<T>(a.S * read.group_out, segments[q].size);
    const Scratch packed(size * sizeof(T));
    if (!packed.ok()) return out_of_memory;
    pack_backward(a, segments, count, packed.at<T>());
    int status = dense_weight_gradient(b_args, segments, count);
    if (status != ok) return status;
    return a.alpha ? dense_reads_gradient(b_args, segments, count, packed.at<T>())
                   : dense_value_gradient(b_args, segments, count, packed.at<T>());
}

// ---- no dense kernel: alpha, perhaps times a depthwise kernel --------------------------------------------------------

struct Near {  // something that one output reads: where its row and its slot of the kernel begin, and its number
    int64_t row, kernel, entry;
};

// What an output and head reads, without what is missing; how many they are.
template <class T>
inline int64_t list_near(const Reader<T> &read, const Slots<T> &slots, Near *near) {
    int64_t count = 0;
    for (int64_t s = 0; s < read.a.S; ++s)
        for (int64_t e = s * read.a.entries; e < (s + 1) * read.a.entries; ++e) {
            const int64_t at = slots.at(e);
            near[count] = {larger<int64_t>(at, 0) * read.a.value_stride[1], s * read.a.C, e};
            count += at >= 0;
        }
    return count;
}

// to[i] = grad . what near[i] reads, over n channels; writes whole vectors.
template <class T>
inline void all_slopes(const T *grad, const T *value, const Near *near, int64_t count, int64_t n, T *to) {
    int64_t i = 0;
    for (; i + lanes<T> / 4 < count; i += lanes<T>) {
        const T *rows[lanes<T>];
        for (int l = 0; l < lanes<T>; ++l) rows[l] = value + near[smaller(i + l, count - 1)].row;
        store<T>(to + i, dot_products<T>([&](int) { return grad; }, [&](int l) { return rows[l]; }, n));
    }
    for (; i < count; ++i) to[i] = dot_product(grad, value + near[i].row, n);
}

// How many heads one item takes: all that read the same, for then they read whole rows, or one, for what a head reads
// of all positions is to stay in L2.
template <class T>
inline int64_t heads_together(const AggregateArgs<T> &a) {
    return a.index_stride[3] == 0 ? a.H : 1;
}

// Depthwise kernel (C, 1, S) -> (S, C).
template <class T>
void slots_first(const AggregateArgs<T> &a, T *to) {
    for (int64_t c = 0; c < a.C; ++c)
        for (int64_t s = 0; s < a.S; ++s) to[s * a.C + c] = a.weight[c * a.S + s];
}

// One head: value, kernel and out begin at its channels.
template <class T>
struct Head {
    const T *value, *kernel, *alphas;
    T *out;
};

template <class T, bool depthwise, int vectors>
inline void weighted_sum(const Head<T> &head, const Near *near, int64_t count, int64_t first) {
    Vec<T> acc[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) acc[v] = Vec<T>{};
    for (int64_t i = 0; i < count; ++i) {
        const Vec<T> alpha = splat<T>(head.alphas[i]);
        const T *row = head.value + near[i].row + first, *kernel = head.kernel + (depthwise ? near[i].kernel + first : 0);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            Vec<T> x = load<T>(row + v * lanes<T>);
            if constexpr (depthwise) x *= load<T>(kernel + v * lanes<T>);
            acc[v] = fused<T>(alpha, x, acc[v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store<T>(head.out + first + v * lanes<T>, acc[v]);
}

template <class T, bool depthwise>
inline void weighted_sums(const Head<T> &head, const Near *near, int64_t count, int64_t d) {
    int64_t c = 0;
    for (; c + 4 * lanes<T> <= d; c += 4 * lanes<T>) weighted_sum<T, depthwise, 4>(head, near, count, c);
    for (; c + lanes<T> <= d; c += lanes<T>) weighted_sum<T, depthwise, 1>(head, near, count, c);
    for (; c < d; ++c) {
        T total = 0;
        for (int64_t i = 0; i < count; ++i)
            total += head.alphas[i] * head.value[near[i].row + c] * (depthwise ? head.kernel[near[i].kernel + c] : T(1));
        head.out[c] = total;
    }
}

template <class T>
int attend_forward(const AggregateArgs<T> &a) {
    const Reader<T> read(a);
    const int64_t d = read.head_channels, rows = 32, blocks = ceil_div(a.M, rows), together = heads_together(a);
    const int64_t total = read.entries(), worker_bytes = round_up(total * (sizeof(Near) + sizeof(T)), 64);
    const Scratch kernel(a.weight ? a.S * a.C * sizeof(T) : 0), workers(a.threads * worker_bytes);
    if (!kernel.ok() || !workers.ok()) return out_of_memory;
    if (a.weight) slots_first(a, kernel.at<T>());
    parallel(a.threads, a.B * (a.H / together) * blocks, [&](int64_t item, int worker) {
        const int64_t problem = item / blocks, b = problem / (a.H / together), m0 = item % blocks * rows;
        const int64_t h0 = problem % (a.H / together) * together;
        auto *near = workers.at<Near>(worker * worker_bytes);
        T *alphas = reinterpret_cast<T *>(near + total);
        for (int64_t m = m0; m < smaller(m0 + rows, a.M); ++m) {
            const int64_t count = list_near(read, Slots<T>(read, b, m, h0), near);
            const bool gone = is_lost(read, b, m);
            if (a.alpha == nullptr) fill(alphas, count, T(1));
            for (int64_t h = h0; h < h0 + together; ++h) {
                Head<T> head = {read.value(b, 0) + h * d, a.weight ? kernel.at<T>() + h * d : nullptr, alphas,
                                a.out + (b * a.M + m) * a.C + h * d};
                int unknown = gone;
                if (a.alpha != nullptr) {
                    const T *from = a.alpha + read.alpha_at(b, m, 0, h);
                    const int64_t step = a.alpha_stride[2];
                    for (int64_t e = 0; e < total; ++e) unknown |= from[e * step] != from[e * step];
                    if (step == 1 && count == total)
                        head.alphas = from;
                    else
                        for (int64_t i = 0; i < count; ++i) alphas[i] = from[near[i].entry * step];
                }
                if (a.weight)
                    weighted_sums<T, true>(head, near, count, d);
                else
                    weighted_sums<T, false>(head, near, count, d);
                // a NaN in alpha is the output's, whatever the slot reads
                if (unknown) fill(head.out, d, std::numeric_limits<T>::quiet_NaN());
            }
        }
    });
    return ok;
}

// d_alpha by outputs, and with them sums of the kernel's gradient over runs of outputs; d_value by ranges of positions.
template <class T>
int attend_backward(const AggregateBackwardArgs<T> &b_args) {
    const AggregateArgs<T> &a = b_args.of;
    const Reader<T> read(a);
    const int64_t d = read.head_channels, total = a.B * a.M;
    const int64_t rows = larger<int64_t>(32, ceil_div(total, 64)), runs = ceil_div(total, rows);
    const bool depthwise = a.weight != nullptr;
    const int64_t together = heads_together(a), padded = round_up(read.entries(), 16);
    const int64_t worker_bytes = round_up(padded * (sizeof(Near) + sizeof(T)), 64);
    const Scratch kernel(depthwise ? a.S * a.C * sizeof(T) : 0), lists(a.threads * worker_bytes);
    const Scratch sums(depthwise ? runs * a.S * a.C * sizeof(T) : 0);
    const Scratch products(a.threads * round_up(a.C, 16) * sizeof(T));
    if (!kernel.ok() || !lists.ok() || !sums.ok() || !products.ok()) return out_of_memory;
    if (depthwise) slots_first(a, kernel.at<T>());

    if (depthwise || b_args.d_alpha != nullptr)
        parallel(a.threads, a.H / together * runs, [&](int64_t item, int worker) {
            const int64_t h0 = item / runs * together, run = item % runs;
            T *product = products.at<T>() + worker * round_up(a.C, 16), *d_kernels = sums.at<T>() + run * a.S * a.C;
            for (int64_t s = 0; s < (depthwise ? a.S : 0); ++s) fill(d_kernels + s * a.C + h0 * d, together * d, T(0));
            Near *near = lists.at<Near>(worker * worker_bytes);
            T *slopes = reinterpret_cast<T *>(near + padded);
            for (int64_t row = run * rows; row < smaller((run + 1) * rows, total); ++row) {
                const int64_t b = row / a.M, m = row % a.M;
                const int64_t count = list_near(read, Slots<T>(read, b, m, h0), near);
                for (int64_t h = h0; h < h0 + together; ++h) {
                    const T *grad = b_args.grad + row * a.C + h * d, *value = read.value(b, 0) + h * d;
                    const Slots<T> slots(read, b, m, h);
                    T *d_alpha = b_args.d_alpha ? b_args.d_alpha + b_args.d_alpha_at(b, m, h) : nullptr;
                    const int64_t step = b_args.d_alpha_stride[2];
                    for (int64_t i = 0; i < (depthwise ? count : 0); ++i) {
                        const T *x = value + near[i].row;
                        if (i + ahead < count) prefetch(value + near[i + ahead].row, d);
                        for (int64_t c = 0; c < d; ++c) product[c] = grad[c] * x[c];
                        add_scaled(d_kernels + near[i].kernel + h * d, slots.alpha(near[i].entry), product, d);
                        slopes[i] = dot_product(product, kernel.at<T>() + near[i].kernel + h * d, d);
                    }
                    if (d_alpha == nullptr) continue;
                    if (!depthwise) all_slopes(grad, value, near, count, d, slopes);
                    if (step == 1 && count == read.entries()) {
                        memcpy(d_alpha, slopes, count * sizeof(T));
                        continue;
                    }
                    for (int64_t e = 0; e < read.entries(); ++e) d_alpha[e * step] = 0;
                    for (int64_t i = 0; i < count; ++i) d_alpha[near[i].entry * step] = slopes[i];
                }
            }
        });
    if (depthwise)
        parallel(a.threads, a.C, [&](int64_t c, int) {
            for (int64_t s = 0; s < a.S; ++s) {
                T whole = 0;
                for (int64_t run = 0; run < runs; ++run) whole += sums.at<T>()[(run * a.S + s) * a.C + c];
                b_args.d_weight[c * a.S + s] = whole;
            }
        });

    if (b_args.d_value == nullptr) return ok;
    const int64_t problems = a.B * (a.H / together);
    int64_t ranges = problems >= a.threads ? 1 : ceil_div(2 * a.threads, problems);
    ranges = smaller(ranges, larger<int64_t>(1, a.N));
    parallel(a.threads, problems * ranges, [&](int64_t item, int) {
        const int64_t problem = item / ranges, b = problem / (a.H / together), part = item % ranges;
        const int64_t h0 = problem % (a.H / together) * together, width = together * d;
        const int64_t E = a.entries, entries = read.entries();
        const int64_t j0 = a.N * part / ranges, j1 = a.N * (part + 1) / ranges;
        T *d_value = b_args.d_value + b * a.N * a.C + h0 * d;
        for (int64_t j = j0; j < j1; ++j) fill(d_value + j * a.C, width, T(0));
        for (int64_t m = 0; m < a.M; ++m) {
            const T *grad = b_args.grad + (b * a.M + m) * a.C + h0 * d;
            const Slots<T> slots(read, b, m, h0);
            for (int64_t e = 0; e < entries; ++e) {
                const int64_t j = slots.at(e);
                if (e + ahead < entries) {
                    const int64_t next = slots.at(e + ahead);
                    if (next >= j0 && next < j1) prefetch(d_value + next * a.C, width);
                }
                if (j < j0 || j >= j1) continue;
                T *to = d_value + j * a.C;
                const T *w = depthwise ? kernel.at<T>() + (E == 1 ? e : e / E) * a.C + h0 * d : nullptr;
                int64_t h = 0;
                do {
                    const T factor = slots.alphas ? slots.alphas[e * slots.alpha_step + h * a.alpha_stride[3]] : T(1);
                    if (!depthwise)
                        add_scaled(to + h * d, factor, grad + h * d, d);
                    else
                        for (int64_t c = h * d; c < (h + 1) * d; ++c) to[c] += factor * grad[c] * w[c];
                } while (++h < together);
            }
        }
    });
    return ok;
}

template <class T>
int aggregate(const AggregateArgs<T> &a) {
    const int status = check_index(a);
    if (status != ok) return status;
    if (!Reader<T>(a).dense()) return attend_forward(a);
    return a.B * a.M <= few && a.entries == 1 ? few_forward(a) : dense_forward(a);
}

template <class T>
int aggregate_backward(const AggregateBackwardArgs<T> &a) {
    const int status = check_index(a.of);
    if (status != ok) return status;
    return Reader<T>(a.of).dense() ? dense_backward(a) : attend_backward(a);
}

}  // namespace

int aggregate_float(const AggregateArgs<float> &a) { return aggregate(a); }
int aggregate_double(const AggregateArgs<double> &a) { return aggregate(a); }
int aggregate_backward_float(const AggregateBackwardArgs<float> &a) { return aggregate_backward(a); }
int aggregate_backward_double(const AggregateBackwardArgs<double> &a) { return aggregate_backward(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

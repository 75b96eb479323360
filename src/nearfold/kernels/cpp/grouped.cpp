// A convolution of many small groups. A group's channels are gathered from several maps while they are packed, so that
// the maps are never joined; one load of an input serves every output of its group.
//
// Packed rows (window.h): keys hold the inputs of a group, queries, in the backward, the gradients of its outputs.
#include "engine.h"
#include "window.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int block = 4;  // outputs at a time

// to[o] = sum over slots and inputs of weight[s][f][o] * near[s][f], for `outs` outputs and `vectors` vectors.
template <class T, int outs, int vectors>
inline void convolve_block(const T *const *near, const T *const *weight, int64_t slots, int64_t pitch, int64_t inputs,
                           int64_t weight_pitch, T *to, int64_t to_pitch) {
    Vec<T> acc[outs][vectors];
#pragma GCC unroll 4
    for (int o = 0; o < outs; ++o)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) acc[o][v] = Vec<T>{};
    for (int64_t s = 0; s < slots; ++s) {
        const T *from = near[s], *by = weight[s];
        for (int64_t f = 0; f < inputs; ++f, from += pitch, by += weight_pitch) {
            Vec<T> x[vectors];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) x[v] = load_once<T>(from + v * lanes<T>);
#pragma GCC unroll 4
            for (int o = 0; o < outs; ++o) {
                const Vec<T> w = splat<T>(by[o]);
#pragma GCC unroll 2
                for (int v = 0; v < vectors; ++v) acc[o][v] = fused<T>(w, x[v], acc[o][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int o = 0; o < outs; ++o)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) store<T>(to + o * to_pitch + v * lanes<T>, acc[o][v]);
}

// The slots of a tile: what each reads, and its weights.
template <class T>
struct Slots {
    const T **near, **weight;
    int64_t count;
};

template <class T, int vectors>
inline void convolve_tile(const Slots<T> &slots, const T **weight, int64_t pitch, int64_t inputs, int64_t outs, T *to,
                          int64_t to_pitch) {
    for (int64_t s = 0; s < slots.count; ++s) weight[s] = slots.weight[s];
    int64_t o = 0;
    const auto step = [&](auto count) {
        constexpr int n = decltype(count)::n;
        convolve_block<T, n, vectors>(slots.near, weight, slots.count, pitch, inputs, outs, to + o * to_pitch, to_pitch);
        for (int64_t s = 0; s < slots.count; ++s) weight[s] += n;
        o += n;
    };
    while (o + block <= outs) step(Count<block>{});
    if (o + 2 <= outs) step(Count<2>{});
    if (o < outs) step(Count<1>{});
}
template <class T>
inline void convolve(const Slots<T> &slots, const T **weight, int64_t pitch, int64_t inputs, int64_t outs, int vectors,
                     T *to, int64_t to_pitch) {
    if (vectors == 2)
        convolve_tile<T, 2>(slots, weight, pitch, inputs, outs, to, to_pitch);
    else
        convolve_tile<T, 1>(slots, weight, pitch, inputs, outs, to, to_pitch);
}

// sums[o * sums_pitch + i * slot_step] = sum over rows and positions of grad[row][o] * near[row][i].
template <class T, int outs, int ins>
inline void correlate_block(const T *const *grad, const T *const *near, int64_t rows, int64_t tiles, int64_t grad_pitch,
                            int64_t pitch, T *sums, int64_t out_step, int64_t in_step) {
    Vec<T> acc[outs][ins];
#pragma GCC unroll 4
    for (int o = 0; o < outs; ++o)
#pragma GCC unroll 4
        for (int i = 0; i < ins; ++i) acc[o][i] = Vec<T>{};
    for (int64_t r = 0; r < rows; ++r) {
        const T *g = grad[r], *x = near[r];
        for (int64_t tile = 0; tile < tiles; ++tile, g += lanes<T>, x += lanes<T>) {
            Vec<T> here[ins];
#pragma GCC unroll 4
            for (int i = 0; i < ins; ++i) here[i] = load_once<T>(x + i * pitch);
#pragma GCC unroll 4
            for (int o = 0; o < outs; ++o) {
                const Vec<T> by = load<T>(g + o * grad_pitch);
#pragma GCC unroll 4
                for (int i = 0; i < ins; ++i) acc[o][i] = fused<T>(by, here[i], acc[o][i]);
            }
        }
    }
#pragma GCC unroll 4
    for (int o = 0; o < outs; ++o)
#pragma GCC unroll 4
        for (int i = 0; i < ins; ++i) sums[o * out_step + i * in_step] = sum<T>(acc[o][i]);
}

// One problem: image b, group g.
template <class T>
struct Group {
    static constexpr int L = lanes<T>;
    const GroupedArgs<T> &a;
    const Layout<T> &l;
    const int64_t *at;
    const T *weight;  // of this group: (slots, I, O) forward, (slots, O, I) backward
    int64_t b, g;
    T *keys, *queries, *found;

    const Window &w() const { return a.window; }
    int64_t key_row() const { return a.I * l.pitch; }
    int64_t query_row() const { return a.O * l.query_pitch; }

    void pack_inputs(int64_t r) const {
        T *to = keys + r * key_row();
        for (int64_t m = 0; m < a.maps; ++m) {
            const Map<const T> &map = a.map[m];  // (B, G, inputs, ...): a group's inputs are the features
            pack_key_row(w(), l, row_of(map, b, g, r, w().grid[1]), map.stride[2], map.stride[5], a.inputs[m], to);
            to += a.inputs[m] * l.pitch;
        }
    }

    void forward_tile(int64_t r, int64_t x0, int vectors, Slots<T> slots, const T **weights, T *result) const {
        const int64_t o0 = r / w().out[1], o1 = r % w().out[1];
        slots.count = 0;
        for (int64_t k0 = 0; k0 < w().size[0]; ++k0) {
            const int64_t i0 = reads(w(), 0, o0, k0);
            if (i0 < 0) continue;
            for (int64_t k1 = 0; k1 < w().size[1]; ++k1) {
                const int64_t i1 = reads(w(), 1, o1, k1);
                if (i1 < 0) continue;
                const T *row = keys + (i0 * w().grid[1] + i1) * key_row() + x0;
                for (int64_t k = 0; k < w().size[2]; ++k) {
                    slots.near[slots.count] = row + at[2 * k] * l.length + at[2 * k + 1];
                    slots.weight[slots.count++] = weight + ((k0 * w().size[1] + k1) * w().size[2] + k) * a.I * a.O;
                }
            }
        }
        convolve(slots, weights, l.pitch, a.I, a.O, vectors, result, 2 * L);
        const int64_t n = smaller<int64_t>(vectors * L, w().out[2] - x0);
        // out is (B, O, G, ...): the outputs of a group are the features
        T *to = a.out.data + b * a.out.stride[0] + g * a.out.stride[2] + r / w().out[1] * a.out.stride[3] +
                r % w().out[1] * a.out.stride[4] + x0 * a.out.stride[5];
        scatter_rows(result, 2 * L, a.O, n, to, a.out.stride[1], a.out.stride[5]);
    }

    void pack_gradients(const Map<const T> &grad, int64_t r) const {
        const T *from = grad.data + b * grad.stride[0] + g * grad.stride[2] + r / w().out[1] * grad.stride[3] +
                        r % w().out[1] * grad.stride[4];
        gather_rows(from, grad.stride[1], grad.stride[5], a.O, w().out[2], queries + r * query_row() + l.left,
                    l.query_pitch);
    }

    // Gradient of one slot's weights: to (O, I, slots).
    void weight_slot(int64_t slot, Slots<T> rows, T *to) const {
        const int64_t k = slot % w().size[2], k1 = slot / w().size[2] % w().size[1], k0 = slot / w().size[2] / w().size[1];
        rows.count = 0;
        for (int64_t r = 0; r < l.out_rows; ++r) {
            const int64_t i0 = reads(w(), 0, r / w().out[1], k0), i1 = reads(w(), 1, r % w().out[1], k1);
            if (i0 < 0 || i1 < 0) continue;
            rows.near[rows.count] = keys + (i0 * w().grid[1] + i1) * key_row() + at[2 * k] * l.length + at[2 * k + 1];
            rows.weight[rows.count++] = queries + r * query_row() + l.left;
        }
        int64_t o = 0, i = 0;
        const auto step = [&](auto outs, auto ins) {
            constexpr int n = decltype(outs)::n, m = decltype(ins)::n;
            correlate_block<T, n, m>(rows.weight, rows.near, rows.count, l.tiles, l.query_pitch, l.pitch,
                                     to + (o * a.I + i) * l.slots + slot, a.I * l.slots, l.slots);
            for (int64_t r = 0; r < rows.count; ++r) rows.near[r] += m * l.pitch;
            i += m;
        };
        const auto all_inputs = [&](auto outs) {
            for (i = 0; i + block <= a.I;) step(outs, Count<block>{});
            if (i + 2 <= a.I) step(outs, Count<2>{});
            if (i < a.I) step(outs, Count<1>{});
            for (int64_t r = 0; r < rows.count; ++r) {
                rows.near[r] -= a.I * l.pitch;
                rows.weight[r] += decltype(outs)::n * l.query_pitch;
            }
            o += decltype(outs)::n;
        };
        while (o + block <= a.O) all_inputs(Count<block>{});
        if (o + 2 <= a.O) all_inputs(Count<2>{});
        if (o < a.O) all_inputs(Count<1>{});
    }

    // The inputs' gradients of row r, into `found`, packed as the keys are.
    void input_row(int64_t r, const Readers *readers, Slots<T> slots, const T **weights) const {
        const int64_t i0 = r / w().grid[1], i1 = r % w().grid[1];
        each_key_vector(w(), l, 2, [&](int64_t phase, int64_t i, int vectors) {
            slots.count = 0;
            for (int64_t m = readers[0].begin(i0); m < readers[0].end(i0); ++m)
                for (int64_t n = readers[1].begin(i1); n < readers[1].end(i1); ++n) {
                    const T *row = queries + (readers[0].output(m) * w().out[1] + readers[1].output(n)) * query_row();
                    const int64_t k01 = readers[0].slot(m) * w().size[1] + readers[1].slot(n);
                    for (int64_t k = 0; k < w().size[2]; ++k) {
                        const int64_t shift = at[2 * k + 1];
                        if (at[2 * k] != phase || i + vectors * L <= shift || i - shift >= w().out[2]) continue;
                        slots.near[slots.count] = row + l.left + i - shift;
                        slots.weight[slots.count++] = weight + (k01 * w().size[2] + k) * a.I * a.O;
                    }
                }
            convolve(slots, weights, l.query_pitch, a.O, a.I, vectors, found + r * key_row() + phase * l.length + i,
                     l.pitch);
        });
    }

    void unpack_inputs(const Map<T> *d_map, int64_t r) const {
        T *from = found + r * key_row();
        for (int64_t m = 0; m < a.maps; ++m) {
            const Map<T> &map = d_map[m];
            unpack_key_row(w(), l, from, a.inputs[m], row_of(map, b, g, r, w().grid[1]), map.stride[2], map.stride[5]);
            from += a.inputs[m] * l.pitch;
        }
    }
};

// Weights (G, O, I, slots) -> (G, slots, I, O), or (G, slots, O, I).
template <class T>
void arrange(const GroupedArgs<T> &a, int64_t slots, bool inputs_last, T *to) {
    for (int64_t g = 0; g < a.G; ++g)
        for (int64_t o = 0; o < a.O; ++o)
            for (int64_t i = 0; i < a.I; ++i)
                for (int64_t s = 0; s < slots; ++s) {
                    const int64_t place = inputs_last ? o * a.I + i : i * a.O + o;
                    to[(g * slots + s) * a.I * a.O + place] = a.weight[((g * a.O + o) * a.I + i) * slots + s];
                }
}

// Memory of one worker: lists of slots or rows, and a tile of results.
template <class T>
struct Lists {
    static int64_t bytes(int64_t entries, int64_t outs) {
        return round_up(3 * entries * sizeof(T *), 64) + outs * 2 * vector_bytes;
    }
    Lists(const Scratch &memory, int64_t at, int64_t entries) {
        slots = {memory.at<const T *>(at), memory.at<const T *>(at) + entries, 0};
        weights = slots.weight + entries;
        result = memory.at<T>(at + round_up(3 * entries * sizeof(T *), 64));
    }
    Slots<T> slots;
    const T **weights;
    T *result;
};

template <class T>
int grouped(const GroupedArgs<T> &a) {
    const Layout<T> l(a.window);
    const Work work(a.B, a.G, a.threads);
    const int64_t key_bytes = round_up(l.rows * a.I * l.pitch * sizeof(T), 64);
    const int64_t list_bytes = round_up(Lists<T>::bytes(l.slots, a.O), 64);
    const Scratch table(2 * a.window.size[2] * sizeof(int64_t)), weights(a.G * l.slots * a.I * a.O * sizeof(T)),
        packed(work.at_once() * key_bytes), lists(a.threads * list_bytes);
    if (!table.ok() || !weights.ok() || !packed.ok() || !lists.ok()) return out_of_memory;
    place_slots(a.window, table.at<int64_t>());
    arrange(a, l.slots, false, weights.at<T>());
    memset(packed.at<T>(), 0, work.at_once() * key_bytes);
    const int64_t pairs = ceil_div(l.tiles, 2);
    work.each_problem([&](int64_t b, int64_t g, int of) {
        const Group<T> group{a, l, table.at<int64_t>(), weights.at<T>() + g * l.slots * a.I * a.O, b, g,
                             packed.at<T>(of * key_bytes), nullptr, nullptr};
        work.each(l.rows, of, [&](int64_t r, int) { group.pack_inputs(r); });
        work.each(l.out_rows * pairs, of, [&](int64_t tile, int worker) {
            const Lists<T> own(lists, worker * list_bytes, l.slots);
            const int64_t first = tile % pairs * 2;
            group.forward_tile(tile / pairs, first * lanes<T>, first + 1 < l.tiles ? 2 : 1, own.slots, own.weights,
                               own.result);
        });
    });
    return ok;
}

template <class T>
int grouped_backward(const GroupedBackwardArgs<T> &all) {
    const GroupedArgs<T> &a = all.of;
    const Window &w = a.window;
    const Layout<T> l(w);
    const Work work(a.B, a.G, a.threads);
    const int64_t key_bytes = round_up(l.rows * a.I * l.pitch * sizeof(T), 64);
    const int64_t query_bytes = round_up(l.out_rows * a.O * l.query_pitch * sizeof(T), 64);
    const int64_t packed_bytes = 2 * key_bytes + query_bytes;
    const int64_t slot_bytes = round_up(2 * w.size[2] * sizeof(int64_t), 64);
    const int64_t first_bytes = round_up(Readers::bytes(w, 0), 64);
    const Scratch table(slot_bytes + first_bytes + Readers::bytes(w, 1));
    if (!table.ok()) return out_of_memory;
    place_slots(w, table.at<int64_t>());
    const Readers readers[2] = {{w, 0, table.at<int64_t>(slot_bytes)}, {w, 1, table.at<int64_t>(slot_bytes + first_bytes)}};
    const int64_t entries = larger(l.out_rows, readers[0].most * readers[1].most * w.size[2]);
    const int64_t list_bytes = round_up(Lists<T>::bytes(entries, 0), 64), weight_count = a.O * a.I * l.slots;
    const Scratch weights(a.G * weight_count * sizeof(T)), partial(a.B * a.G * weight_count * sizeof(T)),
        packed(work.at_once() * packed_bytes), lists(a.threads * list_bytes);
    if (!weights.ok() || !partial.ok() || !packed.ok() || !lists.ok()) return out_of_memory;
    arrange(a, l.slots, true, weights.at<T>());
    memset(packed.at<T>(), 0, work.at_once() * packed_bytes);
    work.each_problem([&](int64_t b, int64_t g, int of) {
        const Group<T> group{a, l, table.at<int64_t>(), weights.at<T>() + g * weight_count, b, g,
                             packed.at<T>(of * packed_bytes), packed.at<T>(of * packed_bytes + key_bytes),
                             packed.at<T>(of * packed_bytes + key_bytes + query_bytes)};
        work.each(l.rows, of, [&](int64_t r, int) { group.pack_inputs(r); });
        work.each(l.out_rows, of, [&](int64_t r, int) { group.pack_gradients(all.grad, r); });
        work.each(l.slots, of, [&](int64_t slot, int worker) {
            const Lists<T> own(lists, worker * list_bytes, entries);
            group.weight_slot(slot, own.slots, partial.at<T>() + (b * a.G + g) * weight_count);
        });
        work.each(l.rows, of, [&](int64_t r, int worker) {
            const Lists<T> own(lists, worker * list_bytes, entries);
            group.input_row(r, readers, own.slots, own.weights);
        });
        work.each(l.rows, of, [&](int64_t r, int) { group.unpack_inputs(all.d_map, r); });
    });
    for (int64_t i = 0; i < a.G * weight_count; ++i) {
        T total = 0;
        for (int64_t b = 0; b < a.B; ++b) total += partial.at<T>()[b * a.G * weight_count + i];
        all.d_weight[i] = total;
    }
    return ok;
}

}  // namespace

int grouped_float(const GroupedArgs<float> &a) { return grouped(a); }
int grouped_double(const GroupedArgs<double> &a) { return grouped(a); }
int grouped_backward_float(const GroupedBackwardArgs<float> &a) { return grouped_backward(a); }
int grouped_backward_double(const GroupedBackwardArgs<double> &a) { return grouped_backward(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

// ACmix's convolution: every group of channels is mapped, and the maps are shifted and summed. Both make one kernel of a
// grouped convolution. Rows of slots are padded to whole vectors.
#include "kernels.h"
#include "simd.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

// Sizes: S slots of a row, in `width` numbers with the padding.
template <class T>
struct Merge {
    const T *mix, *shift;  // (t, I), (O, t, S)
    int64_t t, I, O, S, width;

    explicit Merge(const ShiftArgs<T> &a)
        : mix(a.mix), shift(a.shift), t(a.t), I(a.of.I), O(a.of.G * a.of.O),
          S(a.of.window.size[0] * a.of.window.size[1] * a.of.window.size[2]), width(round_up(S, lanes<T>)) {}

    // So many rows of S numbers, with zeros behind each.
    void pad(const T *from, int64_t rows, T *to) const {
        for (int64_t r = 0; r < rows; ++r, from += S, to += width) {
            for (int64_t s = 0; s < S; ++s) to[s] = from[s];
            for (int64_t s = S; s < width; ++s) to[s] = 0;
        }
    }

    // The kernel (O, I, S): rows of `shift` by those of `mix`. Writes a vector beyond its end.
    void kernel(T *rows, T *to) const {
        for (int64_t o = 0; o < O; ++o) {
            pad(shift + o * t * S, t, rows);
            for (int64_t i = 0; i < I; ++i, to += S)
                for (int64_t s = 0; s < S; s += lanes<T>) {
                    Vec<T> sum{};
                    for (int64_t j = 0; j < t; ++j)
                        sum = fused<T>(splat<T>(mix[j * I + i]), load<T>(rows + j * width + s), sum);
                    store<T>(to + s, sum);  // what is too much, the next row overwrites
                }
        }
    }

    // Its gradients, of the kernel's gradient `slopes`. `rows` holds t + I + 1 of them, `sums` t * I vectors.
    void backward(const T *slopes, T *rows, T *sums, T *d_mix, T *d_shift) const {
        T *near = rows + t * width, *found = near + I * width;
        fill(sums, t * I * lanes<T>, T(0));
        for (int64_t o = 0; o < O; ++o, slopes += I * S) {
            pad(shift + o * t * S, t, rows);
            pad(slopes, I, near);
            for (int64_t j = 0; j < t; ++j, d_shift += S) {
                for (int64_t s = 0; s < S; s += lanes<T>) {
                    const Vec<T> by = load<T>(rows + j * width + s);
                    Vec<T> sum{};
                    for (int64_t i = 0; i < I; ++i) {
                        const Vec<T> slope = load<T>(near + i * width + s);
                        T *onto = sums + (j * I + i) * lanes<T>;
                        sum = fused<T>(splat<T>(mix[j * I + i]), slope, sum);
                        store<T>(onto, fused<T>(by, slope, load<T>(onto)));
                    }
                    store<T>(found + s, sum);
                }
                for (int64_t s = 0; s < S; ++s) d_shift[s] = found[s];
            }
        }
        for (int64_t n = 0; n < t * I; ++n) d_mix[n] = sum<T>(load<T>(sums + n * lanes<T>));
    }
};

template <class T>
int shift(const ShiftArgs<T> &a) {
    const Merge<T> merge(a);
    const Scratch kernel((merge.O * merge.I * merge.S + lanes<T>) * sizeof(T)), rows(merge.t * merge.width * sizeof(T));
    if (!kernel.ok() || !rows.ok()) return out_of_memory;
    merge.kernel(rows.at<T>(), kernel.at<T>());
    GroupedArgs<T> sums = a.of;
    sums.weight = kernel.at<T>();
    return Kernels<T>::grouped(sums);
}

template <class T>
int shift_backward(const ShiftBackwardArgs<T> &a) {
    const Merge<T> merge(a.by);
    const int64_t count = merge.O * merge.I * merge.S, products = merge.t * merge.I;
    const Scratch kernel((count + lanes<T>) * sizeof(T)), slopes(count * sizeof(T)), sums(products * vector_bytes);
    const Scratch rows((merge.t + merge.I + 1) * merge.width * sizeof(T));
    for (const Scratch *each : {&kernel, &slopes, &sums, &rows})
        if (!each->ok()) return out_of_memory;
    merge.kernel(rows.at<T>(), kernel.at<T>());
    GroupedBackwardArgs<T> all = a.of;
    all.of = a.by.of, all.of.weight = kernel.at<T>(), all.d_weight = slopes.at<T>();
    const int status = Kernels<T>::grouped_backward(all);
    if (status == ok) merge.backward(slopes.at<T>(), rows.at<T>(), sums.at<T>(), a.d_mix, a.d_shift);
    return status;
}

}  // namespace

int shift_float(const ShiftArgs<float> &a) { return shift(a); }
int shift_double(const ShiftArgs<double> &a) { return shift(a); }
int shift_backward_float(const ShiftBackwardArgs<float> &a) { return shift_backward(a); }
int shift_backward_double(const ShiftBackwardArgs<double> &a) { return shift_backward(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

// A whole layer over a window whose slots are moved, in one call: the convolution that makes the offsets, the corners of
// every slot, blended sums and the bias. On small maps what lies between these kernels costs more than they do.
#include "exponential.h"
#include "kernels.h"
#include "rows.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

// One over one plus exp(-x).
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
    const Vec<T> one = splat<T>(1), e = exponential<T>(x < 0 ? x : -x);  // of -|x|: it does not overflow
    return (x < 0 ? e : one) / (one + e);
}

// What the steps of a call share.
template <class T>
struct Deformed {
    const DeformedArgs<T> &a;
    int64_t entries, offsets, masks, made;  // corners of a slot; numbers that the convolution makes of an output
    Rows<T> value, input;
    const T *kernel;  // (made, I, S)
    int64_t *window;  // (M, S): what the slots read before they are moved
    int64_t *index;   // (B, H, S * entries, M)
    T *share;

    explicit Deformed(const DeformedArgs<T> &args)
        : a(args), entries(int64_t{1} << a.axes), offsets(a.H * a.S * a.axes), masks(a.mask_weight ? a.H * a.S : 0),
          made(offsets + masks) {}

    bool input_is_value() const { return same_map(a.input, a.value) && a.I == a.C; }
    int64_t reads() const { return a.B * a.H * a.S * entries * a.M; }
    int64_t value_size() const { return has_rows(a.value, a.C, a.N) ? 0 : a.B * a.N * a.C; }
    int64_t input_size() const { return input_is_value() || has_rows(a.input, a.I, a.N) ? 0 : a.B * a.N * a.I; }
    int64_t kernel_size() const { return masks ? made * a.I * a.S : 0; }
    T *masks_of(T *moved) const { return moved + a.B * offsets * a.M; }

    // `numbers` holds value_size + input_size + kernel_size + reads, `positions` M * S + reads.
    void begin(T *numbers, int64_t *positions) {
        value = rows_of(a.value, a.B, a.C, a.N, numbers, a.threads);
        numbers += value_size();
        input = input_is_value() ? value : rows_of(a.input, a.B, a.I, a.N, numbers, a.threads);
        numbers += input_size();
        kernel = a.offset_weight;
        if (masks) {
            memcpy(numbers, a.offset_weight, offsets * a.I * a.S * sizeof(T));
            memcpy(numbers + offsets * a.I * a.S, a.mask_weight, masks * a.I * a.S * sizeof(T));
            kernel = numbers;
        }
        share = numbers + kernel_size(), window = positions, index = positions + a.M * a.S;
        const Window &w = a.window;
        for (int64_t m = 0; m < a.M; ++m)
            for (int64_t s = 0; s < a.S; ++s) {
                int64_t at = 0, step = 1, output = m, slot = s;
                bool inside = true;
                for (int x = 2; x >= 0; --x) {
                    const int64_t place = output % w.out[x] * w.stride[x] + slot % w.size[x] * w.dilation[x] - w.before[x];
                    inside &= place >= 0 && place < w.grid[x];
                    at += place * step, step *= w.grid[x], output /= w.out[x], slot /= w.size[x];
                }
                window[m * a.S + s] = inside ? at : invalid;
            }
    }

    // The convolution of the input that makes offsets and masks, as sums.
    AggregateArgs<T> convolution() const {
        AggregateArgs<T> sums;
        sums.value = input.at, sums.index = window, sums.alpha = nullptr, sums.weight = kernel;
        sums.value_stride[0] = input.stride[0], sums.value_stride[1] = input.stride[1];
        const int64_t stride[4] = {0, a.S, 1, 0};
        memcpy(sums.index_stride, stride, sizeof stride);
        memset(sums.alpha_stride, 0, sizeof sums.alpha_stride);
        sums.B = a.B, sums.N = a.N, sums.C = a.I, sums.M = a.M, sums.S = a.S, sums.H = 1, sums.O = made, sums.G = 1;
        sums.entries = 1, sums.out = nullptr, sums.threads = a.threads;
        return sums;
    }

    // Rows (B, M, made) of it -> `moved`.
    void spread(const T *rows, T *moved) const {
        T *masks_to = masks_of(moved);
        parallel(a.threads, a.B * made, [&](int64_t item, int) {
            const int64_t b = item / made, d = item % made, mask = d - offsets;
            const T *biases = mask < 0 ? a.offset_bias : a.mask_bias, *from = rows + b * a.M * made + d;
            const T bias = biases ? biases[mask < 0 ? d : mask] : T(0);
            T *to = mask < 0 ? moved + (b * offsets + d) * a.M : masks_to + (b * masks + mask) * a.M;
            for (int64_t m = 0; m < a.M; ++m) to[m] = from[m * made] + bias;
            for (int64_t m = 0; mask >= 0 && m < a.M; m += lanes<T>) {
                const int64_t n = smaller<int64_t>(lanes<T>, a.M - m);
                Vec<T> x{};
                memcpy(&x, to + m, n * sizeof(T));
                x = sigmoid<T>(x);
                memcpy(to + m, &x, n * sizeof(T));
            }
        });
    }

    CornersArgs<T> corners(const T *moved) const {
        CornersArgs<T> found;
        found.window = a.window, found.axes = a.axes, found.planes = a.B * a.H, found.S = a.S, found.M = a.M;
        found.offset = moved, found.mask = masks ? masks_of(const_cast<T *>(moved)) : nullptr;
        found.index = index, found.share = share, found.threads = a.threads;
        return found;
    }

    // The sums over the corners. Without a kernel these are slots like all others.
    AggregateArgs<T> sums() const {
        AggregateArgs<T> sums;
        sums.value = value.at, sums.index = index, sums.alpha = share, sums.weight = a.weight;
        sums.value_stride[0] = value.stride[0], sums.value_stride[1] = value.stride[1];
        const int64_t S = a.S * entries, stride[4] = {a.H * S * a.M, 1, a.M, S * a.M};
        memcpy(sums.index_stride, stride, sizeof stride);
        memcpy(sums.alpha_stride, stride, sizeof stride);
        sums.entries = a.weight ? entries : 1, sums.S = S / sums.entries;
        sums.B = a.B, sums.N = a.N, sums.C = a.C, sums.M = a.M, sums.H = a.H, sums.O = a.O, sums.G = a.G;
        sums.out = a.out, sums.threads = a.threads;
        return sums;
    }
};

template <class T>
int deformed(const DeformedArgs<T> &a) {
    Deformed<T> work(a);
    const int64_t made = a.B * a.M * work.made;
    const Scratch numbers((work.value_size() + work.input_size() + work.kernel_size() + work.reads()) * sizeof(T));
    const Scratch positions((a.M * a.S + work.reads()) * sizeof(int64_t));
    const Scratch rows(made * sizeof(T)), own_moved(a.moved ? 0 : made * sizeof(T));
    for (const Scratch *each : {&numbers, &positions, &rows, &own_moved})
        if (!each->ok()) return out_of_memory;
    work.begin(numbers.at<T>(), positions.at<int64_t>());
    T *moved = a.moved ? a.moved : own_moved.at<T>();
    AggregateArgs<T> convolution = work.convolution();
    convolution.out = rows.at<T>();
    int status = Kernels<T>::aggregate(convolution);
    if (status != ok) return status;
    work.spread(rows.at<T>(), moved);
    status = Kernels<T>::corners(work.corners(moved));
    if (status == ok) status = Kernels<T>::aggregate(work.sums());
    if (status == ok && a.bias) add_to_rows(a.bias, a.B * a.M, a.O, a.out, a.threads);
    return status;
}

// `whole` begins with what belongs to the offsets, and what belongs to the masks follows: n numbers of each.
template <class T>
void split(const Deformed<T> &work, const T *whole, int64_t n, T *offsets, T *masks) {
    if (offsets && offsets != whole) memcpy(offsets, whole, work.offsets * n * sizeof(T));
    if (masks) memcpy(masks, whole + work.offsets * n, work.masks * n * sizeof(T));
}

template <class T>
int deformed_backward(const DeformedBackwardArgs<T> &args) {
    const DeformedArgs<T> &a = args.of;
    Deformed<T> work(a);
    const int64_t made = a.B * a.M * work.made, outputs = a.B * a.M * a.O, kernel_size = work.kernel_size();
    const bool direct = is_rows(args.grad, a.O, a.M), both = args.d_input == nullptr;
    const Scratch numbers((work.value_size() + work.input_size() + kernel_size + work.reads()) * sizeof(T));
    const Scratch positions((a.M * a.S + work.reads()) * sizeof(int64_t)), grads(direct ? 0 : outputs * sizeof(T));
    const Scratch d_shares(work.reads() * sizeof(T)), d_moved(made * sizeof(T)), rows(made * sizeof(T));
    const Scratch d_kernel((kernel_size + work.made) * sizeof(T)), d_inputs(both ? a.B * a.N * a.I * sizeof(T) : 0);
    for (const Scratch *each : {&numbers, &positions, &grads, &d_shares, &d_moved, &rows, &d_kernel, &d_inputs})
        if (!each->ok()) return out_of_memory;
    work.begin(numbers.at<T>(), positions.at<int64_t>());
    const T *grad = direct ? args.grad.at : grads.at<T>();
    if (!direct) to_rows(args.grad, a.B, a.O, a.M, grads.at<T>(), a.threads);
    int status = args.d_bias ? sum_rows(grad, a.B * a.M, a.O, args.d_bias, a.threads) : ok;
    if (status == ok) status = Kernels<T>::corners(work.corners(a.moved));
    if (status != ok) return status;

    AggregateBackwardArgs<T> sums;
    sums.of = work.sums(), sums.grad = grad;
    sums.d_value = args.d_value, sums.d_alpha = d_shares.at<T>(), sums.d_weight = args.d_weight;
    memcpy(sums.d_alpha_stride, sums.of.alpha_stride, sizeof sums.d_alpha_stride);
    status = Kernels<T>::aggregate_backward(sums);
    if (status != ok) return status;

    CornersBackwardArgs<T> places;
    places.of = work.corners(a.moved), places.grad = d_shares.at<T>(), places.d_offset = d_moved.at<T>();
    places.d_mask = work.masks ? work.masks_of(d_moved.at<T>()) : nullptr;
    status = Kernels<T>::corners_backward(places);
    if (status != ok) return status;
    const T *masks = places.of.mask;
    parallel(a.threads, a.B * work.made, [&](int64_t item, int) {  // back into rows, through the sigmoid
        const int64_t b = item / work.made, d = item % work.made, mask = d - work.offsets;
        const int64_t line = (mask < 0 ? b * work.offsets + d : b * work.masks + mask) * a.M;
        const T *from = (mask < 0 ? d_moved.at<T>() : places.d_mask) + line;
        T *to = rows.at<T>() + b * a.M * work.made + d;
        for (int64_t m = 0; m < a.M; ++m)
            to[m * work.made] = mask < 0 ? from[m] : from[m] * (1 - masks[line + m]) * masks[line + m];
    });
    T *d_biases = d_kernel.at<T>() + kernel_size;
    status = sum_rows(rows.at<T>(), a.B * a.M, work.made, d_biases, a.threads);
    if (status != ok) return status;
    split(work, d_biases, 1, args.d_offset_bias, args.d_mask_bias);

    AggregateBackwardArgs<T> convolution;
    convolution.of = work.convolution(), convolution.grad = rows.at<T>(), convolution.d_alpha = nullptr;
    memset(convolution.d_alpha_stride, 0, sizeof convolution.d_alpha_stride);
    convolution.d_value = both ? d_inputs.at<T>() : args.d_input;
    convolution.d_weight = work.masks ? d_kernel.at<T>() : args.d_offset_weight;
    status = Kernels<T>::aggregate_backward(convolution);
    if (status != ok) return status;
    split(work, convolution.d_weight, a.I * a.S, args.d_offset_weight, args.d_mask_weight);
    if (both)
        parallel(a.threads, a.B, [&](int64_t b, int) {
            for (int64_t i = b * a.N * a.C; i < (b + 1) * a.N * a.C; ++i) args.d_value[i] += d_inputs.at<T>()[i];
        });
    return ok;
}

}  // namespace

int deformed_float(const DeformedArgs<float> &a) { return deformed(a); }
int deformed_double(const DeformedArgs<double> &a) { return deformed(a); }
int deformed_backward_float(const DeformedBackwardArgs<float> &a) { return deformed_backward(a); }
int deformed_backward_double(const DeformedBackwardArgs<double> &a) { return deformed_backward(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

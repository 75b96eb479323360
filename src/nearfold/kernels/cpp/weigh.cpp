// Softmax over the slots that read anything, and its gradient: one pass over (rows, k) instead of six.
#include <limits>

#include "engine.h"
#include "exponential.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int64_t block_rows = 256;

template <class T>
inline const int64_t *index_row(const SoftmaxArgs<T> &a, int64_t row) {
    const int64_t *from = a.index;
    for (int64_t axis = a.axes - 1; axis > 0; row /= a.index_size[axis--])
        from += row % a.index_size[axis] * a.index_stride[axis];
    return a.axes > 0 ? from + row * a.index_stride[0] : from;
}

// Rows are padded to whole vectors in `line`, with scores that weigh nothing.
template <class T>
int softmax(const SoftmaxArgs<T> &a) {
    const int64_t blocks = ceil_div(a.rows, block_rows), padded = round_up(a.k, lanes<T>);
    const bool apart = a.index_step != 1;
    const Scratch lines(a.threads * padded * sizeof(T)), copies(apart ? a.threads * a.k * sizeof(int64_t) : 0);
    if (!lines.ok() || !copies.ok()) return out_of_memory;
    const T nothing = -std::numeric_limits<T>::infinity();
    parallel(a.threads, blocks, [&](int64_t item, int worker) {
        T *line = lines.at<T>() + worker * padded;
        for (int64_t row = item * block_rows; row < smaller((item + 1) * block_rows, a.rows); ++row) {
            for (int64_t i = a.k; i < padded; ++i) line[i] = nothing;
            const T *score = a.score + row * a.k;
            const int64_t *index = index_row(a, row);
            if (apart) {
                int64_t *copy = copies.at<int64_t>() + worker * a.k;
                for (int64_t s = 0; s < a.k; ++s) copy[s] = index[s * a.index_step];
                index = copy;
            }
            T *alpha = a.alpha + row * a.k;
            int gone = 0;
            for (int64_t s = 0; s < a.k; ++s) {
                line[s] = index[s] >= 0 ? score[s] * a.scale : nothing;
                gone |= index[s] == lost;
            }
            Vec<T> best = splat<T>(nothing);
            for (int64_t s = 0; s < padded; s += lanes<T>) {
                const Vec<T> x = load<T>(line + s);
                best = x > best ? x : best;
            }
            T most = best[0];
            for (int i = 1; i < lanes<T>; ++i) most = best[i] > most ? best[i] : most;
            if (most == nothing) most = 0;  // nothing to read: every weight is zero
            Vec<T> total{};
            for (int64_t s = 0; s < padded; s += lanes<T>) {
                const Vec<T> e = exponential<T>(load<T>(line + s) - splat<T>(most));
                total += e;
                store<T>(line + s, e);
            }
            const T whole = sum<T>(total), share = whole > 0 ? 1 / whole : 0;
            for (int64_t s = 0; s < a.k; ++s) alpha[s] = line[s] * share;
            if (gone || whole != whole)
                for (int64_t s = 0; s < a.k; ++s)
                    if (gone || index[s] >= 0) alpha[s] = std::numeric_limits<T>::quiet_NaN();
        }
    });
    return ok;
}

// d_score = scale * alpha * (grad - sum of alpha * grad)
template <class T>
int softmax_backward(const SoftmaxBackwardArgs<T> &a) {
    parallel(a.threads, ceil_div(a.rows, block_rows), [&](int64_t item, int) {
        for (int64_t row = item * block_rows; row < smaller((item + 1) * block_rows, a.rows); ++row) {
            const T *grad = a.grad + row * a.k, *alpha = a.alpha + row * a.k;
            T mean = 0;
            if (a.k < 2 * lanes<T>)
                for (int64_t s = 0; s < a.k; ++s) mean += grad[s] * alpha[s];
            else
                mean = dot_product(grad, alpha, a.k);
            for (int64_t s = 0; s < a.k; ++s) a.d_score[row * a.k + s] = a.scale * alpha[s] * (grad[s] - mean);
        }
    });
    return ok;
}

}  // namespace

int softmax_float(const SoftmaxArgs<float> &a) { return softmax(a); }
int softmax_double(const SoftmaxArgs<double> &a) { return softmax(a); }
int softmax_backward_float(const SoftmaxBackwardArgs<float> &a) { return softmax_backward(a); }
int softmax_backward_double(const SoftmaxBackwardArgs<double> &a) { return softmax_backward(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

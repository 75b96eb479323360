// The selective scan: h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, and y_t = C_t h_t.
//
// The lanes of a vector are channels, so a step in time needs no word between lanes. The backward walks the chunks from
// the last to the first: it computes the states of a chunk again, a few of the S at a time so that they stay in the
// first cache, and runs the adjoint recurrence back over them. Sums over channels are kept per lane until a group of
// vectors is through. Nothing depends on the number of threads: groups are cut by the shape alone, and what they found
// is added in order.
//
// In here B_t is `in` and C_t is `out`; B and C are sizes.
#include <initializer_list>

#include "engine.h"
#include "recurrence.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

template <class T>
struct PowerOf;
template <>
struct PowerOf<float> {
    // 1 and ln 2 are exact, for decays close to 1 multiply up; the others fit the rest of the interval to 3e-9
    static constexpr float series[] = {1.0f,           0.693147181f,   0.240226475f,  0.0555036226f,
                                       0.00961852631f, 0.00133901615f, 0.000153211544f};
    static constexpr float magic = 12582912.0f, low = -1000.0f;
    static constexpr int terms = 6, mantissa = 23, bias = 127;
};
template <>
struct PowerOf<double> {
    static constexpr double series[] = {1.0,
                                        0.6931471805599453,
                                        0.24022650695910072,
                                        0.05550410866482158,
                                        0.009618129107628477,
                                        0.0013333558146428443,
                                        0.0001540353039338161,
                                        1.5252733804059841e-05,
                                        1.321548679014431e-06,
                                        1.01780860092397e-07,
                                        7.054911620801123e-09,
                                        4.4455382718708116e-10,
                                        2.5678435993488206e-11,
                                        1.3691488853904128e-12};
    static constexpr double magic = 6755399441055744.0, low = -10000.0;
    static constexpr int terms = 13, mantissa = 52, bias = 1023;
};
constexpr double log2e = 1.44269504088896340736;

// x where it is above `low`, which is below every exponent; keeps NaN.
template <class T>
inline Vec<T> above(Vec<T> x, Vec<T> low) {
    return x < low ? low : x;
}
// x * 2^n, for n an integer.
template <class T>
inline Vec<T> scaled(Vec<T> x, Vec<T> n) {
    using P = PowerOf<T>;
    const Vec<T> shifted = n + splat<T>(P::magic + P::bias);  // leaves the exponent's bits in the low ones
    IntVec<T> bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits <<= P::mantissa;
    Vec<T> power;
    memcpy(&power, &bits, sizeof bits);
    power = n < splat<T>(T(1 - P::bias)) ? Vec<T>{} : power;
    return x * (n > splat<T>(T(P::bias)) ? splat<T>(T(__builtin_inf())) : power);
}
#if defined(__AVX512F__)
template <>
inline Vec<float> above<float>(Vec<float> x, Vec<float> low) {
    return (Vec<float>)_mm512_max_ps((__m512)low, (__m512)x);  // the second where one is NaN
}
template <>
inline Vec<double> above<double>(Vec<double> x, Vec<double> low) {
    return (Vec<double>)_mm512_max_pd((__m512d)low, (__m512d)x);
}
template <>
inline Vec<float> scaled<float>(Vec<float> x, Vec<float> n) {
    return (Vec<float>)_mm512_scalef_ps((__m512)x, (__m512)n);
}
template <>
inline Vec<double> scaled<double>(Vec<double> x, Vec<double> n) {
    return (Vec<double>)_mm512_scalef_pd((__m512d)x, (__m512d)n);
}
#endif

// 2^x to about an ulp; zero below the normal numbers, or near it; infinity above the largest. Keeps NaN.
template <class T>
inline Vec<T> power_of_two(Vec<T> x) {
    using P = PowerOf<T>;
    const Vec<T> z = above<T>(x, splat<T>(P::low));
    const Vec<T> n = z + splat<T>(P::magic) - splat<T>(P::magic);
    const Vec<T> f = z - n;
    Vec<T> series = splat<T>(P::series[P::terms]);
#pragma GCC unroll 16
    for (int i = P::terms - 1; i >= 0; --i) series = fused<T>(series, f, splat<T>(P::series[i]));
    return scaled<T>(series, n);
}

// A (C, S) as vectors (channel vectors, S), times a factor.
template <class T>
void pack(const ScanArgs<T> &a, T factor, Vec<T> *to) {
    const int64_t L = lanes<T>;
    for (int64_t first = 0; first < a.C; first += L)
        for (int64_t s = 0; s < a.S; ++s) {
            T some[lanes<T>] = {};
            for (int64_t i = 0; i < smaller(L, a.C - first); ++i) some[i] = a.A[(first + i) * a.S + s] * factor;
            *to++ = load<T>(some);
        }
}

// One chunk of one vector of channels, from state h to state h.
template <class T>
void chunk_forward(const ScanArgs<T> &a, int64_t b, int64_t start, int64_t steps, int64_t channel, const Vec<T> *rate,
                   Vec<T> *h) {
    const int64_t S = a.S, n = smaller<int64_t>(lanes<T>, a.C - channel);
    const T *u = a.u + b * a.u_stride[0] + start * a.u_stride[1] + channel;
    const T *deltas = a.delta + b * a.delta_stride[0] + start * a.delta_stride[1] + channel;
    for (int64_t t = 0; t < steps; ++t) {
        const Vec<T> delta = load_some<T>(deltas + t * a.delta_stride[1], n);
        const Vec<T> x = delta * load_some<T>(u + t * a.u_stride[1], n);
        const T *in = a.in + b * a.in_stride[0] + (start + t) * a.in_stride[1];
        const T *out = a.out + b * a.out_stride[0] + (start + t) * a.out_stride[1];
        Vec<T> y{};
#pragma GCC unroll 4
        for (int64_t s = 0; s < S; ++s) {
            h[s] = fused<T>(power_of_two<T>(delta * rate[s]), h[s], x * splat<T>(in[s]));
            y = fused<T>(splat<T>(out[s]), h[s], y);
        }
        store_some<T>(a.y + (b * a.N + start + t) * a.C + channel, y, n);
    }
}

constexpr int64_t most_groups = 16;  // of all batch elements: so many threads have work at least

// A worker takes a few vectors of channels chunk by chunk: one alone would read a line here and there in every page.
template <class T>
int forward(const ScanArgs<T> &a) {
    const int64_t L = lanes<T>, S = a.S, vectors = ceil_div(a.C, L), chunks = ceil_div(a.N, a.chunk);
    const int64_t groups = smaller(vectors, larger(ceil_div(most_groups, a.B), ceil_div(vectors, 4)));
    const Scratch rates(vectors * S * sizeof(Vec<T>)), running(a.B * vectors * S * sizeof(Vec<T>));
    if (!rates.ok() || !running.ok()) return out_of_memory;
    pack<T>(a, T(log2e), rates.at<Vec<T>>());
    parallel(a.threads, a.B * groups, [&](int64_t item, int) {
        const FlushTiny flush;
        const int64_t b = item / groups, g = item % groups, begin = g * vectors / groups, end = (g + 1) * vectors / groups;
        Vec<T> *states = running.at<Vec<T>>() + b * vectors * S;
        for (int64_t i = begin * S; i < end * S; ++i) states[i] = Vec<T>{};
        for (int64_t k = 0; k < chunks; ++k)
            for (int64_t v = begin; v < end; ++v) {
                const int64_t start = k * a.chunk, channel = v * L, n = smaller(L, a.C - channel);
                if (a.states) {
                    T *state = a.states + (b * chunks + k) * S * a.C + channel;
                    for (int64_t s = 0; s < S; ++s) store_some<T>(state + s * a.C, states[v * S + s], n);
                }
                chunk_forward<T>(a, b, start, smaller(a.chunk, a.N - start), channel, rates.at<Vec<T>>() + v * S,
                                 states + v * S);
            }
    });
    return ok;
}

constexpr int block_states = 4;  // states whose recurrence is in registers
constexpr int64_t group_vectors = 8;

// What one worker holds of a chunk. Lists of `chunk` for each vector of the group, and for the states of one block.
template <class T>
struct Chunk {
    Vec<T> *delta, *u, *grad, *from_x, *from_rate;  // (group_vectors, chunk)
    Vec<T> *decay, *h;                              // (chunk, block_states), h with one step before the first
    Vec<T> *d_in, *d_out;                           // (chunk, block_states)
    static int64_t size(int64_t chunk) { return chunk * (5 * group_vectors + 4 * block_states) + block_states; }
    Chunk(Vec<T> *at, int64_t chunk) {
        for (Vec<T> **list : {&delta, &u, &grad, &from_x, &from_rate}) *list = at, at += group_vectors * chunk;
        for (Vec<T> **list : {&decay, &d_in, &d_out, &h}) *list = at, at += block_states * chunk;
    }
};

// One block of states of one vector of channels, over the `steps` positions of a chunk from the last to the first.
// `state` is that before the first position; carry: decay times adjoint of the first position after, and then of this.
template <class T, int states>
void block_backward(const Chunk<T> &c, int64_t v, int64_t chunk, int64_t steps, bool first, const T *in, int64_t in_stride,
                    const T *out, int64_t out_stride, const T *state, int64_t state_stride, int64_t n, const Vec<T> *rate,
                    const Vec<T> *A, Vec<T> *carry, Vec<T> *d_A) {
    const Vec<T> *delta = c.delta + v * chunk, *u = c.u + v * chunk, *grad = c.grad + v * chunk;
    Vec<T> *from_x = c.from_x + v * chunk, *from_rate = c.from_rate + v * chunk;
    Vec<T> h[states];
#pragma GCC unroll 4
    for (int s = 0; s < states; ++s) c.h[s] = h[s] = load_some<T>(state + s * state_stride, n);
    for (int64_t t = 0; t < steps; ++t) {
        const Vec<T> x = delta[t] * u[t];
#pragma GCC unroll 4
        for (int s = 0; s < states; ++s) {
            const Vec<T> decay = power_of_two<T>(delta[t] * rate[s]);
            h[s] = fused<T>(decay, h[s], x * splat<T>(in[t * in_stride + s]));
            c.decay[t * states + s] = decay, c.h[(t + 1) * states + s] = h[s];
        }
    }
    Vec<T> back[states], d_rate[states];
#pragma GCC unroll 4
    for (int s = 0; s < states; ++s) back[s] = carry[s], d_rate[s] = d_A[s];
    for (int64_t t = steps - 1; t >= 0; --t) {
        const Vec<T> x = delta[t] * u[t], g = grad[t];
        Vec<T> by_x = from_x[t], by_rate = from_rate[t];
#pragma GCC unroll 4
        for (int s = 0; s < states; ++s) {
            const int64_t at = t * states + s;
            const Vec<T> adjoint = fused<T>(splat<T>(out[t * out_stride + s]), g, back[s]);
            c.d_out[at] = fused<T>(g, h[s], first ? Vec<T>{} : c.d_out[at]);
            c.d_in[at] = fused<T>(adjoint, x, first ? Vec<T>{} : c.d_in[at]);
            by_x = fused<T>(adjoint, splat<T>(in[t * in_stride + s]), by_x);
            back[s] = c.decay[at] * adjoint;
            h[s] = c.h[at];
            const Vec<T> d_exponent = back[s] * h[s];
            by_rate = fused<T>(d_exponent, A[s], by_rate);
            d_rate[s] = fused<T>(d_exponent, delta[t], d_rate[s]);
        }
        from_x[t] = by_x, from_rate[t] = by_rate;
    }
#pragma GCC unroll 4
    for (int s = 0; s < states; ++s) carry[s] = back[s], d_A[s] = d_rate[s];
}

// to[i] = sum of the lanes of rows[i]; `to` may be the memory of `rows`.
template <class T>
inline void sums(const Vec<T> *rows, int64_t n, T *to) {
    for (int64_t i = 0; i < n; ++i) to[i] = sum<T>(rows[i]);
}
#if defined(__AVX512F__)
// Sixteen at once: every step adds halves of two vectors, and what is left is one vector of sums.
template <>
inline void sums<float>(const Vec<float> *rows, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 quarter[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            const __m512 a = (__m512)rows[i + 4 * q], b = (__m512)rows[i + 4 * q + 1];
            const __m512 c = (__m512)rows[i + 4 * q + 2], d = (__m512)rows[i + 4 * q + 3];
            const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
            const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
            quarter[q] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                       _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        }
        const auto halves = [](__m512 x, __m512 y) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
        };
        _mm512_storeu_ps(to + i, halves(halves(quarter[0], quarter[1]), halves(quarter[2], quarter[3])));
    }
    for (; i < n; ++i) to[i] = sum<float>(rows[i]);
}
#endif

// The vectors first_vector.. of one group over one chunk; sums over their channels go into rows d_in and d_out.
template <class T>
void group_backward(const ScanBackwardArgs<T> &args, const Chunk<T> &c, int64_t b, int64_t k, int64_t first_vector,
                    int64_t count, bool first, const Vec<T> *rates, const Vec<T> *A, Vec<T> *carry, Vec<T> *d_A, T *d_in,
                    T *d_out) {
    const ScanArgs<T> &a = args.of;
    const int64_t L = lanes<T>, S = a.S, start = k * a.chunk, steps = smaller(a.chunk, a.N - start);
    const int64_t chunks = ceil_div(a.N, a.chunk);
    for (int64_t v = 0; v < count; ++v) {
        const int64_t channel = (first_vector + v) * L, n = smaller(L, a.C - channel);
        for (int64_t t = 0; t < steps; ++t) {
            const int64_t at = v * a.chunk + t, row = start + t;
            c.delta[at] = load_some<T>(a.delta + b * a.delta_stride[0] + row * a.delta_stride[1] + channel, n);
            c.u[at] = load_some<T>(a.u + b * a.u_stride[0] + row * a.u_stride[1] + channel, n);
            c.grad[at] = load_some<T>(args.grad + (b * a.N + row) * a.C + channel, n);
            c.from_x[at] = c.from_rate[at] = Vec<T>{};
        }
    }
    const T *in = a.in + b * a.in_stride[0] + start * a.in_stride[1];
    const T *out = a.out + b * a.out_stride[0] + start * a.out_stride[1];
    const auto block = [&](auto states, int64_t s) {
        constexpr int width = decltype(states)::n;
        for (int64_t v = 0; v < count; ++v) {
            const int64_t channel = (first_vector + v) * L, at = (first_vector + v) * S + s;
            block_backward<T, width>(c, v, a.chunk, steps, v == 0, in + s, a.in_stride[1], out + s, a.out_stride[1],
                                     a.states + ((b * chunks + k) * S + s) * a.C + channel, a.C,
                                     smaller(L, a.C - channel), rates + at, A + at, carry + at, d_A + at);
        }
        T *by_in = reinterpret_cast<T *>(c.d_in), *by_out = reinterpret_cast<T *>(c.d_out);
        sums<T>(c.d_in, steps * width, by_in);
        sums<T>(c.d_out, steps * width, by_out);
        for (int64_t t = 0; t < steps; ++t)
            for (int i = 0; i < width; ++i) {
                const int64_t to = (start + t) * S + s + i;
                d_in[to] = first ? by_in[t * width + i] : d_in[to] + by_in[t * width + i];
                d_out[to] = first ? by_out[t * width + i] : d_out[to] + by_out[t * width + i];
            }
    };
    int64_t s = 0;
    for (; s + block_states <= S; s += block_states) block(Count<block_states>{}, s);
    for (; s < S; ++s) block(Count<1>{}, s);
    for (int64_t v = 0; v < count; ++v) {
        const int64_t channel = (first_vector + v) * L, n = smaller(L, a.C - channel);
        for (int64_t t = 0; t < steps; ++t) {
            const int64_t at = v * a.chunk + t, to = (b * a.N + start + t) * a.C + channel;
            store_some<T>(args.d_u + to, c.delta[at] * c.from_x[at], n);
            store_some<T>(args.d_delta + to, fused<T>(c.u[at], c.from_x[at], c.from_rate[at]), n);
        }
    }
}

template <class T>
int backward(const ScanBackwardArgs<T> &args) {
    const ScanArgs<T> &a = args.of;
    const int64_t L = lanes<T>, S = a.S, vectors = ceil_div(a.C, L), chunks = ceil_div(a.N, a.chunk);
    const int64_t groups = smaller(vectors, ceil_div(most_groups, a.B)), rows = a.B * a.N * S, of_A = vectors * S;
    const int64_t worker_size = Chunk<T>::size(a.chunk) * sizeof(Vec<T>);
    const Scratch rates(2 * of_A * sizeof(Vec<T>)), workers(a.threads * worker_size);
    const Scratch running(2 * a.B * of_A * sizeof(Vec<T>)), found(groups > 1 ? 2 * groups * rows * sizeof(T) : 0);
    if (!rates.ok() || !workers.ok() || !running.ok() || !found.ok()) return out_of_memory;
    Vec<T> *rate = rates.at<Vec<T>>(), *A = rate + of_A, *carries = running.at<Vec<T>>(), *d_A = carries + a.B * of_A;
    T *d_in = groups > 1 ? found.at<T>() : args.d_in, *d_out = groups > 1 ? d_in + groups * rows : args.d_out;
    pack<T>(a, T(log2e), rate);
    pack<T>(a, T(1), A);
    parallel(a.threads, a.B * groups, [&](int64_t item, int worker) {
        const FlushTiny flush;
        const int64_t b = item / groups, g = item % groups, begin = g * vectors / groups, end = (g + 1) * vectors / groups;
        const Chunk<T> c(workers.at<Vec<T>>(worker * worker_size), a.chunk);
        for (int64_t i = b * of_A + begin * S; i < b * of_A + end * S; ++i) carries[i] = d_A[i] = Vec<T>{};
        for (int64_t k = chunks - 1; k >= 0; --k)
            for (int64_t v = begin; v < end; v += group_vectors)
                group_backward<T>(args, c, b, k, v, smaller(group_vectors, end - v), v == begin, rate, A, carries + b * of_A,
                                  d_A + b * of_A, d_in + (g * a.B + b) * a.N * S, d_out + (g * a.B + b) * a.N * S);
    });
    if (groups > 1) {
        add_up<T>(a.threads, d_in, groups, rows, rows, args.d_in);
        add_up<T>(a.threads, d_out, groups, rows, rows, args.d_out);
    }
    parallel(a.threads, vectors, [&](int64_t v, int) {
        for (int64_t s = 0; s < S; ++s) {
            Vec<T> total{};
            for (int64_t b = 0; b < a.B; ++b) total += d_A[b * of_A + v * S + s];
            for (int64_t i = 0; i < smaller(L, a.C - v * L); ++i) args.d_A[(v * L + i) * S + s] = total[i];
        }
    });
    return ok;
}

}  // namespace

int scan_float(const ScanArgs<float> &a) { return forward<float>(a); }
int scan_double(const ScanArgs<double> &a) { return forward<double>(a); }
int scan_backward_float(const ScanBackwardArgs<float> &a) { return backward<float>(a); }
int scan_backward_double(const ScanBackwardArgs<double> &a) { return backward<double>(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

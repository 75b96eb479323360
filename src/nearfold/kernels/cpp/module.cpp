// What Python sees: checked buffers in, kernels of the chosen instruction set behind.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "module.h"
#include "threads.h"

#if defined(NEARFOLD_AVX2) || defined(NEARFOLD_AVX512) || defined(NEARFOLD_AMX)
#include "processor.h"
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <pthread.h>
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace nearfold {
namespace {

template <class T, int axes>
using Array = nb::ndarray<T, nb::ndim<axes>, nb::device::cpu>;

// Those this machine can run, best first.
const std::vector<const Engine *> &engines() {
    static const std::vector<const Engine *> found = [] {
        std::vector<const Engine *> all;
#if defined(NEARFOLD_AVX2) || defined(NEARFOLD_AVX512) || defined(NEARFOLD_AMX)
        const Processor has;
#endif
#if defined(NEARFOLD_AMX)
        if (has.amx) all.push_back(&engine_amx);
#endif
#if defined(NEARFOLD_AVX512)
        if (has.avx512) all.push_back(&engine_avx512);
#endif
#if defined(NEARFOLD_AVX2)
        if (has.avx2) all.push_back(&engine_avx2);
#endif
        all.push_back(&engine_generic);
        return all;
    }();
    return found;
}

// Whether a signal's handler, Ctrl-C's say, has raised. Python runs them in its main thread only; the others do not wait
// for the lock.
bool signalled() {
#if defined(__linux__)
    if (syscall(SYS_gettid) != getpid()) return false;
#elif defined(__APPLE__)
    if (!pthread_main_np()) return false;
#endif
    nb::gil_scoped_acquire lock;
    return PyErr_CheckSignals() != 0;
}

std::atomic<const Engine *> chosen{nullptr};  // set when the module loads

std::vector<std::string> names() {
    std::vector<std::string> all;
    for (const Engine *engine : engines()) all.emplace_back(engine->name);
    return all;
}

void use(const std::string &name) {
    for (const Engine *engine : engines())
        if (name == engine->name) {
            chosen = engine;
            return;
        }
    std::string known;
    for (const std::string &each : names()) known += (known.empty() ? "" : ", ") + each;
    throw nb::value_error(("instruction set '" + name + "' is not one of this machine's: " + known).c_str());
}

constexpr int64_t most_positions = (int64_t(1) << 48) - 1;

template <class A>
void strides_of(const A &array, int64_t *to) {
    for (size_t i = 0; i < array.ndim(); ++i) to[i] = array.stride(i);
}

template <class A>
bool has_shape(const A &array, std::initializer_list<int64_t> shape) {
    size_t axis = 0;
    for (int64_t n : shape)
        if (static_cast<int64_t>(array.shape(axis++)) != n) return false;
    return true;
}

// Whether no two elements share their memory: each axis, from the closest on, steps over all of those before it.
template <class A>
bool disjoint(const A &array) {
    std::vector<std::pair<int64_t, int64_t>> axes;
    for (size_t i = 0; i < array.ndim(); ++i) {
        if (array.shape(i) == 0) return true;
        if (array.shape(i) > 1) axes.emplace_back(array.stride(i), array.shape(i));
    }
    std::sort(axes.begin(), axes.end());
    int64_t room = 1;
    for (const auto &[stride, size] : axes) {
        if (stride < room) return false;
        room += stride * (size - 1);
    }
    return true;
}

template <class T>
struct Table;
template <>
struct Table<float> {
    static constexpr auto select = &Engine::select_float;
    static constexpr auto select_backward = &Engine::select_backward_float;
    static constexpr auto aggregate = &Engine::aggregate_float;
    static constexpr auto aggregate_backward = &Engine::aggregate_backward_float;
    static constexpr auto softmax = &Engine::softmax_float;
    static constexpr auto softmax_backward = &Engine::softmax_backward_float;
};
template <>
struct Table<double> {
    static constexpr auto select = &Engine::select_double;
    static constexpr auto select_backward = &Engine::select_backward_double;
    static constexpr auto aggregate = &Engine::aggregate_double;
    static constexpr auto aggregate_backward = &Engine::aggregate_backward_double;
    static constexpr auto softmax = &Engine::softmax_double;
    static constexpr auto softmax_backward = &Engine::softmax_backward_double;
};

template <class T>
void select(Array<const T, 4> query, Array<const T, 4> key, int metric, bool squared, Array<const int64_t, 1> query_index,
            Array<const int64_t, 1> key_index, const std::vector<int64_t> &grid, bool causal, int64_t reach,
            int64_t dilation, bool own, double again, Array<T, 4> score, Array<int64_t, 4> index, int threads) {
    SelectArgs<T> a;
    a.query = query.data();
    a.key = key.data();
    strides_of(query, a.query_stride);
    strides_of(key, a.key_stride);
    a.B = query.shape(0), a.H = query.shape(1), a.M = query.shape(2), a.E = query.shape(3);
    a.R = key.shape(2), a.k = score.shape(3);
    require(has_shape(key, {a.B, a.H, a.R, a.E}), "select: key does not fit query");
    require(has_shape(score, {a.B, a.H, a.M, a.k}) && contiguous(score), "select: score must be (B, H, M, k), contiguous");
    require(has_shape(index, {a.B, a.H, a.M, a.k}) && contiguous(index), "select: index must be (B, H, M, k), contiguous");
    require(has_shape(query_index, {a.M}) && contiguous(query_index), "select: query_index must be (M,), contiguous");
    require(has_shape(key_index, {a.R}) && contiguous(key_index), "select: key_index must be (R,), contiguous");
    require(metric >= dot && metric <= chebyshev, "select: unknown metric");
    require(a.k >= 1 && dilation >= 1 && reach >= -1 && threads >= 1, "select: k, dilation and threads are at least 1");
    require(a.R < (int64_t(1) << 31) && a.k < (int64_t(1) << 24), "select: too many keys");
    int64_t positions = 1;
    for (int64_t n : grid) {
        require(n >= 1 && n <= most_positions / positions, "select: grid sizes are at least 1, and below 2^48 positions");
        positions *= n;
    }
    if (reach >= 0 || dilation > 1) {
        require(positions == a.R, "select: a reach or a dilation needs every position as a key");
        for (int64_t m = 0; m < a.M; ++m)
            require(query_index.data()[m] >= 0 && query_index.data()[m] < positions, "select: query_index leaves the grid");
    }
    a.metric = metric, a.squared = squared;
    a.query_index = query_index.data(), a.key_index = key_index.data();
    a.grid = grid.data(), a.axes = static_cast<int64_t>(grid.size());
    a.causal = causal, a.reach = reach, a.dilation = dilation;
    a.own = own, a.again = static_cast<T>(again);
    a.score = score.data(), a.index = index.data(), a.threads = threads;
    run(Table<T>::select, a);
}

template <class T>
void select_backward(Array<const T, 4> grad, Array<const T, 4> query, Array<const T, 4> key, Array<const int64_t, 4> index,
                     int metric, bool squared, Array<T, 4> d_query, Array<T, 4> d_key, int threads) {
    SelectBackwardArgs<T> a;
    a.B = query.shape(0), a.H = query.shape(1), a.M = query.shape(2), a.E = query.shape(3);
    a.R = key.shape(2), a.k = index.shape(3);
    require(has_shape(key, {a.B, a.H, a.R, a.E}), "select_backward: key does not fit query");
    require(has_shape(grad, {a.B, a.H, a.M, a.k}) && contiguous(grad), "select_backward: grad must be (B, H, M, k)");
    require(has_shape(index, {a.B, a.H, a.M, a.k}) && contiguous(index), "select_backward: index must be (B, H, M, k)");
    require(has_shape(d_query, {a.B, a.H, a.M, a.E}) && has_shape(d_key, {a.B, a.H, a.R, a.E}),
            "select_backward: gradients must have the shapes of query and key");
    for (const auto stride : {query.stride(3), key.stride(3), d_query.stride(3), d_key.stride(3)})
        require(stride == 1 || a.E <= 1, "select_backward: features must be contiguous");
    require(metric >= dot && metric <= euclidean && threads >= 1, "select_backward: unknown metric");
    int64_t strides[4];
    const auto copy = [&strides](const auto &array, int64_t *to) {
        strides_of(array, strides);
        for (int i = 0; i < 3; ++i) to[i] = strides[i];
    };
    copy(query, a.query_stride), copy(key, a.key_stride);
    copy(d_query, a.d_query_stride), copy(d_key, a.d_key_stride);
    a.grad = grad.data(), a.query = query.data(), a.key = key.data(), a.index = index.data();
    a.d_query = d_query.data(), a.d_key = d_key.data();
    a.metric = metric, a.squared = squared, a.threads = threads;
    run(Table<T>::select_backward, a);
}

template <class T>
AggregateArgs<T> aggregate_args(const Array<const T, 3> &value, const Array<const int64_t, 4> &index,
                                const std::optional<Array<const T, 4>> &alpha,
                                const std::optional<Array<const T, 3>> &weight, int64_t groups, int threads,
                                int64_t entries) {
    AggregateArgs<T> a;
    a.B = value.shape(0), a.N = value.shape(1), a.C = value.shape(2);
    a.M = index.shape(1), a.H = index.shape(3), a.G = groups;
    const int64_t reads = index.shape(2);
    require(entries >= 1 && reads % entries == 0, "aggregate: the slots of index must be divisible by entries");
    a.entries = weight ? entries : 1;  // without a kernel they are slots like all others
    a.S = reads / a.entries;
    a.O = weight ? weight->shape(0) : a.C;
    require(static_cast<int64_t>(index.shape(0)) == a.B, "aggregate: index and value must have one batch size");
    require(a.C >= 1 && a.H >= 1 && a.C % a.H == 0, "aggregate: channels must be divisible by heads");
    require(a.G >= 1 && a.C % a.G == 0 && a.O >= 1 && a.O % a.G == 0, "aggregate: channels must be divisible by groups");
    require(value.stride(2) == 1 || a.C == 1, "aggregate: the channels of value must be contiguous");
    require(value.stride(1) >= a.C || a.N <= 1, "aggregate: rows of value overlap");
    require(!alpha || has_shape(*alpha, {a.B, a.M, reads, a.H}), "aggregate: alpha must have the shape of index");
    require(!weight || (has_shape(*weight, {a.O, a.C / a.G, a.S}) && contiguous(*weight)),
            "aggregate: weight must be (O, C / groups, S), contiguous");
    const auto few = [](int64_t n, int64_t m) { return m == 0 || n <= ((int64_t(1) << 31) - 1) / m; };  // n * m < 2^31
    require(threads >= 1 && few(a.N, a.S) && few(a.M, reads), "aggregate: too many slots");
    a.value = value.data(), a.index = index.data();
    a.alpha = alpha ? alpha->data() : nullptr;
    a.weight = weight ? weight->data() : nullptr;
    a.value_stride[0] = value.stride(0), a.value_stride[1] = value.stride(1);
    strides_of(index, a.index_stride);
    if (alpha) strides_of(*alpha, a.alpha_stride);
    a.threads = threads;
    a.out = nullptr;
    return a;
}

template <class T>
void aggregate(Array<const T, 3> value, Array<const int64_t, 4> index, std::optional<Array<const T, 4>> alpha,
               std::optional<Array<const T, 3>> weight, int64_t groups, Array<T, 3> out, int threads, int64_t entries) {
    AggregateArgs<T> a = aggregate_args<T>(value, index, alpha, weight, groups, threads, entries);
    require(has_shape(out, {a.B, a.M, a.O}) && contiguous(out), "aggregate: out must be (B, M, O), contiguous");
    a.out = out.data();
    run(Table<T>::aggregate, a);
}

template <class T>
void aggregate_backward(Array<const T, 3> grad, Array<const T, 3> value, Array<const int64_t, 4> index,
                        std::optional<Array<const T, 4>> alpha, std::optional<Array<const T, 3>> weight, int64_t groups,
                        std::optional<Array<T, 3>> d_value, std::optional<Array<T, 4>> d_alpha,
                        std::optional<Array<T, 3>> d_weight, int threads, int64_t entries) {
    AggregateBackwardArgs<T> a;
    a.of = aggregate_args<T>(value, index, alpha, weight, groups, threads, entries);
    require(has_shape(grad, {a.of.B, a.of.M, a.of.O}) && contiguous(grad), "aggregate: grad must be (B, M, O), contiguous");
    require(d_value || !weight, "aggregate: d_value can be left out where there is no weight");
    require(!d_value || (has_shape(*d_value, {a.of.B, a.of.N, a.of.C}) && contiguous(*d_value)),
            "aggregate: d_value must be (B, N, C), contiguous");
    require((!weight || alpha.has_value() == d_alpha.has_value()) && weight.has_value() == d_weight.has_value(),
            "aggregate: gradients must be asked for exactly the operands there are");
    if (d_alpha) {
        require(has_shape(*d_alpha, {a.of.B, a.of.M, a.of.S * a.of.entries, a.of.H}),
                "aggregate: d_alpha must have the shape of index");
        require(disjoint(*d_alpha), "aggregate: numbers of d_alpha overlap");
        strides_of(*d_alpha, a.d_alpha_stride);
    }
    require(!weight || (has_shape(*d_weight, {a.of.O, a.of.C / a.of.G, a.of.S}) && contiguous(*d_weight)),
            "aggregate: d_weight must have weight's shape, contiguous");
    a.grad = grad.data();
    a.d_value = d_value ? d_value->data() : nullptr;
    a.d_alpha = d_alpha ? d_alpha->data() : nullptr;
    a.d_weight = d_weight ? d_weight->data() : nullptr;
    run(Table<T>::aggregate_backward, a);
}

using AnyIndex = nb::ndarray<const int64_t, nb::device::cpu>;

// The axes before the last one, those that lie behind one another as one; how many rows they are.
template <class T>
int64_t rows_of(const AnyIndex &index, SoftmaxArgs<T> &a) {
    int64_t rows = 1;
    a.axes = 0;
    for (size_t i = 0; i + 1 < index.ndim(); ++i) {
        const int64_t size = index.shape(i), stride = index.stride(i), last = a.axes - 1;
        rows *= size;
        if (size == 1) continue;
        if (last >= 0 && a.index_stride[last] == size * stride) {
            a.index_size[last] *= size;
            a.index_stride[last] = stride;
        } else {
            a.index_size[a.axes] = size;
            a.index_stride[a.axes++] = stride;
        }
    }
    return rows;
}

template <class T>
void softmax(Array<const T, 2> score, AnyIndex index, double scale, Array<T, 2> alpha, int threads) {
    SoftmaxArgs<T> a;
    a.rows = score.shape(0), a.k = score.shape(1), a.scale = static_cast<T>(scale), a.threads = threads;
    require(index.ndim() >= 1 && static_cast<int64_t>(index.ndim()) <= max_axes, "softmax: index has too many axes");
    require(static_cast<int64_t>(index.shape(index.ndim() - 1)) == a.k && rows_of(index, a) == a.rows &&
                has_shape(alpha, {a.rows, a.k}),
            "softmax: operands must be (rows, k)");
    require(contiguous(score) && contiguous(alpha), "softmax: score and alpha must be contiguous");
    require(threads >= 1, "softmax: threads must be at least 1");
    a.index_step = a.k > 1 ? index.stride(index.ndim() - 1) : 1;
    a.score = score.data(), a.index = index.data(), a.alpha = alpha.data();
    run(Table<T>::softmax, a);
}

template <class T>
void softmax_backward(Array<const T, 2> grad, Array<const T, 2> alpha, double scale, Array<T, 2> d_score, int threads) {
    SoftmaxBackwardArgs<T> a;
    a.rows = grad.shape(0), a.k = grad.shape(1), a.scale = static_cast<T>(scale), a.threads = threads;
    require(has_shape(alpha, {a.rows, a.k}) && has_shape(d_score, {a.rows, a.k}), "softmax: operands must be (rows, k)");
    require(contiguous(grad) && contiguous(alpha) && contiguous(d_score), "softmax: operands must be contiguous");
    require(threads >= 1, "softmax: threads must be at least 1");
    a.grad = grad.data(), a.alpha = alpha.data(), a.d_score = d_score.data();
    run(Table<T>::softmax_backward, a);
}

template <class T>
void bind(nb::module_ &m) {
    m.def("softmax", &softmax<T>, "score"_a.noconvert(), "index"_a.noconvert(), "scale"_a, "alpha"_a.noconvert(),
          "threads"_a);
    m.def("softmax_backward", &softmax_backward<T>, "grad"_a.noconvert(), "alpha"_a.noconvert(), "scale"_a,
          "d_score"_a.noconvert(), "threads"_a);
    m.def("aggregate", &aggregate<T>, "value"_a.noconvert(), "index"_a.noconvert(), "alpha"_a.noconvert().none(),
          "weight"_a.noconvert().none(), "groups"_a, "out"_a.noconvert(), "threads"_a, "entries"_a = 1);
    m.def("aggregate_backward", &aggregate_backward<T>, "grad"_a.noconvert(), "value"_a.noconvert(),
          "index"_a.noconvert(), "alpha"_a.noconvert().none(), "weight"_a.noconvert().none(), "groups"_a,
          "d_value"_a.noconvert().none(), "d_alpha"_a.noconvert().none(), "d_weight"_a.noconvert().none(), "threads"_a,
          "entries"_a = 1);
    m.def("select", &select<T>, "query"_a.noconvert(), "key"_a.noconvert(), "metric"_a, "squared"_a,
          "query_index"_a.noconvert(), "key_index"_a.noconvert(), "grid"_a, "causal"_a, "reach"_a, "dilation"_a, "own"_a,
          "again"_a, "score"_a.noconvert(), "index"_a.noconvert(), "threads"_a);
    m.def("select_backward", &select_backward<T>, "grad"_a.noconvert(), "query"_a.noconvert(), "key"_a.noconvert(),
          "index"_a.noconvert(), "metric"_a, "squared"_a, "d_query"_a.noconvert(), "d_key"_a.noconvert(), "threads"_a);
}

}  // namespace

const Engine *chosen_engine() { return chosen; }

}  // namespace nearfold

NB_MODULE(_engine, m) {
    m.doc() = "Nearfold's compiled kernels for CPUs; `nearfold.kernels` is their public face.";
    nearfold::chosen = nearfold::engines().front();
    nearfold::stops = nearfold::signalled;
    nearfold::thread_source();  // from now on a fork is noticed, whoever used torch's pool before it
    m.def("names", &nearfold::names, "Instruction sets this machine can run, best first.");
    m.def("chosen", [] { return std::string(nearfold::chosen.load()->name); }, "The instruction set in use.");
    m.def("use", &nearfold::use, "name"_a, "Choose an instruction set by name.");
    m.def("thread_source", [] { return std::string(nearfold::thread_source()); }, "Where threads come from.");
    nearfold::bind<float>(m);
    nearfold::bind<double>(m);
    nearfold::bind_neighbors(m);
    nearfold::bind_local(m);
    nearfold::bind_corners(m);
    nearfold::bind_scan(m);
    nearfold::bind_fast(m);
    nearfold::bind_points(m);
    nearfold::bind_sampled(m);
}

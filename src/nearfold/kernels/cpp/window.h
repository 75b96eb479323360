// Maps packed for windows: rows of the last axis, one after the other, with room at both ends, so that what a vector of
// outputs reads in one slot is one load. Only the last axis is padded: on the others a slot that reads outside is left
// out of the list of slots, and a mirrored one is a pointer to another row.
//
// A row is (features, phases, length): with a stride s on the last axis, positions of equal remainder lie together.
#pragma once
#include "local.h"
#include "simd.h"

namespace nearfold {
namespace {

// The position that slot k of output o reads on an axis; -1 for none.
inline int64_t mirrored(int64_t at, int64_t n) {
    if (n == 1) return 0;
    const int64_t period = 2 * (n - 1);
    at %= period;
    if (at < 0) at += period;
    return at >= n ? period - at : at;
}
inline int64_t reads(const Window &w, int axis, int64_t o, int64_t k) {
    const int64_t at = o * w.stride[axis] + k * w.dilation[axis] - w.before[axis], n = w.grid[axis];
    if (at >= 0 && at < n) return at;
    return w.reflect ? mirrored(at, n) : -1;
}

// Sizes of packed rows, in elements.
template <class T>
struct Layout {
    int64_t phases;   // the stride of the last axis
    int64_t columns;  // positions of the last axis that any slot reads, padding included
    int64_t shift;    // largest index of a slot within its phase
    int64_t length;   // of one phase of a key row
    int64_t pitch;    // from feature to feature in a key row
    int64_t left;     // margin of a query row
    int64_t query_pitch;
    int64_t rows, out_rows, tiles, slots;

    // An even number of vectors from feature to feature would leave part of the cache's sets unused.
    static int64_t odd_vectors(int64_t n) { return n / lanes<T> % 2 == 0 ? n + lanes<T> : n; }

    explicit Layout(const Window &w) {
        phases = w.stride[2];
        columns = (w.out[2] - 1) * w.stride[2] + (w.size[2] - 1) * w.dilation[2] + 1;
        shift = (w.size[2] - 1) * w.dilation[2] / phases;
        tiles = ceil_div(w.out[2], lanes<T>);
        // a tile of the backward may begin anywhere, so there is room for one more vector
        length = round_up(tiles * lanes<T> + shift, lanes<T>) + lanes<T>;
        pitch = odd_vectors(phases * length);
        left = round_up(shift, lanes<T>);
        query_pitch = odd_vectors(left + length);
        rows = w.grid[0] * w.grid[1];
        out_rows = w.out[0] * w.out[1];
        slots = w.size[0] * w.size[1] * w.size[2];
    }
};

// The first element of a row: problem (b, h), row r of `width` = axis 1's positions.
template <class T>
inline T *row_of(const Map<T> &map, int64_t b, int64_t h, int64_t r, int64_t width) {
    return map.data + b * map.stride[0] + h * map.stride[1] + r / width * map.stride[3] + r % width * map.stride[4];
}

template <class T>
inline void store_some(T *to, Vec<T> v, int64_t n) {
    if (n >= lanes<T>)
        store<T>(to, v);
    else
        memcpy(to, &v, n * sizeof(T));
}

// A load that several sums share. Left alone, the compiler folds it into each of them and loads once for every one.
template <class T>
inline Vec<T> load_once(const T *from) {
    Vec<T> v = load<T>(from);
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#endif
    return v;
}

template <class T>
inline void copy_row(const T *from, T *to, int64_t n) {
    int64_t x = 0;
    for (; x + lanes<T> <= n; x += lanes<T>) store<T>(to + x, load<T>(from + x));
    for (; x < n; ++x) to[x] = from[x];
}

// `features` rows of n elements, of any strides, to contiguous ones.
template <class T>
inline void gather_rows(const T *from, int64_t feature, int64_t step, int64_t features, int64_t n, T *to, int64_t pitch) {
    if (step == 1) {
        for (int64_t f = 0; f < features; ++f) copy_row(from + f * feature, to + f * pitch, n);
        return;
    }
    for (int64_t x = 0; x < n; ++x)
        for (int64_t f = 0; f < features; ++f) to[f * pitch + x] = from[x * step + f * feature];
}
template <class T>
inline void scatter_rows(const T *from, int64_t pitch, int64_t features, int64_t n, T *to, int64_t feature, int64_t step) {
    if (step == 1) {
        for (int64_t f = 0; f < features; ++f) copy_row(from + f * pitch, to + f * feature, n);
        return;
    }
    for (int64_t x = 0; x < n; ++x)
        for (int64_t f = 0; f < features; ++f) to[x * step + f * feature] = from[f * pitch + x];
}

// visit(column, where it lies in a packed row, the position it holds) for the columns first..last-1 that hold any.
template <class T, class F>
inline void each_column(const Window &w, const Layout<T> &l, int64_t first, int64_t last, const F &visit) {
    for (int64_t j = first; j < last; ++j) {
        int64_t x = j - w.before[2];
        if (x < 0 || x >= w.grid[2]) {
            if (!w.reflect) continue;
            x = mirrored(x, w.grid[2]);
        }
        visit(j % l.phases * l.length + j / l.phases, x);
    }
}

// One row of keys; what lies outside the grid stays as it is (zero) or is mirrored.
template <class T>
inline void pack_key_row(const Window &w, const Layout<T> &l, const T *from, int64_t feature, int64_t step,
                         int64_t features, T *to) {
    const auto copy = [&](int64_t at, int64_t x) {
        for (int64_t f = 0; f < features; ++f) to[f * l.pitch + at] = from[f * feature + x * step];
    };
    if (l.phases > 1) return each_column(w, l, 0, l.columns, copy);
    const int64_t begin = smaller(w.before[2], l.columns), end = smaller(w.before[2] + w.grid[2], l.columns);
    gather_rows(from, feature, step, features, end - begin, to + begin, l.pitch);
    each_column(w, l, 0, begin, copy);
    each_column(w, l, end, l.columns, copy);
}

// Gradients back out of a packed row: every position is given the sum over the columns that hold it.
template <class T>
inline void unpack_key_row(const Window &w, const Layout<T> &l, T *from, int64_t features, T *to, int64_t feature,
                           int64_t step) {
    const int64_t begin = smaller(w.before[2], l.columns), end = smaller(w.before[2] + w.grid[2], l.columns);
    const auto column = [&](int64_t j) { return j % l.phases * l.length + j / l.phases; };
    const auto mirrored_columns = [&](const auto &visit) {
        each_column(w, l, 0, begin, visit);
        each_column(w, l, end, l.columns, visit);
    };
    mirrored_columns([&](int64_t at, int64_t x) {  // into the column of the position itself, where there is one
        if (begin + x >= end) return;
        const int64_t own = column(begin + x);
        for (int64_t f = 0; f < features; ++f) from[f * l.pitch + own] += from[f * l.pitch + at];
    });
    if (l.phases == 1) {
        scatter_rows(from + begin, l.pitch, features, end - begin, to, feature, step);
    } else {
        for (int64_t j = begin; j < end; ++j)
            for (int64_t f = 0; f < features; ++f) to[f * feature + (j - begin) * step] = from[f * l.pitch + column(j)];
    }
    for (int64_t x = end - begin; x < w.grid[2]; ++x)
        for (int64_t f = 0; f < features; ++f) to[f * feature + x * step] = 0;
    mirrored_columns([&](int64_t at, int64_t x) {
        if (begin + x < end) return;
        for (int64_t f = 0; f < features; ++f) to[f * feature + x * step] += from[f * l.pitch + at];
    });
}

// visit(phase, index, vectors) for every tile, of up to `most` vectors, of a key row that holds a position of the grid
// or, mirrored, any that is read.
template <class T, class F>
inline void each_key_vector(const Window &w, const Layout<T> &l, int most, const F &visit) {
    const int64_t begin = w.reflect ? 0 : smaller(w.before[2], l.columns);
    const int64_t end = w.reflect ? l.columns : smaller(l.columns, w.before[2] + w.grid[2]);
    for (int64_t phase = 0; phase < l.phases; ++phase) {
        const int64_t last = ceil_div(larger<int64_t>(end - phase, 0), l.phases);
        int64_t i = ceil_div(larger<int64_t>(begin - phase, 0), l.phases);
        for (int vectors = 1; i < last; i += vectors * lanes<T>) {
            vectors = static_cast<int>(smaller<int64_t>(most, ceil_div(last - i, lanes<T>)));
            visit(phase, i, vectors);
        }
    }
}

// Where the slots of the last axis lie in a packed key row: phase, shift.
inline void place_slots(const Window &w, int64_t *at) {
    for (int64_t k = 0; k < w.size[2]; ++k) {
        at[2 * k] = k * w.dilation[2] % w.stride[2];
        at[2 * k + 1] = k * w.dilation[2] / w.stride[2];
    }
}

// Order of work. Many problems: one to a thread. Few: every step of a problem is shared by all threads.
class Work {
   public:
    Work(int64_t outer, int64_t inner, int threads)
        : outer_(outer), inner_(inner), threads_(threads),
          shared_(outer * inner < threads || (outer * inner < 4 * threads && outer * inner % threads != 0)) {}

    template <class F>
    void each_problem(const F &body) const {  // body(outer index, inner index, worker)
        if (shared_)
            for (int64_t p = 0; p < outer_ * inner_; ++p) body(p / inner_, p % inner_, 0);
        else
            parallel(threads_, outer_ * inner_, [&](int64_t p, int worker) { body(p / inner_, p % inner_, worker); });
    }
    template <class F>
    void each(int64_t items, int of, const F &body) const {  // body(item, worker) within the problem of a worker
        if (shared_)
            parallel(threads_, items, body);
        else
            for (int64_t item = 0; item < items; ++item) body(item, of);
    }
    int64_t at_once() const { return shared_ ? 1 : threads_; }  // problems

   private:
    int64_t outer_, inner_;
    int threads_;
    bool shared_;
};

// For every position of a leading axis, the pairs (output, slot) that read it, in their order.
class Readers {
   public:
    static int64_t bytes(const Window &w, int axis) {
        return (w.grid[axis] + 1 + 2 * w.out[axis] * w.size[axis]) * sizeof(int64_t);
    }
    Readers(const Window &w, int axis, int64_t *memory)
        : most(0), start_(memory), output_(start_ + w.grid[axis] + 1), slot_(output_ + w.out[axis] * w.size[axis]) {
        const int64_t n = w.grid[axis];
        for (int64_t i = 0; i <= n; ++i) start_[i] = 0;
        const auto each = [&](const auto &visit) {
            for (int64_t o = 0; o < w.out[axis]; ++o)
                for (int64_t k = 0; k < w.size[axis]; ++k) {
                    const int64_t at = reads(w, axis, o, k);
                    if (at >= 0) visit(at, o, k);
                }
        };
        each([&](int64_t at, int64_t, int64_t) { ++start_[at]; });
        int64_t total = 0;
        for (int64_t i = 0; i <= n; ++i) {
            const int64_t count = start_[i];
            most = larger(most, count);
            start_[i] = total;
            total += count;
        }
        each([&](int64_t at, int64_t o, int64_t k) {
            output_[start_[at]] = o;
            slot_[start_[at]++] = k;
        });
        for (int64_t i = n; i > 0; --i) start_[i] = start_[i - 1];
        start_[0] = 0;
    }
    int64_t begin(int64_t at) const { return start_[at]; }
    int64_t end(int64_t at) const { return start_[at + 1]; }
    int64_t output(int64_t i) const { return output_[i]; }
    int64_t slot(int64_t i) const { return slot_[i]; }

    int64_t most;  // pairs of one position

   private:
    int64_t *start_, *output_, *slot_;
};

// Rows of the second axis in groups: which rows of the other side the rows of a group meet. By queries, groups of
// output rows and the key rows they read; by keys, groups of key rows and the output rows that read them.
constexpr int rows_at_once = 4;

struct RowMeeting {
    int64_t other, n;
    int64_t row[rows_at_once];   // within the group, each once
    int64_t slot[rows_at_once];  // of the second axis, by which each of them meets it
};

class Meetings {
   public:
    static int64_t bytes(const Window &w) {
        return (larger(w.out[1], w.grid[1]) + 2) * sizeof(int64_t) + w.out[1] * w.size[1] * sizeof(RowMeeting);
    }
    Meetings(const Window &w, const Scratch &memory) : Meetings(memory, w.out[1]) {
        for (int64_t r = 0; r < w.out[1]; ++r) {
            begin_row(r);
            for (int64_t k = 0; k < w.size[1]; ++k) {
                const int64_t other = reads(w, 1, r, k);
                if (other >= 0) add(other, r % rows_at_once, k);
            }
        }
        finish();
    }
    Meetings(const Window &w, const Readers &readers, const Scratch &memory) : Meetings(memory, w.grid[1]) {
        for (int64_t r = 0; r < w.grid[1]; ++r) {
            begin_row(r);
            for (int64_t i = readers.begin(r); i < readers.end(r); ++i) add(readers.output(i), r % rows_at_once, readers.slot(i));
        }
        finish();
    }
    int64_t begin(int64_t group) const { return start_[group]; }
    int64_t end(int64_t group) const { return start_[group + 1]; }
    const RowMeeting &at(int64_t i) const { return meeting_[i]; }

    int64_t most = 0;  // meetings of one group

   private:
    Meetings(const Scratch &memory, int64_t rows)
        : start_(memory.at<int64_t>()), meeting_(memory.at<RowMeeting>((rows + 2) * sizeof(int64_t))) {}

    void begin_row(int64_t r) {
        if (r % rows_at_once == 0) start_[groups_++] = count_;
    }
    // A mirrored row can be read twice by one row: in two meetings, for sums are kept by row.
    void add(int64_t other, int64_t row, int64_t slot) {
        for (int64_t i = start_[groups_ - 1]; i < count_; ++i) {
            RowMeeting &m = meeting_[i];
            if (m.other != other || m.row[m.n - 1] == row) continue;
            m.slot[m.n] = slot;
            m.row[m.n++] = row;
            return;
        }
        meeting_[count_++] = {other, 1, {row}, {slot}};
    }
    void finish() {
        start_[groups_] = count_;
        for (int64_t g = 0; g < groups_; ++g) most = larger(most, start_[g + 1] - start_[g]);
    }

    int64_t *start_;
    RowMeeting *meeting_;
    int64_t groups_ = 0, count_ = 0;
};

}  // namespace
}  // namespace nearfold

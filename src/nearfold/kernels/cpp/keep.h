// The k best of a stream of scores: a threshold, a small buffer, and a cut back to k whenever the buffer is full.
//
// A row costs one comparison per score and about k ln(R / k) insertions, and never holds more than `capacity` scores.
// Scores come in the order of their index, and the buffer keeps that order: among equals the first wins.
#pragma once
#include <limits>

#include "engine.h"
#include "simd.h"

namespace nearfold {
namespace {

// Scores as integers in the same order; the two zeros are one.
template <class T>
inline IntVec<T> ordered(Vec<T> score) {
    score += splat<T>(0);
    IntVec<T> bits = (IntVec<T>)score;
    return bits ^ ((bits >> (8 * sizeof(T) - 1)) & Simd<T>::sign);
}
template <class T>
inline Int<T> ordered(T score) {
    score += T(0);
    Int<T> bits;
    memcpy(&bits, &score, sizeof bits);
    return bits < 0 ? bits ^ Simd<T>::sign : bits;
}
template <class T>
inline T unordered(Int<T> bits) {
    if (bits < 0) bits ^= Simd<T>::sign;
    T score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

template <class T>
inline IntVec<T> load_int(const Int<T> *from) {
    IntVec<T> v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class T>
inline IntVec<T> lane_numbers() {
    IntVec<T> v;
    for (int i = 0; i < lanes<T>; ++i) v[i] = i;
    return v;
}

constexpr int64_t most_expected = 160;  // `Keep::expect` has 256 classes for so many

template <class T>
struct Keep {
    static constexpr Int<T> lowest = std::numeric_limits<Int<T>>::min();
    static constexpr Int<T> highest = std::numeric_limits<Int<T>>::max();

    Int<T> *score;  // ordered
    Int<T> *index;
    T threshold;  // a score not above it changes nothing
    T margin;     // scores this far below the k-th best are kept, too: they are known no better than to half of it
    int64_t count;

    static int64_t limit(int64_t k) { return k + larger<int64_t>(k, 24); }
    // room for one tile row beyond the limit, and for what a compressing store writes too much
    static int64_t capacity(int64_t k) { return round_up(limit(k), lanes<T>) + tile_columns<T> + lanes<T>; }

    void begin(T at_least) {
        threshold = at_least;
        margin = 0;
        count = 0;
    }
    inline void add(T s, int64_t at) {
        score[count] = ordered<T>(s);
        index[count] = static_cast<Int<T>>(at);
        ++count;
    }
    inline void add(Vec<T> s, int64_t first, uint64_t bits) {
        compress<T>(score + count, ordered<T>(s), bits);
        count += compress<T>(index + count, lane_numbers<T>() + static_cast<Int<T>>(first), bits);
    }
    inline void settle(int64_t k) {
        const int64_t full = limit(k);
        if (count >= full) cut(k, (full - k) / 4);
    }

    static int64_t reaching(const Int<T> *score, int64_t count, Int<T> level) {
        int64_t n = 0;
        for (int64_t i = 0; i < count; i += lanes<T>) n += __builtin_popcountll(at_least<T>(load_int<T>(score + i), level));
        return n;
    }

    // The highest level that k to k + more of the scores reach; where equal ones forbid that, the highest that k reach.
    // The scores are padded with `lowest`.
    static Int<T> level_of(const Int<T> *score, int64_t count, int64_t k, int64_t more, int64_t &reached) {
        IntVec<T> low_lanes = IntVec<T>{} + highest, high_lanes = IntVec<T>{} + lowest;
        for (int64_t i = 0; i < count; i += lanes<T>) {
            const IntVec<T> v = load_int<T>(score + i), filled = v == lowest ? IntVec<T>{} + highest : v;
            low_lanes = filled < low_lanes ? filled : low_lanes;
            high_lanes = v > high_lanes ? v : high_lanes;
        }
        Int<T> low = least<T>(low_lanes), high = most<T>(high_lanes);
        reached = count;  // `low`; fewer than k reach more than `high`
        for (int step = 0; reached > k + more && low < high; ++step) {
            // the upper middle, without overflow; first of the numbers, for the middle of all bits is a tiny number
            Int<T> middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1);
            if (step < 3) {
                const Int<T> between = ordered<T>(unordered<T>(low) / 2 + unordered<T>(high) / 2);
                if (between > low && between <= high) middle = between;
            }
            const int64_t n = reaching(score, count, middle);
            const bool enough = n >= k;  // without a branch: it cannot be foreseen
            low = enough ? middle : low;
            high = enough ? high : middle - 1;
            reached = enough ? n : reached;
        }
        return low;
    }

    void pad() {  // to whole vectors, with what is never reached
        for (int64_t i = count; i % lanes<T>; ++i) score[i] = lowest;
    }

    // Keeps the k largest, and up to `more` of the next: bisects for a level that so many reach.
    void cut(int64_t k, int64_t more) {
        if (count <= k) return;
        pad();
        int64_t reached;
        Int<T> low = level_of(score, count, k, more, reached), high = low;
        if (margin > 0) {
            threshold = larger(threshold, unordered<T>(low) - margin);
            low = ordered<T>(threshold);
            reached = keep_from(low, high);
        } else if (reached <= k + more) {
            keep_from(low, high);
        } else {  // too many reach `low`, and too few reach more: of the equal ones, the first
            reached = k;
            int64_t above = low == highest ? 0 : reaching(score, count, low + 1), kept = 0;
            for (int64_t i = 0; i < count; ++i) {
                if (score[i] < low || (score[i] == low && above == k)) continue;
                above += score[i] == low;
                score[kept] = score[i];
                index[kept++] = index[i];
            }
            high = low;
        }
        count = reached;
        if (margin == 0) threshold = larger(threshold, unordered<T>(high));
    }

    // A first threshold from the scores of n keys, so that few of them enter: at least k reach the k-th largest of the
    // largest scores of some classes of columns. No score counts as more than the ceiling. Few classes are cheap, and
    // let through half as many again as many do: enough where no keys follow.
    void expect(const T *scores, int64_t n, int64_t k, T ceiling, bool more_follow) {
        if (k <= 10 && !more_follow)
            expect_of<16 / lanes<T>>(scores, n, k, ceiling);
        else if (k <= 16)
            expect_of<64 / lanes<T>>(scores, n, k, ceiling);
        else if (k <= most_expected)
            expect_of<256 / lanes<T>>(scores, n, k, ceiling);
    }
    template <int vectors>
    void expect_of(const T *scores, int64_t n, int64_t k, T ceiling) {
        constexpr int64_t classes = vectors * lanes<T>;
        if (n < 2 * classes) return;
        Int<T> largest[classes];
        for (int v = 0; v < vectors; ++v) {
            // four at once: one alone would wait for itself
            constexpr int chains = 4;
            Vec<T> most_of[chains];
            for (Vec<T> &m : most_of) m = splat<T>(-std::numeric_limits<T>::infinity());
            int64_t i = v * lanes<T>;
            for (; i + (chains - 1) * classes + lanes<T> <= n; i += chains * classes)
#pragma GCC unroll 4
                for (int c = 0; c < chains; ++c) {
                    const Vec<T> x = load<T>(scores + i + c * classes);
                    most_of[c] = x > most_of[c] ? x : most_of[c];  // a NaN never is
                }
            for (; i + lanes<T> <= n; i += classes) {
                const Vec<T> x = load<T>(scores + i);
                most_of[0] = x > most_of[0] ? x : most_of[0];
            }
            Vec<T> most_lanes = most_of[0];
            for (int c = 1; c < chains; ++c) most_lanes = most_of[c] > most_lanes ? most_of[c] : most_lanes;
            const IntVec<T> bits = ordered<T>(most_lanes);
            memcpy(largest + v * lanes<T>, &bits, sizeof bits);
        }
        Int<T> level = 0;
        if constexpr (classes <= 16) {
            for (int v = 0; v < vectors; ++v) {
                Int<T> ranks[lanes<T>];
                const IntVec<T> rank = ranks_of(largest, classes, v * lanes<T>);
                memcpy(ranks, &rank, sizeof rank);
                for (int i = 0; i < lanes<T>; ++i) level = ranks[i] == k - 1 ? largest[v * lanes<T> + i] : level;
            }
        } else {
            int64_t reached;
            level = level_of(largest, classes, k, k / 4, reached);
        }
        level = smaller(level, ordered<T>(ceiling));
        // where too few keys can be chosen at all, nothing is known
        if (level > ordered<T>(-std::numeric_limits<T>::infinity())) threshold = just_below(level) - margin;
    }

    // Scores that equal the level are greater than this. The next number below zero would be -0, which zero is not
    // greater than, and where tiny numbers are flushed they all are zero.
    static T just_below(Int<T> level) {
        constexpr T tiny = std::numeric_limits<T>::min();
        return level > ordered<T>(-tiny) && level <= ordered<T>(tiny) ? -tiny : unordered<T>(level - 1);
    }

    // Drops what does not reach `low`; how many are left, and the least of them.
    int64_t keep_from(Int<T> low, Int<T> &last) {
        int64_t kept = 0;
        IntVec<T> last_lanes = IntVec<T>{} + highest;
        for (int64_t i = 0; i < count; i += lanes<T>) {
            const IntVec<T> v = load_int<T>(score + i), at = load_int<T>(index + i);
            const uint64_t bits = at_least<T>(v, low);
            const IntVec<T> those = v >= (IntVec<T>{} + low) ? v : IntVec<T>{} + highest;
            last_lanes = those < last_lanes ? those : last_lanes;
            compress<T>(index + kept, at, bits);
            kept += compress<T>(score + kept, v, bits);
        }
        last = least<T>(last_lanes);
        return kept;
    }

    // The ranks of entries i, i + 1, ...: how many come before each. Equal ones do when they stand earlier.
    static inline IntVec<T> ranks_of(const Int<T> *score, int64_t count, int64_t i) {
        const IntVec<T> own = load_int<T>(score + i), place = lane_numbers<T>();
        IntVec<T> rank{};
        const int64_t end = smaller<int64_t>(i + lanes<T>, count);
        for (int64_t j = 0; j < i; ++j) rank -= (IntVec<T>{} + score[j]) >= own;
        for (int64_t j = i; j < end; ++j) {
            const IntVec<T> other = IntVec<T>{} + score[j];
            rank -= (other > own) | ((other == own) & ((IntVec<T>{} + static_cast<Int<T>>(j - i)) < place));
        }
        for (int64_t j = end; j < count; ++j) rank -= (IntVec<T>{} + score[j]) > own;
        return rank;
    }

    // Writes the best k, best first, ties by the lowest index; where there are fewer, -inf and `invalid`.
    void finish(int64_t k, T *out_score, int64_t *out_index) {
        if (count > 32) cut(k, 0);  // few more are sooner ranked than cut
        pad();
        for (int64_t i = 0; i < count; i += lanes<T>) {
            Int<T> ranks[lanes<T>];
            const IntVec<T> rank = ranks_of(score, count, i);
            memcpy(ranks, &rank, sizeof rank);
            for (int64_t j = i; j < smaller<int64_t>(i + lanes<T>, count); ++j) {
                if (ranks[j - i] >= k) continue;
                out_score[ranks[j - i]] = unordered<T>(score[j]);
                out_index[ranks[j - i]] = index[j];
            }
        }
        for (int64_t i = count; i < k; ++i) {
            out_score[i] = -std::numeric_limits<T>::infinity();
            out_index[i] = invalid;
        }
    }
};

}  // namespace
}  // namespace nearfold

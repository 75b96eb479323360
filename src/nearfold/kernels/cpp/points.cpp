// The k nearest keys of every query among points of few coordinates, cloud by cloud: a tree of boxes.
//
// Every cloud's keys are halved at the median of their longest side until `leaf_keys` are left, which lie next to one
// another, coordinate by coordinate. A query goes down to the nearer box first and leaves out each one that is farther than
// its k-th best. Exact: what is rounded is monotone, so that no key is computed to be nearer than the box it lies in. Keys
// rank by (squared distance, index), and a box by its distance and the lowest index in it: of equally near keys the lowest
// win, and many keys at one place cost no more than others.
#include <limits>

#include "engine.h"
#include "simd.h"

namespace nearfold {
namespace NEARFOLD_ISA {
namespace {

constexpr int64_t leaf_keys = 32;
constexpr int64_t block_queries = 256;
constexpr int most_levels = 64;

// A distance, which is never negative, and an index as one number in their order.
template <class T>
struct Rank;
template <>
struct Rank<float> {
    typedef uint64_t Number;
    typedef uint32_t Bits;
};
template <>
struct Rank<double> {
    typedef unsigned __int128 Number;
    typedef uint64_t Bits;
};
template <class T>
using Number = typename Rank<T>::Number;

template <class T>
inline Number<T> rank_of(T distance, int64_t index) {
    typename Rank<T>::Bits bits;
    memcpy(&bits, &distance, sizeof bits);
    return (static_cast<Number<T>>(bits) << (8 * sizeof bits)) | static_cast<typename Rank<T>::Bits>(index);
}
template <class T>
inline T distance_of(Number<T> rank) {
    const auto bits = static_cast<typename Rank<T>::Bits>(rank >> (8 * sizeof(typename Rank<T>::Bits)));
    T distance;
    memcpy(&distance, &bits, sizeof distance);
    return distance;
}
template <class T>
inline int64_t index_of(Number<T> rank) {
    return static_cast<int64_t>(static_cast<typename Rank<T>::Bits>(rank));
}

struct Node {
    int64_t first, last;  // its keys
    int64_t near, far;    // its halves, 0 for a leaf
    int64_t lowest;       // index of a key in it
};

// Leaves of the clouds before one that begins at row `first`: at least as many as they have.
inline int64_t leaves_before(int64_t cloud, int64_t first) { return first / leaf_keys + cloud; }

template <class T>
struct Tree {
    Node *nodes;     // at most two for each leaf
    T *boxes;        // (nodes, 2, E): least and largest coordinates
    T *panels;       // (leaves, E, leaf_keys)
    int32_t *index;  // (leaves * leaf_keys,) of the keys, in the order of the leaves
    int64_t count = 0;

    bool before(const T *key, int64_t E, int64_t axis, int32_t i, int32_t j) const {
        const T x = key[i * E + axis], y = key[j * E + axis];
        return x < y || (x == y && i < j);
    }

    // Keys first .. middle come before all others along the axis. (The standard library's would be linked once for all
    // instruction sets.)
    void part(const T *key, int64_t E, int64_t axis, int64_t first, int64_t middle, int64_t last) {
        uint64_t draw = 0x9e3779b97f4a7c15;  // no order of the keys is known beforehand to be a bad one
        while (last - first > 1) {
            draw = draw * 0xd1342543de82ef95 + 1;
            const int32_t pivot = index[first + static_cast<int64_t>((draw >> 33) % static_cast<uint64_t>(last - first))];
            int64_t i = first - 1, j = last;
            while (true) {
                do ++i;
                while (before(key, E, axis, index[i], pivot));
                do --j;
                while (before(key, E, axis, pivot, index[j]));
                if (i >= j) break;
                std::swap(index[i], index[j]);
            }
            const int64_t cut = j + 1 == last ? j : j + 1;  // both sides are shorter
            if (middle < cut)
                last = cut;
            else if (middle > cut)
                first = cut;
            else
                return;
        }
    }

    int64_t grow(const T *key, int64_t E, int64_t first, int64_t last) {
        const int64_t made = count++;
        Node &node = nodes[made];
        node = {first, last, 0, 0, index[first]};
        T *low = boxes + made * 2 * E, *high = low + E;
        for (int64_t e = 0; e < E; ++e) low[e] = high[e] = key[index[first] * E + e];
        for (int64_t i = first + 1; i < last; ++i) {
            node.lowest = smaller<int64_t>(node.lowest, index[i]);
            for (int64_t e = 0; e < E; ++e) {
                const T x = key[index[i] * E + e];
                low[e] = smaller(low[e], x), high[e] = larger(high[e], x);
            }
        }
        if (last - first <= leaf_keys) return made;
        int64_t axis = 0;
        for (int64_t e = 1; e < E; ++e)
            if (high[e] - low[e] > high[axis] - low[axis]) axis = e;
        // the left half is made of whole leaves
        const int64_t middle = first + ceil_div(last - first, leaf_keys) / 2 * leaf_keys;
        part(key, E, axis, first, middle, last);
        node.near = grow(key, E, first, middle);
        node.far = grow(key, E, middle, last);
        return made;
    }

    void begin(const T *key, int64_t n, int64_t E) {
        if (n == 0) return;
        for (int64_t i = 0; i < n; ++i) index[i] = static_cast<int32_t>(i);
        grow(key, E, 0, n);
        for (int64_t i = 0; i < ceil_div(n, leaf_keys) * leaf_keys; ++i)
            for (int64_t e = 0; e < E; ++e)
                panels[(i / leaf_keys * E + e) * leaf_keys + i % leaf_keys] = i < n ? key[index[i] * E + e] : T(0);
    }
};

template <class T>
inline T box_distance(const T *box, const T *q, int64_t E) {
    T total = 0;
    for (int64_t e = 0; e < E; ++e) {
        const T apart = larger(larger(box[e] - q[e], q[e] - box[E + e]), T(0));
        total += apart * apart;
    }
    return total;
}

// The best of one query, in order.
template <class T>
struct Best {
    Number<T> *rank;
    int64_t k, count;
    Number<T> worst;

    void add(Number<T> r) {
        int64_t low = 0;
        for (int64_t i = 0; i < count; ++i) low += rank[i] < r;  // by vectors, without a branch
        count = smaller(count + 1, k);
        memmove(rank + low + 1, rank + low, (count - 1 - low) * sizeof(Number<T>));
        rank[low] = r;
        if (count == k) worst = rank[k - 1];
    }
};

template <class T>
void scan_leaf(const Tree<T> &tree, const Node &leaf, const T *q, int64_t E, int64_t own, Best<T> &best) {
    static_assert(leaf_keys % lanes<T> == 0, "a leaf is whole vectors");
    const T *panel = tree.panels + leaf.first * E;
    for (int64_t first = leaf.first; first < leaf.last; first += lanes<T>, panel += lanes<T>) {
        Vec<T> distance{};
        for (int64_t e = 0; e < E; ++e) {
            const Vec<T> apart = splat<T>(q[e]) - load<T>(panel + e * leaf_keys);
            distance += apart * apart;
        }
        const int64_t n = smaller<int64_t>(lanes<T>, leaf.last - first);
        uint64_t passed = ~greater<T>(distance, splat<T>(distance_of<T>(best.worst))) & ((uint64_t(1) << n) - 1);
        T each[lanes<T>];
        if (passed) store<T>(each, distance);
        for (; passed; passed &= passed - 1) {
            const int lane = __builtin_ctzll(passed);
            const int64_t at = tree.index[first + lane];
            const Number<T> r = rank_of<T>(each[lane], at);
            if (at != own && r < best.worst) best.add(r);
        }
    }
}

template <class T>
void search(const Tree<T> &tree, const T *q, int64_t E, int64_t own, Best<T> &best) {
    struct Later {
        int64_t node;
        Number<T> rank;
    } later[most_levels];
    int depth = 0;
    best.count = 0;
    best.worst = rank_of<T>(std::numeric_limits<T>::infinity(), 0);
    int64_t at = 0;
    while (true) {
        const Node &node = tree.nodes[at];
        if (node.near) {
            const T *boxes = tree.boxes;
            const Number<T> one = rank_of<T>(box_distance(boxes + node.near * 2 * E, q, E), tree.nodes[node.near].lowest);
            const Number<T> other = rank_of<T>(box_distance(boxes + node.far * 2 * E, q, E), tree.nodes[node.far].lowest);
            const bool left = one < other;
            later[depth++] = {left ? node.far : node.near, left ? other : one};
            at = left ? node.near : node.far;
            continue;
        }
        scan_leaf(tree, node, q, E, own, best);
        while (depth && later[depth - 1].rank > best.worst) --depth;
        if (!depth) return;
        at = later[--depth].node;
    }
}

template <class T>
int points(const PointsArgs<T> &a) {
    const int64_t leaves = leaves_before(a.clouds, a.N), best_bytes = round_up((a.k + 1) * sizeof(Number<T>), 64);
    const Scratch trees(round_up(a.clouds * sizeof(Tree<T>), 64)), nodes(2 * leaves * sizeof(Node));
    const Scratch boxes(4 * leaves * a.E * sizeof(T)), panels(leaves * leaf_keys * a.E * sizeof(T));
    const Scratch index(leaves * leaf_keys * sizeof(int32_t)), best_of(best_bytes * a.threads);
    if (!(trees.ok() && nodes.ok() && boxes.ok() && panels.ok() && index.ok() && best_of.ok())) return out_of_memory;
    auto *tree = trees.template at<Tree<T>>();
    parallel(a.threads, a.clouds, [&](int64_t b, int) {
        const int64_t leaf = leaves_before(b, a.key_first[b]);
        tree[b] = {nodes.at<Node>() + 2 * leaf, boxes.template at<T>() + 4 * leaf * a.E,
                   panels.template at<T>() + leaf * leaf_keys * a.E, index.at<int32_t>() + leaf * leaf_keys};
        if (a.query_first[b] < a.query_first[b + 1])
            tree[b].begin(a.key + a.key_first[b] * a.E, a.key_first[b + 1] - a.key_first[b], a.E);
    });
    const auto blocks_before = [&a](int64_t b) { return a.query_first[b] / block_queries + b; };
    parallel(a.threads, blocks_before(a.clouds), [&](int64_t item, int worker) {
        int64_t b = 0;
        for (int64_t after = a.clouds; after - b > 1;) {
            const int64_t middle = (b + after) / 2;
            (blocks_before(middle) <= item ? b : after) = middle;
        }
        const int64_t first = a.query_first[b] + (item - blocks_before(b)) * block_queries, before = a.key_first[b];
        Best<T> best{best_of.template at<Number<T>>(best_bytes * worker), a.k, 0, 0};
        for (int64_t m = first; m < smaller(first + block_queries, a.query_first[b + 1]); ++m) {
            if (tree[b].count)
                search(tree[b], a.query + m * a.E, a.E, a.own ? m - before : -1, best);
            else
                best.count = 0;
            int64_t *to = a.index + m * a.k;
            for (int64_t s = 0; s < a.k; ++s) to[s] = s < best.count ? before + index_of<T>(best.rank[s]) : invalid;
        }
    });
    return ok;
}

}  // namespace

int points_float(const PointsArgs<float> &a) { return points(a); }
int points_double(const PointsArgs<double> &a) { return points(a); }

}  // namespace NEARFOLD_ISA
}  // namespace nearfold

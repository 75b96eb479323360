"""Calls that are right, for tests/test_engine_misuse.py: arguments by name, drawn from a random.Random."""

import math

import torch

# ---- calls that are right: arguments by name, drawn from a random.Random ---------------------------------------------


def numbers(dtype, *shape):
    return torch.randint(-3, 4, shape).to(dtype)


def right_select(rng):
    B, H, R, e = (rng.randint(1, n) for n in (2, 3, 40, 20))
    M, dtype = rng.randint(1, min(R, 20)), rng.choice([torch.float32, torch.float64])
    metric, squared = rng.choice(["dot", "cosine", "euclidean", "chebyshev", "gram"]), rng.random() < 0.5
    a = {"query": numbers(dtype, B, H, M, e), "key": numbers(dtype, B, H, R, e), "k": rng.randint(1, 12)}
    a |= {"metric": metric, "squared": squared, "query_index": torch.randperm(R)[:M], "key_index": torch.arange(R)}
    rule = rng.choice([[0, -1, 1], [1, -1, 1], [0, rng.randint(0, 3), rng.randint(1, 2)]])
    again = rng.choice([0.0, 1.5, float("-inf")])
    return a | {"grid": [R], "rule": rule, "own": rng.random() < 0.4, "again": again}


def right_select_backward(rng):
    a = right_select(rng)
    shape, R = (*a["query"].shape[:3], a["k"]), a["key"].shape[2]
    a |= {"grad": numbers(a["query"].dtype, *shape), "index": torch.randint(-2, R, shape)}
    return {name: a[name] for name in ("grad", "query", "key", "index", "metric", "squared")}


def right_aggregate(rng, dtypes=(torch.float32, torch.float64, torch.bfloat16)):
    B, N, M, S = (rng.randint(1, n) for n in (2, 40, 20, 6))
    dtype, C = rng.choice(dtypes), rng.choice([1, 2, 4, 6, 12, 32])
    H, G = (rng.choice([d for d in range(1, C + 1) if C % d == 0]) for _ in range(2))
    weight = numbers(dtype, G * rng.randint(1, 4), C // G, S) if rng.random() < 0.6 else None
    index, alpha = torch.randint(-2, N, (B, M, S, H)), numbers(dtype, B, M, S, H) if rng.random() < 0.6 else None
    E = rng.choice([1, 1, 2, 4])
    if weight is not None and E > 1:  # entries share a slot of the kernel
        index = torch.randint(-2, N, (B, M, S * E, H))
        alpha = None if alpha is None else numbers(dtype, B, M, S * E, H)
    a = {"value": numbers(dtype, B, N, C), "index": index, "alpha": alpha, "weight": weight, "groups": G}
    return a | {"entries": 1 if weight is None else E}


def aggregated(a):
    return *a["index"].shape[:2], a["value"].shape[2] if a["weight"] is None else a["weight"].shape[0]


def right_aggregate_backward(rng, **keywords):
    a = right_aggregate(rng, **keywords)
    return {"grad": numbers(a["value"].dtype, *aggregated(a)), **a}


def right_slot_scores(rng):
    a = right_aggregate(rng)
    B, M = a["index"].shape[:2]
    return {"query": numbers(a["value"].dtype, B, M, a["value"].shape[2]), "key": a["value"], "index": a["index"]}


def right_scan(rng):
    B, N, C, S = (rng.randint(1, n) for n in (2, 80, 40, 9))
    dtype = rng.choice([torch.float32, torch.float64])
    u, delta = torch.randn(B, N, C, dtype=dtype), torch.rand(B, N, C, dtype=dtype)
    A, into, out = (torch.randn(*shape, dtype=dtype) for shape in ((C, S), (B, N, S), (B, N, S)))
    return {"u": u, "delta": delta, "A": -A.abs(), "B": into, "C": out}


def scanned(a):
    (B, N, C), S = a["u"].shape, a["A"].shape[1]
    return [(B, N, C), (B, -(-N // 32), S, C)]


def right_scan_backward(rng):
    a = right_scan(rng)
    states = torch.randn(scanned(a)[1], dtype=a["u"].dtype)
    return {"grad": torch.randn_like(a["u"]), **a, "states": states}


def right_fast(rng):
    B, N, H, s, p = (rng.randint(1, n) for n in (2, 80, 3, 9, 40))
    dtype, rule = rng.choice([torch.float32, torch.float64]), rng.choice(["plain", "delta", "any"])
    each, decays = (B, N, H), rng.choice([None, 1, s])
    query, key, left, right = (torch.randn(*each, s, dtype=dtype) / s for _ in range(4))
    a = {"query": query, "key": key, "value": torch.randn(*each, p, dtype=dtype)}
    a |= {"log_decay": None if decays is None else -torch.rand(*each, decays, dtype=dtype)}
    a |= {"beta": torch.rand(each, dtype=dtype) if rule == "delta" else None}
    return a | {"left": left if rule == "any" else None, "right": right if rule == "any" else None}


def kept(a):
    """Shapes of y, the states, and what a correction read."""
    (B, N, H, s), p = a["query"].shape, a["value"].shape[3]
    corrected = a["beta"] is not None or a["left"] is not None
    return [(B, N, H, p), (B, H, -(-N // 64), s, p), (B, N if corrected else 0, H, p)]


def right_fast_backward(rng):
    a = right_fast(rng)
    y, states, reads = (torch.randn(shape, dtype=a["query"].dtype) for shape in kept(a))
    return {"grad": y, **a, "states": states, "reads": reads}


def right_largest(rng):
    B, N, C, M, S = (rng.randint(1, n) for n in (2, 9, 40, 70, 5))
    rows = torch.randn(B, N, C, dtype=rng.choice([torch.float32, torch.float64]))
    return {"rows": rows, "at": torch.randint(-1, N, (B, M, S))}


def right_largest_backward(rng):
    a = right_largest(rng)
    (B, N, C), M = a["rows"].shape, a["at"].shape[1]
    return {
        "grad": torch.randn(B, M, C, dtype=a["rows"].dtype),
        "where": torch.randint(-1, N, (B, M, C)),
        "positions": N,
    }


def right_points(rng):
    own, e, n = rng.random() < 0.5, rng.randint(1, 8), rng.randint(1, 4)
    dtype = rng.choice([torch.float32, torch.float64])
    key_first = torch.tensor([rng.randint(0, 80) * (i > 0) for i in range(n + 1)]).cumsum(0)
    query_first = key_first if own else torch.tensor([rng.randint(0, 9) * (i > 0) for i in range(n + 1)]).cumsum(0)
    rows = {"query": query_first, "key": key_first}
    points = {name: torch.randn(int(first[-1]), e, dtype=dtype).round(decimals=1) for name, first in rows.items()}
    return points | {"query_first": query_first, "key_first": key_first.clone(), "own": own, "k": rng.randint(1, 9)}


def right_corners(rng):
    grid, out, size, stride, dilation, before, _ = _window(rng)
    P, dtype = rng.randint(1, 3), rng.choice([torch.float32, torch.float64])
    offset = torch.randn(P, math.prod(size), len(grid), math.prod(out), dtype=dtype)
    mask = torch.rand(P, math.prod(size), math.prod(out), dtype=dtype) if rng.random() < 0.5 else None
    frame = {"grid": grid, "out": out, "size": size, "stride": stride, "dilation": dilation, "before": before}
    return {"offset": offset, "mask": mask, **frame}


def cornered(a):
    P, S, axes, M = a["offset"].shape
    return [(P, M, S << axes)] * 2


def right_softmax(rng):
    shape = [rng.randint(1, n) for n in (2, 20, 12)]
    score = torch.randn(shape, dtype=rng.choice([torch.float32, torch.float64]))
    return {"score": score, "index": torch.randint(-1, 5, shape), "scale": rng.choice([1.0, -0.5])}


def _window(rng):
    axes = rng.randint(1, 3)
    ranges = (2, 6), (1, 5), (1, 3), (1, 2), (1, 2), (0, 2)
    return *([rng.randint(*between) for _ in range(axes)] for between in ranges), rng.random() < 0.5


def right_local(rng):
    grid, out, size, stride, dilation, before, reflect = _window(rng)
    (B, H, e, d), dtype = (rng.randint(1, 3) for _ in range(4)), rng.choice([torch.float32, torch.float64])
    maps = (numbers(dtype, B, H, *shape) for shape in ((e, *out), (e, *grid), (d, *grid)))
    a = dict(zip(("query", "key", "value"), maps, strict=True))
    a |= {"size": size, "stride": stride, "dilation": dilation, "before": before, "reflect": reflect}
    return a | {"metric": rng.choice(["dot", "euclidean"]), "squared": rng.random() < 0.5, "scale": 0.5}


def right_local_backward(rng):
    """Of `local_attention_backward`."""
    a = right_local(rng)
    (B, H, _, *out), value = a["query"].shape, a["value"]
    grad, stats = (numbers(value.dtype, B, H, n, *out) for n in (value.shape[2], 2))
    maps = {name: a.pop(name) for name in ("query", "key", "value")}
    return {"grad": grad, **maps, "stats": stats.abs() + 1, **a}


def _slots(rng):
    """Outputs, a padded map that holds what they read, the slots' first positions and the strides."""
    axes = rng.randint(1, 3)
    out, stride = ([rng.randint(1, n) for _ in range(axes)] for n in (4, 3))
    slots = [[rng.randint(0, 3) for _ in range(axes)] for _ in range(rng.randint(1, 5))]
    grid = [max(s[a] for s in slots) + (out[a] - 1) * stride[a] + rng.randint(1, 2) for a in range(axes)]
    return out, grid, [n for s in slots for n in s], stride


def right_local_scores(rng):
    out, grid, offsets, stride = _slots(rng)
    (P, e), dtype = (rng.randint(1, 3) for _ in range(2)), rng.choice([torch.float32, torch.float64])
    a = {"query": numbers(dtype, P, e, *out), "key": numbers(dtype, P, e, *grid), "offsets": offsets, "stride": stride}
    return a | {"metric": rng.choice(["dot", "euclidean"]), "squared": rng.random() < 0.5}


def local_scored(a):
    return (a["query"].shape[0], len(a["offsets"]) // len(a["stride"]), *a["query"].shape[2:])


def right_local_scores_backward(rng):
    a = right_local_scores(rng)
    grad, score = (numbers(a["query"].dtype, *local_scored(a)) for _ in range(2))
    return {"grad": grad, "query": a.pop("query"), "key": a.pop("key"), "score": -score.abs(), **a}


def right_local_sum(rng):
    out, grid, offsets, stride = _slots(rng)
    (P, d), dtype = (rng.randint(1, 3) for _ in range(2)), rng.choice([torch.float32, torch.float64])
    alpha = numbers(dtype, P, len(offsets) // len(stride), *out)
    return {"alpha": alpha, "value": numbers(dtype, P, d, *grid), "offsets": offsets, "stride": stride}


def local_summed(a):
    return (*a["value"].shape[:2], *a["alpha"].shape[2:])


def right_local_sum_backward(rng):
    a = right_local_sum(rng)
    return {"grad": numbers(a["value"].dtype, *local_summed(a)), **a}


def right_corners_backward(rng):
    a = right_corners(rng)
    P, M, entries = cornered(a)[0]
    return {"grad": numbers(a["offset"].dtype, P, M, entries), **a}


def right_sampled(rng, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    """Points between the positions of one map, or of several."""
    axes, maps, dtype = rng.randint(1, 3), rng.randint(1, 3), rng.choice(dtypes)
    (B, M, H, P), d = (rng.randint(1, n) for n in (2, 9, 3, 4)), rng.randint(1, 40)
    shapes = [[rng.randint(1, 4) for _ in range(axes)] for _ in range(maps)]
    wide = torch.promote_types(dtype, torch.float32)
    a = {"value": numbers(dtype, B, sum(map(math.prod, shapes)), H * d)}
    a |= {"place": 3 * torch.randn(B, M, H, maps * P, axes, dtype=wide), "share": numbers(wide, B, M, H, maps * P)}
    return a | {"grid": [n for shape in shapes for n in shape]}


def right_sampled_backward(rng, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    a = right_sampled(rng, dtypes)
    return {"grad": numbers(a["value"].dtype, *a["place"].shape[:2], a["value"].shape[2]), **a}


def right_slot_scores_backward(rng):
    a = right_slot_scores(rng)
    return {"grad": numbers(a["query"].dtype, *a["index"].shape), **a}


def right_softmax_backward(rng):
    a = right_softmax(rng)
    return {"grad": a["score"], "alpha": a["score"].softmax(-1), "scale": a["scale"]}


def right_grouped_backward(rng):
    a = right_grouped(rng)
    out, (_, O, *_), (B, G, *_) = a.pop("out"), a["weight"].shape, a["maps"][0].shape
    return {"grad": numbers(a["weight"].dtype, B, O, G, *out), **a}


def right_deform_conv(rng):
    axes, dtype = rng.randint(1, 3), rng.choice([torch.float32, torch.float64])
    grid, size, stride, padding, dilation = (
        tuple(rng.randint(low, high) for _ in range(axes)) for low, high in ((5, 7), (1, 3), (1, 2), (0, 2), (1, 2))
    )
    room = zip(grid, padding, dilation, size, stride, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in room]
    B, groups, moved, slots = rng.randint(1, 2), rng.choice([1, 2]), rng.choice([1, 2]), math.prod(size)
    a = {"input": numbers(dtype, B, 4, *grid), "offset": torch.randn(B, moved * slots * axes, *out, dtype=dtype)}
    a |= {"weight": numbers(dtype, 2, 4 // groups, *size), "bias": numbers(dtype, 2) if rng.random() < 0.5 else None}
    a |= {"stride": stride, "padding": padding, "dilation": dilation}
    return a | {"mask": torch.rand(B, moved * slots, *out, dtype=dtype) if rng.random() < 0.5 else None}


def deformed(a):
    axes = a["input"].dim() - 2
    return (a["input"].shape[0], a["weight"].shape[0], *a["offset"].shape[-axes:])


def right_grouped(rng):
    grid, out, size, stride, dilation, before, reflect = _window(rng)
    (B, G, O), dtype = (rng.randint(1, 3) for _ in range(3)), rng.choice([torch.float32, torch.float64])
    maps = [numbers(dtype, B, G, rng.randint(1, 3), *grid) for _ in range(rng.randint(1, 4))]
    weight = numbers(dtype, G, O, sum(m.shape[2] for m in maps), *size)
    a = {"maps": maps, "weight": weight, "stride": stride, "dilation": dilation, "before": before}
    return a | {"out": out, "reflect": reflect}


def right_attention(rng):
    B, H, M, N, d, v = (rng.randint(1, n) for n in (2, 3, 20, 40, 12, 12))
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    a = {"query": numbers(dtype, B, H, M, d), "key": numbers(dtype, B, H, N, d), "value": numbers(dtype, B, H, N, v)}
    return a | {"k": rng.randint(1, 12), "is_causal": rng.random() < 0.3, "scale": rng.choice([None, 0.5])}


def image(rng):
    return {"x": torch.randn(rng.randint(1, 2), 8, rng.randint(3, 7), rng.randint(3, 7))}


def sequence(rng):
    return {"x": torch.randn(rng.randint(1, 2), 8, rng.randint(3, 20))}


def volume(rng):
    return {"x": torch.randn(rng.randint(1, 2), 8, *(rng.randint(2, 4) for _ in range(3)))}


def two_inputs(rng):
    a = tokens(rng)
    return a | {"context": torch.randn(len(a["x"]), rng.randint(1, 9), 8)}


def tokens(rng):
    return {"x": torch.randn(rng.randint(1, 2), rng.randint(1, 30), 8)}


# ---- the same of the compiled module's functions, which also take where the results go, and threads ------------------


def right_neighbors(rng, name):
    """Of a whole layer of nearest neighbours, forward or backward."""
    B, H, E, C, k = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 9), rng.randint(1, 8), rng.randint(2, 5)
    grid = [rng.randint(1, 5) for _ in range(rng.randint(1, 3))]
    N, dtype, backward = math.prod(grid), rng.choice((torch.float32, torch.float64)), name.endswith("backward")
    own, weighted, C = not backward and rng.random() < 0.5, rng.random() < 0.5, C * H
    G = rng.choice([d for d in range(1, C + 1) if C % d == 0])
    weight = numbers(dtype, G * rng.randint(1, 4), C // G, k) if rng.random() < 0.6 else None
    O = C if weight is None else len(weight)
    query, key = numbers(dtype, B, H * E, *grid), numbers(dtype, B, H * E, *grid)
    places = torch.arange(0, N, 2) if not backward and rng.random() < 0.4 else None
    M = N if places is None else len(places)
    index, alpha = torch.randint(-2, N, (B, H, M, k)), numbers(dtype, B, H, M, k) if weighted else None
    rows = [M] if places is not None else grid
    maps = {"query": query, "key": key, "value": numbers(dtype, B, C, *grid), "weight": weight}
    scale = 0.5 if weighted else None
    if not backward:
        a = maps | {"bias": numbers(dtype, O), "places": places, "heads": H, "groups": G, "k": k}
        a |= {"metric": rng.randint(0, 2), "unit": rng.random() < 0.5, "squared": True, "own": own, "scale": scale}
        out = numbers(dtype, B, M, O).transpose(1, 2).unflatten(2, rows)
        return a | {"to_index": torch.zeros_like(index), "to_alpha": alpha, "to_out": out}
    a = {"grad": numbers(dtype, B, O, *grid)} | maps | {"heads": H, "groups": G, "metric": rng.randint(0, 2)}
    slopes = {"d_query": numbers(dtype, B, M, H * E), "d_key": numbers(dtype, B, N, H * E)}
    slopes = slopes if weighted else dict.fromkeys(slopes)
    slopes |= {"d_value": numbers(dtype, B, N, C), "d_weight": None if weight is None else torch.zeros_like(weight)}
    return (
        a | {"squared": True, "scale": scale, "index": index, "alpha": alpha} | slopes | {"d_bias": numbers(dtype, O)}
    )


def _whole_window(rng):
    """Heads, the grid, size, and stride, dilation, before of a window, and its outputs."""
    axes = rng.randint(1, 3)
    grid, size = [rng.randint(2, 6) for _ in range(axes)], [rng.randint(1, 3) for _ in range(axes)]
    stride, before = [rng.randint(1, 2) for _ in range(axes)], [s // 2 for s in size]
    out = [-(-n // t) for n, t in zip(grid, stride, strict=True)]
    return rng.randint(1, 3), grid, size, stride, [1] * axes, before, out


def right_window(rng, name):
    """Of attention in a window over whole maps, forward or backward."""
    heads, grid, size, stride, dilation, before, out = _whole_window(rng)
    B, E, d, dtype = rng.randint(1, 2), rng.randint(1, 5), rng.randint(1, 5), rng.choice((torch.float32, torch.float64))
    query, key = numbers(dtype, B, heads * E, *grid), numbers(dtype, B, heads * E, *grid)
    value, made = numbers(dtype, B, heads * d, *grid), numbers(dtype, B, heads * d, *out)
    maps = {"query": query, "key": key, "value": value, "position": rng.choice([None, numbers(dtype, E, *grid)])}
    window = {"heads": heads, "home": [0] * len(grid), "size": size, "stride": stride, "dilation": dilation}
    window |= {"before": before, "reflect": rng.random() < 0.5, "scale": 0.5}
    stats = numbers(dtype, B, heads, 2, *out)
    if not name.endswith("backward"):
        return maps | window | {"to_out": made, "to_stats": stats}
    d_query = numbers(dtype, B, heads * E, *out)
    slopes = {"d_query": d_query, "d_key": torch.zeros_like(key), "d_value": torch.zeros_like(value)}
    return {"grad": made} | maps | {"stats": stats} | window | slopes


def right_shift(rng, name):
    """Of ACmix's convolution over whole maps, forward or backward."""
    heads, grid, size, stride, dilation, before, out = _whole_window(rng)
    B, G, t, count = rng.randint(1, 2), rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 3)
    dtype = rng.choice((torch.float32, torch.float64))
    maps = [numbers(dtype, B, heads * G, *grid) for _ in range(count)]
    weight, shift = numbers(dtype, t, count * heads), numbers(dtype, heads * G, t, *size)
    window = {"heads": heads, "stride": stride, "dilation": dilation, "before": before}
    window |= {"reflect": rng.random() < 0.5, "interleaved": rng.random() < 0.5}
    made = numbers(dtype, B, heads * G, *out)
    if not name.endswith("backward"):
        return {"maps": maps, "weight": weight, "shift": shift} | window | {"to_out": made}
    slopes = {"d_maps": [torch.zeros_like(m) for m in maps]}
    slopes |= {"d_weight": torch.zeros_like(weight), "d_shift": torch.zeros_like(shift)}
    return {"grad": made, "maps": maps, "weight": weight, "shift": shift} | window | slopes


def right_deformed(rng, name):
    """Of a window whose slots are moved over whole maps, forward or backward."""
    heads, grid, size, stride, dilation, before, out = _whole_window(rng)
    dtype, B, G, I = rng.choice((torch.float32, torch.float64)), *(rng.randint(1, n) for n in (2, 2, 4))
    C, S, axes = heads * G * rng.randint(1, 3), math.prod(size), len(grid)
    x, value = rng.choice([None, numbers(dtype, B, I, *grid)]), numbers(dtype, B, C, *grid)
    I = C if x is None else I
    weight = numbers(dtype, G * rng.randint(1, 4), C // G, *size) if rng.random() < 0.6 else None
    O, masked = C if weight is None else len(weight), rng.random() < 0.5
    bias = {"offset_bias": numbers(dtype, heads * S * axes) if rng.random() < 0.5 else None}
    mask = {"mask_weight": numbers(dtype, heads * S, I, *size) if masked else None}
    mask |= {"mask_bias": numbers(dtype, heads * S) if masked and rng.random() < 0.5 else None}
    a = {"offset_weight": numbers(dtype, heads * S * axes, I, *size)} | bias | mask | {"weight": weight}
    window = {"heads": heads, "groups": G, "grid": grid, "out_grid": out, "size": size, "stride": stride}
    window |= {"dilation": dilation, "before": before}
    moved = numbers(dtype, B * heads * S * (axes + masked) * math.prod(out))
    given = {"input": x, "value": value} | a
    if not name.endswith("backward"):
        made = numbers(dtype, B, math.prod(out), O).transpose(1, 2).unflatten(2, out)
        return given | {"bias": numbers(dtype, O)} | window | {"to_moved": moved, "to_out": made}
    rows = {"d_input": None if x is None else numbers(dtype, B, math.prod(grid), I)}
    rows |= {"d_value": numbers(dtype, B, math.prod(grid), C)}
    slopes = {f"d_{n}": None if t is None else torch.zeros_like(t) for n, t in a.items()}
    grad = {"grad": numbers(dtype, B, O, *out)}
    return grad | given | {"moved": moved} | window | rows | slopes | {"d_bias": numbers(dtype, O)}


def raw(name):
    """Arguments of one function of the module."""

    def right(rng):
        threads = {"threads": rng.randint(1, 3)}
        like = torch.zeros_like
        if name == "select":
            a = right_select(rng)
            causal, reach, dilation = a.pop("rule")
            shape = (*a["query"].shape[:3], a.pop("k"))
            own, again = a.pop("own"), a.pop("again")
            a |= {"metric": rng.randint(0, 3), "causal": bool(causal), "reach": reach, "dilation": dilation, "own": own}
            into = {"to_score": numbers(a["query"].dtype, *shape), "to_index": numbers(torch.long, *shape)}
            return a | {"again": again} | into | threads
        if name == "select_backward":
            a = right_select_backward(rng) | {"metric": rng.randint(0, 2)}
            return a | {"d_query": like(a["query"]), "d_key": like(a["key"])} | threads
        if name == "aggregate":
            a = right_aggregate(rng, (torch.float32, torch.float64))
            entries = {"entries": a.pop("entries")}
            return a | {"to_out": numbers(a["value"].dtype, *aggregated(a))} | threads | entries
        if name == "aggregate_backward":
            a = right_aggregate_backward(rng, dtypes=(torch.float32, torch.float64))
            entries = {"entries": a.pop("entries")}
            into = {f"d_{n}": None if a[n] is None else like(a[n]) for n in ("value", "alpha", "weight")}
            return a | into | threads | entries
        if name.startswith("neighbors"):
            return right_neighbors(rng, name) | threads
        if name.startswith("window_attention"):
            return right_window(rng, name) | threads
        if name.startswith("shift_conv"):
            return right_shift(rng, name) | threads
        if name.startswith("deformed"):
            return right_deformed(rng, name) | threads
        if name == "points":
            a = right_points(rng)
            return a | {"to_index": numbers(torch.long, len(a["query"]), a.pop("k"))} | threads
        if name == "largest":
            a = right_largest(rng)
            shape = (*a["at"].shape[:2], a["rows"].shape[2])
            return a | {"to_out": numbers(a["rows"].dtype, *shape), "to_where": numbers(torch.long, *shape)} | threads
        if name == "largest_backward":
            a = right_largest_backward(rng)
            B, _, C = a["grad"].shape
            return a | {"d_rows": numbers(a["grad"].dtype, B, a.pop("positions"), C)} | threads
        if name == "scan":
            a = right_scan(rng)
            y, states = (numbers(a["u"].dtype, *shape) for shape in scanned(a))
            return a | {"chunk": 32, "to_y": y, "to_states": states} | threads
        if name == "scan_backward":
            a = right_scan_backward(rng)
            into = {f"d_{n}": like(a[n]) for n in ("u", "delta", "A", "B", "C")}
            return a | {"chunk": 32} | into | threads
        if name == "sampled":
            a = right_sampled(rng, (torch.float32, torch.float64))
            return a | {"to_out": numbers(a["value"].dtype, *a["place"].shape[:2], a["value"].shape[2])} | threads
        if name == "sampled_backward":
            a = right_sampled_backward(rng, (torch.float32, torch.float64))
            return a | {f"d_{n}": like(a[n]) for n in ("value", "place", "share")} | threads
        if name == "fast":
            a = right_fast(rng)
            y, states, reads = (numbers(a["query"].dtype, *shape) for shape in kept(a))
            into = {"to_y": y, "to_reads": reads if reads.numel() else None, "to_states": states}
            return a | {"chunk": 64} | into | threads
        if name == "fast_backward":
            a = right_fast_backward(rng)
            states, reads = a.pop("states"), a.pop("reads")
            into = {f"d_{n}": None if x is None else like(x) for n, x in a.items() if n != "grad"}
            kept_ones = {"chunk": 64, "reads": reads if reads.numel() else None, "states": states}
            return a | kept_ones | into | threads
        if name.startswith("corners"):
            a = right_corners(rng)
            P, M, entries = cornered(a)[0]
            share = numbers(a["offset"].dtype, P, entries, M)
            if name == "corners":
                return a | {"to_index": numbers(torch.long, P, entries, M), "to_share": share} | threads
            into = {"d_offset": like(a["offset"]), "d_mask": None if a["mask"] is None else like(a["mask"])}
            return {"grad": share, **a, **into, **threads}
        if name.startswith("softmax"):
            a = {n: t.flatten(0, 1) if n != "scale" else t for n, t in right_softmax(rng).items()}
            if name == "softmax":
                return a | {"to_alpha": like(a["score"])} | threads
            return {"grad": a["score"], "alpha": like(a["score"]), "scale": 0.5, "d_score": like(a["score"])} | threads
        if name.startswith("local"):
            a = right_local(rng) | {"metric": rng.choice([0, 2])}
            (B, H, _, *out), value = a["query"].shape, a["value"]
            y, stats = (numbers(value.dtype, B, H, n, *out) for n in (value.shape[2], 2))
            if name == "local":
                return a | {"to_y": y, "to_stats": stats} | threads
            maps = {n: a.pop(n) for n in ("query", "key", "value")}
            into = {f"d_{n}": like(t) for n, t in maps.items()}
            return {"grad": y, **maps, "stats": stats, **a, **into, **threads}
        a = right_grouped(rng)
        (B, G), (_, O) = a["maps"][0].shape[:2], a["weight"].shape[:2]
        y = numbers(a["weight"].dtype, B, O, G, *a.pop("out"))
        if name == "grouped":
            return a | {"to_y": y} | threads
        return {"grad": y, **a, "d_maps": [like(m) for m in a["maps"]], "d_weight": like(a["weight"]), **threads}

    return right

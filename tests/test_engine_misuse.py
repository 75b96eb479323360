"""A bad call never crashes the process: hypothesis makes some thousands, each kind in a process of its own.

A call is right at first; then up to three arguments get another dtype, shape, stride or number. It must give tensors of
the documented shapes, or be refused in words. Every tensor ends where memory that may not be touched begins, and all
around its elements must stay as it was. A failure names the call, to be made again by

    python tests/test_engine_misuse.py LOG "('aggregate', 12, ((1, 30),))"
"""

import ast
import ctypes
import faulthandler
import mmap
import random
import resource
import subprocess
import sys
import warnings

import pytest
import torch

from nearfold.kernels import engine
from nearfold.kernels.aggregate import aggregate, aggregate_backward
from nearfold.kernels.grouped_conv import grouped_conv
from nearfold.kernels.local_attention import local_attention
from nearfold.kernels.select import select, select_backward
from nearfold.kernels.weigh import slot_softmax
from nearfold.nn import ACmix2d, BranchingConv2d, ConvNN2d, ConvNNAttention, KVTAttention
from nearfold.nn.functional import knn_attention

REFUSED = (ValueError, TypeError, RuntimeError, MemoryError)
st = pytest.importorskip("hypothesis.strategies")
OUTPUT = "d_", "to_"  # what the module writes to
CALLS = {"operators": 2000, "engine": 4000, "layers": 300}


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
    return {"value": numbers(dtype, B, N, C), "index": index, "alpha": alpha, "weight": weight, "groups": G}


def _aggregated(a):
    return *a["index"].shape[:2], a["value"].shape[2] if a["weight"] is None else a["weight"].shape[0]


def right_aggregate_backward(rng, **keywords):
    a = right_aggregate(rng, **keywords)
    return {"grad": numbers(a["value"].dtype, *_aggregated(a)), **a}


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


def _image(rng):
    return {"x": torch.randn(rng.randint(1, 2), 8, rng.randint(3, 7), rng.randint(3, 7))}


def _tokens(rng):
    return {"x": torch.randn(rng.randint(1, 2), rng.randint(1, 30), 8)}


# ---- the same of the compiled module's functions, which also take where the results go, and threads ------------------


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
            return a | {"to_out": numbers(a["value"].dtype, *_aggregated(a))} | threads
        if name == "aggregate_backward":
            a = right_aggregate_backward(rng, dtypes=(torch.float32, torch.float64))
            into = {f"d_{n}": None if a[n] is None else like(a[n]) for n in ("value", "alpha", "weight")}
            return a | into | threads
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


# ---- what is called: the function, its right arguments, the documented shapes of its results -------------------------


def _local_shapes(a):
    B, H, _, *out = a["query"].shape
    return [(B, H, a["value"].shape[2], *out), (B, H, 2, *out)]


def _gradients(a, *names):
    return [(0,) if a[n] is None else a[n].shape for n in names]


OPERATORS = {
    "select": (select, right_select, lambda a: [(*a["query"].shape[:3], a["k"])] * 2),
    "select_backward": (select_backward, right_select_backward, lambda a: _gradients(a, "query", "key")),
    "aggregate": (aggregate, right_aggregate, lambda a: [_aggregated(a)]),
    "aggregate_backward": (
        aggregate_backward,
        right_aggregate_backward,
        lambda a: _gradients(a, "value", "alpha", "weight"),
    ),
    "slot_softmax": (slot_softmax, right_softmax, lambda a: [a["score"].shape]),
    "local_attention": (local_attention, right_local, _local_shapes),
    "grouped_conv": (
        grouped_conv,
        right_grouped,
        lambda a: [(len(a["maps"][0]), a["weight"].shape[1], len(a["weight"]), *a["out"])],
    ),
    "knn_attention": (knn_attention, right_attention, lambda a: [(*a["query"].shape[:3], a["value"].shape[3])]),
}
torch.manual_seed(0)
LAYERS = {
    type(layer).__name__: (layer, right, lambda a: [a["x"].shape])
    for layer, right in (
        (ConvNN2d(8, 8, 3), _image),
        (ACmix2d(8, 8, num_heads=2), _image),
        (BranchingConv2d(8, 8, padding=1), _image),
        (ConvNNAttention(8, 2), _tokens),
        (KVTAttention(8, 2, k=5), _tokens),
    )
}
RAW = ("select", "aggregate", "softmax", "local", "grouped")
RAW = {f"_engine.{name}": (None, raw(name), None) for each in RAW for name in (each, f"{each}_backward")}
CHUNKS = {"operators": OPERATORS, "engine": RAW, "layers": LAYERS}
TARGETS = OPERATORS | LAYERS | RAW


# ---- what can be wrong with an argument ------------------------------------------------------------------------------


def _axes(change):
    """The change at each of the last four axes."""
    return [lambda x, at=at: change(x, x.dim() - 1 - at % x.dim()) if x.dim() else x for at in range(4)]


def _one(number, other):
    """One entry of floating point, or else of integers, replaced."""

    def change(x):
        x = x.clone(memory_format=torch.contiguous_format)
        if x.numel():
            x.view(-1)[x.numel() * 2 // 3] = number if x.is_floating_point() else other(x)
        return x

    return change


SHORTER = _axes(lambda x, axis: x.narrow(axis, 0, max(0, x.shape[axis] - 1)))
ENTRIES = [_one(float("nan"), lambda x, n=n: n) for n in (-2, -3, -(2**63), 10**6, 2**32, 2**40, 2**62)]
ENTRIES += [_one(float(number), lambda x: x.max() + 1) for number in ("inf", "-inf", "3e38", "1e-40")]
TENSORS = [
    *(lambda x, to=to: x.to(to) for to in (torch.half, torch.float, torch.double, torch.int, torch.bool, torch.cfloat)),
    *(lambda x, to=to: x.to(to) for to in (torch.bfloat16, torch.long)),
    *_axes(lambda x, axis: torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)),
    *SHORTER,
    *_axes(lambda x, axis: x.narrow(axis, 0, 0)),
    *_axes(lambda x, axis: x.narrow(axis, 0, min(1, x.shape[axis])).expand_as(x)),
    *_axes(lambda x, axis: x.select(axis, 0).unsqueeze(axis).repeat_interleave(200, axis)),
    *_axes(lambda x, axis: x.transpose(axis, 0)),
    *_axes(lambda x, axis: x.repeat_interleave(2, axis)[(slice(None),) * axis + (slice(None, None, 2),)]),
    lambda x: x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1]),
    lambda x: x.contiguous().as_strided(x.shape, [1] * x.dim()),
    torch.Tensor.flatten,
    lambda x: x[None],
    lambda x: x[0],
    torch.Tensor.to_sparse,
    *ENTRIES,
    lambda x: torch.full_like(x, float("nan") if x.is_floating_point() else -2),
    torch.ones_like,
    lambda x: None,
]
# made of a tensor in its place, for the module
BUFFERS = [
    torch.Tensor.numpy,
    lambda x: x.to("meta"),  # an operator is torch's to dispatch: one operand on "meta" makes it a dry run
    lambda x: x.numpy()[::-1],
    lambda x: x.numpy()[..., ::-1],
    lambda x: x.numpy().byteswap().view(x.numpy().dtype.newbyteorder()),
    lambda x: memoryview(x.numpy()).toreadonly(),
    lambda x: x.requires_grad_(),
    torch.Tensor.tolist,
]
NUMBERS = [0, -1, 2, 300, 1024, 1025, 2**31, 2**62, 2**63 - 1, -(2**63), 2**64, True, 2.5, None, "3"]
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e300, -1e-300, 3, "1", [1.0]]
BIG = 2**62, 2**63 - 1, 2**33, 3495448806107869119, 5514645600885007272  # the last two, times 867, are 8 mod 2^64
LISTS = [[], [0], [2, -1, 1], [0, -2, 1], [0, -1, 0], [1, 0, 1], [0, BIG[0], 1], [0, -1, BIG[1]], [1.5], None, "ab", 7]
LISTS += [[BIG[2], BIG[2]], [-1, -1], [1, 2, 3, 4], [1] * 70, [BIG[3], BIG[4], 867]]


def _changes(name, value, is_raw):
    if isinstance(value, torch.Tensor):
        often = SHORTER * 5 if name.startswith(OUTPUT) else ENTRIES * 4 if value.dtype == torch.long else []
        return TENSORS + often + BUFFERS * is_raw
    if name.endswith("maps") and value:
        among = [lambda x, c=c: [*x[:-1], c(x[-1])] for c in TENSORS[:-1]]
        return [*among, lambda x: x[:-1], lambda x: x + x[-1:], lambda x: x * 5]
    if name == "threads":  # more of them, the system may refuse to start, and OpenMP then ends the process
        return [lambda _, n=n: n for n in (0, -1, 7, 2**40, 1.5)]
    for kind, others in ((int, NUMBERS), (float, FLOATS), (list, LISTS), (str, ["gram", "none", "", None, 0])):
        if isinstance(value, kind):
            return [lambda _, n=n: n for n in others]
    return [lambda _: torch.zeros(2, 3), lambda _: 0.5, lambda _: "none"]


class Fences:
    """Rooms for tensors, each with a page behind it that ends the process when it is touched."""

    ROOM, COUNT, PAGE = 1 << 18, 24, mmap.PAGESIZE

    def __init__(self):
        self.memory = torch.frombuffer(mmap.mmap(-1, self.ROOM * self.COUNT), dtype=torch.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for end in range(self.ROOM, self.ROOM * self.COUNT + 1, self.ROOM):
            place = ctypes.c_void_p(self.memory.data_ptr() + end - self.PAGE)
            assert protect(place, ctypes.c_size_t(self.PAGE), 0) == 0
        self.rooms = []  # of this call: name, memory, what was in it, which bytes may change

    def place(self, name, x):
        """The same tensor, in the next room; what is too large, or no plain memory, stays where it is."""
        if isinstance(x, list):
            return [self.place(name, each) for each in x]
        if not isinstance(x, torch.Tensor) or x.device.type != "cpu" or x.layout != torch.strided:
            return x
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        end = (len(self.rooms) + 1) * self.ROOM - self.PAGE
        start = end - span * x.element_size()
        if end - start > self.ROOM - 2 * self.PAGE or len(self.rooms) == self.COUNT:
            return x
        room = self.memory[start - self.PAGE : end].fill_(0x5A)
        flat = room[self.PAGE :].view(x.dtype).copy_(x.as_strided((span,), (1,)))
        free = torch.zeros(span, dtype=torch.bool)
        if name.startswith(OUTPUT):
            at = torch.zeros(x.shape, dtype=torch.long)
            for axis, (n, step) in enumerate(zip(x.shape, x.stride(), strict=True)):
                at += (torch.arange(n) * step).view(-1, *[1] * (x.dim() - 1 - axis))
            free[at.flatten()] = True
        free = torch.cat([torch.zeros(self.PAGE, dtype=torch.bool), free.repeat_interleave(x.element_size())])
        self.rooms.append((name, room, room.clone(), free))
        return flat.as_strided(x.shape, x.stride())

    def check(self):
        for name, room, before, free in self.rooms:
            assert torch.equal(room[~free], before[~free]), f"wrote to {name} or around it"
        self.rooms.clear()


# ---- one call, and many ----------------------------------------------------------------------------------------------


def built(fences, target, at, changes):
    """The arguments of a call: those of a right one, some of them changed."""
    torch.manual_seed(at)
    is_raw, later = target in RAW, []
    a = TARGETS[target][1](random.Random(at))
    for which, way in changes:
        name = list(a)[which % len(a)]
        ways = _changes(name, a[name], is_raw)
        change = ways[way % len(ways)]
        if (
            change is TENSORS[-1]
            and not is_raw
            and not (target.startswith("aggregate") and name in ("alpha", "weight"))
        ):
            continue  # None in place of a tensor is Python's own AttributeError
        if change in BUFFERS:
            later.append((name, change))
            continue
        try:
            a[name] = change(a[name])
        except (*REFUSED, IndexError, AttributeError):  # by torch: it cannot be made of this one
            pass
    a = {name: fences.place(name, x) for name, x in a.items()}
    for name, change in later:
        try:
            a[name] = change(a[name])
        except (*REFUSED, AttributeError):
            pass
    return a


def _leaves(a):
    every = [t for x in a.values() for t in (x if isinstance(x, list) else [x])]
    return [t.requires_grad_() for t in every if isinstance(t, torch.Tensor) and t.is_floating_point()]


def attempt(target, a):
    """Whether the call was taken, and then gave what it should; False where it was refused in words."""
    call, _, shapes = TARGETS[target]
    if target in RAW:
        try:
            assert getattr(engine.get(), target.removeprefix("_engine."))(*a.values()) is None
        except (ValueError, TypeError, MemoryError):
            return False
        return True
    leaves = _leaves(a)
    leaves += call.parameters() if target in LAYERS else []
    try:
        found = call(**a)
        found = [found] if isinstance(found, torch.Tensor) else found
        total = [r.sum() for r in found if r.requires_grad]
        slopes = torch.autograd.grad(total, leaves, allow_unused=True) if total and leaves else []
    except (*REFUSED, IndexError) as error:  # what the gradients' operators refuse without the engine is torch's to say
        assert "backward" in target or not isinstance(error, IndexError), error
        assert str(error), "refused without a word"
        return False
    assert [r.shape for r in found] == [torch.Size(s) for s in shapes(a)], [r.shape for r in found]
    assert all(g is None or g.shape == t.shape for g, t in zip(slopes, leaves, strict=bool(slopes)))
    return True


def main(log, what):
    """A chunk of the campaign, or one call; the log holds the last call."""
    from hypothesis import HealthCheck, Phase, given, settings

    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    fences, counts = Fences(), {"calls": 0, "taken": 0}
    torch.ones(1 << 16).exp()  # starts torch's threads
    with open("/proc/self/statm") as file:  # what is huge must not be had
        most = int(file.read().split()[0]) * fences.PAGE + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def one(call):
        target, at, changes = call
        with open(log, "w") as file:
            file.write(f"{call!r}")
        with engine.forced(engine.names()[at % (len(engine.names()) - 1)]):
            counts["taken"] += attempt(target, built(fences, target, at, changes))
        fences.check()
        counts["calls"] += 1

    if what not in CHUNKS:
        return one(ast.literal_eval(what))
    change = st.tuples(st.integers(0, 20), st.integers(0, 200))
    calls = st.tuples(st.sampled_from(list(CHUNKS[what])), st.integers(0, 999), st.lists(change, max_size=3).map(tuple))
    rules = settings(
        max_examples=CALLS[what],
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # no shrinking: a call is short
        suppress_health_check=list(HealthCheck),
    )
    rules(given(calls)(one))()
    print(counts["calls"], counts["taken"])


@pytest.mark.skipif(engine.get() is None, reason="needs the compiled engine")
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and mprotect")
@pytest.mark.parametrize("chunk", CHUNKS)
def test_bad_calls_never_crash(chunk, tmp_path):
    log = tmp_path / "last_call"
    done = subprocess.run([sys.executable, __file__, log, chunk], capture_output=True, text=True, timeout=200)
    last = log.read_text() if log.exists() else "the start"
    assert done.returncode == 0, f"exit status {done.returncode} at {last}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    calls, taken = map(int, done.stdout.split())
    assert calls >= CALLS[chunk] * 0.95 and 0.1 * calls < taken < 0.9 * calls, done.stdout


if __name__ == "__main__":
    main(*sys.argv[1:])

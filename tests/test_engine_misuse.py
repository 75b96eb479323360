"""A bad call never crashes the process: hypothesis makes some thousands, each kind in a process of its own.

A call is right at first; then up to three arguments get another dtype, shape, stride or number. It must give tensors of
the documented shapes, or be refused in words. Every tensor ends where memory that may not be touched begins, and all
around its elements must stay as it was. A failure names the call, to be made again by

    python tests/test_engine_misuse.py LOG "('aggregate', 12, ((1, 30),))"
"""

import ast
import contextlib
import ctypes
import faulthandler
import inspect
import mmap
import random
import resource
import subprocess
import sys
import warnings

import numpy
import pytest
import torch
from helpers.cells import slow_but
from helpers.misuse_calls import (
    aggregated,
    cornered,
    deformed,
    image,
    kept,
    local_scored,
    local_summed,
    raw,
    right_aggregate,
    right_aggregate_backward,
    right_attention,
    right_corners,
    right_corners_backward,
    right_deform_conv,
    right_fast,
    right_fast_backward,
    right_grouped,
    right_grouped_backward,
    right_largest,
    right_largest_backward,
    right_local,
    right_local_backward,
    right_local_scores,
    right_local_scores_backward,
    right_local_sum,
    right_local_sum_backward,
    right_points,
    right_sampled,
    right_sampled_backward,
    right_scan,
    right_scan_backward,
    right_select,
    right_select_backward,
    right_slot_scores,
    right_slot_scores_backward,
    right_softmax,
    right_softmax_backward,
    scanned,
    sequence,
    tokens,
    two_inputs,
    volume,
)

from nearfold import nn
from nearfold.kernels import engine
from nearfold.kernels.aggregate import aggregate, aggregate_backward
from nearfold.kernels.corners import corners, corners_backward
from nearfold.kernels.edges import largest, largest_backward
from nearfold.kernels.fast_weights import NAMES, fast_weights, fast_weights_backward
from nearfold.kernels.grouped_conv import grouped_conv, grouped_conv_backward
from nearfold.kernels.local import local_scores, local_scores_backward, local_sum, local_sum_backward
from nearfold.kernels.local_attention import local_attention, local_attention_backward
from nearfold.kernels.points import nearest_points
from nearfold.kernels.sampled import sampled, sampled_backward
from nearfold.kernels.scan import selective_scan, selective_scan_backward
from nearfold.kernels.select import select, select_backward
from nearfold.kernels.slot_scores import slot_scores, slot_scores_backward
from nearfold.kernels.weigh import slot_softmax, slot_softmax_backward
from nearfold.nn.functional import deform_conv, knn_attention

REFUSED = (ValueError, TypeError, RuntimeError, MemoryError)
UNMADE = (*REFUSED, IndexError, AttributeError)
st = pytest.importorskip("hypothesis.strategies")
OUTPUT = "d_", "to_"  # what the module writes to
CALLS = {"operators": 500, "engine": 600, "layers": 150, "making": 250}


# ---- what is called: the function, its right arguments, the documented shapes of its results -------------------------


def _local_shapes(a):
    B, H, _, *out = a["query"].shape
    return [(B, H, a["value"].shape[2], *out), (B, H, 2, *out)]


def _gradients(a, *names):
    return [(0,) if a[n] is None else a[n].shape for n in names]


OPERATORS = {
    "select": (select, right_select, lambda a: [(*a["query"].shape[:3], int(a["k"]))] * 2),
    "select_backward": (select_backward, right_select_backward, lambda a: _gradients(a, "query", "key")),
    "aggregate": (aggregate, right_aggregate, lambda a: [aggregated(a)]),
    "aggregate_backward": (
        aggregate_backward,
        right_aggregate_backward,
        lambda a: _gradients(a, "value", "alpha", "weight"),
    ),
    "slot_scores": (slot_scores, right_slot_scores, lambda a: [a["index"].shape]),
    "selective_scan": (selective_scan, right_scan, scanned),
    "selective_scan_backward": (
        selective_scan_backward,
        right_scan_backward,
        lambda a: _gradients(a, "u", "delta", "A", "B", "C"),
    ),
    "fast_weights": (fast_weights, right_fast, kept),
    "fast_weights_backward": (
        fast_weights_backward,
        right_fast_backward,
        lambda a: [a[n].shape for n in NAMES if a[n] is not None],
    ),
    "corners": (corners, right_corners, cornered),
    "slot_softmax": (slot_softmax, right_softmax, lambda a: [a["score"].shape]),
    "local_attention": (local_attention, right_local, _local_shapes),
    "grouped_conv": (
        grouped_conv,
        right_grouped,
        lambda a: [(len(a["maps"][0]), a["weight"].shape[1], len(a["weight"]), *a["out"])],
    ),
    "corners_backward": (corners_backward, right_corners_backward, lambda a: _gradients(a, "offset", "mask")),
    "slot_scores_backward": (
        slot_scores_backward,
        right_slot_scores_backward,
        lambda a: _gradients(a, "query", "key"),
    ),
    "slot_softmax_backward": (slot_softmax_backward, right_softmax_backward, lambda a: _gradients(a, "alpha")),
    "local_attention_backward": (
        local_attention_backward,
        right_local_backward,
        lambda a: _gradients(a, "query", "key", "value"),
    ),
    "grouped_conv_backward": (
        grouped_conv_backward,
        right_grouped_backward,
        lambda a: [m.shape for m in (*a["maps"], a["weight"])],
    ),
    "largest": (largest, right_largest, lambda a: [(*a["at"].shape[:2], a["rows"].shape[2])] * 2),
    "largest_backward": (
        largest_backward,
        right_largest_backward,
        lambda a: [(len(a["grad"]), int(a["positions"]), a["grad"].shape[2])],
    ),
    "sampled": (sampled, right_sampled, lambda a: [(*a["place"].shape[:2], a["value"].shape[2])]),
    "sampled_backward": (sampled_backward, right_sampled_backward, lambda a: _gradients(a, "value", "place", "share")),
    "nearest_points": (
        lambda metric="euclidean", **a: nearest_points(metric=metric, **a),
        right_points,
        lambda a: [(len(a["query"]), int(a["k"]))],
    ),
    "local_scores": (local_scores, right_local_scores, lambda a: [local_scored(a)]),
    "local_scores_backward": (
        local_scores_backward,
        right_local_scores_backward,
        lambda a: _gradients(a, "query", "key"),
    ),
    "local_sum": (local_sum, right_local_sum, lambda a: [local_summed(a)]),
    "local_sum_backward": (local_sum_backward, right_local_sum_backward, lambda a: _gradients(a, "alpha", "value")),
    "deform_conv": (deform_conv, right_deform_conv, lambda a: [deformed(a)]),
    "knn_attention": (knn_attention, right_attention, lambda a: [(*a["query"].shape[:3], a["value"].shape[3])]),
}
torch.manual_seed(0)
MADE = [
    (nn.ACmix2d(8, 8, num_heads=2), image),
    (nn.BlockAttention2d(8, 2, 3, shift=1), image),
    (nn.BranchingAttention(8, 2), tokens),
    (nn.BranchingConv2d(8, 8), image),
    (nn.ConvNN1d(8, 8, 3), sequence),
    (nn.ConvNN2d(8, 8, 3), image),
    (nn.ConvNN3d(8, 8, 3), volume),
    (nn.ConvNNAttention(8, 2), tokens),
    (nn.CrossAttention(8, 2), two_inputs),
    (nn.DCNv3(8, groups=2), image),
    (nn.DCNv4(8, groups=2), image),
    (nn.DeformableAttention2d(8, 2, stride=2), image),
    (nn.DeformConv2d(8, 8, offset_groups=2, modulated=True), image),
    (nn.DynamicConv2d(8, 8), image),
    (nn.GatedDeltaNet(8, 2), tokens),
    (nn.EdgeConv(8, 8, 5), sequence),
    (nn.Involution2d(8, 3), image),
    (nn.KVTAttention(8, 2, k=5), tokens),
    (nn.LargeKernelConv2d(8, 7), image),
    (nn.LinearAttention(8, 2, causal=True), tokens),
    (nn.MaxRelativeConv2d(8, 8), image),
    (nn.Mixer("window(3) | box | inverse*kernel", 8), image),
    (nn.NeighborhoodAttention1d(8, 2, 3, step=4, relative_bias=True), sequence),
    (nn.NeighborhoodAttention2d(8, 2, 3, relative_bias=True), image),
    (nn.NeighborhoodAttention3d(8, 2, 3, causal_axes=(0,)), volume),
    (nn.Pool2d(8, 3, "max", stride=1, padding=1), image),
    (nn.RWKV7(8, 2), tokens),
    (nn.Retention(8, 2), tokens),
    (nn.MLSTM(8, 2), tokens),
    (nn.SelectiveScan(8, 3), tokens),
    (nn.SelectiveScan2d(8, 3), image),
    (nn.SelfAttention(8, 2, positions="alibi"), tokens),
    (nn.SlidingWindowAttention(8, 2, 5), tokens),
    (nn.StridedAttention(8, 2, 3), tokens),
    (nn.TokenMixer("all(elu) | row | normalized", 8), tokens),
]
LAYERS = {type(layer).__name__: (layer, right, lambda a: [a["x"].shape]) for layer, right in MADE}


def _making(layer, right):
    """A layer's own class, called with its right arguments, and then the layer with a right input."""
    cls = type(layer)
    takes = {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"}
    known = {"operation": str(layer.operation) if hasattr(layer, "operation") else "", "num_heads": 2, "step": 3}
    own = {n: known.get(n, 8) if p.default is p.empty else p.default for n, p in takes.items()}

    def call(**arguments):
        cls(**arguments)(**right(random.Random(0)))
        return []

    return call, lambda rng: dict(own), lambda a: []


MAKING = {f"{type(layer).__name__}()": _making(layer, right) for layer, right in MADE}
RAW = (
    "select",
    "aggregate",
    "neighbors",
    "softmax",
    "local",
    "window_attention",
    "grouped",
    "shift_conv",
    "scan",
    "fast",
    "corners",
    "deformed",
    "largest",
    "sampled",
)
RAW = {f"_engine.{name}": (None, raw(name), None) for each in RAW for name in (each, f"{each}_backward")}
RAW["_engine.points"] = (None, raw("points"), None)
CHUNKS = {"operators": OPERATORS, "engine": RAW, "layers": LAYERS, "making": MAKING}
TARGETS = OPERATORS | LAYERS | RAW | MAKING


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
    *(NOT_TENSORS := (lambda x: None, torch.Tensor.tolist, lambda x: x.numpy(), lambda x: "x", lambda x: 0.5)),
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
NUMBERS = [0, -1, 2, 300, 1024, 1025, 2**31, 2**62, 2**63 - 1, -(2**63), 2**64, 10**400, True, 2.5, None, "3"]
NUMBERS += [numpy.int64(3), numpy.bool_(True), numpy.float32(2.5), numpy.arange(3), torch.tensor(2)]
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e300, -1e-300, 3, "1", [1.0], 10**400, numpy.float32(0.5)]
BIG = 2**62, 2**63 - 1, 2**33, 3495448806107869119, 5514645600885007272  # the last two, times 867, are 8 mod 2^64
LISTS = [[], [0], [2, -1, 1], [0, -2, 1], [0, -1, 0], [1, 0, 1], [0, BIG[0], 1], [0, -1, BIG[1]], [1.5], None, "ab", 7]
LISTS += [[BIG[2], BIG[2]], [-1, -1], [1, 2, 3, 4], [1] * 70, [BIG[3], BIG[4], 867]]


def _changes(name, value, is_raw):
    if isinstance(value, torch.Tensor):
        often = SHORTER * 5 if name.startswith(OUTPUT) else ENTRIES * 4 if value.dtype == torch.long else []
        return TENSORS + often + BUFFERS * is_raw
    if name.endswith("maps") and value:
        among = [lambda x, c=c: [*x[:-1], c(x[-1])] for c in TENSORS]
        return [*among, lambda x: x[:-1], lambda x: x + x[-1:], lambda x: x * 5]
    if name == "threads":  # more of them, the system may refuse to start, and OpenMP then ends the process
        return [lambda _, n=n: n for n in (0, -1, 7, 2**40, 1.5)]
    if isinstance(value, tuple):
        return [lambda _, n=n: tuple(n) if isinstance(n, list) else n for n in LISTS + NUMBERS]
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
        if change in BUFFERS:
            later.append((name, change))
            continue
        with contextlib.suppress(*UNMADE):  # refused by torch: it cannot be made of this one
            a[name] = change(a[name])
    a = {name: fences.place(name, x) for name, x in a.items()}
    for name, change in later:
        with contextlib.suppress(*UNMADE):
            a[name] = change(a[name])
    return a


def _leaves(a):
    every = [t for x in a.values() for t in (x if isinstance(x, list) else [x])]
    return [t.requires_grad_() for t in every if isinstance(t, torch.Tensor) and t.is_floating_point()]


def attempt(target, a):
    """Whether the call was taken, and then gave what it should; False where it was refused in words."""
    call, _, shapes = TARGETS[target]
    if target in RAW:
        try:
            taken = getattr(engine.get(), target.removeprefix("_engine."))(*a.values())
        except (ValueError, TypeError, MemoryError):
            return False
        assert taken in (None, True, False)
        return taken is not False
    leaves = _leaves(a)
    leaves += call.parameters() if target in LAYERS else []
    try:
        found = call(**a)
        found = [found] if isinstance(found, torch.Tensor) else found
        total = [r.sum() for r in found if r.requires_grad]
        slopes = torch.autograd.grad(total, leaves, allow_unused=True) if total and leaves else []
    except REFUSED as error:
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
@pytest.mark.parametrize("chunk", slow_but(("making",), CHUNKS))
def test_bad_calls_never_crash(chunk, tmp_path):
    log = tmp_path / "last_call"
    done = subprocess.run([sys.executable, __file__, log, chunk], capture_output=True, text=True, timeout=200)
    last = log.read_text() if log.exists() else "the start"
    assert done.returncode == 0, f"exit status {done.returncode} at {last}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    calls, taken = map(int, done.stdout.split())
    assert calls >= CALLS[chunk] * 0.95 and 0.1 * calls < taken < 0.9 * calls, done.stdout


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The Triton window attention against the PyTorch path in float64: outputs and every gradient."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nearfold.kernels import local_attention_torch
from nearfold.kernels.local_attention_torch import Window
from nearfold.kernels.triton import local_attention as kernels
from nearfold.testing import poisoned_empties

pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # of rows that are not there
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
]

# largest error over the tensor's largest number: measured 9e-7, 6.2e-3 and 3.6e-4 over these tests; the short types
# lose nothing but their results' own rounding, which for bfloat16 the interpreter does by cutting digits off
BUDGET = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 6e-4}
NAMES = ("y", "d_query", "d_key", "d_value")


@dataclass
class Case:
    """A window on a grid, and the sizes around it."""

    grid: list[int]
    size: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]
    reflect: bool = False
    metric: tuple[str, bool] = ("dot", False)
    e: int = 3
    d: int = 2
    problems: tuple[int, int] = (1, 2)
    scale: float = 0.7
    out: list[int] | None = None

    def __post_init__(self):
        if self.out is None:
            room = [
                n + 2 * b - d * (s - 1) - 1
                for n, b, s, d in zip(self.grid, self.before, self.size, self.dilation, strict=True)
            ]
            self.out = [max(r // t + 1, 1) for r, t in zip(room, self.stride, strict=True)]

    def arguments(self):
        return (
            self.size,
            self.stride,
            self.dilation,
            self.before,
            self.reflect,
            *self.metric,
            self.scale,
        )

    def operands(self, dtype=torch.float32):
        shapes = ((self.e, self.out), (self.e, self.grid), (self.d, self.grid), (self.d, self.out))
        return [torch.randn(*self.problems, c, *n).to(dtype) for c, n in shapes]


CASES = {
    "plain": Case([4, 7], [3, 3], [1, 1], [1, 1], [1, 1], e=8, d=8, problems=(2, 2)),
    "mirrored": Case([5, 7], [3, 3], [1, 1], [1, 1], [1, 1], True, e=20, d=1),
    "oblong": Case([6, 5], [3, 5], [1, 1], [1, 1], [1, 2], True, ("euclidean", False), e=1, d=20),
    "five": Case([4, 6], [5, 5], [1, 1], [1, 1], [2, 2], metric=("euclidean", True), e=8, problems=(1, 1), scale=0.2),
    "stride": Case([7, 6], [3, 3], [2, 2], [1, 1], [1, 1], metric=("euclidean", False), d=8),
    "stride_dilation_mirrored": Case([7, 6], [3, 3], [2, 2], [2, 2], [2, 2], True, e=8, d=3),
    "stride_dilation": Case([9, 6], [3, 3], [2, 1], [2, 1], [2, 1], metric=("euclidean", True), scale=0.3),
    "dilation": Case([6, 7], [3, 3], [1, 1], [2, 2], [2, 2], scale=-0.5),
    "long_stride": Case([11], [3], [3], [1], [1], problems=(2, 2)),
    "gaps": Case([13], [2], [5], [2], [0], True),
    "one_axis": Case([41], [5], [2], [2], [4], True, ("euclidean", False), e=20, d=8),
    "smaller_than_window": Case([2, 3], [5, 5], [1, 1], [1, 1], [2, 2]),
    "mirrored_often": Case([2], [5], [1], [2], [4], True, ("euclidean", True), scale=0.2),
    "mirrored_often_stride": Case([3, 1], [5, 3], [2, 1], [2, 1], [4, 1], True),
    "one_position": Case([1], [3], [1], [1], [1], True),
    "mirrored_one_of_two_axes": Case([1, 5], [1, 3], [1, 1], [1, 1], [0, 1], True),
    "mirrored_far_beyond": Case([1, 3], [7, 9], [1, 1], [1, 1], [3, 4], True, problems=(1, 1)),
    "inside": Case([6, 5], [3, 3], [1, 1], [1, 1], [0, 0], True),
    "stops_early": Case([9, 4], [3, 2], [2, 1], [1, 1], [1, 0], True, out=[2, 2]),
    "reaches_far": Case([3, 4], [3, 2], [2, 1], [1, 1], [0, 1], True, out=[4, 5]),
    "reaches_nothing": Case([3, 4], [2, 2], [1, 1], [1, 1], [0, 3], out=[5, 9]),
    "three_axes": Case([2, 3, 4], [3, 1, 3], [1, 1, 2], [1, 1, 1], [1, 0, 1], problems=(1, 1)),
    "three_axes_mirrored": Case([2, 3, 4], [2, 2, 2], [1, 2, 1], [1, 1, 2], [1, 1, 1], True, problems=(1, 1)),
    "window_of_one": Case([3, 5], [1, 1], [1, 1], [1, 1], [0, 0], d=8),
}


def mine(operands, case, block=32):
    """Outputs, statistics and gradients of the kernels."""
    query, key, value, grad = operands
    with poisoned_empties():
        y, stats = kernels.local_attention(query, key, value, *case.arguments(), block=block)
        found = kernels.local_attention_backward(grad, query, key, value, stats, *case.arguments(), block=block)
    assert y.is_contiguous() and stats.is_contiguous()
    for one, like in zip(found, operands, strict=False):
        assert one.dtype == like.dtype and one.stride() == torch.empty_like(like).stride()
    return y, stats, *found


def truth(operands, case, dtype=torch.float64):
    query, key, value, grad = (t.to(dtype) for t in operands)
    size, stride, dilation, before, reflect, metric, squared, scale = case.arguments()
    rest = Window(size, stride, dilation, before, reflect), metric, squared, scale
    y, stats = local_attention_torch.forward(query, key, value, *rest)
    return y, stats, *local_attention_torch.backward(grad, query, key, value, stats, *rest)


def check(operands, case, **blocks):
    found, wanted = mine(operands, case, **blocks), truth(operands, case)
    budget = BUDGET[operands[0].dtype]
    for name, one, other in zip(("y", "stats", *NAMES[1:]), found, wanted, strict=True):
        assert one.shape == other.shape
        error = ((one.double() - other).abs().max() / other.abs().max().clamp(min=0.1)).item()
        assert error <= budget, f"{name} is off by {error:.1e}, budget {budget:.1e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_pytorch(case):
    check(case.operands(), case)


def test_the_mirror_at_every_offset():
    """A window of five begins anywhere, from its own first slot on to far before the axis."""
    for n, before in itertools.product((1, 2), (0, 1, 2, 4, 5, 7)):
        case = Case([n], [5], [1], [1], [before], True, problems=(1, 1), out=[2])
        operands = case.operands()
        # an axis of one position is read by all slots alike: gradients at query and key are differences of equals
        for one, other in zip(mine(operands, case), truth(operands, case), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["one_axis", "stops_early"])
def test_short_types_lose_only_their_rounding(name, dtype):
    check(CASES[name].operands(dtype), CASES[name])


@pytest.mark.parametrize("name", ["stride", "stops_early"])
def test_any_layout(name):
    case = CASES[name]
    channels_last = [t.movedim(2, -1).contiguous().movedim(-1, 2) for t in case.operands()]
    check(channels_last, case)
    query, key, value, grad = case.operands()
    key = key[:, :1].expand(-1, 2, *[-1] * (key.dim() - 2))  # one key for all heads
    wide = torch.randn(*value.shape[:-1], 2 * value.shape[-1])
    check([query.mT.contiguous().mT, key, wide[..., ::2], grad[..., :1].expand_as(grad)], case, block=16)


def test_what_is_read_without_a_copy():
    """Rows of 16, 32, ... features side by side; others are copied, with zeros up to the next multiple of 16."""
    last = torch.randn(2, 3, 5, 2, 16).permute(0, 3, 4, 1, 2)
    assert kernels._read_from(last).data_ptr() == last.data_ptr()
    for x in (last.contiguous(), last[:, :, :9], torch.randn(1, 2, 20, 7), last[..., 1:]):
        rows, c = kernels._read_from(x), x.shape[2]
        assert rows.stride(3) == 1 and rows.shape[3] % 16 == 0 and not any(n % 16 for n in rows.stride()[:3])
        assert torch.equal(rows[..., :c].mT, x.flatten(3)) and not rows[..., c:].any()


def test_offsets_of_64_bits(monkeypatch):
    case = CASES["stops_early"]
    operands = case.operands()
    narrow = mine(operands, case)
    monkeypatch.setattr(kernels, "_long", lambda *tensors: True)
    assert all(torch.equal(a, b) for a, b in zip(mine(operands, case), narrow, strict=True))
    check(operands, case)


def test_when_offsets_need_64_bits():
    flat = torch.zeros(1)
    assert not kernels._long(flat.expand(1, 1, 2**20, 2**11 - 1))
    assert kernels._long(flat.expand(1, 1, 2**20, 2**11))
    assert kernels._long(torch.empty(1, 1, 4, 2**30, device="meta"))


def test_equal_inputs_have_equal_results():
    """Whatever the tiles: every sum is taken in one order."""
    case = CASES["one_axis"]
    operands = case.operands()
    runs = [mine(operands, case, block=block) for block in (32, 32, 16)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


LOST = {
    "dot": Case([3, 7], [1, 3], [1, 1], [1, 1], [0, 1], problems=(1, 1)),
    "stride": Case([4, 5], [3, 2], [2, 1], [1, 1], [1, 0], metric=("euclidean", False), problems=(1, 1)),
    "mirrored": Case([9], [3], [1], [1], [1], True, ("euclidean", True), problems=(1, 2)),
    "unread": Case([5], [2], [3], [1], [0], metric=("euclidean", False), problems=(1, 1)),
}


@pytest.mark.parametrize("case", LOST.values(), ids=LOST)
@pytest.mark.parametrize("which", range(4), ids=("query", "key", "value", "grad"))
def test_what_is_not_a_number_stays_in_its_place(case, which):
    """The same results are lost as in PyTorch, no others."""
    operands = case.operands()
    operands[which][(0, 0, 0, *(n // 2 for n in operands[which].shape[3:]))] = float("nan")
    for name, one, other in zip(("y", "stats", *NAMES[1:]), mine(operands, case), truth(operands, case), strict=True):
        assert torch.equal(one.isnan(), other.isnan()), name
        torch.testing.assert_close(one.nan_to_num().double(), other.nan_to_num(), rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow():
    """One slot takes all, the others have weight exactly zero."""
    case = Case([4, 6], [3, 3], [1, 1], [1, 1], [1, 1], scale=1.0, problems=(1, 1))
    query, key, value, grad = case.operands()
    key.zero_()
    key[:, :, :, 2, 3] = 1e30
    y, stats, *found = mine([query.fill_(1), key, value, grad], case)
    assert torch.equal(y[:, :, :, 2, 3], value[:, :, :, 2, 3])
    assert y.isfinite().all() and stats.isfinite().all() and all(t.isfinite().all() for t in found)
    query[0, 0, 0, 1, 2] = 1e10
    y, _ = kernels.local_attention(query, key, value, *case.arguments())  # an infinite score is lost, as in PyTorch
    expected, *_ = truth([query, key, value, grad], case, torch.float32)
    assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().any()


def test_an_output_without_slots_is_zero():
    case = Case([1], [2], [1], [2], [1], e=3, d=3)
    y, stats, *found = mine(case.operands(), case)
    assert all(t.eq(0).all() for t in (y, stats, *found))


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor made inside."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


@pytest.mark.parametrize("reflect", [False, True])
def test_nothing_of_slots_by_positions_is_made(reflect):
    case = Case([23], [9], [1], [1], [4], reflect, e=4, d=4, problems=(1, 1))
    operands = case.operands()
    with Largest() as seen:
        _, stats = kernels.local_attention(*operands[:3], *case.arguments())
        kernels.local_attention_backward(operands[3], *operands[:3], stats, *case.arguments())
    assert 0 < seen.bytes <= 4 * (4 + 4) * (23 + 8)  # gradients at key and value, padded


def test_what_it_serves():
    case = CASES["plain"]
    query, key, value, _ = case.operands()
    window = case.arguments()[:5]
    assert kernels.refusal(query, key, value, *window, "dot") == ""
    assert "float64" in kernels.refusal(query.double(), key.double(), value.double(), *window, "dot")
    assert "bfloat16" in kernels.refusal(query, key, value.bfloat16(), *window, "dot")
    assert "cosine" in kernels.refusal(query, key, value, *window, "cosine")
    assert "nothing" in kernels.refusal(query[:0], key[:0], value[:0], *window, "dot")
    wide = value[:, :, :1].expand(-1, -1, 257, -1, -1)
    assert "257" in kernels.refusal(query, key, wide, *window, "dot")
    huge = [t[..., :1, :1].expand(*t.shape[:3], 2**16, 2**16) for t in (query, key, value)]
    assert "32 bits" in kernels.refusal(*huge, *window, "dot")
    long = torch.empty(1).expand(1, 1, 1, 2**30)
    assert kernels.refusal(long, long, long, [3], [1], [1], [1], False, "dot") == ""
    assert "32 bits" in kernels.refusal(long, long, long, [3], [1], [1], [1], True, "dot")  # the mirror's period
    with pytest.raises(NotImplementedError, match="float64"):
        kernels.local_attention(query.double(), key.double(), value.double(), *case.arguments())

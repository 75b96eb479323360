"""What is measured on a GPU, against whom, and what is to be reached.

Shape legend: B batch, H heads, N positions, d features of a head, k neighbours, C channels.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import optional, peers
from benchmarks.case import Case, Forward, Peer, whole
from benchmarks.language import unfold_inside
from benchmarks.targets import Target
from nearfold.kernels.select import select
from nearfold.nn import ACmix2d, ConvNN2d, Mixer, NeighborhoodAttention2d, knn_attention

Shape = tuple[int, ...]
Part = tuple[slice, ...]

FLASH, PAIRS = "SDPA, FlashAttention", "the scores of all pairs"
GEMM = "1/8 of a GEMM of 8192"  # 2 * 8192^3 / 8 = 2 * (4 * 16) * 4096^2 * 64: as many operations as the search has
THRESHOLD = "nearfold, NEARFOLD_SELECT=threshold"  # beside the default, for the measurement to say which it should be
CONV, FLEX, NATTEN = "nn.Conv2d 3x3", "FlexAttention", "NATTEN na2d"


@dataclass(frozen=True)
class Checked:
    """A case, and what its results must be.

    Attributes:
        case: ours and the others, inputs on the device.
        reference: float64 inputs of a part -> what is compared of the output, from the definition.
        parts: of the inputs and the output that are compared, one after the other, for the reference is large.
        axis: of the features; all features of a position are right or wrong together.
        searched: whether neighbours are searched: few positions may then have another one, as near but for rounding.
        part: (output, *inputs) -> what of ours is compared.
        wide: float64 copy of the module, whose gradients are summed over the parts.
        share: peers whose time counts in part only.
        held: MiB, by the name of something that is not run.
        also: peers that are ours in another way, and must be as right.
    """

    case: Case
    reference: Forward
    parts: list[Part]
    axis: int
    searched: bool
    part: Callable[..., Tensor] = whole
    wide: nn.Module | None = None
    share: dict[str, float] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """A row: its title, the function that makes it, and that function's arguments; ``tiny`` checks the chain."""

    title: str
    build: Callable[..., Checked]
    full: dict[str, Any]
    tiny: dict[str, Any]


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def _by_threshold(forward: Forward) -> Forward:
    def found(*inputs: Tensor) -> Tensor:
        before = os.environ.get("NEARFOLD_SELECT", "")
        os.environ["NEARFOLD_SELECT"] = "threshold"
        try:
            return forward(*inputs)
        finally:
            os.environ["NEARFOLD_SELECT"] = before

    return found


def _heads(shape: Shape, most: int) -> list[Part]:
    """Single heads, at most so many, spread over the batch."""
    B, H = shape[:2]
    chosen = torch.linspace(0, B * H - 1, min(most, B * H)).round().long().unique().tolist()
    return [(slice(i // H, i // H + 1), slice(i % H, i % H + 1)) for i in chosen]


def knn(
    device: torch.device, dtype: torch.dtype, shape: Shape, k: int, naive: bool, most: int, threshold: bool = False
) -> Checked:
    """k-NN attention on query, key and value (B, H, N, d)."""
    inputs = tuple(torch.randn(3, *shape, device=device).to(dtype).unbind())

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return knn_attention(query, key, value, k)

    found = {FLASH: Peer(_flash, same=False), "SDPA": Peer(F.scaled_dot_product_attention, same=False)}
    if naive:
        found["naive"] = Peer(lambda *qkv: peers.naive_knn_attention(*qkv, k))
    if threshold:
        found[THRESHOLD] = Peer(_by_threshold(ours))
    case = Case(inputs, ours, found)
    scores = shape[0] * shape[1] * shape[2] ** 2 * dtype.itemsize / 2**20
    reference = lambda *qkv: peers.naive_knn_attention(*qkv, k)  # noqa: E731
    also = (THRESHOLD,) if threshold else ()
    return Checked(case, reference, _heads(shape, most), -1, searched=True, held={PAIRS: scores}, also=also)


def search(device: torch.device, dtype: torch.dtype, shape: Shape, k: int, gemm: int) -> Checked:
    """`nearfold::select` alone, by dot products of query and key (B, H, N, d)."""
    N = shape[2]
    inputs = tuple(torch.randn(2, *shape, device=device).to(dtype).unbind())
    at = torch.arange(N, device=device)
    a, b = torch.randn(2, gemm, gemm, device=device).to(dtype).unbind()

    def ours(query: Tensor, key: Tensor) -> Tensor:
        return select(query, key, k, "dot", False, at, at, [N], [0, -1, 1], False, 0.0)[1]

    def scores(index: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Which keys were found shows in their scores: equal ones may be exchanged."""
        found = [
            torch.einsum("mc,mkc->mk", q.double(), x.double()[i.clamp(min=0)])
            for q, x, i in zip(*(t.flatten(0, 1) for t in (query, key, index)), strict=True)
        ]
        return torch.stack(found).view(index.shape)

    found = {
        GEMM: Peer(lambda *_: a @ b, same=False, backward=False),
        THRESHOLD: Peer(_by_threshold(ours), backward=False),
    }
    case = Case(inputs, ours, found, backward=False)
    reference = lambda q, x: (q @ x.mT).topk(k).values  # noqa: E731
    share = {GEMM: 1 / 8}
    return Checked(case, reference, _heads(shape, 8), -1, searched=False, part=scores, share=share, also=(THRESHOLD,))


def _layer(
    layer: Mixer,
    x: Tensor,
    reference: Callable[..., Tensor],
    many: int,
    found: dict[str, Peer],
    absent: dict[str, str] | None = None,
    others: tuple[nn.Module, ...] = (),
) -> Checked:
    """A layer on images (B, C, H, W), compared ``many`` images at a time."""
    layer.to(x.device, x.dtype)
    wide = copy.deepcopy(layer).double()
    case = Case((x,), layer, found, absent or {}, module=layer, others=others)
    parts = [(slice(i, i + many),) for i in range(0, len(x), many)]
    searched = isinstance(layer, ConvNN2d)
    return Checked(case, lambda t: reference(wide, t), parts, 1, searched, wide=wide)


def convnn(
    device: torch.device, dtype: torch.dtype, shape: Shape, k: int, naive: bool, conv: bool, many: int
) -> Checked:
    """ConvNN2d with as many channels out as in."""
    C = shape[1]
    layer, plain = ConvNN2d(C, C, k), nn.Conv2d(C, C, 3, padding=1).to(device, dtype)
    found = {}
    if naive:
        found["naive"] = Peer(lambda x: peers.naive_convnn(layer, x))
    if conv:
        found[CONV] = Peer(plain, same=False)
    x = torch.randn(shape, device=device).to(dtype)
    return _layer(layer, x, peers.naive_convnn, many, found, others=(plain,))


def acmix(device: torch.device, dtype: torch.dtype, shape: Shape, window: int, heads: int, many: int) -> Checked:
    """ACmix2d with as many channels out as in."""
    layer = ACmix2d(shape[1], shape[1], window, 3, heads)
    found = {"unfold": Peer(lambda x: peers.unfold_acmix(layer, x, window, heads))}
    x = torch.randn(shape, device=device).to(dtype)
    return _layer(layer, x, lambda wide, t: peers.unfold_acmix(wide, t, window, heads), many, found)


def neighbourhood(
    device: torch.device, dtype: torch.dtype, shape: Shape, window: int, heads: int, many: int
) -> Checked:
    """NeighborhoodAttention2d, projections included."""
    layer, x = NeighborhoodAttention2d(shape[1], heads, window), torch.randn(shape, device=device).to(dtype)
    layer.to(device, dtype)
    found: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    makers = {FLEX: _flex, NATTEN: optional.natten_neighbourhood}
    for name, make in makers.items():
        try:
            forward = make(layer, x, window, heads)
            found[name] = Peer(forward, backward=name == FLEX and device.type == "cuda")
        except ImportError as error:
            absent[name] = f"not installed ({error})"
        except Exception as error:  # a compiler that is missing or fails has many faces
            absent[name] = f"does not run here ({type(error).__name__})"
    reference = lambda wide, t: unfold_inside(wide, t, window, heads)  # noqa: E731
    return _layer(layer, x, reference, many, found, absent)


def _flex(layer: Mixer, like: Tensor, window: int, heads: int) -> Callable[[Tensor], Tensor]:
    """FlexAttention, compiled on a GPU; windows are moved inside at the border."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    height, width = like.shape[2:]
    reach, N = window // 2, height * width

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, column = (i // width).clamp(reach, height - 1 - reach), (i % width).clamp(reach, width - 1 - reach)
        return ((row - j // width).abs() <= reach) & ((column - j % width).abs() <= reach)

    mask = create_block_mask(near, None, None, N, N, device=like.device)
    attend = torch.compile(flex_attention) if like.is_cuda else flex_attention

    def forward(x: Tensor) -> Tensor:
        q, k, v = (t.contiguous() for t in peers.projected(layer, x.flatten(2).mT, heads))
        return peers.joined(layer, attend(q, k, v, block_mask=mask)).mT.unflatten(2, (height, width))

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        forward(like)  # what is missing shows here
    return forward


TOKENS, LONG, TINY_TOKENS = (4, 16, 4096, 64), (4, 16, 16384, 64), (2, 2, 70, 16)
IMAGE, TINY_IMAGE = (128, 64, 56, 56), (2, 8, 9, 10)
_HEADS = {"window": 7, "heads": 4, "many": 8}
_TINY_HEADS = {"window": 5, "heads": 2, "many": 1}

CASES: dict[str, Spec] = {
    "knn": Spec(
        "k-NN attention",
        knn,
        {"shape": TOKENS, "k": 9, "naive": True, "most": 64, "threshold": True},
        {"shape": TINY_TOKENS, "k": 9, "naive": True, "most": 4, "threshold": True},
    ),
    "knn_16384": Spec(
        "k-NN attention",
        knn,
        {"shape": LONG, "k": 9, "naive": False, "most": 6, "threshold": True},
        {"shape": (1, 2, 150, 16), "k": 9, "naive": False, "most": 2, "threshold": True},
    ),
    "knn_k36": Spec(
        "k-NN attention",
        knn,
        {"shape": TOKENS, "k": 36, "naive": False, "most": 16},
        {"shape": TINY_TOKENS, "k": 36, "naive": False, "most": 4},
    ),
    "convnn": Spec(
        "ConvNN2d",
        convnn,
        {"shape": IMAGE, "k": 9, "naive": True, "conv": True, "many": 8},
        {"shape": TINY_IMAGE, "k": 9, "naive": True, "conv": True, "many": 1},
    ),
    "convnn_conv": Spec(
        "ConvNN2d",
        convnn,
        {"shape": (256, 256, 16, 16), "k": 9, "naive": True, "conv": True, "many": 64},
        {"shape": (2, 16, 5, 5), "k": 9, "naive": True, "conv": True, "many": 2},
    ),
    "acmix": Spec("ACmix2d", acmix, {"shape": IMAGE, **_HEADS}, {"shape": TINY_IMAGE, **_TINY_HEADS}),
    "neighbourhood": Spec(
        "NeighborhoodAttention2d",
        neighbourhood,
        {"shape": IMAGE, **_HEADS},
        {"shape": TINY_IMAGE, **_TINY_HEADS},
    ),
    "select": Spec(
        "select alone", search, {"shape": TOKENS, "k": 9, "gemm": 8192}, {"shape": TINY_TOKENS, "k": 9, "gemm": 64}
    ),
}
# how time and memory grow with N; last, for here a missing point costs least
CURVE = {f"curve_{N}": N for N in (1024, 2048, 4096, 8192, 16384, 32768)}
CASES |= {
    name: Spec(
        "k-NN attention",
        knn,
        {"shape": (1, 16, N, 64), "k": 9, "naive": False, "most": 2, "threshold": True},
        {"shape": (1, 2, N // 512 + 20, 16), "k": 9, "naive": False, "most": 2, "threshold": True},
    )
    for name, N in CURVE.items()
}

TARGETS = [
    Target("knn", FLASH, "forward", 0.8),
    Target("knn", FLASH, "both", 2.5),
    Target("knn_16384", FLASH, "forward", 1),
    Target("knn_16384", FLASH, "both", 3.5),
    Target("knn_16384", PAIRS, "memory", 0.05, most=True),
    Target("knn_k36", FLASH, "forward", 0.5),
    Target("knn_k36", FLASH, "both", 1.8),
    Target("convnn", "naive", "forward", 10),
    Target("convnn", "naive", "both", 10),
    Target("convnn_conv", CONV, "forward", 4, most=True),
    Target("convnn_conv", CONV, "both", 4, most=True),
    Target("acmix", "unfold", "forward", 10),
    Target("acmix", "unfold", "both", 10),
    Target("neighbourhood", FLEX, "forward", 1),
    Target("neighbourhood", FLEX, "both", 1),
    Target("select", GEMM, "forward", 0.35),
]

SHOWN = ("k", "window", "heads")


def title(name: str, tiny: bool) -> str:
    """What a reader calls a row.

    >>> title("knn", tiny=False)
    'k-NN attention (4, 16, 4096, 64), k=9'
    """
    spec = CASES[name]
    given = spec.tiny if tiny else spec.full
    return ", ".join([f"{spec.title} {given['shape']}", *(f"{a}={given[a]}" for a in SHOWN if a in given)])


def make(name: str, device: torch.device, dtype: torch.dtype, tiny: bool) -> Checked:
    """A row, from a fixed seed."""
    torch.manual_seed(0)
    spec = CASES[name]
    return spec.build(device, dtype, **(spec.tiny if tiny else spec.full))

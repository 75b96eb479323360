"""Cases of the wider language: scans, neighbourhoods inside, deformable convolution, points; and their peers.

Shape legend: B batch, C channels, H heads, N positions, s numbers of a state, k slots of a window on one axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import optional
from benchmarks.build import Shape, _optional, _with_path
from benchmarks.case import Case, Forward, Peer
from benchmarks.peers import addmm_topk, projected
from nearfold import knn
from nearfold.kernels.long_conv import long_conv
from nearfold.kernels.scan import selective_scan
from nearfold.kernels.ssd import decayed_attention
from nearfold.nn import DeformConv2d, Mixer, deform_conv


def loop_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One step of the recurrence after the other."""
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    rows = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        rows.append((h * C[:, t, None]).sum(-1))
    return torch.stack(rows, 1)


def associative_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence in log2 N doublings over whole tensors (B, N, C, s)."""
    a, b = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
    step = 1
    while step < u.shape[1]:
        b = torch.cat([b[:, :step], b[:, step:] + a[:, step:] * b[:, :-step]], 1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], 1)
        step *= 2
    return torch.einsum("bncs,bns->bnc", b, C)


def _scan_inputs(shape: Shape, state: int) -> tuple[Tensor, ...]:
    B, N, C = shape
    rate = -torch.arange(1.0, state + 1).expand(C, -1).contiguous()
    return (
        torch.randn(shape),
        F.softplus(torch.randn(shape) - 4),
        rate,
        torch.randn(B, N, state),
        torch.randn(B, N, state),
    )


def scan(shape: Shape, state: int) -> Case:
    """`nearfold::selective_scan` with inputs (B, N, C), as Mamba starts: decays of 1 to s, steps of about 0.02."""
    ours = lambda *inputs: selective_scan(*inputs, torch.is_grad_enabled())[0]  # noqa: E731
    found = {
        "loop over time": Peer(loop_scan),
        # its backward would keep 12 tensors (B, N, C, s) and more; in float64 they do not fit
        "associative scan": Peer(associative_scan, dtype=torch.float32, backward=False),
    }
    return Case(_scan_inputs(shape, state), ours, _with_path(ours, found))


def state_space_duality(shape: Shape, heads: int, state: int) -> Case:
    """The scan with one decay per head, against the recurrence of the same."""
    B, N, C = shape
    inputs = (
        torch.randn(B, 1, N, state),
        torch.randn(B, 1, N, state),
        torch.randn(B, heads, N, C // heads),
        -F.softplus(torch.randn(B, heads, N) - 4),
    )

    def loop(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor) -> Tensor:
        h = value.new_zeros(B, heads, state, C // heads)
        rows = []
        for t in range(N):
            h = log_decay[:, :, t, None, None].exp() * h + key[:, :, t, :, None] * value[:, :, t, None]
            rows.append(torch.einsum("bhsp,bhs->bhp", h, query[:, :, t].expand(-1, heads, -1)))
        return torch.stack(rows, 2)

    return Case(inputs, decayed_attention, {"loop over time": Peer(loop)})


def direct_depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """A kernel with a number for every offset as a convolution; on rows of channels, where oneDNN is at its best."""
    x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, kernel.flip(-1, -2), padding=tuple(n - 1 for n in x.shape[2:]), groups=x.shape[1])


def transformed(x: Tensor, kernel: Tensor) -> Tensor:
    """The same by torch.fft over all channels at once."""
    height, width = x.shape[2:]
    length = [2 * height, 2 * width]
    y = torch.fft.irfft2(torch.fft.rfft2(x, length) * torch.fft.rfft2(kernel[:, 0], length), length)
    return y[..., height - 1 : 2 * height - 1, width - 1 : 2 * width - 1]


def full_kernel(shape: Shape) -> Case:
    """`nearfold::long_conv`, depthwise, with a number for every offset of the map."""
    _, C, height, width = shape
    inputs = (torch.randn(shape), torch.randn(C, 1, 2 * height - 1, 2 * width - 1) * height**-1)
    found = {
        # its backward takes minutes, and so does its forward in float64
        "direct depthwise": Peer(direct_depthwise, dtype=torch.float32, backward=False),
        "torch.fft": Peer(transformed),
    }
    return Case(inputs, lambda x, kernel: long_conv(x, kernel, C), found)


def unfold_inside(layer: Mixer, x: Tensor, window: int, heads: int) -> Tensor:
    """Neighbourhood attention by unfold: windows inside the image, those at the border used again."""
    B, C, height, width = x.shape
    d, reach = C // heads, window // 2
    q, k, v = (t.transpose(2, 3) for t in projected(layer, x.flatten(2).mT, heads))  # (B, H, d, N)
    rows, columns = (torch.arange(n, device=x.device).clamp(reach, n - 1 - reach) - reach for n in (height, width))

    def windows(t: Tensor) -> Tensor:
        cut = F.unfold(t.reshape(B * heads, d, height, width), window)
        cut = cut.view(B, heads, d, window * window, height - 2 * reach, width - 2 * reach)
        return cut[..., rows[:, None], columns].flatten(-2)

    scores = (q.unsqueeze(3) * windows(k)).sum(2) * d**-0.5
    y = (scores.softmax(2).unsqueeze(2) * windows(v)).sum(3)
    p = layer.tensors()
    return F.linear(y.flatten(1, 2).mT, p["out_weight"], p["out_bias"]).mT.unflatten(2, (height, width))


def neighbourhood_inside(shape: Shape, window: int, heads: int) -> Case:
    """Neighbourhood attention with the border rule of arXiv 2204.07143, projections included."""
    layer = Mixer(f"window({window}, mode=inside) | box | softmax(heads={heads})", shape[1])
    found = {"unfold": Peer(lambda x: unfold_inside(layer, x, window, heads))}
    return Case((torch.randn(shape),), layer, _with_path(layer, found), module=layer)


def grid_sample_deformable(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Deformable 3x3 convolution by one F.grid_sample per slot, and a matrix product."""
    height, width = x.shape[2:]
    rows = torch.arange(height, dtype=x.dtype)[:, None]
    columns = torch.arange(width, dtype=x.dtype)
    read = []
    for slot in range(9):
        y = offset[:, 2 * slot] + rows + (slot // 3 - 1)
        at = offset[:, 2 * slot + 1] + columns + (slot % 3 - 1)
        grid = torch.stack([at * 2 / (width - 1) - 1, y * 2 / (height - 1) - 1], -1)
        seen = F.grid_sample(x, grid, padding_mode="zeros", align_corners=True)
        read.append(seen if mask is None else seen * mask[:, slot : slot + 1])
    columns_BKN = torch.stack(read, 2).flatten(1, 2).flatten(2)
    return (weight.flatten(1) @ columns_BKN).unflatten(2, (height, width))


def points(shape: Shape, k: int, clouds: int) -> Case:
    """`nearfold.knn` among points in clouds of different sizes: the nearest of each cloud for each of its points."""
    N = shape[0]
    cuts = torch.randperm(N - 1)[: clouds - 1].sort().values + 1
    batch = torch.zeros(N, dtype=torch.long).index_fill_(0, cuts, 1).cumsum(0)
    sizes = batch.bincount().tolist()

    def ours(x: Tensor) -> Tensor:
        return knn(x, x, k, batch, batch)[1]

    def distances(index: Tensor, x: Tensor) -> Tensor:
        """Nearest first; equally near ones may be exchanged."""
        own = torch.cat([torch.arange(len(c)).repeat_interleave(min(k, len(c))) + at for c, at in _clouds(x, sizes)])
        return (x[own].double() - x[index].double()).norm(dim=-1)

    def by_cloud(search: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([search(c, min(k, len(c))).flatten() + at for c, at in _clouds(x, sizes)])

    product = by_cloud(lambda c, k: addmm_topk(c, c, k))
    found = {"matmul + topk by cloud": Peer(product, backward=False, part=distances)}
    absent: dict[str, str] = {}
    trees = _optional(lambda: by_cloud(optional.sklearn_tree()), absent, "scikit-learn trees by cloud")
    if trees is not None:
        peer = Peer(trees, backward=False, dtype=torch.float32, part=distances, allocator=False)
        found["scikit-learn trees by cloud"] = peer
    return Case((torch.rand(shape),), ours, _with_path(ours, found), absent, backward=False)


def _clouds(x: Tensor, sizes: list[int]) -> list[tuple[Tensor, int]]:
    """Every cloud, and its first row."""
    firsts = [0, *itertools.accumulate(sizes)][:-1]
    return list(zip(x.split(sizes), firsts, strict=True))


def deformable(shape: Shape, modulated: bool) -> Case:
    """`nearfold.nn.deform_conv` 3x3 with as many channels out as in; offsets of about one position."""
    B, C, *grid = shape
    offset = torch.randn(B, 18, *grid)
    offset = offset.floor() + 0.05 + 0.9 * offset.frac().abs()  # at whole numbers there is no gradient to compare
    inputs = [torch.randn(shape), offset, torch.randn(C, C, 3, 3) * (9 * C) ** -0.5]
    if modulated:
        inputs.append(torch.rand(B, 9, *grid))

    def ours(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        return deform_conv(x, offset, weight, padding=1, mask=mask)

    found = {"grid_sample": Peer(grid_sample_deformable)}
    absent: dict[str, str] = {}
    theirs = _optional(_torchvision, absent, "torchvision")
    if theirs is not None:
        found["torchvision"] = Peer(theirs)
    return Case(tuple(inputs), ours, _with_path(ours, found), absent)


def deformable_layer(shape: Shape) -> Case:
    """DeformConv2d, version 2: the convolution that makes offsets and masks included."""
    layer = DeformConv2d(shape[1], shape[1], 3, padding=1, modulated=True, bias=False)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith(("offset", "mask")):
                p.normal_(std=(9 * shape[1]) ** -0.5)

    def naive(x: Tensor) -> Tensor:
        p = layer.tensors()
        offset = F.conv2d(x, p["offset_weight"], padding=1)
        mask = torch.sigmoid(F.conv2d(x, p["mask_weight"], padding=1))
        return grid_sample_deformable(x, offset, p["weight"], mask)

    return Case((torch.randn(shape),), layer, _with_path(layer, {"grid_sample": Peer(naive)}), module=layer)


def _torchvision() -> Forward:
    """Its compiled operator; ImportError where that does not load."""
    from nearfold._torchvision import load

    try:
        run = load("torchvision.ops").deform_conv2d
        run(torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 1, 1))
    except (ImportError, RuntimeError) as error:
        raise ImportError("its compiled operators do not load") from error
    return lambda x, offset, weight, mask=None: run(x, offset, weight, padding=1, mask=mask)

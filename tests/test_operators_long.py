"""Kernels as long as the map, against sums written out, recurrences, torch.fft and torch's convolution.

Nothing here goes through the oracle, nor through the functions that make the kernels: these tests say that the words
mean what their papers say.
"""

from __future__ import annotations

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import close, positions, scrambled

from nearfold import parse
from nearfold.kernels import engine
from nearfold.kernels import long_conv as module
from nearfold.kernels.long_conv import long_conv
from nearfold.lower import explain
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")
BACKENDS = ("auto", "oracle")


def agree(layer, x, truth):
    """Output and every gradient, on the fast path and on the oracle."""
    wanted_y = truth(x)
    probe = torch.randn(wanted_y.shape)
    inputs = [x, *layer.parameters()]
    wanted = torch.autograd.grad((wanted_y * probe).sum(), inputs, allow_unused=True)
    for backend in BACKENDS:
        layer.backend = backend
        y = layer(x)
        close(y, wanted_y)
        found = torch.autograd.grad((y * probe).sum(), inputs, allow_unused=True)
        for one, other in zip(found, wanted, strict=True):
            close(torch.zeros(1) if one is None else one, torch.zeros(1) if other is None else other)
    layer.backend = "auto"


def summed(x, kernel, reads):
    """y_i = sum over j of kernel(i - j)[o, c] x_j[c], one pair of positions at a time; ``reads`` says which offset."""
    at = positions(x.shape[2:])
    flat = x.flatten(2)
    columns = []
    for i in at:
        terms = [
            torch.einsum("oc,bc->bo", kernel(offset), flat[:, :, n])
            for n, j in enumerate(at)
            if (offset := reads(i, j)) is not None
        ]
        columns.append(torch.stack(terms).sum(0))
    return torch.stack(columns, -1).unflatten(2, x.shape[2:])


def along_raster(grid):
    """The distance in raster order, forwards."""
    place = {p: n for n, p in enumerate(positions(grid))}
    return lambda i, j: place[i] - place[j] if place[i] >= place[j] else None


def on_grid(i, j):
    """The offset along every axis."""
    return tuple(a - b for a, b in zip(i, j, strict=True))


# --- Hyena


def hyena_number(layer, t, c):
    """One number of the filter, from arXiv 2302.10866 (eq. 7 and appendix D.3) as its public code has it."""
    kernel = layer.operation.weight.kernel
    unit = t / (kernel.length - 1)
    bands = [1e-4 + b * (kernel.bands - 1 - 1e-4) / max(kernel.bands - 1, 1) for b in range(kernel.bands)]
    turns = [cmath.exp(-1j * f * 2 * math.pi * t / kernel.length) for f in bands]
    z = torch.tensor([unit, *(u.real for u in turns), *(u.imag for u in turns)])
    for name in ("first", "second", "third"):
        weight, bias = layer.get_parameter(f"{name}_weight"), layer.get_parameter(f"{name}_bias")
        z = torch.stack([torch.sin(f * (row @ z + b)) for f, row, b in zip(layer.frequency, weight, bias, strict=True)])
    fast, slow, channels = math.log(1e-2) / 0.3, math.log(1e-2) / 1.5, layer.in_channels
    decay = abs(slow + c * (fast - slow) / max(channels - 1, 1))
    number = (layer.last_weight[c] @ z) * math.exp(-decay * unit)
    return number + layer.D[c] if t == 0 else number


@pytest.mark.parametrize(("grid", "bands"), [((7,), 1), ((2, 4), 3)])
def test_hyena_is_its_filter(grid, bands):
    layer = scrambled(Mixer(f"all | causal | hyena(5, length=6, bands={bands}, omega=2.0)", 3, ndim=len(grid)))
    x = torch.randn(2, 3, *grid, requires_grad=True)

    def kernel(t):
        return torch.diag(torch.stack([hyena_number(layer, t, c) for c in range(3)]))

    agree(layer, x, lambda x: summed(x, kernel, along_raster(grid)))


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_hyena_between_its_gates(heads):
    """With a head for every channel: q * (h * (k v)). With fewer the state is k v^T (arXiv 2310.18780, 3.1)."""
    layer = scrambled(Mixer(f"all(dot) | causal | identity(heads={heads})*hyena(3, length=8, omega=2.0)", 4, ndim=1))
    x = torch.randn(2, 4, 6, requires_grad=True)

    def truth(x):
        q, k, v = (
            F.conv1d(x, layer.get_parameter(f"{n}_weight")[..., None], layer.get_parameter(f"{n}_bias"))
            for n in ("query", "key", "value")
        )
        h = torch.stack([torch.stack([hyena_number(layer, t, c) for t in range(6)]) for c in range(4)])
        width = 4 // heads
        y = []
        for c in range(4):
            same = range(c // width * width, (c // width + 1) * width)
            state = [[sum(h[c, i - j] * k[:, e, j] * v[:, c, j] for j in range(i + 1)) for i in range(6)] for e in same]
            y.append(
                torch.stack([sum(q[:, e, i] * s[i] for e, s in zip(same, state, strict=True)) for i in range(6)], -1)
            )
        return F.conv1d(torch.stack(y, 1), layer.out_weight[..., None], layer.out_bias)

    agree(layer, x, truth)


# --- S4D


def recurrence(x, step, rate, read, skip):
    """x' = A x + u held for a step, y = 2 Re C x + D u, position after position: arXiv 2206.11893, eq. 1 to 4."""
    turned = torch.exp(step[:, None] * rate)  # (C, n)
    held = (turned - 1) / rate
    state = torch.zeros(len(x), *turned.shape, dtype=turned.dtype)
    y = []
    for u in x.unbind(-1):
        state = turned * state + held * u[..., None]
        y.append(2 * (read * state).sum(-1).real + skip * u)
    return torch.stack(y, -1)


@pytest.mark.parametrize("grid", [(130,), (9, 16), (1,)])
def test_s4d_is_its_recurrence(grid):
    layer = scrambled(Mixer("all | causal | s4d(6)", 3, ndim=len(grid)))
    x = torch.randn(2, 3, *grid, requires_grad=True)

    def truth(x):
        rate = torch.complex(-layer.log_A_real[0].exp(), layer.A_imag[0])
        read = torch.view_as_complex(layer.C[0, 0])
        return recurrence(x.flatten(2), layer.log_dt[0].exp(), rate, read, layer.D).unflatten(2, grid)

    agree(layer, x, truth)


def test_s4d_both_ways_is_two_recurrences():
    """The second runs from behind and begins one step before the position (as in S4's public code)."""
    layer = scrambled(Mixer("all | row | s4d(4)", 3, ndim=1))
    x = torch.randn(2, 3, 11, requires_grad=True)

    def truth(x):
        rate, step = torch.complex(-layer.log_A_real[0].exp(), layer.A_imag[0]), layer.log_dt[0].exp()
        there, back = (torch.view_as_complex(c) for c in layer.C[0])
        y = recurrence(x, step, rate, there, layer.D)
        behind = recurrence(x.flip(-1), step, rate, back, torch.zeros(3)).flip(-1)
        return y + F.pad(behind[..., 1:], (0, 1))

    agree(layer, x, truth)


def test_s4d_on_a_grid_is_a_product_of_kernels():
    layer = scrambled(Mixer("all | row | s4d(4)", 3))
    x = torch.randn(2, 3, 4, 5, requires_grad=True)

    def line(axis, t):
        rate, step = torch.complex(-layer.log_A_real[axis].exp(), layer.A_imag[axis]), layer.log_dt[axis].exp()[:, None]
        read = torch.view_as_complex(layer.C[axis, 0 if t >= 0 else 1])
        power = t if t >= 0 else -t - 1
        return 2 * (read * (torch.exp(step * rate) - 1) / rate * torch.exp(step * rate * power)).sum(-1).real

    def kernel(offset):
        number = line(0, offset[0]) * line(1, offset[1])
        return torch.diag(number + layer.D if offset == (0, 0) else number)

    agree(layer, x, lambda x: summed(x, kernel, on_grid))


def test_s4d_keeps_its_digits_along_a_long_map():
    """A phase of thousands of turns in float32: made of float32 numbers, the kernel would be off by 1e-3."""
    layer = Mixer("all | causal | s4d(64)", 2, ndim=1).float()
    with torch.no_grad():
        layer.log_dt.fill_(math.log(0.1))
        layer.log_A_real.fill_(-8)
    twin = Mixer("all | causal | s4d(64)", 2, ndim=1).double()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 5000)
    y, truth = layer(x.float()).double(), twin(x.float().double())
    assert (y - truth).abs().max() < 1e-5 * truth.abs().max()


# --- continuous kernels


def siren(layer, offset):
    """All numbers of one offset: arXiv 2102.02611, eq. 9 and 10."""
    kernel = layer.operation.weight.kernel
    t = torch.tensor(offset, dtype=torch.float64) / kernel.length
    for name in ("first", "second"):
        t = torch.sin(kernel.omega * (layer.get_parameter(f"{name}_weight") @ t + layer.get_parameter(f"{name}_bias")))
    return layer.last_weight @ t + layer.last_bias


@pytest.mark.parametrize("groups", [1, 2])
def test_a_continuous_kernel_is_its_network(groups):
    op = f"all | causal | continuous(3, length=7, omega=2.0, groups={groups})"
    layer, x = scrambled(Mixer(op, 4, 6, ndim=1)), torch.randn(2, 4, 9, requires_grad=True)

    def kernel(t):
        blocks = siren(layer, (t,)).view(groups, 6 // groups, 4 // groups)
        return torch.block_diag(*blocks)

    agree(layer, x, lambda x: summed(x, kernel, along_raster((9,))) + layer.bias[:, None])


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_a_depthwise_continuous_kernel_on_every_number_of_axes(grid):
    layer = scrambled(Mixer("all | row | continuous_depthwise(3, length=4, omega=2.0)", 2, ndim=len(grid)))
    x = torch.randn(2, 2, *grid, requires_grad=True)
    bias = layer.bias.view(-1, *(1,) * len(grid))
    agree(layer, x, lambda x: summed(x, lambda o: torch.diag(siren(layer, o)), on_grid) + bias)


def test_a_long_kernel_is_torchs_convolution():
    """Of the network's numbers at all offsets, as a depthwise kernel of 2 n - 1 by 2 m - 1."""
    layer = scrambled(Mixer("all | row | continuous_depthwise(4, length=9, omega=3.0)", 3))
    x = torch.randn(2, 3, 6, 9, requires_grad=True)

    def truth(x):
        rows = [torch.stack([siren(layer, (a, b)) for b in range(-8, 9)]) for a in range(-5, 6)]
        kernel = torch.stack(rows).permute(2, 0, 1)[:, None]
        return F.conv2d(x, kernel.flip(-1, -2), layer.bias, padding=(5, 8), groups=3)

    agree(layer, x, truth)


# --- spectra


def fourier_layer(x, weight, modes):
    """Fourier neural operators' layer (arXiv 2010.08895, 4): x (B, C, *grid), weight (O, C, *kept, 2)."""
    axes, grid = tuple(range(2, x.dim())), x.shape[2:]
    spectrum, kept = torch.fft.rfftn(x, dim=axes), torch.view_as_complex(weight)
    y = torch.zeros(len(x), len(weight), *spectrum.shape[2:], dtype=spectrum.dtype)
    sides = [((0, m), (-m, 0)) for m in modes[:-1]] + [((0, modes[-1]),)]
    for corner in torch.cartesian_prod(*(torch.arange(len(s)) for s in sides)).view(-1, len(sides)).tolist():
        where = [slice(a, b or None) for (a, b) in (sides[axis][c] for axis, c in enumerate(corner))]
        block = torch.einsum("bc...,oc...->bo...", spectrum[(..., *where)], kept[(..., *where)])
        y[(..., *where)] = block
    return torch.fft.irfftn(y, grid, axes)


@pytest.mark.parametrize(
    ("grid", "modes"), [((9,), (3,)), ((8,), (5,)), ((8, 7), (2, 3)), ((6, 8), (3, 5)), ((4, 5, 6), (2, 1, 4))]
)
def test_a_spectral_convolution_is_a_fourier_operators(grid, modes):
    op = (
        f"all | row | spectral(({', '.join(map(str, modes))}))"
        if len(grid) > 1
        else f"all | row | spectral({modes[0]})"
    )
    layer, x = scrambled(Mixer(op, 3, 4, ndim=len(grid))), torch.randn(2, 3, *grid, requires_grad=True)
    agree(layer, x, lambda x: fourier_layer(x, layer.weight, modes))


def test_frequencies_that_a_map_does_not_have_are_left_out():
    """Where the map has fewer, the weights of those that it has are as on any other map."""
    layer, x = scrambled(Mixer("all | row | spectral((3, 4))", 2)), torch.randn(2, 2, 3, 5, requires_grad=True)

    def truth(x):
        rows = torch.cat([layer.weight[:, :, :2], layer.weight[:, :, -1:]], 2)[:, :, :, :3]  # 0, 1, -1; 0 to 2
        y = torch.einsum("bchw,ochw->bohw", torch.fft.rfft2(x), torch.view_as_complex(rows.contiguous()))
        return torch.fft.irfft2(y, (3, 5))

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", [(8,), (5, 8), (4, 7), (2, 3, 4)])
def test_a_global_filter_is_gfnets(grid):
    size = f"({', '.join(map(str, grid))})" if len(grid) > 1 else grid[0]
    layer = scrambled(Mixer(f"all | row | global_filter({size})", 3, ndim=len(grid)))
    x = torch.randn(2, 3, *grid, requires_grad=True)

    def truth(x):
        axes = tuple(range(2, x.dim()))
        spectrum = torch.fft.rfftn(x, dim=axes, norm="ortho") * torch.view_as_complex(layer.weight)
        return torch.fft.irfftn(spectrum, grid, axes, norm="ortho")

    agree(layer, x, truth)


@pytest.mark.parametrize("grid", [(9, 6), (3, 11), (1, 1)])
def test_a_global_filter_is_interpolated_for_other_maps(grid):
    layer, x = scrambled(Mixer("all | row | global_filter((5, 8))", 2)), torch.randn(2, 2, *grid, requires_grad=True)

    def truth(x):
        half = (grid[0], grid[1] // 2 + 1)
        parts = layer.weight.permute(0, 3, 1, 2)
        made = F.interpolate(parts, half, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        return torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(made.contiguous()), grid)

    agree(layer, x, truth)


def test_a_grid_that_closes_moves_with_its_input():
    for text in ("all | row | spectral(3)", "all | row | global_filter((6, 7))"):
        layer, x = scrambled(Mixer(text, 4)), torch.randn(2, 4, 6, 7)
        close(layer(x.roll((2, 5), (2, 3))), layer(x).roll((2, 5), (2, 3)))


# --- what holds for all of them


@pytest.mark.parametrize("text", ["all | causal | s4d(4)", "all(dot) | causal | identity(heads=2)*hyena(4, length=9)"])
def test_nothing_comes_from_behind(text):
    layer, x = scrambled(Mixer(text, 4)), torch.randn(1, 4, 3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).flatten(2)[..., 6].sum(), x)
    assert not g.flatten(2)[..., 7:].abs().gt(1e-12).any() and g.flatten(2)[..., :7].abs().gt(1e-12).all()


LONG = [
    "all | row | continuous_depthwise(8)",
    "all | row | s4d(16)",
    "all | causal | s4d(16)",
    "all | row | spectral(12)",
    "all | row | global_filter(14)",
    "all(dot) | causal | identity(heads=8)*hyena(16)",
    "all(dot) | causal | identity(heads=2)*hyena(16)",
]


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("which", ["engine", engine.OFF])
def test_memory_is_linear(text, which):
    """A matrix of all pairs of one channel is 324 MiB."""
    from nearfold.study.measure import peak_bytes

    layer, x = Mixer(text, 8).float(), torch.randn(1, 8, 96, 96, dtype=torch.float32, requires_grad=True)
    with engine.forced(which) if which == engine.OFF else torch.enable_grad():
        assert peak_bytes(lambda: layer(x).sum().backward(), x.device) < 60 << 20


@pytest.mark.parametrize("text", LONG)
def test_second_derivatives(text):
    layer, x = scrambled(Mixer(text, 8)), torch.randn(1, 8, 2, 3, requires_grad=True)
    weight = next(iter(layer.parameters()))

    def call(x, weight):
        named = {next(n for n, p in layer.named_parameters() if p.shape == weight.shape): weight}
        return torch.func.functional_call(layer, named, (x,)).square()

    assert torch.autograd.gradgradcheck(call, (x, weight), fast_mode=True, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3000, 1 << 22])
@pytest.mark.parametrize(("slots", "groups"), [((4, 5), 4), ((7, 9), 4), ((5, 9), 2), ((7, 6), 1)])
def test_a_part_of_the_channels_at_a_time(chunk, slots, groups, monkeypatch):
    """Against torch's convolution, for any number of slots from n to 2 n - 1."""
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)
    value = torch.randn(2, 4, 4, 5, requires_grad=True)
    kernel = torch.randn(4 if groups == 4 else 6, 4 // groups, *slots, requires_grad=True)

    def truth(value, kernel):
        before = [s - 1 for s in slots]
        y = F.conv2d(F.pad(value, (before[1], before[1], before[0], before[0])), kernel.flip(-1, -2), groups=groups)
        first = [s - n for s, n in zip(slots, (4, 5), strict=True)]
        return y[..., first[0] : first[0] + 4, first[1] : first[1] + 5]

    probe, inputs = torch.randn_like(truth(value, kernel)), (value, kernel)
    close(long_conv(value, kernel, groups), truth(value, kernel))
    found = torch.autograd.grad((long_conv(value, kernel, groups) * probe).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad((truth(value, kernel) * probe).sum(), inputs), strict=True):
        close(one, other)


@pytest.mark.parametrize("groups", [1, 4])
def test_opcheck(groups):
    value = torch.randn(2, 4, 5, requires_grad=True)
    kernel = torch.randn(4, 4 // groups, 7, requires_grad=True)
    torch.library.opcheck(long_conv.registered, (value, kernel, groups))
    torch.library.opcheck(long_conv.registered, (value[:0], kernel, groups))
    long_conv(value[:0], kernel, groups).sum().backward()
    assert not kernel.grad.any()


@pytest.mark.parametrize(
    ("value", "kernel", "groups", "said"),
    [
        ((2, 4, 5), (4, 1, 4), 4, "takes a kernel of n to 2 n - 1 slots, got (4,) on (5,)"),
        ((2, 4, 5), (4, 1, 10), 4, "takes a kernel of n to 2 n - 1 slots"),
        ((2, 4, 5), (4, 1, 5, 5), 4, "kernel (O, C / groups, *slots)"),
        ((2, 4, 5), (4, 2, 5), 4, "groups=4 must divide O=4 and C=4"),
        ((2, 4, 5), (4, 1, 5), 0, "groups=0 must divide"),
    ],
)
def test_operands_that_do_not_fit_say_so(value, kernel, groups, said):
    with pytest.raises(ValueError) as error:
        long_conv(torch.randn(value), torch.randn(kernel), groups)
    assert said in str(error.value)


def test_explain_counts_transforms():
    """2.5 L log2 L for each of 2 x 8 maps, there and back, and of 8 kernels; 4 L for each product, and the network."""
    found = explain("all | row | continuous_depthwise(8)", (2, 8, 16, 16))
    network = 2 * 31 * 31 * (2 * 8 + 8 * 8 + 8 * 8)
    each = 2.5 * 32 * 32 * 10
    assert found.parts[0].backend == "fft" and found.backward_flops > found.forward_flops
    assert found.forward_flops == network + 40 * each + 4 * 16 * 32 * 32
    there_and_back = explain("all | row | global_filter(16)", (2, 8, 16, 16)).forward_flops
    assert there_and_back == 2 * 16 * 2.5 * 256 * 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("window(3) | box | hyena(4)", "it goes with path all (without stride and cross), shape causal"),
        ("all | row | hyena(4)", "shape causal and rho ones or identity, such as all | causal | hyena(4)"),
        ("all(stride=2) | row | s4d(4)", "without stride and cross"),
        ("all(cross) | row | identity*s4d(4)", "without stride and cross"),
        ("all | causal | spectral(3)", "such as all | row | spectral(3)"),
        ("all | row | softmax*global_filter(3)", "rho ones or identity"),
        ("all(dot) | row | identity*spectral(3)", "and rho ones, such as"),
        ("all | strided(2) | s4d(4)", "shape row or causal"),
        ("all | row | kernel", "a kernel needs a fixed number of slots"),
        ("all | causal | s4d(5)", "state must be even: conjugate pairs, got state=5"),
        ("all | causal | hyena(4, omega=0)", "omega must be above 0, got omega=0"),
        ("all | row | global_filter(0)", "size must be a positive integer"),
        ("all | row | spectral((2, 0))", "modes must be a positive integer"),
        ("all | row | continuous(4, groups=0)", "groups must be a positive integer"),
    ],
)
def test_what_does_not_go_together_says_so(text, said):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert said in str(error.value)


def test_sizes_for_other_grids_say_so():
    with pytest.raises(ValueError, match=r"modes=\(2, 3\) has 2 entries, but the input has 1 grid axes"):
        Mixer("all | row | spectral((2, 3))", 4, ndim=1)
    with pytest.raises(ValueError, match="groups=3 must divide the 4 value channels"):
        Mixer("all | row | continuous(4, groups=3)", 4)
    with pytest.raises(ValueError, match="a mask of pairs goes with"):
        Mixer("all | causal | s4d(4)", 4, ndim=1)(torch.randn(1, 4, 5), mask=torch.ones(1, 1, 5, 5).bool())

"""ACmix, sums and branches are exactly their terms, written out here.

Everything in float64, outputs and gradients within 1e-12 (absolute) of the reference.
Shape legend: B batch, C channels, O output channels, H heads, d channels of a head, N positions, S slots.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.equivalence import BACKENDS, LETTERS, agree, attention_pair
from torch import Tensor, nn

from nearfold.nn import ACmix2d, BranchingAttention, BranchingConv2d, ConvNN2d, ConvNNAttention, Mixer

pytestmark = pytest.mark.usefixtures("float64")

# --- ACmix


def stacked(ours, x: Tensor, heads: int) -> Tensor:
    """Query, key and value maps, (B, 3 * heads, d, rows, columns)."""
    weights = [(getattr(ours, f"{c}_weight"), getattr(ours, f"{c}_bias")) for c in LETTERS]
    maps = [F.conv2d(x, w[..., None, None], b).unflatten(1, (heads, -1)) for w, b in weights]
    return torch.cat(maps, 1)


def shift_and_sum(maps_BtdRC: Tensor, size: int, stride: int) -> Tensor:
    """Map t moved by the offset of slot t, all added: (B, d, rows, columns)."""
    rows, columns = maps_BtdRC.shape[-2:]
    reach = size // 2
    padded = F.pad(maps_BtdRC, [reach] * 4)
    total = 0
    for t in range(size**2):
        i, j = divmod(t, size)
        total = total + padded[:, t, :, i : i + rows, j : j + columns]
    return total[..., ::stride, ::stride]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "stride", "heads"), [(3, 1, 2), (3, 2, 4), (5, 1, 1), (1, 1, 2)])
def test_acmix_convolution_is_pointwise_maps_shifted_and_summed(size, stride, heads, backend):
    ours = Mixer(f"window({size}, stride={stride}) | box | shift({heads})", 6, 8, backend=backend)
    assert ours.shift_weight.shape == (8, size**2, size, size)

    def reference(x):
        maps = torch.einsum("tm,bmdrc->btdrc", ours.weight, stacked(ours, x, heads))
        y = shift_and_sum(maps, size, stride)
        return y.repeat(1, heads, 1, 1)  # as it starts, every head shifts alike

    agree(ours, reference, torch.randn(2, 6, 7, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_acmix_convolution_is_one_grouped_convolution(interleaved, backend):
    heads, d, size = 2, 4, 3
    spelled = f"window(3, dilation=2) | box | shift(2{', interleaved' if interleaved else ''})"
    ours = Mixer(spelled, 6, heads * d, backend=backend)
    with torch.no_grad():
        ours.shift_weight.normal_()
    twin = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}

    def reference(x):
        weights = [(twin[f"{c}_weight"], twin[f"{c}_bias"]) for c in LETTERS]
        maps = [F.conv2d(x, w[..., None, None], b).unflatten(1, (heads, d)) for w, b in weights]
        read = torch.cat(maps, 1).transpose(1, 2).flatten(1, 2)  # group by head dimension
        merged = torch.einsum("otij,tm->omij", twin["shift_weight"], twin["weight"])
        y = F.conv2d(read, merged, padding=2, dilation=2, groups=d)
        return y if interleaved else y.unflatten(1, (d, heads)).transpose(1, 2).flatten(1, 2)

    assert twin["shift_weight"].shape == (heads * d, size**2, size, size)
    pairs = [(p, lambda n=n: twin[n].grad) for n, p in ours.named_parameters()]
    agree(ours, reference, torch.randn(2, 6, 6, 7), pairs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_acmix_convolution_with_a_bias_on_its_maps(stride, padding, backend):
    heads, d = 2, 4
    ours = Mixer(f"window(3, stride={stride}, padding={padding}) | box | shift(2, bias)", 6, 8, backend=backend)
    with torch.no_grad():
        ours.shift_weight.normal_()
    twin = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}

    def reference(x):  # the bias is added inside the grid, and the border stays zero
        weights = [(twin[f"{c}_weight"], twin[f"{c}_bias"]) for c in LETTERS]
        maps = torch.cat([F.conv2d(x, w[..., None, None], b).unflatten(1, (heads, d)) for w, b in weights], 1)
        made = torch.einsum("tm,bmdrc->bdtrc", twin["weight"], maps) + twin["slot_bias"][:, None, None]
        y = F.conv2d(made.flatten(1, 2), twin["shift_weight"], padding=padding, stride=stride, groups=d)
        return y.unflatten(1, (d, heads)).transpose(1, 2).flatten(1, 2)

    pairs = [(p, lambda n=n: twin[n].grad) for n, p in ours.named_parameters()]
    agree(ours, reference, torch.randn(2, 6, 6, 7), pairs)


@pytest.mark.parametrize(
    ("window", "conv", "stride", "dilation"), [(7, 3, 1, 1), (3, 3, 2, 1), (5, 5, 1, 1), (3, 3, 1, 2)]
)
def test_acmix_is_its_unfolded_formulation(window, conv, stride, dilation):
    heads, d, rows, columns = 2, 4, 8, 9
    ours = ACmix2d(6, 8, window, conv, heads, stride=stride, dilation=dilation)
    with torch.no_grad():
        ours.rates.copy_(torch.tensor([0.3, -1.7]))
    twin = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}
    reach = window // 2 * dilation

    def unfolded(t: Tensor) -> Tensor:  # (B*H, d, rows, columns) -> (B*H, d, S, M)
        t = F.pad(t, [reach] * 4, mode="reflect")
        return F.unfold(t, window, dilation=dilation, stride=stride).unflatten(1, (d, window**2))

    def reference(x):
        q, k, v = (
            F.conv2d(x, twin[f"{c}_weight"][..., None, None], twin[f"{c}_bias"]).unflatten(1, (heads, d)).flatten(0, 1)
            for c in LETTERS
        )
        y, x_ = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        place = torch.stack([x_, y])[None]  # columns first
        p = F.conv2d(place, twin["0.position_weight"][..., None, None], twin["0.position_bias"])
        at = (..., slice(None, None, stride), slice(None, None, stride))
        q_M, p_M = q[at].flatten(2)[:, :, None] / math.sqrt(d), p[at].flatten(2)[:, :, None]
        score = (q_M * (unfolded(k) + p_M - unfolded(p))).sum(1, keepdim=True)
        out = (torch.softmax(score, 2) * unfolded(v)).sum(2)
        out = out.unflatten(0, (-1, heads)).flatten(1, 2)
        half = Mixer(f"window({conv}, stride={stride}, dilation={dilation}) | box | shift(2)", 6, 8)
        names = {n: twin.get(f"1.{n}", twin.get(n)) for n, _ in half.named_parameters()}
        convolution = torch.func.functional_call(half, names, x)
        return twin["rates"][0] * out.view_as(convolution) + twin["rates"][1] * convolution

    pairs = [(p, lambda n=n: twin[n].grad) for n, p in ours.named_parameters()]
    agree(ours, reference, torch.randn(2, 6, rows, columns), pairs)


# --- sum and branch

A, B = "nearest(5, cosine, self) | ranked | kernel", "window(3) | box | kernel"


def part(layer, name: str, notation: str, out: int, read: int | None = None, **kwargs):
    """One operand of a combinator as a layer of its own, weights shared."""
    alone = Mixer(notation, read or layer.in_channels, out, **kwargs)
    alone.load_state_dict({n.removeprefix(name): p for n, p in layer.state_dict().items() if n.startswith(name)})
    return alone


def test_a_sum_is_the_sum_of_its_terms():
    ours = Mixer(f"0.5*({A}) + b*({B}) + ({B})", 4, 6)
    assert ours.rates.shape == (1,)
    with torch.no_grad():
        ours.rates.fill_(-1.5)
    terms = [part(ours, f"{i}.", notation, 6) for i, notation in enumerate((A, B, B))]

    def reference(x):
        return 0.5 * terms[0](x) - 1.5 * terms[1](x) + terms[2](x)

    pairs = [
        (ours.get_parameter("0.weight"), lambda: terms[0].weight.grad),
        (ours.get_parameter("1.weight"), lambda: terms[1].weight.grad),
    ]
    x = torch.randn(2, 4, 5, 6)
    agree(ours, reference, x, pairs)
    assert ours.rates.grad.abs().item() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [0, 1])
def test_terms_that_share_projections_and_one_that_adds_a_border(padding, backend):
    """A border is projected with the map, bias and all: its term then projects for itself, from shared weights."""
    near, window = f"nearest(3, dot, padding={padding}) | ranked | softmax", "window(3) | box | softmax"
    ours = Mixer(f"({near}) + ({window})", 4, backend=backend)
    assert set(dict(ours.named_parameters())) >= {"query_weight", "key_bias", "value_weight"}
    terms = [Mixer(text, 4, backend=backend) for text in (near, window)]
    for i, term in enumerate(terms):
        own = {
            n.removeprefix(f"{i}."): p for n, p in ours.state_dict().items() if n.startswith(("query", "key", "value"))
        }
        own |= {n.removeprefix(f"{i}."): p for n, p in ours.state_dict().items() if n.startswith(f"{i}.")}
        term.load_state_dict(own)
    agree(ours, lambda x: terms[0](x) + terms[1](x), torch.randn(2, 4, 5, 6))


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize(("ratio", "first"), [(0.0, 0), (0.3, 1), (0.5, 3), (1.0, 6)])
def test_branch_splits_the_outputs_and_both_read_all_inputs(ratio, first, mix):
    ours = Mixer(f"branch({ratio}, {A}, {B}{', mix' if mix else ''})", 4, 6)
    halves = [part(ours, f"{i}.", n, o) for i, n, o in ((0, A, first), (1, B, 6 - first)) if o]
    shapes = [tuple(half.weight.shape[:2]) for half in halves]
    assert shapes == [(o, 4) for o in (first, 6 - first) if o]
    twin = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters() if n.startswith("mix")}

    def reference(x):
        y = torch.cat([half(x) for half in halves], 1)
        return F.conv2d(y, twin["mix_weight"][..., None, None], twin["mix_bias"]) if mix else y

    pairs = [(ours.get_parameter(n), lambda n=n: twin[n].grad) for n in twin]
    for i, half in zip([i for i, o in ((0, first), (1, 6 - first)) if o], halves, strict=True):
        pairs.append((ours.get_parameter(f"{i}.weight"), lambda half=half: half.weight.grad))
    agree(ours, reference, torch.randn(2, 4, 5, 6), pairs)


def test_branch_with_split_inputs_is_two_layers_on_two_shares():
    ours = Mixer(f"branch(0.3, {A}, {B}, split)", 5, 8)
    halves = [part(ours, f"{i}.", n, o, read) for i, n, o, read in ((0, A, 2, 1), (1, B, 6, 4))]
    pairs = [(ours.get_parameter(f"{i}.weight"), lambda half=half: half.weight.grad) for i, half in enumerate(halves)]
    agree(ours, lambda x: torch.cat([halves[0](x[:, :1]), halves[1](x[:, 1:])], 1), torch.randn(2, 5, 5, 6), pairs)
    with pytest.raises(ValueError, match="in_channels=1 leave none for an operand of branch"):
        Mixer(f"branch(0.3, {A}, {B}, split)", 1, 8)


def test_branching_layers_at_their_ends():
    x = torch.randn(2, 4, 5, 6)
    convolution, convnn = nn.Conv2d(4, 6, 3, padding=1), ConvNN2d(4, 6, k=5)
    for ratio, end, at in ((0.0, convolution, "1"), (1.0, convnn, "0")):
        ours = BranchingConv2d(4, 6, 3, 5, ratio, mix=False)
        ours.load_state_dict({f"{at}.{n}": p for n, p in end.state_dict().items()})
        agree(ours, end, x)
    tokens = torch.randn(2, 7, 12)
    ours = BranchingAttention(12, 3, 5, 0.0, mix=False)
    theirs, pairs = attention_pair(ours.get_submodule("1"), 12, 3, True)
    agree(ours, lambda t: theirs(t, t, t, need_weights=False)[0], tokens, pairs)
    near = ConvNNAttention(12, 3, 5)
    ours = BranchingAttention(12, 3, 5, 1.0, mix=False)
    ours.load_state_dict({f"0.{n}": p for n, p in near.state_dict().items()})
    agree(ours, near, tokens)

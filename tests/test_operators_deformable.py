"""DCNv3, DCNv4, deformable attention on one map and DAT against the papers' formulas by other operators of torch.

What is read between positions is read by F.grid_sample; everything else is written out.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nearfold import preset
from nearfold.lower import explain
from nearfold.nn import DCNv3, DCNv4, DeformableAttention2d, Mixer, MultiScaleDeformableAttention

GRIDS = [(7, 6), (1, 1), (2, 9), (5, 1)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def drawn(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.4 + 0.1 * (p.dim() > 1))
    return layer.double()


def read_at(x, at):
    """x (B, c, H, W) at places (B, M, S, 2), row before column, in positions: (B, c, M, S); zero beyond the map."""
    height, width = x.shape[2:]
    grid = torch.stack([(2 * at[..., 1] + 1) / width - 1, (2 * at[..., 0] + 1) / height - 1], -1)
    return F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)


def mapped(x, p, name):
    return F.conv2d(x, p[f"{name}_weight"][..., None, None], p.get(f"{name}_bias"))


def same(layer, truth, *inputs):
    """Output and every gradient."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    params = dict(layer.named_parameters())
    y, expected = layer(*leaves), truth(params, *leaves)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ends = [*leaves, *params.values()]
    assert y.shape == expected.shape
    found, wanted = (torch.autograd.grad(t, ends, grad, allow_unused=True) for t in (y, expected))
    names = ["y", *(f"x{i}" for i in range(len(leaves))), *params]
    for name, f, t in zip(names, (y, *found), (expected, *wanted), strict=True):
        f, t = (torch.zeros(()) if g is None else g for g in (f, t))
        gap = (f - t).abs().max() if t.numel() else torch.zeros(())
        assert gap <= 1e-11 * max(1.0, t.abs().max().item() if t.numel() else 0), name


def centres(height, width):
    rows, columns = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.stack([rows, columns], -1).flatten(0, 1)


def bent(p, x, offset, weight, groups, size, stride, dilation, out):
    """The sum over a window of moved slots, group by group; offset (B, G * S * 2, *out), weight (B, G, S, M)."""
    value, read = mapped(x, p, "value"), []
    base = centres(*out) * torch.tensor(stride)
    rows, columns = (d * (torch.arange(n) - (n - 1) // 2).double() for n, d in zip(size, dilation, strict=True))
    window = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    where = offset.flatten(2).unflatten(1, (groups, -1, 2)).permute(0, 1, 4, 2, 3) + base[:, None] + window
    for g, part in enumerate(value.chunk(groups, 1)):
        read.append((read_at(part, where[:, g]) * weight[:, g, None].transpose(2, 3)).sum(-1))
    return mapped(torch.cat(read, 1).unflatten(2, out), p, "out")


@grids
@pytest.mark.parametrize("size, stride, dilation, groups", [(3, 1, 1, 4), ((3, 5), 2, 1, 2), (3, (1, 2), 2, 1)])
def test_dcn_v3(grid, size, stride, dilation, groups):
    layer = drawn(DCNv3(8, size, stride=stride, dilation=dilation, groups=groups))
    sizes, strides, holes = ((v, v) if isinstance(v, int) else v for v in (size, stride, dilation))
    slots = math.prod(sizes)

    def truth(p, x):
        pad = [d * (n - 1) // 2 for n, d in zip(sizes, holes, strict=True)]
        made = F.conv2d(x, p["feature_weight"], p["feature_bias"], strides, pad, holes, groups=8)
        mean, spread = made.mean(1, keepdim=True), made.var(1, unbiased=False, keepdim=True)
        made = (made - mean) / (spread + 1e-6).sqrt()
        made = made * p["norm_weight"].view(-1, 1, 1) + p["norm_bias"].view(-1, 1, 1)
        made = made * 0.5 * (1 + torch.erf(made / math.sqrt(2)))
        weight = mapped(made, p, "mask").flatten(2).unflatten(1, (groups, slots)).softmax(2)
        out = made.shape[2:]
        return bent(p, x, mapped(made, p, "offset"), weight, groups, sizes, strides, holes, out)

    same(layer, truth, torch.randn(2, 8, *grid).double())


@grids
@pytest.mark.parametrize("stride, groups", [(1, 4), (2, 2)])
def test_dcn_v4(grid, stride, groups):
    layer = drawn(DCNv4(8, stride=stride, groups=groups))

    def truth(p, x):
        seen = x[:, :, ::stride, ::stride]
        weight = mapped(seen, p, "mask").flatten(2).unflatten(1, (groups, 9))
        out = seen.shape[2:]
        return bent(p, x, mapped(seen, p, "offset"), weight, groups, (3, 3), (stride, stride), (1, 1), out)

    same(layer, truth, torch.randn(2, 8, *grid).double())


def test_new_layers_are_a_mean_and_nothing():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 7)
    layer = DCNv3(8)
    value = mapped(x, dict(layer.named_parameters()), "value")
    mean = F.avg_pool2d(value, 3, 1, 1)
    torch.testing.assert_close(layer(x), mapped(mean, dict(layer.named_parameters()), "out"))
    four = DCNv4(8)
    torch.testing.assert_close(four(x), four.out_bias.view(-1, 1, 1).expand(2, 8, 6, 7))


@grids
def test_deformable_attention_on_its_own_map(grid):
    layer = drawn(Mixer(preset("deformable_attention"), 8))

    def truth(p, x):
        value, read = mapped(x, p, "value"), []
        made = mapped(x, p, "offset").flatten(2).unflatten(1, (4, 4, 2)).permute(0, 1, 4, 2, 3)
        where = made + centres(*grid)[:, None]
        weight = mapped(x, p, "mask").flatten(2).unflatten(1, (4, 4)).softmax(2).transpose(2, 3)
        for g, part in enumerate(value.chunk(4, 1)):
            read.append((read_at(part, where[:, g]) * weight[:, g, None]).sum(-1))
        return mapped(torch.cat(read, 1).unflatten(2, grid), p, "out")

    same(layer, truth, torch.randn(2, 8, *grid).double())


@grids
def test_the_word_is_the_layer(grid):
    """On another map, with the reference points that the grid gives, in the order (x, y)."""
    theirs = drawn(MultiScaleDeformableAttention(8, 4, levels=1, points=3))
    layer = Mixer("points(3, groups=4, cross) | box | modulated(activation=softmax, project=vo)", 8).double()
    swapped = lambda t: t.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # noqa: E731
    state = {
        "offset_weight": swapped(theirs.sampling_offsets.weight), "offset_bias": swapped(theirs.sampling_offsets.bias),
        "mask_weight": theirs.attention_weights.weight, "mask_bias": theirs.attention_weights.bias,
        "value_weight": theirs.value_proj.weight, "value_bias": theirs.value_proj.bias,
        "out_weight": theirs.output_proj.weight, "out_bias": theirs.output_proj.bias,
    }  # fmt: skip
    layer.load_state_dict(state)
    x, context = torch.randn(2, 8, *grid).double(), torch.randn(2, 8, 4, 5).double()
    reference = ((centres(*grid) + 0.5) / torch.tensor(grid)).flip(-1)[None, :, None].expand(2, -1, -1, -1)
    y = theirs(x.flatten(2).mT, reference, context.flatten(2).mT, [(4, 5)])
    torch.testing.assert_close(layer(x, context).flatten(2).mT, y, rtol=1e-12, atol=1e-12)
    mask = torch.rand(2, 4, 5) < 0.6
    y = theirs(x.flatten(2).mT, reference, context.flatten(2).mT, [(4, 5)], mask.flatten(1))
    torch.testing.assert_close(layer(x, context, mask).flatten(2).mT, y, rtol=1e-12, atol=1e-12)


def test_new_points_go_where_the_layers_go():
    layer, theirs = Mixer("points(4, groups=8) | box | ones", 8), MultiScaleDeformableAttention(8, 8, levels=1)
    rays = theirs.sampling_offsets.bias.view(8, 4, 2).flip(-1)
    torch.testing.assert_close(layer.offset_bias.view(8, 4, 2), rays)
    line = Mixer("points(2, groups=2) | box | ones", 8, ndim=1)
    assert line.offset_bias.tolist() == [1, 2, -1, -2]
    assert Mixer("points(2, groups=2) | box | ones", 8, ndim=3).offset_bias.shape == (12,)
    with pytest.raises(ValueError, match="same number of grid axes, got 2 and 1"):
        Mixer("points(2, cross) | box | ones", 8)(torch.zeros(1, 8, 3, 3), torch.zeros(1, 8, 5))


@grids
@pytest.mark.parametrize("stride, groups, reach, bias", [(4, 1, 1.0, 0), ((2, 3), 2, 2.5, 3), (1, 4, 0.0, 7)])
def test_dat(grid, stride, groups, reach, bias):
    more = {"kernel_size": 3, "reach": reach, "relative_bias": bias}
    layer = drawn(DeformableAttention2d(8, 4, stride=stride, groups=groups, **more))
    steps = (stride, stride) if isinstance(stride, int) else stride

    def truth(p, x):
        """The paper samples x first and projects then."""
        B, query = len(x), mapped(x, p, "query")
        count = [-(-n // s) for n, s in zip(grid, steps, strict=True)]
        apart = torch.tensor([n / m for n, m in zip(grid, count, strict=True)], dtype=torch.float64)
        reference = (centres(*count) + 0.5) * apart - 0.5
        last = torch.tensor(grid).double() - 1
        sampled = []
        for g in range(groups):
            own = query.chunk(groups, 1)[g]
            made = F.conv2d(own, p["feature_weight"], p["feature_bias"], steps, 1, groups=own.shape[1])
            made = torch.tanh(mapped(F.gelu(made), {"offset_weight": p["offset_weight"]}, "offset")) * reach
            where = reference + made.flatten(2).mT * apart
            where = torch.minimum(where.clamp(min=0), last)
            sampled.append(where)
        heads = []
        for h in range(4):
            where = sampled[h * groups // 4]
            seen = read_at(x, where[:, :, None])[..., 0]  # (B, C, S)
            k = F.linear(seen.mT, p["key_weight"], p["key_bias"])[..., 2 * h : 2 * h + 2]
            v = F.linear(seen.mT, p["value_weight"], p["value_bias"])[..., 2 * h : 2 * h + 2]
            q = query[:, 2 * h : 2 * h + 2].flatten(2).mT
            score = q @ k.mT / math.sqrt(2)
            if bias:  # displacements from -1 to 1, as public code has them, ends of the table at its ends
                apart = (centres(*grid)[:, None] - where[:, None]) / last.clamp(min=1)
                table = p["relative_bias"][h][None, None].expand(B, -1, -1, -1)
                score = score + F.grid_sample(table, apart.flip(-1), align_corners=True)[:, 0]
            heads.append(torch.softmax(score, -1) @ v)
        y = torch.cat(heads, -1).mT.reshape(B, 8, *grid)
        return mapped(y, p, "out")

    same(layer, truth, torch.randn(2, 8, *grid).double())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DCNv3(8, groups=3), "groups=3 must divide the 8 channels"),
        (lambda: DCNv4(8, 0), "size must be"),
        (lambda: DeformableAttention2d(8, 4, kernel_size=4), "size must be odd, got size=4"),
        (lambda: DeformableAttention2d(8, 4, groups=3), "groups=3 must divide the heads"),
        (lambda: DeformableAttention2d(8, 4, reach=-1), "reach must be 0 or more"),
        (lambda: Mixer("deformable(3, net=deep) | box | ones", 8), "net must be window, pointwise or depthwise"),
        (lambda: Mixer("deformable(3, net=pointwise, padding=0) | box | ones", 8), "padding must be same with net="),
        (lambda: Mixer("points(0) | box | ones", 8), "count must be a positive integer"),
        (lambda: Mixer("points(2) | box | softmax", 8), "points goes with rho ones or modulated"),
        (lambda: Mixer("points(2) | box | modulated(project=qv)", 8), "project must be v, o or vo"),
        (lambda: Mixer("points(2) | box | modulated(activation=relu)", 8), "activation must be sigmoid, softmax or"),
        (lambda: Mixer("points(2, cross) | box | ones", 8, context_channels=6), "need a projection of the value to 8"),
        (lambda: Mixer("sampled(2, cosine) | row | softmax", 8), "similarity must be dot or scaled"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SEVERAL = "points(2, groups=4, levels=3, cross) | box | modulated(activation=softmax, project=vo)"
MAPS = [(4, 5), (2, 3), (1, 1)]


def pyramid(dtype=torch.float64, maps=MAPS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, *grid, generator=generator, dtype=torch.float64).to(dtype) for grid in maps]


@grids
def test_several_maps_are_one_softmax(grid):
    """As the layer has it, on every backend, with every gradient, and with a mask of the keys."""
    layer = drawn(Mixer(SEVERAL, 8, context_channels=6))
    swapped = lambda t: t.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # noqa: E731
    reference = ((centres(*grid) + 0.5) / torch.tensor(grid)).flip(-1)[None, :, None].expand(2, -1, -1, -1)

    def truth(p, x, *maps):
        value = torch.cat([one.flatten(2) for one in maps], 2).mT
        made = F.linear(x.flatten(2).mT, swapped(p["offset_weight"]), swapped(p["offset_bias"]))
        made = made.unflatten(2, (4, 3, 2, 2))
        share = F.linear(x.flatten(2).mT, p["mask_weight"], p["mask_bias"]).unflatten(2, (4, 6)).softmax(-1)
        value = F.linear(value, p["value_weight"], p["value_bias"]).unflatten(2, (4, 2))
        sizes = torch.tensor([one.shape[:1:-1] for one in maps])
        where = reference[:, :, None, :, None] + made / sizes[:, None]
        read, first = 0, 0
        for level, one in enumerate(maps):
            own = value[:, first : first + sizes[level].prod()]
            first += int(sizes[level].prod())
            for h in range(4):
                at = where[:, :, h, level].flip(-1) * sizes[level].flip(-1) - 0.5
                seen = read_at(own[:, :, h].mT.unflatten(2, one.shape[2:]), at)
                part = (seen * share[:, None, :, h, 2 * level : 2 * level + 2]).sum(-1)
                read = read + F.pad(part, (0, 0, 2 * h, 6 - 2 * h))
        return mapped(read.unflatten(2, grid), p, "out")

    x, maps = torch.randn(2, 8, *grid).double(), pyramid()

    class Spread(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def named_parameters(self, *args, **kwargs):
            return self.inner.named_parameters()

        def forward(self, x, *maps, mask=None):
            return self.inner(x, list(maps), mask)

    spread = Spread()
    for layer.backend in ("auto", "gather", "oracle"):
        same(spread, truth, x, *maps)
    mask = torch.rand(2, sum(map(math.prod, MAPS))) < 0.6
    hidden = [one.flatten(2).masked_fill(~part[:, None], math.nan) for one, part in zip(maps, split(mask), strict=True)]
    hidden = [one.unflatten(2, grid) for one, grid in zip(hidden, MAPS, strict=True)]
    found = []
    for layer.backend in ("auto", "oracle"):
        found.append(layer(x, hidden, mask))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert found[0].isfinite().all()


def split(mask):
    return mask.split([math.prod(grid) for grid in MAPS], 1)


def test_several_maps_in_any_surroundings():
    layer, x = drawn(Mixer(SEVERAL, 8, context_channels=6)).float(), torch.randn(2, 8, 3, 4)
    maps = pyramid(torch.float32)
    y = layer(x, maps)
    other = layer(x[:0], [one[:0] for one in maps])
    assert other.shape == (0, 8, 3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, maps), y)
    wider = pyramid(torch.float32, [(5, 7), (3, 3), (2, 2)])
    torch.testing.assert_close(compiled(x, wider), layer(x, wider))
    exported = torch.export.export(layer.eval(), (x, maps)).module()
    torch.testing.assert_close(exported(x, maps), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x, maps).float() - y).abs().max() < 0.1 * y.abs().max()
    text = str(layer)
    assert "levels=3, cross" in text and "gather" in str(explain(SEVERAL, (1, 8, 4, 4)))
    for wrong, message in (
        (maps[0], "reads 3 maps; context must be a list of them, got 1"),
        (maps[:2], "reads 3 maps; context must be a list of them, got 2"),
        ([*maps[:2], maps[2][:, :5]], "context_channels=6"),
        ([*maps[:2], maps[2][:1]], r"context must be \(B, C, \*grid\) with the batch"),
        ([*maps[:2], None], r"context must be a torch\.Tensor"),
        ([*maps[:2], maps[2].flatten(2)], "same number of grid axes, got 2 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, wrong)
    one = Mixer("points(2, cross) | box | ones", 6)
    with pytest.raises(ValueError, match=r"context must be a torch\.Tensor"):
        one(torch.zeros(2, 6, 3, 3), maps[:2])
    with pytest.raises(ValueError, match="levels must be left out without cross"):
        Mixer("points(2, levels=2) | box | ones", 6)

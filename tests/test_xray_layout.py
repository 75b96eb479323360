"""Layers whose tensors are no maps: positions where channels are, parts of images, queries beside the map."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nearfold import _torchvision, xray
from nearfold.examine.layout import Layout
from nearfold.examine.page import page
from nearfold.examine.reading import probed
from nearfold.examine.suggest import rules_for
from nearfold.look import mixing_matrix
from nearfold.look.measures import PLACED, measure

SIDE = 8
N = SIDE * SIDE
CLOSE = 1e-5

pytestmark = pytest.mark.usefixtures("seeded")


def same(mine: dict[str, float], truth: dict[str, float]) -> None:
    """Every measure is the other's, and defined where the other is."""
    assert mine.keys() == truth.keys()
    for name, value in truth.items():
        assert mine[name] == pytest.approx(value, abs=CLOSE, rel=CLOSE, nan_ok=True), name


def foreign(name: str):
    try:
        _torchvision.load("torchvision")
        return pytest.importorskip(name)
    except ImportError as error:
        pytest.skip(str(error))


def only(seen, name: str):
    (layer,) = (one for one in seen.layers if one.name == name)
    return layer


class Patches(nn.Module):
    """An image's tokens (B, N, D) through a layer, which is given them as it likes."""

    def __init__(self, width: int, inner: nn.Module, given=lambda x: x) -> None:
        super().__init__()
        self.stem, self.inner, self.given = nn.Conv2d(3, width, 2, stride=2), inner, given

    def tokens(self, x):
        return self.stem(x).flatten(2).mT

    def forward(self, x):
        return self.inner(self.given(self.tokens(x)))


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 2 * SIDE, 2 * SIDE)


def test_a_table_of_positions_is_read_with_its_signs():
    """16 channels could be a map of 4 x 4."""
    net = Patches(16, nn.Linear(N, N), lambda tokens: tokens.mT)
    layer = only(xray(net, images(), network=False), "inner")
    assert (layer.way, layer.grid, layer.notation) == ("words", (SIDE, SIDE), "all | row | table(64)")
    assert layer.fixed
    assert 0.3 < layer.measures["negative"] < 0.7
    same(layer.measures, measure(net.inner.weight.detach().expand(2, 1, N, N), (SIDE, SIDE)).mean())


def test_a_token_mlp_is_differentiated_along_the_positions():
    timm = foreign("timm")
    block = timm.models.mlp_mixer.MixerBlock(16, N)
    net, x = Patches(16, block).eval(), images()
    layer = only(xray(net, x, network=False), "inner.mlp_tokens")
    assert (layer.way, layer.grid, layer.out_grid) == ("derivative", (SIDE, SIDE), (SIDE, SIDE))
    with torch.no_grad():
        given = block.norm1(net.tokens(x)).mT
    # channels stay apart and signs square away: the derivative is exact, and every channel has one of its own
    rows = []
    for one in given:
        of_all = torch.autograd.functional.jacobian(block.mlp_tokens, one)
        each = torch.stack([of_all[c, :, c] for c in range(16)])
        rows.append((each.square().sum(0) / 16).sqrt()[layer.rows])
    same(layer.measures, measure(torch.stack(rows)[:, None], (SIDE, SIDE), layer.rows, signed=False).mean())


class Parts(nn.Module):
    """Rectangles of a map as a batch of their own: (B, C, H, W)."""

    def __init__(self, inner: nn.Module, order=(0, 2, 4, 1, 3, 5)) -> None:
        super().__init__()
        self.inner, self.order = inner, order

    def forward(self, x):
        B, C, H, W = x.shape
        parts = x.view(B, C, 2, H // 2, 2, W // 2).permute(self.order)
        shape, back = parts.shape, [self.order.index(d) for d in range(6)]
        return self.inner(parts.reshape(-1, C, H // 2, W // 2)).view(shape).permute(back).reshape(B, C, H, W)


@pytest.mark.parametrize("way", ["words", "derivative"])
def test_parts_of_images_are_read_on_their_map(way):
    conv = nn.Conv2d(3, 3, 3, padding=1)
    if way == "derivative":

        class Halved(nn.Conv2d):
            def forward(self, x):
                return super().forward(x) / 2

        conv = Halved(3, 3, 3, padding=1)
    net, x = nn.Sequential(nn.Conv2d(3, 3, 1), Parts(conv)), torch.randn(5, 3, SIDE, SIDE)
    seen = xray(net, x, batch=3)
    layer = only(seen, "1.inner")
    assert (layer.way, layer.grid, layer.rearranged) == (way, (SIDE, SIDE), True)
    assert "4 parts of every image: read on the map" in layer.note
    assert seen.alike.shape == (len(seen.layers),) * 2
    with torch.no_grad():
        given = net[0](x)
    truth = mixing_matrix(net[1], given[:2])[:, :, layer.rows]
    if way == "words":
        same(layer.measures, measure(truth, (SIDE, SIDE), layer.rows, signed=False).mean())
    else:
        rows = torch.stack([probed(net[1], net[1], one[None], layer.rows, Layout(1)) for one in given[:4]])
        same(layer.measures, measure(rows[:, None], (SIDE, SIDE), layer.rows, signed=False).mean())
    quarter = torch.arange(N).view(2, 4, 2, 4).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    for row, read in zip(layer.rows.tolist(), layer.sample[0], strict=True):
        (its,) = (one for one in quarter.tolist() if row in one)
        assert not read[[n for n in range(N) if n not in its]].any()


def test_parts_that_do_not_follow_one_another_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Parts(nn.Conv2d(3, 3, 3, padding=1), (2, 4, 0, 1, 3, 5)))
    seen = xray(net, torch.randn(4, 3, SIDE, SIDE), network=False)
    (left,) = (one for one in seen.left if one.name == "1.inner")
    assert "those of one do not follow one another" in left.reason


def test_parts_of_which_nothing_is_known_are_refused():
    class Copied(nn.Module):
        """What leaves the tensors cannot be followed."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            parts = torch.tensor(x.tolist()).view(-1, 3, 4, 4, 4).transpose(1, 2).flatten(0, 1)
            return self.inner(parts)

    seen = xray(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Copied()), torch.randn(4, 3, SIDE, SIDE), network=False)
    (left,) = (one for one in seen.left if one.name == "1.inner")
    assert "called on 16 parts of 4 images" in left.reason


def test_windows_and_grids_of_maxvit():
    """As the layer around them on the whole map, differentiated with the same signs."""
    timm = foreign("timm")
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    del timm

    class Whole(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block._partition_attn(x)

    cfg = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4))
    blocks = [PartitionAttentionCl(16, partition_type=kind, cfg=cfg) for kind in ("block", "grid")]
    net = nn.Sequential(nn.Conv2d(3, 16, 2, stride=2), *blocks).eval()
    for block in blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.5)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net[1:](self.net[0](x).permute(0, 2, 3, 1))

    x = images()
    seen = xray(Last().eval(), x, network=False)
    with torch.no_grad():
        given = net[0](x).permute(0, 2, 3, 1)
    for i, block in enumerate(blocks, 1):
        layer = only(seen, f"net.{i}.attn")
        assert (layer.way, layer.grid) == ("derivative", (SIDE, SIDE))
        with torch.no_grad():
            normed = block.norm1(given)
        whole = Whole(block).eval()
        rows = torch.stack([probed(whole, whole, one[None], layer.rows, Layout(-1)) for one in normed])
        same(layer.measures, measure(rows[:, None], (SIDE, SIDE), layer.rows, signed=False).mean())
        with torch.no_grad():
            given = block(given)
    assert only(seen, "net.1.attn").measures["window7"] == pytest.approx(1.0, abs=CLOSE)
    assert only(seen, "net.2.attn").measures["window7"] < 0.9


def test_the_parts_of_mobilevit_are_read_head_by_head():
    """Every second pixel in a part: the attention's own weights, on the map."""
    timm = foreign("timm")
    block = timm.models.mobilevit.MobileVitBlock(8, transformer_dim=16, transformer_depth=1, num_heads=2, patch_size=2)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), block).eval(), images()
    attn = block.transformer[0].attn
    nn.init.normal_(attn.qkv.weight, std=0.5)
    layer = only(xray(net, x, network=False), "1.transformer.0.attn")
    assert (layer.way, layer.grid, layer.groups, layer.images) == ("words", (SIDE, SIDE), 2, 3)
    assert layer.measures["content"] > 0.1
    assert rules_for(layer) == []  # what stands there reads a part
    attn.fused_attn = False
    weights = []
    attn.attn_drop.register_forward_hook(lambda m, given, made: weights.append(made.detach()))
    with torch.no_grad():
        net(x)
    numbers = torch.arange(N).view(SIDE // 2, 2, SIDE // 2, 2).permute(1, 3, 0, 2).reshape(4, N // 4)
    truth = torch.zeros(3, 2, N, N)
    for p, its in enumerate(numbers):
        truth[:, :, its[:, None], its] = weights[0].view(3, 4, 2, N // 4, N // 4)[:, p]
    same(layer.measures, measure(truth, (SIDE, SIDE)).mean())


def test_a_sequence_in_another_order_is_read_on_the_map():
    columns = torch.arange(N).view(SIDE, SIDE).T.flatten()
    conv = nn.Conv1d(4, 4, 3, padding=1)
    net = Patches(4, conv, lambda tokens: tokens.mT.unflatten(2, (SIDE, SIDE)).mT.flatten(2))
    layer = only(xray(net, images(), network=False), "inner")
    assert (layer.grid, layer.rearranged) == ((SIDE, SIDE), True)
    weight = conv.weight.detach().square().sum((0, 1)).div(4).sqrt()
    along = torch.zeros(N, N)
    for i in range(N):
        for s in (-1, 0, 1):
            if 0 <= i + s < N:
                along[i, i + s] = weight[s + 1]
    truth = torch.zeros(N, N)
    truth[columns[:, None], columns] = along
    same(layer.measures, measure(truth.expand(2, 1, N, N), (SIDE, SIDE), signed=False).mean())


class WithToken(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.token = Patches(8, inner, self.add), nn.Parameter(torch.randn(1, 1, 8))

    def add(self, tokens):
        return torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)

    def forward(self, x):
        return self.inner(x)


def test_class_attention_is_one_row_without_a_place():
    timm = foreign("timm")
    attn = timm.models.cait.ClassAttn(8, num_heads=2)
    nn.init.normal_(attn.q.weight, std=1.0)
    nn.init.normal_(attn.k.weight, std=1.0)
    net, x = WithToken(attn).eval(), images()
    seen = xray(net, x)
    layer = only(seen, "inner.inner")
    assert (layer.grid, layer.out_grid, layer.beside, len(layer.rows)) == ((SIDE, SIDE), (), 1, 1)
    assert all(math.isnan(layer.measures[name]) for name in (*PLACED, "rank"))
    assert "no place" in layer.note
    with torch.no_grad():
        given = net.add(net.inner.tokens(x))
    truth = mixing_matrix(attn, given, tokens=True)
    expected = measure(truth, (SIDE, SIDE), None, (), beside=1, signed=False).mean()
    for name in ("spread", "participation", "beside", "content"):  # two signs, not all channels
        assert layer.measures[name] == pytest.approx(expected[name], rel=0.35, abs=0.02), name
    rows = torch.stack([probed(attn, attn, one[None], torch.tensor([0]), Layout(-1), probes=512) for one in given])
    torch.testing.assert_close(rows, truth[:, 0], rtol=0.3, atol=0.02)
    text = page([("net", seen, x[0])])
    assert "one for each output asked, by 65 inputs" in text


def test_measures_of_a_row_without_a_place():
    row = torch.zeros(1, 1, 1, N + 1)
    row[..., 0] = 0.5
    row[..., 1:3] = 0.25
    found = measure(row, (SIDE, SIDE), None, (), beside=1).mean()
    assert found["spread"] == pytest.approx(2 * math.sqrt(2))
    assert found["beside"] == pytest.approx(0.5)
    assert math.isnan(found["distance"])
    with pytest.raises(ValueError, match="1 rows"):
        measure(row.expand(1, 1, 2, -1), (SIDE, SIDE), None, (), beside=1)


class Halves(nn.Module):
    """The left half of a map onto the right one: (B, C, H, W). Its only part maps channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.mix(x + x.flip(-1))


def test_a_forward_of_its_own_is_measured_where_no_part_is():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Halves()).eval()
    seen = xray(net, torch.randn(2, 3, SIDE, SIDE), network=False)
    layer = only(seen, "1")
    assert not seen.left
    assert (layer.way, layer.grid) == ("derivative", (SIDE, SIDE))
    assert "own forward" in layer.note
    truth = torch.eye(N) + torch.eye(N).view(N, SIDE, SIDE).flip(-1).flatten(1)
    for name in ("distance", "spread", "itself", "before", "content"):
        rows = truth[layer.rows].expand(2, 1, -1, -1)
        assert layer.measures[name] == pytest.approx(
            measure(rows, (SIDE, SIDE), layer.rows).mean()[name], abs=CLOSE, rel=CLOSE
        ), name

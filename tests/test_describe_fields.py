"""Every receptive field that `describe` states is the support of a gradient, whatever mixes positions on the way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nearfold import parse
from nearfold.recognise import describe
from nearfold.recognise.field import through
from nearfold.recognise.place import begin

SIZE = 24
C = 4


def shifted(x: Tensor, by: int, axis: int) -> Tensor:
    n = x.shape[axis]
    return x.narrow(axis, by, n - by)


def torn(x: Tensor) -> Tensor:
    """Channels that were shifted by slices and padding: TSM."""
    left = F.pad(x[:, :2], (0, 1))[..., 1:]
    return torch.cat([left, x[:, 2:]], 1)


def written(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, 1:] = x[:, :, :-1]
    return out + x


def squeezed(x: Tensor) -> Tensor:
    return x * x.mean((2, 3), keepdim=True).sigmoid()


def attended(x: Tensor) -> Tensor:
    tokens = x.flatten(2).mT
    return ((tokens @ tokens.mT).softmax(-1) @ tokens).mT.reshape(x.shape)


def columns(x: Tensor) -> Tensor:
    """Attention within each column."""
    tokens = x.permute(0, 3, 2, 1)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).permute(0, 3, 2, 1)


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def rearranged(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


KERNEL = torch.linspace(0.1, 1, 9, dtype=torch.float64).view(1, 1, 3, 3)

MIXING = {
    "stride": lambda x: x[..., ::2, ::2],
    "one axis strided": lambda x: x[..., ::3, :],
    "difference": lambda x: shifted(x, 4, 2) - x[:, :, :-4],
    "both axes": lambda x: shifted(shifted(x, 1, 2), 2, 3) * x[:, :, :-1, :-2],
    "flip": lambda x: x.flip(3),
    "sum with its flip": lambda x: x + x.flip(3),
    "roll": lambda x: x + x.roll(2, 3),
    "roll alone": lambda x: x.roll(1, 2),
    "focus": focus,
    "rearranged": rearranged,
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "index": lambda x: x[:, :, torch.arange(x.shape[2] - 1, -1, -1)],
    "index_select": lambda x: x.index_select(3, torch.arange(0, x.shape[3], 2)) * 2,
    "gather": lambda x: x.gather(2, torch.zeros_like(x, dtype=torch.long)) + x,
    "torn": torn,
    "written": written,
    "instance_norm": F.instance_norm,
    "group_norm": lambda x: F.group_norm(x, 2),
    "layer_norm over the grid": lambda x: F.layer_norm(x, x.shape[2:]),
    "unfold": lambda x: x.unfold(2, 5, 1).mean(-1),
    "F.unfold": lambda x: F.unfold(x, 3, padding=1).view(x.shape[0], -1, *x.shape[2:]),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "smaller": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3])),
    "conv2d": lambda x: F.conv2d(x, KERNEL.to(x.device).repeat(x.shape[1], 1, 1, 1), padding=1, groups=x.shape[1]),
    "softmax": lambda x: x.softmax(3),
    "cumsum": lambda x: x.cumsum(2),
    "sort": lambda x: x.sort(3).values,
    "fft": lambda x: torch.fft.fft2(x).real,
    "transposed": lambda x: x.mT * x,
    "squeezed": squeezed,
    "attended": attended,
    "columns": columns,
    "mean of columns": lambda x: x + x.mean(2, keepdim=True),
    "matrix": lambda x: torch.einsum("bchw,hv->bcvw", x, torch.ones(x.shape[2], 5, dtype=x.dtype, device=x.device)),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "in place": lambda x: x.clone().add_(x.flip(2)),
    "in place on a view": lambda x: (lambda y: (y[:, :1].add_(x.flip(2)[:, :1]), y)[1])(x.clone()),
    "by its values": lambda x: x * float(x.detach().mean()),
    "numpy": lambda x: x * torch.from_numpy(x.detach().numpy()[..., ::-1].copy()),
}  # fmt: skip
STILL = {
    "gelu": F.gelu,
    "norm of channels": lambda x: x / (1 + x.norm(dim=1, keepdim=True)),
    "tokens": lambda x: F.layer_norm(x.flatten(2).mT, (x.shape[1],)).mT.reshape(x.shape),
    "padded": lambda x: F.pad(x, (1, 1, 1, 1)),
    "cropped": lambda x: x + F.pad(x[:, :, 2:-2, 2:-2], (2, 2, 2, 2)),
    "crop": lambda x: x[:, :, 1:-1, 1:-1],
    "channels": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1).flip(1),
    "there and back": lambda x: x.permute(0, 2, 3, 1).mul(2).permute(0, 3, 1, 2),
}  # fmt: skip


class Net(nn.Module):
    """Convolutions and functions in turn; a convolution keeps or changes the number of channels as it must."""

    def __init__(self, steps: list[object]) -> None:
        super().__init__()
        self.steps, self.convs = steps, nn.ModuleList()
        x = torch.zeros(1, C, SIZE, SIZE)
        for step in steps:
            if isinstance(step, tuple):
                size, stride, dilation, grouped = step
                channels = x.shape[1]
                groups = channels if grouped else 1
                conv = nn.Conv2d(channels, channels if grouped else C, size, stride,
                                 padding=dilation * (size // 2), dilation=dilation, groups=groups)  # fmt: skip
                self.convs.append(conv)
                x = conv(x)
            else:
                x = step(x.double()).float()  # type: ignore[operator]
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        convs = iter(self.convs)
        for step in self.steps:
            x = next(convs)(x).tanh() if isinstance(step, tuple) else step(x)
        return x


def support(net: Net) -> tuple[int, ...]:
    """Extent per axis of all that the output's central position depends on, over several random inputs."""
    low, high = [SIZE, SIZE], [-1, -1]
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(1, C, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
        y = net(x)
        at = [n // 2 for n in y.shape[2:]]
        (grad,) = torch.autograd.grad(y[0, :, at[0], at[1]].sum() ** 2, x)
        for axis, where in enumerate(grad[0].abs().sum(0).nonzero(as_tuple=True)):
            low[axis], high[axis] = min(low[axis], int(where.min())), max(high[axis], int(where.max()))
    return tuple(h - lo + 1 for lo, h in zip(low, high, strict=True))


def stated(text: str) -> tuple[bool, tuple[int, ...]] | None:
    """Whether it is a bound, and the extent per axis; None where nothing is claimed."""
    if text in ("?", "any", ""):
        return None
    sizes = [SIZE] if text == "all" else [int(n) for n in text.removeprefix("<=").split("x")]
    return text.startswith("<="), tuple(sizes * 2 if len(sizes) == 1 else sizes)


def check(net: Net) -> str:
    rows = describe(net, (C, SIZE, SIZE)).rows
    field = [row.field for row in rows if row.name.startswith("convs")][-1]
    claim = stated(field)
    if claim is not None:
        bound, sizes = claim
        truth = support(net)
        for said, true in zip(sizes, truth, strict=True):
            assert true <= said, f"{field} is said, {truth} is true"
            # near the border it is cut: half of it fits on either side of the centre, or it covers what there is
            assert bound or said == true or (said > SIZE // 2 and field != "all"), f"{field} is said, {truth} is true"
    return field


CONV = (3, 1, 1, False)


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_is_a_row_or_unknown_and_the_field_behind_it_is_right(name):
    torch.manual_seed(0)
    net = Net([(1, 1, 1, False), MIXING[name], CONV])
    found = describe(net, (C, SIZE, SIZE))
    others = [row for row in found.rows if not row.name.startswith("convs")]
    assert others or found.unknown
    check(net)


@pytest.mark.parametrize("name", STILL)
def test_what_does_not_mix_is_neither(name):
    net = Net([CONV, STILL[name], CONV])
    found = describe(net, (C, SIZE, SIZE))
    assert [row.name for row in found.rows] == ["convs.0", "convs.1"] and found.unknown == ()
    assert check(net) == "5"


KNOWN = {
    "stride": "5", "difference": "7x3", "flip": "3", "focus": "6", "rearranged": "6", "pixel_unshuffle": "6",
    "index": "3", "torn": "3x4", "instance_norm": "all", "unfold": "7x3", "avg_pool": "5", "max_pool": "6",
    "squeezed": "all", "attended": "all", "columns": "24x3", "softmax": "3x24", "fft": "all",
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_fields_that_can_be_known_are(name):
    torch.manual_seed(0)
    assert check(Net([(1, 1, 1, False), MIXING[name], CONV])) == KNOWN[name]


steps = st.one_of(
    st.sampled_from([CONV, (3, 2, 1, False), (3, 1, 2, False), (1, 1, 1, False), (3, 1, 1, True), (2, 2, 1, False)]),
    st.sampled_from(sorted(MIXING | STILL)),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(names=st.lists(steps, min_size=2, max_size=5))
def test_fields_behind_any_mixture_are_equal_a_bound_or_not_stated(names):
    torch.manual_seed(0)
    try:
        net = Net([*((MIXING | STILL)[n] if isinstance(n, str) else n for n in names), CONV])
        net(torch.zeros(1, C, SIZE, SIZE, dtype=torch.float64))
    except (RuntimeError, ValueError, IndexError):
        return  # they do not fit each other
    check(net)


class TalkingHeads(nn.Module):
    """Attention that no rule knows, by sigmoids; its parts are nn.Linear, which alone are pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.mix, self.proj = 2, nn.Linear(C, 3 * C), nn.Linear(2, 2), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        scores = self.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((scores.sigmoid() @ v).transpose(1, 2).reshape(b, n, c))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Conv2d(C, C, 1), TalkingHeads(), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.attention(x.flatten(2).mT).mT.reshape(x.shape))


@pytest.mark.parametrize("ruled", [False, True])
def test_what_is_in_a_layer_that_is_unknown_as_a_whole_is_seen(ruled, monkeypatch):
    from nearfold.recognise import walk
    from nearfold.recognise.foreign import Unsaid

    def refused(module: nn.Module) -> None:
        raise Unsaid("no word for it")

    if ruled:  # a rule that gives up does not list the parts
        monkeypatch.setitem(walk.ALL_RULES, f"{TalkingHeads.__module__}.TalkingHeads", refused)
    found = describe(Whole(), (C, SIZE, SIZE))
    assert [s.name for s in found.unknown] == ["attention"]
    assert [row.field for row in found.rows] == ["all"]


def test_blocks_that_were_cut_before_may_see_more_than_themselves():
    """A map of three axes in blocks of two: somebody folded its blocks into the batch."""
    op = parse("block((2, 2)) | box | softmax")
    folded = through(begin((4, 4, 8), 2), op, (4, 4, 8), (4, 4, 8), 2)
    assert not folded.exact and not folded.wild and folded.high[0].item() == 3
    assert through(begin((1, 4, 4, 8), 3), op, (1, 4, 4, 8), (1, 4, 4, 8), 3).exact

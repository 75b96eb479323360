"""What `describe` says of the words themselves and of layers that others cut maps for: no field too small."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nearfold._torchvision import load
from nearfold.grammar import Operation, parse
from nearfold.look import mixing_matrix
from nearfold.recognise import describe
from nearfold.testing import CASES, make

SIDE = 9


def reads(layer: nn.Module, x: torch.Tensor, at: tuple[int, ...]) -> torch.Tensor:
    """Which positions (*grid) the output at a position depends on, by gradients at several inputs."""
    found = torch.zeros(x.shape[2:], dtype=torch.bool)
    for _ in range(3):
        x = torch.randn_like(x).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x)[(0, slice(None), *at)].square().sum(), x)
        found |= grad[0].abs().amax(0) > 0
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_field_of_a_word_is_never_too_small(name):
    op = parse(CASES[name])
    if op.needs_context:
        pytest.skip("it reads a second input")
    layer, x = make(op, (SIDE, SIDE))
    layer.eval()
    grid = x.shape[2:]
    net = nn.Sequential(layer)
    rows = describe(net, (x.shape[1], *grid)).rows
    assert len(rows) <= 1
    with torch.no_grad():
        out = layer(x[:1]).shape[2:]
    at = tuple(n // 2 for n in out)
    where = reads(layer, x[:1], at)
    if not where.any():
        pytest.skip("at this size the middle reads nothing")
    extents = [int(i.max() - i.min()) + 1 for i in where.nonzero(as_tuple=True)]
    if not rows:  # said to read one position
        assert extents == [1] * len(extents)
        return
    text = rows[0].field
    if text in ("?", "any", ""):
        return
    sizes = list(grid) if text == "all" else [int(n) for n in text.removeprefix("<=").split("x")]
    sizes = sizes * len(extents) if len(sizes) == 1 else sizes
    assert all(true <= said for true, said in zip(extents, sizes, strict=True)), (extents, text)


def timm_module(name: str):
    try:
        return load(name)
    except ModuleNotFoundError:
        pytest.skip("timm is not installed")


@pytest.mark.parametrize("kind", ["block", "grid"])
@pytest.mark.parametrize("rel_pos", ["bias", "bias_tf", "mlp", "none"])
@pytest.mark.parametrize("last", [False, True], ids=["maps", "channels last"])
def test_maxvits_attention_reads_where_its_words_say(kind, rel_pos, last):
    maxxvit = timm_module("timm.models.maxxvit")
    cfg = maxxvit.MaxxVitTransformerCfg(
        dim_head=4, window_size=(4, 4), grid_size=(4, 4), rel_pos_type=rel_pos, norm_layer_cl="layernorm"
    )
    made = maxxvit.PartitionAttentionCl if last else maxxvit.PartitionAttention2d
    module = made(8, partition_type=kind, cfg=cfg).double().eval()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner(x.movedim(1, -1)).movedim(-1, 1) if last else self.inner(x)

    net = Net().eval()
    (row,) = [row for row in describe(net.float(), (8, 12, 8)).rows if "attn" in row.name]
    bias = "" if rel_pos == "none" else ", scaled(bias=table)"
    spread = ", spread" if kind == "grid" else ""
    assert str(row.operation) == f"block(4{bias}{spread}) | box | softmax(heads=2)"
    net.double()
    operation = row.operation
    assert isinstance(operation, Operation)
    from nearfold.nn import Mixer

    ours = Mixer(operation, 8, 8).double()
    x = torch.randn(1, 8, 12, 8, dtype=torch.float64)
    matrix = mixing_matrix(ours, x)[0].abs().sum(0)  # of both heads
    for at in ((0, 0), (5, 3), (11, 7)):
        theirs = reads(net, x, at).flatten()
        assert torch.equal(theirs, matrix[at[0] * 8 + at[1]].abs() > 0)


def test_xcits_attention_mixes_channels_by_all_positions():
    xcit = timm_module("timm.models.xcit")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = xcit.XCA(8, num_heads=2)

        def forward(self, x):
            return self.attn(x.flatten(2).mT).mT.reshape(x.shape)

    net = Net().eval()
    (row,) = describe(net, (8, 5, 6)).rows
    assert str(row.operation) == "window(1) | box | cross_covariance(2)" and row.field == "all"
    assert reads(net, torch.randn(1, 8, 5, 6), (2, 2)).all()

"""Tokens in front of a map: against attention under a mask, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.formulas import agree, close, mask_of, masked_attention, scrambled

from nearfold import parse
from nearfold.nn import Mixer, SelfAttention, TokenGridAttention
from nearfold.study.measure import peak_bytes

pytestmark = pytest.mark.usefixtures("float64")


def whole_mask(tokens, grid, reads):
    """Tokens read everything, and everything reads them; a position of the map what ``reads`` says."""
    N = tokens + math.prod(grid)
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[tokens:, tokens:] = mask_of(grid, reads)
    return mask


def near(reach, dilation=1):
    return lambda i, j: all(
        abs(a - b) <= reach * dilation and (a - b) % dilation == 0 for a, b in zip(i, j, strict=True)
    )


@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("grid", [(5, 4), (1, 1), (2, 7)])
@pytest.mark.parametrize(
    ("path", "reads"),
    [
        ("window(3)", near(1)),
        ("window(3, dilation=2)", near(1, 2)),
        ("block((2, 3))", lambda i, j: i[0] // 2 == j[0] // 2 and i[1] // 3 == j[1] // 3),
        ("axial(0)", lambda i, j: i[1] == j[1]),
    ],
)
def test_it_is_attention_under_a_mask(tokens, grid, path, reads):
    text = f"beside({tokens}, ({grid[0]}, {grid[1]}), {path}) | box | softmax(heads=2)"
    layer = scrambled(Mixer(text, 6, ndim=1))
    x = torch.randn(2, 6, tokens + math.prod(grid), requires_grad=True)
    mask = whole_mask(tokens, grid, reads)
    agree(layer, x, lambda x: masked_attention(layer, x, mask))


def test_a_map_of_one_axis_and_of_three():
    for grid, text in (((9,), "9"), ((2, 3, 2), "(2, 3, 2)")):
        layer = scrambled(Mixer(f"beside(2, {text}, window(3)) | box | softmax(heads=2)", 4, ndim=1))
        x, mask = torch.randn(2, 4, 2 + math.prod(grid), requires_grad=True), whole_mask(2, grid, near(1))
        agree(layer, x, lambda x, layer=layer, mask=mask: masked_attention(layer, x, mask))


def test_the_layer_takes_any_map():
    layer = scrambled(TokenGridAttention(8, 2, 3, tokens=3, grid=(4, 5)))
    whole = SelfAttention(8, 2)
    whole.load_state_dict(layer.state_dict())
    for grid in ((4, 5), (6, 2), (1, 1)):
        x = torch.randn(2, 3 + math.prod(grid), 8, requires_grad=True)
        mask = whole_mask(3, grid, near(1))
        named = {} if grid == (4, 5) else {"grid": grid}
        for layer.backend in ("auto", "oracle"):
            y, truth = layer(x, **named), whole(x, mask=mask[None, None])
            close(y, truth)
            probe = torch.randn_like(y)
            for one, other in zip(*(torch.autograd.grad((t * probe).sum(), x) for t in (y, truth)), strict=True):
                close(one, other)


def test_a_window_as_large_as_the_map_is_attention_to_everything():
    layer = scrambled(TokenGridAttention(8, 2, 9, tokens=2, grid=(3, 4)))
    whole = SelfAttention(8, 2)
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(2, 14, 8)
    close(layer(x), whole(x))


def test_a_mask_takes_positions_of_the_map_and_tokens_out():
    layer = scrambled(TokenGridAttention(4, 2, 3, tokens=2, grid=(3, 3)))
    whole = SelfAttention(4, 2)
    whole.load_state_dict(layer.state_dict())
    x, keep = torch.randn(2, 11, 4), torch.rand(2, 11) < 0.7
    keep[:, 0] = True
    spoilt = x.masked_fill(~keep[..., None], math.nan)
    truth = whole(x, mask=(whole_mask(2, (3, 3), near(1)) & keep[:, None])[:, None])
    for layer.backend in ("auto", "oracle"):
        for y in (layer(spoilt, keep), layer(spoilt, keep, grid=(3, 3))):
            close(y[keep], truth[keep])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("beside(2, (3, 3), nearest(3, scaled)) | box | softmax", "a window, block or axial path"),
        ("beside(2, (3, 3), window(3, stride=2)) | box | softmax", "a window, block or axial path"),
        ("beside(2, (3, 3), window(3, scaled(rotary))) | box | softmax", "a window, block or axial path"),
        ("beside(-1, (3, 3), window(3)) | box | softmax", "must be an integer >= 0"),
        ("beside(1, (3, 0), window(3)) | box | softmax", "grid must be"),
        ("beside(1, (3, 3), window(3)) | box | mean", "goes with weight softmax"),
    ],
)
def test_what_cannot_be_says_so(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)


def test_another_number_of_positions_says_so():
    layer = TokenGridAttention(4, 2, 3, tokens=2, grid=(3, 3))
    for call in (lambda: layer(torch.randn(1, 12, 4)), lambda: layer(torch.randn(1, 11, 4), grid=(3, 4))):
        with pytest.raises(ValueError, match=r"2 tokens and a map of \(3, .\) are 1. positions, got 1."):
            call()
    with pytest.raises(ValueError, match="has 3 entries"):
        Mixer("beside(1, (3, 3), window((3, 3, 3))) | box | softmax", 4, ndim=1)(torch.randn(1, 4, 10))
    with pytest.raises(ValueError, match="a mask of pairs goes with"):
        layer(torch.randn(1, 11, 4), torch.ones(1, 1, 11, 11).bool())


def test_memory_is_that_of_windows():
    """A matrix of all pairs of 9,220 positions would take 340 MB for a head."""
    layer = TokenGridAttention(16, 1, 7, tokens=4, grid=(96, 96)).float()
    x = torch.randn(1, 4 + 96 * 96, 16, dtype=torch.float32, requires_grad=True)
    assert peak_bytes(lambda: layer(x).sum().backward(), x.device) < 60 << 20

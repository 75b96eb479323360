"""Attention to every position: torch's own function, to the bit, and differentiable twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck

from nearfold.kernels.attention import attention
from nearfold.nn import Mixer

MASKS = {"none": None, "causal": None, "boolean": torch.bool, "numbers": torch.float32}


def operands(mask: str, dtype: torch.dtype = torch.float32):
    """Query, key, value, a mask that leaves one query nothing, and whether it is causal."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, n, 4, dtype=dtype, requires_grad=True) for n in (6, 7, 7)]
    given = None
    if MASKS[mask] is not None:
        given = torch.rand(6, 7) > 0.4
        given[2] = False
        given[3] = True
    if mask == "numbers":
        given = torch.randn(6, 7, dtype=dtype).masked_fill(~given, float("-inf"))
    return (*tensors, given, mask == "causal")


def torchs(query, key, value, mask, causal):
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)


def kept(work, given, autocast):
    """The distinct memory that the backward pass keeps: addresses and bytes; and the result."""
    found, alive = {}, []

    def pack(t):
        alive.append(t)
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=autocast):
        y = work(*given)
    return y, sorted(found.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_first_derivatives_are_torchs_and_keep_no_more_memory(mask, autocast):
    given = operands(mask)
    (mine, held), (true, truly) = kept(attention, given, autocast), kept(torchs, given, autocast)
    assert torch.equal(mine, true) and mine.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert held == truly
    upstream = torch.randn_like(true)
    for found, truth in zip(
        torch.autograd.grad(mine, given[:3], upstream), torch.autograd.grad(true, given[:3], upstream), strict=True
    ):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("mask", MASKS)
def test_second_derivatives(mask):
    *tensors, given, causal = operands(mask, torch.float64)
    assert gradgradcheck(lambda *t: attention(*t, given, causal), tensors, fast_mode=True)
    same = tensors[1]
    assert gradgradcheck(lambda t: attention(t, t, t, scale=0.3), (same,), fast_mode=True)


def test_a_mask_has_second_derivatives_too():
    *tensors, mask, _ = operands("numbers", torch.float64)
    mask = mask.nan_to_num(neginf=-1.0).requires_grad_()
    assert gradgradcheck(attention, (*tensors, mask), fast_mode=True)


def test_second_derivatives_in_bfloat16():
    """As exact as first ones there: the formula is computed in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        given = [t.detach().to(dtype).requires_grad_() for t in operands("none")[:3]]
        slopes = torch.autograd.grad(attention(*given).float().square().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(s.float().square().sum() for s in slopes), given)
        if dtype == torch.float32:
            truth = second
    for found, true in zip(second, truth, strict=True):
        assert found.dtype == torch.bfloat16 and (found - true).norm() < 0.03 * true.norm()


def test_compilers_and_exporters_see_torchs_function():
    layer, x, seen = Mixer("all | row | softmax(heads=2)", 4), torch.randn(1, 4, 3, 4), []

    def backend(graph, _):
        seen.extend(n.target for n in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert F.scaled_dot_product_attention in seen
    program = torch.export.export(layer, (x,))
    assert torch.ops.aten.scaled_dot_product_attention.default in [n.target for n in program.graph.nodes]

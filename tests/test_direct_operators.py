"""Operators called directly and through torch's dispatcher: one result, and whoever watches sees them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.cells import slow_but
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nearfold import nn
from nearfold.kernels.aggregate import aggregate
from nearfold.kernels.grouped_conv import grouped_conv
from nearfold.kernels.long_conv import long_conv
from nearfold.kernels.operator import unwatched
from nearfold.kernels.select import select

AT = torch.arange(7)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def calls():
    """Name -> (operator, arguments): plain tensors, none, lists, defaults left out."""
    torch.manual_seed(0)
    q, k, v, w = numbers(2, 3, 7, 4), numbers(2, 3, 7, 4), numbers(2, 7, 6), numbers(5, 6, 3)
    index = torch.randint(7, (2, 7, 3, 1))
    maps, kernel = [numbers(2, 2, 3, 5, 6), numbers(2, 2, 4, 5, 6)], numbers(2, 3, 7, 3, 3)
    return {
        "select": (select, (q, k, 3, "euclidean", False, AT, AT, [7], [0, -1, 1], False, 0.0)),
        "aggregate": (aggregate, (v, index, None, w, 1)),
        "no gradient": (aggregate, (v.detach(), index, None, w.detach(), 1)),
        "long_conv": (long_conv, (numbers(2, 4, 5), numbers(4, 1, 7), 4)),
        "grouped_conv": (grouped_conv, (maps, kernel, [2, 1], [1, 1], [1, 1], [3, 6], True)),
    }


def leaves(args):
    opened = [one for a in args for one in (a if isinstance(a, list) else [a])]
    return [a for a in opened if isinstance(a, Tensor) and a.requires_grad]


def results(call, args):
    """The output, and every gradient of a sum of its squares, twice."""
    made = call(*args)
    y = made[0] if isinstance(made, tuple) else made
    if not leaves(args):
        return [y]
    first = torch.autograd.grad(y.square().sum(), leaves(args), create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in first), leaves(args))
    return [y, *first, *again]


@pytest.mark.parametrize("name", calls())
def test_a_direct_call_is_the_registered_one_to_the_bit(name):
    made, args = calls()[name]
    assert unwatched([one for a in args for one in (a if isinstance(a, list) else [a])])
    for direct, registered in zip(results(made, args), results(made.registered, args), strict=True):
        assert torch.equal(direct, registered)
        assert direct.requires_grad == registered.requires_grad


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", [True, False])
def test_who_watches_sees_the_operator(gradient):
    layer, x = nn.ConvNN2d(4, 4, k=3), torch.randn(1, 4, 5, 5)
    with torch.set_grad_enabled(gradient):
        with Seen() as seen:
            layer(x)
        assert {"nearfold.select.default", "nearfold.aggregate.default"} <= set(seen.names)
        with FlopCounterMode(display=False) as counted:
            layer(x)
        assert counted.get_total_flops() > 0
        with profile() as profiled:
            layer(x)
        assert {"nearfold::select", "nearfold::aggregate"} <= {e.name for e in profiled.events()}
        graph = make_fx(lambda given: layer(given))(x).graph
        assert any("nearfold" in str(node.target) for node in graph.nodes)


def test_tensors_that_are_more_than_their_numbers_take_the_dispatcher():
    made, (v, index, alpha, w, groups) = calls()["no gradient"]
    expected = made(v, index, alpha, w, groups)
    turned = torch._neg_view(-v)
    assert turned.is_neg() and not unwatched([turned])
    assert torch.equal(made(turned, index, alpha, w, groups), expected)
    on_meta = made(*(a.to("meta") if isinstance(a, Tensor) else a for a in (v, index, alpha, w, groups)))
    assert on_meta.is_meta and on_meta.shape == expected.shape
    each = torch.vmap(lambda one: made(one[None], index[:1], None, w, 1)[0])(v)
    assert torch.allclose(each[0], expected[0])
    with torch.inference_mode():
        assert torch.equal(made(v, index, alpha, w, groups), expected)
        assert unwatched([v])


def test_the_result_can_be_changed_in_place():
    made, args = calls()["aggregate"]
    y = made(*args)
    y.add_(1)
    y.sum().backward()
    assert args[0].grad is not None and args[3].grad is not None


@pytest.mark.parametrize(
    "layer", slow_but(("ConvNN2d(8, 8)",), ("ConvNN2d(8, 8)", "ACmix2d(8, 8)", "DeformConv2d(8, 8)"))
)
def test_a_plain_call_does_not_bring_in_the_compiler(layer):
    """torch._dynamo takes more than a second and 77 MiB."""
    code = f"""
import sys, torch
from nearfold.nn import *
{layer}(torch.randn(1, 8, 6, 6)).sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)

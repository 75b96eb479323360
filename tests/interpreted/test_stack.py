"""What lies around the kernels: the search that is chosen, and what torch.compile is told about their results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nearfold.kernels import cuda
from nearfold.kernels.triton import two_pass
from nearfold.nn import Mixer
from nearfold.nn.functional import knn_attention


@pytest.fixture
def calls(monkeypatch):
    """How often the search in two passes was called."""
    calls = []
    real = two_pass.select
    monkeypatch.setattr(two_pass, "select", lambda *given: calls.append(1) or real(*given))
    return calls


def attend(inputs, k):
    with cuda.interpreted(), torch.no_grad():
        return knn_attention(*inputs, k)


def both_ways(monkeypatch, work):
    found = []
    for how in ("threshold", ""):
        monkeypatch.setenv("NEARFOLD_SELECT", how)
        found.append(work())
    return found


@pytest.mark.parametrize("keys", ["random", "ties", "the best in one class"])
def test_both_searches_give_the_same_attention(keys, monkeypatch, calls):
    query, key, value = (torch.randn(1, 2, n, 16) for n in (20, 1100, 1100))
    if keys == "ties":
        query, key = query.round(), key.sign()
    if keys == "the best in one class":  # which is noticed of every query
        tile = torch.arange(5)
        query, key[:, :, tile * 64 + (7 + 45 * tile) % 64] = query.abs(), 3 + torch.rand(5, 1)
    inputs = [x.bfloat16() for x in (query, key, value)]
    one, other = both_ways(monkeypatch, lambda: attend(inputs, 9))
    assert len(calls) == 1 and one.abs().max() > 0
    if keys == "ties":  # their scores are exact
        assert torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("metric", ["dot", "cosine", "euclidean"])
def test_a_layer_is_the_oracles_by_either_search(metric, monkeypatch, calls):
    layer = Mixer(f"nearest(5, {metric}, self, stride=8) | ranked | kernel", 4).half()
    x = torch.randn(1, 4, 33, 32).half()
    layer.backend = "oracle"
    truth = layer(x)
    layer.backend = "auto"
    with cuda.interpreted(), torch.no_grad():
        one, other = both_ways(monkeypatch, lambda: layer(x))
    assert len(calls) == 1 and torch.equal(one, other)
    assert (other - truth).abs().max() <= 4e-3 * max(truth.abs().max().item(), 1)


@pytest.mark.parametrize(("keys", "k"), [(300, 50), (200, 9)])
def test_what_two_passes_do_not_serve_is_searched_by_threshold(keys, k, monkeypatch, calls):
    inputs = [torch.randn(1, 1, n, 4) for n in (3, keys, keys)]
    one, other = both_ways(monkeypatch, lambda: attend(inputs, k))
    assert not calls and torch.equal(one, other)


def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv("NEARFOLD_SELECT", "bin")
    with pytest.raises(ValueError, match=r"NEARFOLD_SELECT='bin' is none of two_pass, threshold"):
        attend(torch.randn(3, 1, 1, 5, 4).unbind(), 2)


class AsTold(TorchDispatchMode):
    """Every result of our operators has the shape, strides and dtype that their fakes tell torch.compile."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.namespace == "nearfold":
            self.seen.add(func.name().partition("::")[2])
            with FakeTensorMode() as mode:
                told = func(*tree_map_only(Tensor, mode.from_tensor, args), **(kwargs or {}))
            for real, fake in zip(tree_leaves(found), tree_leaves(told), strict=True):
                assert real.dtype == fake.dtype and real.shape == fake.shape, func
                assert real.numel() == 0 or real.stride() == fake.stride(), (func, real.stride(), fake.stride())
        return found


# an operation, and the operators it must go through
OPERATORS = {
    "nearest(3, euclidean) | ranked | kernel(groups=2)": {"select", "aggregate", "aggregate_backward"},
    "nearest(3, scaled) | ranked | softmax(heads=2)*depthwise": {"select", "select_backward", "aggregate_backward"},
    "window(3, mode=reflect) | box | softmax(heads=2)": {"local_attention", "local_attention_backward"},
    "scan(state=3) | causal | selective": {"selective_scan", "selective_scan_backward"},
    "deformable(3) | box | modulated*kernel": {"corners", "corners_backward", "aggregate"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", OPERATORS)
def test_results_are_laid_out_as_told(text, dtype):
    layer, x = Mixer(text, 4).to(dtype), torch.randn(2, 4, 3, 4).to(dtype).requires_grad_()
    with cuda.interpreted(), AsTold() as told:
        layer(x).float().square().sum().backward()
    assert told.seen >= OPERATORS[text]

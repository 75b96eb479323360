"""The compiled engine gives the same bits on any number of threads, and to several threads at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.engine_draws import bits, every_set

from nearfold.kernels import engine
from nearfold.kernels.aggregate import aggregate, aggregate_backward
from nearfold.kernels.select import select, select_backward
from nearfold.kernels.weigh import slot_softmax, slot_softmax_backward
from nearfold.nn import ACmix2d, BranchingConv2d, ConvNN2d, ConvNNAttention, KVTAttention
from nearfold.nn.functional import knn_attention


def _all_operators(dtype):
    """Results of every operator, forward and backward, at sizes that many threads share."""
    torch.manual_seed(0)
    found = []
    at = torch.arange(600)
    for metric, heads, e in [("dot", 3, 17), ("euclidean", 1, 33), ("chebyshev", 2, 5)]:
        query, key = torch.randn(1, heads, 600, e, dtype=dtype), torch.randn(1, heads, 600, e, dtype=dtype)
        for rule, grid in [([0, -1, 1], [600]), ([1, -1, 1], [600]), ([0, 3, 1], [20, 30])]:
            found += select(query, key, 9, metric, False, at, at, grid, rule, True, 0.5)
            if metric != "chebyshev":
                found += select_backward(found[-2].nan_to_num(0, 0, 0), query, key, found[-1], metric, False)
    # where many keys are near one another, and where they are not
    many = torch.arange(1100)
    key = torch.randn(1, 1, 1100, 40, dtype=dtype)
    key[:, :, ::2] = key[:, :, :1] + 1e-6 * key[:, :, ::2]
    query = key[:, :, torch.randperm(1100)]
    for metric in ("dot", "euclidean"):
        found += select(query, key, 9, metric, False, many, many, [1100], [0, -1, 1], False, 0.0)
    index = torch.randint(-1, 300, (2, 500, 5, 4))
    value = torch.randn(2, 300, 36, dtype=dtype)
    for alpha in (None, torch.randn(2, 500, 5, 4, dtype=dtype)):
        for weight, groups in [
            (None, 1),
            (torch.randn(36, 1, 5, dtype=dtype), 36),
            (torch.randn(66, 12, 5, dtype=dtype), 3),
        ]:
            found.append(aggregate(value, index, alpha, weight, groups))
            found += aggregate_backward(found[-1].cos(), value, index, alpha, weight, groups)
    score = torch.randn(3000, 9, dtype=dtype)
    found.append(slot_softmax(score, torch.zeros(3000, 9, dtype=torch.long), 1.0))
    found.append(slot_softmax_backward(score, found[-1], 1.0))
    return found


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits_on_any_number_of_threads(isa, dtype, threads):
    with engine.forced(isa):
        threads(1)
        truth = _all_operators(dtype)
        for count in (1, 2, 3, 7):
            threads(count)
            for i, (found, t) in enumerate(zip(_all_operators(dtype), truth, strict=True)):
                assert torch.equal(bits(found), bits(t)), f"result {i} on {count} threads"


def _layers():
    torch.manual_seed(0)
    return [
        (ConvNN2d(8, 8), torch.randn(2, 8, 9, 8)),
        (ConvNNAttention(8, 2), torch.randn(2, 50, 8)),
        (KVTAttention(8, 2, k=5), torch.randn(2, 50, 8)),
        (BranchingConv2d(8, 8), torch.randn(2, 8, 7, 6)),
        (ACmix2d(8, 8, num_heads=2), torch.randn(2, 8, 7, 6)),
    ]


def _step(layer, x):
    """Output and the gradients at input and parameters, without touching the layer's own."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)]


def _same(a, b):
    return all(s is t is None or torch.equal(bits(s), bits(t)) for s, t in zip(a, b, strict=True))


def test_layers_give_the_same_bits_on_any_number_of_threads(threads):
    layers = [pair for pair in _layers() if not isinstance(pair[0], BranchingConv2d)]  # holds a convolution of torch's
    for layer, x in layers:
        threads(1)
        truth = _step(layer, x)[0]
        for count in (2, 3):
            threads(count)
            assert torch.allclose(_step(layer, x)[0], truth, rtol=1e-5, atol=1e-6)
            again = _step(layer, x)
            assert _same(_step(layer, x), again), type(layer).__name__


def test_concurrent_calls(threads):
    """Four Python threads at once, each on two threads of its own."""
    threads(2)
    layers = _layers()
    truth = [_step(layer, x) for layer, x in layers]
    jobs = [i % len(layers) for i in range(10 * len(layers))]
    with ThreadPoolExecutor(4) as pool:
        for job, found in zip(jobs, pool.map(lambda i: _step(*layers[i]), jobs), strict=True):
            # torch itself splits its sums otherwise on a thread of Python's than on the main one
            for f, t in zip(found, truth[job], strict=True):
                assert f is t is None or torch.allclose(f, t, rtol=1e-5, atol=1e-6), type(layers[job][0]).__name__
        q = torch.randn(1, 4, 300, 16)
        serial = knn_attention(q, q, q, 9)
        for y in pool.map(lambda _: knn_attention(q, q, q, 9), range(40)):
            assert torch.equal(y, serial)

"""The engine's operators under autograd, fake tensors and low precision."""

import random

import pytest
import torch
from helpers.engine_draws import described, draw_aggregate, every_set, laid_out

from nearfold.kernels import engine
from nearfold.kernels.aggregate import aggregate, aggregate_backward
from nearfold.kernels.select import select, select_backward
from nearfold.kernels.weigh import slot_softmax


@every_set
def test_gradcheck(isa):
    torch.manual_seed(0)
    at = torch.arange(11)

    def wide(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    with engine.forced(isa):
        q, k = wide(1, 2, 5, 3), wide(1, 2, 11, 3)
        for metric, squared, again in [
            ("dot", False, -1.0),
            ("euclidean", False, 0.0),
            ("euclidean", True, float("-inf")),
        ]:

            def scores(q, k, metric=metric, squared=squared, again=again):
                score = select(q, k, 4, metric, squared, at[:5], at, [11], [1, -1, 1], True, again)[0]
                return score.masked_fill(score == float("-inf"), 0)

            assert torch.autograd.gradcheck(scores, (q, k), fast_mode=True)
        index = torch.randint(-1, 6, (2, 5, 3, 2))
        value, alpha = wide(2, 6, 12), wide(2, 5, 3, 2)
        for weight, groups in [(None, 1), (wide(12, 1, 3), 12), (wide(9, 4, 3), 3)]:
            for a in (None, alpha):
                assert torch.autograd.gradcheck(aggregate, (value, index, a, weight, groups), fast_mode=True)
        slots = torch.randint(-1, 2, (4, 7))
        assert torch.autograd.gradcheck(slot_softmax, (wide(4, 7), slots, 0.7), fast_mode=True)


@pytest.mark.parametrize("off", [False, True])
def test_slot_softmax_passes_opcheck(off):
    score, index = torch.randn(3, 4, 5, requires_grad=True), torch.randint(-1, 4, (3, 4, 5))
    with engine.forced(engine.OFF if off else engine.names()[0]):
        torch.library.opcheck(slot_softmax.registered, (score, index, 0.5))
        turned = torch.randn(4, 3, 5).transpose(0, 1).requires_grad_()
        torch.library.opcheck(slot_softmax.registered, (turned, index, -1.0))


@pytest.mark.parametrize("off", [False, True])
def test_fakes_have_the_strides_of_results(off):
    """Compiled code trusts them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rng = random.Random(0)
    for kind in ("dense", "depthwise", "none") * 10:
        args = draw_aggregate(rng, kind)
        at = torch.arange(args[0].shape[1])
        q = laid_out(rng, torch.randn(1, 2, len(at), 5))
        grad = torch.randn(*args[0].shape[:1], args[1].shape[1], args[0].shape[2] if args[3] is None else len(args[3]))
        calls = [
            (aggregate, args),
            (aggregate_backward, (grad.to(args[0].dtype), *args)),
            (select, (q, q, 3, "dot", False, at, at, [len(at)], [0, -1, 1], False, 0.0)),
            (
                select_backward,
                (torch.randn(1, 2, len(at), 1), q, q, torch.zeros(1, 2, len(at), 1).long(), "dot", False),
            ),
        ]
        for op, operands in calls:
            with engine.forced(engine.OFF if off else engine.names()[0]):
                real = op(*operands)
            with FakeTensorMode() as mode:
                fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in operands))
            for f, r in zip([fake] if op is aggregate else fake, [real] if op is aggregate else real, strict=True):
                assert f.shape == r.shape and f.dtype == r.dtype
                assert f.numel() == 0 or f.stride() == r.stride(), (op, f.stride(), r.stride(), described(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recall", [1.0, 0.9])
def test_low_precision_rows_have_float32_scores(dtype, recall):
    query, key = torch.randn(1, 2, 33, 12).to(dtype), torch.randn(1, 2, 41, 12).to(dtype)
    at = (torch.arange(33), torch.arange(41))

    def run(q, k):
        q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
        score, index = torch.ops.nearfold.select(q, k, 5, "dot", False, *at, [41], [0, -1, 1], False, 0.0, recall)
        (score * torch.arange(5)).sum().backward()
        return score.detach(), index, q.grad, k.grad

    low, wide = run(query, key), run(query.float(), key.float())
    assert low[0].dtype == torch.float32
    assert torch.equal(low[0], wide[0]) and torch.equal(low[1], wide[1])
    for mine, truth in zip(low[2:], wide[2:], strict=True):
        assert mine.dtype == dtype and torch.equal(mine, truth.to(dtype))

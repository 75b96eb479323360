"""Several entries of a slot, and scores of chosen keys: every instruction set and PyTorch path equal plain formulas.

The truth is gathered whole in float64, its gradients are autograd's.
"""

import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nearfold.kernels import engine
from nearfold.kernels.aggregate import aggregate, aggregate_backward
from nearfold.kernels.slot_scores import slot_scores, slot_scores_backward
from nearfold.kernels.weigh import slot_softmax
from nearfold.testing import poisoned_empties

PATHS = engine.names()
SETS = [name for name in PATHS if name != engine.OFF]
every_path = pytest.mark.parametrize("isa", PATHS)
every_set = pytest.mark.parametrize("isa", SETS)

# (B, N, C, M, S, H), entries
SIZES = [
    ((1, 1, 1, 1, 1, 1), 1),
    ((2, 50, 64, 49, 9, 1), 4),
    ((1, 23, 12, 31, 3, 2), 2),
    ((3, 7, 30, 5, 2, 3), 9),
    ((2, 40, 100, 97, 4, 1), 3),
    ((1, 300, 24, 150, 5, 4), 4),
    ((2, 9, 17, 13, 1, 17), 8),
    ((5, 30, 36, 60, 2, 6), 17),
]


def gathered(value, index):
    """value[index] (B, M, S, H, d), zero where the index is negative."""
    (B, N, C), H = value.shape, index.shape[3]
    rows = value.view(B, N, H, C // H)
    at = index.clamp(min=0)
    sample, head = torch.arange(B).view(-1, 1, 1, 1), torch.arange(H)
    return rows[sample, at, head].masked_fill((index < 0)[..., None], 0)


def formula(value, index, alpha, weight, groups, entries):
    """`aggregate`, with everything held."""
    near = gathered(value, index)
    if alpha is not None:
        near = near * alpha[..., None]
    read = near.flatten(3).unflatten(2, (near.shape[2] // entries, entries)).sum(3)
    if weight is None:
        y = read.sum(2)
    else:
        kernel = weight.unflatten(0, (groups, -1))
        y = torch.einsum("bmsgc,gocs->bmgo", read.unflatten(3, (groups, -1)), kernel).flatten(2)
    if alpha is None:
        y = y.masked_fill((index == -2).flatten(2).any(-1, keepdim=True), float("nan"))
    return y


def dot_products(query, key, index):
    """`slot_scores`, with everything held."""
    return torch.einsum("bmshd,bmhd->bmsh", gathered(key, index), query.unflatten(2, (index.shape[3], -1)))


def operands(size, entries, kind, with_alpha=True, low=-1, dtype=torch.float64):
    B, N, C, M, S, H = size
    index = torch.randint(low, N, (B, M, S * entries, H))
    alpha = torch.randn(index.shape, dtype=dtype) if with_alpha else None
    groups = {"dense": 1, "depthwise": C, "none": 1}.get(kind, next(g for g in (3, 2, 5, 17, 1) if C % g == 0))
    shape = {"dense": (70, C, S), "depthwise": (C, 1, S), "none": None}.get(kind, (7 * groups, C // groups, S))
    weight = None if shape is None else torch.randn(shape, dtype=dtype)
    return torch.randn(B, N, C, dtype=dtype), index, alpha, weight, groups, entries


def slopes(op, args, grad):
    """Output and the gradients at the operands of floating point."""
    leaves = [a.detach().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    y = op(*leaves)
    return y.detach(), *torch.autograd.grad(y, [a for a in leaves if torch.is_tensor(a) and a.requires_grad], grad)


def compare(found, truth, what, tolerance=1e-12):
    for i, (f, t) in enumerate(zip(found, truth, strict=True)):
        assert f.shape == t.shape, (what, i)
        gap = (f.double() - t.double()).abs().max().item() if t.numel() else 0
        scale = max(1.0, t.double().abs().max().item()) if t.numel() else 1
        assert gap <= tolerance * scale, f"result {i} of {what}: off by {gap:.2e} at a scale of {scale:.2e}"


@every_path
@pytest.mark.parametrize("size, entries", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "grouped", "depthwise", "none"])
def test_entries(kind, size, entries, isa):
    torch.manual_seed(0)
    for with_alpha in (True, False):
        args = operands(size, entries, kind, with_alpha)
        grad = torch.randn_like(formula(*args))
        with engine.forced(isa), poisoned_empties():
            found = slopes(aggregate, args, grad)
        compare(found, slopes(formula, args, grad), f"{kind} {size} {entries} {with_alpha}")


@every_path
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_entries_in_low_precision(dtype, tolerance, isa):
    torch.manual_seed(1)
    for kind in ("dense", "grouped", "depthwise", "none"):
        args = operands((2, 60, 60, 70, 9, 2), 4, kind, dtype=dtype)
        wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        grad = torch.randn(formula(*wide).shape).to(dtype)
        with engine.forced(isa), poisoned_empties():
            found = slopes(aggregate, args, grad)
        assert all(f.dtype == dtype for f in found)
        compare(found, slopes(formula, wide, grad.double()), kind, tolerance)


@every_path
def test_entries_at_other_strides(isa):
    torch.manual_seed(2)
    for kind in ("dense", "grouped", "depthwise", "none"):
        value, index, alpha, weight, groups, entries = operands((3, 20, 24, 50, 3, 2), 4, kind)
        weight = weight if weight is None else weight.mT.contiguous().mT
        for args in [
            (value[:1].expand_as(value), index[:1, ..., :1].expand_as(index), alpha[..., :1].expand_as(alpha)),
            (
                value.mT.contiguous().mT,
                index.mT.contiguous().mT,
                alpha.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
            ),
            (
                torch.cat([value, value], 2)[..., 5:29],
                index.repeat_interleave(2, 2)[:, :, ::2],
                alpha[:, :1].expand_as(alpha),
            ),
        ]:
            args = *args, weight, groups, entries
            grad = torch.randn_like(formula(*args)).mT.contiguous().mT
            with engine.forced(isa), poisoned_empties():
                found = slopes(aggregate, args, grad)
            compare(found, slopes(formula, args, grad), kind)


@every_path
def test_one_entry_is_a_slot(isa):
    """By value the same, whether entries are said to be one or not said, or their slots have equal kernels."""
    torch.manual_seed(3)
    value, index, alpha, weight, groups, _ = operands((2, 40, 24, 30, 3, 2), 4, "grouped")
    with engine.forced(isa):
        many = aggregate(value, index, alpha, weight, groups, 4)
        one = aggregate(value, index, alpha, weight.repeat_interleave(4, 2), groups)
        assert torch.equal(one, aggregate(value, index, alpha, weight.repeat_interleave(4, 2), groups, 1))
        compare([many], [one], "kernels repeated")
        assert torch.equal(aggregate(value, index, alpha, None, 1, 4), aggregate(value, index, alpha, None, 1))


@every_path
def test_lost_queries(isa):
    """-2 reads nothing; the output is NaN where alpha does not say so itself, and only there."""
    torch.manual_seed(4)
    for kind in ("dense", "grouped", "depthwise", "none"):
        value, index, alpha, weight, groups, entries = operands((2, 20, 24, 50, 3, 2), 2, kind)
        index[:, ::3, 1::2] = -2
        args = value, index, None, weight, groups, entries
        truth = formula(*args)
        with engine.forced(isa):
            found = aggregate(*args)
        assert torch.equal(found.isnan(), truth.isnan()) and found.isnan().any()
        compare([found.nan_to_num()], [truth.nan_to_num()], kind)
        grad = torch.randn_like(truth)
        args = value, index, alpha, weight, groups, entries
        with engine.forced(isa):
            found = slopes(aggregate, args, grad)
        compare(found, slopes(formula, args, grad), kind)


def _bits(x):
    return x.contiguous().view({8: torch.int64, 4: torch.int32}[x.element_size()])


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_bits_on_any_number_of_threads(isa, dtype, threads):
    """One sample that threads share, one for each, and more than they are; all with the best instruction set."""
    for B in (1, 2, 5) if isa == SETS[0] else (2,):
        for kind in ("dense", "grouped", "depthwise", "none"):
            torch.manual_seed(5)
            args = operands((B, 150, 24, 700, 3, 2), 4, kind, dtype=dtype)
            query = torch.randn(B, 700, 24, dtype=dtype)
            truth = None
            for count in (1, 2, 3, 7):
                threads(count)
                with engine.forced(isa), poisoned_empties():
                    y = aggregate(*args)
                    found = [y, *aggregate_backward(y.cos(), *args), slot_scores(query, args[0], args[1])]
                    found += slot_scores_backward(found[-1].sin(), query, args[0], args[1])
                truth = truth or found
                assert all(torch.equal(_bits(f), _bits(t)) for f, t in zip(found, truth, strict=True)), (B, kind, count)


@every_set
def test_samples_that_are_large(isa, threads):
    """Outputs that threads share come in several rounds."""
    torch.manual_seed(6)
    args = operands((1, 90, 40, 2900, 10, 1), 2, "dense", dtype=torch.float64)
    grad = torch.randn(1, 2900, 70, dtype=torch.float64)
    truth = slopes(formula, args, grad)
    threads(2)
    with engine.forced(isa):
        compare(slopes(aggregate, args, grad), truth, "two threads")


@every_path
def test_empty_batches(isa):
    with engine.forced(isa):
        for B, M in [(0, 3), (2, 0)]:
            for kind in ("dense", "grouped", "depthwise", "none"):
                args = operands((B, 5, 12, M, 3, 2), 4, kind)
                y, *found = slopes(aggregate, args, torch.zeros(formula(*args).shape, dtype=torch.float64))
                assert y.shape[:2] == (B, M) and all(not f.any() for f in found)
            query, key = torch.randn(B, M, 12), torch.randn(B, 5, 12)
            score, *found = slopes(slot_scores, (query, key, args[1]), torch.zeros(B, M, 12, 2))
            assert score.shape == (B, M, 12, 2) and all(not f.any() for f in found)


@every_path
def test_what_does_not_fit_is_refused(isa):
    value, index, alpha, weight, groups, _ = operands((2, 9, 12, 5, 3, 2), 4, "dense")
    with engine.forced(isa):
        for entries in (5, 0, -1, 24):
            with pytest.raises(ValueError, match=rf"12 slots of index must be divisible by entries={entries}"):
                aggregate(value, index, alpha, weight, groups, entries)
        for entries in (1, 2, 12):
            with pytest.raises(
                ValueError, match=rf"weight must be .* for 12 slots of index and entries={entries}, got"
            ):
                aggregate(value, index, alpha, weight, groups, entries)
        with pytest.raises(ValueError, match="alpha must be"):
            aggregate(value, index, alpha[:, :, :3], weight, groups, 4)
        with pytest.raises(ValueError, match="weight must be"):
            aggregate_backward(torch.randn(2, 5, 70, dtype=torch.float64), value, index, alpha, weight, groups)
        query = torch.randn(2, 5, 12, dtype=torch.float64)
        for wrong, words in [
            ((query[:, :, :6], value, index), "query must be"),
            ((query.float(), value, index), "query must be"),
            ((query[0], value, index), "query must be"),
            ((query[:1], value, index), "query must be"),
            ((query, value, index[:, :4]), "index must be"),
            ((query, value, index.int()), "index must be"),
            ((query, value, index[:, :, :0]), "index must be"),
            ((query, value, index[..., :1].expand(-1, -1, -1, 5)), "divisible by heads=5"),
        ]:
            with pytest.raises(ValueError, match=words):
                slot_scores(*wrong)
        with pytest.raises(ValueError, match="grad must be"):
            slot_scores_backward(alpha[:, :, :3], query, value, index)


@every_set
def test_an_index_beyond_the_input_is_refused(isa):
    for wrong in (9, 2**32, 2**63 - 1):
        with engine.forced(isa):
            for kind in ("dense", "grouped", "depthwise", "none"):
                for with_alpha in (True, False):
                    args = operands((2, 9, 12, 5, 3, 2), 4, kind, with_alpha)
                    grad = torch.randn_like(formula(*args))
                    args[1][1, 4, 11, 1] = wrong
                    with pytest.raises(ValueError, match="beyond the input"):
                        aggregate(*args)
                    with pytest.raises(ValueError, match="beyond the input"):
                        aggregate_backward(grad, *args)
            query = torch.randn(2, 5, 12, dtype=torch.float64)
            with pytest.raises(ValueError, match="beyond the input"):
                slot_scores(query, args[0], args[1])
            with pytest.raises(ValueError, match="beyond the input"):
                slot_scores_backward(torch.randn(args[1].shape, dtype=torch.float64), query, args[0], args[1])


@every_path
@pytest.mark.parametrize("size, entries", SIZES, ids=str)
def test_slot_scores(size, entries, isa):
    torch.manual_seed(7)
    B, _, C, M, _, H = size
    key, index, grad, *_ = operands(size, entries, "none", low=-2)
    query = torch.randn(B, M, C, dtype=torch.float64)
    wide = torch.cat([query, query], 2)[..., :C]
    for args in [
        (query, key, index),
        (query.mT.contiguous().mT, key.mT.contiguous().mT, index[:1, ..., :1].expand(B, -1, -1, H)),
        (wide, key[:1].expand_as(key), index.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)),
    ]:
        with engine.forced(isa), poisoned_empties():
            found = slopes(slot_scores, args, grad)
        compare(found, slopes(dot_products, args, grad), f"{size}")
        assert not found[0][args[2] < 0].any()


@every_path
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_slot_scores_in_low_precision(dtype, tolerance, isa):
    torch.manual_seed(8)
    for heads in (1, 3, 20):
        key, index, grad, *_ = operands((2, 60, 60, 70, 19, heads), 1, "none", dtype=dtype)
        query = torch.randn(2, 70, 60).to(dtype)
        with engine.forced(isa), poisoned_empties():
            found = slopes(slot_scores, (query, key, index), grad)
        assert all(f.dtype == dtype for f in found)
        truth = slopes(dot_products, (query.double(), key.double(), index), grad.double())
        compare(found, truth, f"{heads} heads", tolerance)


@every_path
def test_attention_over_a_table(isa):
    """Scores, softmax, sum: the index is expanded over samples and heads, and never copied."""
    torch.manual_seed(9)
    B, N, C, M, S, H = 2, 30, 12, 40, 7, 3
    index = torch.randint(-1, N, (1, M, S, 1)).expand(B, -1, -1, H)
    query, key, value = (torch.randn(B, n, C, dtype=torch.float64) for n in (M, N, N))

    def attend(q, k, v):
        score = slot_scores(q, k, index).permute(0, 3, 1, 2)
        return aggregate(v, index, slot_softmax(score, index.permute(0, 3, 1, 2), 0.5).permute(0, 2, 3, 1), None, 1)

    def plain(q, k, v):
        score = (0.5 * dot_products(q, k, index)).masked_fill(index < 0, float("-inf"))
        return formula(v, index, score.softmax(2).nan_to_num(), None, 1, 1)

    grad = torch.randn(B, M, C, dtype=torch.float64)
    with engine.forced(isa), poisoned_empties():
        found = slopes(attend, (query, key, value), grad)
    compare(found, slopes(plain, (query, key, value), grad), "attention")


@every_path
def test_softmax_reads_any_index_where_it_lies(isa):
    torch.manual_seed(10)
    score = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    table = torch.randint(-1, 4, (5, 7))
    for index in [
        table.expand(3, 4, 5, 7),
        table[:1].expand(3, 4, 5, 7),
        table[:, :1].expand(3, 4, 5, 7),
        torch.randint(-1, 4, (7, 5, 4, 3)).permute(3, 2, 1, 0),
        torch.randint(-1, 4, (4, 3, 5, 14)).transpose(0, 1)[..., ::2],
    ]:
        with engine.forced(isa), poisoned_empties():
            found = slot_softmax(score, index, 0.7)
        masked = (0.7 * score).masked_fill(index < 0, float("-inf"))
        compare([found], [masked.softmax(-1).nan_to_num()], f"{index.stride()}")
        many = [1] * 6
        with engine.forced(isa):
            again = slot_softmax(score.view(*many, *score.shape), index.reshape(*many, *index.shape), 0.7)
        assert torch.equal(again.view_as(found), found)


@every_path
def test_gradcheck(isa):
    torch.manual_seed(11)
    with engine.forced(isa):
        for kind in ("dense", "grouped", "depthwise", "none"):
            for with_alpha in (True, False):
                args = operands((2, 6, 12, 5, 2, 2), 3, kind, with_alpha)
                leaves = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
                assert torch.autograd.gradcheck(aggregate, leaves, fast_mode=True)
        query = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(slot_scores, (query, leaves[0], leaves[1]), fast_mode=True)


@pytest.mark.parametrize("off", [False, True])
def test_opcheck(off):
    with engine.forced(engine.OFF if off else PATHS[0]):
        for kind, with_alpha in (("dense", True), ("grouped", False), ("depthwise", True), ("none", False)):
            args = operands((2, 6, 12, 5, 2, 2), 3, kind, with_alpha, dtype=torch.float32)
            leaves = [a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
            torch.library.opcheck(aggregate.registered, leaves)
        for dtype in (torch.float32, torch.bfloat16):
            query, key = torch.randn(2, 5, 12).to(dtype), torch.randn(2, 6, 12).to(dtype)
            for index in (args[1], args[1][:1, ..., :1].expand_as(args[1])):
                torch.library.opcheck(slot_scores.registered, (query.requires_grad_(), key.requires_grad_(), index))
                grad = torch.randn(index.shape).to(dtype)
                torch.library.opcheck(slot_scores_backward.registered, (grad, query.detach(), key.detach(), index))


def test_flops():
    """A product per slot, and 2 C for every entry that is added to it."""
    for kind, product in [("dense", 70 * 24), ("grouped", 7 * 24), ("depthwise", 24)]:
        args = operands((2, 9, 24, 5, 3, 2), 4, kind)
        with FlopCounterMode(display=False) as counter:
            aggregate(*args)
        assert counter.get_total_flops() == 2 * 5 * 2 * (3 * product + 12 * 24)
    query, index = torch.randn(2, 5, 24, dtype=torch.float64), args[1]
    with FlopCounterMode(display=False) as counter:
        slot_scores(query, args[0], index)
    assert counter.get_total_flops() == 2 * 5 * 12 * 24 * 2


@every_set
def test_random_calls(isa):
    """Heads and groups that cut across one another, any strides, against the PyTorch path."""
    rng = random.Random(12)
    torch.manual_seed(12)
    for case in range(40):
        C = rng.choice([1, 2, 4, 6, 12, 17, 20, 36, 60, 100])
        divisors = [n for n in range(1, C + 1) if C % n == 0]
        H, G, entries = rng.choice(divisors), rng.choice(divisors), rng.randint(1, 10)
        B, N, M, S = rng.randint(1, 4), rng.randint(1, 70), rng.randint(1, 140), rng.randint(1, 6)
        dtype = rng.choice([torch.float32, torch.float64])
        value, index, alpha, *_ = operands((B, N, C, M, S, H), entries, "none", rng.random() < 0.7, -2, dtype)
        weight = torch.randn(G * rng.randint(1, 300 // G), C // G, S, dtype=dtype)
        if rng.random() < 0.3:
            index = index[:1, ..., :1].expand_as(index)
        args = value, index, alpha, weight, G, entries
        grad = torch.randn(B, M, len(weight), dtype=dtype)
        found = []
        for name in (isa, engine.OFF):
            with engine.forced(name), poisoned_empties():
                found.append([aggregate(*args).nan_to_num(), *aggregate_backward(grad, *args)])
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        compare(*found, f"case {case}: {(B, N, C, M, S, H, G, entries)}", tolerance)

"""The counting sort of chosen slots against a stable sort."""

from __future__ import annotations

import pytest
import torch

from nearfold.kernels.triton.by_key import add_up_blocks, by_key, in_blocks


def check(index, keys, slots=1, **blocks):
    """An index (B, M, S E, H), or (P, T)."""
    index = index if index.dim() == 4 else index[:, :, None, None]
    order, bounds = by_key(index, keys, slots, **blocks)
    B, _, SE, H = index.shape
    problem = torch.arange(B)[:, None, None, None] * H + torch.arange(H)
    problem = problem * slots + (torch.arange(SE) // (SE // slots))[:, None]
    names = B * H * slots * keys
    name = torch.where((index >= 0) & (index < keys), index + problem * keys, names).flatten()
    expected = name.sort(stable=True)
    assert torch.equal(bounds, torch.searchsorted(expected.values, torch.arange(names + 1)))
    assert order.dtype == torch.int32
    assert torch.equal(order[: bounds[-1]].long(), expected.indices[: bounds[-1]])


@pytest.mark.parametrize("width", [2, 64])
@pytest.mark.parametrize(("slots", "entries"), [(1, 5), (3, 2)])
def test_an_index_of_slots_and_heads_with_any_strides(slots, entries, width):
    index = torch.randint(-2, 9, (2, 3, 11, slots * entries)).permute(0, 2, 3, 1)  # 7 and 8 are beyond the keys
    check(index, 7, slots, width=width, block=16)
    check(index[:1].expand(3, -1, -1, -1), 7, slots, width=width, block=16)


@pytest.mark.parametrize("width", [2, 16, None])
@pytest.mark.parametrize(("P", "T", "R"), [(3, 70, 11), (1, 200, 3), (2, 5, 40), (2, 128, 1)])
def test_a_stable_sort(P, T, R, width):
    """Of 16 slots at a time; keys with more than ``width`` slots are put in order by walking."""
    check(torch.randint(0, R, (P, T)), R, width=width, block=16)


def test_a_key_that_all_have_chosen_and_slots_that_have_chosen_none():
    index = torch.randint(-2, 20, (2, 90))
    index[:, ::2] = 7
    check(index, 20, width=4, block=16)
    check(torch.full((2, 30), -1), 5, width=4, block=16)


def test_slots_that_came_in_any_order_are_put_in_order(monkeypatch):
    """On a device the atomic additions of one key come in any order: the kernel that orders is given them shuffled."""
    from nearfold.kernels.triton import by_key as module

    class Shuffled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(index, bounds, order, *rest, **flags):
                for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                    order[start:stop] = order[start:stop][torch.randperm(stop - start)]
                self.kernel[grid](index, bounds, order, *rest, **flags)

            return launch

    monkeypatch.setattr(module, "_order_kernel", Shuffled(module._order_kernel))
    for width in (4, 64):
        check(torch.randint(0, 6, (2, 90)), 6, width=width, block=16)


def test_numbers_of_more_than_32_bits(monkeypatch):
    from nearfold.kernels.triton import by_key as module

    index = torch.randint(0, 7, (2, 40, 1, 1))
    narrow = by_key(index, 7, width=4)
    monkeypatch.setattr(module, "LIMIT", 10)
    wide = by_key(index, 7, width=4)
    assert wide[0].dtype == torch.int64 and torch.equal(wide[0], narrow[0].long()) and torch.equal(wide[1], narrow[1])


def test_nothing_to_sort():
    order, bounds = by_key(torch.zeros(2, 0, 1, 1, dtype=torch.long), 3)
    assert order.numel() == 0 and bounds.tolist() == [0] * 7


@pytest.mark.parametrize("counts", [[0, 3, 4, 0, 200, 9, 1], [5, 0, 0], [1, 2, 3], [0, 0], [8]], ids=str)
def test_whole_blocks_of_a_key_are_added_up(counts):
    """Of 4 entries, in rows of 70 columns, which no tile divides; 3 entries have chosen none."""
    bounds = torch.tensor([0, *counts]).cumsum(0)
    firsts, owner = in_blocks(bounds, 4, sum(counts) + 3)
    whole = [count // 4 for count in counts]
    assert firsts.tolist() == torch.tensor([0, *whole]).cumsum(0).tolist()
    expected = [name for name, many in enumerate(whole) for _ in range(many)]
    assert len(owner) == (sum(counts) + 3) // 4 and owner[: len(expected)].tolist() == expected
    assert ((owner >= 0) & (owner < len(counts))).all()
    partial = torch.randn(len(owner), 70)
    made = partial.clone()
    if len(owner):
        add_up_blocks(made, firsts, owner)
    for name, many in enumerate(whole):
        mine = slice(firsts[name], firsts[name] + many)
        if many:
            torch.testing.assert_close(made[mine][0], partial[mine].sum(0), rtol=1e-5, atol=1e-5)
            assert torch.equal(made[mine][1:], partial[mine][1:])
    assert torch.equal(made[sum(whole) :], partial[sum(whole) :])

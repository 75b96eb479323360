"""The counting sort of chosen slots against a stable sort."""

from __future__ import annotations

import pytest
import torch

from nearfold.kernels.triton.by_key import by_key


def check(index, keys, **blocks):
    order, bounds = by_key(index, keys, **blocks)
    P, T = index.shape
    name = torch.where(index >= 0, index + torch.arange(P)[:, None] * keys, P * keys).flatten()
    expected = name.sort(stable=True)
    assert torch.equal(bounds, torch.searchsorted(expected.values, torch.arange(P * keys + 1)))
    assert order.dtype == torch.int32
    total = int(bounds[-1])
    assert torch.equal(order[:total].long(), (expected.indices % T)[:total])


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


def test_nothing_to_sort():
    order, bounds = by_key(torch.zeros(2, 0, dtype=torch.long), 3)
    assert order.numel() == 0 and bounds.tolist() == [0] * 7

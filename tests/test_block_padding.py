"""`block(padded)`: blocks on a map that is filled up with zeros, as in Swin's public code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nearfold import mixing_matrix
from nearfold.look import looks
from nearfold.nn import BlockAttention2d, Mixer


@pytest.mark.parametrize("grid", [(8, 4), (5, 4), (3, 9), (10, 7)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
def test_padded_blocks_are_blocks_of_the_padded_map(grid, shift):
    """Every backend; what was padded is projected, so it is read as the projections' biases."""
    words = f"block(4, scaled(bias=table), shift={shift}{{}}) | box | softmax(heads=2, project=qkv)"
    for backend in ("oracle", "block", "gather"):
        padded = Mixer(words.format(", padded"), 4, backend=backend).double()
        plain = Mixer(words.format(""), 4).double()
        plain.load_state_dict(padded.state_dict())
        x = torch.randn(2, 4, *grid, dtype=torch.float64, requires_grad=True)
        filled = F.pad(x, (0, -grid[1] % 4, 0, -grid[0] % 4))
        expected = plain(filled)[..., : grid[0], : grid[1]]
        assert_close(padded(x), expected, atol=1e-12, rtol=0)
        times = torch.randn_like(expected)
        (ours,), (theirs,) = (torch.autograd.grad((y * times).sum(), x) for y in (padded(x), expected))
        assert_close(ours, theirs, atol=1e-12, rtol=0)
        inside = F.pad(torch.ones(grid), (0, -grid[1] % 4, 0, -grid[0] % 4)).flatten() > 0
        assert_close(mixing_matrix(padded, x), mixing_matrix(plain, filled)[:, :, inside][..., inside])
        assert looks(padded, x, (grid[0] - 1, 0)).shape == (2, *grid)
    assert BlockAttention2d(4, 2, 4, padded=True)(torch.randn(1, 4, 5, 6)).shape == (1, 4, 5, 6)

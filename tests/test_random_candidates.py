"""Random candidates: drawn in training only, for a whole batch alike, and again from the state dict."""

from __future__ import annotations

import pytest
import torch
from helpers.equivalence import BACKENDS, close, set_

from nearfold.nn import ConvNN2d, Mixer

pytestmark = pytest.mark.usefixtures("float64")

# --- random candidates


def random_layer(seed: int = 0, r: int = 6) -> ConvNN2d:
    torch.manual_seed(seed)
    return ConvNN2d(4, 6, 4, candidates=f"random({r})")


def test_random_candidates_are_drawn_in_training_only():
    layer, x = random_layer().eval(), torch.randn(2, 4, 5, 6)
    everything = ConvNN2d(4, 6, 4)
    everything.load_state_dict({n: p for n, p in layer.state_dict().items() if n != "sampler"})
    before = layer.sampler.clone()
    close(layer(x), everything(x), "evaluation")
    assert torch.equal(layer.sampler, before), "evaluation draws nothing"
    layer.train()
    drawn = [layer(x) for _ in range(4)]
    assert layer.sampler[1] == before[1] + 4
    for i, y in enumerate(drawn):
        assert (y - everything(x)).abs().max() > 1e-3
        for other in drawn[:i]:
            assert not torch.equal(y, other), "every step draws anew"


@pytest.mark.parametrize("backend", BACKENDS)
def test_r_candidates_are_drawn_the_same_for_the_whole_batch(backend):
    layer = Mixer("nearest(9, euclidean, random(7)) | ranked | depthwise", 30, bias=False, backend=backend)
    x = torch.eye(30).view(1, 30, 5, 6).expand(3, -1, -1, -1)
    set_(layer.weight, torch.ones_like(layer.weight))
    read = layer(x).flatten(2)  # (B, N, M): which positions each output reads
    assert bool((read == read[:1, :, :1]).all()), "all samples and positions search the same candidates"
    assert int(read[0, :, 0].sum()) == 7


def test_enough_random_candidates_are_all_of_them():
    layer, x = random_layer(r=30).train(), torch.randn(2, 4, 5, 6)
    y = layer(x)
    close(y, layer.eval()(x), "training with as many candidates as positions")


def test_the_state_dict_reproduces_the_draws():
    layer, x = random_layer().train(), torch.randn(2, 4, 5, 6)
    layer(x)
    state = {n: t.clone() for n, t in layer.state_dict().items()}
    assert "sampler" in state
    first = [layer(x) for _ in range(3)]
    other = random_layer(seed=5).train()
    other.load_state_dict(state)
    torch.manual_seed(99)  # the layer's generator is its own
    for y in first:
        assert torch.equal(other(x), y)


def test_equal_seeds_draw_alike():
    x = torch.randn(2, 4, 5, 6)
    a, b, c = random_layer(1).train(), random_layer(1).train(), random_layer(2).train()
    c.load_state_dict({n: p for n, p in a.state_dict().items() if n != "sampler"}, strict=False)
    for _ in range(3):
        y = a(x)
        assert torch.equal(y, b(x))
        assert not torch.equal(y, c(x)), "another seed, other draws"


def test_draws_cover_all_positions_evenly():
    from nearfold.kernels.sample import draw_positions

    count = torch.zeros(20)
    for step in range(2000):
        drawn = draw_positions(torch.tensor([7, step]), 20, 5)
        assert len(drawn.unique()) == 5
        assert torch.equal(drawn, drawn.sort().values)
        count[drawn] += 1
    # 2000 draws of 5 among 20: 500 each, standard deviation 19
    assert (count - 500).abs().max() < 5 * 20

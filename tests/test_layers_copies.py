"""Every named layer is copied, saved and reset as an nn.Module should be; shuffling is only a way to compute."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import every_layer

from nearfold.nn import ACmix2d, ConvNN1d, ConvNN2d

pytestmark = pytest.mark.usefixtures("seeded")

# --- copies and state


@every_layer
def test_copies_compute_the_same(make, shape):
    layer, x = make().train(), torch.randn(shape())
    layer(x)  # draws of random candidates are part of what is copied
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    loaded = make()
    assert loaded.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded]
    y = layer(x)
    for other in others:
        assert torch.equal(other(x), y)
        assert str(other.operation) == str(layer.operation)


@every_layer
def test_a_copy_is_on_its_own(make, shape):
    layer, x = make().eval(), torch.randn(shape())
    y = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert torch.equal(layer(x), y)
    assert not torch.equal(twin(x), y) or not list(twin.parameters())  # pooling has none


@every_layer
def test_there_is_no_state_besides_parameters_and_the_sampler(make, shape):
    layer = make()
    draws = any("random" in str(p.path) for p in layer.operation.parts)
    assert [name for name, _ in layer.named_buffers()] == (["sampler"] if draws else [])
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    before = {name: t.clone() for name, t in tensors.items()}
    layer(torch.randn(shape()))
    layer(torch.randn(shape(4)))
    assert set(layer.state_dict()) == set(before)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name != "sampler"), name


@every_layer
def test_reset_parameters_draws_anew(make, shape):
    layer = make()
    before = {n: p.clone() for n, p in layer.named_parameters()}
    layer.reset_parameters()
    drawn = {n for n, p in layer.named_parameters() if not torch.equal(p, before[n])}
    fixed = {
        n
        for n, p in before.items()
        if n.endswith(("rates", "shift_weight", "A_log", "A_imag")) or bool((p == p.max()).all())
    }
    assert drawn == before.keys() - fixed


def test_the_backend_is_only_a_choice_of_how():
    x = torch.randn(2, 4, 5, 6)
    for make, others in ((ConvNN2d, ("knn", "oracle")), (ACmix2d, ("oracle",))):
        layer = make(4, 8)
        y = layer(x)
        for backend in others:
            layer.backend = backend
            torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)


# --- shuffling


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("shuffle", ["none", "before", "after", "both"])
def test_shuffles_of_images(shuffle, scale):
    many = scale**2
    before, after = shuffle in ("before", "both"), shuffle in ("after", "both")
    layer = ConvNN2d(4, 6, 5, shuffle=shuffle, shuffle_scale=scale)
    plain = ConvNN2d(4 * (many if before else 1), 6 * (many if after else 1), 5)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 6, 12)
    y = F.pixel_unshuffle(x, scale) if before else x
    y = plain(y)
    y = F.pixel_shuffle(y, scale) if after else y
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("shuffle", ["before", "after", "both"])
def test_shuffles_of_sequences(shuffle):
    """The public ConvNN code reshapes: c * r + i channels take the i-th of r stretches of channel c."""
    before, after = shuffle in ("before", "both"), shuffle in ("after", "both")
    layer = ConvNN1d(4, 6, 3, shuffle=shuffle)
    plain = ConvNN1d(4 * (2 if before else 1), 6 * (2 if after else 1), 3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 12)
    y = torch.stack([x[:, c, i * 6 : i * 6 + 6] for c in range(4) for i in range(2)], 1) if before else x
    y = plain(y)
    if after:
        y = torch.stack([torch.cat([y[:, 2 * c], y[:, 2 * c + 1]], -1) for c in range(6)], 1)
    assert torch.equal(layer(x), y)

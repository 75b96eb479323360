"""Looking at a model leaves it as it was, whatever a run of it changes."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from torch import nn

from nearfold import Rule, convert
from nearfold.recognise import complexity, describe


class Cached(nn.Module):
    """What modules keep from a call: in attributes, lists, dicts and objects of their own, and in buffers."""

    class Box:
        anchors = None

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.anchors, self.history, self.table, self.box = None, None, [], {}, Cached.Box()
        self.lock = threading.Lock()  # cannot be copied
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mask", None)
        self.own = torch.ones(2)

    def forward(self, x):
        if self.shape != x.shape:
            self.shape, self.anchors = x.shape, torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
        self.calls += 1
        self.mask = torch.ones_like(x)
        self.history.append(x)
        self.table[x.shape] = self.anchors
        self.box.anchors = self.anchors
        self.own.add_(1)
        return x + self.anchors + torch.rand(1, device=x.device) * random.random()


class Looks(Cached):
    """One that does not run without values."""

    def forward(self, x):
        return super().forward(x) if x.sum().item() == x.sum().item() else x


def state(module: nn.Module) -> dict[str, object]:
    cached = {name: str(value) for name, value in vars(module).items() if name not in ("lock", "box")}
    return cached | {"box": dict(vars(module.box))}


LOOKS = {
    "describe": lambda model: describe(model, (3, 8, 8)),
    "complexity": lambda model: complexity(model, input_size=(3, 8, 8)),
    "convert": lambda model: convert(model, Rule("{self}", kernel_size=3), input_size=(3, 8, 8)),
    "without a run": describe,
}


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("kind", [Cached, Looks])
def test_what_a_module_keeps_is_as_it_was(name, kind):
    hooked = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), kind()).train()
    model[1].register_forward_hook(lambda *call: hooked.append(1))
    model[1].weight.requires_grad_(False)
    with torch.no_grad():
        model[2](torch.zeros(1, 4, 5, 5))  # it holds something already
    before, drawn, python = state(model[2]), torch.get_rng_state(), random.getstate()
    norm = {name: t.clone() for name, t in model[1].state_dict().items()}
    LOOKS[name](model)
    assert state(model[2]) == before
    assert name == "convert" or torch.equal(torch.get_rng_state(), drawn)  # new layers draw their weights
    assert random.getstate() == python
    assert all(torch.equal(t, norm[key]) for key, t in model[1].state_dict().items())
    assert all(m.training for m in model.modules()) and not model[1].weight.requires_grad
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model[1:]] == [1, 0]
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4, 8, 8)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_a_failed_run_leaves_it_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Cached())
    before = state(model[1])
    with pytest.raises(ValueError, match="does not run"):
        describe(model, (5, 8, 8))
    assert state(model[1]) == before


def test_weight_norm_and_tied_weights_run_as_they_are():
    old = nn.utils.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    new = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    new.bias = old.bias
    model = nn.Sequential(old, new)
    found = describe(model, (3, 8, 8))
    assert [row.field for row in found.rows] == ["3", "5"][: len(found.rows)] and found.parameters < 2 * 84 + 6
    assert model[0].weight.device.type == "cpu"

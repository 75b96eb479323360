"""Surgery is all or nothing: whatever is raised, the model is as it was."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers.same_models import note, state
from torch import nn

from nearfold import Rule, convert
from nearfold.nn import Mixer

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore")]


class Trips(nn.Module):
    """Raises at its nth call."""

    def __init__(self, nth: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = [nth], error
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.left[0] -= 1
        self.runs += 1
        if self.left[0] == 0:
            raise self.error
        return x


def network(trips: nn.Module) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), trips, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Dropout()
    )
    model[0].weight.requires_grad_(False)
    model[1].register_forward_hook(note("norm"))
    model[3].eval()
    return model


ERRORS = [KeyboardInterrupt, RuntimeError, MemoryError, ValueError, SystemExit]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("nth", range(1, 5))
def test_whatever_is_raised_the_model_is_as_it_was(error, nth):
    model = network(Trips(nth, error("stop")))
    before, runs = state(model), model[2].runs
    try:
        convert(
            model, Rule("({self}) + new*(nearest(4, cosine, stride={stride}) | ranked | kernel)"), input_size=(3, 7, 7)
        )
    except (error, ValueError):
        assert state(model)[:3] == before[:3] and model[2].runs is runs and runs == 0
    else:
        assert nth == 4  # it does not run so often


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["to", "where", "build", "check"])
def test_an_interrupted_rule_or_layer_changes_nothing(error, where, monkeypatch):
    model, count = network(nn.Identity()), [0]
    before = state(model)

    def trip(*args, **kwargs):
        count[0] += 1
        if count[0] == 2:
            raise error("stop")
        return {"to": "{self}", "where": True}.get(where)

    if where in ("build", "check"):
        own = Mixer.__init__ if where == "build" else Mixer.forward
        name = "__init__" if where == "build" else "forward"
        monkeypatch.setattr(Mixer, name, functools.wraps(own)(lambda *a, **k: (trip(), own(*a, **k))[1]))
    rule = Rule(trip if where == "to" else "window(3, padding={padding}) | box | kernel",
                where=trip if where == "where" else None)  # fmt: skip
    try:
        convert(model, rule, input_size=(3, 7, 7))
    except error:
        assert state(model)[:3] == before[:3]
    else:
        assert error in (RuntimeError, ValueError, MemoryError) and where in ("build", "check", "to")

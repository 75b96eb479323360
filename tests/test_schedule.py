"""Walking the spectrum: a network that starts as itself and moves toward the other end while it is trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nearfold import Rule, SpectrumSchedule, convert
from nearfold.nn import Mixer, TokenMixer
from nearfold.train import Recipe, evaluate, fit, load_data

BOUND = 1e-12
CONVNN = "nearest(9, cosine, self) | ranked | kernel"


pytestmark = pytest.mark.usefixtures("float64")


def net() -> nn.Sequential:
    conv = lambda i: nn.Conv2d(i, 8, 3, padding=1)  # noqa: E731
    return nn.Sequential(conv(3), nn.ReLU(), conv(8), nn.ReLU(), conv(8))


def walk(schedule: SpectrumSchedule, model: nn.Module, steps: int) -> list[str]:
    seen = []
    for _ in range(steps):
        schedule.step()
        seen.append(str(model[0].operation))
    return seen


def close(a, b) -> None:
    assert (a - b).abs().max().item() <= BOUND


def test_a_convolution_walks_from_space_to_features():
    model = net()
    x = torch.randn(1, 3, 7, 6)
    y = model(x)
    report = convert(model, Rule("nearest(9, blend(0), padding=1) | box | kernel"))
    schedule = SpectrumSchedule(model, {"lam": (0, 1)}, steps=4)
    assert report.exact
    close(model(x), y)
    lams = [layer.operation.path.similarity.lam for layer in model if isinstance(layer, Mixer) for _ in [0]]
    assert lams == [0, 0, 0]
    seen = walk(schedule, model, 6)
    assert [op.partition("blend(")[2].partition(")")[0] for op in seen] == ["0.25", "0.5", "0.75", "1.0", "1.0", "1.0"]
    assert (model(x) - y).abs().max() > 1e-3
    end = Mixer("nearest(9, blend(1), padding=1) | box | kernel", 3, 8)
    end.load_state_dict(model[0].state_dict())
    close(model[0](x), end(x))


def test_a_branch_starts_as_the_convolution_and_hands_channels_over():
    model = net()
    x = torch.randn(1, 3, 7, 6)
    y = model(x)
    conv = model[0]
    report = convert(model, Rule(f"branch(0.5, {CONVNN}, {{self}}, mix)", start={"ratio": 0}))
    assert report.exact and report.rows[0].reason == "starts at ratio=0"
    close(model(x), y)
    schedule = SpectrumSchedule(model, {"ratio": (0, 0.5)}, steps=4)
    close(model(x), y)
    for n in (1, 2, 3, 4):  # of 8 channels
        schedule.step()
        mine, truth = model[0](x), conv(x)
        close(mine[:, n:], truth[:, n:])
        assert (mine[:, :n] - truth[:, :n]).abs().max() > 1e-3
    # at the end the layer is the plain one with the same numbers
    end = Mixer(f"branch(0.5, {CONVNN}, window(3) | box | kernel, mix)", 3, 8)
    end.load_state_dict(model[0].tensors())
    close(model[0](x), end(x))
    # the channels that were handed over start with the convolution's weights, by distance
    assert torch.equal(model[0].tensors()["0.weight"], conv.weight[:4].flatten(2)[:, :, [4, 1, 3, 5, 7, 0, 2, 6, 8]])


def test_attention_becomes_sparse():
    model = nn.Sequential(TokenMixer("all | row | softmax(heads=2)", 8))
    x = torch.randn(2, 12, 8)
    y = model(x)
    assert convert(model, Rule("nearest(12, scaled) | ranked | softmax(heads=2)*depthwise"), input_size=(12, 8)).exact
    schedule = SpectrumSchedule(model, {"k": (12, 3)}, steps=3)
    close(model(x), y)
    ks = []
    for _ in range(4):
        schedule.step()
        ks.append(model[0].operation.path.k)
    assert ks == [9, 6, 3, 3]
    end = TokenMixer("nearest(3, scaled) | ranked | softmax(heads=2)*depthwise", 8)
    end.load_state_dict(model[0].tensors())
    close(model(x), end(x))


def test_candidates_become_fewer():
    layer = Mixer("nearest(3, cosine) | ranked | kernel", 4)
    assert layer.sampler is None
    schedule = SpectrumSchedule(nn.Sequential(layer), {"candidates": (42, 6)}, steps=2)
    x = torch.randn(1, 4, 6, 7)
    close(layer(x), layer.eval()(x))  # 42 of 42
    layer.train()
    schedule.step(), schedule.step()
    assert str(layer.operation) == "nearest(3, cosine, random(6)) | ranked | kernel"
    assert (layer(x) - layer(x)).abs().max() > 1e-3


SHAPES = {
    "linear": [0, 0.25, 0.5, 0.75, 1, 1],
    "cosine": [0, (1 - math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(math.pi / 4)) / 2, 1, 1],
    "step": [0, 0, 1, 1, 1, 1],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    schedule = SpectrumSchedule(Mixer("nearest(4, blend(0)) | ranked | kernel", 4), {"lam": (0, 1)}, 4, shape=shape)
    seen = [schedule.share]
    for _ in range(5):
        schedule.step()
        seen.append(schedule.share)
    assert seen == pytest.approx(SHAPES[shape])


def test_wait_and_every():
    schedule = SpectrumSchedule(
        Mixer("nearest(4, blend(0)) | ranked | kernel", 4), {"lam": (0.2, 0.6)}, 4, wait=2, every=2
    )
    seen = []
    for _ in range(8):
        schedule.step()
        seen.append(schedule.values()[""]["lam"])
    assert seen == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.6])


def test_layers_on_their_own():
    model = nn.Sequential(*(Mixer("nearest(4, blend(0)) | ranked | kernel", 4) for _ in range(3)))
    SpectrumSchedule(model, {"0": {"lam": (0.5, 1)}, "2": {"lam": (0.25, 1), "k": (4, 2)}}, 4)
    assert [layer.operation.path.similarity.lam for layer in model] == [0.5, 0, 0.25]


def train(model, schedule, optimizer, steps: int) -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()


def test_training_goes_on_where_it_was():
    def start():
        torch.manual_seed(3)
        model = net()
        convert(model, Rule("branch(0.5, nearest(9, blend(0.5), self) | ranked | kernel, {self})", start={"ratio": 0}))
        schedule = SpectrumSchedule(model, {"ratio": (0, 0.5), "k": (9, 5), "lam": (0.5, 1)}, steps=6)
        return model, schedule, torch.optim.AdamW(model.parameters(), 1e-2)

    model, schedule, optimizer = start()
    train(model, schedule, optimizer, 6)
    first, middle, last = start(), start(), None
    train(*first, 3)
    for mine, theirs in zip(middle, first, strict=True):
        mine.load_state_dict(theirs.state_dict())
    assert str(middle[0][0].operation) == str(first[0][0].operation) != str(model[0].operation)
    train(*middle, 3)
    last = middle[0]
    assert str(last[0].operation) == str(model[0].operation)
    for name, p in model.state_dict().items():
        assert torch.equal(p, last.state_dict()[name]), name


class Stop(Exception):
    """A run that is interrupted."""


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_carries_its_schedule(tmp_path, ema):
    torch.set_default_dtype(torch.float32)
    data = load_data(limit=200)
    recipe = Recipe(epochs=4, batch_size=64, lr=3e-3, device="cpu", ema=ema)

    def start():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
        convert(model, Rule("branch(0.5, nearest(9, blend(0.5), self) | ranked | kernel, {self})", start={"ratio": 0}))
        return model, SpectrumSchedule(model, {"ratio": (0, 0.5), "lam": (0.5, 1)}, steps=9)

    model, schedule = start()
    result = fit(model, data, recipe, progress=False, schedule=schedule)
    assert schedule.done == result.best_epoch * result.steps // 4 > 0  # where the selected weights are from
    assert model[0].operation.ratio == min(schedule.done / 18, 0.5)
    loss, _ = evaluate(model, data.val, data)
    assert loss == pytest.approx(result.history[result.best_epoch - 1]["val_loss"], rel=1e-5)  # judged as it is now
    broken, theirs = start()
    calls = iter(range(1000))

    def stop(*_):
        if next(calls) == 7:
            raise Stop

    handle = broken.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        fit(broken, data, recipe, out=tmp_path, progress=False, schedule=theirs, checkpoint_every=1)
    handle.remove()
    again, schedule = start()
    fit(again, data, recipe, out=tmp_path, resume=True, progress=False, schedule=schedule)
    assert again[0].operation == model[0].operation
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="is of another schedule: steps is 10, was 9"):
        other = start()[0]
        plan = SpectrumSchedule(other, {"ratio": (0, 0.5), "lam": (0.5, 1)}, steps=10)
        fit(other, data, recipe, out=tmp_path, resume=True, progress=False, schedule=plan)
    with pytest.raises(ValueError, match="is of another schedule: steps is None, was 9"):
        fit(start()[0], data, recipe, out=tmp_path, resume=True, progress=False)


WRONG = [
    ({"lam": (0, 1)}, {"shape": "cubic"}, "shape must be one of linear, cosine, step, got 'cubic'"),
    ({"lam": (0, 1)}, {"steps": 0}, "steps must be an integer of at least 1"),
    ({"lam": (0, 1)}, {"every": 0}, "every must be an integer of at least 1"),
    ({"lam": 1}, {}, "lam: wanted \\(first, last\\), two numbers; got 1"),
    ({"lam": (0, 2)}, {}, "lam must be between 0 \\(space\\) and 1"),
    ({"ratio": (0, 1)}, {}, "no Mixer of the model whose name matches '\\*' has 'ratio' to change"),
    ({"depth": (0, 1)}, {}, "has 'depth' to change"),
    ({"7": {"lam": (0, 1)}}, {}, "whose name matches '7'"),
    ({"0": {"lam": (0, 1)}, "k": (1, 2)}, {}, "got a mixture"),
    ({}, {}, "ranges must say what changes"),
]


@pytest.mark.parametrize(("ranges", "options", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_wrong_schedules(ranges, options, message):
    model = nn.Sequential(Mixer("nearest(4, blend(0)) | ranked | kernel", 4))
    with pytest.raises(ValueError, match=message):
        SpectrumSchedule(model, ranges, **({"steps": 4} | options))
    assert str(model[0].operation) == "nearest(4, blend(0.0)) | ranked | kernel"


def test_a_ratio_that_the_operands_cannot_make_is_said_before_training():
    def layer():
        return Mixer("branch(0.5, all | row | softmax(heads=4), window(3) | box | kernel)", 8)

    with pytest.raises(ValueError, match=r"one operand 1 of 8 channels, .*heads=4.*use shape='step'"):
        SpectrumSchedule(nn.Sequential(layer()), {"ratio": (0, 0.5)}, steps=9)
    model = nn.Sequential(layer())
    schedule = SpectrumSchedule(model, {"ratio": (0, 0.5)}, steps=4, shape="step")
    assert [op.partition(",")[0] for op in walk(schedule, model, 3)] == ["branch(0.0", "branch(0.5", "branch(0.5"]


def test_a_layer_without_room_says_so():
    layer = Mixer(f"branch(0.25, {CONVNN}, window(3) | box | kernel)", 4, 8)
    with pytest.raises(ValueError, match=r"needs 0.weight of shape \(4, 4, 9\), and the layer has \(2, 4, 9\)"):
        layer.become(f"branch(0.5, {CONVNN}, window(3) | box | kernel)")
    with pytest.raises(ValueError, match="has no sampler"):
        layer.become("branch(0.25, nearest(9, cosine, random(5)) | ranked | kernel, window(3) | box | kernel)")
    with pytest.raises(ValueError, match=r"its 0.weight \(4, 4, 3, 3\) and that of .* differ"):
        layer.reserve("branch(0.5, window(3) | box | kernel, window(3) | box | kernel)")
    layer, x = layer.double(), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    before = layer(x)
    layer.reserve(f"branch(0.5, {CONVNN}, window(3) | box | kernel)", f"branch(0, {CONVNN}, window(3) | box | kernel)")
    assert torch.equal(layer(x), before)  # room changes nothing
    layer.become(f"branch(0, {CONVNN}, window(3) | box | kernel)")
    torch.testing.assert_close(layer(x)[:, 2:], before[:, 2:], rtol=0, atol=1e-12)


def test_room_keeps_what_is_frozen_and_where_it_is():
    layer = Mixer("nearest(4, cosine) | ranked | kernel", 4).half().requires_grad_(False)
    layer.reserve("nearest(6, cosine, random(5)) | ranked | kernel")
    assert layer.weight.shape[-1] == 6 and layer.weight.dtype == torch.float16 and not layer.weight.requires_grad
    assert layer.sampler.dtype == torch.int64
    layer.reset_parameters()


@pytest.mark.parametrize("around", ["{}", "a*({}) + (window(1) | box | kernel)", "(window(1) | box | kernel) + a*({})"])
@pytest.mark.parametrize("operand", [0, 1])
def test_a_channel_keeps_its_weights_while_a_ratio_moves(around, operand):
    """Wherever the branch stands: output channel c is made by the same numbers at every ratio."""
    hybrid = "branch({}, window(3) | box | kernel, nearest(4, cosine) | ranked | kernel)"
    layer = Mixer(around.format(hybrid.format(0.5)), 8)
    layer.reserve(around.format(hybrid.format(0.0)), around.format(hybrid.format(1.0)))
    rows = {}
    for ratio in (0.25, 0.5, 0.75):
        layer.become(around.format(hybrid.format(ratio)))
        name = next(
            n for n in layer.tensors() if n.endswith(f"{operand}.weight") and (around == "{}" or n.count(".") > 1)
        )
        own = layer.tensors()[name]
        first = 0 if operand == 0 else 8 - len(own)
        for i, row in enumerate(own):
            assert torch.equal(rows.setdefault(first + i, row), row)
    assert len(rows) == 6

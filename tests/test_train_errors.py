"""What does not fit a run, or goes wrong in it, is said, and nothing is lost."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import RECIPE, contents, net
from torch import nn

from nearfold.train import Diverged, Split, fit, load_data, load_weights, save_weights
from nearfold.train import checkpoint as checkpoints
from nearfold.train.distributed import Team


def damage_recipe(out):
    return {"recipe": replace(RECIPE, lr=0.5, epochs=9)}


def damage_data(out):
    data = load_data(limit=200)
    images = data.train.images.clone()
    images[0, 0, 0, 0] += 1
    return {"data": replace(data, train=Split(images, data.train.labels))}


def damage_model(out):
    return {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}


def tensors_of(out):
    content = json.loads((out / "checkpoint.json").read_text())
    (name,) = (name for name in content["files"] if name.endswith(".distcp"))
    return out / content["folder"] / name


def truncate(out):
    content = tensors_of(out).read_bytes()
    tensors_of(out).write_bytes(content[: len(content) // 2])
    return {}


def flip_a_bit(out):
    content = bytearray(tensors_of(out).read_bytes())
    content[len(content) // 2] ^= 4
    tensors_of(out).write_bytes(content)
    return {}


def remove(out):
    tensors_of(out).unlink()
    return {}


def empty(out):
    (out / "checkpoint.json").write_bytes(b"")
    return {}


def another_file(out):
    (out / "checkpoint.json").write_text('{"weights": [1, 1]}')
    return {}


def earlier_version(out):
    (out / "checkpoint.json").rename(out / "checkpoint.pt")
    return {}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            damage_recipe,
            r"of another recipe: epochs is 9, was 3; lr is 0.5, was 0.003\. Resume with the same",
        ),
        (damage_data, r"of another data set: train is \[180, 1, 8, 8, \d+\], was"),
        (
            damage_model,
            r"checkpoint\.json is of another model: .*; layers\.0\.weight is not there, was \(8, 1, 3, 3\); "
            r".* and 7 more\. Resume with the same model",
        ),
        (
            truncate,
            r"checkpoint\.json cannot be read \(.*distcp is damaged\); to start afresh, delete .*checkpoint\.json",
        ),
        (flip_a_bit, r"checkpoint\.json cannot be read \(.*distcp is damaged\)"),
        (remove, r"checkpoint\.json cannot be read \(.*distcp is missing\)"),
        (empty, r"checkpoint\.json cannot be read \(Expecting value"),
        (another_file, r"checkpoint\.json is no checkpoint of this version; to start afresh, delete"),
        (earlier_version, r"checkpoint\.pt is no checkpoint of this version"),
    ],
)
def test_checkpoints_that_do_not_fit(digits, tmp_path, damage, says):
    fit(net(), digits, replace(RECIPE), out=tmp_path, progress=False)
    arguments = {"model": net(), "data": digits, "recipe": RECIPE, **damage(tmp_path)}
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=says):
        fit(**arguments, out=tmp_path, resume=True, progress=False)
    assert contents(tmp_path) == before


def test_a_finished_or_interrupted_run_is_not_overwritten(digits, tmp_path):
    fit(net(), digits, RECIPE, out=tmp_path, progress=False)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds a run already: pass resume=True"):
        fit(net(), digits, RECIPE, out=tmp_path, progress=False)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resume": True}, "resume=True needs a folder: pass out="),
        ({"tensorboard": True}, "tensorboard=True needs a folder"),
        ({"checkpoint_every": -1}, "checkpoint_every must be an integer of at least 0; got -1"),
        ({"log_every": 0}, "log_every must be an integer of at least 1; got 0"),
        ({"workers": 0.5}, "workers must be an integer of at least 0; got 0.5"),
        ({"workers": 2}, "workers=2 read ahead from files, but digits is in memory: leave workers at 0"),
        ({"parallel": "tp"}, "parallel must be one of 'ddp', 'fsdp'; got 'tp'"),
        ({"out": __file__}, "is a file: name a folder"),
        ({"model": nn.Flatten()}, "no trainable parameter"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 9))},
            r"must return logits \(32, 10\); it returned \(32, 9\)",
        ),
    ],
)
def test_bad_arguments(digits, options, says):
    with pytest.raises(ValueError, match=says):
        fit(**{"model": net(), "data": digits, "recipe": RECIPE, "progress": False, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(digits):
    with pytest.raises(ValueError, match=r"Recipe.device='cuda' needs cuda:0, but torch sees 0 CUDA devices"):
        fit(net(), digits, replace(RECIPE, device="cuda"), progress=False)


def test_a_precision_that_the_device_lacks(digits, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(nn.functional, "conv2d", refuse)
    with pytest.raises(ValueError, match=r"precision='bfloat16' cannot be used on cpu \(no such kernel\)"):
        fit(net(), digits, replace(RECIPE, precision="bfloat16"), progress=False)


class Poisoned(nn.Module):
    """Its loss, or else only its weight, stops being finite at the call `at`."""

    def __init__(self, at, weight):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.calls, self.at, self.weight = 0, at, weight

    def forward(self, images):
        self.calls += self.training
        logits = self.linear(images.flatten(1))
        if self.training and self.calls == self.at:
            if not self.weight:
                return logits * math.nan
            self.linear.weight.register_hook(lambda gradient: gradient * math.nan)
        return logits


@pytest.mark.parametrize(
    ("weight", "says"),
    [(False, "the loss is nan at epoch 2, step 7: lower lr"), (True, "a weight is not finite after step 7")],
)
def test_divergence_stops_the_run_and_leaves_the_last_good_checkpoint(digits, tmp_path, weight, says):
    recipe = replace(RECIPE, clip_grad_norm=0.0)
    with pytest.raises(Diverged, match=says):
        fit(Poisoned(7, weight), digits, recipe, out=tmp_path, progress=False, checkpoint_every=1)
    saved = checkpoints.read(tmp_path, {}, Team(0, 1, torch.device("cpu")))
    assert saved.facts["run"]["step"] == 6
    weight = torch.full((10, 64), math.nan)
    checkpoints.load(saved, {"model/linear.weight": weight}, Team(0, 1, torch.device("cpu")))
    assert weight.isfinite().all()
    fit(Poisoned(-1, weight), digits, recipe, out=tmp_path, resume=True, progress=False)


def test_weights_that_do_not_fit(tmp_path):
    save_weights(net(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds the weights of another model"):
        load_weights(nn.Linear(2, 2), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="there are no weights at"):
        load_weights(net(), tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_weights(net(), tmp_path / "broken.safetensors")


def test_deterministic_is_undone(digits, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **_: calls.append(on))
    fit(net(), digits, replace(RECIPE, epochs=1, warmup_epochs=0, deterministic=True), progress=False)
    assert calls == [True, False]

"""Weights that come along: loaded by name, checked, counted again; and the script that makes them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from nearfold.cli import main
from nearfold.models import create, pretrained
from nearfold.models.hub import WEIGHTS
from nearfold.study.grid import Data, Trial, training
from nearfold.study.plan import fingerprint
from nearfold.study.store import Store
from nearfold.study.tasks import Place, train
from nearfold.train import Recipe, load_data

NAME = "resnet8s_conv"
SCRIPT = Path(__file__).parents[1] / "recipes" / "pretrained.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two seeds of a network trained on digits, and what the script makes of them."""
    root = tmp_path_factory.mktemp("made")
    store, recipe = Store(root / "store"), Recipe(epochs=2, batch_size=50, device="cpu")
    trial = Trial({"data": "digits", "operator": "convolution"}, {"name": NAME}, Data("digits"), recipe)
    print_ = fingerprint(load_data("digits"))
    for seed in (0, 1):
        config = training(trial, seed, print_).config
        store.save(config, train(config, Place(store.root, {}), store.weights_path(config), None))
    script = runpy.run_path(str(SCRIPT))
    layer = "window(3)|box|kernel"
    runs = {run["config"]["recipe"]["seed"]: run for run in script["found"](store.root, NAME, layer, "none")}
    assert sorted(runs) == [0, 1] and not list(script["found"](store.root, NAME, layer, "crop_flip"))
    for name, value in (("FOLDER", root / "weights"), ("CARDS", root / "cards")):
        script["write"].__globals__[name] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "FOLDER", root / "weights")
        pretrained.pretrained.cache_clear()
        card = script["write"](NAME, runs, store, "digits").read_text()
        yield root, runs, card
    pretrained.pretrained.cache_clear()


def test_they_are_those_of_the_run_and_count_what_is_stated(made, capsys):
    _, runs, card = made
    entry = pretrained.weights_of(NAME)
    assert entry.tested == len(load_data("digits").test)
    assert entry.accuracy == pytest.approx(runs[0]["result"]["test_accuracy"], abs=0.02)  # rounded to bfloat16
    assert main(["evaluate", NAME, "--data", "digits"]) == 0
    said = capsys.readouterr().out
    assert f"{entry.correct:,} of {entry.tested:,}" in said and said.endswith("the same\n")
    assert f"{100 * entry.accuracy:.2f} %" in card and "seed 0" in card and "2, as trained" in card
    assert main(["models", "--pretrained"]) == 0
    assert f"{100 * entry.accuracy:.2f}" in capsys.readouterr().out


def test_they_are_loaded_by_name(made):
    network = create(NAME, pretrained=True)
    state = {n: t for n, t in network.state_dict().items() if t.is_floating_point()}
    assert all(t.dtype == torch.float32 and torch.equal(t, t.bfloat16().float()) for t in state.values())
    assert network.pretrained_cfg["mean"] == pytest.approx(load_data("digits").mean.tolist(), abs=1e-6)
    x = torch.randn(2, 1, 8, 8)
    other = create(NAME, pretrained=True, num_classes=3)
    assert other(x).shape == (2, 3) and torch.equal(other.groups[0].conv.weight, network.groups[0].conv.weight)
    maps = create(NAME, pretrained=True, features_only=True)(x)
    assert [m.shape[1] for m in maps] == [32, 128, 128]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"name": "resnet8s_kvt"}, "no weights come along for 'resnet8s_kvt'; there are those of resnet8s_conv"),
        ({"name": NAME, "in_chans": 3}, "in_chans=3 it is another network"),
        ({"name": NAME, "widths": (8, 8, 8)}, "it is another network"),
        ({"name": NAME, "pretrained": "yes"}, "pretrained must be"),
    ],
)
def test_what_does_not_fit_is_said(made, given, error):
    with pytest.raises(ValueError, match=error):
        create(**({"pretrained": True} | given))


def test_a_file_that_was_changed_is_not_loaded(made, tmp_path, monkeypatch):
    root, _, _ = made
    folder = tmp_path / NAME
    folder.mkdir()
    for path in (root / "weights" / NAME).iterdir():
        content = bytearray(path.read_bytes())
        if path.name == WEIGHTS:
            content[-1] ^= 1
        (folder / path.name).write_bytes(content)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    pretrained.pretrained.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"is not what was trained .sha256 .*reinstall"):
            create(NAME, pretrained=True)
        (folder / WEIGHTS).unlink()
        with pytest.raises(ValueError, match="is not what was trained"):
            create(NAME, pretrained=True)
    finally:
        monkeypatch.undo()
        pretrained.pretrained.cache_clear()
        pretrained.pretrained()


def test_other_data_are_refused(made, capsys):
    assert main(["evaluate", NAME, "--data", "cifar10=somewhere"]) == 2
    assert "--data digits=FOLDER" in capsys.readouterr().err
    assert main(["evaluate", "resnet18_conv", "--data", "digits"]) == 2
    assert "no weights come along" in capsys.readouterr().err

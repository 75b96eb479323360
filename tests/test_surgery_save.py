"""Converted models in folders: the same function in a new process; a bad file is one ValueError and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nearfold import Rule, SpectrumSchedule, convert
from nearfold.nn import Mixer
from nearfold.surgery import load_converted, save_converted

BUILD = """
import torch
from torch import nn

def build(seed):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    tokens = nn.Sequential(nn.Flatten(2), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1), tokens)
    model.tied = nn.Linear(4, 4)
    model.tied_too = nn.Linear(4, 4)
    model.tied_too.weight = model.tied.weight
    model.forward = lambda x: tokens(model[2](model[1](model[0](x))).flatten(2)[..., :8])
    return model
"""
exec(BUILD)
RULES = [
    Rule("branch(0.5, nearest(5, cosine, self, random(20)) | ranked | kernel, {self}, mix)", name="0",
         start={"ratio": 0.25}),
    Rule("({self}) + near*(nearest(4, cosine) | ranked | softmax(heads={heads}))", kind="attention"),
]  # fmt: skip


def converted(seed: int = 0):
    model = build(seed)  # noqa: F821
    report = convert(model, RULES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model, report


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, report = converted()
    folder = tmp_path_factory.mktemp("saved")
    save_converted(model, report, folder)
    x = torch.randn(2, 3, 5, 6)
    return folder, model.eval(), x


@pytest.mark.slow
def test_the_same_in_a_new_process(saved, tmp_path):
    folder, model, x = saved
    torch.save(x, tmp_path / "x.pt")
    code = (
        f"{BUILD}\nfrom nearfold.surgery import load_converted\nmodel = build(7)\n"
        f"report = load_converted(model, {str(folder)!r})\nx = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"torch.save((model.eval()(x), str(report), [n for n, p in model.named_parameters() if p.requires_grad]), "
        f"{str(tmp_path / 'y.pt')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    y, report, trainable = torch.load(tmp_path / "y.pt")
    assert torch.equal(y, model(x)) and "branch(0.25" in report
    assert trainable == [n for n, p in model.named_parameters() if p.requires_grad]


def test_a_loaded_model_is_a_converted_model(saved):
    folder, model, x = saved
    other = build(3)  # noqa: F821
    own = other[0]
    report = load_converted(other, folder)
    assert torch.equal(other.eval()(x), model(x))
    assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert other.tied.weight is other.tied_too.weight
    SpectrumSchedule(other, {"ratio": (0.25, 0.5)}, steps=1).step()  # there still is room for both ends
    assert isinstance(other[0], Mixer) and "branch(0.5" in str(other[0].operation)
    report.undo()
    assert other[0] is own


def test_where_a_schedule_has_moved_it_is_saved(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    report = convert(model, Rule("nearest(9, blend(0), padding=1) | box | kernel"))
    schedule = SpectrumSchedule(model, {"lam": (0, 1), "k": (9, 4)}, steps=2)
    schedule.step()
    save_converted(model, report, tmp_path)
    other = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    load_converted(other, tmp_path)
    x = torch.randn(1, 4, 6, 6)
    assert other[0].operation == model[0].operation and torch.equal(other(x), model(x))


def _edit(change):
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def _layer(**values):
    return _edit(lambda config: config["layers"][0].update(values))


BAD = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a folder for a file": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
    "not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "not text": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
    "deep JSON": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "a list": lambda folder: (folder / "config.json").write_text("[]"),
    "another format": _edit(lambda config: config.update(format="x")),
    "no layers": _edit(lambda config: config.pop("layers")),
    "layers of another type": _edit(lambda config: config.update(layers=3)),
    "a layer of another type": _edit(lambda config: config["layers"].append("x")),
    "an unknown layer": _layer(name="nine"),
    "a name of another type": _layer(name=["0"]),
    "another class": _layer(**{"class": "Linear"}),
    "no operation": _layer(operation="window(3"),
    "an operation of another type": _layer(operation=3),
    "a huge operation": _layer(operation="window(100001) | box | kernel"),
    "a huge number": _layer(operation="window(" + "9" * 5000 + ") | box | kernel"),
    "another operation": _layer(operation="window(5) | box | kernel"),
    "a huge room": _layer(room={"0.weight": [[99999, 99999, 3, 3], "uniform", 9]}),
    "room of another type": _layer(room={"0.weight": 3}),
    "no room": _layer(room={}),
    "frozen of another type": _layer(frozen=[3]),
    "an unknown frozen": _layer(frozen=["nine"]),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "half of the weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-100]
    ),
    "a huge header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_one_value_error(saved, what, tmp_path):
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    BAD[what](tmp_path)
    model = build(1)  # noqa: F821
    before, weights = list(model.modules()), [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
        load_converted(model, tmp_path)
    assert list(model.modules()) == before
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_another_model_is_a_value_error(saved):
    folder, _, _ = saved
    for other in (nn.Sequential(nn.Conv2d(3, 6, 3)), build(0).double(), nn.Sequential(nn.ReLU())):  # noqa: F821
        before = list(other.modules())
        with pytest.raises(ValueError):
            load_converted(other, folder)
        assert list(other.modules()) == before


def test_what_is_not_converted_cannot_be_saved(tmp_path):
    model, report = converted()
    report.undo()
    with pytest.raises(ValueError, match="the report's new layers are not in this model"):
        save_converted(model, report, tmp_path)
    assert not list(tmp_path.iterdir())

"""`nearfold train`: any network that has a name, a word from a user's own file, and what does not go together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from nearfold.cli import main
from nearfold.models import MODELS, create
from nearfold.train import load_data, load_weights, prepare
from nearfold.train.trainer import Trainer

SMALL = ["train", "--limit", "60", "--epochs", "2", "--batch-size", "16", "--device", "cpu"]
WORD = """
from dataclasses import dataclass
import torch
from beside import HALF
from nearfold.extend import Rho, register_rho

@dataclass(frozen=True)
class Half(Rho):
    word = "half"
    heads: int = 1
    project: str | None = None

register_rho(Half, lambda rho, score, valid: score.masked_fill(~valid, 0) * HALF)
"""


@pytest.fixture
def word(tmp_path, own_words):
    """A file with a word, which needs its neighbour."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "beside.py").write_text("HALF = 0.5\n")
    file = tmp_path / "mine" / "word.py"
    file.write_text(WORD)
    return file


def fails(capsys, *argv):
    assert main(argv) == 2
    line, *pointed = capsys.readouterr().err.splitlines()
    assert not pointed or pointed[1].strip() == "^"
    return line


def dies_at(monkeypatch, step):
    """The process is interrupted before its step of that number."""
    take, taken = Trainer.take_step, []

    def interrupted(self, batches):
        taken.append(1)
        if len(taken) == step:
            raise KeyboardInterrupt
        take(self, batches)

    monkeypatch.setattr(Trainer, "take_step", interrupted)


@pytest.mark.parametrize("given", [["--model", "gwo_conv"], ["--model", "nearfold_gwo_conv"], ["--op", "convnn"]])
def test_an_interrupted_run_goes_on_to_the_same_weights(given, tmp_path, monkeypatch, capsys):
    whole, broken = (["--out", str(tmp_path / name)] for name in ("whole", "broken"))
    assert main([*SMALL, *given, *whole]) == 0
    with monkeypatch.context() as patch:
        dies_at(patch, 5)
        assert main([*SMALL, *given, *broken, "--checkpoint-every", "1"]) == 130
    assert main([*SMALL, *given, *broken, "--checkpoint-every", "1", "--resume"]) == 0
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "broken"))
    assert first == second
    first, second = ((tmp_path / name / "network.json").read_text() for name in ("whole", "broken"))
    assert first == second


def test_a_named_network_is_recorded_evaluated_and_read_again(tmp_path, capsys):
    assert main([*SMALL, "--model", "gwo_conv", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("gwo_conv\ndigits: test accuracy")
    said, result = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("network", "result"))
    assert said == {"model": "gwo_conv", "arguments": {"num_classes": 10, "in_chans": 1, "img_size": [8, 8]}}
    again = create(said["model"], **said["arguments"]).eval()
    load_weights(again, tmp_path / "weights.safetensors")
    data = load_data(limit=60)
    with torch.no_grad():
        right = again(prepare(data.test.images, data)).argmax(1) == data.test.labels
    assert right.double().mean().item() == pytest.approx(result["test_accuracy"])


def test_what_was_trained_must_be_trained_on(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert main([*SMALL, "--model", "gwo_conv", *out]) == 0
    capsys.readouterr()
    assert "of another network: model is 'resnet18_conv', was 'gwo_conv'" in fails(
        capsys, *SMALL, "--model", "resnet18_conv", *out, "--resume"
    )
    assert "of another network: model is None, was 'gwo_conv'" in fails(capsys, *SMALL, *out, "--resume")


def test_a_run_from_before_it_was_said_goes_on(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert main([*SMALL, *out]) == 0
    pointer = tmp_path / "checkpoint.json"
    content = json.loads(pointer.read_text())
    del content["identity"]["network"]
    pointer.write_text(json.dumps(content))
    assert main([*SMALL, *out, "--resume"]) == 0


def test_a_word_of_ones_own_is_trained_and_goes_on_wherever_its_file_lies(word, tmp_path, monkeypatch, capsys):
    argv = [*SMALL, "--op", "window(3, dot) | box | half*kernel", "--width", "8", "--out", str(tmp_path / "run")]
    assert "half" in fails(capsys, *argv)
    dies_at(monkeypatch, 5)
    assert main([*argv, "--import", str(word)]) == 130
    monkeypatch.undo()
    said = json.loads((tmp_path / "run" / "network.json").read_text())
    assert said["import"] == "word.py" and len(said["import_sha256"]) == 64
    moved = word.parent.rename(tmp_path / "moved") / "word.py"
    assert main([*argv, "--import", str(moved), "--resume"]) == 0
    moved.write_text(WORD.replace("* HALF", "* HALF * 0.5"))
    capsys.readouterr()
    assert "of another network: import_sha256 is" in fails(capsys, *argv, "--import", str(moved), "--resume")


def test_a_network_of_ones_own_is_trained(tmp_path, capsys):
    file = tmp_path / "net.py"
    file.write_text(
        "from nearfold.models import MODELS, Entry, register\n"
        "register('mine_small', Entry(MODELS['gwo_conv'].network, {'width': 4}, 'a narrow one'))\n"
    )
    try:
        assert main([*SMALL, "--import", str(file), "--model", "mine_small"]) == 0
    finally:
        MODELS.pop("mine_small", None)
    assert capsys.readouterr().out.startswith("mine_small\n")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("named", [True, False])
def test_several_processes_train_it_too(named, parallel, word, tmp_path):
    """Each of them executes the file; one goes on where two have stopped."""
    op = ["--import", str(word), "--op", "window(3, dot) | box | half*kernel", "--width", "8"]
    argv = [*SMALL, *(["--model", "gwo_conv"] if named else op), "--out", str(tmp_path / "run")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "nearfold"]
    done = subprocess.run(
        [sys.executable, *launch, *argv, "--parallel", parallel],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test accuracy") == 1, "one process speaks"
    assert main([*argv, "--resume"]) == 0
    said = json.loads((tmp_path / "run" / "network.json").read_text())
    assert said.get("import") == (None if named else "word.py")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "gwo_cnv"], "no network is called 'gwo_cnv'; close to it: gwo_conv"),
        (["--model", "resnet"], "no network is called 'resnet'; close to it: resnet18"),
        (["--model", ""], "`nearfold models` lists all"),
        (["--model", "gwo_conv", "--op", "conv"], "leave out --op, or --model"),
        (["--model", "gwo_conv", "--width", "32"], "leave out --width, or --model"),
        (["--model", "gwo_conv", "--depth", "2"], "leave out --depth, or --model"),
        (["--model", "vgg11_conv"], "vgg11_conv cannot be trained on images of 1 x 8 x 8: x must be"),
        (["--model", "swin_tiny", "--op", "swin"], "which --model swin_tiny is not"),
        (["--import", "nowhere.py"], "nowhere.py: there is no file nowhere.py"),
        (["--import", "\0.py"], "there is no file"),
        (["--import", "notes.txt"], "notes.txt is not a Python file"),
        (["--import", "raises.py"], "raises.py: RuntimeError: two lines"),
        (["--import", "exits.py"], "exits.py: SystemExit: 0"),
        (["--import", "broken.py"], "broken.py: SyntaxError"),
        (["--import", "."], "there is no file ."),
    ],
)
def test_what_cannot_be_trained_is_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "notes.txt": "", "raises.py": "raise RuntimeError('two\\nlines')", "exits.py": "raise SystemExit(0)",
        "broken.py": "def",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(Trainer, "take_step", lambda *_: pytest.fail("it would have been trained"))
    assert said in fails(capsys, *SMALL, *argv)

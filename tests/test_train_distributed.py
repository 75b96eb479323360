import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nearfold.train import Recipe, fit, load_data
from nearfold.train.distributed import Team
from nearfold.train.trainer import Trainer

RECIPE = Recipe(epochs=2, batch_size=64, lr=3e-3, augment="crop_flip", label_smoothing=0.1, ema=0.9, device="cpu")

# The same script, alone and under torchrun.
SCRIPT = """
import sys
import torch
from test_train_distributed import RECIPE, model
from nearfold.train import fit, load_data
fit(model(), load_data(limit=321), RECIPE, out=sys.argv[1], log_every=1, checkpoint_every=3)
"""


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 10))


def read(out):
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics, json.loads((out / "result.json").read_text()), load_file(out / "weights.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")
def test_two_processes_take_the_steps_of_one(tmp_path, monkeypatch, capsys):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "one")])
    exec(compile(SCRIPT, "script.py", "exec"), {})
    for printed in (done.stderr, capsys.readouterr().err):
        assert sum(line.startswith("epoch") for line in printed.splitlines()) == RECIPE.epochs, "one process prints"

    (one, one_result, one_weights), (two, two_result, two_weights) = (
        read(tmp_path / "one"),
        read(tmp_path / "two"),
    )
    assert len(one) == len(two) == one_result["steps"] + RECIPE.epochs == 4 * 2 + 2
    for a, b in zip(one, two, strict=True):
        assert (a["kind"], a["step"]) == (b["kind"], b["step"])
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5), (name, a["step"])
    for name in ("train_loss", "train_accuracy", "val_accuracy", "test_accuracy", "test_accuracy_last"):
        assert one_result[name] == pytest.approx(two_result[name], abs=1e-5), name
    for name, weight in one_weights.items():
        torch.testing.assert_close(two_weights[name], weight, rtol=0, atol=1e-5)


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    team = Team(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"batch_size=64 cannot be shared evenly by 3 processes"):
        Trainer(model(), load_data(limit=200), RECIPE, team)


def test_one_process_under_torchrun_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    result = fit(model(), load_data(limit=200), replace(RECIPE, epochs=1), progress=False)
    assert result.steps == 2
    assert not torch.distributed.is_initialized()

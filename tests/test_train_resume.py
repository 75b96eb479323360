"""A run that was interrupted goes on as if it had not been."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.small_runs import RECIPE, net, records, records_so_far, same_weights, without_times
from torch import nn

from nearfold.nn import Mixer
from nearfold.train import checkpoint as checkpoints
from nearfold.train import fit, trainer
from nearfold.train.distributed import Team
from nearfold.train.evaluation import measure
from nearfold.train.loop import _only_user
from nearfold.train.trainer import Trainer

VARIANTS = {
    "plain": {},
    "sgd, averaged, augmented": {
        "optimizer": "sgd",
        "ema": 0.9,
        "augment": "crop_flip",
        "label_smoothing": 0.1,
    },
    "float16": {"precision": "float16"},
    "muon, channels last": {"optimizer": "muon", "lr": 0.02, "channels_last": True, "schedule": "linear"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dies_at", [3, 6, 9])
def test_resumed_runs_reach_the_same_weights(digits, tmp_path, variant, dies_at):
    recipe = replace(RECIPE, **VARIANTS[variant])
    whole, broken, resumed = net(), net(dies_at), net()
    expected = fit(whole, digits, recipe, out=tmp_path / "whole", progress=False, log_every=2)
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        fit(broken, digits, recipe, out=out, progress=False, checkpoint_every=2, log_every=1)
    assert not same_weights(broken, whole)
    with torch.no_grad():  # what the new process starts with must not matter
        for weight in resumed.parameters():
            weight.fill_(math.nan)
    result = fit(resumed, digits, recipe, out=out, resume=True, progress=False, checkpoint_every=2, log_every=1)
    assert same_weights(resumed, whole)
    assert without_times(result.history) == without_times(expected.history)
    for name in (
        "steps",
        "best_epoch",
        "train_accuracy",
        "val_accuracy",
        "test_accuracy",
        "test_accuracy_last",
    ):
        assert getattr(result, name) == getattr(expected, name)
    steps = [(r["kind"], r["step"]) for r in records(out)]
    assert len(steps) == len(set(steps)) == result.steps + recipe.epochs
    regular = [r for r in records(out) if r["kind"] == "epoch" or r["step"] % 2 == 0]
    assert without_times(regular) == without_times(records(tmp_path / "whole"))


def test_sampled_candidates_are_resumed(digits, tmp_path):
    """The library's own random layer, averaged: its sampler is a buffer of integers."""
    recipe = replace(RECIPE, epochs=2, ema=0.9)

    def model():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            mixer = Mixer("nearest(4, cosine, random(9)) | ranked | kernel", 4, 8)
            return nn.Sequential(nn.Conv2d(1, 4, 1), mixer, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

    whole, broken, resumed = model(), model(), model()
    expected = fit(whole, digits, recipe, out=tmp_path / "whole", progress=False)
    assert whole[1].sampler[1] == expected.best_epoch * 5, "one draw a step, counted exactly"
    calls = []

    def dies(*_):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt

    broken[0].register_forward_pre_hook(dies)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, digits, recipe, out=tmp_path / "broken", progress=False, checkpoint_every=2)
    fit(resumed, digits, recipe, out=tmp_path / "broken", resume=True, progress=False)
    assert same_weights(resumed, whole)


def test_a_finished_run_is_not_trained_again(digits, tmp_path):
    first = fit(net(), digits, RECIPE, out=tmp_path, progress=False)
    model = net(dies_at=1)
    again = fit(model, digits, RECIPE, out=tmp_path, resume=True, progress=False)
    assert without_times([replace_times(again)]) == without_times([replace_times(first)])
    assert model.calls == 0


def test_an_epoch_counts_as_done_only_with_its_validation(digits, tmp_path, monkeypatch):
    """Interrupted between the last step of an epoch and the end of its validation."""
    expected = fit(net(), digits, RECIPE, progress=False)
    calls = []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(trainer, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), digits, RECIPE, out=tmp_path, progress=False, checkpoint_every=1)
    result = fit(net(), digits, RECIPE, out=tmp_path, resume=True, progress=False)
    assert without_times(result.history) == without_times(expected.history)


def test_the_loss_scale_is_resumed(digits, tmp_path):
    recipe, team = replace(RECIPE, precision="float16"), Team(0, 1, torch.device("cpu"))
    one, other = Trainer(net(), digits, recipe, team), Trainer(net(), digits, recipe, team)
    one._scaler.scale(torch.ones(1))  # it makes its state at first use
    one._scaler.update(new_scale=32.0)
    checkpoints.save(tmp_path, {}, *one.state(), team)
    other.restore(checkpoints.read(tmp_path, {}, team))
    assert other._scaler.scale(torch.ones(1)).item() == 32.0


def replace_times(result):
    return {**result.__dict__, "seconds": 0, "peak_memory_mib": 0}


def test_resume_without_a_checkpoint_starts_and_old_records_go(digits, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    result = fit(net(), digits, RECIPE, out=tmp_path, resume=True, progress=False, log_every=1)
    assert len(records(tmp_path)) == result.steps + RECIPE.epochs


def test_a_record_cut_short_is_dropped(digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(net(dies_at=8), digits, RECIPE, out=tmp_path, progress=False, log_every=1)
    path = tmp_path / "metrics.jsonl"
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 5, 6, 7]
    path.write_text(path.read_text()[:-9])
    result = fit(net(), digits, RECIPE, out=tmp_path, resume=True, progress=False, log_every=1)
    assert len(records(tmp_path)) == result.steps + RECIPE.epochs


KILLED = """
import sys, torch
from helpers.small_runs import RECIPE, net
from nearfold.train import fit, load_data
torch.set_num_threads(1)
fit(net(), load_data(limit=200), RECIPE, out=sys.argv[1], progress=False, checkpoint_every=1, log_every=1)
print("finished")
"""
SLOW = "import time\nfrom nearfold.train.trainer import Trainer\ntake = Trainer.take_step\n" + (
    "def slow(self, batches):\n    take(self, batches)\n    time.sleep(0.2)\nTrainer.take_step = slow\n"
)


@pytest.mark.slow
def test_a_killed_process_loses_nothing(digits, tmp_path):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", SLOW + KILLED, str(out)], env=environment, stdout=subprocess.PIPE)
    try:
        give_up = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or len(records_so_far(out)) < 7:
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL and b"finished" not in printed

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, resumed = net(), net()
        fit(whole, digits, RECIPE, progress=False)
        result = fit(resumed, digits, RECIPE, out=out, resume=True, progress=False, checkpoint_every=1, log_every=1)
    finally:
        torch.set_num_threads(threads)
    assert 0 < resumed.calls < result.steps
    assert same_weights(resumed, whole)
    steps = [(r["kind"], r["step"]) for r in records(out)]
    assert len(steps) == len(set(steps)) == result.steps + RECIPE.epochs
    assert not list(out.glob("*.partial"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for open files in /proc")
def test_a_run_that_has_ended_frees_its_folder_whoever_it_started(tmp_path, monkeypatch):
    """A process that was forked in the meantime has a copy of every open file, and of the lock on it."""
    monkeypatch.setattr("nearfold.train.loop._LOCK_SECONDS", 0.0)
    team = Team(0, 1, torch.device("cpu"))
    with _only_user(tmp_path, team):
        opened = [int(path.name) for path in Path("/proc/self/fd").iterdir() if path.resolve() == tmp_path.resolve()]
        copies = [os.dup(file) for file in opened]
        with pytest.raises(ValueError, match="is in use by another run"), _only_user(tmp_path, team):
            pass
    try:
        with _only_user(tmp_path, team):
            assert len(copies) == 1
    finally:
        for file in copies:
            os.close(file)

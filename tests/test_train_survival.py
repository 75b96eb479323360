"""Runs that are killed: at any moment, at the worst one, over and over."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nearfold.nn import Mixer
from nearfold.train import Recipe, checkpoint, fit, load_data, loop
from nearfold.train.distributed import Team

pytestmark = pytest.mark.slow

RECIPE = Recipe(epochs=6, batch_size=32, lr=3e-3, augment="crop_flip", ema=0.9, device="cpu")
KILLS = int(os.environ.get("NEARFOLD_KILLS", "1"))
"""How often the run under torchrun is killed: more of them take longer and prove more."""

RUN = """
import sys, time, torch
from pathlib import Path
from test_train_survival import RECIPE, data, net
from nearfold.train import fit
from nearfold.train.trainer import Trainer
torch.set_num_threads(1)
take = Trainer.take_step
def slow(self, batches):
    take(self, batches)
    time.sleep(float(sys.argv[2]))
Trainer.take_step = slow
fit(net(), data(), RECIPE, out=Path(sys.argv[1]), resume=True, progress=False, checkpoint_every=1, log_every=1,
    parallel="fsdp")
"""


def net():
    """With dropout and candidates drawn at random: what a resumed run must draw again."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = Mixer("nearest(4, cosine, random(16)) | ranked | kernel", 8)
        layers = (nn.Conv2d(1, 8, 3, padding=1), mixer, nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(512, 10))
        return nn.Sequential(*layers)


def data():
    return load_data(limit=300)


def start(out, *torchrun, code=RUN, pause=0.0):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", *torchrun, "--no-python", sys.executable] if torchrun else []
    command = [sys.executable, *launcher, "-c", code, str(out), str(pause)]
    out.mkdir(exist_ok=True)
    with open(out.with_suffix(".err"), "a") as errors:  # no pipe: orphans of a killed launcher would hold it open
        return subprocess.Popen(command, env=environment, stderr=errors)


def together(out, pause=0.0):
    return start(out, "--standalone", "--nproc-per-node=2", f"--max-restarts={KILLS}", pause=pause)


def workers_of(launcher):
    """The processes that torchrun has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def step_of(out):
    """Steps that the last checkpoint holds."""
    path = out / checkpoint.POINTER
    return json.loads(path.read_text())["facts"]["run"]["step"] if path.exists() else 0


def starts_of(out):
    """Steps that the run had done whenever it was started."""
    return json.loads((out / checkpoint.POINTER).read_text())["facts"]["run"]["starts"]


def wait_for(condition, process):
    give_up = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < give_up
        assert process.poll() is None, "it has ended before its time"
        time.sleep(0.01)


def same_weights(one, other):
    first, second = load_file(one / "weights.safetensors"), load_file(other / "weights.safetensors")
    return first.keys() == second.keys() and all(torch.equal(weight, second[name]) for name, weight in first.items())


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's processes in /proc")
def test_killed_at_random_moments(tmp_path):
    """A process, or torchrun itself, dies at a random step or while a checkpoint is written; the run comes out equal.

    Of every three deaths one is torchrun's, one comes while a checkpoint is under way.
    """
    whole, out = tmp_path / "whole", tmp_path / "killed"
    undisturbed = together(whole)
    draws = random.Random(KILLS)
    steps = RECIPE.epochs * 8
    launcher = together(out, pause=0.05)
    try:
        for death in range(KILLS):
            kind = ("worker", "launcher", "write")[death % 3]
            reached = step_of(out)
            target = min(reached + draws.randint(0, max(1, 2 * steps // (3 * KILLS))), steps - 2)
            wait_for(lambda: step_of(out) >= target and len(workers_of(launcher)) == 2, launcher)  # noqa: B023
            time.sleep(draws.random() * 0.1)
            workers = workers_of(launcher)
            if kind == "write":
                wait_for(lambda: writing(out), launcher)
            before = step_of(out)
            os.kill(launcher.pid if kind == "launcher" else draws.choice(workers), signal.SIGKILL)
            if kind == "launcher":
                launcher.wait()
                launcher = together(out, pause=0.05)
            assert step_of(out) >= before, "no step that a checkpoint holds is lost"
            wait_for(lambda: set(workers_of(launcher)).isdisjoint(workers), launcher)  # noqa: B023
        for process, folder in ((launcher, out), (undisturbed, whole)):
            assert process.wait(timeout=240) == 0, folder.with_suffix(".err").read_text()
    finally:
        for process in (launcher, undisturbed):
            process.kill()
    assert same_weights(whole, out)
    assert len(starts_of(out)) > 1, "it has been started anew"
    told = [(record["kind"], record["step"]) for record in records(out)]
    assert told == [(record["kind"], record["step"]) for record in records(whole)]


def writing(out):
    """Whether a checkpoint is being written: a folder is there that does not count yet."""
    named = json.loads((out / checkpoint.POINTER).read_text())["folder"]
    return any((out / name).exists() for name in checkpoint.FOLDERS if name != named)


DYING = """
import os, signal, sys
import torch.distributed.checkpoint as dcp
from nearfold.train import checkpoint
moment, calls = sys.argv[3], []
def die_at_the_fourth(*_):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name, that):
    real = getattr(owner, name)
    def both(*arguments, **options):
        that(*arguments)
        return real(*arguments, **options)
    setattr(owner, name, both)
def after(owner, name, that):
    real = getattr(owner, name)
    def both(*arguments, **options):
        result = real(*arguments, **options)
        that(*arguments)
        return result
    setattr(owner, name, both)
if moment == "tensors written":
    after(dcp.FileSystemWriter, "write_data", die_at_the_fourth)
if moment == "pointer written":
    before(os, "replace", lambda old, new: str(new).endswith("checkpoint.json") and die_at_the_fourth())
if moment == "pointer replaced":
    after(os, "replace", lambda old, new: str(new).endswith("checkpoint.json") and die_at_the_fourth())
sys.argv[1:] = sys.argv[1:3]
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The undisturbed run of one process."""
    out = tmp_path_factory.mktemp("alone")
    fit(net(), data(), RECIPE, out=out, progress=False, log_every=1)
    return out


@pytest.mark.parametrize(
    ("moment", "step"),
    [("tensors written", 3), ("pointer written", 3), ("pointer replaced", 4)],
)
def test_death_while_a_checkpoint_is_written(tmp_path, alone, moment, step):
    out = tmp_path / "run"
    code = DYING.replace("sys.argv[3]", repr(moment)) + RUN
    process = start(out, code=code)
    assert process.wait(timeout=120) == -signal.SIGKILL, out.with_suffix(".err").read_text()
    assert step_of(out) == step
    assert writing(out), "what the dead process left behind"
    fit(net(), data(), RECIPE, out=out, resume=True, progress=False, log_every=1, checkpoint_every=1)
    assert starts_of(out) == [0, step]
    assert same_weights(alone, out)
    assert not writing(out)


def test_a_file_that_may_not_grow(tmp_path, alone):
    """The system refuses to write, in the midst of a tensor: the last checkpoint stays, and the run goes on from it."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = net()
    calls = []

    def limit(module, _):
        calls.append(module.training)
        if sum(calls) == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    model[0].register_forward_pre_hook(limit)
    try:
        with pytest.raises(OSError, match=r"no checkpoint could be written to .*File too large.*last one is kept"):
            fit(model, data(), RECIPE, out=tmp_path, progress=False, checkpoint_every=2, log_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert step_of(tmp_path) == 4
    assert not writing(tmp_path)
    fit(net(), data(), RECIPE, out=tmp_path, resume=True, progress=False, log_every=1)
    assert same_weights(alone, tmp_path)


def test_processes_that_torchrun_starts_anew_go_on(tmp_path, monkeypatch):
    recipe = replace(RECIPE, epochs=1)
    fit(net(), data(), recipe, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds a run already"):
        fit(net(), data(), recipe, out=tmp_path, progress=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert fit(net(), data(), recipe, out=tmp_path, progress=False).steps == 8


def test_one_run_at_a_time_uses_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_LOCK_SECONDS", 0.2)
    alone = Team(0, 1, torch.device("cpu"))
    with (
        loop._only_user(tmp_path, alone),
        pytest.raises(ValueError, match="is in use by another run: wait for its end, or name another folder"),
    ):
        fit(net(), data(), RECIPE, out=tmp_path, progress=False)
    with loop._only_user(tmp_path, alone):
        pass

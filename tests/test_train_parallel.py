"""One process, two that each hold the model, two that divide it, two machines: the same training."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nearfold.nn import Mixer
from nearfold.train import Recipe, evaluate, fit, load_data
from nearfold.train.distributed import Team, _agree_on_start
from nearfold.train.trainer import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed"),
]

RECIPE = Recipe(epochs=2, batch_size=48, lr=3e-3, augment="crop_flip", label_smoothing=0.1, device="cpu")
SGD = replace(RECIPE, optimizer="sgd", lr=0.05, clip_grad_norm=0.0)  # the size of the gradient counts
RECIPES = {
    "plain": SGD,
    "in two parts": replace(SGD, accumulate=2),
    "mixed": replace(RECIPE, accumulate=2, mixup=0.4, cutmix=1.0, ema=0.9),
    "short": replace(RECIPE, epochs=1),
    "float16": replace(RECIPE, precision="float16", epochs=1),
    "bfloat16": replace(RECIPE, precision="bfloat16", epochs=1),
}

SPARED = {"ddp": ("in two parts", "float16", "bfloat16"), "fsdp": ("in two parts",)}
"""What several processes need not do: "mixed" is in two parts too."""


class Net(nn.Module):
    """The library's layers in blocks; parameters outside of them, one of which two processes cannot halve."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        operations = ("a*(window(3) | box | kernel) + b*(all | row | softmax(heads=2))", "window(5) | box | depthwise")
        self.blocks = nn.ModuleList(Mixer(operation, 8) for operation in operations)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(512, 10))

    def forward(self, images):
        images = self.gain * self.stem(images)
        for block in self.blocks:
            images = images + nn.functional.gelu(block(images))
        return self.head(images)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(int(os.environ.get("RANK", "0")))  # the first process's weights must count
        return Net()


def data():
    return load_data(limit=700)


def train_all(out, parallel):
    """What every process of a launch does: all recipes, then one whose second checkpoint cannot be written."""
    options = {"log_every": 1, "parallel": parallel, "progress": False}
    for name, recipe in RECIPES.items():
        if "RANK" in os.environ and name in SPARED[parallel]:
            continue
        model = net()
        result = fit(model, data(), recipe, out=out / name, **options)
        assert all(type(tensor) in (nn.Parameter, torch.Tensor) for tensor in model.state_dict(keep_vars=True).values())
        assert evaluate(model, data().test, data())[1] == pytest.approx(result.test_accuracy, abs=0.02)
    with (
        full_disk(after=1),
        pytest.raises(OSError, match=r"no checkpoint could be written to .*No space left.*the last one is kept"),
    ):
        fit(net(), data(), RECIPES["short"], out=out / "full", checkpoint_every=5, **options)
    fit(net(), data(), RECIPES["short"], out=out / "full", resume=True, **options)


def end_at_once(out, parallel):
    """Train, then end right after a collective."""
    fit(net(), data(), RECIPES["short"], out=out, parallel=parallel, progress=False)
    for _ in range(20):
        torch.distributed.all_reduce(torch.ones(3))
        torch.distributed.barrier()


@contextmanager
def full_disk(after):
    """Let the last process write `after` checkpoints, then none."""
    from torch.distributed.checkpoint import FileSystemWriter

    write, calls = FileSystemWriter.write_data, []
    is_last = os.environ.get("LOCAL_RANK") in (None, "1")

    def limited(*arguments):
        calls.append(1)
        if is_last and len(calls) > after:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    FileSystemWriter.write_data = limited
    try:
        yield
    finally:
        FileSystemWriter.write_data = write


def train_until(out, parallel, last):
    """Go on with a run until its end, or until it has a checkpoint of step `last`."""
    recipe = replace(RECIPE, ema=0.9, mixup=0.2)
    take = Trainer.take_step

    def stopping(self, batches):
        if self.run.step == last:
            raise KeyboardInterrupt
        take(self, batches)

    Trainer.take_step = stopping
    try:
        fit(
            net(),
            data(),
            recipe,
            out=out,
            resume=True,
            parallel=parallel,
            checkpoint_every=1,
            log_every=1,
            progress=False,
        )
    except KeyboardInterrupt:
        return
    finally:
        Trainer.take_step = take


def start(code, *torchrun):
    """Start Python on code that knows this module as `tests`, under torchrun."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    script = f"from pathlib import Path\nimport test_train_parallel as tests\n{code}\n"
    command = ["-m", "torch.distributed.run", *torchrun, "--no-python", sys.executable, "-c", script]
    return subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return errors


def launch(count, function, out, *arguments):
    """Call a function of this module with a folder and more, in so many processes that train together."""
    if count == 1:
        function(out, *arguments)
        return
    rest = ", ".join(map(repr, arguments))
    options = ("--standalone", f"--nproc-per-node={count}")
    finish(start(f"tests.{function.__name__}(Path({str(out)!r}), {rest})", *options))


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["train_loss"] for record in records if record["kind"] == "step"]


def agree(one, other, error=1e-5):
    assert losses(one) == pytest.approx(losses(other), abs=error)
    first, second = (json.loads((out / "result.json").read_text()) for out in (one, other))
    for name in ("val_accuracy", "test_accuracy", "train_accuracy", "train_accuracy_last", "steps", "epochs"):
        assert first[name] == pytest.approx(second[name], abs=1e-9), name
    weights = load_file(other / "weights.safetensors")
    for name, weight in load_file(one / "weights.safetensors").items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=20 * error)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every recipe by one process, by two with DDP, by two with FSDP2."""
    out = tmp_path_factory.mktemp("runs")
    for name, count, parallel in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        launch(count, train_all, out / name, parallel)
    return out


@pytest.mark.parametrize("name", ["plain", "mixed"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(runs, how, name):
    assert len(losses(runs / "one" / name)) == 26
    agree(runs / "one" / name, runs / how / name)


def test_parts_of_a_batch_train_as_the_whole(runs):
    agree(runs / "one" / "plain", runs / "one" / "in two parts")
    assert losses(runs / "one" / "plain") != losses(runs / "one" / "mixed")


@pytest.mark.parametrize(("name", "error"), [("float16", 5e-3), ("bfloat16", 5e-2)])
def test_divided_weights_are_trained_in_every_precision(runs, name, error):
    assert losses(runs / "fsdp" / name) == pytest.approx(losses(runs / "one" / name), abs=error)


@pytest.mark.parametrize("how", ["one", "ddp", "fsdp"])
def test_a_full_disk_of_one_process_stops_all_and_leaves_the_last_checkpoint(runs, how):
    agree(runs / "one" / "short", runs / how / "full")


def test_a_checkpoint_serves_any_number_of_processes(tmp_path):
    chain = ((1, "ddp", 4), (3, "fsdp", 15), (2, "ddp", 21), (1, "ddp", -1))
    for count, parallel, last in chain:  # from step 13 on there are best weights so far, which must be kept too
        launch(count, train_until, tmp_path / "chain", parallel, last)
    train_until(tmp_path / "whole", "ddp", -1)
    agree(tmp_path / "whole", tmp_path / "chain")


def test_two_machines(tmp_path, runs):
    """As far as one machine can rehearse it: two agents of torchrun that meet at an address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=rehearsal")
    code = f"tests.fit(tests.net(), tests.data(), tests.SGD, out=Path({str(out)!r}), log_every=1, parallel='fsdp')"
    agents = [start(code, *options, f"--node-rank={n}", f"--rdzv-endpoint=localhost:{port}") for n in (0, 1)]
    printed = [finish(agent).count("epoch 2/2") for agent in agents]
    assert sorted(printed) == [0, 1]
    agree(out, runs / "one" / "plain")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_end_of_a_run_is_no_crash(parallel, tmp_path):
    """torch's threads drop Python objects after the last collective, here only when the main thread waits."""
    call = f"tests.end_at_once(Path({str(tmp_path / 'run')!r}), {parallel!r})"
    finish(start(f"import sys; sys.setswitchinterval(1000); {call}", "--standalone", "--nproc-per-node=2"))


def test_a_scalar_parameter_cannot_be_divided():
    model = nn.Linear(64, 10)
    model.rate = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"parallel='fsdp' cannot divide the scalar parameter 'rate'"):
        Team(0, 2, torch.device("cpu")).shard(model)


def test_processes_started_anew_find_each_other_and_not_the_dead():
    """The store of torchrun survives a start, and with it what the processes of that start have left there."""
    store = torch.distributed.HashStore()
    names = []
    with ThreadPoolExecutor(3) as threads:
        for late in (0, 1, 2, 0):
            joined = [None] * 3
            for rank in sorted(range(3), key=lambda rank: rank == late):
                if rank == late:
                    time.sleep(0.1)  # meanwhile the others see only what it left there the last time
                    assert not any(place and place.done() for place in joined)
                joined[rank] = threads.submit(_agree_on_start, store, rank, 3)
            names.append({place.result(timeout=30) for place in joined})
    assert all(len(agreed) == 1 for agreed in names)
    assert len(set.union(*names)) == 4

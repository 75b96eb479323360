"""Who does the runs, and what is left when processes die. The tasks are real: small networks on some digits."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nearfold.recipes.generated import write
from nearfold.study import engine, tasks
from nearfold.study import store as store_module
from nearfold.study.checked import FIELDS
from nearfold.study.engine import attempt, work_through
from nearfold.study.grid import Data, Study, Trial
from nearfold.study.local import Local
from nearfold.study.plan import plan
from nearfold.study.store import Store
from nearfold.train import Recipe, fit, open_data

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("NEARFOLD_KILLS", "1"))
"""Of the launcher and of a worker, each; more in a test of its own."""


def a_study(epochs=1, seeds=2, widths=(4, 6)):
    trials = [
        Trial(
            {"data": "digits", "width": float(width)},
            {"name": "plain", "operation": "window(3) | box | kernel", "width": width},
            Data("digits", limit=60),
            Recipe(epochs=epochs, batch_size=18, lr=2e-3, warmup_epochs=0, device="cpu"),
        )
        for width in widths
    ]
    return Study("widths", "cpu", "Widths", "?", "-", trials, seeds, "width", 4.0)


def open_plan(root, **options):
    return plan(a_study(**options), root / "store", {})


def outcomes(store):
    """What the store has of every run, but for times."""
    found = {}
    for path in (store / "runs").glob("*.json"):
        result = json.loads(path.read_text())["result"]
        assert path.stem not in found
        found[path.stem] = {name: result[name] for name in ("train_loss", "test_accuracy", "val_accuracy", "steps")}
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    planned = open_plan(root)
    work_through(planned.runs, planned.place, Local(1), say=lambda line: None)
    return outcomes(root / "store")


def test_one_process_and_several_find_the_same(tmp_path, undisturbed):
    planned = open_plan(tmp_path)
    lines = []
    work_through(planned.runs, planned.place, Local(2), say=lines.append)
    assert len(lines) == 1 + 4 and outcomes(tmp_path / "store") == undisturbed
    work_through(planned.runs, planned.place, Local(2), say=lines.append)
    assert "4 of 4 runs have finished before, 0 to do" in lines[-1]


def test_data_too_large_for_memory_are_streamed(tmp_path):
    write(tmp_path / "images", "folder", count=60, size=24)
    data = Data("textures", image_size=16, validation=0.2, stream=True)
    recipe = Recipe(epochs=2, batch_size=12, warmup_epochs=0, augment="resized_crop", device="cpu")
    network = {"name": "plain", "operation": "window(3) | box | kernel", "width": 4}
    study = Study(
        "s", "paper", "T", "?", "-", [Trial({"data": "textures", "x": 1.0}, network, data, recipe)], 1, "x", 1.0
    )
    sources = {"textures": str(tmp_path / "images")}
    planned = plan(study, tmp_path / "store", sources, resumable=True, workers=1)
    work_through(planned.runs, planned.place, Local(1), say=lambda line: None)
    (row,) = planned.results.rows
    assert "46 to train on, 14 held out" in planned.facts[0]
    torch.manual_seed(0)
    opened = open_data(tmp_path / "images", image_size=16, validation=0.2)
    direct = fit(tasks.build(network, opened), opened, recipe, progress=False)
    assert row.results[0]["train_loss"] == direct.train_loss and row.results[0]["steps"] == direct.steps == 6
    costs = plan(replace(study, cost=True), tmp_path / "store", sources)
    assert "costs are measured on data that are held in memory" in (attempt(costs.runs[0], costs.place).error)
    with pytest.raises(ValueError, match="'textures' that are streamed need an image_size and take no limit"):
        replace(data, limit=3)


def test_a_run_that_somebody_else_does_is_waited_for(tmp_path, monkeypatch):
    planned = open_plan(tmp_path)
    store, first = Store(planned.place.root), planned.runs[0]
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.05)
    naps, theirs = [], dict.fromkeys(FIELDS["train"], 1) | {"test_accuracy": 0.5}

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:  # meanwhile, somebody else has finished
            store.save(first.config, theirs)
            claim.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", nap)
    claim = store.claim(first.config)
    assert claim.__enter__() is True
    with store.claim(first.config) as ours:
        assert not ours
    assert attempt(first, planned.place).result is None
    lines = []
    work_through(planned.runs, planned.place, Local(1), say=lines.append)
    assert naps == [0.05] * 3 and len(lines) == 1 + 4
    assert store.load(first.config) == theirs


def test_what_is_measured_has_the_machine_to_itself(tmp_path, monkeypatch):
    planned, order = plan(replace(a_study(), cost=True), tmp_path / "store", {}), []

    class Others:
        def outcomes(self, runs, place):
            order.extend("engine" for _ in runs)
            return (attempt(run, place) for run in runs)

    for name, works in tasks.TASKS.items():
        monkeypatch.setitem(tasks.TASKS, name, lambda *a, name=name, works=works: order.append(name) or works(*a))
    work_through(planned.runs, planned.place, Others(), say=lambda line: None)
    assert order == ["cost"] * 2 + ["engine"] * 4 + ["train"] * 4


def test_a_failed_run_is_left_until_asked_for(tmp_path, monkeypatch):
    planned = open_plan(tmp_path)

    def fails(*_):
        raise RuntimeError("no memory left")

    works = tasks.TASKS["train"]
    monkeypatch.setitem(tasks.TASKS, "train", fails)
    lines = []
    work_through(planned.runs, planned.place, Local(1), say=lines.append)
    assert sum("FAILED: RuntimeError: no memory left" in line for line in lines) == 4
    assert len(planned.results.failures) == 4 and planned.results.rows == []
    monkeypatch.setitem(tasks.TASKS, "train", works)
    work_through(planned.runs, planned.place, Local(1), say=lines.append)
    assert "0 to do" in lines[-1] and "4 failed before and are left: --retry" in lines[-1]
    work_through(planned.runs, planned.place, Local(1), retry=True, say=lines.append)
    assert planned.results.failures == [] and planned.results.finished == 4


def test_a_full_disk_is_said_and_what_has_finished_stays(tmp_path, monkeypatch):
    planned = open_plan(tmp_path)
    writes = []

    def write(path, content):
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        writes.append(path)
        return works(path, content)

    works = store_module.write_whole
    monkeypatch.setattr(store_module, "write_whole", write)
    lines = []
    work_through(planned.runs, planned.place, Local(1), say=lines.append)
    assert sum("No space left on device" in line for line in lines) == 2 and len(lines) == 5
    assert len(outcomes(tmp_path / "store")) == 2
    monkeypatch.setattr(store_module, "write_whole", works)
    work_through(planned.runs, planned.place, Local(1), say=lines.append)
    assert "2 of 4 runs have finished before, 2 to do" in lines[5] and len(outcomes(tmp_path / "store")) == 4


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from nearfold.study.store import run_key
from nearfold.study.ray import Ray
from test_study_engine import open_plan, work_through, Local, tasks

def train(config, *rest, works=tasks.TASKS["train"]):
    with open(Path(sys.argv[1]) / "trained", "a") as file:
        file.write(run_key(config) + "\\n")
    return works(config, *rest)

if __name__ == "__main__":
    tasks.TASKS["train"] = train  # of this process
    planned = open_plan(Path(sys.argv[1]), epochs={epochs})
    work_through(planned.runs, planned.place, {engine}, retry=True)
"""


def launch(root, engine="Local(2)", epochs=1):
    script = root / "study.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), engine=engine, epochs=epochs))
    return subprocess.Popen(
        [sys.executable, str(script), str(root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def children(pid):
    """Processes of a launcher that work on runs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                command = Path(f"/proc/{child}/cmdline").read_text()
            except OSError:
                continue
            if "spawn_main" in command:
                found.append(int(child))
    return found


def alive(pid):
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")


@needs_proc
def test_killed_launchers_and_workers_lose_nothing_that_has_finished(tmp_path, undisturbed):
    """kill -9, again and again, at moments spread over a start and its first runs, then once to the end."""
    store = tmp_path / "store"
    deaths = 0
    for attempt_number in range(2 * KILLS):
        process = launch(tmp_path)
        deadline = time.monotonic() + 60
        while not (workers := children(process.pid)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3 + 2.5 * ((attempt_number * 0.618) % 1))  # anywhere from imports to the last run
        before = outcomes(store)
        if attempt_number % 2 and workers and process.poll() is None:
            if alive(workers[0]):
                os.kill(workers[0], signal.SIGKILL)
                deaths += 1
            process.communicate(timeout=120)
        elif process.poll() is None:
            process.kill()
            process.communicate(timeout=60)
            deaths += 1
            for worker in workers:  # they notice, and end
                limit = time.monotonic() + 20
                while alive(worker):
                    assert time.monotonic() < limit, "a worker outlives its launcher"
                    time.sleep(0.05)
        assert before.items() <= outcomes(store).items()
    text, _ = launch(tmp_path).communicate(timeout=240)
    assert outcomes(store) == undisturbed, text
    assert list((store / "failed").glob("*.json")) == []
    assert deaths > 0


@needs_proc
def test_workers_end_with_their_launcher_in_the_middle_of_a_run(tmp_path):
    process = launch(tmp_path, epochs=100_000)
    workers = []
    try:
        wait_until(lambda: len(list((tmp_path / "store").glob("claims/*"))) == 2 or process.poll() is not None)
        workers = children(process.pid)
        process.kill()
        assert len(workers) == 2
        wait_until(lambda: not any(map(alive, workers)), seconds=20)
    finally:
        process.kill()
        for worker in filter(alive, workers):
            os.kill(worker, signal.SIGKILL)
        process.communicate(timeout=60)


@needs_proc
def test_a_killed_worker_is_recorded_with_the_reason_and_the_others_go_on(tmp_path):
    planned = open_plan(tmp_path, epochs=400, seeds=1)  # long enough to be caught
    short = open_plan(tmp_path, seeds=1)
    generator = Local(2).outcomes([*planned.runs[:1], *short.runs], planned.place)

    def kill():
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            for child in children(os.getpid()):
                claimed = list((planned.place.root / "claims").glob("*"))
                if len(claimed) == 3 and len(list((planned.place.root / "runs").glob("*"))) == 2:
                    os.kill(child, signal.SIGKILL)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    found = list(generator)
    thread.join()
    assert sorted(bool(outcome.result) for outcome in found) == [False, True, True]
    (died,) = (outcome for outcome in found if outcome.error)
    assert died.run == planned.runs[0] and "ended by SIGKILL" in died.error
    assert "SIGKILL" in str(Store(planned.place.root).failure(died.run.config))
    with Store(planned.place.root).claim(died.run.config) as ours:
        assert ours  # its claim ended with it


def test_two_engines_share_a_store_and_do_every_run_once(tmp_path, undisturbed):
    both = [launch(tmp_path, "Local(1)") for _ in range(2)]
    texts = [process.communicate(timeout=240)[0] for process in both]
    assert outcomes(tmp_path / "store") == undisturbed, texts
    assert sorted((tmp_path / "trained").read_text().split()) == sorted(undisturbed), texts


def test_data_that_changed_or_are_missing_are_said(tmp_path):
    planned = open_plan(tmp_path)
    config = json.loads(json.dumps(planned.runs[0].config))
    config["data"]["fingerprint"]["train"][0] += 1
    with pytest.raises(ValueError, match="is not the one that this run was planned with"):
        tasks.data_of(config, {})
    with pytest.raises(ValueError, match=r"where is the data set 'cifar10'.*--data cifar10=FOLDER"):
        tasks.source_of("cifar10", {})


def at_work():
    """Processes of a Ray cluster that work on runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith("ray::_attempt_there"):
                found.append(int(path.parent.name))
    return found


def wait_until(happens, seconds=90):
    limit = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < limit, "it does not happen"
        time.sleep(0.02)


@needs_proc
def test_a_ray_cluster_of_two_nodes_whose_launcher_and_workers_are_killed(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or workers starve beside other tests
    from ray.cluster_utils import Cluster

    from nearfold.study.ray import Ray

    here = open_plan(tmp_path / "here", epochs=30)
    work_through(here.runs, here.place, Local(1), say=lambda line: None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        store = tmp_path / "store"
        launcher = launch(tmp_path, f"Ray({cluster.address!r})", epochs=30)
        wait_until(lambda: (outcomes(store) and at_work()) or launcher.poll() is not None)
        launcher.kill()
        launcher.communicate(timeout=60)
        before = outcomes(store)
        wait_until(lambda: not at_work())  # they end with their launcher
        planned, lines = open_plan(tmp_path, epochs=30), []
        arguments = (planned.runs, planned.place, Ray(cluster.address))
        second = threading.Thread(target=work_through, args=arguments, kwargs={"say": lines.append}, daemon=True)
        second.start()
        wait_until(lambda: at_work() or not second.is_alive())
        for pid in at_work():
            os.kill(pid, signal.SIGKILL)
        second.join(timeout=240)
        assert not second.is_alive(), f"the cluster does not go on: {lines}"
        assert any("the process was ended on the cluster" in line for line in lines), lines
        work_through(*arguments, retry=True, say=lines.append)
        assert 0 < len(before) < 4 and before.items() <= outcomes(store).items()
        assert outcomes(store) == outcomes(tmp_path / "here" / "store"), lines
        config = dict(planned.runs[0].config) | {"task": "no such task"}
        bad = planned.runs[0].__class__(config, "bad", "bad")
        (outcome,) = Ray(cluster.address).outcomes([bad], planned.place)
        assert "no such task" in outcome.error
        monkeypatch.setattr("nearfold.study.ray.PATIENCE_SECONDS", 1.0)
        with pytest.raises(ValueError, match=r"1 runs wait for a node with 64 cores.*has had none: start one"):
            list(Ray(cluster.address, cpus=64).outcomes(planned.runs[:1], planned.place))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_no_ray_cluster_is_said_in_one_line():
    pytest.importorskip("ray")
    from nearfold.study.ray import connect

    with pytest.raises(ValueError, match=r"no Ray cluster answers at --address '127.0.0.1:1'.*ray start"):
        connect("127.0.0.1:1")

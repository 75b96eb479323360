import json
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
from torch import nn

from nearfold.nn import Mixer
from nearfold.train import (
    Diverged,
    ImageData,
    Recipe,
    Split,
    evaluate,
    fit,
    load_data,
    load_weights,
    loop,
    optimizer,
    prepare,
    save_weights,
    trainer,
)
from nearfold.train import checkpoint as checkpoints
from nearfold.train.distributed import Team
from nearfold.train.evaluation import measure
from nearfold.train.loop import _only_user
from nearfold.train.mix import draw_mix, mixed
from nearfold.train.seeds import generator
from nearfold.train.trainer import Trainer

RECIPE = Recipe(epochs=3, batch_size=32, lr=3e-3, device="cpu", warmup_epochs=0.5)


@pytest.fixture(scope="module")
def data():
    return load_data(limit=200)


class Net(nn.Module):
    """Everything a run must carry: dropout, batch statistics, an index table, a generator of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        self.register_buffer("table", torch.arange(11))
        self.sampler = torch.Generator()
        self.dies_at = None  # training calls after which a call raises
        self.calls = 0

    def forward(self, images):
        if self.training:
            self.calls += 1
            if self.calls == self.dies_at:
                raise KeyboardInterrupt
            images = images + 0.05 * torch.randn(images.shape, generator=self.sampler)
        return self.layers(images)


def net(dies_at=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    model.dies_at = dies_at
    return model


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(things):
    def is_time(name):
        return name in ("images_per_second", "data_wait") or name.startswith("seconds_")

    return [{k: v for k, v in thing.items() if not is_time(k)} for thing in things]


# Learning, and what is measured.


def test_a_small_network_learns_the_digits(tmp_path):
    data = load_data()
    model = net()
    result = fit(model, data, replace(RECIPE, epochs=4), out=tmp_path / "run", progress=False, log_every=10)
    assert result.test_accuracy > 0.9 and result.train_accuracy > 0.93 and result.train_loss < 0.3
    assert (result.epochs, result.steps) == (4, 4 * (len(data.train) // 32))
    assert result.images_per_second > 0 and result.seconds > 0 and result.peak_memory_mib >= 0
    assert not model.training

    assert result.test_accuracy == evaluate(model, data.test, data)[1]
    loss, accuracy = evaluate(model, data.train, data)
    assert (loss, accuracy) == (pytest.approx(result.train_loss, rel=1e-5), result.train_accuracy)
    best = result.history[result.best_epoch - 1]
    assert result.val_accuracy == best["val_accuracy"] == max(r["val_accuracy"] for r in result.history)

    out = tmp_path / "run"
    files = {"recipe.json", "metrics.jsonl", "checkpoint.json", "weights.safetensors", "result.json"}
    kept = json.loads((out / "checkpoint.json").read_text())["folder"]
    assert {path.name for path in out.iterdir()} == files | {kept}
    assert Recipe.from_dict(json.loads((out / "recipe.json").read_text())) == replace(RECIPE, epochs=4)
    assert json.loads((out / "result.json").read_text()) == result.__dict__
    assert [r for r in records(out) if r["kind"] == "epoch"] == result.history
    for record in records(out):
        phases = [record[f"seconds_{phase}"] for phase in ("data", "forward", "backward", "optimizer")]
        assert min(phases) > 0 and record["data_wait"] == pytest.approx(phases[0] / sum(phases))
        if record["kind"] == "step":
            assert record["images_per_second"] == pytest.approx(32 / sum(phases))
    steps = [r["step"] for r in records(out) if r["kind"] == "step"]
    assert steps == list(range(10, result.steps + 1, 10))
    other = Net()
    load_weights(other, out / "weights.safetensors")
    assert same_weights(other, model)


def test_prepare_and_evaluate_by_hand(data):
    model = net()
    model.train()
    images = prepare(data.test.images, data)
    expected = (data.test.images.float() / 255 - data.mean[:, None, None]) / data.std[:, None, None]
    torch.testing.assert_close(images, expected)
    loss, accuracy = evaluate(model, data.test, data, batch_size=7)
    assert model.training
    model.eval()
    logits = model(images)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, data.test.labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == data.test.labels).float().mean().item())


def test_the_same_run_twice_is_the_same_and_leaves_global_randomness_alone(data):
    one, other = net(), net()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fit(one, data, RECIPE, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = fit(other, data, RECIPE, progress=False)
    assert same_weights(one, other)
    assert without_times(first.history) == without_times(second.history)
    third = net()
    fit(third, data, replace(RECIPE, seed=1), progress=False)
    assert not same_weights(one, third)


def test_the_test_images_decide_nothing_and_are_looked_at_once(data, monkeypatch):
    seen = []

    def spy(model, batches, count, *rest, **options):
        seen.append(count)
        return measure(model, batches, count, *rest, **options)

    monkeypatch.setattr(trainer, "measure", spy)
    wrong = Split(data.test.images, (data.test.labels + 1) % 10)
    one, other = net(), net()
    first = fit(one, data, RECIPE, progress=False)
    second = fit(other, replace(data, test=wrong), RECIPE, progress=False)
    assert same_weights(one, other)
    assert first.best_epoch == second.best_epoch and first.test_accuracy != second.test_accuracy
    before_the_end = seen[: RECIPE.epochs]
    assert set(before_the_end) == {len(data.val)}
    assert len(data.val) != len(data.test) != len(data.train)


def test_the_best_epoch_by_accuracy_then_loss_is_kept(data, monkeypatch):
    outcomes = iter([(0.9, 0.5), (0.8, 0.7), (0.6, 0.7), (0.6, 0.7), (0.5, 0.6)])
    kept = []

    def told(model, batches, count, *rest, **options):
        if count != len(data.val):
            return measure(model, batches, count, *rest, **options)
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(outcomes)

    monkeypatch.setattr(trainer, "measure", told)
    model = net()
    result = fit(model, data, replace(RECIPE, epochs=5), progress=False)
    assert (result.best_epoch, result.val_accuracy) == (3, 0.7)
    assert all(torch.equal(value, kept[2][name]) for name, value in model.state_dict().items())
    last = net()
    last.load_state_dict(kept[4])
    assert result.test_accuracy_last == evaluate(last, data.test, data)[1]
    assert result.test_accuracy == evaluate(model, data.test, data)[1]


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-6), ("float16", 1e-4)])
def test_one_step_is_the_textbook_step(data, precision, error):
    recipe = Recipe(
        epochs=1, batch_size=len(data.train), optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0,
        warmup_epochs=0, label_smoothing=0.1, clip_grad_norm=0.5, device="cpu",
        precision=precision,
    )  # fmt: skip
    model, expected = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Linear(64, 10)
    expected.load_state_dict(model[1].state_dict())
    logits = expected(prepare(data.train.images, data).flatten(1))
    loss = nn.functional.cross_entropy(logits, data.train.labels, label_smoothing=0.1)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum() for p in expected.parameters()))
    assert norm > 0.5, "clipping must have something to do"
    result = fit(model, data, recipe, progress=False)
    assert result.history[0]["train_loss"] == pytest.approx(loss.item(), rel=100 * error)
    for trained, before in zip(model[1].parameters(), expected.parameters(), strict=True):
        textbook = before - 0.1 * before.grad * 0.5 / norm
        torch.testing.assert_close(trained, textbook, rtol=10 * error, atol=error)


def test_every_image_is_seen_once_an_epoch_in_another_order(data):
    seen = []

    class Spy(nn.Linear):
        def forward(self, images):
            if self.training:
                seen.append(images.detach().flatten(1))
            return super().forward(images.flatten(1))

    recipe = replace(RECIPE, epochs=2, batch_size=20)
    fit(Spy(64, 10), data, recipe, progress=False)
    first, second = torch.cat(seen[:9]), torch.cat(seen[9:])
    assert len(first) == len(second) == 180 == len(data.train)
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert sorted(epoch.sum(1).tolist()) == pytest.approx(
            sorted(prepare(data.train.images, data).flatten(1).sum(1).tolist()), abs=1e-3
        )


def test_averaged_weights_are_those_that_are_kept(data):
    """One epoch: what is kept is the average of the weights after every step, by hand."""
    snapshots = []

    class Spy(nn.Linear):
        def __init__(self):
            super().__init__(64, 10)

        def forward(self, images):
            if self.training:
                snapshots.append(self.weight.detach().clone())
            return super().forward(images.flatten(1))

    recipe = replace(RECIPE, epochs=1, ema=0.5, batch_size=18)
    model, live = Spy(), Spy()
    live.load_state_dict(model.state_dict())
    fit(live, data, replace(recipe, ema=0.0), progress=False)
    snapshots.clear()
    fit(model, data, recipe, progress=False)
    weights = [*snapshots[1:], live.weight.detach()]
    average = weights[0]
    for step, weight in enumerate(weights[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.weight.detach(), average)


def test_integers_are_not_averaged():
    """Torch's average of 3 and 3 is 2, at this decay: fatal to a table of indices."""
    averaged, current = [torch.arange(9)], [torch.arange(9)]
    optimizer.average(0.9)(averaged, current, 1)
    assert torch.equal(averaged[0], torch.arange(9))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_computes_in_it_and_learns(data, precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    types = set()
    model[1].register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    result = fit(model, data, replace(RECIPE, precision=precision, lr=0.03), progress=False)
    assert types == {getattr(torch, precision)}
    assert model[1].weight.dtype == torch.float32
    assert result.train_accuracy > 0.9


def test_fewer_images_than_a_batch_are_one_batch(data):
    result = fit(net(), data, replace(RECIPE, batch_size=4096), progress=False)
    assert result.steps == RECIPE.epochs


def test_parts_of_a_batch_are_one_step(data):
    # sgd without clipping: the size of the gradient counts
    recipe = replace(RECIPE, epochs=2, batch_size=36, cutmix=1.0, optimizer="sgd", lr=0.05, clip_grad_norm=0.0)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    parted = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    parted.load_state_dict(whole.state_dict())
    seen = []
    parted[1].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])) if module.training else None)
    one = fit(whole, data, recipe, progress=False)
    other = fit(parted, data, replace(recipe, accumulate=3), progress=False)
    assert set(seen) == {12} and len(seen) == 3 * other.steps == 3 * one.steps
    assert [r["train_loss"] for r in one.history] == pytest.approx([r["train_loss"] for r in other.history], abs=1e-6)
    torch.testing.assert_close(whole[1].weight, parted[1].weight, rtol=0, atol=1e-5)


def test_mixed_images_have_mixed_labels(data):
    """At a rate of nearly zero, the loss of a step is that of the initial weights on its mixed images."""
    recipe = Recipe(epochs=1, batch_size=180, lr=1e-9, warmup_epochs=0, mixup=0.8, label_smoothing=0.1, device="cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    order = torch.randperm(180, generator=generator(0, "order", 0))
    images, labels = prepare(data.train.images[order], data), data.train.labels[order]
    mix = draw_mix(recipe, 0, 8, 8)
    with torch.no_grad():
        logits = model(mixed(mix, images, labels, 10)[0])
    own, partners = nn.functional.one_hot(labels, 10), nn.functional.one_hot(labels, 10).view(90, 2, 10).flip(1)
    targets = 0.9 * (mix.share * own + (1 - mix.share) * partners.reshape(180, 10)) + 0.01
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    result = fit(model, data, recipe, progress=False)
    assert result.history[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    stronger = labels if mix.share > 0.5 else labels.view(90, 2).flip(1).flatten()
    assert result.history[0]["train_accuracy"] == pytest.approx((logits.argmax(1) == stronger).float().mean().item())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"accumulate": 3},
            "batch_size=32 cannot be shared evenly by 1 processes in 3 parts each: use a multiple of 3",
        ),
        ({"batch_size": 33, "mixup": 0.1}, r"in pairs of images \(mixup, cutmix\): use a multiple of 2"),
        ({"batch_size": 1024, "accumulate": 512}, "180 training images are too few for .* 512 parts"),
    ],
)
def test_batches_that_cannot_be_parted(data, fields, says):
    with pytest.raises(ValueError, match=says):
        fit(net(), data, replace(RECIPE, **fields), progress=False)


def test_a_run_ends_when_the_training_images_are_learned(data, tmp_path):
    recipe = replace(RECIPE, epochs=40, until=0.9, schedule="constant")
    model = net()
    result = fit(model, data, recipe, out=tmp_path, progress=False)
    reached = [record["train_accuracy_evaluated"] for record in result.history]
    assert len(reached) == result.epochs < 40 and result.steps == 5 * result.epochs
    assert reached[-1] >= 0.9 and all(accuracy < 0.9 for accuracy in reached[:-1])
    assert result.train_accuracy_last == reached[-1]
    kept = reached[result.best_epoch - 1]
    assert result.train_accuracy == kept == evaluate(model, data.train, data)[1]
    again = fit(net(dies_at=1), data, recipe, out=tmp_path, resume=True, progress=False)
    assert (again.epochs, again.train_accuracy_last) == (result.epochs, result.train_accuracy_last)


def test_compiled_training_is_the_same_training(data):
    recipe = replace(RECIPE, epochs=2, accumulate=2)
    graphs = []
    real = torch.compile

    def counted(model, **options):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        return real(model, backend=backend, **options)

    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

    one, other = plain(), plain()
    expected = fit(one, data, recipe, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", counted)
        result = fit(other, data, recipe, progress=False, compile=True)
    assert len(graphs) == 1, "one graph serves every step; evaluation compiles none"
    assert without_times(result.history) == without_times(expected.history)
    assert same_weights(one, other)


# Going on after an interruption.

VARIANTS = {
    "plain": {},
    "sgd, averaged, augmented": {
        "optimizer": "sgd",
        "ema": 0.9,
        "augment": "crop_flip",
        "label_smoothing": 0.1,
    },
    "float16": {"precision": "float16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dies_at", [3, 6, 9])
def test_resumed_runs_reach_the_same_weights(data, tmp_path, variant, dies_at):
    recipe = replace(RECIPE, **VARIANTS[variant])
    whole, broken, resumed = net(), net(dies_at), net()
    expected = fit(whole, data, recipe, out=tmp_path / "whole", progress=False, log_every=2)
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        fit(broken, data, recipe, out=out, progress=False, checkpoint_every=2, log_every=1)
    assert not same_weights(broken, whole)
    with torch.no_grad():  # what the new process starts with must not matter
        for weight in resumed.parameters():
            weight.fill_(math.nan)
    result = fit(resumed, data, recipe, out=out, resume=True, progress=False, checkpoint_every=2, log_every=1)
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


def test_sampled_candidates_are_resumed(data, tmp_path):
    """The library's own random layer, averaged: its sampler is a buffer of integers."""
    recipe = replace(RECIPE, epochs=2, ema=0.9)

    def model():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            mixer = Mixer("nearest(4, cosine, random(9)) | ranked | kernel", 4, 8)
            return nn.Sequential(nn.Conv2d(1, 4, 1), mixer, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

    whole, broken, resumed = model(), model(), model()
    expected = fit(whole, data, recipe, out=tmp_path / "whole", progress=False)
    assert whole[1].sampler[1] == expected.best_epoch * 5, "one draw a step, counted exactly"
    calls = []

    def dies(*_):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt

    broken[0].register_forward_pre_hook(dies)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, data, recipe, out=tmp_path / "broken", progress=False, checkpoint_every=2)
    fit(resumed, data, recipe, out=tmp_path / "broken", resume=True, progress=False)
    assert same_weights(resumed, whole)


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    first = fit(net(), data, RECIPE, out=tmp_path, progress=False)
    model = net(dies_at=1)
    again = fit(model, data, RECIPE, out=tmp_path, resume=True, progress=False)
    assert without_times([replace_times(again)]) == without_times([replace_times(first)])
    assert model.calls == 0


def test_an_epoch_counts_as_done_only_with_its_validation(data, tmp_path, monkeypatch):
    """Interrupted between the last step of an epoch and the end of its validation."""
    expected = fit(net(), data, RECIPE, progress=False)
    calls = []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(trainer, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data, RECIPE, out=tmp_path, progress=False, checkpoint_every=1)
    result = fit(net(), data, RECIPE, out=tmp_path, resume=True, progress=False)
    assert without_times(result.history) == without_times(expected.history)


def test_the_loss_scale_is_resumed(data, tmp_path):
    recipe, team = replace(RECIPE, precision="float16"), Team(0, 1, torch.device("cpu"))
    one, other = Trainer(net(), data, recipe, team), Trainer(net(), data, recipe, team)
    one._scaler.scale(torch.ones(1))  # it makes its state at first use
    one._scaler.update(new_scale=32.0)
    checkpoints.save(tmp_path, {}, *one.state(), team)
    other.restore(checkpoints.read(tmp_path, {}, team))
    assert other._scaler.scale(torch.ones(1)).item() == 32.0


def replace_times(result):
    return {**result.__dict__, "seconds": 0, "peak_memory_mib": 0}


def test_resume_without_a_checkpoint_starts_and_old_records_go(data, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    result = fit(net(), data, RECIPE, out=tmp_path, resume=True, progress=False, log_every=1)
    assert len(records(tmp_path)) == result.steps + RECIPE.epochs


def test_a_record_cut_short_is_dropped(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(net(dies_at=8), data, RECIPE, out=tmp_path, progress=False, log_every=1)
    path = tmp_path / "metrics.jsonl"
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 5, 6, 7]
    path.write_text(path.read_text()[:-9])
    result = fit(net(), data, RECIPE, out=tmp_path, resume=True, progress=False, log_every=1)
    assert len(records(tmp_path)) == result.steps + RECIPE.epochs


KILLED = """
import sys, torch
from test_train_loop import RECIPE, net
from nearfold.train import fit, load_data
torch.set_num_threads(1)
fit(net(), load_data(limit=200), RECIPE, out=sys.argv[1], progress=False, checkpoint_every=1, log_every=1)
print("finished")
"""
SLOW = "import time\nfrom nearfold.train.trainer import Trainer\ntake = Trainer.take_step\n" + (
    "def slow(self, batches):\n    take(self, batches)\n    time.sleep(0.2)\nTrainer.take_step = slow\n"
)


def test_a_killed_process_loses_nothing(data, tmp_path):
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
        fit(whole, data, RECIPE, progress=False)
        result = fit(resumed, data, RECIPE, out=out, resume=True, progress=False, checkpoint_every=1, log_every=1)
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


def records_so_far(out):
    return (out / "metrics.jsonl").read_bytes().splitlines()


# Errors.


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
def test_checkpoints_that_do_not_fit(data, tmp_path, damage, says):
    fit(net(), data, replace(RECIPE), out=tmp_path, progress=False)
    arguments = {"model": net(), "data": data, "recipe": RECIPE, **damage(tmp_path)}
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=says):
        fit(**arguments, out=tmp_path, resume=True, progress=False)
    assert contents(tmp_path) == before


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_finished_or_interrupted_run_is_not_overwritten(data, tmp_path):
    fit(net(), data, RECIPE, out=tmp_path, progress=False)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds a run already: pass resume=True"):
        fit(net(), data, RECIPE, out=tmp_path, progress=False)
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
def test_bad_arguments(data, options, says):
    with pytest.raises(ValueError, match=says):
        fit(**{"model": net(), "data": data, "recipe": RECIPE, "progress": False, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(data):
    with pytest.raises(ValueError, match=r"Recipe.device='cuda' needs cuda:0, but torch sees 0 CUDA devices"):
        fit(net(), data, replace(RECIPE, device="cuda"), progress=False)


def test_a_precision_that_the_device_lacks(data, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(nn.functional, "conv2d", refuse)
    with pytest.raises(ValueError, match=r"precision='bfloat16' cannot be used on cpu \(no such kernel\)"):
        fit(net(), data, replace(RECIPE, precision="bfloat16"), progress=False)


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
def test_divergence_stops_the_run_and_leaves_the_last_good_checkpoint(data, tmp_path, weight, says):
    recipe = replace(RECIPE, clip_grad_norm=0.0)
    with pytest.raises(Diverged, match=says):
        fit(Poisoned(7, weight), data, recipe, out=tmp_path, progress=False, checkpoint_every=1)
    saved = checkpoints.read(tmp_path, {}, Team(0, 1, torch.device("cpu")))
    assert saved.facts["run"]["step"] == 6
    weight = torch.full((10, 64), math.nan)
    checkpoints.load(saved, {"model/linear.weight": weight}, Team(0, 1, torch.device("cpu")))
    assert weight.isfinite().all()
    fit(Poisoned(-1, weight), data, recipe, out=tmp_path, resume=True, progress=False)


def test_weights_that_do_not_fit(tmp_path):
    save_weights(net(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds the weights of another model"):
        load_weights(nn.Linear(2, 2), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="there are no weights at"):
        load_weights(net(), tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_weights(net(), tmp_path / "broken.safetensors")


def test_deterministic_is_undone(data, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **_: calls.append(on))
    fit(net(), data, replace(RECIPE, epochs=1, warmup_epochs=0, deterministic=True), progress=False)
    assert calls == [True, False]


# What is shown.


def test_one_line_an_epoch_where_there_is_no_terminal(data, capsys):
    result = fit(net(), data, RECIPE)
    printed, shown = capsys.readouterr()
    assert printed == ""
    lines = shown.splitlines()
    assert len(lines) == RECIPE.epochs
    last = result.history[-1]
    assert lines[-1].startswith(f"epoch 3/3  loss {last['train_loss']:.4f}  accuracy {last['train_accuracy']:.1%}")
    assert lines[-1].endswith("images/s")
    fit(net(), data, RECIPE, progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(data, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(loop, "_READ_SECONDS", 0.0)
    fit(net(), data, RECIPE)
    shown = capsys.readouterr().err
    for part in ("15/15", "epoch 3/3", "loss", "accuracy", "images/s"):
        assert part in shown


def test_tensorboard(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = replace(RECIPE, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        fit(net(dies_at=8), data, recipe, out=tmp_path, progress=False, tensorboard=True, log_every=1)
    fit(net(), data, recipe, out=tmp_path, resume=True, progress=False, tensorboard=True, log_every=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/val_accuracy")] == [5, 10]
    assert [event.step for event in events.Scalars("step/train_loss")] == list(range(1, 11))


def test_nothing_heavy_is_imported_for_a_plain_run():
    code = (
        "import sys, nearfold.train\n"
        "heavy = 'torchvision sklearn matplotlib pyarrow PIL rich tensorboard safetensors'.split()\n"
        "found = [name for name in heavy if name in sys.modules]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_image_data_of_ones_own():
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = torch.randint(0, 100, (60, 3, 5, 7), generator=draws) + 100 * labels[:, None, None, None]
    split = Split(images.to(torch.uint8), labels)
    data = ImageData("bright", ("no", "yes"), split, split, split)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(105, 2))
    result = fit(model, data, replace(RECIPE, lr=0.03), progress=False)
    assert result.test_accuracy == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_cuda(data, tmp_path, precision):
    def model():
        return nn.Sequential(net().layers, nn.Dropout(0.1))

    recipe = replace(RECIPE, precision=precision, device="cuda", ema=0.9, augment="crop_flip")
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    result = fit(model(), data, recipe, out=tmp_path, progress=False, checkpoint_every=2)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert result.images_per_second > 0 and result.peak_memory_mib > 0
    again = fit(model(), data, recipe, out=tmp_path, resume=True, progress=False)
    assert again.test_accuracy == result.test_accuracy

"""Training: what is learned, and what is measured."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import RECIPE, Net, net, records, same_weights, without_times
from torch import nn

from nearfold.train import ImageData, Recipe, Split, evaluate, fit, load_data, load_weights, optimizer, prepare, trainer
from nearfold.train.evaluation import measure
from nearfold.train.mix import draw_mix, mixed
from nearfold.train.seeds import generator

# Learning, and what is measured.


def test_a_small_network_learns_the_digits(tmp_path):
    data = load_data()
    model = net()
    result = fit(model, data, replace(RECIPE, epochs=4), out=tmp_path / "run", progress=False, log_every=10)
    assert result.test_accuracy > 0.9 and result.train_accuracy > 0.93 and result.train_loss < 0.3
    assert (result.epochs, result.steps) == (4, 4 * (len(data.train) // 32))
    assert result.images_per_second > 0 and result.seconds > 0 and result.peak_memory_mib >= 0
    assert not model.training
    assert 0.3 < result.history[0]["train_loss"] < 2.4  # the mean over the steps of the epoch

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


def test_prepare_and_evaluate_by_hand(digits):
    model = net()
    model.train()
    images = prepare(digits.test.images, digits)
    expected = (digits.test.images.float() / 255 - digits.mean[:, None, None]) / digits.std[:, None, None]
    torch.testing.assert_close(images, expected)
    loss, accuracy = evaluate(model, digits.test, digits, batch_size=7)
    assert model.training
    model.eval()
    logits = model(images)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, digits.test.labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == digits.test.labels).float().mean().item())


def test_the_same_run_twice_is_the_same_and_leaves_global_randomness_alone(digits):
    one, other = net(), net()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fit(one, digits, RECIPE, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = fit(other, digits, RECIPE, progress=False)
    assert same_weights(one, other)
    assert without_times(first.history) == without_times(second.history)
    third = net()
    fit(third, digits, replace(RECIPE, seed=1), progress=False)
    assert not same_weights(one, third)


def test_the_test_images_decide_nothing_and_are_looked_at_once(digits, monkeypatch):
    seen = []

    def spy(model, batches, count, *rest, **options):
        seen.append(count)
        return measure(model, batches, count, *rest, **options)

    monkeypatch.setattr(trainer, "measure", spy)
    wrong = Split(digits.test.images, (digits.test.labels + 1) % 10)
    one, other = net(), net()
    first = fit(one, digits, RECIPE, progress=False)
    second = fit(other, replace(digits, test=wrong), RECIPE, progress=False)
    assert same_weights(one, other)
    assert first.best_epoch == second.best_epoch and first.test_accuracy != second.test_accuracy
    before_the_end = seen[: RECIPE.epochs]
    assert set(before_the_end) == {len(digits.val)}
    assert len(digits.val) != len(digits.test) != len(digits.train)


def test_the_best_epoch_by_accuracy_then_loss_is_kept(digits, monkeypatch):
    outcomes = iter([(0.9, 0.5), (0.8, 0.7), (0.6, 0.7), (0.6, 0.7), (0.5, 0.6)])
    kept = []

    def told(model, batches, count, *rest, **options):
        if count != len(digits.val):
            return measure(model, batches, count, *rest, **options)
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(outcomes)

    monkeypatch.setattr(trainer, "measure", told)
    model = net()
    result = fit(model, digits, replace(RECIPE, epochs=5), progress=False)
    assert (result.best_epoch, result.val_accuracy) == (3, 0.7)
    assert all(torch.equal(value, kept[2][name]) for name, value in model.state_dict().items())
    last = net()
    last.load_state_dict(kept[4])
    assert result.test_accuracy_last == evaluate(last, digits.test, digits)[1]
    assert result.test_accuracy == evaluate(model, digits.test, digits)[1]


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-6), ("float16", 1e-4)])
def test_one_step_is_the_textbook_step(digits, precision, error):
    recipe = Recipe(
        epochs=1, batch_size=len(digits.train), optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0,
        warmup_epochs=0, label_smoothing=0.1, clip_grad_norm=0.5, device="cpu",
        precision=precision,
    )  # fmt: skip
    model, expected = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Linear(64, 10)
    expected.load_state_dict(model[1].state_dict())
    logits = expected(prepare(digits.train.images, digits).flatten(1))
    loss = nn.functional.cross_entropy(logits, digits.train.labels, label_smoothing=0.1)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum() for p in expected.parameters()))
    assert norm > 0.5, "clipping must have something to do"
    result = fit(model, digits, recipe, progress=False)
    assert result.history[0]["train_loss"] == pytest.approx(loss.item(), rel=100 * error)
    for trained, before in zip(model[1].parameters(), expected.parameters(), strict=True):
        textbook = before - 0.1 * before.grad * 0.5 / norm
        torch.testing.assert_close(trained, textbook, rtol=10 * error, atol=error)


def test_every_image_is_seen_once_an_epoch_in_another_order(digits):
    seen = []

    class Spy(nn.Linear):
        def forward(self, images):
            if self.training:
                seen.append(images.detach().flatten(1))
            return super().forward(images.flatten(1))

    recipe = replace(RECIPE, epochs=2, batch_size=20)
    fit(Spy(64, 10), digits, recipe, progress=False)
    first, second = torch.cat(seen[:9]), torch.cat(seen[9:])
    assert len(first) == len(second) == 180 == len(digits.train)
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert sorted(epoch.sum(1).tolist()) == pytest.approx(
            sorted(prepare(digits.train.images, digits).flatten(1).sum(1).tolist()), abs=1e-3
        )


def test_averaged_weights_are_those_that_are_kept(digits):
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
    fit(live, digits, replace(recipe, ema=0.0), progress=False)
    snapshots.clear()
    fit(model, digits, recipe, progress=False)
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
def test_low_precision_computes_in_it_and_learns(digits, precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    types = set()
    model[1].register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    result = fit(model, digits, replace(RECIPE, precision=precision, lr=0.03), progress=False)
    assert types == {getattr(torch, precision)}
    assert model[1].weight.dtype == torch.float32
    assert result.train_accuracy > 0.9


def test_fewer_images_than_a_batch_are_one_batch(digits):
    result = fit(net(), digits, replace(RECIPE, batch_size=4096), progress=False)
    assert result.steps == RECIPE.epochs


def test_parts_of_a_batch_are_one_step(digits):
    # sgd without clipping: the size of the gradient counts
    recipe = replace(RECIPE, epochs=2, batch_size=36, cutmix=1.0, optimizer="sgd", lr=0.05, clip_grad_norm=0.0)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    parted = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    parted.load_state_dict(whole.state_dict())
    seen = []
    parted[1].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])) if module.training else None)
    one = fit(whole, digits, recipe, progress=False)
    other = fit(parted, digits, replace(recipe, accumulate=3), progress=False)
    assert set(seen) == {12} and len(seen) == 3 * other.steps == 3 * one.steps
    assert [r["train_loss"] for r in one.history] == pytest.approx([r["train_loss"] for r in other.history], abs=1e-6)
    torch.testing.assert_close(whole[1].weight, parted[1].weight, rtol=0, atol=1e-5)


def test_mixed_images_have_mixed_labels(digits):
    """At a rate of nearly zero, the loss of a step is that of the initial weights on its mixed images."""
    recipe = Recipe(epochs=1, batch_size=180, lr=1e-9, warmup_epochs=0, mixup=0.8, label_smoothing=0.1, device="cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    order = torch.randperm(180, generator=generator(0, "order", 0))
    images, labels = prepare(digits.train.images[order], digits), digits.train.labels[order]
    mix = draw_mix(recipe, 0, 8, 8)
    with torch.no_grad():
        logits = model(mixed(mix, images, labels, 10)[0])
    own, partners = nn.functional.one_hot(labels, 10), nn.functional.one_hot(labels, 10).view(90, 2, 10).flip(1)
    targets = 0.9 * (mix.share * own + (1 - mix.share) * partners.reshape(180, 10)) + 0.01
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    result = fit(model, digits, recipe, progress=False)
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
def test_batches_that_cannot_be_parted(digits, fields, says):
    with pytest.raises(ValueError, match=says):
        fit(net(), digits, replace(RECIPE, **fields), progress=False)


def test_a_run_ends_when_the_training_images_are_learned(digits, tmp_path):
    recipe = replace(RECIPE, epochs=40, until=0.9, schedule="constant")
    model = net()
    result = fit(model, digits, recipe, out=tmp_path, progress=False)
    reached = [record["train_accuracy_evaluated"] for record in result.history]
    assert len(reached) == result.epochs < 40 and result.steps == 5 * result.epochs
    assert reached[-1] >= 0.9 and all(accuracy < 0.9 for accuracy in reached[:-1])
    assert result.train_accuracy_last == reached[-1]
    kept = reached[result.best_epoch - 1]
    assert result.train_accuracy == kept == evaluate(model, digits.train, digits)[1]
    again = fit(net(dies_at=1), digits, recipe, out=tmp_path, resume=True, progress=False)
    assert (again.epochs, again.train_accuracy_last) == (result.epochs, result.train_accuracy_last)


def test_compiled_training_is_the_same_training(digits):
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
    expected = fit(one, digits, recipe, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", counted)
        result = fit(other, digits, recipe, progress=False, compile=True)
    assert len(graphs) == 1, "one graph serves every step; evaluation compiles none"
    assert without_times(result.history) == without_times(expected.history)
    assert same_weights(one, other)


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
def test_on_cuda(digits, tmp_path, precision):
    def model():
        return nn.Sequential(net().layers, nn.Dropout(0.1))

    recipe = replace(RECIPE, precision=precision, device="cuda", ema=0.9, augment="crop_flip")
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    result = fit(model(), digits, recipe, out=tmp_path, progress=False, checkpoint_every=2)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert result.images_per_second > 0 and result.peak_memory_mib > 0
    again = fit(model(), digits, recipe, out=tmp_path, resume=True, progress=False)
    assert again.test_accuracy == result.test_accuracy

"""`nearfold budget`: a small ViT, trained for a few steps, is swept over k, and is itself again afterwards."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from nearfold import cli
from nearfold.models import create
from nearfold.study import budget_command, given
from nearfold.study import sweep as sweeping
from nearfold.study.statistics import changed_share
from nearfold.study.sweep import Images, Measured, Setting, Sweep, attention, sweep
from nearfold.train import load_data, prepare


def vit():
    torch.manual_seed(0)
    return create(
        "vit_tiny_attention", num_classes=10, in_chans=1, img_size=(8, 8), width=32, depth=2, patch=2, heads=2
    )


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


@pytest.fixture(scope="module")
def trained(data):
    model, x, y = vit(), prepare(data.train.images, data), data.train.labels
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(120):
        rows = torch.randint(len(x), (64,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def images(data):
    return Images(prepare(data.test.images, data), data.test.labels)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sweeping, "ROUNDS", 2)


def accuracy(model, images):
    return (model(images.x).argmax(1) == images.labels)[images.half :].double().mean().item()


def test_every_setting_is_measured_and_the_model_is_itself_again(trained, images, quick):
    before, modules = trained(images.x), list(trained.modules())
    found = sweep(trained, images, ks=[8, 2])
    assert torch.equal(trained(images.x), before) and all(
        a is b for a, b in zip(trained.modules(), modules, strict=True)
    )
    assert found.accuracy == pytest.approx(accuracy(trained, images)) and found.accuracy > 0.6 and found.knows
    assert [(m.setting.k, m.setting.where) for m in found.found] == [
        (k, where) for k in (8, 2) for where in ("all 2", "the first 1", "the last 1")
    ]
    for m in found.found:
        assert m.accuracy - found.accuracy == pytest.approx(m.reported.mean)
        assert m.reported.low <= m.reported.mean <= m.reported.high and m.latency_ms > 0 and m.before_ms > 0
    by_k = {m.setting.k: m.accuracy for m in found.found if m.setting.where == "all 2"}
    assert by_k[8] >= by_k[2] and by_k[8] > found.accuracy - 0.05  # the nearest half of the keys does nearly all


def test_a_model_in_training_is_measured_in_evaluation(trained, images, quick):
    modes = []
    handle = trained.train().register_forward_pre_hook(lambda module, given: modes.append(module.training))
    try:
        sweep(trained, images, ks=[2])
        assert trained.training and modes and not any(modes)
    finally:
        handle.remove()
        trained.eval()


def test_a_setting_is_what_attention_to_the_k_best_keys_gives(trained, images, quick):
    """Against the same network built anew with `nearest`, which shares the weights by name."""
    other = create(
        "vit_tiny_attention", num_classes=10, in_chans=1, img_size=(8, 8), width=32, depth=2, patch=2, heads=2,
        layer="nearest(3, scaled) | ranked | softmax(heads=2)",
    ).eval()  # fmt: skip
    other.load_state_dict(trained.state_dict())
    (found,) = (m for m in sweep(trained, images, ks=[3]).found if m.setting.where == "all 2")
    assert found.accuracy == pytest.approx(accuracy(other, images), abs=1.5 / len(images.labels))


def test_the_old_and_the_new_model_are_timed_in_turn(trained, images, monkeypatch):
    there = []

    def timed(step, device):
        step()
        there.append(any("nearest" in str(getattr(m, "operation", "")) for m in trained.modules()))
        return 2.0 if not there[-1] else 1.0

    monkeypatch.setattr(sweeping, "timed", timed)
    found = sweep(trained, images, ks=[4])
    n = sweeping.ROUNDS + sweeping.WARM_UP
    assert there == [False, True] * n * 3
    assert {m.faster for m in found.found} == {(2.0, 2.0, 2.0)} and {m.latency_ms for m in found.found} == {1000.0}


@pytest.mark.parametrize("when", [1, 4, 5])
def test_whatever_happens_the_model_is_put_back(trained, images, monkeypatch, when):
    before, calls = trained(images.x[:8]), []

    def timed(step, device):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(sweeping, "timed", timed)
    trained.train()
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep(trained, images, ks=[4])
        assert trained.training
    finally:
        trained.eval()
    assert torch.equal(trained(images.x[:8]), before)


def made(*settings):
    """(k, change in images of 400 that choose, times as fast)"""
    found = [
        Measured(
            Setting(k, "all 2", ("a", "b")), changed_share(max(d, 0), max(-d, 0), 400), changed_share(1, 2, 400),
            0.9, 1 / fast, 1.0, (0.95 * fast, fast, 1.05 * fast),
        )
        for k, d, fast in settings
    ]  # fmt: skip
    return Sweep([("a", 64), ("b", 64)], 0.9025, 0.1, 400, 1, found)


def test_the_fastest_that_keeps_the_accuracy_is_recommended():
    found = made((32, 0, 1.2), (16, -1, 1.5), (8, -20, 3.0))
    assert found.recommended(0.01).setting.k == 16
    assert found.recommended(0.2).setting.k == 8
    text = budget_command.report(found, 0.01, "a processor")
    assert text[-1].startswith("Keep the accuracy, spend less: k = 16 in all 2 attention layers")
    assert "90.0 %, −0.2 (−1.2 to +0.7) points, and is 1.50 times as fast" in text[-1]
    assert any("a processor" in line for line in text)


def test_what_cannot_be_said_is_not_recommended():
    assert "no setting is faster here" in budget_command.report(made((8, 0, 0.9)), 0.01, "")[-1]
    few = made((8, 0, 2.0))
    assert few.recommended(0.001) is None  # 400 images cannot show a tenth of a point
    assert (
        "400 images to choose by, the best can be said to lose at most 0." in budget_command.report(few, 0.001, "")[-1]
    )
    assert "can be said to lose at most 1 points." in budget_command.report(made((8, -40, 2.0)), 0.01, "")[-1]
    guess = replace(made((8, 0, 2.0)), accuracy=0.11)
    assert budget_command.report(guess, 0.01, "")[-1].startswith("Nothing is recommended")


def test_no_change_among_few_images_is_not_no_change_among_all():
    e = changed_share(0, 0, 100)
    assert e.mean == 0 and e.low == -e.high and 0.01 < e.high < 0.03
    draws = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(800):  # 4 % of the images get better, 6 % worse
        u = torch.rand(150, generator=draws)
        e = changed_share(int((u < 0.04).sum()), int((u > 0.94).sum()), 150)
        inside += e.low <= -0.02 <= e.high
    assert 0.93 < inside / 800 < 0.985


def test_a_model_without_such_attention_says_what_it_has():
    with pytest.raises(ValueError, match=r"no attention that reads all positions.*window\(3\) \| box \| kernel"):
        attention(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 10)), (1, 8, 8))


def test_scores_that_are_none_are_refused(images):
    model = create(
        "vit_tiny_attention", num_classes=4, in_chans=1, img_size=(8, 8), width=16, depth=1, patch=4, heads=1
    )
    with pytest.raises(ValueError, match=r"a score for each of 10 classes, \(B, 10\)"):
        sweep(model, images)


def test_the_command_line_takes_a_saved_network(trained, tmp_path, quick, capsys):
    trained.save_pretrained(tmp_path / "saved")
    assert cli.main(["budget", str(tmp_path / "saved"), "--data", "digits", "--k", "4", "--limit", "100"]) == 0
    out = capsys.readouterr().out
    assert "as it was: " in out and "held-out images that chose nothing" in out and "\n4  all 2 " in out
    assert "Keep the" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "MODEL must be timm:NAME"),
        (["timm:resnet18"], "alone has fresh weights"),
        (["x.py:f", "--k", "0"], "wanted numbers of positions"),
        (["x.py:f", "--k", "4,,2"], "wanted numbers of positions"),
        (["x.py:f", "--k", "99999999999"], "wanted numbers of positions"),
        (["x.py:f", "--keep", "nan"], "--keep"),
        (["x.py:f", "--mean", "a"], "wanted a number for each channel"),
        (["x.py:f", "--batch", "-1"], "wanted a whole number"),
        (["x.py:f"], "there is no file"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert cli.main(["budget", *arguments, "--data", "digits"]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"cos\nsystem\n(S'true'\ntR.", b"\x00" * 100, b"PK\x03\x04"])
def test_weights_that_are_none_are_one_line_and_run_nothing(tmp_path, content, trained):
    trained.save_pretrained(tmp_path / "saved")
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"--weights .* (cannot be read|is no file of tensors)"):
            given.load(str(tmp_path / "saved"), tmp_path / name)
    torch.save({"model": vit().state_dict()}, tmp_path / "good.pth")
    given.load(str(tmp_path / "saved"), tmp_path / "good.pth")
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not fit"):
        given.load(str(tmp_path / "saved"), tmp_path / "other.pth")

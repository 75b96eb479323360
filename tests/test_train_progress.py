"""What a run shows."""

import sys
from dataclasses import replace

import pytest
from helpers.small_runs import RECIPE, net

from nearfold.train import fit, loop


def test_one_line_an_epoch_where_there_is_no_terminal(digits, capsys):
    result = fit(net(), digits, RECIPE)
    printed, shown = capsys.readouterr()
    assert printed == ""
    lines = shown.splitlines()
    assert len(lines) == RECIPE.epochs
    last = result.history[-1]
    assert lines[-1].startswith(f"epoch 3/3  loss {last['train_loss']:.4f}  accuracy {last['train_accuracy']:.1%}")
    assert lines[-1].endswith("images/s")
    fit(net(), digits, RECIPE, progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(digits, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(loop, "_READ_SECONDS", 0.0)
    fit(net(), digits, RECIPE)
    shown = capsys.readouterr().err
    for part in ("15/15", "epoch 3/3", "loss", "accuracy", "images/s"):
        assert part in shown


def test_tensorboard(digits, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = replace(RECIPE, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        fit(net(dies_at=8), digits, recipe, out=tmp_path, progress=False, tensorboard=True, log_every=1)
    fit(net(), digits, recipe, out=tmp_path, resume=True, progress=False, tensorboard=True, log_every=1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/val_accuracy")] == [5, 10]
    assert [event.step for event in events.Scalars("step/train_loss")] == list(range(1, 11))

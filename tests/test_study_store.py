import json
import os

import pytest

from nearfold.study.store import Store, run_key, write_whole


def test_key_depends_on_every_value_and_not_on_order():
    config = {"operation": "a", "recipe": {"lr": 0.1, "seed": 0}}
    assert run_key(config) == run_key({"recipe": {"seed": 0, "lr": 0.1}, "operation": "a"})
    others = [
        {"operation": "b", "recipe": {"lr": 0.1, "seed": 0}},
        {"operation": "a", "recipe": {"lr": 0.1, "seed": 1}},
        {"operation": "a", "recipe": {"lr": 0.2, "seed": 0}},
    ]
    assert len({run_key(c) for c in [config, *others]}) == 4


def test_a_failure_is_not_a_result_and_success_forgets_it(tmp_path):
    store, config = Store(tmp_path), {"seed": 0}
    store.save_failure(config, "RuntimeError: no memory", "Traceback: RuntimeError")
    assert store.load(config) is None
    assert store.failure(config) == "RuntimeError: no memory"
    assert "RuntimeError" in json.loads(store.failure_path(config).read_text())["traceback"]
    store.save(config, {"accuracy": 0.25})
    assert store.load(config) == {"accuracy": 0.25}
    assert store.failure(config) is None


def test_result_file_says_which_run_it_is(tmp_path):
    store = Store(tmp_path)
    store.save({"seed": 3}, {"accuracy": 1.0})
    (path,) = (tmp_path / "runs").iterdir()
    assert path == store.result_path({"seed": 3}) and path.stem == run_key({"seed": 3})
    assert json.loads(path.read_text()) == {"config": {"seed": 3}, "result": {"accuracy": 1.0}}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null"])
def test_a_broken_result_is_named_with_what_to_do(tmp_path, content):
    store = Store(tmp_path)
    path = store.result_path({})
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="delete it") as error:
        store.load({})
    assert str(path) in str(error.value)


def test_two_that_write_one_file_at_once_do_not_meet(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    works = os.replace

    def meanwhile(*names):
        monkeypatch.setattr(os, "replace", works)
        monkeypatch.setattr(os, "getpid", lambda: -1)  # the other one begins and ends before we do
        write_whole(path, "theirs")
        works(*names)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_whole(path, "ours")
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    write_whole(path, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_whole(path, "newer")
    assert path.read_text() == "newer"
    assert list(path.parent.iterdir()) == [path]

"""Files from elsewhere: broken, tampered with or of another kind, they are one ValueError that names the file."""

import ast
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

import nearfold
from nearfold.compat.checkpoints import NETWORKS, load_checkpoint
from nearfold.models import create, from_pretrained
from nearfold.models.hub import CONFIG, WEIGHTS
from nearfold.study import command
from nearfold.study.catalogue import find
from nearfold.study.store import Store

PACKAGE = Path(nearfold.__file__).parent

# No unrestricted load anywhere. Name of the function -> what must be said in the call, or where else it may be.
LOADS = {
    "torch.load": "weights_only=True",
    "pickle.load": None, "pickle.loads": None, "pickle.Unpickler": None, "cPickle.load": None, "dill.load": None,
    "joblib.load": None, "marshal.load": None, "marshal.loads": None, "shelve.open": None, "torch.hub.load": None,
    "numpy.load": "allow_pickle=False", "np.load": "allow_pickle=False", "yaml.load": None, "yaml.unsafe_load": None,
    "eval": None, "exec": None, "os.system": None, "tarfile.extractall": None, "torch.jit.load": None,
    "dcp.FileSystemReader": None,
}  # fmt: skip


LAST = {name.rpartition(".")[2] for name in LOADS}


def unrestricted(source):
    """Calls and base classes in a source that read more than data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in LAST:
            name = ast.unparse(node.func)
            said = [f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords]
            if name in LOADS and (LOADS[name] is None or LOADS[name] not in said):
                yield f"{name} in line {node.lineno}"
        elif isinstance(node, ast.ClassDef):
            for base in map(ast.unparse, node.bases):
                methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                if base == "pickle.Unpickler" and "find_class" not in methods:
                    yield f"{node.name}: an unpickler without find_class"
                if base == "dcp.FileSystemReader" and "read_metadata" not in methods:
                    yield f"{node.name}: torch's own reader of an index"
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "torch.serialization"):
            yield f"from {node.module} import in line {node.lineno}"


def test_the_package_reads_nothing_that_runs():
    found = {str(path): list(unrestricted(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 100 and not {path: calls for path, calls in found.items() if calls}


@pytest.mark.parametrize(
    "source",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "pickle.loads(b)", "class R(pickle.Unpickler): pass",
     "from pickle import load", "dcp.FileSystemReader(f)", "np.load(f, allow_pickle=True)", "eval(text)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source):
    assert list(unrestricted(source))


# Networks in folders.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "network"
    create("gwo_conv", width=4, num_classes=3).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "network")
    return tmp_path / "network"


def one_line(load, *names):
    """Load; where it is refused, by a ValueError in a line that names one of the files."""
    try:
        return load()
    except ValueError as error:
        assert type(error).__module__.startswith(("nearfold", "builtins"))
        assert any(str(name) in str(error) for name in names) and "\n" not in str(error), error
        return None


VALUES = [
    None,
    True,
    -1,
    0,
    2**63,
    1e400,
    "x",
    "",
    [],
    {},
    [[1]],
    {"a": 1},
    "window(3) | box | kernel",
    [1, 2, 3],
    10**9,
]


@pytest.mark.parametrize("seed", range(8))
def test_any_config_is_refused_in_a_line_or_works(folder, seed):
    draw = random.Random(seed)
    content = (folder / CONFIG).read_bytes()
    cut, flip = draw.randrange(len(content)), draw.randrange(len(content))
    wrong = [content[:cut], content[:flip] + bytes([content[flip] ^ 1 << draw.randrange(8)]) + content[flip + 1 :]]
    for _ in range(8):
        tree = json.loads(content)
        inner = draw.choice([tree, tree["model_args"], tree["model_args"], tree["pretrained_cfg"]])
        inner[draw.choice([*inner, "depth", "width", "unknown"])] = draw.choice(VALUES)
        wrong.append(json.dumps(tree).encode())
    wrong += [b"", b"null", b"[]", b"3", b"[" * 100_000, b"\xff\xfe", json.dumps({"architecture": ["x"]}).encode()]
    for text in wrong:
        (folder / CONFIG).write_bytes(text)
        one_line(lambda: from_pretrained(folder), folder)


@pytest.mark.parametrize("seed", range(4))
def test_any_weights_are_refused_in_a_line_or_work(folder, seed):
    draw = random.Random(seed)
    content = (folder / WEIGHTS).read_bytes()
    state = load_file(folder / WEIGHTS)
    name = draw.choice(list(state))
    wrong = [content[: draw.randrange(len(content))], b"", b"\xff" * 16, content[:8] + b"{" + content[9:]]
    for _ in range(6):
        flipped = bytearray(content)
        flipped[draw.randrange(600)] ^= 1 << draw.randrange(8)
        wrong.append(bytes(flipped))
    wrong += [save(state | {name: other}) for other in (torch.zeros(()), torch.zeros(7, 7), torch.zeros(0))]
    wrong += [save({n: t for n, t in state.items() if n != name}), save(state | {"more": torch.zeros(1)}), save({})]
    wrong += [pickle.dumps(state), b"PK\x03\x04" + content]
    for data in wrong:
        (folder / WEIGHTS).write_bytes(data)
        one_line(lambda: from_pretrained(folder), folder)
    for data in wrong[-8:]:
        (folder / WEIGHTS).write_bytes(data)
        assert one_line(lambda: from_pretrained(folder), folder) is None


def test_a_network_that_its_weights_do_not_fill_is_never_made(folder):
    """A width in the configuration of a terabyte."""
    config = json.loads((folder / CONFIG).read_text())
    config["model_args"]["width"] = 1 << 17
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights do not fit"):
        from_pretrained(folder)


# Checkpoints of the public code.


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def checkpoints(tmp_path):
    """Files that are no checkpoint, each of another kind."""
    circle = {"note": "x"}
    circle["state_dict"] = circle
    deep = {"a": torch.zeros(1), "b": 1}
    for _ in range(50):
        deep = {"model": deep, "epoch": 1}
    objects = [
        Evil(), nn.Linear(2, 2), circle, deep, [], 3, None, "text", {}, {"state_dict": None}, {"state_dict": []},
        {"model": {1: torch.zeros(1)}}, {"x": torch.zeros(())}, {"classifier.6.weight": torch.zeros(())},
        {name: torch.zeros(()) for name in ("classifier.6.weight", "features.1.running_mean", "classifier.0.weight")},
        {"layer1.0.conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(2)},
    ]  # fmt: skip
    for at, thing in enumerate(objects):
        torch.save(thing, tmp_path / f"{at}.pth")
        yield tmp_path / f"{at}.pth"
    whole = io.BytesIO()
    torch.save({"w": torch.zeros(100)}, whole)
    texts = [b"", b"x", b"\x80\x04.", whole.getvalue()[:200], pickle.dumps({"w": 1}), b"PK\x03\x04" + bytes(50)]
    for at, text in enumerate(texts):
        for suffix in ("pth", "safetensors"):
            path = tmp_path / f"raw-{at}.{suffix}"
            path.write_bytes(text)
            yield path
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    yield tmp_path / "other.safetensors"


def test_what_is_no_checkpoint_is_a_value_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in checkpoints(tmp_path):
        for network in NETWORKS:
            for config in ({}, {"layer": "ConvNN", "K": 9, "num_heads": 2}):
                with pytest.raises(ValueError, match=r".") as caught:
                    load_checkpoint(network, path, config)
                assert "\n" not in str(caught.value) and str(caught.value), (path, network)
    assert not (tmp_path / "pwned").exists()


# Stores and studies.


def test_a_store_reads_and_writes_nothing_outside(tmp_path):
    store, config = Store(tmp_path / "store"), {"seed": 0}
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / store.result_path(config).name).write_text('{"result": {}}')
    before = sorted(outside.rglob("*"))
    for name in ("runs", "failed", "weights", "work", "claims"):
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / name).symlink_to(outside)
    for use in (
        lambda: store.load(config),
        lambda: store.failure(config),
        lambda: store.save(config, {}),
        lambda: store.save_failure(config, "", ""),
        lambda: store.weights_path(config),
        lambda: store.work_path(config),
        lambda: store.claim(config).__enter__(),
    ):
        with pytest.raises(ValueError, match="leads out of the folder"):
            use()
    assert sorted(outside.rglob("*")) == before
    (tmp_path / "by_a_link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    linked = Store(tmp_path / "by_a_link")  # the store itself may be reached by a link
    linked.save(config, {"accuracy": 1})
    assert linked.load(config) == {"accuracy": 1}


def test_a_store_does_not_wait_for_a_pipe(tmp_path):
    store, config = Store(tmp_path), {"seed": 0}
    store.result_path(config).parent.mkdir()
    os.mkfifo(tmp_path / "runs" / store.result_path(config).name)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        store.load(config)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".hidden", "", "/root", "a\nb", "a\0b", "x" * 200, "a\\b"])
def test_a_study_reports_inside_of_out_only(tmp_path, name):
    from dataclasses import replace

    study = find("ratio", "cpu")
    with pytest.raises(ValueError, match="make the name of a folder"):
        command._folder(tmp_path, replace(study, name=name))
    with pytest.raises(ValueError, match="make the name of a folder"):
        command._folder(tmp_path, replace(study, preset=f"cpu/../../{name}"))
    assert command._folder(tmp_path, study) == tmp_path / "ratio-cpu"

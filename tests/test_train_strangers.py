"""Runs that somebody else left or tampered with: nothing of them is run, nothing outside is read, renamed, removed."""

import io
import json
import os
import pickle
import pickletools
import random
import shutil
import stat
import zlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

from nearfold.nn import Mixer
from nearfold.train import Recipe, checkpoint, fit, index, load_data, save_weights
from nearfold.train.files import inside, is_own_file, replacing
from nearfold.train.trainer import Trainer

RECIPE = Recipe(epochs=2, batch_size=32, device="cpu", ema=0.9)


@pytest.fixture(scope="module")
def data():
    return load_data(limit=80)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run that was interrupted after its first epoch."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    go_on(out, data, until=1)
    return out


def go_on(out, data, until=None, **options):
    """Train, up to the end or an epoch."""
    take = Trainer.take_step

    def stopping(self, batches):
        if until is not None and self.run.step == until * self.steps_per_epoch:
            raise KeyboardInterrupt
        take(self, batches)

    Trainer.take_step = stopping
    try:
        return fit(options.pop("model", None) or net(), data, RECIPE, out=out, progress=False, resume=True, **options)
    except KeyboardInterrupt:
        return None
    finally:
        Trainer.take_step = take


@pytest.fixture
def run(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def precious(run):
    """A folder beside the run, with a whole checkpoint and somebody's thesis."""
    folder = run.parent / "precious"
    shutil.copytree(run / pointer(run)["folder"], folder)
    (folder / "thesis.txt").write_text("years of work")
    return folder


def pointer(run):
    return json.loads((run / "checkpoint.json").read_text())


def point(run, **changes):
    (run / "checkpoint.json").write_text(json.dumps(pointer(run) | changes))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(run, data, says):
    """Resume, expect one ValueError, and nothing changed in the run or beside it."""
    before = contents(run.parent)
    with pytest.raises(ValueError, match=says) as caught:
        go_on(run, data)
    assert contents(run.parent) == before
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)


def vouch(run, name, content):
    """Write a file of the checkpoint, with the checksum that belongs to it."""
    old = pointer(run)
    (run / old["folder"] / name).write_bytes(content)
    point(run, files=old["files"] | {name: [len(content), zlib.crc32(content)]})


# Paths.


@pytest.mark.parametrize(
    "name", ["../precious", "checkpoint-c", "", ".", "..", "checkpoint-a/../../precious", "checkpoint-a/", None, 3, []]
)
def test_the_folder_of_a_checkpoint_is_one_of_two_names(run, precious, data, name):
    point(run, folder=name)
    refused(run, data, "wrong folder")
    point(run, folder=str(precious))
    refused(run, data, "wrong folder")


@pytest.mark.parametrize("name", ["../../precious/thesis.txt", "/etc/passwd", "thesis.txt", "__0_0.distcp/../x", ""])
def test_the_files_of_a_checkpoint_have_the_names_that_torch_gives(run, precious, data, name):
    point(run, files=pointer(run)["files"] | {name: [13, zlib.crc32(b"years of work")]})
    refused(run, data, "wrong files")


def test_an_index_leads_to_the_files_of_its_checkpoint_only(run, precious, data):
    found = pickle.loads((run / pointer(run)["folder"] / index.NAME).read_bytes())
    for place in found.storage_data.values():
        place.relative_path = "../../precious/__0_0.distcp"
    vouch(run, index.NAME, pickle.dumps(found))
    refused(run, data, "not in the checkpoint's files")


def test_links_lead_nowhere(run, precious, data):
    folder = run / pointer(run)["folder"]
    shutil.rmtree(folder)
    folder.symlink_to(precious)
    refused(run, data, "leads out of the folder")
    folder.unlink()
    shutil.copytree(precious, folder)
    for name in pointer(run)["files"]:
        (folder / name).unlink()
        (folder / name).symlink_to(precious / name)
        refused(run, data, "leads out of the folder")
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "copy")  # inside, but no file of its own
        shutil.copy(precious / name, folder / "copy")
        refused(run, data, "is damaged")
        (folder / name).unlink()
        shutil.move(folder / "copy", folder / name)
    (run / "checkpoint.json").rename(run.parent / "elsewhere.json")
    (run / "checkpoint.json").symlink_to(run.parent / "elsewhere.json")
    refused(run, data, "is a link")


def test_a_run_writes_through_no_link(run, precious, data):
    """Where a link stands in place of what is about to be written or removed, the link goes, and nothing behind it."""
    before = contents(precious)
    other = next(name for name in checkpoint.FOLDERS if name != pointer(run)["folder"])
    (run / other).symlink_to(precious)
    for name in ("checkpoint.json", "recipe.json", "metrics.jsonl", "weights.safetensors", "result.json"):
        (run / f"{name}.partial").symlink_to(precious / "thesis.txt")
    result = go_on(run, data)
    assert contents(precious) == before and result.epochs == 2
    assert not (run / other).is_symlink() and (run / other).is_dir()


def test_a_pipe_is_not_waited_for(run, data):
    (run / "checkpoint.json").unlink()
    os.mkfifo(run / "checkpoint.json")
    with pytest.raises(ValueError, match="a link, a folder or a pipe"):
        go_on(run, data)


def test_inside(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in" / "round")
    (tmp_path / "also").symlink_to(tmp_path / "in")
    for name in ("deep", "deep/new/file", "deep/../deep", "."):
        assert inside(tmp_path / "in", tmp_path / "in" / name) == tmp_path / "in" / name
        inside(tmp_path / "also", tmp_path / "also" / name)  # the folder itself may be reached by a link
    for name in ("..", "up", "up/in2", "deep/../../also2", "/etc", "round/x", "a\0b"):
        with pytest.raises(ValueError, match="leads out of the folder"):
            inside(tmp_path / "in", tmp_path / "in" / name)
    assert not is_own_file(tmp_path / "in") and not is_own_file(tmp_path / "none")


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_may_be_read_by_whom_the_umask_allows(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_weights(net(), tmp_path / "weights.safetensors")
        with replacing(tmp_path / "text") as temporary:
            temporary.write_text("text")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


# Pickles.


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, mark, call=None):
        self.call = call or (open, (str(mark), "w"))

    def __reduce__(self):
        return self.call


def evils(mark):
    """Objects that an index has no need of, by how they come."""
    yield Evil(mark)
    yield {"state_dict_metadata": Evil(mark)}
    yield Evil(mark, (eval, (f"open({str(mark)!r}, 'w')",)))
    yield Evil(mark, (os.system, (f"touch {mark}",)))
    yield Evil(mark, (torch.hub.load, ("a/b", "c")))
    yield OrderedDict(a=Evil(mark))
    yield Evil(mark, (getattr, (torch.Tensor, "numpy")))
    yield torch.load  # a function of torch, beside torch.float32
    yield torch.Tensor
    yield io.StringIO("text")


def test_nothing_of_an_index_is_run(run, data, tmp_path):
    mark = tmp_path / "mark"
    whole = pickle.loads((run / pointer(run)["folder"] / index.NAME).read_bytes())
    for evil in evils(mark):
        vouch(run, index.NAME, pickle.dumps(evil))
        refused(run, data, "cannot be read")
        whole.planner_data = evil  # deep inside of what is otherwise an index
        vouch(run, index.NAME, pickle.dumps(whole))
        refused(run, data, "which no index of tensors needs|in place of")
        assert not mark.exists()


def test_nothing_of_the_tensors_files_is_run(run, data, tmp_path):
    """Torch reads what is no tensor by a pickle without limits."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    found = pickle.loads((run / pointer(run)["folder"] / index.NAME).read_bytes())
    content = io.BytesIO()
    torch.save(Evil(tmp_path / "mark"), content)
    vouch(run, "__0_0.distcp", content.getvalue())
    names = [name for name in found.state_dict_metadata if name.startswith("model/")]
    for place in found.storage_data.values():
        place.offset, place.length = 0, len(content.getvalue())
    for entry in (None, BytesStorageMetadata()):
        if entry is not None:
            found.state_dict_metadata[names[0]] = entry
        vouch(run, index.NAME, pickle.dumps(found))
        with pytest.raises(ValueError, match=r"cannot be read|is of another model|more than the files hold"):
            go_on(run, data)
        assert not (tmp_path / "mark").exists()


def test_a_state_that_is_no_tensor_is_refused_before_anything_is_trained(data, tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"seen": [1, 2.5, "three"]}

    with pytest.raises(ValueError, match=r"1\._extra_state of the model is no tensor"):
        go_on(tmp_path / "run", data, model=nn.Sequential(nn.Flatten(), Extra(64, 10)))


def test_an_index_is_torchs_own_by_another_reader(run):
    """Field by field what torch reads, where torch may be trusted."""
    folder = run / pointer(run)["folder"]
    theirs = pickle.loads((folder / index.NAME).read_bytes())
    ours = index.read(folder, {name: size for name, (size, _) in pointer(run)["files"].items()})
    assert ours.storage_data == theirs.storage_data and len(ours.storage_data) > 20
    assert ours.state_dict_metadata == theirs.state_dict_metadata


# Fuzz: whatever the bytes, one ValueError or a run that goes on to its end.


def mutations(content, seed):
    """A text of JSON, changed at one place: cut, flipped, or another value in place of one."""
    draw = random.Random(seed)
    yield content[: draw.randrange(len(content))]
    at = draw.randrange(len(content))
    yield content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    tree = json.loads(content)
    places = list(leaves(tree))
    *way, last = draw.choice(places)
    inner = tree
    for step in way:
        inner = inner[step]
    kinds = [None, True, -1, 2**63, 0.5, "x", [], {}, [[]], {"a": 1}, 1e400, "../precious"]
    inner[last] = draw.choice(kinds)
    yield json.dumps(tree).encode()
    del inner[last]
    yield json.dumps(tree).encode()


def leaves(tree, way=()):
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*way, name)
        if isinstance(value, dict | list):
            yield from leaves(value, (*way, name))


@pytest.mark.parametrize("seed", range(10))
def test_any_checkpoint_json_is_refused_in_a_line_or_works(run, precious, data, seed):
    before = contents(precious)
    whole = (run / "checkpoint.json").read_bytes()
    for content in mutations(whole, seed):
        (run / "checkpoint.json").write_bytes(content)
        try:
            reads(run, data)
        except ValueError as error:
            assert "checkpoint.json" in str(error) and len(str(error).splitlines()) == 1, error
        assert contents(precious) == before


def reads(run, data):
    """Restore a run, without the steps that follow."""
    from nearfold.train.distributed import join
    from nearfold.train.loop import _identity

    team = join("cpu")
    trainer = Trainer(net(), data, RECIPE, team)
    saved = checkpoint.read(run, _identity(data, RECIPE, None), team)
    trainer.restore(saved)


@pytest.mark.parametrize("seed", range(10))
def test_any_index_is_refused_in_a_line_or_works(run, data, seed):
    draw = random.Random(seed)
    content = bytearray((run / pointer(run)["folder"] / index.NAME).read_bytes())
    for _ in range(4):
        wrong = bytearray(content)
        for _ in range(draw.choice([1, 1, 5, 50])):
            wrong[draw.randrange(len(wrong))] = draw.randrange(256)
        if draw.random() < 0.2:
            del wrong[draw.randrange(len(wrong)) :]
        vouch(run, index.NAME, bytes(wrong))
        try:
            reads(run, data)
        except ValueError as error:
            assert "checkpoint.json" in str(error) and len(str(error).splitlines()) == 1, error


def test_an_index_asks_for_no_more_memory_than_the_files_hold(run, data):
    found = pickle.loads((run / pointer(run)["folder"] / index.NAME).read_bytes())
    entry = found.state_dict_metadata["step_seconds"]
    entry.size = entry.chunks[0].sizes = torch.Size([1 << 40])
    vouch(run, index.NAME, pickle.dumps(found))
    refused(run, data, "more than the files hold")
    vouch(run, index.NAME, b"\x80\x04Nr\xff\xff\xff\x7f.")  # LONG_BINPUT: a memo of two thousand million entries
    refused(run, data, "LONG_BINPUT")
    assert "MEMOIZE" in {op.name for op, _, _ in pickletools.genops(pickle.dumps([found, found]))}


# What a run is.


def spectrum(op, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 1), Mixer(op, 8, **options), nn.Flatten(), nn.Linear(512, 10))


def test_another_operation_is_another_run_and_another_spelling_is_the_same(data, tmp_path):
    out = tmp_path / "run"
    go_on(out, data, until=1, model=spectrum("window(3) | box | kernel"))
    before = contents(out)
    with pytest.raises(
        ValueError, match=r"another model: 1 is Mixer\(window\(3, dilation=2\).*was Mixer\(window\(3\) \|"
    ):
        go_on(out, data, model=spectrum("window(3, dilation=2) | box | kernel"))
    frozen = spectrum("window(3) | box | kernel")
    frozen[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"another model: frozen weights is 0\.bias, was not there"):
        go_on(out, data, model=frozen)
    assert contents(out) == before
    assert go_on(out, data, model=spectrum("window(size=3,dilation=1)|box|kernel")).epochs == 2


def test_what_no_shape_tells_of_a_model_is_part_of_a_run(data, tmp_path):
    def made(dilation, p):
        torch.manual_seed(0)
        conv = nn.Conv2d(1, 4, 3, padding=dilation, dilation=dilation)
        return nn.Sequential(conv, nn.Dropout(p), nn.Flatten(), nn.Linear(256, 10))

    go_on(tmp_path, data, until=1, model=made(1, 0.1))
    for model, says in ((made(2, 0.1), "0 is Conv2d"), (made(1, 0.2), r"1 is Dropout\(p=0\.2")):
        with pytest.raises(ValueError, match=f"is of another model: {says}"):
            go_on(tmp_path, data, model=model)
    assert go_on(tmp_path, data, model=made(1, 0.1)).epochs == 2


# Interruptions.


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["write_data", "finish", "set_up_storage_writer"])
def test_an_interruption_while_a_checkpoint_is_written_is_one(run, data, monkeypatch, kind, where):
    """Also where torch's own error on the way out hides it."""
    from torch.distributed.checkpoint import FileSystemWriter

    for hidden in (False, True):

        def interrupted(self, *arguments, hidden=hidden, **named):
            try:
                raise kind()
            finally:
                if hidden:
                    raise RuntimeError("unexpected pos 64 vs 0")

        with monkeypatch.context() as patched, pytest.raises(kind):
            patched.setattr(FileSystemWriter, where, interrupted)
            go_on_from(run, data)
    assert go_on(run, data).epochs == 2


def go_on_from(run, data):
    """Resume, where an interruption is the test's own."""
    return fit(net(), data, RECIPE, out=run, progress=False, resume=True)


def test_an_interruption_while_one_is_read_is_one(run, data, monkeypatch):
    from torch.distributed.checkpoint import FileSystemReader

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSystemReader, "read_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(net(), data, RECIPE, out=run, progress=False, resume=True)

"""Broken files, bad arguments and missing packages are said when the data are opened, or when they are read."""

import io
import json
import sys
import tarfile
from contextlib import closing
from dataclasses import replace

import pytest
from helpers.feeds import CPU, RECIPE
from PIL import Image

from nearfold.train import load_data, open_data
from nearfold.train.distributed import Team
from nearfold.train.feed import open_feed

pytest.importorskip("pyarrow")
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.usefixtures("small_pieces"),
]

# Broken data.


def jpeg(value=0, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (30, 20), value).save(file, "PNG" if mode == "I;16" else "JPEG")
    return file.getvalue()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pairs(first=0, count=20):
    """Members of a tar file: images and labels."""
    both = [((f"k{n:03}.jpg", jpeg(n)), (f"k{n:03}.cls", b"%d\n" % (n % 2))) for n in range(first, first + count)]
    return [member for pair in both for member in pair]


def test_tar_conventions(tmp_path):
    described = [(f"a/{n}.json", json.dumps({"label": n % 2, "name": n}).encode()) for n in range(6)]
    described += [(f"a/{n}.JPEG", jpeg(n)) for n in range(6)]
    tar(tmp_path / "data" / "pets-train-0000.tar", [*described, ("notes.txt", b"hello")])
    tar(tmp_path / "data" / "pets-validation-0000.tar", pairs(0, 4))
    tar(tmp_path / "data" / "pets-test-0000.tar", [("x.jpg", jpeg())])
    (tmp_path / "data" / "._pets-train-0000.tar").write_bytes(b"what some systems leave")
    assert open_data(tmp_path).classes == ("0", "1")
    (tmp_path / "data" / "classes.txt").write_text("cat\ndog")
    data = open_data(tmp_path, image_size=8, validation=0.3)
    assert data.classes == ("cat", "dog")
    assert {name: len(share) for name, share in data.splits.items()} == {"train": 4, "val": 2, "test": 4}


def cut(path, at):
    path.write_bytes(path.read_bytes()[:at])


def group(root, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = columns.pop("images", None) or [jpeg(n) for n in range(20)]
    labels = columns.pop("labels", None) or [n % 2 for n in range(20)]
    table = pa.table({"image": images, "label": labels})
    pq.write_table(table[: columns.pop("rows", 20)], root / columns.pop("name", "train-0.parquet"), row_group_size=5)


def secret_in_part(root):
    group(root)
    group(root, name="test-0.parquet", labels=[0, -1] * 10)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda root: None, "holds neither parquet files nor class folders"),
        (lambda root: tar(root / "all.tar", pairs()), "no tar file for training: name them train-.*; found all.tar"),
        (lambda root: cut(tar(root / "train-0.tar", pairs()), 5000), r"train-0\.tar cannot be read as .*tar file"),
        (lambda root: cut(tar(root / "train-0.tar", pairs()), 512 * 5), r"train-0\.tar cannot be read .*no end"),
        (lambda root: (root / "train-0.tar").touch(), r"train-0\.tar cannot be read as .* \(empty file\)"),
        (lambda root: tar(root / "train-0.tar", []), r"train-0\.tar holds no image"),
        (lambda root: tar(root / "train-0.tar", pairs()[:-1]), r"train-0\.tar, key k019, has no label: put k019\.cls"),
        (
            lambda root: tar(root / "train-0.tar", [("k.jpg", jpeg()), ("k.cls", b"cat")]),
            r"train-0\.tar, key k\.cls holds no integer as label \('cat'\)",
        ),
        (
            lambda root: tar(root / "train-0.tar", [("k.jpg", jpeg()), ("k.json", b'{"label": "cat"}')]),
            r"train-0\.tar, key k\.json holds no integer",
        ),
        (
            lambda root: tar(root / "train-0.tar", [("k.jpg", jpeg()), ("k.cls", b"-1")]),
            r"train-0\.tar, key k, has the label -1",
        ),
        (
            lambda root: tar(root / "train-0.tar", [("k.jpg", jpeg()), ("k.png", jpeg())]),
            r"train-0\.tar holds two images of the key k",
        ),
        (
            lambda root: [tar(root / f"train-{n}.tar", pairs(15 * n)) for n in range(2)],
            r"train-1\.tar and .*train-0\.tar both hold the key k015",
        ),
        (lambda root: (group(root), cut(root / "train-0.parquet", -9)), r"train-0\.parquet cannot be read as parquet"),
        (lambda root: group(root, rows=0), r"train-0\.parquet has no rows"),
        (lambda root: group(root, labels=[0, None] * 10), r"train-0\.parquet, row 1, has the label None"),
        (secret_in_part, r"test-0\.parquet, row 1, has no label, other test images have"),
    ],
)
def test_what_is_broken_is_said_when_the_data_are_opened(tmp_path, damage, says):
    damage(tmp_path)
    with pytest.raises(ValueError, match=says):
        open_data(tmp_path)


def broken_file(root):
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(10):
            (root / name / f"{number}.jpg").write_bytes(jpeg(number))
    return root / "cat" / "3.jpg"


def broken_group(root):
    group(root, images=[bytes(range(256)) * 8] * 20)
    content = bytearray((root / "train-0.parquet").read_bytes())
    content[4:60] = bytes(56)
    (root / "train-0.parquet").write_bytes(bytes(content))


def swapped(members, at, content):
    return [*members[:at], (members[at][0], content), *members[at + 1 :]]


def shortened(root):
    """After it was opened."""
    path = tar(root / "train-0.tar", pairs())
    return lambda: cut(path, path.stat().st_size // 2)


def removed(root):
    path = broken_file(root)
    return lambda: path.unlink()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda root: cut(broken_file(root), 200),
            r"cat/3\.jpg does not decode as an image \(.*\): replace or delete it",
        ),
        (removed, r"cat/3\.jpg cannot be read \(.*\): restore it"),
        (lambda root: broken_file(root).write_bytes(jpeg(0, "I;16")), r"cat/3\.jpg has more than 8 bits a channel"),
        (
            lambda root: tar(root / "train-0.tar", swapped(pairs(), 6, b"nothing")),
            r"train-0\.tar, key k003 does not decode as an image",
        ),
        (shortened, r"train-0\.tar, key k01\d is cut short: fetch the file again"),
        (
            lambda root: group(root, images=[jpeg()] * 7 + [jpeg()[:200]] + [jpeg()] * 12),
            r"train-0\.parquet, row 7 does not decode as an image",
        ),
        (
            lambda root: group(root, images=[jpeg()] * 7 + [None] + [jpeg()] * 12),
            r"train-0\.parquet, row 7, holds no image bytes",
        ),
        (broken_group, r"train-0\.parquet, row group \d, cannot be read as parquet"),
    ],
)
def test_what_is_broken_inside_is_said_when_it_is_read(tmp_path, damage, says, workers):
    afterwards = damage(tmp_path)
    data = open_data(tmp_path, image_size=8, validation=0.1)
    if callable(afterwards):
        afterwards()
    feed = data.open_feed(replace(RECIPE, batch_size=1), Team(0, 1, CPU), workers)
    with pytest.raises(ValueError, match=says) as raised, closing(feed):  # wherever the image went
        for batches in (feed.train(0), feed.evaluation("val"), feed.evaluation("test")):
            list(batches)
    assert "\n" not in str(raised.value), "no traceback of a worker"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image_size": 0}, "image_size must be an integer of at least 1; got 0"),
        ({"validation": 1}, "validation must be a share between 0 and 1"),
        ({"source": "no/such/place"}, "no/such/place does not exist: pass .*a folder with train-"),
        ({"source": __file__}, "is a file, not a folder"),
    ],
)
def test_bad_arguments(image_folders, arguments, says):
    with pytest.raises(ValueError, match=says):
        open_data(**({"source": image_folders / "folder"} | arguments))


def test_augmentations_stay_where_they_belong(image_folders):
    data, team = open_data(image_folders / "folder", image_size=16), Team(0, 1, CPU)
    with pytest.raises(ValueError, match=r"augment='crop_flip' is for images in memory.*'resized_crop'"):
        open_feed(data, replace(RECIPE, augment="crop_flip"), team, 0)
    with pytest.raises(ValueError, match=r"augment='resized_crop' is for images read from files.*'crop_flip'"):
        open_feed(load_data(limit=100), RECIPE, team, 0)
    with pytest.raises(ValueError, match="workers must be an integer of at least 0; got -1"):
        open_feed(data, RECIPE, team, -1)


def test_what_is_not_installed_is_named(image_folders, monkeypatch):
    data, team = open_data(image_folders / "folder", image_size=16), Team(0, 1, CPU)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"'resized_erasing' needs torchvision.*or choose augment='resized_crop'"):
        open_feed(data, replace(RECIPE, augment="resized_erasing"), team, 0)
    with pytest.raises(ImportError, match=r"holds parquet files: pip install pyarrow"):
        open_data(image_folders / "parquet")

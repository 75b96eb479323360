import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from nearfold.train import ImageData, Split, load_data, readers

CIFAR = Path(__file__).parents[1] / ".." / "shared" / "data" / "cifar10"


def picture(value, size=(6, 4), mode="RGB"):
    """An image (width, height) of one colour that tells which one it is."""
    return Image.new(mode, size, value if mode != "RGB" else (value, 10, 250))


def encoded(value, size=(6, 4), mode="RGB", kind="PNG"):
    file = io.BytesIO()
    picture(value, size, mode).save(file, kind)
    return file.getvalue()


def image_folder(root, count=10, classes=("cat", "dog"), **options):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(20 * number + label, **options).save(root / name / f"{number}.png")
    return root


def parquet(path, count=20, column="img", names=("cat", "dog"), images=None, labels=None, plain=False):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = images or [encoded(10 * number) for number in range(count)]
    labels = labels or [number % 2 for number in range(len(images))]
    cells = images if plain else [{"bytes": image, "path": None} for image in images]
    table = pa.table({column: cells, "label": labels})
    if names:
        info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": list(names)}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


# Digits, subsets, splits.


def test_digits():
    data = load_data()
    assert (data.name, data.channels, data.size, data.classes[3]) == ("digits", 1, (8, 8), "3")
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    pixels = data.train.images.float() / 255
    assert data.train.images.max() == 255 and data.train.images.min() == 0
    assert data.mean.item() == pytest.approx(pixels.mean().item(), abs=1e-6)
    assert data.std.item() == pytest.approx(pixels.std(unbiased=False).item(), abs=1e-6)
    for split, share in ((data.test, 0.2), (data.val, 0.08), (data.train, 0.72)):
        counts = torch.bincount(split.labels)
        whole = sum(torch.bincount(s.labels) for s in (data.train, data.val, data.test))
        assert ((counts - whole * share).abs() <= 2).all()


def identities(split):
    return {image.numpy().tobytes() for image in split.images}


def test_splits_are_disjoint_and_the_test_images_fixed():
    one, other = load_data(seed=1), load_data(seed=2)
    assert identities(one.test) == identities(other.test)
    assert identities(one.val) != identities(other.val)
    assert torch.equal(load_data(seed=1).val.images, one.val.images)
    assert not identities(one.train) & identities(one.val)
    assert not (identities(one.train) | identities(one.val)) & identities(one.test)


def test_limit_is_balanced_deterministic_and_nested():
    small, large = load_data(limit=50, validation=0.2), load_data(limit=100, validation=0.2)
    assert torch.bincount(small.train.labels).tolist() == [4] * 10
    assert torch.bincount(small.val.labels).tolist() == [1] * 10
    assert torch.bincount(small.test.labels).tolist() == [5] * 10
    assert identities(small.test) < identities(large.test)
    assert torch.equal(load_data(limit=50, validation=0.2).train.images, small.train.images)
    assert not torch.equal(load_data(limit=50, validation=0.2, seed=1).train.images, small.train.images)
    assert len(load_data(limit=10_000).test) == len(load_data().test)
    more = load_data(limit=50, test_limit=120, validation=0.2)  # the same to train on, more to test
    assert len(more.test) == 120 and torch.equal(more.train.images, small.train.images)
    with pytest.raises(ValueError, match="test_limit must be None or an integer of at least 1; got 0"):
        load_data(test_limit=0)


def test_limit_with_classes_of_different_sizes_takes_all_there_is(tmp_path):
    image_folder(tmp_path / "train", 3, ("a",))
    image_folder(tmp_path / "train", 9, ("b",))
    image_folder(tmp_path / "test", 2, ("a", "b"))
    data = load_data(tmp_path, limit=8, validation=0.2)
    counts = torch.bincount(torch.cat([data.train.labels, data.val.labels]))
    assert counts.tolist() == [3, 5]


def test_image_size_resizes_digits():
    data = load_data(limit=50, image_size=16)
    assert data.size == (16, 16) and data.train.images.dtype == torch.uint8
    mean = data.train.images.float().mean() - load_data(limit=50).train.images.float().mean()
    assert abs(mean) < 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"limit": 0}, "limit must be None or an integer of at least 1; got 0"),
        ({"limit": 2.5}, "limit must be"),
        ({"limit": 5}, "no class has two images.*'val'.*raise limit"),
        ({"validation": 0}, "validation must be a share between 0 and 1"),
        ({"validation": 1.0}, "validation must be"),
        ({"image_size": 0}, "image_size must be"),
        ({"source": "no/such/place"}, "no/such/place does not exist: pass 'digits'"),
        ({"source": __file__}, "is a file, not a folder"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        load_data(**arguments)


def test_data_that_does_not_fit_together_is_refused():
    images = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    good = Split(images, labels)
    with pytest.raises(ValueError, match=r"uint8 \(N, C, H, W\); got torch.float32"):
        Split(images.float(), labels)
    with pytest.raises(ValueError, match=r"labels must be int64 \(4,\)"):
        Split(images, labels[:3])
    with pytest.raises(ValueError, match="'val' is empty"):
        ImageData("x", ("a", "b"), good, good[torch.tensor([], dtype=torch.int64)], good)
    with pytest.raises(ValueError, match="labels of 'train' run from 0 to 1, but there are 1 classes"):
        ImageData("x", ("a",), good, good, good)
    with pytest.raises(ValueError, match=r"'test' are \(1, 2, 3\)"):
        ImageData("x", ("a", "b"), good, good, Split(torch.zeros(4, 1, 2, 3, dtype=torch.uint8), labels))


def test_constant_channels_can_be_divided_by():
    images = torch.full((4, 1, 2, 2), 255, dtype=torch.uint8)
    split = Split(images, torch.zeros(4, dtype=torch.int64))
    data = ImageData("x", ("a",), split, split, split)
    assert data.mean.item() == 1 and data.std.item() == pytest.approx(0.5 / 255)


# Image folders.


def test_image_folder_without_splits(tmp_path):
    data = load_data(image_folder(tmp_path / "pets"), validation=0.25)
    assert (data.name, data.classes, data.channels, data.size) == ("pets", ("cat", "dog"), 3, (4, 6))
    assert (len(data.train), len(data.val), len(data.test)) == (12, 4, 4)
    for split in (data.train, data.val, data.test):  # the colour tells number and class
        assert torch.equal(split.images[:, 0, 0, 0].long() % 20, split.labels)
        assert (split.images[:, 1:] == torch.tensor([10, 250])[:, None, None]).all()
    assert len(identities(data.train) | identities(data.val) | identities(data.test)) == 20


def test_image_folder_with_splits(tmp_path):
    for name, count in (("train", 5), ("val", 2), ("test", 3)):
        image_folder(tmp_path / name, count)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / "._0.png").write_text("not an image either")
    data = load_data(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (10, 4, 6)


def test_gray_and_colour(tmp_path):
    gray = load_data(image_folder(tmp_path / "gray", mode="L"))
    assert gray.channels == 1
    image_folder(tmp_path / "mixed", 4, ("a",), mode="L")
    image_folder(tmp_path / "mixed", 4, ("b",), mode="RGBA")
    mixed = load_data(tmp_path / "mixed")
    assert mixed.channels == 3
    grays = mixed.train.images[mixed.train.labels == 0]
    assert torch.equal(grays[:, 0], grays[:, 2])


def test_sizes_that_differ_need_image_size(tmp_path):
    image_folder(tmp_path, 4, ("a",), size=(6, 4))
    image_folder(tmp_path, 4, ("b",), size=(5, 9))
    with pytest.raises(ValueError, match=r"differ in size.*png has \(4, 6\).*png has \(9, 5\); pass image_size="):
        load_data(tmp_path)
    assert load_data(tmp_path, image_size=4).size == (4, 4)


def break_image(root):
    (root / "cat" / "3.png").write_bytes(encoded(1)[:40])


def break_every_image(root):
    for path in root.rglob("*.png"):
        path.write_text("nothing")


def empty_class(root):
    (root / "eel").mkdir()


def only_files(root):
    for path in sorted(root.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / "readme.txt").write_text("hello")


def class_of_test_only(root):
    image_folder(root / "train")
    image_folder(root / "test", classes=("emu",))


def no_train(root):
    image_folder(root / "test")


def deep(root):
    Image.new("I;16", (6, 4), 40_000).save(root / "cat" / "3.png")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_image, r"cat/3\.png does not decode as an image \(.*\): replace or delete it"),
        (break_every_image, r"\.png does not decode as an image"),
        (empty_class, "eel holds no image.*add some, or delete"),
        (only_files, "holds neither parquet files nor class folders: put images in .*train/CLASS"),
        (class_of_test_only, "test/emu is no class of the training images: cat, dog"),
        (no_train, "has no folder train/"),
        (deep, r"cat/3\.png has more than 8 bits a channel"),
    ],
)
def test_broken_image_folders(tmp_path, damage, says):
    image_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=says):
        load_data(tmp_path)


def test_more_than_the_memory_limit(tmp_path, monkeypatch):
    image_folder(tmp_path)
    monkeypatch.setattr(readers, "MEMORY_LIMIT", 10 * 3 * 4 * 6)
    with pytest.raises(ValueError, match=r"20 images of \(3, 4, 6\) take .* smaller limit= or image_size="):
        load_data(tmp_path)
    assert len(load_data(tmp_path, limit=6).train) == 4  # with as few test images


# Parquet.


@pytest.mark.parametrize("options", [{}, {"column": "image"}, {"plain": True}])
@pytest.mark.parametrize("place", ["", "data"])
def test_parquet(tmp_path, options, place):
    parquet(tmp_path / place / "train-00000-of-00002.parquet", 20, **options)
    parquet(tmp_path / place / "train-00001-of-00002.parquet", 10, **options)
    parquet(tmp_path / place / "test-00000-of-00001.parquet", 6, **options)
    data = load_data(tmp_path)
    assert (data.classes, data.channels, data.size) == (("cat", "dog"), 3, (4, 6))
    assert (len(data.train) + len(data.val), len(data.test)) == (30, 6)
    assert torch.equal(data.test.images[:, 0, 0, 0], torch.arange(0, 60, 10, dtype=torch.uint8))
    assert data.test.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_parquet_validation_file_and_no_names(tmp_path):
    parquet(tmp_path / "train.parquet", 20, names=None)
    parquet(tmp_path / "validation-0.parquet", 4, names=None)
    data = load_data(tmp_path)
    assert data.classes == ("0", "1")
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 4)


def truncated(root):
    path = parquet(root / "train.parquet")
    path.write_bytes(path.read_bytes()[:-30])


def scrambled(root):
    path = parquet(root / "train.parquet", images=[bytes(range(256)) * 20] * 20)
    content = bytearray(path.read_bytes())
    content[4:80] = bytes(76)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, r"train\.parquet cannot be read as parquet \(.*\): fetch the file again"),
        (scrambled, r"train\.parquet, row group 0, cannot be read as parquet"),
        (
            lambda root: parquet(root / "all.parquet"),
            "no parquet file for training: name them train-.*all.parquet",
        ),
        (
            lambda root: parquet(root / "train.parquet", column="picture", plain=True),
            "needs a column 'label' .* it has picture",
        ),
        (
            lambda root: parquet(root / "train.parquet", images=[encoded(0)] * 7 + [b"\xff\xd8junk"]),
            r"train\.parquet, row 7 does not decode as an image",
        ),
        (
            lambda root: parquet(root / "train.parquet", images=[encoded(0)] * 7 + [None]),
            r"train\.parquet, row 7, holds no image bytes: write the images into",
        ),
        (
            lambda root: parquet(root / "train.parquet", labels=[0, 1, -1] + [0] * 17),
            r"train\.parquet, row 2, has the label -1",
        ),
        (
            lambda root: parquet(root / "train.parquet", labels=[0, 5] * 10),
            r"train\.parquet, row 1, has the label 5, but .* names only 2 classes",
        ),
    ],
)
def test_broken_parquet(tmp_path, damage, says):
    damage(tmp_path)
    with pytest.raises(ValueError, match=says):
        load_data(tmp_path)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="holds parquet files: pip install pyarrow"):
        load_data(tmp_path)


@pytest.mark.skipif(not CIFAR.is_dir(), reason="../shared/data/cifar10 is not here")
def test_real_cifar():
    data = load_data(CIFAR, limit=200)
    assert data.classes[0] == "airplane" and data.size == (32, 32) and data.channels == 3
    assert torch.bincount(data.test.labels).tolist() == [20] * 10
    assert ((data.mean - torch.tensor([0.49, 0.48, 0.45])).abs() < 0.05).all()

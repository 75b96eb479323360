"""Folders as people have them: which images are data, of which split and class; what is left out is said."""

import itertools
import os
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfold.train.layout import SPLIT_WORDS, Tree, is_hidden, split_named
from nearfold.train.sources import open_source

numbers = itertools.count()


def image(path):
    """A file called an image, with a content that no other has: nothing here decodes one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"image {next(numbers)}")
    return path


def opened(root):
    """The source, the bytes of the images of each split, and how many images the warning says are left out."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        source = open_source(root)
    text = " ".join(str(warning.message).removeprefix(str(root)) for warning in said)
    left_out = sum(int(n) for n in re.findall(r"(\d+) (?:hidden image )?files?(?: in no class| \()", text))
    content = {}
    for split, records in source.splits.items():
        read = records.reader(1)
        content[split] = [read(row) for row in range(len(records.labels))]
    return source, content, left_out, text


def there(root):
    """How many files are called an image."""
    return sum(name.endswith((".png", ".JPG")) for _, _, names in os.walk(root) for name in names)


SPELLINGS = st.tuples(
    st.sampled_from(["", "set-", "01_"]),
    st.sampled_from([str.lower, str.upper, str.title]),
    st.sampled_from(["", "_set", "2017", " images", "-data", "_1"]),
)


@st.composite
def spelled_splits(draw):
    """By split, how its folder is spelled."""
    names = {}
    for split in ("train", *draw(st.sets(st.sampled_from(["val", "test"])))):
        before, case, after = draw(SPELLINGS)
        names[split] = before + case(draw(st.sampled_from(SPLIT_WORDS[split]))) + after
    return names


NOISE = (
    "{split}/{label}/.ipynb_checkpoints/0-checkpoint.png",
    "{split}/{label}/._0.png",
    "__MACOSX/{split}/{label}/0.png",
    ".git/objects/0.png",
    "{split}/.cache/{label}/0.png",
    "extra/0.png",
    "extra/{label}/0.png",
    "{split}/0.png",
    "0.png",
    "{split}/@eaDir/0.png",
)


@settings(max_examples=30, deadline=None)
@given(names=spelled_splits(), noise=st.lists(st.sampled_from(NOISE), max_size=4), deep=st.booleans())
def test_splits_in_every_spelling_are_splits(names, noise, deep):
    """And every image is used in its split, or is one that is said to be left out."""
    with tempfile.TemporaryDirectory() as new:
        check_spelling(Path(new), names, noise, deep)


def check_spelling(root, names, noise, deep):
    planted = {split: set() for split in names}
    for split, name in names.items():
        for label in ("cat", "dog"):
            for number in range(2):
                inside = f"{name}/{label}/{'more/' if deep else ''}{number}.{'png' if number else 'JPG'}"
                planted[split].add(image(root / inside).read_bytes())
    for pattern in noise:
        path = root / pattern.format(split=names["train"], label="cat")
        if not path.exists():
            image(path)
    source, content, left_out, _ = opened(root)
    assert source.classes == ("cat", "dog")
    assert {split: set(images) for split, images in content.items()} == planted
    assert sum(map(len, content.values())) + left_out == there(root)


WORDS = ["train", "Training", "test", "valid", "Test_Set", "seg_train", "seg_test", "bullet_train", "cat", "dog"]
WORDS += ["images", "data", ".git", "__MACOSX", "0.png", "1.png", "2.JPG", "._0.png", "notes.txt"]
PATHS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(
    lambda words: "/".join([*(word for word in words[:-1] if "." not in word[1:]), f"{words[-1].split('.')[0]}.png"])
)


@settings(max_examples=150, deadline=None)
@given(paths=st.lists(PATHS, min_size=1, max_size=8, unique=True))
def test_no_tree_loses_an_image_or_mixes_splits(paths):
    """Whatever lies where: one line that names a place in the folder, or every image is used once or said."""
    with tempfile.TemporaryDirectory() as new:
        check_tree(Path(new), paths)


def check_tree(root, paths):
    for path in paths:
        image(root / path)
    try:
        source, content, left_out, text = opened(root)
    except ValueError as error:
        assert str(root) in str(error) and "\n" not in str(error)
        return
    used = Counter(one for images in content.values() for one in images)
    assert max(used.values()) == 1
    assert used.total() + left_out == there(root), text
    assert sum(split_named(name) is not None for name in source.classes) <= 1
    for split, records in source.splits.items():
        for row, label in enumerate(records.labels.tolist()):
            parts = Path(records.where(row)).relative_to(root).parts
            assert not any(map(is_hidden, parts))
            assert source.classes[label] in parts[:-1]
            others = {found for part in parts[:-1] if (found := split_named(part))} - {split}
            assert others <= {split_named(source.classes[label])}, parts


def folder(root, *paths, count=3):
    for path in paths:
        for number in range(count):
            image(root / path / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("paths", "classes", "sizes"),
    [
        (["Train/a", "Train/b"], ("a", "b"), {"train": 6}),
        (["seg_train/seg_train/sea", "seg_test/seg_test/sea", "seg_pred"], ("sea",), {"train": 3, "test": 3}),
        (["chest/train/a", "chest/val/a", "chest/test/a"], ("a",), {"train": 3, "val": 3, "test": 3}),
        (["x/train/a", "x/test/a", "x/x/train/a", "__MACOSX/x/train/a"], ("a",), {"train": 3, "test": 3}),
        (["PetImages/Cat", "PetImages/Dog"], ("Cat", "Dog"), {"train": 6}),
        (["train_test_split/train/a", "train_test_split/test/a"], ("a",), {"train": 3, "test": 3}),
        (["train/images/a", "train/images/b", "test/images/a", "test/images/b"], ("a", "b"), {"train": 6, "test": 6}),
        (["train/n01/images", "val/n01/images"], ("n01",), {"train": 3, "val": 3}),
        (["bullet_train", "test tube", "cat"], ("bullet_train", "cat", "test tube"), {"train": 9}),
        (["train/train", "train/apple", "test/train"], ("apple", "train"), {"train": 6, "test": 3}),
        (["train/a", "train/b", "test"], ("a", "b"), {"train": 6}),  # test images without labels
    ],
)
def test_layouts_of_well_known_archives(tmp_path, paths, classes, sizes):
    source, content, left_out, text = opened(folder(tmp_path, *paths))
    assert (source.classes, {split: len(images) for split, images in content.items()}) == (classes, sizes)
    assert sum(sizes.values()) + left_out == there(tmp_path), text


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["Training", "Testing"], r"Testing is named like a split, but|Training is named like a split, but"),
        (["my_train", "my_test"], "my_test may be a split or a class: if it is a split, name it train, val or test"),
        (["cat", "dog", "train"], "train is named like a split, but its images are in no class folders"),
        (["cat", "dog", "test/cat"], r"has no folder train/"),
        (["train/a", "Training/a"], "named for the same or for several splits: keep one folder for a split"),
        (["train/a", "val/a", "valid/a"], "valid and .*val are named for the same"),
        (
            ["archive/data/train/a", "archive/data/test/a"],
            r"lies in .*archive, which would be a class: pass .*archive/data",
        ),
        (["training_data/train/a", "training_data/test/a"], r"test is named like a split, but lies in .*training_data"),
        (["seg_train/a", "cat"], "seg_train may be a split or a class"),
        (["train/a", "test/b"], "test/b is no class of the training images: a"),
    ],
)
def test_what_has_two_readings_is_refused(tmp_path, paths, says):
    with pytest.raises(ValueError, match=says):
        open_source(folder(tmp_path, *paths))


def test_links_are_followed_but_nothing_is_used_twice(tmp_path):
    outside = folder(tmp_path / "elsewhere", "dog")
    root = folder(tmp_path / "data", "train/cat", "test/cat")
    (root / "train" / "dog").symlink_to(outside / "dog")
    (root / "a_link").symlink_to(root / "test")
    (root / "val").symlink_to(root / "train")
    (root / "train" / "cat" / "loop").symlink_to("..")
    (root / "train" / "everything").symlink_to("/")
    source, content, _, text = opened(root)
    assert source.classes == ("cat", "dog") and {s: len(c) for s, c in content.items()} == {"train": 6, "test": 3}
    assert "4 links to folders that are there anyway" in text


def test_other_files_in_class_folders_are_said(tmp_path):
    root = folder(tmp_path, "train/cat", "train/dog")
    for name in ("1.heic", "2.HEIC", "notes.txt"):
        (root / "train" / "cat" / name).write_text("?")
    assert "left out 3 files without an image's ending (.heic: 2, .txt: 1)" in opened(root)[3]


@pytest.mark.parametrize("name", ["z.jpg", "train-0.parquet", "train-0.tar"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to("nowhere")])
def test_what_is_no_file_is_refused_and_not_read(tmp_path, make, name):
    root = folder(tmp_path, "train/cat", "train/dog")
    make(root / "train" / "cat" / name)
    with pytest.raises(ValueError, match=f"cat/{name} is a pipe, a device or a broken link, not a file"):
        open_source(root)


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path):
    root = folder(tmp_path, "train/cat")
    records = open_source(root).splits["train"]
    path = root / "train" / "cat" / "1.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"cat/1\.png is a pipe, a device or a folder, not a file"):
        records.reader(1)(1)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"1\.png has 1,099,511,627,776 bytes, at most 536,870,912 are read"):
        records.reader(1)(1)


def test_names_cannot_break_a_message(tmp_path):
    root = folder(tmp_path, "train/cat")
    image(root / "train" / "cat" / "x\n\x1b[31m.png")
    records = open_source(root).splits["train"]
    assert records.where(3).endswith(r"x\n\x1b[31m.png")


def test_a_tree_keeps_the_order_of_paths(tmp_path):
    """The order decides subsets and splits by seed: it is that of paths by their parts."""
    root = tmp_path
    for name in ("a/b.png", "a.png", "a-b/c.png", "B.png", "a/a/z.png"):
        image(root / "train" / "cat" / name)
    inside = root / "train" / "cat"
    assert [root / path for path in Tree(root).images_below("train/cat")] == sorted(inside.rglob("*.png"))

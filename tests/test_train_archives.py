"""Tar and parquet files as people have them, and as nobody should: cut, lying, nested, huge."""

import io
import json
import re
import tarfile
import time
import warnings
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nearfold.train import load_data, open_data
from nearfold.train.sources import open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(value=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def member(name, size, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def tar(root, members, name="train-0.tar"):
    """Members are (name, content), or a header alone."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / name, "w") as archive:
        for one in members:
            info, content = one if isinstance(one, tuple) else (one, b"")
            info = info if isinstance(info, tarfile.TarInfo) else member(info, len(content))
            archive.addfile(info, io.BytesIO(content))
    return root


def pairs(count=20):
    both = [((f"k{n}.png", png(n)), (f"k{n}.cls", b"%d\n" % (n % 2))) for n in range(count)]
    return [one for pair in both for one in pair]


def claims(root, name, size, kind=tarfile.REGTYPE, times=1, content=b"", at=0):
    """A tar file with a header that claims a size, before all or after `at` bytes."""
    path = tar(root, pairs()) / "train-0.tar"
    header = member(name, size, kind).tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + header * times + whole[at:])
    return root


AFTER = 1024  # the header and the content of the first member
NESTED = b'{"label":' * 100_000 + b"1" + b"}" * 100_000
UNFIT = {
    "1 TB": (lambda r: claims(r, "z.jpg", 2**40), r"member z\.jpg claims 1,099,511,627,776 bytes"),
    "1 TB later": (lambda r: claims(r, "z.jpg", 2**40, at=AFTER), r"member z\.jpg claims 1,099,511,627,776 bytes"),
    "2^63": (lambda r: claims(r, "z.jpg", 2**63), r"member z\.jpg claims 9,223,372,036,854,775,808 bytes"),
    "2^63 of no image": (lambda r: claims(r, "z.txt", 2**63), r"member z\.txt claims 9,223,372,036,854,775,808 bytes"),
    "2^80": (lambda r: claims(r, "z.cls", 2**80), r"member z\.cls claims 1,208,925,819,614,629,174,706,176 bytes"),
    "a label of 1 TB": (lambda r: claims(r, "z.cls", 2**40), r"z\.cls claims .* at most 4,096 are read"),
    "a label of 9 MB": (
        lambda r: tar(r, [*pairs(), ("z.json", b" " * 9_000_000)]),
        r"z\.json claims 9,000,000 bytes.* at most 4,194,304 are read",
    ),
    "negative": (lambda r: claims(r, "z.jpg", -1), r"member z\.jpg claims -1 bytes"),
    "a header of 1 TB": (lambda r: claims(r, "x", 2**40, tarfile.XHDTYPE), r"a header claims 1099511627776 bytes"),
    "a name of 2^62": (
        lambda r: claims(r, "x", 2**62, tarfile.GNUTYPE_LONGNAME),
        r"a header claims 4611686018427387904",
    ),
    "names of names": (
        lambda r: claims(r, "x", 4, tarfile.GNUTYPE_LONGNAME, times=5000, content=b"abc\0"),
        r"cannot be read as an uncompressed tar file \(maximum recursion",
    ),
    "symbolic link": (
        lambda r: tar(r, [*pairs(), member("z.jpg", 0, tarfile.SYMTYPE, "k0.png")]),
        r"member z\.jpg is a link",
    ),
    "hard link": (
        lambda r: tar(r, [*pairs(), member("z.jpg", 0, tarfile.LNKTYPE, "k0.png")]),
        r"member z\.jpg is a link",
    ),
    "pipe": (
        lambda r: tar(r, [*pairs(), member("z.jpg", 0, tarfile.FIFOTYPE)]),
        r"z\.jpg is a link or another special",
    ),
    "sparse": (lambda r: claims(r, "z.jpg", 0, tarfile.GNUTYPE_SPARSE), r"z\.jpg is a link or another special"),
    "nested": (lambda r: tar(r, [*pairs(), ("z.json", NESTED)]), r"key z\.json holds no integer as label"),
    "nested list": (lambda r: tar(r, [*pairs(), ("z.json", b"[" * 10**6)]), r"key z\.json holds no integer as label"),
    "label 2^63": (
        lambda r: tar(r, [*pairs(), ("z.png", png()), ("z.cls", b"9223372036854775808")]),
        r"key z, has the label 9223372036854775808: labels must be integers from 0 to 999,999",
    ),
    "label 2^63 in JSON": (
        lambda r: tar(r, [*pairs(), ("z.png", png()), ("z.json", b'{"label": 9223372036854775808}')]),
        r"key z, has the label 9223372036854775808",
    ),
    "label of 5000 digits": (
        lambda r: tar(r, [*pairs(), ("z.png", png()), ("z.json", b'{"label": %s}' % (b"9" * 5000))]),
        r"key z\.json holds no integer as label",
    ),
    "label 1_0": (
        lambda r: tar(r, [("z.png", png()), ("z.cls", b"1_0")]),
        r"key z\.cls holds no integer as label \('1_0'\)",
    ),
    "two labels": (
        lambda r: tar(r, [*pairs(), ("k3.json", b'{"label": 0}')]),
        r"key k3, has two labels, 1 and 0: delete one",
    ),
}


@pytest.mark.parametrize("opener", [load_data, open_data])
@pytest.mark.parametrize(("make", "says"), UNFIT.values(), ids=UNFIT)
def test_a_tar_file_that_lies_is_refused_in_one_line_and_at_once(tmp_path, make, says, opener):
    began = time.monotonic()
    with pytest.raises(ValueError, match=says) as raised:
        opener(make(tmp_path))
    assert "train-0.tar" in str(raised.value) and "\n" not in str(raised.value)
    assert time.monotonic() - began < 60


def test_a_key_of_two_lines_is_named_in_one(tmp_path):
    with pytest.raises(ValueError, match=r"key a\\nb, has no label: put a\\nb\.cls") as raised:
        open_source(tar(tmp_path, [("a\nb.jpg", pairs(1)[0][1])]))
    assert "\n" not in str(raised.value)


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 40 * 512 - 1), st.integers(0, 255)), min_size=1, max_size=20))
def test_no_bytes_of_a_tar_file_end_in_anything_but_one_line(tmp_path_factory, changes):
    path = tar(tmp_path_factory.getbasetemp() / "changed", pairs(8)) / "train-0.tar"
    content = bytearray(path.read_bytes())
    for place, value in changes:  # in headers mostly
        content[(place // 512 * 1024 + place % 512) % len(content)] = value
    for block in range(0, len(content), 512):  # with checksums that fit
        if content[block + 257 : block + 262] == b"ustar":
            header = content[block : block + 512]
            total = 256 + sum(header) - sum(header[148:156])
            content[block + 148 : block + 156] = b"%06o\0 " % total
    path.write_bytes(bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            open_source(path.parent)
        except ValueError as error:
            assert "\n" not in str(error) and str(path.parent) in str(error)


# Keys.


NAMES = st.tuples(
    st.sampled_from(["a", "b", "x/a", "./c", "v1.0/a", ".hid/a", "__MACOSX/a", "._a"]),
    st.sampled_from(["", ".5", ".seg", ".5.7"]),
)


@settings(max_examples=100, deadline=None)
@given(
    keys=st.sets(NAMES, min_size=1, max_size=8),
    labelled=st.sets(NAMES, max_size=8),
    split=st.sampled_from(["train", "test"]),
)
def test_every_image_of_a_tar_file_is_used_or_said(tmp_path_factory, keys, labelled, split):
    root = tmp_path_factory.getbasetemp() / f"keys-{split}"
    contents = {first + more: png(number) for number, (first, more) in enumerate(sorted(keys))}
    members = [(f"{key}.png", content) for key, content in contents.items()]
    members += [(f"{first}{more}.cls", b"1") for first, more in sorted(keys & labelled)]
    tar(root, members, f"{split}-0.tar")
    tar(root, pairs(4), "train-1.tar")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            source = open_source(root)
        except ValueError as error:
            text = str(error)
            assert f"{split}-0.tar" in text or "test" in text
            assert re.search("has no label|holds several images of the key|both hold the key|holds no image", text)
            return
    text = " ".join(str(warning.message) for warning in said)
    left_out = sum(int(n) for n in re.findall(r"(\d+) (?:of the images in tar files|test images without)", text))
    used = Counter()
    for records in source.splits.values():
        read = records.reader(1)
        used.update(read(row) for row in range(len(records.labels)))
    used.subtract(content for name, content in pairs(4) if name.endswith(".png"))
    assert used.total() + left_out == len(keys), text
    assert not +(used - Counter(contents.values())), "each is used once"


def test_dots_are_part_of_a_name_and_fields_are_told_apart(tmp_path):
    members = [(f"img_{n}{'.5' if n % 2 else ''}{end}", content) for n in range(20)
               for end, content in ((".png", png(n)), (".cls", b"%d" % (n // 2 % 2)))]  # fmt: skip
    members += [
        ("img_0.mask.png", png(99)),
        ("one.input.jpg", png(100)),
        ("one.json", b'{"label": 1}'),
        ("two.cls", b"0"),
    ]
    tar(tmp_path, [*members, ("._img_0.png", b"Mac"), ("__MACOSX/x.png", b"Mac")])
    with pytest.warns(UserWarning) as said:
        records = open_source(tmp_path).splits["train"]
    assert len(records.labels) == 21
    assert [records.where(row).rpartition("key ")[2] for row in (0, 1, 20)] == ["img_0", "img_1.5", "one.input"]
    assert records.labels.tolist() == [n // 2 % 2 for n in range(20)] + [1]
    text = str(said[0].message)
    for phrase in (
        "2 of the images in tar files, which are hidden",
        "1 of the images in tar files, which are further fields",
    ):
        assert phrase in text
    assert "1 of the labels in tar files, which have no image" in text


# Parquet.


def rows(path, count=20, image="image", label="label", names=None, labels=None, features=None, extra=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png(n), "path": None} for n in range(count)]
    table = pa.table({image: cells, label: labels or [n % 2 for n in range(count)], **(extra or {})})
    if names or features:
        features = features or {label: {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


@pytest.mark.parametrize(
    "paths",
    [
        ["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"],  # the Hub's cifar10
        ["plain_text/train/0000.parquet", "plain_text/test/0000.parquet"],  # what the Hub converts to
        ["train/0000.parquet", "test/0000.parquet"],
        ["data/train/a.parquet", "data/Testing/a.parquet"],
        ["cifar10-Training.PARQUET", "cifar10-TEST.parquet"],
        ["train-images/en/0.parquet", "test-images/en/0.parquet"],
    ],
)
def test_parquet_files_are_found_where_the_hub_has_them(tmp_path, paths):
    for path, count in zip(paths, (20, 6), strict=True):
        rows(tmp_path / path, count, image="img", names=["cat", "dog"])
    (tmp_path / ".cache").mkdir()
    rows(tmp_path / "__MACOSX" / "train-0.parquet", 3)
    with pytest.warns(UserWarning, match=r"left out 1 hidden image file \(__MACOSX: 1\)"):
        data = load_data(tmp_path)
    assert data.classes == ("cat", "dog") and (len(data.train) + len(data.val), len(data.test)) == (20, 6)
    with pytest.warns(UserWarning):
        assert {s: len(share) for s, share in open_data(tmp_path).splits.items()} == {"train": 18, "val": 2, "test": 6}


def test_several_configurations_are_named(tmp_path):
    for config in ("cropped", "full"):
        rows(tmp_path / config / "train-0.parquet")
    with pytest.raises(ValueError, match=r"holds several data sets, cropped, full: pass .*/cropped"):
        load_data(tmp_path)
    assert load_data(tmp_path / "full").classes == ("0", "1")


def test_what_lies_beside_the_parquet_files_is_said(tmp_path):
    rows(tmp_path / "train-0.parquet")
    rows(tmp_path / "extra.parquet")
    rows(tmp_path / "old" / "train-0.parquet")
    (tmp_path / "1.png").write_bytes(png())
    with pytest.warns(
        UserWarning, match=r"left out 3 files in no class folder or split that is used \(\.: 2, old: 1\)"
    ):
        load_data(tmp_path)
    (tmp_path / "test-train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test-train\.parquet names two splits, test and train"):
        load_data(tmp_path)


def test_a_table_of_numbers_beside_image_folders_is_no_data_set(tmp_path):
    for name in ("train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "train/dog/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    pq.write_table(pa.table({"width": [1]}), tmp_path / "sizes.parquet")
    with pytest.warns(UserWarning, match="left out 1 file in no class folder"):
        assert open_source(tmp_path).classes == ("cat", "dog")


def test_the_labels_of_cifar100_and_others(tmp_path):
    fine, coarse = [n % 4 for n in range(20)], [n % 2 for n in range(20)]
    features = {"fine_label": {"_type": "ClassLabel", "names": list("abcd")}}
    features |= {"coarse_label": {"_type": "ClassLabel", "names": ["x", "y"]}}
    rows(
        tmp_path / "cifar100" / "train-0.parquet",
        20,
        "img",
        "fine_label",
        None,
        fine,
        features,
        {"coarse_label": coarse},
    )
    assert load_data(tmp_path).classes == ("a", "b", "c", "d")
    assert load_data(tmp_path, label_column="coarse_label").classes == ("x", "y")
    assert open_data(tmp_path, label_column="coarse_label").classes == ("x", "y")
    with pytest.raises(
        ValueError, match=r"needs a column 'superclass'.*it has img, fine_label, coarse_label; pass label_column="
    ):
        load_data(tmp_path, label_column="superclass")
    rows(tmp_path / "other" / "train-0.parquet", image="picture", label="breed", names=["pug", "corgi"])
    assert load_data(tmp_path / "other").classes == ("pug", "corgi")  # the metadata call it the label


def test_the_field_of_json_labels(tmp_path):
    described = [(f"{n}.json", json.dumps({"label": 0, "age": n % 3}).encode()) for n in range(12)]
    tar(tmp_path / "tar", described + [(f"{n}.png", png(n)) for n in range(12)])
    assert load_data(tmp_path / "tar", label_column="age").classes == ("0", "1", "2")
    with pytest.raises(ValueError, match="key 0, has no label"):
        load_data(tmp_path / "tar", label_column="size")
    (tmp_path / "files" / "train" / "cat").mkdir(parents=True)
    for source in ("digits", tmp_path / "files"):
        with pytest.raises(ValueError, match="label_column='age' is for parquet and tar files"):
            load_data(source, label_column="age")


@pytest.mark.parametrize("opener", [load_data, open_data])
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0] * 19 + [2 * 10**9], "row 19, has the label 2000000000: labels must be integers from 0 to 999,999"),
        (pa.array([0] * 19 + [2**63], pa.uint64()), "row 19, has the label 9223372036854775808"),
        ([0] * 19 + [1_000_000], "row 19, has the label 1000000:"),
        ([0.0] * 20, "row 0, has the label 0.0"),
        (["cat"] * 20, "row 0, has the label 'cat'"),
        ([True] * 20, "row 0, has the label True"),
        ([[1]] * 20, r"row 0, has the label \[1\]"),
    ],
)
def test_a_wrong_label_is_named_before_it_takes_memory(tmp_path, labels, says, opener):
    rows(tmp_path / "train-0.parquet", labels=labels)
    with pytest.raises(ValueError, match=rf"train-0\.parquet, {says}"):
        opener(tmp_path)


def test_metadata_that_are_none_are_passed_over_and_those_that_differ_are_not(tmp_path):
    for text in (
        "[" * 100_000,
        "{",
        json.dumps({"info": {"features": [1]}}),
        json.dumps({"info": {"features": {"label": 5}}}),
    ):
        table = pa.table({"image": [png(n) for n in range(20)], "label": [0, 1] * 10})
        pq.write_table(table.replace_schema_metadata({"huggingface": text}), tmp_path / "train-0.parquet")
        assert load_data(tmp_path).classes == ("0", "1")
    rows(tmp_path / "train-0.parquet", names=["cat", "dog"])
    rows(tmp_path / "train-1.parquet", names=["dog", "cat"])
    with pytest.raises(ValueError, match=r"train-1\.parquet names other classes than the files before it"):
        load_data(tmp_path)


def test_columns_that_are_there_twice_and_rows_without_end(tmp_path):
    twice = pa.Table.from_arrays([pa.array([png()]), pa.array([0]), pa.array([1])], names=["image", "label", "label"])
    pq.write_table(twice, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet has several columns 'label': keep one"):
        load_data(tmp_path)
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    part = pa.table({"image": pa.nulls(10**7, pa.binary()), "label": pa.nulls(10**7, pa.int64())}, schema)
    with pq.ParquetWriter(tmp_path / "train-0.parquet", schema) as writer:
        for _ in range(14):
            writer.write_table(part)
    with pytest.raises(ValueError, match=r"claims 140,000,000 rows, at most 134,217,728 are read"):
        open_data(tmp_path)


@settings(max_examples=40, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(1, 2500), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_bytes_of_a_parquet_file_end_in_anything_but_one_line(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "changed parquet" / "train-0.parquet"
    rows(path, names=["cat", "dog"])
    content = bytearray(path.read_bytes())
    for place, value in changes:  # from the end, where the description is
        content[-place % len(content)] = value
    path.write_bytes(bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_data(path.parent)
        except ValueError as error:
            assert "\n" not in str(error) and str(path.parent) in str(error)

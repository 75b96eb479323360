import gc
import io
import json
import multiprocessing
import pickle
import sys
import tarfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from torch import nn

from nearfold.recipes import generated
from nearfold.train import Recipe, fit, load_data, open_data, parquet, stream, transforms
from nearfold.train.distributed import Team
from nearfold.train.feed import open_feed
from nearfold.train.seeds import generator

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
NEEDS_TORCHVISION = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
CPU = torch.device("cpu")
RECIPE = Recipe(epochs=2, batch_size=24, lr=3e-3, augment="resized_crop", device="cpu", warmup_epochs=0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that small batches have several lanes."""
    monkeypatch.setattr(stream, "_IMAGES_A_PIECE", 8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same 120 images in every layout, in several files, with small row groups."""
    root = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "ROW_GROUP", 7)
        for layout in generated.LAYOUTS:
            generated.write(root / layout, layout, 120, size=40, shard=50)
    return root


@pytest.fixture(params=generated.LAYOUTS)
def data(request, folders):
    return open_data(folders / request.param, image_size=16)


def together(data, recipe, world, workers, step):
    """The batches of all processes of a team, put together."""
    feeds = [data.open_feed(recipe, Team(rank, world, CPU), workers) for rank in range(world)]
    batches = zip(*(feed.train(step) for feed in feeds), strict=True)
    return [tuple(map(torch.cat, zip(*shares, strict=True))) for shares in batches]


def same(one, other):
    assert len(one) == len(other)
    for (images, labels), (more_images, more_labels) in zip(one, other, strict=True):
        assert torch.equal(images, more_images) and torch.equal(labels, more_labels)


def identities(batches):
    pairs = [pair for batch in batches for pair in zip(*batch, strict=True)]
    return Counter((image.numpy().tobytes(), int(label)) for image, label in pairs)


# Order.


def test_neither_processes_nor_workers_change_a_batch(data):
    whole = together(data, RECIPE, 1, 0, step=0)
    assert [tuple(images.shape) for images, _ in whole] == [(24, 3, 16, 16)] * 4
    assert whole[0][0].dtype == torch.uint8 and whole[0][1].dtype == torch.int64
    for world, workers in ((2, 0), (4, 0), (1, 1), (1, 3), (2, 2)):
        same(together(data, RECIPE, world, workers, step=0), whole)


def test_a_feed_that_starts_later_goes_on_as_an_undisturbed_one(data):
    team = Team(0, 1, CPU)
    steps = data.open_feed(RECIPE, team, 0).steps_per_epoch
    whole = [*data.open_feed(RECIPE, team, 0).train(0), *data.open_feed(RECIPE, team, 0).train(steps)]
    for step in range(2 * steps):
        epoch_end = (step // steps + 1) * steps
        same(list(data.open_feed(RECIPE, team, 0).train(step)), whole[step:epoch_end])
    kept = data.open_feed(RECIPE, team, 2)  # the same workers for epochs, evaluation, and a start over
    next(kept.train(1))
    same(list(kept.train(0)), whole[:steps])
    assert sum(len(labels) for _, labels in kept.evaluation("val")) == kept.count("val") > 0
    same(list(kept.train(steps)), whole[steps:])


def test_two_iterators_at_a_time_are_refused(data):
    feed = data.open_feed(RECIPE, Team(0, 1, CPU), 0)
    first = feed.train(0)
    next(first)
    next(feed.train(0))
    with pytest.raises(AssertionError, match="newer iterator"):
        next(first)


def test_workers_end_with_their_feed(folders):
    feed = open_data(folders / "folder", image_size=16).open_feed(RECIPE, Team(0, 1, CPU), 2)
    batches = feed.train(0)
    next(batches)
    workers = feed._owned[0]._iterator._workers
    feed.itself, feed.batches = feed, batches  # for the garbage collector to find
    del feed, batches
    began = time.monotonic()
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - began < 8, "DataLoader waits 5 s for each worker that does not hear it"


def test_every_image_once_an_epoch_and_in_another_order(data):
    share = data.splits["train"]
    whole = replace(RECIPE, batch_size=len(share), augment="none")
    feed = data.open_feed(whole, Team(0, 1, CPU), 0)
    assert feed.steps_per_epoch == 1
    (first,), (second,) = feed.train(0), feed.train(1)
    assert identities([first]) == identities([second])
    assert len(identities([first])) == len(share)
    assert not torch.equal(first[0], second[0])
    assert not identities([first]) & identities(feed.evaluation("val"))
    assert not identities([first]) & identities(feed.evaluation("test"))
    augmented = data.open_feed(replace(whole, augment="resized_crop"), Team(0, 1, CPU), 0)
    assert not identities(augmented.train(0)) & identities(augmented.train(1)), "other views in every epoch"
    other = data.open_feed(replace(whole, seed=1), Team(0, 1, CPU), 0)
    assert not torch.equal(next(other.train(0))[0], first[0])


def test_evaluation_shares_make_the_split(data):
    alone = data.open_feed(RECIPE, Team(0, 1, CPU), 0)
    for split in ("train", "val", "test"):
        whole = identities(alone.evaluation(split))
        assert sum(whole.values()) == alone.count(split) == len(data.splits[split])
        for world, workers in ((1, 2), (3, 0), (3, 2)):
            feeds = [data.open_feed(RECIPE, Team(rank, world, CPU), workers) for rank in range(world)]
            shares = [list(feed.evaluation(split)) for feed in feeds]
            assert identities(batch for batches in shares for batch in batches) == whole
            sizes = [sum(len(labels) for _, labels in batches) for batches in shares]
            assert max(sizes) - min(sizes) <= 1
            assert max(len(labels) for batches in shares for _, labels in batches) <= RECIPE.batch_size // world


def test_three_layouts_hold_the_same_images(folders):
    found = {}
    for layout in generated.LAYOUTS:
        data = open_data(folders / layout, image_size=16)
        assert data.classes == generated.CLASSES
        feed = data.open_feed(RECIPE, Team(0, 1, CPU), 0)
        fitted = identities(feed.evaluation("train")) + identities(feed.evaluation("val"))
        assert len(fitted) == 120
        found[layout] = fitted, identities(feed.evaluation("test"))
    assert found["parquet"] == found["webdataset"] == found["folder"]


class Fake:
    """Records without images."""

    def __init__(self, units, unit_bytes):
        self.units = torch.tensor([0, *units]).cumsum(0)
        self.labels = torch.zeros(int(self.units[-1]), dtype=torch.int64)
        self.unit_bytes = unit_bytes


def shared(units, unit_bytes=0):
    records = Fake(units, unit_bytes)
    return stream.Share(records, torch.arange(len(records.labels)))


def test_images_of_their_own_are_permuted_evenly():
    share, draws = shared([1] * 4), torch.Generator().manual_seed(0)
    seen = Counter(tuple(stream.epoch_order(share, 4, draws)[0].tolist()) for _ in range(4800))
    assert len(seen) == 24
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 49.7  # chi-square, 23 degrees, 0.1 %


def test_row_groups_are_mixed_and_read_once():
    share = shared([50] * 400 + [30], 10_000_000)
    batch = 256
    count, window = stream.lanes(batch, 10_000_000)
    assert (count, window) == (32, 4)
    order = stream.epoch_order(share, batch, torch.Generator().manual_seed(0))
    assert order.shape == (20_030 // batch, batch)
    assert len(order.unique()) == order.numel()
    unit = torch.searchsorted(share.records.units, order, right=True) - 1
    distinct = torch.tensor([len(row.unique()) for row in unit]).float()
    assert distinct.median() > 100, "a batch holds images of many row groups: 32 lanes of 4, 8 images each"
    neighbours = (order.flatten()[1:] == order.flatten()[:-1] + 1).float().mean()
    assert neighbours < 0.03, "rows that lie together do not come together"
    loads = 0
    for lane in unit.reshape(len(order), count, -1).unbind(1):
        kept = []
        for one in lane.flatten().tolist():
            loads += one not in kept
            kept = ([k for k in kept if k != one] + [one])[-window:]
    assert loads <= 401 + count, "a lane's window is enough to read a row group once; those on a border are read twice"


def test_a_row_is_as_likely_early_as_late():
    share, draws = shared([10] * 30, 10**9), torch.Generator().manual_seed(0)
    places = torch.stack([stream.epoch_order(share, 20, draws).flatten().argsort() for _ in range(300)]).float()
    spread = 300 / 12**0.5 / 300**0.5
    assert ((places.mean(0) - 149.5).abs() < 5 * spread).all()


def test_a_reader_keeps_as_many_row_groups_as_it_is_told(folders, monkeypatch):
    records = open_data(folders / "parquet").splits["train"].records
    read, loads = records.reader(2), []
    original = parquet.ParquetRecords._read_group
    monkeypatch.setattr(
        parquet.ParquetRecords, "_read_group", lambda self, unit: loads.append(unit) or original(self, unit)
    )
    contents = [read(row) for row in (0, 8, 1, 15, 2, 8, 0)]
    assert loads == [0, 1, 2, 1] and contents[0] == contents[-1] != contents[2]


@pytest.mark.parametrize("layout", generated.LAYOUTS)
def test_workers_can_be_spawned(folders, layout):
    data = open_data(folders / layout, image_size=16)
    views = stream._Views(data, RECIPE, 2)
    piece = stream._Piece("train", 0, 0, data.splits["train"].rows[:3].tolist())
    assert torch.equal(pickle.loads(pickle.dumps(views))[piece], views[piece])


# Splits.


def test_held_out_row_groups_are_whole(folders):
    data = open_data(folders / "parquet", validation=0.2)
    train, val = data.splits["train"], data.splits["val"]
    groups = [set((torch.searchsorted(s.records.units, s.rows, right=True) - 1).tolist()) for s in (train, val)]
    assert not groups[0] & groups[1] and len(groups[1]) >= 3
    assert len(train) + len(val) == 120 and 24 <= len(val) <= 30
    assert len(data.splits["test"]) == 12, "test images without labels give way to validation images"
    assert open_data(folders / "parquet", validation=0.2).fingerprint() == data.fingerprint()
    other = open_data(folders / "parquet", validation=0.2, seed=1)
    assert other.fingerprint() != data.fingerprint()


def test_row_groups_of_one_class_are_not_held_out_whole():
    records = Fake([10] * 8, 1000)
    records.labels = torch.arange(8).repeat_interleave(10)
    taken = stream._held_out(stream.Share(records, torch.arange(80)), 0.1, generator(0))
    assert torch.bincount(records.labels[taken]).tolist() == [1] * 8


def test_a_folder_without_splits(tmp_path, folders):
    (folders / "folder" / "train").rename(tmp_path / "only")
    try:
        data = open_data(tmp_path / "only", validation=0.25)
    finally:
        (tmp_path / "only").rename(folders / "folder" / "train")
    sizes = {name: len(share) for name, share in data.splits.items()}
    assert sizes == {"train": 71, "val": 23, "test": 26}  # a fifth of each class, then a quarter, rounded
    rows = torch.cat([share.rows for share in data.splits.values()])
    assert len(rows.unique()) == 120


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
        ({"source": "no/such/place"}, "no/such/place does not exist: pass a folder with train-"),
        ({"source": __file__}, "is a file, not a folder"),
    ],
)
def test_bad_arguments(folders, arguments, says):
    with pytest.raises(ValueError, match=says):
        open_data(**({"source": folders / "folder"} | arguments))


def test_augmentations_stay_where_they_belong(folders):
    data, team = open_data(folders / "folder", image_size=16), Team(0, 1, CPU)
    with pytest.raises(ValueError, match=r"augment='crop_flip' is for images in memory.*'resized_crop'"):
        open_feed(data, replace(RECIPE, augment="crop_flip"), team, 0)
    with pytest.raises(ValueError, match=r"augment='resized_crop' is for images read from files.*'crop_flip'"):
        open_feed(load_data(limit=100), RECIPE, team, 0)
    with pytest.raises(ValueError, match="workers must be an integer of at least 0; got -1"):
        open_feed(data, RECIPE, team, -1)


def test_what_is_not_installed_is_named(folders, monkeypatch):
    data, team = open_data(folders / "folder", image_size=16), Team(0, 1, CPU)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"'resized_erasing' needs torchvision.*or choose augment='resized_crop'"):
        open_feed(data, replace(RECIPE, augment="resized_erasing"), team, 0)
    with pytest.raises(ImportError, match=r"holds parquet files: pip install pyarrow"):
        open_data(folders / "parquet")


# Views.


def gradient(width, height):
    """Red grows from left to right, green from top to bottom."""
    red = torch.linspace(0, 255, width).expand(height, width)
    green = torch.linspace(0, 255, height)[:, None].expand(height, width)
    return Image.fromarray(torch.stack([red, green, 0 * red], -1).to(torch.uint8).numpy())


def test_the_evaluated_view_is_the_centre():
    image = gradient(300, 200)
    resized = image.resize((384, 256), Image.Resampling.BICUBIC).crop((80, 16, 304, 240))
    wanted = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(224, 224, 3).permute(2, 0, 1)
    view = transforms.evaluation_view(image, 224)
    assert view.shape == (3, 224, 224) and (view.int() - wanted.int()).abs().max() <= 2


def test_random_boxes():
    image, draws = Image.new("RGB", (300, 200)), torch.Generator().manual_seed(0)
    boxes = torch.tensor([transforms._random_box(image, draws) for _ in range(2000)]).float()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 300 and boxes[:, 3].max() <= 200
    area, ratio = width * height / 60_000, width / height
    assert 0.075 < area.min() < 0.1 and area.max() > 0.8 and 0.74 <= ratio.min() < 0.77 and 1.3 < ratio.max() <= 1.35
    middle = (boxes[:, 0] + boxes[:, 2]).mean() / 2
    assert abs(middle - 150) < 5
    assert transforms._random_box(Image.new("RGB", (1000, 10)), draws) == (493, 0, 506, 10)


def test_half_of_the_views_are_mirrored():
    image = gradient(64, 64)
    views = [transforms.training_view(image, 8, "resized_crop", generator(n)) for n in range(400)]
    rising = sum(bool(view[0, 0, -1] > view[0, 0, 0]) for view in views)
    assert 160 < rising < 240
    assert all(view[1, -1, 0] > view[1, 0, 0] for view in views), "never upside down"


@NEEDS_TORCHVISION
def test_erasing():
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    erased = []
    for n in range(200):
        plain = transforms.training_view(image, 32, "resized_randaugment", generator(n))
        view = transforms.training_view(image, 32, "resized_erasing", generator(n))
        changed = (plain != view).any(0)
        if changed.any():
            assert (view[:, changed] == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None]).all()
            erased.append(float(changed.float().mean()))
    assert 30 < len(erased) < 70 and max(erased) < 0.4


@NEEDS_TORCHVISION
def test_views_leave_the_global_generator_alone(folders):
    data = open_data(folders / "folder", image_size=16)
    before = torch.get_rng_state()
    for workers in (0, 1):
        feed = data.open_feed(replace(RECIPE, augment="resized_erasing"), Team(0, 1, CPU), workers)
        list(feed.train(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_views_differ_between_epochs_and_images():
    image = gradient(64, 64)
    draws = [generator(0, "view", epoch, row) for epoch in range(2) for row in range(2)]
    views = [transforms.training_view(image, 8, "resized_crop", d) for d in draws]
    assert len({view.numpy().tobytes() for view in views}) == 4


# Training.


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 8))


class Interrupted(Exception):
    pass


class Interrupting:
    """The data, whose feed fails after some batches."""

    def __init__(self, data, after):
        self.data, self.after = data, after

    def __getattr__(self, name):
        return getattr(self.data, name)

    def open_feed(self, *arguments):
        feed = self.data.open_feed(*arguments)
        batches_of = feed.train

        def train(step):
            for done, batch in enumerate(batches_of(step), step):
                if done == self.after:
                    raise Interrupted
                yield batch

        feed.train = train
        return feed


def test_a_run_that_was_interrupted_ends_where_an_undisturbed_one_does(data, tmp_path):
    whole, again = model(), model()
    result = fit(whole, data, RECIPE, progress=False)
    assert result.steps == 8 and 0 <= result.test_accuracy <= 1
    before = set(multiprocessing.active_children())
    with pytest.raises(Interrupted) as kept:  # as a notebook keeps it, and with it what was going on
        fit(again, Interrupting(data, 6), RECIPE, out=tmp_path, checkpoint_every=1, progress=False, workers=2)
    assert set(multiprocessing.active_children()) <= before, "nobody reads ahead for a run that has ended"
    again = model()
    fit(again, data, RECIPE, out=tmp_path, resume=True, progress=False, workers=2)
    assert set(multiprocessing.active_children()) <= before and kept.tb
    for name, weight in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_other_data_are_not_resumed(folders, tmp_path):
    recipe = replace(RECIPE, epochs=1, batch_size=96)
    fit(model(), open_data(folders / "folder", image_size=16), recipe, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="of another data set"):
        other = open_data(folders / "folder", image_size=16, seed=1)
        fit(model(), other, recipe, out=tmp_path, resume=True, progress=False)


def test_a_network_learns_from_files(folders):
    data = open_data(folders / "webdataset", image_size=16)
    result = fit(model(), data, replace(RECIPE, epochs=15, lr=1e-2), progress=False)
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    assert result.train_accuracy > 0.4

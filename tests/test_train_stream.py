"""Images read from files as they are needed: the same batches for any number of processes and workers, and training."""

import gc
import multiprocessing
import pickle
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.feeds import CPU, RECIPE, identities, same, together
from torch import nn

from nearfold.recipes import generated
from nearfold.train import fit, open_data, parquet, stream
from nearfold.train.distributed import Team
from nearfold.train.seeds import generator

pytest.importorskip("pyarrow")
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.usefixtures("small_pieces"),
]


@pytest.fixture(params=generated.LAYOUTS)
def data(request, image_folders):
    return open_data(image_folders / request.param, image_size=16)


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


def test_workers_end_with_their_feed(image_folders):
    feed = open_data(image_folders / "folder", image_size=16).open_feed(RECIPE, Team(0, 1, CPU), 2)
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
    teams = {"train": ((1, 2), (3, 0), (3, 2)), "val": ((3, 0),), "test": ((3, 2),)}  # processes, workers of each
    for split, sizes in teams.items():
        whole = identities(alone.evaluation(split))
        assert sum(whole.values()) == alone.count(split) == len(data.splits[split])
        for world, workers in sizes:
            feeds = [data.open_feed(RECIPE, Team(rank, world, CPU), workers) for rank in range(world)]
            shares = [list(feed.evaluation(split)) for feed in feeds]
            assert identities(batch for batches in shares for batch in batches) == whole
            counts = [sum(len(labels) for _, labels in batches) for batches in shares]
            assert max(counts) - min(counts) <= 1
            assert max(len(labels) for batches in shares for _, labels in batches) <= RECIPE.batch_size // world


def test_three_layouts_hold_the_same_images(image_folders):
    found = {}
    for layout in generated.LAYOUTS:
        data = open_data(image_folders / layout, image_size=16)
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


def test_a_reader_keeps_as_many_row_groups_as_it_is_told(image_folders, monkeypatch):
    records = open_data(image_folders / "parquet").splits["train"].records
    read, loads = records.reader(2), []
    original = parquet.ParquetRecords._read_group
    monkeypatch.setattr(
        parquet.ParquetRecords, "_read_group", lambda self, unit: loads.append(unit) or original(self, unit)
    )
    contents = [read(row) for row in (0, 8, 1, 15, 2, 8, 0)]
    assert loads == [0, 1, 2, 1] and contents[0] == contents[-1] != contents[2]


@pytest.mark.parametrize("layout", generated.LAYOUTS)
def test_workers_can_be_spawned(image_folders, layout):
    data = open_data(image_folders / layout, image_size=16)
    views = stream._Views(data, RECIPE, 2)
    piece = stream._Piece("train", 0, 0, data.splits["train"].rows[:3].tolist())
    assert torch.equal(pickle.loads(pickle.dumps(views))[piece], views[piece])


# Splits.


def test_held_out_row_groups_are_whole(image_folders):
    data = open_data(image_folders / "parquet", validation=0.2)
    train, val = data.splits["train"], data.splits["val"]
    groups = [set((torch.searchsorted(s.records.units, s.rows, right=True) - 1).tolist()) for s in (train, val)]
    assert not groups[0] & groups[1] and len(groups[1]) >= 3
    assert len(train) + len(val) == 120 and 24 <= len(val) <= 30
    assert len(data.splits["test"]) == 12, "test images without labels give way to validation images"
    assert open_data(image_folders / "parquet", validation=0.2).fingerprint() == data.fingerprint()
    other = open_data(image_folders / "parquet", validation=0.2, seed=1)
    assert other.fingerprint() != data.fingerprint()


def test_row_groups_of_one_class_are_not_held_out_whole():
    records = Fake([10] * 8, 1000)
    records.labels = torch.arange(8).repeat_interleave(10)
    taken = stream._held_out(stream.Share(records, torch.arange(80)), 0.1, generator(0))
    assert torch.bincount(records.labels[taken]).tolist() == [1] * 8


def test_a_folder_without_splits(tmp_path, image_folders):
    (image_folders / "folder" / "train").rename(tmp_path / "only")
    try:
        data = open_data(tmp_path / "only", validation=0.25)
    finally:
        (tmp_path / "only").rename(image_folders / "folder" / "train")
    sizes = {name: len(share) for name, share in data.splits.items()}
    assert sizes == {"train": 71, "val": 23, "test": 26}  # a fifth of each class, then a quarter, rounded
    rows = torch.cat([share.rows for share in data.splits.values()])
    assert len(rows.unique()) == 120


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


def test_other_data_are_not_resumed(image_folders, tmp_path):
    recipe = replace(RECIPE, epochs=1, batch_size=96)
    fit(model(), open_data(image_folders / "folder", image_size=16), recipe, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="of another data set"):
        other = open_data(image_folders / "folder", image_size=16, seed=1)
        fit(model(), other, recipe, out=tmp_path, resume=True, progress=False)


def test_a_network_learns_from_files(image_folders):
    data = open_data(image_folders / "webdataset", image_size=16)
    result = fit(model(), data, replace(RECIPE, epochs=15, lr=1e-2), progress=False)
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    assert result.train_accuracy > 0.4

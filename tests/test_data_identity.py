"""What tells a data set from another: all that is in its folder, nothing of where the folder is."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from nearfold.recipes import generated
from nearfold.study import plan as planning
from nearfold.study.catalogue import find
from nearfold.study.tasks import data_of
from nearfold.train import Recipe, fit, load_data, open_data
from nearfold.train.checkpoint import fingerprint

pytest.importorskip("pyarrow")


def in_memory(folder):
    return load_data(folder, image_size=8)


def streamed(folder):
    return open_data(folder, image_size=8)


OPENERS = pytest.mark.parametrize("opener", [in_memory, streamed])
LAYOUTS = pytest.mark.parametrize("layout", generated.LAYOUTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    for layout in generated.LAYOUTS:
        generated.write(root / layout, layout, 32, size=20, shard=20)
    return root


@pytest.mark.filterwarnings("ignore:.*left out")
@OPENERS
@LAYOUTS
def test_a_copy_under_another_name_is_the_same_data_set(folders, tmp_path, layout, opener):
    copy = tmp_path / "job_2" / "elsewhere"
    shutil.copytree(folders / layout, copy)
    assert fingerprint(opener(copy)) == fingerprint(opener(folders / layout))


@pytest.mark.filterwarnings("ignore:.*left out")
@LAYOUTS
def test_one_changed_byte_under_the_same_name_is_another_data_set(folders, tmp_path, layout):
    copy = tmp_path / layout
    shutil.copytree(folders / layout, copy)
    before = fingerprint(streamed(copy))
    changed = max((path for path in copy.rglob("*train*/**/*" if layout == "folder" else "*train*") if path.is_file()),
                  key=lambda path: path.stat().st_size)  # fmt: skip
    content = bytearray(changed.read_bytes())
    at = content.index(b"\xff\xda") + 20  # in the pixels of a JPEG
    content[at] ^= 1
    changed.write_bytes(content)
    assert fingerprint(streamed(copy)) != before


def test_normalisation_is_part_of_streamed_data(folders):
    data = streamed(folders / "folder")
    assert fingerprint(data) != fingerprint(replace(data, mean=torch.zeros(3)))


@pytest.mark.filterwarnings("ignore:.*left out")
@OPENERS
def test_a_run_resumes_on_data_that_moved_and_on_no_other(folders, tmp_path, opener):
    data, run = tmp_path / "job_1", tmp_path / "run"
    shutil.copytree(folders / "folder", data)

    def trained(folder, **options):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, len(generated.CLASSES)))
        return fit(
            model, opener(folder), Recipe(epochs=1, batch_size=8, device="cpu"), out=run, progress=False, **options
        )

    first = trained(data)
    moved = data.rename(tmp_path / "job_2")
    assert trained(moved, resume=True).test_accuracy == first.test_accuracy
    one, other = sorted((moved / "train" / generated.CLASSES[0]).iterdir())[:2]
    other.write_bytes(one.read_bytes())  # the same names, other images
    with pytest.raises(ValueError, match="is of another data set: "):
        trained(moved, resume=True)


def test_a_study_goes_on_where_its_data_moved_to(folders, tmp_path):
    shutil.copytree(folders / "folder", tmp_path / "a")
    shutil.copytree(folders / "folder", tmp_path / "b")
    config = {"data": {"name": "textures", "image_size": 8, "fingerprint": fingerprint(in_memory(tmp_path / "a"))}}
    assert data_of(config, {"textures": str(tmp_path / "b")}).name == "b"


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({"cfar10": "x"}, "--data cfar10=x: no data set of the study 'ratio' is called so; .*; did you mean cifar10"),
        ({"imagenet": "x"}, "no data set of the study 'ratio' is called so; its data sets are digits, cifar10"),
        ({"cifar10": "nowhere", "Digits": "x"}, "--data Digits=x.*did you mean digits"),
    ],
)
def test_an_unknown_data_set_of_a_study_is_an_error_before_anything_is_read(tmp_path, sources, says):
    with pytest.raises(ValueError, match=says):
        planning.plan(find("ratio", "cpu"), tmp_path, sources)

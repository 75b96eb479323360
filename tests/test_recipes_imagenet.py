import doctest
import importlib
import io
import json
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nearfold.models import create
from nearfold.models.registry import entry_of
from nearfold.models.table import agrees, number, parameters
from nearfold.recipes import generated, imagenet
from nearfold.train import Recipe, open_data


@pytest.mark.parametrize("module", ["generated", "imagenet"])
def test_examples(module):
    result = doctest.testmod(importlib.import_module(f"nearfold.recipes.{module}"))
    assert result.attempted and not result.failed


def test_generated_parquet_has_the_layout_of_the_hub(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    generated.main([str(tmp_path / "new"), "--images", "120", "--size", "30"])
    files = sorted(path.name for path in (tmp_path / "new" / "data").iterdir())
    assert files == [f"{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")]
    opened = pq.ParquetFile(tmp_path / "new" / "data" / files[1])
    assert str(opened.schema_arrow.types[0]) == "struct<bytes: binary, path: string>"
    assert str(opened.schema_arrow.types[1]) == "int64" and opened.schema_arrow.names == ["image", "label"]
    assert [opened.metadata.row_group(g).num_rows for g in range(2)] == [100, 20]
    info = json.loads(opened.schema_arrow.metadata[b"huggingface"])
    assert tuple(info["info"]["features"]["label"]["names"]) == generated.CLASSES
    assert set(pq.read_table(tmp_path / "new" / "data" / files[0])["label"].to_pylist()) == {-1}
    sizes = {Image.open(io.BytesIO(cell["bytes"])).size for cell in opened.read()["image"].to_pylist()}
    assert len(sizes) > 50 and all(18 <= side <= 42 for size in sizes for side in size)


def test_generated_images_follow_from_the_seed():
    one, again, other = (list(generated.images("train", 10, 20, seed)) for seed in (0, 0, 1))
    assert one == again and one != other
    assert [image.label for image in one[:8]] == [*range(8)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layout": "zip", "count": 100}, "layout must be one of parquet, webdataset, folder; got 'zip'"),
        ({"layout": "folder", "count": 3}, "count must be at least 16, two images a class; got 3"),
    ],
)
def test_generated_refuses(tmp_path, arguments, says):
    with pytest.raises(ValueError, match=says):
        generated.write(tmp_path / "new", **arguments)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        generated.write(tmp_path, "folder", 100)


@pytest.mark.parametrize("row", imagenet.ROWS.values(), ids=imagenet.ROWS)
def test_rows(row):
    assert entry_of(row.model).num_classes == 1000
    assert set(row.stated) <= set(Recipe().to_dict()) and 70 < row.top1 < 90
    if row.parameters and row.model != "vit_base_convnn":  # 12 heads share a kernel there, see `nearfold models`
        with torch.device("meta"):
            built = parameters(create(row.model))
        near = abs(built / number(row.parameters) - 1) < 0.05
        assert agrees(built, row.parameters) or (near and not entry_of(row.model).published.reached)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated") / "new"
    generated.write(folder, "webdataset", 120, size=40)
    return folder


def arguments(data, out, *more):
    said = "acmix_swin_tiny --tiny --image-size 32 --batch-size 32 --precision float32 --device cpu --epochs 2"
    return [*said.split(), "--data", str(data), "--out", str(out), *more]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_a_row_trains_and_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch, capsys):
    whole = imagenet.main(arguments(small, tmp_path / "whole", "--workers", "1"))
    assert whole.steps == 2 * ((120 - 8) // 32) and "acmix_swin_tiny: test accuracy" in capsys.readouterr().out

    feed_of = imagenet.StreamData.open_feed

    def failing(self, *more):
        feed = feed_of(self, *more)
        batches = feed.train
        feed.train = lambda step: (b if n < 4 else 1 / 0 for n, b in enumerate(batches(step), step))
        return feed

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(imagenet.StreamData, "open_feed", failing)
        imagenet.main(arguments(small, tmp_path / "parts", "--checkpoint-every", "1"))
    parts = imagenet.main(arguments(small, tmp_path / "parts", "--checkpoint-every", "1", "--resume"))
    assert parts.steps == whole.steps
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_weights_follow_from_the_seed(small):
    row, data = imagenet.ROWS["vit_base_attention"], open_data(small, image_size=32)
    one, again, other = (imagenet.build(row, data, seed, tiny=True).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--data", "no/such/place"], "no/such/place does not exist"),
        (["--epochs", "0"], "Recipe.epochs must be"),
        (["--precision", "half"], "Recipe.precision must be one of"),
    ],
)
def test_one_line_says_what_is_wrong(small, tmp_path, capsys, change, says):
    with pytest.raises(SystemExit) as ended:
        imagenet.main(arguments(small, tmp_path, *change))
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and says in printed and printed.count("\n") == 1


def test_without_a_row_the_rows_are_listed(capsys):
    assert imagenet.main([]) is None
    printed = capsys.readouterr().out
    assert all(name in printed for name in imagenet.ROWS)
    assert "stated: epochs=300" in printed and "ours: warmup_epochs=20, schedule=cosine" in printed

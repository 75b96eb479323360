"""A generated data set like ImageNet in form: JPEG files of different sizes, in each layout that training reads.

`python -m nearfold.recipes.generated DIR --layout parquet --images 2000` writes textures in eight classes: four
patterns, each in a warm and in a cold colour, at random angles, scales and places. `nearfold.train.open_data` reads the
result. The same number of images and the same seed are the same images in every layout.

Shape legend: H, W pixels.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.train.seeds import generator

PATTERNS = {
    "stripes": lambda x, y: x.sin(),
    "checks": lambda x, y: x.sin() * y.sin() * 2,
    "rings": lambda x, y: (x * x + y * y).sqrt().sin(),
    "dots": lambda x, y: 2 * (x.cos() + y.cos()) - 2,
}
"""Name: a texture of about -1 to 1, of coordinates in radians."""
TINTS = {"warm": (0.35, 0.1, -0.25), "cold": (-0.25, 0.05, 0.35)}
"""What is added to red, green and blue."""
CLASSES = tuple(sorted(f"{tint} {pattern}" for pattern, tint in itertools.product(PATTERNS, TINTS)))
LAYOUTS = ("parquet", "webdataset", "folder")
ROW_GROUP = 100
"""Rows, as in the data sets of the Hugging Face Hub with images in them."""


class Image(NamedTuple):
    """One image, as it is in a file."""

    name: str
    """Without an ending."""
    label: int
    content: bytes


def texture(label: int, size: int, rng: torch.Generator) -> Tensor:
    """One image of a class: uint8 (H, W, 3), its sides 0.6 to 1.4 times `size`.

    >>> texture(3, 50, torch.Generator().manual_seed(0)).shape
    torch.Size([50, 61, 3])
    """

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=rng)

    height, width = (size * between(0.6, 1.4, 2)).round().int().tolist()
    ground = F.interpolate(between(0.3, 0.7, 1, 3, 5, 5), size=(height, width), mode="bicubic")[0]
    angle, scale = between(0, torch.pi, 1), between(0.8, 2.0, 1) * 40 / size
    y, x = torch.meshgrid(torch.arange(height) - height / 2, torch.arange(width) - width / 2, indexing="ij")
    across, along = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    tint, pattern = CLASSES[label].split(" ")
    drawn = PATTERNS[pattern](across * scale + between(0, 6, 1), along * scale + between(0, 6, 1)).clamp(-1, 1)
    colour = torch.tensor(TINTS[tint])[:, None, None] + between(-0.1, 0.1, 3, 1, 1)
    pixels = ground + 0.6 * colour + 0.2 * drawn + between(-0.04, 0.04, 3, height, width)
    return (255 * pixels.clamp(0, 1)).to(torch.uint8).movedim(0, -1).contiguous()


def images(split: str, count: int, size: int, seed: int) -> Iterator[Image]:
    """The images of a split, classes mixed; the first ones are of one class each."""
    from PIL import Image as Pillow

    for number in range(count):
        rng = generator(seed, "texture", split, number)
        drawn = int(torch.randint(len(CLASSES), (), generator=rng))
        label = number if number < len(CLASSES) else drawn
        pixels = texture(label, size, rng)
        file = io.BytesIO()
        Pillow.fromarray(pixels.numpy()).save(file, "JPEG", quality=90)
        yield Image(f"{split}_{number:08}", label, file.getvalue())


def write(folder: Path, layout: str, count: int, size: int = 400, seed: int = 0, shard: int = 1000) -> None:
    """Write a data set of `count` training images, and a tenth of that for validation.

    Args:
        folder: Where to; it is made.
        layout: One of :data:`LAYOUTS`. ``parquet``: data/train-00000-of-00002.parquet and so on, with a test split
            whose labels are -1, as ImageNet has it on the Hugging Face Hub. ``webdataset``: train-000000.tar with
            KEY.jpg and KEY.cls, and classes.txt. ``folder``: train/CLASS/*.jpg.
        count: Training images.
        size: Mean height and width in pixels. ImageNet's is about 400.
        seed: Other images for another one.
        shard: Images a file, where files hold several.

    Raises:
        ValueError: for a layout that is not one of them, too few images, or a folder that is not empty.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if count < 2 * len(CLASSES):
        raise ValueError(f"count must be at least {2 * len(CLASSES)}, two images a class; got {count}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder")
    held_out = max(len(CLASSES), count // 10)
    splits = {"train": count, "validation": held_out} | ({"test": held_out} if layout == "parquet" else {})
    for split, number in splits.items():
        made = images(split, number, size, seed)
        shards = -(-number // shard)
        for index in range(shards if layout != "folder" else 1):
            part = made if layout == "folder" else itertools.islice(made, shard)
            if layout == "parquet":
                path = folder / "data" / f"{split}-{index:05}-of-{shards:05}.parquet"
                _write_parquet(path, part, secret=split == "test")
            elif layout == "webdataset":
                _write_tar(folder / f"{split}-{index:06}.tar", part)
            else:
                _write_files(folder / ("val" if split == "validation" else split), part)
    if layout == "webdataset":
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


def _write_parquet(path: Path, part: Iterator[Image], secret: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = list(part)
    cells = [{"bytes": row.content, "path": f"{row.name}.JPEG"} for row in rows]
    columns = {
        "image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "label": pa.array([-1 if secret else row.label for row in rows], pa.int64()),
    }
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=ROW_GROUP)


def _write_tar(path: Path, part: Iterator[Image]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for image in part:
            for ending, content in (("jpg", image.content), ("cls", str(image.label).encode())):
                member = tarfile.TarInfo(f"{image.name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _write_files(root: Path, part: Iterator[Image]) -> None:
    for name in CLASSES:
        (root / name).mkdir(parents=True)
    for image in part:
        (root / CLASSES[image.label] / f"{image.name}.jpg").write_bytes(image.content)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nearfold.recipes.generated", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help=f"default: {LAYOUTS[0]}")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="for training (default: 2000)")
    parser.add_argument("--size", type=int, default=400, metavar="PIXELS", help="mean side (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    given = parser.parse_args(argv)
    try:
        write(given.folder, given.layout, given.images, given.size, given.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{given.images} images for training, in {len(CLASSES)} classes: {given.folder}")


if __name__ == "__main__":
    main()

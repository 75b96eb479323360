"""Image data sets on disk, found by what is in their folder.

Labels, names and places are held as a few tensors and byte strings, also for a million images: worker processes then
share them (fork) or receive them quickly (spawn).
"""

from __future__ import annotations

from pathlib import Path

from nearfold.train.layout import SHARDS, Tree, image_classes, left_out, say_left_out, shards
from nearfold.train.listing import UNLABELLED, FileRecords, Records, Source
from nearfold.train.parquet import open_parquet
from nearfold.train.tars import open_tars


def open_source(folder: Path, label_column: str | None = None) -> Source:
    """Find the images in a folder: parquet files, tar files, or class folders.

    What the folder holds and the data set does not use is said in one warning.

    Args:
        folder: The folder. docs/training.md describes the layouts.
        label_column: The column of parquet files, or the field of the JSON files in tar files, that holds the labels;
            None: the usual one.

    Raises:
        ValueError: The folder or a file in it is broken, or its layout has two readings; the message names it.
        ImportError: There are parquet files, and pyarrow is not installed.
    """
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(
            f"{folder} {problem}: pass 'digits', 'made:NAME' (docs/alignment.md), or a folder with "
            "train-*.parquet, train-*.tar or train/CLASS/*.jpg"
        )
    tree = Tree(folder)
    for kind in SHARDS:
        if (found := shards(tree, kind)) is None:
            continue
        place, files = found
        paths = [(split, folder / path) for split, path in files]
        phrases = left_out(tree, [path for _, path in files])
        if kind == ".parquet":
            source = open_parquet(folder, paths, label_column)
        else:
            source, inside = open_tars(folder, folder / place, paths, label_column)
            phrases += inside
        break
    else:
        if label_column is not None:
            raise ValueError(
                f"label_column={label_column!r} is for parquet and tar files; {folder} holds class folders"
            )
        source, phrases = _open_files(tree)
    secret = source.splits["test"].labels == UNLABELLED if "test" in source.splits else None
    if secret is not None and secret.all():  # a competition's
        phrases.append(f"{len(secret):,} test images without labels")
        source = Source(source.classes, {name: part for name, part in source.splits.items() if name != "test"})
    elif secret is not None and secret.any():
        where = source.splits["test"].where(int(secret.int().argmax()))
        raise ValueError(f"{where}, has no label, other test images have: give all of them labels, or none")
    say_left_out(folder, phrases)
    return source


def _open_files(tree: Tree) -> tuple[Source, list[str]]:
    classes, folders, found = image_classes(tree)
    splits: dict[str, Records] = {}
    for split, by_class in found.items():
        names = [path for paths in by_class.values() for path in paths]
        labels = [classes.index(name) for name, paths in by_class.items() for _ in paths]
        splits[split] = FileRecords(tree.root, names, labels)
    used = (path for by_class in found.values() for paths in by_class.values() for path in paths)
    return Source(classes, splits), left_out(tree, used, folders)

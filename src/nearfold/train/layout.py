"""What is in a data folder: which files, of which split; what is left out, and that it is said.

Names only: nothing here opens a file. Folders are relative to the one that the user named, with "/", "" for itself.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearfold._images import SUFFIXES, first_line

SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev", "development"),
    "test": ("test", "testing"),
}
"""The words that name a split, in any case and beside words such as "set", "images" and digits."""

SHARDS = (".parquet", ".tar")
"""What ends the name of a file that holds many images."""

_BESIDE = r"(?:data|set|images?|imgs?|split|folder|files?|samples?|[\W\d_])*"
_SPLITS = {
    split: re.compile(rf"{_BESIDE}(?:{'|'.join(words)}){_BESIDE}") for split, words in SPLIT_WORDS.items()
}  # fmt: skip
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_HIDDEN = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "system volume information"}


def split_named(name: str) -> str | None:
    """Return the split that a name says, where it says nothing else.

    Example:
        >>> [split_named(name) for name in ("validation", "Training_Set", "TEST2017", "bullet_train", "latest")]
        ['val', 'train', 'test', None, None]
    """
    return next((split for split, pattern in _SPLITS.items() if pattern.fullmatch(name.lower())), None)


def splits_in(name: str) -> set[str]:
    """Return the splits that are named by a word of a name.

    Example:
        >>> sorted(splits_in("cifar10-train-00000-of-00001")), sorted(splits_in("BulletTrain")), splits_in("latest")
        (['train'], ['train'], set())
    """
    return {split for word in _WORD.findall(name) if (split := split_named(word))}


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is a system's or a program's own, not the user's: .git, ._1.jpg, __MACOSX."""
    return name.startswith(".") or name.lower() in _HIDDEN


def ending(name: str) -> str:
    """Return the ending of a name in lower case, with its dot."""
    return "".join(name.lower().rpartition(".")[1:]) if "." in name else ""


def _is_image(name: str) -> bool:
    return ending(name) in SUFFIXES


@dataclass
class Tree:
    """The files of a folder.

    Attributes:
        root: The folder.
        files: The names of the files of every folder in it, sorted; also of those without any.
        hidden: Images and shards by the hidden folder that they are in, or their own hidden name.
        linked: Links to folders that are there anyway.
    """

    root: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    hidden: Counter[str] = field(default_factory=Counter)
    linked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._folders: dict[str, list[str]] = {}
        self._holds: set[str] = set()
        _walk(self)
        for folder in sorted(self.files):
            if folder:
                self._folders.setdefault(os.path.dirname(folder), []).append(os.path.basename(folder))
        for folder in self.files:
            if any(map(_is_image, self.files[folder])):
                self._holds |= {folder, *_above(folder)}

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in one."""
        return self._folders.get(folder, [])

    def below(self, folder: str) -> Iterator[str]:
        """Yield a folder and all in it."""
        waiting = [folder]
        while waiting:
            yield (at := waiting.pop())
            waiting += [join(at, name) for name in self.folders(at)]

    def images(self, folder: str) -> list[str]:
        """Return the paths of the images in a folder itself, sorted."""
        return [join(folder, name) for name in self.files[folder] if _is_image(name)]

    def images_below(self, folder: str) -> list[str]:
        """Return the paths of the images in a folder and the folders in it, sorted."""
        return sorted((path for at in self.below(folder) for path in self.images(at)), key=lambda path: path.split("/"))

    def holds_images(self, folder: str) -> bool:
        """Return whether there are images in a folder or the folders in it."""
        return folder in self._holds

    def nested(self, folder: str) -> bool:
        """Return whether there are images in the folders of a folder."""
        return any(self.holds_images(join(folder, name)) for name in self.folders(folder))


def join(folder: str, name: str) -> str:
    """Return the path of something in a folder."""
    return f"{folder}/{name}" if folder else name


def _above(folder: str) -> Iterator[str]:
    while folder:
        yield (folder := os.path.dirname(folder))


def _walk(tree: Tree) -> None:
    """Fill a tree. Links to folders come last and are followed, but not to what is around, and nowhere twice."""
    seen: set[tuple[int, int]] = set()
    around = Path(os.path.realpath(tree.root))
    waiting, links = [("", False)], list[tuple[str, bool]]()
    while waiting or links:
        at, hidden = waiting.pop() if waiting else links.pop(0)
        path = tree.root / at
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                tree.linked.append(at)
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            names = []
            for entry in entries:
                inside, unseen = join(at, entry.name), hidden or is_hidden(entry.name)
                many = ending(entry.name) in (*SUFFIXES, *SHARDS)
                if entry.is_dir():
                    if not entry.is_symlink():
                        waiting.append((inside, unseen))
                    elif not unseen and around.is_relative_to(os.path.realpath(tree.root / inside)):
                        tree.linked.append(inside)
                    elif not unseen:
                        links.append((inside, False))
                elif unseen:
                    tree.hidden[at if hidden else inside] += many
                elif entry.is_file():
                    names.append(entry.name)
                elif many:
                    raise ValueError(
                        f"{tree.root / inside} is a pipe, a device or a broken link, not a file: mend it, or move it "
                        "away"
                    )
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({first_line(error)}): restore it, or move it away") from error
        if not hidden:
            tree.files[at] = names


def image_classes(tree: Tree) -> tuple[tuple[str, ...], list[str], dict[str, dict[str, list[str]]]]:
    """Find the images of class folders: CLASS/*, or of splits, train/CLASS/* and so on.

    Returns:
        The classes, their folders, and by split and class the paths of the images.

    Raises:
        ValueError: There is no class folder, one without an image or one that only ``val`` and ``test`` know, or what
            is a split and what a class cannot be told from the names.
    """
    root = tree.root
    base = ""
    while (inner := _wrapped(tree, base)) and split_named(os.path.basename(inner)) is None:
        base = inner
    folders = _split_folders(tree, base)
    classes = tuple(tree.folders(folders["train"]))
    if not classes:
        raise ValueError(
            f"{root} holds neither parquet files nor class folders: put images in "
            f"{root}/train/CLASS/*.png, or parquet files named train-*.parquet there"
        )
    found: dict[str, dict[str, list[str]]] = {}
    for split, folder in folders.items():
        like_splits = [name for name in tree.folders(folder) if split_named(name)]
        for name in tree.folders(folder):
            where = join(folder, name)
            if name in like_splits and (len(like_splits) > 1 or tree.nested(where)):
                raise ValueError(
                    f"{root / where} is named like a split, but lies in {root / folder}, of which it would be a class: "
                    f"pass {root / folder}, or rename it"
                )
            if name not in classes:
                raise ValueError(f"{root / where} is no class of the training images: {', '.join(classes)}")
            inner = next((at for at in tree.below(where) if at != where and split_named(os.path.basename(at))), None)
            if inner is not None and tree.holds_images(inner):
                raise ValueError(
                    f"{root / inner} is named like a split, but lies in {root / where}, which would be a class: pass "
                    f"{root / os.path.dirname(inner)}, or rename it"
                )
            files = tree.images_below(where)
            if not files:
                raise ValueError(
                    f"{root / where} holds no image ({', '.join(sorted(SUFFIXES))}): add some, or delete the folder"
                )
            found.setdefault(split, {})[name] = files
    return classes, [join(folder, name) for folder in folders.values() for name in tree.folders(folder)], found


def _holding(tree: Tree, folder: str) -> list[str]:
    return [name for name in tree.folders(folder) if tree.holds_images(join(folder, name))]


def _wrapped(tree: Tree, folder: str) -> str | None:
    """The only folder in one, where it is no class but one around splits or classes, as archives have it.

    chest_xray/train/CLASS, PetImages/CLASS, seg_train/seg_train/CLASS: of one class alone there is nothing to learn.
    """
    inside = _holding(tree, folder)
    if len(inside) != 1 or tree.images(folder) or tree.images(inner := join(folder, inside[0])):
        return None
    around_splits = any(split_named(name) and tree.nested(join(inner, name)) for name in tree.folders(inner))
    again = splits_in(inside[0]) and splits_in(inside[0]) == splits_in(os.path.basename(folder)) and tree.nested(inner)
    return inner if around_splits or again or len(_holding(tree, inner)) > 1 else None


def _split_folders(tree: Tree, base: str) -> dict[str, str]:
    """Return the folder of every split that is there; a data set without splits is all for training."""
    root = tree.root / base
    names = _holding(tree, base)
    sure = [name for name in names if split_named(name)]
    if not sure:
        maybe = [name for name in names if splits_in(name)]
        flat = [name for name in maybe if not tree.nested(join(base, name))]
        if not maybe or (flat == maybe and len(names) > len(maybe)):
            return {"train": base}
        if flat or len(maybe) == 1 or len({_without_split(name) for name in maybe}) > 1:
            raise ValueError(
                f"{root / maybe[0]} may be a split or a class: if it is a split, name it train, val or test; if it is "
                f"a class, put all class folders into {root / 'train'}"
            )
        sure = maybe
    by_split: dict[str, str] = {}
    for name in sure:
        splits = {split} if (split := split_named(name)) else splits_in(name)
        if len(splits) > 1 or splits & by_split.keys():
            others = [by_split[split] for split in splits if split in by_split]
            both = f"{root / name} and {root / others[0]} are" if others else f"{root / name} is"
            raise ValueError(f"{both} named for the same or for several splits: keep one folder for a split")
        by_split[splits.pop()] = name
    if "train" not in by_split:
        raise ValueError(f"{root} has no folder train/: put the training images in train/CLASS/*.png")
    folders = {}
    for split in SPLIT_WORDS:
        if split not in by_split:
            continue
        folder = join(base, by_split[split])
        if tree.nested(folder):
            while inner := _wrapped(tree, folder):
                folder = inner
            folders[split] = folder
        elif split == "train":
            raise ValueError(
                f"{tree.root / folder} is named like a split, but its images are in no class folders: put them into "
                f"{tree.root / folder}/CLASS; if it is a class itself, put all class folders into {root / 'train'}"
            )
    return folders


def _without_split(name: str) -> tuple[str, ...]:
    """What a name says besides its split: the same of seg_train and seg_test, not of bullet_train and test_tube."""
    return tuple(word.lower() for word in _WORD.findall(name) if not split_named(word))


def shards(tree: Tree, kind: str) -> tuple[str, list[tuple[str, str]]] | None:
    """Find the files that hold many images each, of one kind.

    Returns:
        The folder they are in, and (split, path) of each, sorted by path; None: there are none, or they lie deeper in
        a folder of images.

    Raises:
        ValueError: None is for training, a name says two splits, or there are several sets of them.
    """
    paths = [join(at, name) for at, names in tree.files.items() for name in names if ending(name) == kind]
    paths.sort(key=lambda path: path.split("/"))
    if not paths or (tree.holds_images("") and all(os.path.dirname(path) not in ("", "data") for path in paths)):
        return None
    found: dict[str, list[tuple[str, str]]] = {}
    for path in paths:
        *above, name = path.split("/")
        splits = set[str]().union(*map(splits_in, [*above, os.path.splitext(name)[0]]))
        if len(splits) > 1:
            raise ValueError(f"{tree.root / path} names two splits, {' and '.join(sorted(splits))}: rename it")
        if splits:
            found.setdefault("/".join(part for part in above if not splits_in(part)), []).append((splits.pop(), path))
    places = sorted(found, key=lambda place: (place not in ("", "data"), place))  # the usual ones first
    if len(places) > 1 and places[0] not in ("", "data"):
        raise ValueError(
            f"{tree.root} holds several data sets, {', '.join(places[:10])}: pass the folder of one, such as "
            f"{tree.root / places[0]}"
        )
    if not places and tree.holds_images(""):
        return None
    if not places or "train" not in dict(found[places[0]]):
        names = ", ".join(os.path.basename(path) for path in paths[:5])
        raise ValueError(
            f"{tree.root} holds no {kind[1:]} file for training: name them train-*{kind}, val-*{kind}, test-*{kind}; "
            f"found {names}"
        )
    return places[0], found[places[0]]


def left_out(tree: Tree, used: Iterable[str], classes: Sequence[str] = ()) -> list[str]:
    """Say what a data set does not use of the images and shards that are there: a phrase for every reason.

    Args:
        tree: The folder.
        used: The paths that are used.
        classes: The folders of classes, in which any other file is said too.
    """
    taken = set(used)
    kinds = (*SUFFIXES, *SHARDS)
    places: Counter[str] = Counter()
    others: Counter[str] = Counter()
    in_classes = {at for folder in classes for at in tree.below(folder)}
    for at, names in tree.files.items():
        for name in names:
            if ending(name) in kinds:
                places[at] += join(at, name) not in taken
            elif at in in_classes:
                others[ending(name) or name] += 1
    said = []
    if places.total():
        said.append(f"{_count(places.total(), 'file')} in no class folder or split that is used ({_list(places)})")
    if others.total():
        said.append(f"{_count(others.total(), 'file')} without an image's ending ({_list(others)})")
    if tree.hidden.total():
        said.append(f"{_count(tree.hidden.total(), 'hidden image file')} ({_list(tree.hidden)})")
    if tree.linked:
        said.append(
            f"{_count(len(tree.linked), 'link')} to folders that are there anyway ({', '.join(tree.linked[:3])})"
        )
    return said


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number > 1 else ''}"


def _list(counts: Counter[str]) -> str:
    some = [f"{place or '.'}: {count:,}" for place, count in counts.most_common(4) if count]
    return ", ".join(some[:3]) + (", ..." if len(some) > 3 else "")


def say_left_out(folder: Path, phrases: Sequence[str]) -> None:
    """Warn, in one line, of what a data set does not use."""
    if phrases:
        warnings.warn(f"{folder}: left out {'; '.join(phrases)}", stacklevel=4)

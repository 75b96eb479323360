"""The index of a checkpoint of torch's distributed checkpoints: read without running anything that is in it.

The index is a pickle, and a pickle may call what it likes. This reader knows the records that an index has, builds
nothing but those and numbers, names and sizes, and then makes torch's own index of what it has checked: every tensor
by its name, size and type, and the parts of files where it lies, files of the checkpoint only. What is no tensor is
refused too: torch would read it by another pickle.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr  # short, however large what it shows is
from typing import Any

import torch

NAME = ".metadata"
_MODULE = "torch.distributed.checkpoint."
_RECORDS = {
    (f"{_MODULE}metadata", "Metadata"),
    (f"{_MODULE}metadata", "MetadataIndex"),
    (f"{_MODULE}metadata", "TensorStorageMetadata"),
    (f"{_MODULE}metadata", "TensorProperties"),
    (f"{_MODULE}metadata", "ChunkStorageMetadata"),
    (f"{_MODULE}metadata", "StorageMeta"),
    (f"{_MODULE}filesystem", "_StorageInfo"),
}
_IGNORED = {  # layouts, memory formats and where the folder was: nothing that a tensor is read by
    (f"{_MODULE}metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
    *((module, f"{system}Path") for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Record:
    """What stands for an object of the index: the name of its class, and its fields. It can do nothing."""

    kind = ""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _sizes(numbers: Any) -> torch.Size:
    if not isinstance(numbers, tuple | list) or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
        raise ValueError(f"{repr(numbers)} is no size")
    return torch.Size(numbers)


class _Reader(pickle.Unpickler):
    """Builds records, sizes and types; anything else is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return type(name, (_Record,), {"kind": name})
        if (module, name) in _IGNORED:  # functions are made anew, since a pickle may set attributes of what it gets
            return lambda *_: None
        if (module, name) == ("torch", "Size"):
            return lambda numbers=(): _sizes(numbers)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise ValueError(f"it names {module}.{name}, which no index of tensors needs: it is not read")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it refers to objects outside")


def read(folder: Path, files: Mapping[str, int]) -> Any:
    """Return the index of a checkpoint as torch has it, a ``Metadata``.

    Args:
        folder: of the checkpoint.
        files: the sizes of its files by name; no other is read.

    Raises:
        ValueError: It is no index, names a thing that an index does not need, or does not fit the files.
    """
    content = (folder / NAME).read_bytes()
    try:
        for opcode, _, _ in pickletools.genops(content):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "EXT1", "EXT2", "EXT4"):  # memory for any number named
                raise ValueError(f"it has {opcode.name}, which torch does not write")
        return _checked(_Reader(io.BytesIO(content)).load(), files)
    except Exception as error:  # whatever a wrong byte makes of a pickle
        raise ValueError(f"{folder / NAME}: {str(error) or type(error).__name__}") from error


def _checked(found: Any, files: Mapping[str, int]) -> Any:
    """Torch's index, made anew of fields whose types and ranges hold."""
    from torch.distributed.checkpoint import metadata as torch_index
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    whole = _fields(found, "Metadata")
    entries: dict[str, Any] = {}
    for name, entry in _is(whole.get("state_dict_metadata"), dict).items():
        fields = _fields(entry, "TensorStorageMetadata")
        size, dtype = _is(fields.get("size"), torch.Size), _dtype(fields.get("properties"))
        if math.prod(size) * dtype.itemsize > sum(files.values()):
            raise ValueError(f"{repr(name)} is said to be {tuple(size)}, more than the files hold")
        chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in _is(fields.get("chunks"), list)]
        parts = [tuple(_is(chunk.get(name), torch.Size) for name in ("offsets", "sizes")) for chunk in chunks]
        inside = all(
            len(offsets) == len(sizes) == len(size) and all(map(lambda o, n, all_: o + n <= all_, offsets, sizes, size))
            for offsets, sizes in parts
        )
        if not inside or sum(math.prod(sizes) for _, sizes in parts) != math.prod(size):
            raise ValueError(f"the parts of {repr(name)} are not all of it")
        entries[_is(name, str)] = torch_index.TensorStorageMetadata(
            torch_index.TensorProperties(dtype=dtype), size, [torch_index.ChunkStorageMetadata(*part) for part in parts]
        )
    places: dict[Any, Any] = {}
    for key, place in _is(whole.get("storage_data"), dict).items():
        index, fields = _fields(key, "MetadataIndex"), _fields(place, "_StorageInfo")
        file, begin, length = (
            _is(fields.get("relative_path"), str),
            _count(fields.get("offset")),
            _count(fields.get("length")),
        )
        if file not in files or begin + length > files[file]:
            raise ValueError(f"{repr(index.get('fqn'))} is said to be in {repr(file)}, not in the checkpoint's files")
        offset, hint = index.get("offset"), index.get("index")
        where = torch_index.MetadataIndex(
            _is(index.get("fqn"), str),
            None if offset is None else _is(offset, torch.Size),
            None if hint is None else _count(hint),
        )
        places[where] = _StorageInfo(file, begin, length)
    return torch_index.Metadata(entries, storage_data=places)


def _fields(value: Any, kind: str) -> Mapping[str, Any]:
    fields = getattr(value, "state", {}) if isinstance(value, _Record) and value.kind == kind else None
    if not isinstance(fields, dict):
        raise ValueError(f"there is {repr(value)} in place of a {kind}")
    return fields


def _dtype(properties: Any) -> torch.dtype:
    state = getattr(properties, "state", None)
    if getattr(properties, "kind", "") != "TensorProperties" or not isinstance(state, tuple) or not state:
        raise ValueError("a tensor has no properties")
    return _is(state[0], torch.dtype)


def _count(value: Any) -> int:
    if _is(value, int) < 0:
        raise ValueError(f"there is {value} in place of a number of bytes")
    return value


def _is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"there is {repr(value)} in place of a {kind.__name__}")
    return value

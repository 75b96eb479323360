"""Import of torchvision, also where its compiled operators do not load.

A torchvision wheel built for another torch (CUDA wheel beside a CPU torch) stops its own import with
"operator torchvision::nms does not exist". The transforms need none of those operators, so declaring the
missing one lets the import pass; calling it would still fail.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # the declarations end with the object that made them


def transforms(augment: str = "randaugment", instead: str = "crop_flip") -> ModuleType:
    """Return ``torchvision.transforms.v2``, which an augmentation needs, and another one does not.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return load("torchvision.transforms.v2")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"augment={augment!r} needs torchvision: pip install torchvision, or choose augment={instead!r}"
        ) from error


def load(name: str) -> ModuleType:
    """Import a module of torchvision, or one that imports torchvision, by its full name."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for missing in ("nms", "qnms"):
        library.define(f"{missing}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module(name)

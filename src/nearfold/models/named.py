"""A network by whatever names it: one of this library, a folder with weights, or one of another library."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nearfold.models.hub import from_pretrained
from nearfold.models.registry import MODELS, create
from nearfold.options import brief, meant

WHAT = (
    "a network that `nearfold models` lists, a folder that save_pretrained wrote, timm:NAME, torchvision:NAME, "
    "transformers:NAME or path/to/file.py:factory (the file is run)"
)


def named(spec: str, pretrained: bool = False) -> tuple[nn.Module, tuple[int, ...] | None]:
    """A network, and the size (C, H, W) of the images it is for, where that is known.

    Args:
        spec: what `WHAT` says; a network of transformers comes in a small configuration, with random weights.
        pretrained: with the weights that come along.

    Raises:
        ValueError: there is no such network.

    >>> named("resnet8s_conv")[1]
    (3, 32, 32)
    """
    if ":" in spec:
        from nearfold.recognise.configured import of_images
        from nearfold.recognise.load import load_model, transformers_library

        if pretrained:
            raise ValueError("--pretrained is for the networks that `nearfold models --pretrained` lists")
        where, _, name = spec.rpartition(":")
        if where == "transformers":
            return of_images(transformers_library(), name)
        model = load_model(spec)
        found = (getattr(model, "default_cfg", None) or {}).get("input_size")
        return model, None if found is None else tuple(found)
    if spec in MODELS:
        return create(spec, pretrained=pretrained), MODELS[spec].input_size
    if Path(spec).is_dir():
        return from_pretrained(spec), None
    raise ValueError(f"MODEL must be {WHAT}; got {brief(spec)}{meant(spec, MODELS)}")

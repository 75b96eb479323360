"""Importing this module enters every network in timm's table, as ``nearfold_NAME``.

    import timm
    import nearfold.models.timm

    timm.list_models("nearfold_*")
    timm.create_model("nearfold_vgg11_hybrid", num_classes=10)
    timm.create_model("nearfold_resnet8s_conv", pretrained=True)   # weights that come along
    timm.create_model("local-dir:FOLDER", pretrained=True)   # what `save_pretrained` wrote

Networks that are registered with Nearfold later are entered by `enter`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from nearfold._torchvision import load
from nearfold.models.hub import WEIGHTS
from nearfold.models.network import Features
from nearfold.models.pretrained import pretrained, weights_of
from nearfold.models.registry import MODELS, PREFIX, config, create, entry_of

try:
    load("timm")
except ModuleNotFoundError as missing:
    raise ImportError("nearfold.models.timm needs timm: pip install timm") from missing

from timm.models import build_model_with_cfg, register_model

default_cfgs: dict[str, dict[str, Any]] = {}
"""By name; timm looks for it in the module that an entry's function comes from."""
OPTIONAL = ("drop_rate", "drop_path_rate")
"""timm's scripts pass these to every network; zero is what one without them does."""


def enter(name: str) -> None:
    """Enter one network of the table in timm's."""
    entry = entry_of(name)
    channels, *size = entry.input_size
    given = {"num_classes": entry.num_classes, "in_chans": channels, "img_size": tuple(size)}
    accepted = inspect.signature(entry.network).parameters

    def entrypoint(pretrained: bool = False, **arguments: Any) -> nn.Module:
        for option in OPTIONAL:
            if not arguments.get(option) and option not in accepted:
                arguments.pop(option, None)
        if pretrained and not (arguments.get("pretrained_cfg") or arguments.get("pretrained_cfg_overlay")):
            weights_of(name)  # of which timm would say less, and whose digest it does not check
        return build_model_with_cfg(
            functools.partial(create, name), PREFIX + name, pretrained,
            feature_cfg={"feature_cls": Features, "out_indices": None},
            pretrained_filter_fn=lambda state, network: network.fitted(state), **arguments,
        )  # fmt: skip

    entrypoint.__name__ = entrypoint.__qualname__ = PREFIX + name
    entrypoint.__doc__ = entry.text
    default_cfgs[PREFIX + name] = config(entry, given, getattr(entry.network, "head_name", "head")) | _along(name)
    register_model(entrypoint)


def _along(name: str) -> dict[str, Any]:
    """Where timm finds the weights that come along, and what its data pipeline must take from images; or nothing."""
    entry = pretrained().get(name)
    return {} if entry is None else {"file": str(entry.folder / WEIGHTS), "mean": entry.mean, "std": entry.std}


for _name in MODELS:
    enter(_name)

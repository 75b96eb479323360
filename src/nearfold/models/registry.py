"""The table of networks, and `create`."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nearfold._numbers import MOST, flag, integer, plain, shown
from nearfold.models.network import Features, Network

PREFIX = "nearfold_"
"""In timm, every name starts with it."""


@dataclass(frozen=True)
class Published:
    """What was printed about a network.

    Attributes:
        parameters: as printed, such as "128,812,810" or "10.6M"; empty where nothing was.
        macs: multiply-adds of one image as printed, such as "2.3G"; empty where nothing was.
        source: where.
        reading: what the text leaves open, and how it is read here.
        classes: for how many classes the number was printed.
        reached: False where no reading that was tried has the printed number of parameters; the reading says how near
            the nearest is.
    """

    parameters: str = ""
    macs: str = ""
    source: str = ""
    reading: str = ""
    classes: int = 1000
    reached: bool = True


@dataclass(frozen=True)
class Entry:
    """A network that has a name.

    Attributes:
        network: makes it; takes ``num_classes``, ``in_chans``, ``img_size`` and the arguments.
        arguments: those that make it this one.
        text: what it is, one line.
        input_size: channels, height and width it was published for.
        num_classes: of its published classifier.
        tiny: arguments that make it small: for tests and first steps.
        published: what was printed about it.
    """

    network: Callable[..., Network]
    arguments: dict[str, Any]
    text: str
    input_size: tuple[int, int, int] = (3, 224, 224)
    num_classes: int = 1000
    tiny: dict[str, Any] = field(default_factory=dict)
    published: Published = field(default_factory=Published)


MODELS: dict[str, Entry] = {}
"""Every network that has a name, by name."""


def register(name: str, entry: Entry) -> None:
    """Add a network to the table.

    Raises:
        ValueError: when the name is taken.
    """
    if name in MODELS:
        raise ValueError(f"{name!r} is already a network")
    MODELS[name] = entry


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern.

    >>> list_models("vgg11*")
    ['vgg11_conv', 'vgg11_convnn', 'vgg11_hybrid']
    """
    return fnmatch.filter(sorted(MODELS), pattern)


def entry_of(name: str) -> Entry:
    """The entry of a name, with or without the prefix that it has in timm.

    Raises:
        ValueError: when there is none.

    >>> entry_of("vgg11_hybird")
    Traceback (most recent call last):
    ValueError: no network is called 'vgg11_hybird'; close to it: vgg11_hybrid...
    """
    if not isinstance(name, str):
        raise ValueError(f"the name of a network must be text, got {shown(name)}")
    own = name.removeprefix(PREFIX)
    if own not in MODELS:
        raise ValueError(f"no network is called {name!r}; {close_to(own)}")
    return MODELS[own]


def close_to(name: str) -> str:
    """Which networks may be meant by a name that there is not, in words: those that hold it, or are spelled alike."""
    part = name.removeprefix(PREFIX).lower().replace("-", "_").strip("*")
    close = [known for known in MODELS if part and part in known] or difflib.get_close_matches(
        part, MODELS, n=5, cutoff=0.5
    )
    return f"close to it: {', '.join(close[:8])}" if close else "`nearfold models` lists all"


def create(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    features_only: bool = False,
    out_indices: Iterable[int] | None = None,
    global_pool: str | None = None,
    output_stride: int | None = None,
    **arguments: Any,
) -> nn.Module:
    """A network by its name, with fresh weights or with those that come along.

    Args:
        name: as `list_models` gives it.
        pretrained: load the weights that come with the package (`nearfold models --pretrained` lists them), after
            their digest is checked; other classes get a new classifier.
        num_classes: of the classifier; 0: none, the features come out. Default: the published number.
        in_chans: channels of the images; default 3.
        img_size: height and width, for networks that own something for every position; all others take any size, and
            have it for the record.
        features_only: return the maps of the stages instead of logits: a `Features`.
        out_indices: which stages, with features_only.
        global_pool: how positions become one before the classifier, one of the network's ``pools``; "": not at all.
        output_stride: pixels per position of the last map. It is as published, and another one is refused.
        arguments: of the network's own constructor, in place of those in the table.

    Raises:
        ValueError: for an unknown name or argument; with ``pretrained``, also where no weights come along, or they do
            not fit.

    >>> import torch
    >>> net = create("resnet18_hybrid", num_classes=10, width=16)
    >>> net(torch.zeros(1, 3, 33, 47)).shape
    torch.Size([1, 10])
    """
    entry = entry_of(name)
    if flag("pretrained", pretrained):
        asked = {
            "num_classes": num_classes, "in_chans": in_chans, "img_size": img_size, "out_indices": out_indices,
            "global_pool": global_pool, "output_stride": output_stride,
        }  # fmt: skip
        given = {name: value for name, value in asked.items() if value is not None} | arguments
        return _trained(name.removeprefix(PREFIX), given | ({"features_only": True} if features_only else {}))
    channels, *size = entry.input_size
    arguments = {name: plain(value) for name, value in arguments.items()}
    given = {
        "num_classes": entry.num_classes if num_classes is None else integer("num_classes", num_classes, least=0),
        "in_chans": channels if in_chans is None else integer("in_chans", in_chans),
        "img_size": tuple(size) if img_size is None else _pair(img_size),
    }
    features_only = flag("features_only", features_only)
    if out_indices is not None and not features_only:
        raise ValueError("out_indices goes with features_only=True")
    try:
        network = entry.network(**given, **(entry.arguments | arguments))
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise ValueError(f"{name}: {str(error).partition(') ')[2]}") from error
        raise
    stride = network.feature_info[-1]["reduction"]
    if output_stride not in (None, stride):
        raise ValueError(
            f"{name}: output_stride={output_stride}: the last map's stride is {stride} and stays; leave it out"
        )
    if global_pool is not None:
        network.pool_by(global_pool, given["num_classes"])
        arguments = arguments | {"global_pool": global_pool}
    network.architecture = PREFIX + name.removeprefix(PREFIX)
    network.arguments = given | arguments
    network.pretrained_cfg = network.default_cfg = config(entry, given, network.head_name)
    return Features(network, plain(out_indices)) if features_only else network


def _trained(name: str, overrides: dict[str, Any]) -> nn.Module:
    """A network with the weights that come along."""
    from nearfold.models.hub import from_pretrained
    from nearfold.models.pretrained import weights_of

    entry = weights_of(name)
    made = from_pretrained(entry.folder, **overrides)
    network = made.network if isinstance(made, Features) else made
    assert isinstance(network, Network)
    network.pretrained_cfg = network.default_cfg = network.pretrained_cfg | {"mean": entry.mean, "std": entry.std}
    return made


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    size = plain(tuple(size) if isinstance(size, list) else size)
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2 or any(type(n) is not int or not 1 <= n <= MOST for n in pair):
        raise ValueError(f"img_size must be one or two positive integers, got {shown(size)}")
    return pair


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def config(entry: Entry, given: dict[str, Any], head: str) -> dict[str, Any]:
    """What timm's data pipeline and loader want to know."""
    return {
        "input_size": (given["in_chans"], *given["img_size"]),
        "num_classes": given["num_classes"],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "classifier": head,
        **IMAGENET,
    }

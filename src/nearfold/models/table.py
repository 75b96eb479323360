"""What was published about every network, beside what is built: `nearfold models`.

Parameters are those of the network itself. Multiply-adds (MACs) are half of what torch's FlopCounterMode counts for
one image on the meta device: matrix products, convolutions, attention, and the similarities and sums of neighbours;
no norms, activations or poolings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nearfold.models.registry import close_to, create, entry_of, list_models

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Count:
    """A network's size: as built, and as printed where it was.

    Attributes:
        name: in the table of networks.
        parameters: of the network.
        macs: multiply-adds for one image of its published size.
        printed_parameters: as published; empty where nothing was.
        printed_macs: likewise.
        reading: how the text is read where it leaves something open.
    """

    name: str
    parameters: int
    macs: int
    printed_parameters: str = ""
    printed_macs: str = ""
    reading: str = ""


def count(name: str) -> Count:
    """Build a network on the meta device, for as many classes as its number was printed for, and count.

    >>> count("gwo_conv")
    Count(name='gwo_conv', parameters=261982, ...)
    """
    entry = entry_of(name)
    published = entry.published
    classes = published.classes if published.parameters or published.macs else entry.num_classes
    with torch.device("meta"):
        network = create(name, num_classes=classes).eval()
    return Count(
        name, parameters(network), macs(network, entry.input_size),
        published.parameters, published.macs, published.reading,
    )  # fmt: skip


def parameters(network: nn.Module) -> int:
    """How many numbers a network learns."""
    return sum(p.numel() for p in network.parameters())


def macs(network: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of a network on the meta device for one input (channels, height, width)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *input_size, device="meta"))
    return int(counter.get_total_flops()) // 2


def number(printed: str) -> float:
    """A printed number.

    >>> number("128,812,810"), number("10.6M")
    (128812810.0, 10600000.0)
    """
    match = re.fullmatch(r"([\d,]*\.?\d+)([KMG]?)", printed)
    if match is None:
        raise ValueError(f"a printed number looks like 128,812,810 or 10.6M, got {printed!r}")
    return float(match[1].replace(",", "")) * UNITS[match[2]]


def agrees(built: int, printed: str) -> bool:
    """Whether a number has the printed digits, rounded or cut off.

    >>> agrees(10_638_152, "10.6M"), agrees(25_583_592, "25.583M"), agrees(10_487_816, "10.6M")
    (True, True, False)
    """
    match = re.fullmatch(r"[\d,]*(?:\.(\d+))?([KMG]?)", printed)
    assert match is not None, printed
    unit = UNITS[match[2]] / 10 ** len(match[1] or "")
    steps = round(number(printed) / unit)
    return steps in (round(built / unit), int(built / unit))


def table(pattern: str = "*") -> str:
    """The networks that match a shell pattern, one a line, and below the readings of what was published.

    Raises:
        ValueError: when none does.
    """
    names = list_models(pattern)
    if not names:
        raise ValueError(f"no network matches {pattern!r}; {close_to(pattern)}")
    counts = [count(name) for name in names]
    wide = max(map(len, names))
    lines = [f"{'':{wide}}  {'parameters':>13}  {'published':>11}  {'MACs':>8}  {'published':>9}"]
    for row in counts:
        lines.append(
            f"{row.name:{wide}}  {row.parameters:>13,}  {row.printed_parameters:>11}  "
            f"{row.macs / 1e9:>7.3f}G  {row.printed_macs:>9}".rstrip()
        )
    read: dict[str, list[str]] = {}
    for row in counts:
        if row.reading:
            read.setdefault(row.reading, []).append(row.name)
    notes = ["", "How what was published is read:"] if read else []
    notes += [f"{', '.join(names)}: {reading}" for reading, names in read.items()]
    return "\n".join([*lines, *notes])

"""What our kernels have to do: of each launch's main loops, how often a program goes through them, and for what.

An entry is a neighbour or a slot that an output reads, for the channels that a program holds. Where the numbers of a
tensor decide how often, as with the readers of a key, it is the mean: what lies in one place takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, comb, prod
from typing import Any

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Main:
    """A main loop.

    Attributes:
        unit: what is counted.
        trips: how often a program goes round.
        units: how many of what is counted are done in one round.
        within: rounds of the loops within, in one round of it, on average.
        product: whether it multiplies matrices.
    """

    unit: str
    trips: float
    units: float
    within: float = 0.0
    product: bool = False


def insertions(k: int, tiles: int, rows: int) -> float:
    """How often a block of rows inserts, over all tiles of keys in random order: the most of any of its rows.

    Of a row's k best so far each is in the last of t tiles with a chance of 1 / t.

    >>> insertions(9, 1, 64), round(insertions(1, 1000, 1), 2)  # of one row the harmonic sum
    (9.0, 7.49)
    """
    total = 0.0
    for t in range(1, tiles + 1):
        fewer = 0.0  # chance that a row has fewer than n
        for n in range(1, k + 1):
            fewer += comb(k, n - 1) * (1 / t) ** (n - 1) * (1 - 1 / t) ** (k - n + 1)
            total += 1 - fewer**rows
    return total


def _scores(a: Arguments) -> list[Main]:
    tiles = ceil(a["R"] / a["BN"])
    within = insertions(a["k"], tiles, a["BM"]) / tiles if "KP" in a else 0.0
    found = [Main("score", tiles, a["BM"] * a["BN"], within, product=True)]
    if a["CHUNKED"]:
        found.append(Main("score", tiles * (ceil(a["e"] / a["BE"]) - 1), a["BM"] * a["BN"], product=True))
    return found


def _query_gradient(a: Arguments) -> list[Main]:
    return [Main("entry", a["k"] * ceil(a["e"] / a["BE"]), a["BM"])]


def _key_gradient(a: Arguments) -> list[Main]:
    readers = a["M"] * a["k"] / a["R"]
    return [Main("entry", readers / a["BT"] * ceil(a["e"] / a["BE"]), a["BT"])]


def _entries(a: Arguments) -> list[Main]:
    return [Main("entry", a["SE"], a["BLOCK_M"])]


def _readers(a: Arguments) -> list[Main]:
    outputs = a["grad"].shape[1]
    if a["BLOCKS"]:
        return _hubs(a)
    return [Main("entry", a["SE"] * outputs / a["N"] / a["BLOCK_J"], a["BLOCK_N"] * a["BLOCK_J"])]


def _hubs(a: Arguments) -> list[Main]:
    """Whole blocks of one key's readers: at the mean there are none, and a program ends at once."""
    return []


def _dense(a: Arguments) -> list[Main]:
    steps = a["c"] // a["L"] * ceil(a["L"] / a["BLOCK_C"])
    return [Main("entry", a["S"] * steps, a["BLOCK_M"] / steps, product=True)]


def _dense_readers(a: Arguments) -> list[Main]:
    outputs, blocks = a["grad"].shape[1], ceil(a["o"] / a["BLOCK_O"])
    each = a["E"] * outputs / a["N"]
    return [
        Main("slot", a["S"], a["BLOCK_N"]),
        Main("slot", a["S"] * blocks, a["BLOCK_N"], product=True),
        Main("entry", a["S"] * blocks * each / a["BLOCK_J"], a["BLOCK_N"] * a["BLOCK_J"]),
    ]


def _span(a: Arguments) -> list[Main]:
    return [Main("entry", a["span"] / a["BLOCK_M"], a["BLOCK_M"], product=True)]


def _window(times: int, letter: str = "s") -> Callable[[Arguments], list[Main]]:
    return lambda a: [Main("entry", prod(a[f"{letter}{i}"] for i in range(3)), a["BM"])] * times


def _fold(a: Arguments) -> list[Main]:
    return [Main("image", prod(a[f"z{i}"] - a[f"f{i}"] for i in range(3)), a["BM"])]


def _convolution(a: Arguments) -> list[Main]:
    slots = a["KZ"] * a["KY"] * a["KX"]  # mirror images beyond every window are left out
    parts = ceil(a["R"] / a["BLOCK_R"]) if a["DOT"] else a["R"]
    return [Main("entry", slots * parts, a["BLOCK_M"] / parts, product=True)]


WORK: dict[str, Callable[[Arguments], list[Main]]] = {
    "select._select_kernel": _scores,
    "select._binned_kernel": _scores,
    "select._query_kernel": _query_gradient,
    "select._key_kernel": _key_gradient,
    "aggregate._scale_kernel": _entries,
    "aggregate._scale_entries_kernel": _entries,
    "aggregate._scale_rows_kernel": _readers,
    "aggregate._dense_kernel": _dense,
    "aggregate._dense_blocks_kernel": _hubs,
    "aggregate._dense_rows_kernel": _dense_readers,
    "aggregate._dense_weight_kernel": _span,
    "by_key._blocks_kernel": _hubs,
    "local_attention._forward_kernel": _window(1),
    "local_attention._query_kernel": _window(2),
    "local_attention._key_kernel": _window(1, "c"),
    "local_attention._fold_kernel": _fold,
    "grouped_conv._conv_kernel": _convolution,
    "grouped_conv._weight_kernel": _span,
}

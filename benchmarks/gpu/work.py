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
        trips: how often a program goes round; 0 of a loop that random data do not enter.
        units: how many of what is counted are done in one round.
        within: rounds of the loops within, in one round of it, on average.
        product: whether it multiplies matrices.
        hot: whether it reads memory or multiplies matrices.
    """

    unit: str
    trips: float
    units: float
    within: float = 0.0
    product: bool = False
    hot: bool = True


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


# Of random queries, how many two passes leave to the threshold (docs/log.md: 0.2 % at k = 9, 3.9 % at 36).
LEFT = {16: 0.002, 40: 0.04}  # up to k


def noted(k: int, classes: int, rows: int) -> float:
    """How many keys two passes note of a query, the most of any in a block of rows: the best, until k classes have one.

    >>> round(noted(9, 64, 1), 1), round(noted(36, 128, 1), 1), round(noted(9, 64, 32), 1)
    (9.6, 42.1, 11.9)
    """
    different = [1.0] + [0.0] * k  # chance that the best ones are of so many classes, k or more at the end
    total = 0.0
    while (fewer := 1 - different[k]) > 1e-9:
        total += 1 - (1 - fewer) ** rows
        different = [
            different[n] * (n / classes if n < k else 1) + (different[n - 1] * (1 - (n - 1) / classes) if n else 0)
            for n in range(k + 1)
        ]
    return total


def _passes(a: Arguments) -> list[Main]:
    tiles = ceil(a["R"] / a["BN"])
    square = Main("query", ceil(a["e"] / 16), a["BM"] * 16 / a["e"])
    bound = Main("class", a["rounds"], a["BM"], hot=False)
    one = Main("score", tiles, a["BM"] * a["BN"], product=True)
    return [square, one, bound, one]


def _list(a: Arguments) -> list[Main]:
    return [Main("class", a["BN"], a["BM"])]


def _rank(a: Arguments) -> list[Main]:
    keys = noted(a["k"], a["BN"], a["BM"])
    found = [Main("key", keys, a["BM"])]
    if a["CHUNKED"]:
        found.append(Main("key", keys * (ceil(a["e"] / a["BE"]) - 1), a["BM"] / (ceil(a["e"] / a["BE"]) - 1)))
    return [*found, Main("slot", a["k"], a["BM"], hot=False)]


def _scores(a: Arguments) -> list[Main]:
    tiles, share = ceil(a["R"] / a["BN"]), 1.0
    if a["ONLY"]:  # compacted: of a problem's programs the first few have queries
        left = next(share for k, share in LEFT.items() if a["k"] <= k)
        share = ceil(left * a["M"] / a["BM"]) / ceil(a["M"] / a["BM"])
    within = insertions(a["k"], tiles, a["BM"]) / tiles
    found = [Main("score", tiles * share, a["BM"] * a["BN"], within, product=True)]
    if a["CHUNKED"]:
        more = ceil(a["e"] / a["BE"]) - 1
        found.insert(0, Main("query", more * share, a["BM"] / more))
        found.append(Main("score", tiles * share * more, a["BM"] * a["BN"], product=True))
    return found


def _none(a: Arguments) -> list[Main]:
    return []


def _order(a: Arguments) -> list[Main]:
    mean = a["T"] / a["R"]
    rounds = ceil(min(mean, a["W"]) / 16)
    found = [Main("entry", rounds, a["BR"] * mean / rounds)] if a["W"] > 16 else []  # of one round it is no loop
    # keys that more entries chose than are sorted at once walk over all: of random data none
    return [*found, Main("key", 0, 1), Main("entry", 0, a["BT"])]


def _query_gradient(a: Arguments) -> list[Main]:
    return [Main("entry", a["k"] * ceil(a["e"] / a["BE"]), a["BM"])]


def _key_gradient(a: Arguments) -> list[Main]:
    readers = a["M"] * a["k"] / a["R"]
    one = Main("entry", readers / a["BT"] * ceil(a["e"] / a["BE"]), a["BT"])
    return _hubs(a) if a["BLOCKS"] else [one]


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


def _convolution(a: Arguments) -> list[Main]:
    slots = a["KZ"] * a["KY"] * a["KX"]  # mirror images beyond every window are left out
    return [Main("channel", slots * a["r_width"], a["BLOCK_M"])] * a["READ"]


def _tiles(a: Arguments) -> list[Main]:
    return [Main("entry", a["span"], a["BLOCK_M"], product=a["DOT"])]


WORK: dict[str, Callable[[Arguments], list[Main]]] = {
    "two_pass._note_kernel": _passes,
    "two_pass._list_kernel": _list,
    "two_pass._rank_kernel": _rank,
    "threshold._select_kernel": _scores,
    "select_backward._query_kernel": _query_gradient,
    "select_backward._key_kernel": _key_gradient,
    "by_key._deal_kernel": _none,
    "by_key._order_kernel": _order,
    "softmax._softmax_kernel": _none,
    "softmax._softmax_backward_kernel": _none,
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
    "grouped_conv._conv_kernel": _convolution,
    "grouped_conv._weight_kernel": _tiles,
}

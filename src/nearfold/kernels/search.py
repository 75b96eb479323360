"""What a search for the k best keys is asked for, beside the rows it compares."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Search(NamedTuple):
    """The arguments of `nearfold::select` after query and key, in its order; a recall comes after them.

    Attributes:
        k: how many keys, at least 1.
        metric: "dot", "cosine" (of unit vectors), "euclidean" or "chebyshev" (minus the distances), or "gram": minus
            the euclidean distance as the public ConvNN code computes it, from norms and products, rounding included.
        squared: with euclidean and gram, minus the squared distance instead.
        query_index: (M,) int64, position of every query on the grid.
        key_index: (R,) int64, ascending, position of every key.
        grid: the grid's sizes.
        rule: [causal, reach, dilation]: only keys up to the query's position (1), within reach on every axis
            (-1: any), at offsets that are multiples of dilation.
        own: whether the query's own position gets the score ``again`` instead of its similarity.
        again: that score; -inf takes it out of the search.
    """

    k: int
    metric: str
    squared: bool
    query_index: Tensor
    key_index: Tensor
    grid: list[int]
    rule: list[int]
    own: bool
    again: float

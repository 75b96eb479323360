"""How the tensors of a layer's call lie on a map: the channels' axis, the parts of an image, and what lies beside.

Shape legend: B images, P parts that an image is given in, n positions of a part, N positions of the map, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nearfold.recognise.place import SHIFT, Place

BESIDE = 8  # tokens that may lie beside a map


@dataclass(frozen=True)
class Layout:
    """Where the entries of a tensor lie.

    Attributes:
        axis: of the channels, 1 or -1; None: not known.
        places: (P, n), what number on the map every position of every part has; None: one part, in order.
    """

    axis: int | None = 1
    places: Tensor | None = None

    @property
    def parts(self) -> int:
        """How many entries of the batch one image is."""
        return 1 if self.places is None else len(self.places)

    def flat(self, x: Tensor) -> Tensor:
        """(B P, C, *part) or (B P, *part, C) -> (B, C, N), the map in raster order; (B, C) is one position.

        >>> windows = Layout(-1, torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]]))  # of a map of 2 x 4
        >>> x = torch.tensor([[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]])[..., None]
        >>> windows.flat(x)[0, 0].tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        """
        flat_bCn = x[:, :, None] if x.dim() == 2 else (x.movedim(-1, 1) if self.axis == -1 else x).flatten(2)
        if self.places is None:
            return flat_bCn
        self.require(flat_bCn.shape[2])
        flat_BCN = flat_bCn.unflatten(0, (-1, self.parts)).transpose(1, 2).flatten(2)
        return flat_BCN[..., self.places.flatten().argsort()]

    def require(self, positions: int) -> None:
        """ValueError where a part has other positions than its places say."""
        if self.places is not None and positions != self.places.shape[1]:
            raise ValueError(
                f"it reads {self.parts} x {self.places.shape[1]} rearranged positions of a map, and has "
                f"{positions} for each part: nothing says which lies where"
            )

    def on_map(self, sides: tuple[int, ...], image: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """Tokens beside the map, and its grid, of a tensor whose positions have these sides.

        Raises:
            ValueError: they are no map of such an image.

        >>> Layout().on_map((6, 8), (12, 16)), Layout().on_map((49,), (12, 16))
        ((0, (6, 8)), (1, (6, 8)))
        """
        if self.places is not None:
            self.require(math.prod(sides))
            beside, grid = placed(self.places.numel(), image)
            if beside:
                raise ValueError(f"{self.places.numel()} positions in {self.parts} parts are no map of the image")
            return 0, grid
        if len(sides) == len(image):
            return 0, sides
        if len(sides) == 1:
            return placed(sides[0], image)
        raise ValueError(f"a map of {' x '.join(map(str, sides))} is not a map of the image's axes")


def observed(place: Place | None, axis: int | None) -> Layout:
    """How a layer's input lies, by what a run has shown of its entries.

    Args:
        place: of the entries of the layer's input for one image; None: not known.
        axis: of the channels, as the layer's class says it; None: not known.

    >>> from nearfold.recognise.place import begin
    >>> from dataclasses import replace
    >>> tokens = begin((1, 5, 2, 3), 1).each(lambda t: t.flatten(2).mT)  # of a map of 2 x 3
    >>> observed(tokens, None)
    Layout(axis=-1, places=None)
    >>> columns = begin((1, 5, 2, 3), 1).each(lambda t: t.permute(0, 3, 2, 1).flatten(0, 1))  # one by one
    >>> observed(columns, -1).places.tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    if place is None or place.wild or place.position.dim() < 3:
        return Layout(axis)
    dims = place.position.dim()
    alone = [d for d in range(1, dims) if place.channel.shape[d] > 1 and place.position.shape[d] == 1]
    if len(alone) == 1 and (axis is None or place.position.shape[axis] > 1) and alone[0] in (1, dims - 1):
        axis = 1 if alone[0] == 1 else -1  # a layer along the positions, as a table of a token MLP is
    if axis is None or place.position.shape[axis] > 1:
        return Layout(axis)
    where_Pn = place.position.movedim(axis, 1).flatten(1)
    if where_Pn.shape[1] == 1:
        return Layout(axis)
    stages, numbers = where_Pn // SHIFT, (where_Pn % SHIFT).flatten()
    whole = torch.arange(len(numbers), device=numbers.device)
    if bool((stages != stages[0, 0]).any()) or not bool(stages[0, 0]) or not torch.equal(numbers.sort().values, whole):
        return Layout(axis)
    return Layout(axis, None if len(where_Pn) == 1 and torch.equal(numbers, whole) else numbers.view_as(where_Pn))


def placed(positions: int, image: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """How a sequence lies on a map as wide as the image: tokens beside it, which come first, and its grid.

    Raises:
        ValueError: no map with at most `BESIDE` tokens beside it has so many positions.

    >>> placed(197, (224, 224)), placed(201, (224, 224)), placed(48, (128, 192))
    ((1, (14, 14)), (5, (14, 14)), (0, (6, 8)))
    """
    if len(image) == 1:
        return 0, (positions,)
    if len(image) == 2:
        for beside in range(min(BESIDE, positions - 1) + 1):
            on = positions - beside
            exact = math.sqrt(on * image[0] / image[1])
            for height in {math.floor(exact), math.ceil(exact)} - {0}:
                width = on // height
                near = abs(height * image[1] - width * image[0]) < max(image)  # less than one row or column off
                if height * width == on and near:
                    return beside, (height, width)
    raise ValueError(f"{positions} positions are no map of an image of {' x '.join(map(str, image))}")

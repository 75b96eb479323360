"""From encoded images to one tensor in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold._images import first_line as first_line
from nearfold._images import picture
from nearfold.train.listing import Records
from nearfold.train.transforms import pixels

MEMORY_LIMIT = 8 * 2**30
"""Bytes a decoded data set may take; all of it is held in memory."""


def decode(splits: Sequence[tuple[Records, Tensor]], image_size: int | None) -> list[Tensor]:
    """Decode the images of several splits to tensors of one image shape.

    Args:
        splits: The records of each split, and which rows of them: int64 (N,), ascending.
        image_size: Height and width to resize to, or None: as they are, all alike.

    Returns:
        For each split, uint8 (N, C, H, W): one channel where every image of every split is gray, else
        three.

    Raises:
        ValueError: An image does not decode, sizes differ and `image_size` is None, or the images would
            take more than :data:`MEMORY_LIMIT`.
    """
    first: tuple[torch.Size, str] | None = None
    count = sum(len(rows) for _, rows in splits)
    decoded: list[list[Tensor]] = []
    for records, rows in splits:
        decoded.append([])
        read = records.reader(1)
        for row in rows.tolist():
            where = records.where(row)
            image = pixels(picture(read(row), where))
            if image_size is not None:
                image = resize(image[None], image_size)[0]
            if first is None:
                first = (image.shape[1:], where)
            if count * image.numel() > MEMORY_LIMIT:
                raise ValueError(
                    f"{count} images of {tuple(image.shape)} take {count * image.numel() / 2**30:.1f} GiB, "
                    f"more than the {MEMORY_LIMIT / 2**30:.0f} GiB that are held in memory: "
                    "pass a smaller limit= or image_size="
                )
            if image.shape[1:] != first[0]:
                raise ValueError(
                    f"images differ in size: {first[1]} has {tuple(first[0])} (height, width), "
                    f"{where} has {tuple(image.shape[1:])}; pass image_size= to resize them"
                )
            decoded[-1].append(image)
    channels = max((image.shape[0] for images in decoded for image in images), default=1)
    height, width = first[0] if first is not None else (1, 1)
    return [
        torch.stack([image.expand(channels, -1, -1) for image in images])
        if images
        else torch.empty(0, channels, height, width, dtype=torch.uint8)
        for images in decoded
    ]


def resize(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side to `size` (bilinear, antialiased) and crop the centre.

    Args:
        images: uint8 (N, C, H, W).
        size: New height and width.

    Returns:
        uint8 (N, C, size, size).
    """
    height, width = images.shape[2:]
    scale = size / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    scaled = F.interpolate(images.float(), shape, mode="bilinear", antialias=True).round_()
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return scaled.clamp_(0, 255).to(torch.uint8)[:, :, top : top + size, left : left + size].contiguous()

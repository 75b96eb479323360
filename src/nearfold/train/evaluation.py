"""From raw images to a model's accuracy on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.train.data import ImageData, Split
from nearfold.train.distributed import Team, sharded
from nearfold.train.recipe import PRECISIONS


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 images (B, C, H, W) into float32, each channel less `mean` over `std` ((C,), 0..1)."""
    return images.float().sub_(255 * mean[:, None, None]).div_(255 * std[:, None, None])


def prepare(images: Tensor, data: ImageData) -> Tensor:
    """Turn images of a data set into what a model trained on it expects.

    Args:
        images: uint8 (B, C, H, W).
        data: The data set, whose training images decide mean and spread.

    Returns:
        float32 (B, C, H, W), on the images' device.

    Example:
        >>> from nearfold.train import load_data
        >>> data = load_data("digits", limit=100)
        >>> prepare(data.train.images, data).std().round(decimals=2)
        tensor(1.)
    """
    return normalise(images, data.mean.to(images.device), data.std.to(images.device))


def evaluate(
    model: nn.Module,
    split: Split,
    data: ImageData,
    *,
    batch_size: int = 256,
    precision: str = "float32",
    team: Team | None = None,
) -> tuple[float, float]:
    """Return the mean cross-entropy (no smoothing) and the accuracy (0..1) of a model on images.

    The model runs in evaluation mode, on the device of its parameters, and is put back in the mode it
    was in.

    Args:
        model: (B, C, H, W) -> logits (B, classes).
        split: The images, wherever they are.
        data: The data set they are of, for normalisation.
        batch_size: Images at a time.
        precision: As in ``Recipe.precision``.
        team: Share the images out over the processes of a team, all of which must call this.
    """
    team = team or Team(0, 1, next(model.parameters()).device)
    rows = torch.arange(team.rank, len(split), team.world)
    batches = ((split.images[some], split.labels[some]) for some in rows.to(split.images.device).split(batch_size))
    return measure(model, batches, len(split), data.mean, data.std, precision=precision, team=team)


def measure(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    count: int,
    mean: Tensor,
    std: Tensor,
    *,
    precision: str,
    team: Team,
) -> tuple[float, float]:
    """Return what :func:`evaluate` does, of images that come in batches.

    Args:
        model: (B, C, H, W) -> logits (B, classes).
        batches: This process's share of the images, uint8, and their labels, wherever they are.
        count: Images over all processes.
        mean: Of each channel, for normalisation: float32 (C,), in 0..1.
        std: Likewise the standard deviation.
        precision: As in ``Recipe.precision``.
        team: The processes that share the images, all of which must call this.
    """
    device = team.device
    mean, std = mean.to(device), std.to(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    team.share(model.buffers())  # such as the statistics of batch normalisation
    model.eval()
    try:
        # no_grad, not inference_mode: what a model caches meanwhile must stay usable in training.
        with torch.no_grad(), autocast(device, precision):
            for images, labels, counts in _in_step(batches, sharded(model), team):
                labels = labels.to(device)
                logits = model(normalise(images.to(device), mean, std)).float()
                if counts:
                    sums[0] += F.cross_entropy(logits, labels, reduction="sum")
                    sums[1] += (logits.argmax(1) == labels).sum()
    finally:
        model.train(was_training)
    loss, accuracy = (team.sum(sums) / count).tolist()
    return loss, accuracy


def _in_step(
    batches: Iterator[tuple[Tensor, Tensor]], together: bool, team: Team
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield batches, and whether they count: where processes compute together, all must get as many.

    One that has no more gets its last one again, which does not count.
    """
    last = None
    while True:
        batch = next(batches, None)
        more = batch is not None
        if not (team.any(more) if together else more):
            return
        last = batch or last
        if last is None:
            raise ValueError(f"there are fewer images to evaluate than {team.world} processes: start fewer")
        yield *last, more


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a model computes in a recipe's precision."""
    dtype = PRECISIONS[precision]
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def require_precision(device: torch.device, precision: str) -> None:
    """Raise a ValueError if the device cannot compute in a recipe's precision.

    bfloat16 on a CUDA device that only emulates it counts as not; anything else is tried.
    """
    if precision == "float32":
        return
    advice = "use precision='float32'" + ("" if precision == "float16" else " or 'float16'")
    if (
        device.type == "cuda"
        and precision == "bfloat16"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"Recipe.precision='bfloat16' is not supported by {device} ({name}): {advice}")
    try:
        with autocast(device, precision):
            image = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
            F.conv2d(image, image).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"Recipe.precision={precision!r} cannot be used on {device} ({str(error).splitlines()[0]}): {advice}"
        ) from error

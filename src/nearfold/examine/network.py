"""Measures of a whole network: the effective receptive field at every depth, and how alike its layers' maps are.

Shape legend: L layers, B images of a batch, C channels, H x W pixels (or any grid), p numbers of a map.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.examine.layout import placed
from nearfold.examine.reading import first_tensor
from nearfold.look.derivative import evaluating

DEPTHS = 12  # layers whose receptive field is found, evenly spaced
IMAGES = 4


@dataclass(frozen=True)
class ReceptiveField:
    """What of the image the middle of a layer's output depends on (Luo et al. 2016).

    Attributes:
        name: of the layer behind which it is.
        share: (H, W), the gradient's size at every pixel, the root mean square over images and channels, as shares of
            its sum.
        side: of the square that as many pixels, all alike, would fill: the square root of one by the sum of the squared
            shares.
    """

    name: str
    share: Tensor
    side: float


def receptive_fields(
    model: nn.Module, images: Tensor, layers: dict[str, nn.Module], last: frozenset[str] = frozenset()
) -> list[ReceptiveField]:
    """The effective receptive fields behind some layers, at most `DEPTHS` of them, on the first images.

    The output's middle is asked with random signs over its channels, the same for every image, image by image, and its
    gradient by the image is taken; parameters get none.

    Args:
        model: takes (B, C, *grid).
        images: (I, C, *grid).
        layers: modules of the model, by name.
        last: names of those that make their channels last.

    >>> net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 3, padding=1, bias=False))
    >>> for conv in net:
    ...     _ = conv.weight.data.fill_(1.0)
    >>> fields = receptive_fields(net, torch.randn(2, 1, 9, 9), {"0": net[0], "1": net[1]})
    >>> [round(field.side, 3) for field in fields]  # nine pixels alike, then (1 2 3 2 1) by (1 2 3 2 1)
    [3.0, 4.263]
    """
    names = list(layers)
    count = min(DEPTHS, len(names))
    asked = [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]
    energy = {name: torch.zeros(images.shape[2:], dtype=torch.double) for name in asked}
    for image in images[:IMAGES]:
        with evaluating(model), torch.enable_grad(), _outputs({n: layers[n] for n in asked}) as made:
            x = image[None].detach().clone().requires_grad_()
            model(x.clone())  # which it may write into
            for name in asked:
                y = made.get(name)
                if y is None or not y.requires_grad or len(y) != 1:
                    continue
                ask = _middle(y, name in last, tuple(x.shape[2:]))
                (grad,) = torch.autograd.grad(y, x, ask, retain_graph=True, allow_unused=True)
                if grad is not None:
                    energy[name] += grad[0].square().sum(0).double().cpu()
    found = []
    for name, total in energy.items():
        size = total.sqrt()
        if float(size.sum()) > 0:
            share = size / size.sum()
            found.append(ReceptiveField(name, share.float(), float(share.square().sum() ** -0.5)))
    return found


def _middle(y: Tensor, last: bool, image: tuple[int, ...]) -> Tensor:
    """Random signs over the channels of the middle position, zeros elsewhere: as y, (1, C, *grid) or (1, *grid, C)."""
    rows = y.movedim(-1, 1) if last else y
    sides = tuple(rows.shape[2:])
    beside, grid = placed(sides[0], image) if len(sides) == 1 else (0, sides)
    number = beside
    for i, n in enumerate(grid):
        number += n // 2 * math.prod(grid[i + 1 :])
    ask = torch.zeros(1, rows.shape[1], math.prod(sides), dtype=y.dtype, device=y.device)
    ask[0, :, number] = (torch.randint(2, ask.shape[1:2], generator=torch.Generator().manual_seed(0)) * 2 - 1).to(y)
    ask = ask.view(1, -1, *sides)  # a vector has no sides: it is asked whole
    return ask.movedim(1, -1) if last else ask


@contextlib.contextmanager
def _outputs(layers: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The first tensor that each layer makes, in the first of its calls."""
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            made.setdefault(name, first_tensor(output))

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()


def gram(y: Tensor, batch: int, parts: int = 1) -> Tensor:
    """The products (B, B) of a batch's maps, each as one vector, without their mean; NaN where an image has not one.

    Args:
        y: (B P, ...), what a layer made.
        batch: B.
        parts: P, which follow one another.
    """
    y = y.unflatten(0, (-1, parts)) if len(y) == batch * parts else y
    if len(y) != batch:
        return torch.full((batch, batch), torch.nan, dtype=torch.double)
    flat = y.detach().flatten(1).double() if y.numel() < 1 << 24 else y.detach().flatten(1)
    flat = flat - flat.mean(0)
    return (flat @ flat.T).double().cpu()


def alike(grams_LB: list[list[Tensor]]) -> Tensor:
    """Centred kernel alignment (L, L), estimated without bias over batches (Nguyen et al. 2021).

    A batch of fewer than four images says nothing; where there is no other, it is NaN.

    Args:
        grams_LB: for every layer, the products (B, B) of every batch.

    >>> x, y = torch.randn(8, 20), torch.randn(8, 20)
    >>> torch.allclose(alike([[gram(x, 8)], [gram(2 * x, 8)]]), torch.ones(2, 2).double())
    True
    """
    count = len(grams_LB)
    total = torch.zeros(count, count, dtype=torch.double)
    for b in range(len(grams_LB[0]) if grams_LB else 0):
        batch = torch.stack([grams[b] for grams in grams_LB])
        if batch.shape[1] >= 4:
            total += _dependence(batch)
    scale = total.diagonal().clamp(min=0).sqrt()
    return total / (scale[:, None] * scale[None])


def _dependence(K_Lnn: Tensor) -> Tensor:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al. 2012) of every pair (L, L)."""
    n = K_Lnn.shape[1]
    K_Lnn = K_Lnn - torch.diag_embed(K_Lnn.diagonal(dim1=1, dim2=2))
    flat_Ln = K_Lnn.flatten(1)
    trace = flat_Ln @ flat_Ln.T
    sums_Ln = K_Lnn.sum(2)
    whole_L = sums_Ln.sum(1)
    product = whole_L[:, None] * whole_L[None] / ((n - 1) * (n - 2))
    return (trace + product - 2 / (n - 2) * (sums_Ln @ sums_Ln.T)) / (n * (n - 3))

"""What detection and segmentation share: a registered network as the backbone, its training, the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nearfold._torchvision import load
from nearfold.models import create
from nearfold.recipes.scenes import Scene, scenes


@dataclass(frozen=True)
class Settings:
    """Everything that can be set."""

    backbone: str = "resnet18_hybrid"
    arguments: dict[str, Any] = field(default_factory=lambda: {"width": 32})
    """Of the backbone."""
    size: int = 96
    """Pixels a side."""
    steps: int = 200
    batch: int = 8
    lr: float = 3e-3
    seed: int = 0


class Pyramid(nn.Module):
    """(B, 3, H, W) -> maps (B, out_channels, H / r, W / r) by name, the finest first.

    A feature pyramid (arXiv 1612.03144) on the last four stages of a network, or all where there are fewer, as
    torchvision's detectors want their backbone.

    Args:
        name: of the network, as `nearfold.models.list_models()` gives it.
        out_channels: of every map.
        arguments: of `nearfold.models.create`.

    >>> net = Pyramid("resnet18_hybrid", 32, width=8)
    >>> net.reductions, [tuple(m.shape[1:]) for m in net(torch.zeros(1, 3, 64, 64)).values()]
    ([4, 8, 16, 32], [(32, 16, 16), (32, 8, 8), (32, 4, 4), (32, 2, 2)])
    """

    def __init__(self, name: str, out_channels: int = 64, **arguments: Any) -> None:
        super().__init__()
        self.features = create(name, features_only=True, **arguments)
        info: Any = self.features.feature_info
        self.reductions: list[int] = info.reduction()[-4:]
        self.out_channels = out_channels
        self.pyramid = load("torchvision.ops").FeaturePyramidNetwork(info.channels()[-4:], out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The maps, under the names "0", "1" and so on."""
        maps: dict[str, Tensor] = self.pyramid({str(i): m for i, m in enumerate(self.features(x)[-4:])})
        return maps


Loss = Callable[[nn.Module, list[Scene]], Tensor]


def train(settings: Settings, model: nn.Module, loss_of: Loss, data: list[Scene]) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps)
    order = torch.Generator().manual_seed(settings.seed)
    model.train()
    history = []
    for _ in range(settings.steps):
        picked = torch.randint(len(data), (settings.batch,), generator=order).tolist()
        loss = loss_of(model, [data[i] for i in picked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        history.append(loss.item())
    return history


def settings_of(prog: str, text: str | None, argv: list[str] | None) -> Settings:
    """The settings that a command line asks for."""
    parser = argparse.ArgumentParser(prog=prog, description=text)
    for name in ("backbone", "steps", "seed"):
        default = getattr(Settings, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    return Settings(**vars(parser.parse_args(argv)))


def study(
    settings: Settings, model: nn.Module, loss_of: Loss, mean_iou: Callable[[nn.Module, list[Scene]], float]
) -> dict[str, float]:
    """Train, and say what it changed: the loss of the first and last five steps, mean IoU on images never seen."""
    unseen = scenes(50, settings.size, seed=1)
    before = mean_iou(model, unseen)
    history = train(settings, model, loss_of, scenes(400, settings.size, seed=0))
    found = {
        "first loss": sum(history[:5]) / 5,
        "last loss": sum(history[-5:]) / 5,
        "IoU before": before,
        "IoU after": mean_iou(model, unseen),
    }
    print(f"{settings.backbone}, {settings.steps} steps of {settings.batch} images of {settings.size} pixels")
    print("loss {:.2f} -> {:.2f}; mean IoU on unseen images {:.2f} -> {:.2f}".format(*found.values()))
    return found

"""A small network that carries what a run must carry, a recipe for it, and what a run leaves behind."""

import json

import torch
from torch import nn

from nearfold.train import Recipe

RECIPE = Recipe(epochs=3, batch_size=32, lr=3e-3, device="cpu", warmup_epochs=0.5)


class Net(nn.Module):
    """Everything a run must carry: dropout, batch statistics, an index table, a generator of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        self.register_buffer("table", torch.arange(11))
        self.sampler = torch.Generator()
        self.dies_at = None  # training calls after which a call raises
        self.calls = 0

    def forward(self, images):
        if self.training:
            self.calls += 1
            if self.calls == self.dies_at:
                raise KeyboardInterrupt
            images = images + 0.05 * torch.randn(images.shape, generator=self.sampler)
        return self.layers(images)


def net(dies_at=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
    model.dies_at = dies_at
    return model


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(things):
    def is_time(name):
        return name in ("images_per_second", "data_wait") or name.startswith("seconds_")

    return [{k: v for k, v in thing.items() if not is_time(k)} for thing in things]


def records_so_far(out):
    return (out / "metrics.jsonl").read_bytes().splitlines()


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

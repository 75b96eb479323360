"""What an epoch of every network of the study `alignment` takes on this machine, for the study at equal time.

    python recipes/alignment_seconds.py

One thread; measure on a machine that does nothing else: some minutes. The medians of steps of training go into
src/nearfold/study/catalogue/alignment.json.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
import torch.nn.functional as F

from nearfold.structures import PREFIX
from nearfold.study.catalogue.alignment import SECONDS, alignment
from nearfold.study.catalogue.matched import SHAPES
from nearfold.study.catalogue.presets import PRESETS
from nearfold.study.grid import Data, Trial
from nearfold.study.measure import machine
from nearfold.study.tasks import build
from nearfold.train import ImageData, load_data
from nearfold.train.data import Split

WARM, ROUNDS, STEPS = 3, 5, 4
"""Steps before the first measurement, how often every network is measured, and steps of each: in turns, so that what
the machine does in between meets all alike."""
SEED = 0


def data_of(data: Data) -> ImageData:
    """The images, or black ones where they are a folder's: of the same size and number."""
    if data.name.startswith(PREFIX) or data.name == "digits":
        return load_data(data.name, limit=data.limit, validation=data.validation)
    channels, size = SHAPES[data.name][0], data.image_size or SHAPES[data.name][1]
    count = round((data.limit or 0) * (1 - data.validation))
    split = Split(torch.zeros(count, channels, size, size, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    return ImageData(data.name, tuple("0123456789"), split, split, split)


class Measured:
    """A network in training, a few steps at a time."""

    def __init__(self, trial: Trial, data: ImageData) -> None:
        torch.manual_seed(SEED)
        self.model = build(trial.network, data).train()
        self.recipe = trial.recipe
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.x = torch.randn(self.recipe.batch_size, data.channels, *data.size)
        self.y = torch.randint(len(data.classes), (self.recipe.batch_size,))
        self.steps = -(-len(data.train) // self.recipe.batch_size)
        self.found: list[float] = []
        for _ in range(WARM):
            self.step()

    def step(self) -> None:
        """Forward, backward, and the optimiser."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def measure(self) -> None:
        """Time some steps."""
        began = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        self.found.append((time.perf_counter() - began) / STEPS)

    @property
    def epoch(self) -> float:
        """Seconds."""
        return self.steps * statistics.median(self.found)


def main() -> None:
    """Measure all, and write the file."""
    torch.set_num_threads(1)
    tasks: dict[str, list[Trial]] = {}
    for trial in alignment(PRESETS["cpu"]).trials:
        tasks.setdefault(trial.panel, []).append(trial)
    seconds: dict[str, dict[str, float]] = {}
    for task, trials in tasks.items():
        data = data_of(trials[0].data)
        networks = {trial.title: Measured(trial, data) for trial in trials}
        for _ in range(ROUNDS):
            for network in networks.values():
                network.measure()
        seconds[task] = {title: round(network.epoch, 3) for title, network in networks.items()}
        print(task, seconds[task], flush=True)
    SECONDS.write_text(json.dumps({"processor": machine("cpu"), "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Training a recogniser's part behind the backbone for a short time, with the CTC loss.

The backbone stays as it is, converted or not, so that what it makes of every line is made once and kept.

Shape legend: B lines, N tokens, V characters.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.recipes.ocr_lines import lines
from nearfold.recipes.ocr_network import Recogniser
from nearfold.train.seeds import generator


@dataclass(frozen=True)
class Seen:
    """What the backbone made of lines, (B, 480, 1, N), and what is written there."""

    features: Tensor
    texts: tuple[str, ...]


def seen(net: Recogniser, kind: str, part: str, count: int | None, seed: int, folder: Path) -> Seen:
    """Lines through the backbone, one after the other; what lies in the folder is read.

    Args:
        net: with the weights of the wheel; the folder is for no other ones.
        kind: as `lines` takes it.
        part: likewise.
        count: likewise.
        seed: likewise.
        folder: where it is kept.
    """
    asked = lines(kind, part, count, seed)
    file = folder / f"{kind}-{part}-{len(asked.texts)}-{seed}.pt"
    mark = asked.images.double().sum((1, 2, 3))
    if file.exists():
        found = torch.load(file, weights_only=True)
        if torch.equal(found["mark"], mark):
            return Seen(found["features"], asked.texts)
    with torch.no_grad():  # large maps are slow where they leave the cache
        features = torch.cat([net.backbone(x) for x in asked.images.split(1)])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"features": features, "mark": mark}, file)
    return Seen(features, asked.texts)


def targets(texts: tuple[str, ...], characters: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The characters' numbers, one line after the other, and how many are in each line.

    Raises:
        ValueError: a character that the recogniser does not know.

    >>> targets(("ab", "b"), ("", "a", "b"))
    (tensor([1, 2, 2]), tensor([2, 1]))
    """
    number = {character: i for i, character in enumerate(characters) if i}
    unknown = sorted({c for text in texts for c in text} - number.keys())
    if unknown:
        raise ValueError(f"texts have characters that the recogniser does not know: {', '.join(map(repr, unknown))}")
    return torch.tensor([number[c] for text in texts for c in text]), torch.tensor([len(text) for text in texts])


def ctc(scores: Tensor, texts: tuple[str, ...], characters: tuple[str, ...]) -> Tensor:
    """The mean loss of a character for scores (B, N, V); lines longer than their tokens allow count as 0."""
    numbers, lengths = targets(texts, characters)
    tokens = torch.full((len(texts),), scores.shape[1])
    logs = scores.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(logs, numbers, tokens, lengths, blank=0, zero_infinity=True)


@dataclass(frozen=True)
class Tuning:
    """The same for every network."""

    steps: int = 100
    """Printed and written lines take turns."""
    batch: int = 8
    lr: float = 2e-4
    clip: float = 1.0
    """Norm of the gradients at most."""


def tune(net: Recogniser, data: list[Seen], tuning: Tuning, seed: int = 0) -> float:
    """Train what follows the backbone, in place, and say how many seconds it took.

    Which lines a step reads follows from the seed and the step alone: every network sees the same. The batch norms keep
    their statistics.
    """
    net.eval()
    inside = {id(p) for p in net.backbone.parameters()}
    learned = [p for p in net.parameters() if id(p) not in inside]
    optimizer = torch.optim.AdamW(learned, tuning.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, tuning.lr, tuning.steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(tuning.steps):
        part = data[step % len(data)]
        chosen = torch.randint(len(part.texts), (tuning.batch,), generator=generator(seed, "lines", step))
        scores = net.read_features(part.features[chosen])
        loss = ctc(scores, tuple(part.texts[i] for i in chosen), net.characters)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, tuning.clip)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start

"""Denoising real photographs: ConvNN as learned non-local means against its convolutional twins.

`python -m nearfold.recipes.denoise` trains the networks of the tables below, three seeds each (some 45 minutes on one
core), and writes benchmarks/results/denoise.md and .json and docs/pictures/denoise.png. What was trained before with
the same settings is not trained again. docs/denoising.md says what came out.

The photographs are those that scikit-learn and scikit-image (`pip install scikit-image`) bring along.

Shape legend: B images, H, W pixels. Grey values from 0 to 1; the noise's sigma is in 8-bit grey values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nearfold.models.denoise import DenoiseNet
from nearfold.recipes.denoise_report import markdown, picture
from nearfold.recipes.photographs import TEST, TRAIN, VALIDATION, centre, crops, noisy, photograph, scores
from nearfold.train.seeds import derive, generator


@dataclass(frozen=True)
class Settings:
    """The same for every network."""

    width: int = 48
    steps: int = 800
    batch: int = 8
    crop: int = 64
    """Pixels a side."""
    lr: float = 2e-3
    clip: float = 0.1
    """Norm of the gradients at most."""
    check: int = 100
    """Steps between two looks at the validation photographs; the best weights are kept."""


CONV = "window(3) | box | kernel"
NEAR = "nearest(9, cosine, window(15), self) | ranked | kernel"
FAR = "window(3, dilation=5) | box | kernel"
NETWORKS: dict[str, tuple[str, int, str]] = {
    "conv": (CONV, 3, "the twin of equal parameters"),
    "conv, deeper": (CONV, 4, "the twin of at least equal multiply-adds"),
    "conv, as slow": (CONV, 8, "the twin of about equal time on the CPU"),
    "conv, dilated half": (
        f"branch(0.5, {FAR}, {CONV})",
        3,
        "a twin that looks 11 positions wide too, at fixed places",
    ),
    "ConvNN": (NEAR, 3, "every mixing layer reads the nine most similar of 15 x 15 positions"),
    "hybrid": (f"branch(0.5, {NEAR}, {CONV})", 3, "half the channels each"),
}
"""Name: the mixing layer, the number of blocks, and why it is here."""
STUDY: dict[float, tuple[str, ...]] = {25: tuple(NETWORKS), 50: ("conv", "conv, deeper", "ConvNN", "hybrid")}
"""Sigma: the networks that are trained for it."""
SHOWN = ("conv", "hybrid")
"""In the picture."""
DETAIL = ("china", (150, 250))
"""What the picture shows: a test photograph, top and left."""


def inputs(photographs: list[Tensor], sigma: float, purpose: str) -> list[Tensor]:
    """Every photograph with noise, the same at every call with the same purpose."""
    return [noisy(p, sigma, generator(0, purpose, i)) for i, p in enumerate(photographs)]


@torch.no_grad()
def denoised(net: DenoiseNet, photographs: list[Tensor], sigma: float, purpose: str) -> list[Tensor]:
    """The photographs with noise, through the network."""
    net.eval()
    return [net(x) for x in inputs(photographs, sigma, purpose)]


def build(name: str, width: int) -> DenoiseNet:
    """A network of the table, with fresh weights."""
    operation, depth, _ = NETWORKS[name]
    return DenoiseNet(operation, width=width, depth=depth)


def train(
    net: DenoiseNet, settings: Settings, sigma: float, seed: int, photographs: list[Tensor], validation: list[Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The best mean PSNR on the validation photographs, and the weights that reached it.

    Crops and noise follow from the seed and the step alone: every network sees the same.
    """
    optimizer = torch.optim.Adam(net.parameters(), settings.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps, pct_start=0.1)
    best, kept = float("-inf"), net.state_dict()
    for step in range(1, settings.steps + 1):
        net.train()
        rng = generator(seed, "crops", step)
        truth = crops(photographs, settings.batch, settings.crop, rng)
        loss = F.mse_loss(net(noisy(truth, sigma, rng)), truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        if step % settings.check == 0 or step == settings.steps:
            now = statistics.mean(scores(denoised(net, validation, sigma, "validation"), validation))
            if now > best:
                best, kept = now, {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return best, kept


def weights_file(folder: Path, name: str, sigma: float, seed: int) -> Path:
    """Where a trained network lies."""
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}-{sigma:g}-{seed}.pt"


def run(name: str, sigma: float, seed: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """Train one network and test it once; what was done before with the same settings is read."""
    layer, depth, _ = NETWORKS[name]
    facts = {"network": name, "layer": layer, "depth": depth, "sigma": sigma, "seed": seed, **asdict(settings)}
    file = weights_file(folder, name, sigma, seed)
    if file.exists() and (found := torch.load(file, weights_only=True))["facts"] == facts:
        result: dict[str, Any] = found["result"]
        return result
    torch.manual_seed(derive(seed, "weights"))
    net = build(name, settings.width)
    start = time.process_time()
    best, kept = train(
        net, settings, sigma, seed, [*map(photograph, TRAIN)], [centre(photograph(v)) for v in VALIDATION]
    )
    seconds = time.process_time() - start
    net.load_state_dict(kept)
    test = [*map(photograph, TEST)]
    result = facts | {
        "validation": best,
        "test": dict(zip(TEST, scores(denoised(net, test, sigma, "test"), test), strict=True)),
        "cpu_seconds": seconds,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"facts": facts, "result": result, "weights": kept}, file)
    return result


def nonlocal_means(sigma: float, factors: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)) -> dict[str, float]:
    """PSNR of scikit-image's non-local means on the test photographs, its strength chosen on the validation ones.

    5 x 5 patches, 15 x 15 places, the noise's sigma given.
    """
    from skimage.restoration import denoise_nl_means

    def means(photographs: list[Tensor], purpose: str, factor: float) -> list[float]:
        known = {"patch_size": 5, "patch_distance": 7, "fast_mode": True, "sigma": sigma / 255}
        found = []
        for x in inputs(photographs, sigma, purpose):
            clean = denoise_nl_means(x[0, 0].numpy(), h=factor * sigma / 255, **known)
            found.append(torch.from_numpy(clean)[None, None].float())
        return scores(found, photographs)

    validation = [centre(photograph(v)) for v in VALIDATION]
    best = max(factors, key=lambda factor: sum(means(validation, "validation", factor)))
    return dict(zip(TEST, means([*map(photograph, TEST)], "test", best), strict=True))


def cost(name: str, width: int, side: int = 128) -> tuple[int, float]:
    """Parameters, and multiply-adds for every pixel of an image of `side` pixels a side."""
    net = build(name, width).to("meta")
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 1, side, side, device="meta"))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() / 2 / side**2


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nearfold.recipes.denoise", description=__doc__)
    parser.add_argument("--sigma", type=float, nargs="+", choices=STUDY, default=[*STUDY], help="default: all of them")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every network (default: 3)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help=f"default: {Settings.steps}")
    parser.add_argument("--runs", type=Path, default=Path("runs/denoise"), help="weights (default: runs/denoise)")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder benchmarks and docs are in (default: .)")
    given = parser.parse_args(argv)
    settings = Settings(steps=given.steps)
    test = [*map(photograph, TEST)]
    results, references = [], {}
    for sigma in given.sigma:
        references[sigma] = {
            "noisy": dict(zip(TEST, scores(inputs(test, sigma, "test"), test), strict=True)),
            "non-local means": nonlocal_means(sigma),
        }
        for seed in range(given.seeds):
            for name in STUDY[sigma]:
                parameters, macs = cost(name, settings.width)
                trained = run(name, sigma, seed, settings, given.runs)
                results.append(trained | {"parameters": parameters, "macs_per_pixel": macs})
                mean = statistics.mean(trained["test"].values())
                print(f"sigma {sigma:g}, seed {seed}: {name} {mean:.3f} dB", flush=True)
    parts = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    found = {"torch": torch.__version__, "photographs": parts, "references": references, "runs": results}
    tables = given.out / "benchmarks/results"
    tables.mkdir(parents=True, exist_ok=True)
    (tables / "denoise.json").write_text(json.dumps(found, indent=1) + "\n")
    (tables / "denoise.md").write_text(markdown(results, references, NETWORKS))
    sigma, at = given.sigma[0], TEST.index(DETAIL[0])
    panels = {"noisy": inputs(test, sigma, "test")[at]}
    for name in SHOWN:
        net = build(name, settings.width)
        net.load_state_dict(torch.load(weights_file(given.runs, name, sigma, 0), weights_only=True)["weights"])
        panels[name] = denoised(net, test, sigma, "test")[at]
    picture(panels | {"truth": test[at]}, DETAIL[1], given.out / "docs/pictures/denoise.png")


if __name__ == "__main__":
    main()

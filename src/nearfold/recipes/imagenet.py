"""The published ImageNet rows as recipes: what to train, with which settings, and what was printed for it.

`python -m nearfold.recipes.imagenet` lists the rows; `python -m nearfold.recipes.imagenet resnet50_hybrid --data DIR
--out DIR` trains one. The same command runs under torchrun; docs/training.md has the commands for one machine and for
several. With `--tiny` a small network of the same kind is trained instead: a rehearsal, for which
`nearfold.recipes.generated` writes data.

What the sources state is told apart from what we chose, field by field: `Row.stated`. Nobody has trained these rows
with this code yet. What the sources have and a Recipe has not: stochastic depth (0.2 in Swin-T, 0.1 in ViT-Base) and
ViT's dropout of 0.1, RandAugment magnitudes that vary by image, random erasing by noise (here: by the mean colour),
no weight decay of biases and norms (Swin). They choose the best epoch on the images that they report; here the epoch
is chosen on 1 % of the training images, which are held out.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nearfold.models import create
from nearfold.models.registry import entry_of
from nearfold.study.catalogue.presets import IMAGENET as SWIN
from nearfold.train import Recipe, Result, StreamData, fit, open_data
from nearfold.train.seeds import derive

VALIDATION = 0.01
"""Of the training images: 12,811 of ImageNet's."""
RESNET = dataclasses.replace(SWIN, batch_size=512, weight_decay=0.01)
VIT = dataclasses.replace(SWIN, weight_decay=0.01)
IN_SWIN = (
    "epochs", "batch_size", "optimizer", "lr", "weight_decay", "warmup_epochs", "schedule", "label_smoothing",
    "clip_grad_norm", "augment", "mixup", "cutmix",
)  # fmt: skip
IN_CONVNN = tuple(name for name in IN_SWIN if name not in ("warmup_epochs", "schedule"))
"""The logs of ConvNN's runs name no schedule, though their accuracy ends as under one."""


@dataclass(frozen=True)
class Row:
    """A network and how to train it.

    Attributes:
        model: Its name in `nearfold models`.
        parameters: As printed, such as "26.474M".
        flops: As printed.
        top1: Accuracy in percent, as printed.
        source: Of these figures, and of the recipe's stated fields.
        recipe: What we train with.
        stated: Fields of it that the source states; the others are ours.
    """

    model: str
    parameters: str
    flops: str
    top1: float
    source: str
    recipe: Recipe
    stated: tuple[str, ...]


CONVNN_PAGE = "figures of the author's page; settings of ConvNN's public ImageNet logs, augmentation of its data code"
CONVNN_VIT = (
    "settings of arXiv 2606.14725's public ImageNet logs (batch 1024, or 320 to 512 for each of several processes) and "
    "augmentation of its data code"
)
ACMIX = "arXiv 2111.14556 and its public configuration, which is Swin's"
ROWS = {
    row.model: row
    for row in (
        Row("resnet50_conv", "25.583M", "8.178G", 78.86, CONVNN_PAGE, RESNET, IN_CONVNN),
        Row("resnet50_convnn", "", "", 76.22, CONVNN_PAGE, RESNET, IN_CONVNN),
        Row("resnet50_hybrid", "26.474M", "10.655G", 79.42, CONVNN_PAGE, RESNET, IN_CONVNN),
        Row("vit_base_attention", "86,379,496", "", 80.94, f"abstract, 81.64 less 0.7; {CONVNN_VIT}", VIT, IN_CONVNN),
        Row("vit_base_convnn", "86,386,408", "", 81.28, f"figures and {CONVNN_VIT}", VIT, IN_CONVNN),
        Row(
            "vit_base_branch_attention", "", "", 81.64,
            f"abstract, which does not say of which layer; {CONVNN_VIT}, of other layers", VIT, IN_CONVNN,
        ),
        Row("swin_tiny", "28M", "4.5G", 81.3, "arXiv 2103.14030", SWIN, IN_SWIN),
        Row("acmix_swin_tiny", "30M", "4.6G", 81.9, ACMIX, SWIN, IN_SWIN),
    )
}  # fmt: skip
"""The rows by their model."""


def adapted(
    recipe: Recipe, *, epochs: int | None = None, batch_size: int | None = None, **fields: int | str | None
) -> Recipe:
    """A recipe with other fields; warmup stays the same share of the epochs, and the rate that of the batch.

    Fields that are None stay as they are.

    >>> shorter = adapted(SWIN, epochs=30, batch_size=256, precision="float32")
    >>> shorter.warmup_epochs, shorter.lr, shorter.precision
    (2.0, 0.00025, 'float32')
    """
    if epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=epochs, warmup_epochs=recipe.warmup_epochs * epochs / recipe.epochs)
    if batch_size is not None:
        recipe = dataclasses.replace(recipe, batch_size=batch_size, lr=recipe.lr * batch_size / recipe.batch_size)
    return Recipe.from_dict(recipe.to_dict() | {name: value for name, value in fields.items() if value is not None})


def build(row: Row, data: StreamData, seed: int = 0, tiny: bool = False) -> nn.Module:
    """The row's network for a data set, or a tiny one of its kind, with the same fresh weights in every process."""
    arguments = entry_of(row.model).tiny if tiny else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return create(row.model, num_classes=len(data.classes), img_size=data.size, **arguments)


def table() -> str:
    """The rows, one a line, and which fields are whose.

    >>> print(table().splitlines()[3])
    resnet50_hybrid               26.474M   10.655G    79.42
    """
    wide = max(map(len, ROWS))
    lines = [f"{'':{wide}}  {'parameters':>10}  {'FLOPs':>8}  {'top-1':>7}"]
    lines += [f"{r.model:{wide}}  {r.parameters:>10}  {r.flops:>8}  {r.top1:>7}" for r in ROWS.values()]
    for row in ROWS.values():
        fields = row.recipe.to_dict()
        stated = ", ".join(f"{name}={fields[name]}" for name in row.stated)
        default = Recipe().to_dict()
        chosen = [n for n in fields if n not in row.stated and (n in IN_SWIN or fields[n] != default[n])]
        ours = ", ".join(f"{name}={fields[name]}" for name in chosen)
        lines += ["", f"{row.model}: {row.source}", f"  stated: {stated}", f"  ours: {ours}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> Result | None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nearfold.recipes.imagenet", description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", choices=ROWS, metavar="ROW", help="what to train; without it, the rows")
    parser.add_argument("--data", type=Path, metavar="DIR", help="parquet files, tar files or class folders")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for metrics, checkpoints and weights")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="of several processes (ddp)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="that read ahead, for each process (0)")
    parser.add_argument("--compile", action="store_true", help="train by torch.compile")
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS", help="within an epoch (500)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="default: 224")
    parser.add_argument("--epochs", type=int, metavar="N", help="warmup in proportion (default: the row's)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="learning rate in proportion (default: the row's)")
    parser.add_argument("--accumulate", type=int, metavar="N", help="parts of a batch, one after the other (1)")
    parser.add_argument("--precision", metavar="P", help="float32, bfloat16 or float16 (default: the row's)")
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda, ... (auto)")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 0")
    parser.add_argument("--tiny", action="store_true", help="a small network of the kind: a rehearsal")
    given = vars(parser.parse_args(argv))
    if given["row"] is None:
        print(table())
        return None
    for name in ("data", "out"):
        if given[name] is None:
            parser.error(f"--{name} is needed to train a row")
    row = ROWS[given["row"]]
    names = ("epochs", "batch_size", "accumulate", "precision", "device", "seed")
    try:
        recipe = adapted(row.recipe, **{name: given[name] for name in names})
        data = open_data(given["data"], image_size=given["image_size"], validation=VALIDATION)
        how = {name: given[name] for name in ("out", "resume", "parallel", "compile", "workers", "checkpoint_every")}
        result = fit(build(row, data, recipe.seed, given["tiny"]), data, recipe, **how)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return result
    printed = "a rehearsal" if given["tiny"] else f"printed: {row.top1} %"
    print(f"{row.model}: test accuracy {result.test_accuracy:.2%} after epoch {result.best_epoch} ({printed})")
    return result


if __name__ == "__main__":
    main()

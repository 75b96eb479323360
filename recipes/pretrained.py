"""Weights, record and model card of a network that a study has trained; for the maintainers of `nearfold.models`.

    python recipes/pretrained.py STORE resnet8s_conv --augment crop_flip --data path/to/cifar10

The weights of seed 0 are rounded to bfloat16, and what is stated of them is counted after that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from nearfold.models import MODELS, create
from nearfold.models.hub import CONFIG, WEIGHTS, config_of
from nearfold.models.pretrained import FOLDER, RECORD, Pretrained, pretrained
from nearfold.study.compare import accuracy
from nearfold.study.grid import canonical
from nearfold.study.statistics import estimate
from nearfold.study.store import Store
from nearfold.train import load_data
from nearfold.train.evaluate_command import count

CARDS = Path(__file__).parents[1] / "docs" / "models"
CARD = """\
# {name}

{text}. {parameters:,} parameters; {correct:,} of {tested:,} test images are classified correctly,
{percent:.2f} %, by the weights that come along (seed {seed}, in bfloat16, computed in float32):

    nearfold evaluate {name} --data {data}=FOLDER

```python
import nearfold.models

network = nearfold.models.create("{name}", pretrained=True)
```

- **Data**: {data}, {train:,} images to train on, {val:,} held out to choose the epoch by, {tested:,} to test, looked at
  once. Pixels (0 to 1) less {mean}, over {std}.
- **Recipe**: {recipe}; everything else as `nearfold.train.Recipe` has it.
- **Seeds**: {seeds}.
- **Licence**: Apache-2.0, as the package's. The data have terms of their own.
- **Not for**: anything but {classes} in images of 32 x 32 pixels that look like the data set's; every image is
  called one of these classes. It is the first seed, not the best, and no state of the art: it is for looking at
  layers, for first steps and for comparisons at equal recipe.

Made from the run's record by `recipes/pretrained.py`.
"""


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("name")
    parser.add_argument("--augment", default="none")
    parser.add_argument("--data", required=True)
    args = parser.parse_args()
    layer = MODELS[args.name].arguments["layer"]
    runs = {run["config"]["recipe"]["seed"]: run for run in found(args.store, args.name, layer, args.augment)}
    if 0 not in runs:
        raise SystemExit(f"{args.store} has no run of seed 0 of {args.name} with augment={args.augment}")
    print(write(args.name, runs, Store(args.store), args.data))


def found(store: Path, name: str, layer: str, augment: str) -> Iterator[dict[str, Any]]:
    """The finished runs of a network, whatever the name in the table that its widths come from."""
    size = name.partition("_")[0]
    wanted = canonical({"layer": layer})["layer"]
    for path in sorted((store / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        config = run["config"]
        if config["task"] != "train" or not config["network"]["name"].startswith(f"{size}_"):
            continue
        own = config["network"].get("layer", MODELS[config["network"]["name"]].arguments["layer"])
        if canonical({"layer": own})["layer"] == wanted and config["recipe"].get("augment", "none") == augment:
            yield run


def write(name: str, runs: dict[int, dict[str, Any]], store: Store, source: str) -> Path:
    """Weights, their record and card; the path of the card."""
    config = runs[0]["config"]
    data = load_data(source)
    network = create(name, num_classes=len(data.classes), in_chans=data.channels, img_size=data.size)
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(store.weights_path(config)).items()}
    network.load_state_dict(state)
    mean, std = ([round(value, 6) for value in values.tolist()] for values in (data.mean, data.std))
    network.pretrained_cfg = network.default_cfg = network.pretrained_cfg | {"mean": mean, "std": std}
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config_of(network), indent=2) + "\n")
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    recipe = {key: value for key, value in config["recipe"].items() if key != "seed"}
    accuracies = {str(seed): runs[seed]["result"]["test_accuracy"] for seed in sorted(runs)}
    record: dict[str, Any] = {
        "data": config["data"]["name"], "mean": mean, "std": std, "classes": data.classes, "correct": 0, "tested": 1,
        "accuracies": accuracies, "seed": 0, "recipe": recipe, "sha256": digest,
    }  # fmt: skip
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    pretrained.cache_clear()
    record["correct"], record["tested"] = count(pretrained()[name], source)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    pretrained.cache_clear()
    CARDS.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in network.parameters())
    card = text_of(pretrained()[name], parameters, len(data.train), len(data.val))
    path = CARDS / f"{name}.md"
    path.write_text(card)
    return path


def text_of(entry: Pretrained, parameters: int, train: int, val: int) -> str:
    """The model card."""
    values = list(entry.accuracies.values())
    seeds = f"{len(values)}, as trained: " + ", ".join(f"{100 * value:.2f}" for value in values) + " %"
    if len(values) > 1:
        seeds += f"; mean and 95 % interval {accuracy(estimate(values))}"
    return CARD.format(
        name=entry.name, text=MODELS[entry.name].text, parameters=parameters, correct=entry.correct,
        tested=entry.tested, percent=100 * entry.accuracy, seed=entry.seed, data=entry.data, train=train, val=val,
        mean=", ".join(f"{value:.4f}" for value in entry.mean), std=", ".join(f"{value:.4f}" for value in entry.std),
        recipe=", ".join(f"{key} = {value}" for key, value in entry.recipe.items()), seeds=seeds,
        classes=", ".join(entry.classes),
    )  # fmt: skip


if __name__ == "__main__":
    main()

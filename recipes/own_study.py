"""A study of one's own in a few lines: does a larger window pay, on the digits?

nearfold study run recipes/own_study.py --seeds 5
"""

from nearfold.study.catalogue import Preset
from nearfold.study.grid import Data, Study, Trial
from nearfold.train import Recipe


def study(preset: Preset) -> Study:
    """Windows of 3, 5 and 7, three seeds each."""
    recipe = Recipe(epochs=4, batch_size=50, lr=2e-3, device="cpu")
    return Study(
        "windows",
        preset.name,
        "Does a larger window pay?",
        "Convolutions of 3, 5 and 7 positions a side, everything else equal.",
        "Nothing was published: this is an example.",
        [
            Trial(
                {"data": "digits", "size": float(size)},
                {"name": "plain", "operation": f"window({size}) | box | kernel", "width": 8},
                Data("digits"),
                recipe,
            )
            for size in (3, 5, 7)
        ],
        seeds=3,
        axis="size",
        reference=3.0,
    )

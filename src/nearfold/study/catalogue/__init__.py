"""The studies of the seeds' claims, by name: each a function from a preset to a study."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import nearfold.study.catalogue.acmix as acmix
import nearfold.study.catalogue.alignment as alignment
import nearfold.study.catalogue.budget as budget
import nearfold.study.catalogue.convnn as convnn
import nearfold.study.catalogue.gwo as gwo
import nearfold.study.catalogue.operators as operators
import nearfold.study.catalogue.spectrum as spectrum
import nearfold.study.catalogue.surgery as surgery
from nearfold._own_code import executed, guarded
from nearfold.study.catalogue.presets import PRESETS, Preset
from nearfold.study.grid import Study

Maker = Callable[[Preset], Study]

STUDIES: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        *spectrum.STUDIES,
        *convnn.STUDIES,
        *gwo.STUDIES,
        *acmix.STUDIES,
        *budget.STUDIES,
        *operators.STUDIES,
        *surgery.STUDIES,
        *alignment.STUDIES,
    )
}


def find(name: str, preset: str) -> Study:
    """A study by its name, or the one that a Python file makes.

    Args:
        name: a key of `STUDIES`, or ``path/to/file.py``, which has a function ``study(preset)`` that takes a
            `nearfold.study.catalogue.Preset` and returns a `nearfold.study.grid.Study`.
        preset: a key of `PRESETS`.

    Raises:
        ValueError: there is none.

    >>> find("ratio", "cpu").axis
    'ratio'
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if name.endswith(".py"):
        return _from_file(Path(name), PRESETS[preset])
    if name not in STUDIES:
        close = difflib.get_close_matches(name, STUDIES, n=3, cutoff=0.4) or list(STUDIES)
        raise ValueError(f"no study is called {name!r}: {', '.join(close)}; or name a file, path/to/study.py")
    return STUDIES[name](PRESETS[preset])


def _from_file(path: Path, preset: Preset) -> Study:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a study ({', '.join(STUDIES)}) or a file that is there")
    with executed(path) as module:
        maker: Maker | None = getattr(module, "study", None)
        if maker is None:
            raise ValueError(f"{path} has no function study(preset) that returns a nearfold.study.grid.Study")
        made = guarded(str(path), lambda: maker(preset))
    if not isinstance(made, Study):
        raise ValueError(f"{path}: study(preset) must return a nearfold.study.grid.Study, got {type(made).__name__}")
    return made


__all__ = ["PRESETS", "STUDIES", "Preset", "find"]

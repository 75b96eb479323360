"""The studies of the seeds' claims, by name: each a function from a preset to a study."""

from __future__ import annotations

import difflib
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import nearfold.study.catalogue.acmix as acmix
import nearfold.study.catalogue.budget as budget
import nearfold.study.catalogue.convnn as convnn
import nearfold.study.catalogue.gwo as gwo
import nearfold.study.catalogue.spectrum as spectrum
from nearfold.recognise.command import guarded
from nearfold.study.catalogue.presets import PRESETS, Preset
from nearfold.study.grid import Study

Maker = Callable[[Preset], Study]

STUDIES: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (*spectrum.STUDIES, *convnn.STUDIES, *gwo.STUDIES, *acmix.STUDIES, *budget.STUDIES)
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
        maker = _from_file(Path(name))
        made = guarded(name, lambda: maker(PRESETS[preset]))
        if not isinstance(made, Study):
            raise ValueError(
                f"{name}: study(preset) must return a nearfold.study.grid.Study, got {type(made).__name__}"
            )
        return made
    if name not in STUDIES:
        close = difflib.get_close_matches(name, STUDIES, n=3, cutoff=0.4) or list(STUDIES)
        raise ValueError(f"no study is called {name!r}: {', '.join(close)}; or name a file, path/to/study.py")
    return STUDIES[name](PRESETS[preset])


def _from_file(path: Path) -> Maker:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a study ({', '.join(STUDIES)}) or a file that is there")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    guarded(str(path), functools.partial(spec.loader.exec_module, module))
    maker: Maker | None = getattr(module, "study", None)
    if maker is None:
        raise ValueError(f"{path} has no function study(preset) that returns a nearfold.study.grid.Study")
    return maker


__all__ = ["PRESETS", "STUDIES", "Preset", "find"]

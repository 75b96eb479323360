"""What a study leaves behind for people: table.md, results.json and report.html in its folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import nearfold
from nearfold.study.document import markdown
from nearfold.study.engine import duration
from nearfold.study.findings import conclusions, verdict
from nearfold.study.looks import Look, first_look
from nearfold.study.measure import machine
from nearfold.study.report import Report, html
from nearfold.study.spectrum import DEPTH, Settings, Study
from nearfold.study.store import write_each
from nearfold.study.table import COLUMNS, Row, cells, markdown_table, mean, spread, text_table
from nearfold.train import load_weights, prepare


def publish(study: Study) -> list[Path]:
    """Write table.md, results.json and report.html from the finished runs.

    Nothing is trained: the picture comes from the weights that the runs of seed 0 left.

    Args:
        study: with at least one finished run.

    Returns:
        The paths written, in this order.

    Raises:
        ValueError: no run has finished.
    """
    rows = study.rows()
    if not rows:
        raise ValueError(f"no run under {study.store.root} has finished: there is nothing to report")
    folder = study.store.root
    contents = {
        folder / "table.md": lambda: "\n".join(
            [markdown_table(rows), *(f"{markdown(t)}\n" for t in _said(study, rows))]
        ),
        folder / "results.json": lambda: json.dumps(_results(study, rows), indent=1) + "\n",
        folder / "report.html": lambda: html(_report(study, rows)),
    }
    return write_each(contents)


def printed(study: Study) -> str:
    """The table of a study for a terminal, and what may be concluded from it.

    Args:
        study: with at least one finished run.
    """
    rows = study.rows()
    table = text_table(COLUMNS, (cells(row) for row in rows))
    return "\n\n".join([table, *(textwrap.fill(text, 110) for text in _said(study, rows))])


def _said(study: Study, rows: list[Row]) -> list[str]:
    return [verdict(rows), *conclusions(rows, len(study.data.test))] if rows else []


def command_line(settings: Settings) -> str:
    """The command that asks for a study with these settings.

    >>> command_line(Settings(seeds=5, only=("conv", "kvt")))
    'nearfold study spectrum --seeds 5 --only conv,kvt'
    """
    words = ["nearfold", "study", "spectrum"]
    usual = asdict(Settings())
    for name, value in asdict(settings).items():
        if value != usual[name]:
            words += [f"--{name}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def _results(study: Study, rows: list[Row]) -> dict[str, Any]:
    return {
        "study": "spectrum",
        "command": command_line(study.settings),
        "environment": environment(study.settings.device),
        "data": study.data.name,
        "recipe": study.settings.recipe.to_dict(),
        "planned": len(study.training),
        "finished": len(study.finished),
        "failures": [{"run": label, "error": error} for label, error in study.failures],
        "rows": [
            {**asdict(row), "gap": row.gap, "seeds": row.n,
             "test_mean": mean(row.test), "test_sd": spread(row.test),
             "gap_mean": mean(row.gap), "gap_sd": spread(row.gap)}
            for row in rows
        ],
    }  # fmt: skip


def _report(study: Study, rows: list[Row]) -> Report:
    data, settings = study.data, study.settings
    seconds = [study.store.load(run.config)["seconds"] for run in study.finished]  # type: ignore[index]
    height, width = data.size
    facts = [
        f"The data is {data.name}: images of {height} x {width} pixels and {data.channels} "
        f"channel{'s' if data.channels > 1 else ''}, {len(data.classes)} classes; {len(data.train):,} images "
        f"to train on, {len(data.val):,} held out to choose the epoch, {len(data.test):,} to test.",
        f"The network is small: a convolutional stem, {DEPTH} residual blocks of {settings.width} channels "
        "(norm, the operator, then a pointwise MLP), average pooling, a linear classifier. Only the operator "
        "changes. A position code is added after the stem, for every operator alike. The spread is over "
        "seeds of initial weights, order of images and sampled candidates; the split is the same for all.",
    ]
    if settings.limit is not None:
        facts.append(
            f"At most {settings.limit:,} images were used to train and to test (--limit): absolute "
            "accuracies are those of a small data set."
        )
    looks, missing = _all_looks(study, rows)
    recipe = settings.recipe.to_dict()
    recipe["seed"] = f"0 to {settings.seeds - 1}"
    return Report(
        data=data.name,
        facts=facts,
        rows=rows,
        n_test=len(data.test),
        planned=len(study.training),
        finished=len(study.finished),
        image=data.test.images[0],
        image_label=f"class {data.classes[int(data.test.labels[0])]}",
        looks=looks,
        missing_looks=missing,
        failures=study.failures,
        settings={
            "width": settings.width,
            "depth": DEPTH,
            **recipe,
            "training time of all runs": duration(sum(seconds)),
        },
        command=command_line(settings),
        environment=environment(settings.device),
    )


def _all_looks(study: Study, rows: list[Row]) -> tuple[dict[str, Look], list[tuple[str, str]]]:
    """The look of every operator whose weights of seed 0 are there, and why the others have none."""
    found: dict[str, Look] = {}
    missing: list[tuple[str, str]] = []
    stops = {stop.name: stop for stop in study.settings.stops}
    image = study.data.test.images[0]
    for row in rows:
        run = study.training[0, row.name]
        model = study.build(stops[row.name])
        try:
            load_weights(model, study.store.weights_path(run.config))
            found[row.name] = first_look(model, prepare(image[None], study.data), image, row.title)
        except ValueError as error:  # weights deleted or broken, or an operator that cannot say: told in place
            missing.append((row.title, str(error)))
    return found, missing


def environment(device: str = "cpu") -> dict[str, str]:
    """Machine and versions, by name.

    Args:
        device: that the networks ran on, as in `nearfold.train.Recipe`.
    """
    return {
        "nearfold": nearfold.__version__,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "processor": f"{machine('cpu')}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        **({"GPU": machine(device)} if device != "cpu" and torch.cuda.is_available() else {}),
    }

"""results.json: a study with every run's numbers and configuration, from which its page is drawn again anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from nearfold.study.authors import Points
from nearfold.study.checked import COUNT, FIELDS, checked
from nearfold.study.grid import Data, Label, Study, Trial
from nearfold.study.looks import Looks
from nearfold.study.results import Results, Row, together
from nearfold.train import Recipe

RUN = (
    "val_accuracy", "test_accuracy", "train_accuracy", "test_accuracy_last", "train_accuracy_last", "best_epoch",
    "epochs", "seconds", "run",
)  # fmt: skip


T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """All that a study's page and tables are made of.

    Attributes:
        results: of the study.
        facts: sentences about the data.
        command: what makes the same study elsewhere.
        environment: machine and versions, by name.
        missing: data sets that nobody pointed to.
        authors: their runs, drawn behind.
        looks: where every setting looks; None: it is not shown.
    """

    results: Results
    facts: Sequence[str]
    command: str
    environment: Mapping[str, str]
    missing: Sequence[str] = ()
    authors: Sequence[Points] = ()
    looks: Looks | None = None

    def to_json(self, answer: Sequence[str], verdict: str) -> str:
        """The record as JSON, with its answer for who reads it without the study."""
        results, study = self.results, self.results.study
        content = {
            "study": study.name,
            "preset": study.preset,
            "question": study.question,
            "claim": study.claim,
            "verdict": verdict,
            "answer": list(answer),
            "command": self.command,
            "environment": dict(self.environment),
            "facts": list(self.facts),
            "missing": list(self.missing),
            "reference": study.reference,
            "seeds": study.seeds,
            "tested": dict(results.tested),
            "planned": results.planned,
            "finished": results.finished,
            "failures": [{"run": label, "error": error} for label, error in results.failures],
            "authors": [
                {"data": p.data, "text": p.text, "values": [[value, found] for value, found in p.values.items()]}
                for p in self.authors
            ],
            "rows": [
                {
                    "labels": dict(row.trial.labels),
                    "network": dict(row.trial.network),
                    "recipe": row.trial.recipe.to_dict(),
                    "data": asdict(row.trial.data),
                    "cost": dict(row.cost),
                    "runs": {str(seed): {n: result[n] for n in RUN} for seed, result in row.results.items()},
                }
                for row in results.rows
            ],
            **({} if self.looks is None else {"looks": self.looks.to_json()}),
        }
        return json.dumps(content, indent=1) + "\n"


def load(path: Path) -> dict[str, Any]:
    """A results.json, of which only that it is one has been checked.

    Raises:
        ValueError: it is missing or is none.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name the folder that a study left, with its results.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    for name in ("study", "preset"):
        if not isinstance(content, dict) or not isinstance(content.get(name), str):
            raise ValueError(
                f"{path} is not what a study leaves: it does not say its {name}; if an older nearfold left it, its "
                "command writes it anew from the finished runs"
            )
    return content


def read(path: Path, study: Study) -> Record:
    """What a results.json has of a study.

    Args:
        path: of the file.
        study: its question, axis and answer; its grid is taken from the file.

    Raises:
        ValueError: the file is missing, or a field of it is missing or is not of its type and range.
    """
    content = load(path)
    try:
        return _record(content, study)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not what `nearfold study run` leaves: {text}") from error


def _record(content: Mapping[str, Any], study: Study) -> Record:
    rows = [_row(entry, study) for entry in _of(content, "rows", list)]
    if not rows:
        raise ValueError("rows is empty: no run had finished")
    seeds = _of(content, "seeds", int) if "seeds" in content else max(max(row.results) + 1 for row in rows)
    planned = _of(content, "planned", int)
    reference = _label("reference", content.get("reference", study.reference))
    study = replace(
        study, preset=content["preset"], trials=[row.trial for row in rows], seeds=seeds, reference=reference
    )
    failures = [(str(f["run"]), str(f["error"])) for f in _of(content, "failures", list)]
    return Record(
        Results(study, together(rows), planned, failures, _tested(content.get("tested", {}))),
        _texts(content.get("facts", [])),
        _of(content, "command", str),
        {str(name): str(value) for name, value in _of(content, "environment", dict).items()},
        _texts(content.get("missing", [])),
        [_points(entry) for entry in content.get("authors", [])],
        Looks.from_json(_of(content, "looks", dict)) if "looks" in content else None,
    )


def _row(entry: Mapping[str, Any], study: Study) -> Row:
    labels = _of(entry, "labels", dict)
    for axis, value in labels.items():
        _label(f"label {axis!r}", value)
    if study.axis not in labels:
        raise ValueError(f"a row has no label {study.axis!r}, by which the study {study.name!r} compares")
    known = {field.name for field in fields(Data)}
    data = {name: value for name, value in _of(entry, "data", dict).items() if name in known}
    trial = Trial(labels, _of(entry, "network", dict), Data(**data), Recipe.from_dict(_of(entry, "recipe", dict)))
    wanted = {name for name in RUN if name in FIELDS["train"]}
    results = {}
    for seed, run in _of(entry, "runs", dict).items():
        if not (seed.isascii() and seed.isdecimal() and len(seed) < 10):
            raise ValueError(f"runs of {labels} must go by their seeds, got {seed!r}")
        if not isinstance(run, dict) or wanted - set(run):
            raise ValueError(f"run {seed} of {labels} must have {', '.join(sorted(wanted))}; got {repr(run)[:60]}")
        results[int(seed)] = checked(run, "train", whole=False) | {"run": str(run.get("run", ""))}
    if not results:
        raise ValueError(f"{labels} has no run")
    cost = _of(entry, "cost", dict)
    return Row(trial, results, checked(cost, "cost") if cost else {})


def _label(name: str, value: Any) -> Label:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name} must be a number or a text, got {value!r}")
    return value


def _tested(found: Any) -> dict[str, int]:
    if not isinstance(found, dict) or not all(COUNT.fits(n) and n for n in found.values()):
        raise ValueError(f"tested must be a whole number of at least 1 for every data set, got {repr(found)[:60]}")
    return found


def _points(entry: Mapping[str, Any]) -> Points:
    values = {(v if isinstance(v, str) else float(v)): [float(a) for a in found] for v, found in entry["values"]}
    return Points(_of(entry, "data", str), _of(entry, "text", str), values)


def _of(content: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A field of a type.

    Raises:
        ValueError: it is of another.
    """
    value = content[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} must be of the type {kind.__name__}, got {type(value).__name__}")
    return value


def _texts(found: Any) -> list[str]:
    if not isinstance(found, list):
        raise ValueError(f"a list of texts was expected, got {type(found).__name__}")
    return [str(text) for text in found]

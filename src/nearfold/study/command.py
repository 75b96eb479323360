"""`nearfold study list`, `run`, `page` and `budget`, and what they and `nearfold study spectrum` share."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nearfold.options import above, brief, folder, whole
from nearfold.study.authors import Points, read
from nearfold.study.catalogue import PRESETS, STUDIES, find
from nearfold.study.engine import Engine, work_through
from nearfold.study.grid import Study
from nearfold.study.plan import Plan, plan
from nearfold.study.results import Results
from nearfold.study.store import write_each
from nearfold.train.files import inside

EXAMPLES = {
    "study list": """\
example:
  nearfold study list""",
    "study run": """\
examples:
  nearfold study run ratio
  nearfold study run ratio --data cifar10=path/to/cifar10
  nearfold study run my_study.py --seeds 10
  nearfold study run k --preset paper --data cifar10=/data/cifar10 --data cifar100=/data/cifar100 --engine ray

A finished run is never run again, whoever finished it: interrupt the command when you like, the same command goes on;
another one may work on the same folder at the same time. Runs that failed are told and left until --retry.""",
    "study page": """\
examples:
  nearfold study page docs/studies/ratio
  nearfold study page runs/windows-cpu --study recipes/own_study.py""",
    "study budget": """\
examples:
  nearfold study budget --latency-ms 2
  nearfold study run budget --data cifar10=path/to/cifar10
  nearfold study budget --latency-ms 2 --data cifar10=path/to/cifar10

Without runs of your own it answers from those that come with nearfold, which were measured on another machine.""",
}


def add_run(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nearfold study run`."""
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(STUDIES)}; or path/to/study.py (the file is run)")
    _where(parser)
    parser.add_argument(
        "--seeds", type=whole(1, 10_000), metavar="N", help="runs of every setting (default: the preset's)"
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="who runs (default: local)")
    parser.add_argument("--address", default="auto", metavar="A", help="of the Ray cluster (default: auto)")
    parser.add_argument(
        "--gpus", type=above(0, allow=True), default=0.0, metavar="N", help="GPUs of a run on Ray (default: 0)"
    )
    parser.add_argument("--jobs", type=whole(1, 1000), metavar="N", help="runs side by side on this machine")
    parser.add_argument(
        "--workers",
        type=whole(0, 1000),
        default=0,
        metavar="N",
        help="of a run, that read ahead where data are streamed (default: 0)",
    )
    parser.add_argument("--retry", action="store_true", help="do runs again that failed before")
    parser.add_argument("--authors", type=Path, metavar="CSV", help="the authors' runs, drawn behind where they fit")
    parser.set_defaults(command=run)


def add_page(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nearfold study page`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that a study left, with its results.json")
    parser.add_argument("--study", metavar="NAME", help="path/to/study.py, of a study that is not one of nearfold's")
    parser.set_defaults(command=draw)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nearfold study budget`."""
    _where(parser)
    parser.add_argument("--latency-ms", type=above(0), metavar="T", help="at most so long for one image, forward")
    parser.add_argument("--flops", type=above(0), metavar="N", help="at most so many FLOPs for one image")
    parser.add_argument("--memory-mib", type=above(0), metavar="M", help="at most so much memory in a training step")
    parser.set_defaults(command=recommend, name="budget", seeds=None)


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="size of the study (default: cpu)")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=FOLDER",
        help="where a data set is, such as cifar10=path/to/cifar10; digits come along",
    )  # fmt: skip
    parser.add_argument("--out", type=folder, default=Path("runs"), metavar="DIR", help="results (default: runs)")


def show(args: argparse.Namespace) -> int:
    """`nearfold study list`."""
    for name in STUDIES:
        study = find(name, "cpu")
        data = dict.fromkeys(trial.data.name for trial in study.trials)
        print(
            f"{name:13} {study.title}\n{'':13} {len(study.trials)} settings x {study.seeds} seeds on {', '.join(data)}"
        )
    return 0


def run(args: argparse.Namespace) -> int:
    """`nearfold study run`."""
    planned = _plan(args)
    theirs = [] if args.authors is None else read(args.authors, planned.study.authors)
    ours = _folder(args.out, planned.study)
    return carry_out(planned, _engine(args, planned.study), ours, _said(args), theirs, retry=args.retry)


def carry_out(
    planned: Plan, engine: Engine, ours: Path, said: str, theirs: Sequence[Points] = (), *, retry: bool = False
) -> int:
    """Do the runs that are left, write what has finished, and say what it comes to.

    Args:
        planned: the study.
        engine: who does the runs.
        ours: folder of the report.
        said: the command that makes the same study elsewhere.
        theirs: the authors' runs.
        retry: do runs again that failed before.

    Returns:
        The exit code: 1 where a run has failed.
    """
    from nearfold.study.files import gather, leave
    from nearfold.study.page import printed

    try:
        work_through(planned.runs, planned.place, engine, retry=retry)
    finally:  # also when interrupted: what has finished is worth a report
        results = planned.results
        if results.rows:
            record = gather(planned, said, theirs)
            paths = leave(record, ours)
            print(f"\n{printed(record)}\n\n" + "\n".join(map(str, paths)))
    for label, error in results.failures:
        print(f"nearfold: failed: {label}: {error}", file=sys.stderr)
    return 1 if results.failures else 0


def draw(args: argparse.Namespace) -> int:
    """`nearfold study page`."""
    from nearfold.study import record
    from nearfold.study.files import views
    from nearfold.study.headline import verdict
    from nearfold.study.page import answer

    path = args.folder / "results.json"
    content = record.load(path)
    name, preset = content["study"], content["preset"]
    if args.study is None and name not in STUDIES:  # a file that the results name is not run
        raise ValueError(f"{path} is of {name!r}, none of nearfold's studies: say its file, --study path/to/study.py")
    found = record.read(path, find(args.study or name, preset))
    said = {"verdict": verdict(found.results), "answer": list(answer(found.results))}
    again = json.dumps(content | said, indent=1) + "\n"
    print("\n".join(map(str, write_each({path: lambda: again, **views(found, args.folder)}))))
    return 0


def recommend(args: argparse.Namespace) -> int:
    """`nearfold study budget`."""
    from nearfold.study.catalogue import readings

    asked = {"latency_ms": args.latency_ms, "flops": args.flops, "peak_memory_mib": args.memory_mib}
    budget = {name: most for name, most in asked.items() if most is not None}
    if not budget:
        raise ValueError("say a budget: --latency-ms, --flops or --memory-mib")
    for name, most in budget.items():
        if not most > 0:
            raise ValueError(f"a budget must be above 0, got {most:g} for {readings.COSTS[name]}")
    print("\n".join(readings.recommend(_measured(args), budget)))
    return 0


def _measured(args: argparse.Namespace) -> Results:
    """The results to answer from: the user's own runs, or else those that come along, of which it is said."""
    from nearfold.study import record

    if args.data or args.preset != "cpu" or (args.out / "store").is_dir():
        results = _plan(args).results
        if results.rows:
            return results
        if args.data or args.preset != "cpu":
            raise ValueError(f"no run of the study is in {args.out}: nearfold study run budget first")
    found = record.read(Path(__file__).parent / "catalogue" / "budget.json", find("budget", "cpu"))
    machine = ", ".join(f"{name} {value}" for name, value in found.environment.items())
    print(
        f"From the {found.results.finished} runs that come with nearfold (docs/studies/budget), as no run of yours is "
        f"in {args.out}. Costs were measured elsewhere: {machine}. For this machine: {found.command}\n"
    )
    return found.results


def _plan(args: argparse.Namespace) -> Plan:
    study = find(args.name, args.preset)
    if args.seeds:
        study = replace(study, seeds=args.seeds)
    sources = _sources(args.data)
    planned = plan(
        study, args.out / "store", sources, resumable=args.preset != "cpu", workers=getattr(args, "workers", 0)
    )
    for name in planned.missing:
        print(f"nearfold: left out, since nobody said where it is: --data {name}=FOLDER", file=sys.stderr)
    return planned


def _sources(texts: Sequence[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"--data must be NAME=FOLDER, such as cifar10=path/to/cifar10; got {brief(text)}")
        if sources.setdefault(name, folder) != folder:
            raise ValueError(f"--data {name} is given twice, as {sources[name]} and as {folder}: say one")
    return sources


def _folder(out: Path, study: Study) -> Path:
    """Where a study's report goes; ValueError, before anything is run, where its name leads elsewhere."""
    name = f"{study.name}-{study.preset}"
    if not re.fullmatch(r"\w[\w .+=-]{0,99}", name):
        raise ValueError(
            f"a study's name and preset make the name of a folder in --out: letters, digits and -_.+= only, at most "
            f"100 of them; got {brief(name)}"
        )
    return inside(out, out / name)


def _engine(args: argparse.Namespace, study: Study) -> Engine:
    if args.engine == "ray":
        from nearfold.study.ray import Ray, connect

        connect(args.address)
        return Ray(args.address, gpus=args.gpus)
    from nearfold.study.local import Local, default_jobs
    from nearfold.train.distributed import join

    return Local(args.jobs or default_jobs(join(study.trials[0].recipe.device).device))


def _said(args: argparse.Namespace) -> str:
    """The command that makes the same study elsewhere."""
    words = ["nearfold", "study", "run", args.name]
    words += ["--preset", args.preset] if args.preset != "cpu" else []
    words += [word for text in args.data for word in ("--data", f"{text.partition('=')[0]}=FOLDER")]
    words += ["--seeds", str(args.seeds)] if args.seeds else []
    return " ".join(words)

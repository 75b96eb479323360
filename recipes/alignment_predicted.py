"""Does the profile of data predict the order of operators? The tables of docs/alignment.md about the study.

    python recipes/alignment_predicted.py --store FOLDER --data cifar10=FOLDER

Profiles are those of benchmarks/results/alignment.json (`recipes/alignment_data.py`), accuracies those of the runs in
the store of `nearfold study run alignment`. Without a store the page is written from what was kept of them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from alignment_data import kept  # type: ignore[import-not-found]  # beside this file

from nearfold.structures import PREFIX, STRUCTURES
from nearfold.study.alignment import Profile, features, scores
from nearfold.study.catalogue import find
from nearfold.study.catalogue.aligned import level
from nearfold.study.catalogue.alignment import ALIGNED
from nearfold.study.document import Cell, Table
from nearfold.study.plan import plan
from nearfold.study.predicted import Judgement, accuracies, another_seed, apart, baselines, judge, leave_one_out
from nearfold.study.results import Results

ROOT = Path(__file__).parents[1]
PAGE, KEPT = ROOT / "docs" / "alignment.md", ROOT / "docs" / "studies" / "alignment" / "predicted.json"
MARKED = re.compile(r"(<!-- (tasks|matrix|predicted): [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


def tasks() -> str:
    """Every made task and the words that it was made from."""
    head = ("task", "path", "shape", "weight", "a perfect operator", "aligned")
    rows = [
        [Cell(PREFIX + name, code=True), *map(Cell, (t.path, t.shape, t.weight, t.perfect, ALIGNED[name]))]
        for name, t in STRUCTURES.items()
    ]
    return Table("task", head, rows, left=tuple(range(len(head)))).markdown(head)


def matrix(found: dict[str, Any]) -> str:
    """Accuracy of every operator on every task, those level with the best in bold."""
    titles = list(next(iter(found["matrix"].values())))
    lines = ["| task | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for task, row in found["matrix"].items():
        cells = (f"**{row[t]:.0f}**" if t in found["level"][task] else f"{row[t]:.0f}" for t in titles)
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def judged(results: Results, profiles: dict[str, Profile]) -> list[Judgement]:
    """All predictors, ours first."""
    panels = {name: {row.title: str(row.trial.network["operation"]) for row in rows}
              for name, rows in results.panels.items()}  # fmt: skip
    profile = {name: profiles[PREFIX + name if PREFIX + name in profiles else name] for name in panels}
    said = {}
    for name, notations in panels.items():
        found = scores(profile[name], list(notations.values()))
        said[name] = {title: found[notation] for title, notation in notations.items()}
    evidence = {
        name: {title: features(profile[name], notation) for title, notation in notations.items()}
        for name, notations in panels.items()
    }
    aligned = {name: {title: float(title == ALIGNED[name]) for title in titles} for name, titles in panels.items()}
    tables = {
        "the profile, by the fixed rule": said,
        "the profile, fitted on the other tasks": leave_one_out(results, evidence),
        **baselines(results),
        "the aligned operator, told beforehand": aligned,
    }
    return [
        *(judge(name, results, table) for name, table in tables.items()),
        judge("all epochs of every operator, one seed, against the other seeds", *another_seed(results)),
    ]


def predicted(found: dict[str, Any]) -> str:
    """The judgements as a table."""
    head = ("chosen by", "rank correlation", "on tasks told apart", "level with the best", "points behind")
    rows = []
    for name, j in found["judgements"].items():
        numbers = (f"{j['correlation']:+.2f}", f"{j['apart']:+.2f}", f"{100 * j['share']:.0f} %", f"{j['lost']:.1f}")
        rows.append([Cell(name), *(Cell(number.replace("-", "−")) for number in numbers)])
    many = f"{found['tasks']} tasks, {found['operators']} operators, {found['runs']:,} runs"
    said = f"{many}, {found['seeds']} seeds each. {len(found['apart'])} tasks tell operators apart.\n\n"
    return said + Table("chosen by", head, rows).markdown(head)


def main() -> None:
    """Judge what the store has, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, metavar="FOLDER")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER")
    args = parser.parse_args()
    if args.store is not None:
        sources = dict(text.split("=", 1) for text in args.data)
        results = plan(find("alignment", "cpu"), args.store, sources).results
        seeds = sorted({len(row.results) for row in results.rows})
        found = {
            "tasks": len(results.panels),
            "operators": len({row.title for row in results.rows}),
            "runs": results.finished,
            "seeds": "–".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1]))),
            "matrix": {
                task: {title: round(100 * value, 1) for title, value in row.items()}
                for task, row in accuracies(results).items()
            },
            "level": {task: level(rows) for task, rows in results.panels.items()},
            "apart": (told := apart(results)),
            "judgements": {
                j.name: {"correlation": round(j.correlation, 3),
                         "apart": round(j.correlation_on([task for task in told if task in j.correlations]), 3),
                         "share": round(j.share, 3), "lost": round(j.lost, 2),
                         "correlations": {task: round(value, 2) for task, value in j.correlations.items()},
                         "hits": list(j.hits)}
                for j in judged(results, kept())
            },
        }  # fmt: skip
        KEPT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    found = json.loads(KEPT.read_text(encoding="utf-8"))
    made = {"tasks": tasks(), "matrix": matrix(found), "predicted": predicted(found)}
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKED.sub(lambda m: m[1] + made[m[2]] + m[3], page), encoding="utf-8")
    print(predicted(found))


if __name__ == "__main__":
    main()

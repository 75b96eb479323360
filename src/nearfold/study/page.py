"""The page of a study: the verdict and the figure that shows it, then what was asked, how, and every number."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from nearfold.study.catalogue.readings import scores
from nearfold.study.charts import draw, family, legend, looks
from nearfold.study.compare import MEASURE, Difference, accuracy, against_reference, differences, points, signed
from nearfold.study.document import Cell, Table, count, render, seeds
from nearfold.study.forest import Forest, Mark, ends, interval
from nearfold.study.grid import changed
from nearfold.study.headline import limits, verdict
from nearfold.study.record import Record
from nearfold.study.results import Results, Row


def answer(results: Results) -> list[str]:
    """The paragraphs of the answer."""
    return (results.study.answer or against_reference)(results)


def html(record: Record) -> str:
    """The page as one HTML document.

    Args:
        record: of a study; at least one row.
    """
    results, seen = record.results, record.looks
    study = results.study
    charts = draw(results, record.authors)
    if seen is not None and seen.found:
        charts = [*charts, looks(results, seen)]
    lead, charts = (charts, []) if study.figure in LEADING else ([], charts)
    return render(
        "study.html.jinja",
        title=study.title,
        study=study,
        seeds=seeds(study.seeds),
        verdict=verdict(results),
        unfinished=_unfinished(results, record.missing),
        forests=[_forest(name, rows, results) for name, rows in results.panels.items()],
        limits=limits(results, record.facts),
        asked=[study.question, f"What was published: {study.claim}"],
        answer=answer(results),
        lead=lead,
        charts=charts,
        unseen=[f"{title}: {why}" for title, why in seen.missing] if seen is not None else [],
        tables=tables(results),
        protocol=_protocol(results, record.facts),
        failures=results.failures,
        networks=_networks(results),
        runs=_runs(results),
        finished=results.finished,
        command=record.command,
        environment=record.environment,
    )


LEADING = ("matrix",)
"""Figures that show all data sets at once, and so stand first."""

SHORT = ("setting", "test acc. %", "difference, points", "gap, points", "seeds", "FLOPs/image", "images/s")
"""Columns for a terminal."""


def printed(record: Record) -> str:
    """The verdict, a table for every data set and what may be concluded, for a terminal."""
    results = record.results
    told = (verdict(results), *limits(results, record.facts))
    found = [f"{table.caption}\n{table.text(SHORT)}" for table in tables(results)]
    return "\n\n".join([*found, *(textwrap.fill(text, 110) for text in told)])


def tables(results: Results) -> list[Table]:
    """All that is said of every setting, a table for every data set."""
    return [_table(name, rows, results) for name, rows in results.panels.items()]


def _unfinished(results: Results, missing: Sequence[str]) -> str:
    texts = []
    if results.finished < results.planned:
        texts.append(
            f"{results.finished} of {results.planned} runs have finished; settings may differ in their number of seeds."
        )
    if missing:
        texts.append(f"Without {', '.join(missing)}, which nobody pointed to.")
    return " ".join(texts)


def _forest(name: str, rows: Sequence[Row], results: Results) -> Forest:
    """The figure of the verdict: every setting against the reference, or by score where that is the question."""
    study, reference = results.study, results.reference(rows)
    if study.figure == "ranking" or reference is None:
        ranked = [s.row for s in scores(rows)] if study.figure == "ranking" else list(rows)
        return Forest(
            f"{name}: test accuracy, %" + (", in the order of the score" if study.figure == "ranking" else ""),
            "accuracy",
            "Circles: means over seeds, with 95 % intervals; small dots: single seeds.",
            [_alone(row, study.measure) for row in ranked],
        )
    found = {d.row.title: d for d in differences(rows, reference, study.measure)}
    gap = study.measure != MEASURE
    what = "train minus test accuracy" if gap else "test accuracy"
    marks = []
    timed = study.figure == "costs" and all(row.cost for row in rows)
    for row in sorted(rows, key=lambda r: r.cost["latency_ms"]) if timed else rows:
        title = f"{row.title} ({row.cost['latency_ms']:.2g} ms)" if row.cost and study.figure == "costs" else row.title
        if row is reference:
            e = row.estimate(study.measure)
            marks.append(Mark(title, 0.0, None, None, accuracy(e).partition(" (")[0], "reference", colour="gray"))
        elif row.title in found:
            marks.append(_against(found[row.title], title, -1 if gap else 1, family(results, row)))
    return Forest(
        f"{name}: {what} less that of {reference.title}, points",
        "points",
        f"Circles: mean differences to {reference.title}, paired by seed, with 95 % intervals. Filled"
        + ("" if study.families else ", green for the better and orange for the worse")
        + ": found, after correction for the number of comparisons."
        + (f" {legend(results)}" if study.families else "")
        + (" Only operators that memorised their images with every seed are compared." if gap else "")
        + (" In the order of the latency of one image." if study.figure == "costs" else ""),
        marks,
        zero=0.0,
    )


def _alone(row: Row, measure: str) -> Mark:
    e = row.estimate(measure)
    dots = [100 * value for value in row.values(measure).values()]
    return Mark(
        row.title, 100 * e.mean, *ends(e), f"{100 * e.mean:.1f}", interval(e, lambda share: f"{100 * share:.1f}"), dots
    )


def _against(d: Difference, title: str, wanted: int, colour: str) -> Mark:
    e = d.estimate
    colour = colour or ("blue" if not d.found else "green" if wanted * e.mean > 0 else "orange")
    return Mark(title, 100 * e.mean, *ends(e), signed(e.mean), interval(e, signed), found=d.found, colour=colour)


def _protocol(results: Results, facts: Sequence[str]) -> list[str]:
    first = results.rows[0].trial.recipe
    varied = {name for row in results.rows for name in changed(row.trial.recipe, first)} - {"seed"}
    recipe = ", ".join(f"{name} {value}" for name, value in first.to_dict().items() if name not in varied | {"seed"})
    return [
        *facts,
        *results.study.protocol,
        "Epochs and settings are chosen by held-out images only; test images are evaluated once, with the chosen "
        "weights. A seed decides initial weights, order of the images, augmentation and sampled candidates; the "
        "split of the images is the same for all.",
        "Intervals are Student's at 95 % over seeds; differences are paired by seed. Both take the spread from all "
        "settings of a data set together (a two-way layout of settings and seeds), which grants that settings "
        "scatter alike; a setting with one seed has no interval. An interval that would reach beyond 0 or 100 % ends "
        "there. A difference counts as found when Holm's adjusted p is below 0.05 among the comparisons on "
        "that data set. None of this contains the choice of the test images themselves, which is the same for all.",
        f"Recipe: {recipe}." + (f" Differing by setting: {', '.join(sorted(varied))}." if varied else ""),
    ]


def _table(name: str, rows: Sequence[Row], results: Results) -> Table:
    study, reference = results.study, results.reference(rows)
    found = {d.row.title: d for d in differences(rows, reference, study.measure)} if reference is not None else {}
    last = "_last" if study.measure.endswith("_last") else ""

    def share(measure: str) -> Callable[[Row], Cell]:
        return lambda row: Cell(accuracy(e := row.estimate(measure)).replace(" %", ""), e.mean)

    def less(row: Row) -> Cell:
        d = found.get(row.title)
        if d is None:
            return Cell("", -math.inf)
        return Cell(points(d.estimate).replace(" points", ""), d.estimate.mean, "found" if d.found else "")

    def adjusted(row: Row) -> Cell:
        d = found.get(row.title)
        return Cell("", math.inf) if d is None or math.isnan(d.p) else Cell(f"{d.p:.3g}", d.p)

    def cost(measure: str, show: Callable[[float], str]) -> Callable[[Row], Cell]:
        return lambda row: Cell(show(row.cost[measure]), row.cost[measure]) if row.cost else Cell("", math.inf)

    def number(measure: str, digits: int) -> Callable[[Row], Cell]:
        return lambda row: Cell(f"{(mean := row.mean(measure)):.{digits}f}", mean)

    columns: dict[str, Callable[[Row], Cell]] = {
        "setting": lambda row: Cell(row.title, dot=family(results, row)),
        "test acc. %": share(f"test_accuracy{last}"),
        "held-out acc. %": share("val_accuracy"),
        "train acc. %": share(f"train_accuracy{last}"),
        "gap, points": share(f"gap{last}"),
    }
    if study.measure != MEASURE:
        columns |= {"epochs": number("epochs", 1)}
    columns |= {
        "difference, points": less,
        "adjusted p": adjusted,
        "seeds": lambda row: Cell(str(len(row.results)), len(row.results)),
    }
    if study.figure == "ranking":
        ranked = {s.row.title: s for s in scores(rows)}
        columns |= {
            "Omega": lambda row: Cell(f"{ranked[row.title].omega:.4g}", ranked[row.title].omega),
            "score": lambda row: Cell(f"{ranked[row.title].score:.0f}", ranked[row.title].score),
            "tier": lambda row: Cell(ranked[row.title].tier),
        }
    if any(row.cost for row in rows):
        columns |= {
            "parameters": cost("parameters", count),
            "FLOPs/image": cost("flops", count),
            "latency, ms": cost("latency_ms", "{:.2f}".format),
            "images/s": cost("images_per_second", count),
            "peak MiB": cost("peak_memory_mib", "{:.1f}".format),
        }
    columns["s a run"] = number("seconds", 0)
    lines = [[cell(row) for cell in columns.values()] for row in rows]
    return Table(name, list(columns), lines, sorts=True)


def _runs(results: Results) -> Table:
    def share(value: float) -> Cell:
        return Cell(f"{100 * value:.2f}", value)

    lines = [
        [
            Cell(row.title), Cell(name), Cell(str(seed), seed),
            *(share(r[f"{part}_accuracy"]) for part in ("val", "test", "train")),
            Cell(str(r["best_epoch"])), Cell(str(r["epochs"])), Cell(f"{r['seconds']:.1f}", r["seconds"]),
        ]
        for name, rows in results.panels.items()
        for row in rows
        for seed, r in row.results.items()
    ]  # fmt: skip
    names = ("setting", "data", "seed", "held-out %", "test %", "train %", "best epoch", "epochs", "s")
    return Table("Every run", names, lines, left=(0, 1), sorts=True)


def _networks(results: Results) -> Table:
    def network(row: Row) -> str:
        return ", ".join(f"{name}={value}" for name, value in row.trial.network.items())

    lines = [[Cell(row.title), Cell(network(row), kind="left wide", code=True)] for row in results.rows]
    return Table("The networks", ("setting", "network"), lines, left=(0, 1))

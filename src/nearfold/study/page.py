"""The page of a study: one HTML file that asks for nothing outside itself, for a screen of any width and for print."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from nearfold.study.authors import Points
from nearfold.study.catalogue.readings import scores
from nearfold.study.charts import draw
from nearfold.study.compare import MEASURE, accuracy, against_reference, differences, points
from nearfold.study.document import again, document, failures, figure, paragraphs
from nearfold.study.results import Results, Row
from nearfold.study.table import count

CSS = """
th.sorts { cursor: pointer; }
th.sorts:hover { color: #2f6db3; }
td.found { font-weight: 600; }
details { margin: 12px 0; }
summary { cursor: pointer; color: #2f6db3; }
@media print { body { background: #fff; } main { max-width: none; padding: 0; } details { display: none; }
  figure { break-inside: avoid; } .pictures svg { min-width: 0; } }
"""

SORT = """
document.querySelectorAll('th.sorts').forEach(th => th.addEventListener('click', () => {
  const at = [...th.parentNode.children].indexOf(th), body = th.closest('table').tBodies[0];
  const value = row => { const t = row.cells[at].dataset.sort ?? row.cells[at].textContent;
    return isNaN(parseFloat(t)) ? t : parseFloat(t); };
  const down = th.dataset.down = th.dataset.down === '1' ? '' : '1';
  [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    const c = typeof x === typeof y ? (x > y) - (x < y) : typeof x === 'number' ? -1 : 1;
    return down ? -c : c; }).forEach(row => body.append(row));
}));
"""


def answer(results: Results) -> list[str]:
    """The paragraphs of the answer."""
    return (results.study.answer or against_reference)(results)


def html(
    results: Results,
    *,
    facts: Sequence[str],
    command: str,
    environment: Mapping[str, str],
    authors: Sequence[Points] = (),
    missing: Sequence[str] = (),
) -> str:
    """The page as one HTML document.

    Args:
        results: of the study; at least one row.
        facts: sentences about the data.
        command: what makes the same page elsewhere.
        environment: machine and versions, by name.
        authors: their runs, drawn behind.
        missing: data sets of the study that were not given.
    """
    study = results.study
    sections = (
        f"<h1>{escape(study.title)}</h1><p class='under'>study <code>{escape(study.name)}</code>, preset "
        f"<code>{escape(study.preset)}</code>: {len(study.trials)} settings, {study.seeds} seeds each</p>",
        "<h2>What was asked</h2>" + paragraphs([study.question, f"What was published: {study.claim}"]),
        "<h2>The answer</h2><div class='answer'>"
        + _unfinished(results, missing)
        + paragraphs(answer(results))
        + "</div>",
        "<h2>The figures</h2>" + "".join(figure(c.picture, c.caption) for c in draw(results, authors)),
        "<h2>The table</h2>" + "".join(_table(name, rows, results) for name, rows in results.panels.items()),
        _protocol(results, facts),
        failures(results.failures, "and are done again with --retry"),
        _runs(results),
        again(
            command,
            "Beside this page: runs.csv, a line for every run, and results.json, with every setting's configuration.",
            environment,
        ),
    )
    return document(study.title, sections, css=CSS, script=SORT)


def _unfinished(results: Results, missing: Sequence[str]) -> str:
    texts = []
    if results.finished < results.planned:
        texts.append(
            f"{results.finished} of {results.planned} runs have finished; settings may differ in their number of seeds."
        )
    if missing:
        texts.append(f"Without {', '.join(missing)}, which nobody pointed to.")
    return f"<p><strong>Not complete:</strong> {escape(' '.join(texts))}</p>" if texts else ""


def _protocol(results: Results, facts: Sequence[str]) -> str:
    first = results.rows[0].trial.recipe
    varied = {name for row in results.rows for name in _differing(first.to_dict(), row.trial.recipe.to_dict())}
    recipe = ", ".join(f"{name} {value}" for name, value in first.to_dict().items() if name not in varied | {"seed"})
    items = [
        *facts,
        *results.study.protocol,
        "Epochs and settings are chosen by held-out images only; test images are evaluated once, with the chosen "
        "weights. A seed decides initial weights, order of the images, augmentation and sampled candidates; the "
        "split of the images is the same for all.",
        "Intervals are Student's at 95 % over seeds; differences are paired by seed. Both take the spread from all "
        "settings of a data set together (a two-way layout of settings and seeds), which grants that settings "
        "scatter alike. A difference counts as found when Holm's adjusted p is below 0.05 among the comparisons on "
        "that data set. None of this contains the choice of the test images themselves, which is the same for all.",
        f"Recipe: {recipe}." + (f" Differing by setting: {', '.join(sorted(varied))}." if varied else ""),
    ]
    return "<h2>The protocol</h2><ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _differing(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    return [name for name in a if a[name] != b[name] and name != "seed"]


Cell = tuple[str, float | str]
"""What a cell shows, and what it is sorted by."""


def _table(name: str, rows: Sequence[Row], results: Results) -> str:
    study, reference = results.study, results.reference(rows)
    found = {d.row.title: d for d in differences(rows, reference, study.measure)} if reference is not None else {}
    last = "_last" if study.measure.endswith("_last") else ""

    def share(measure: str) -> Callable[[Row], Cell]:
        return lambda row: (accuracy(e := row.estimate(measure)).replace(" %", ""), e.mean)

    def less(row: Row) -> Cell:
        d = found.get(row.title)
        return ("", -math.inf) if d is None else (points(d.estimate).replace(" points", ""), d.estimate.mean)

    def adjusted(row: Row) -> Cell:
        d = found.get(row.title)
        return ("", math.inf) if d is None or math.isnan(d.p) else (f"{d.p:.3g}", d.p)

    def cost(measure: str, show: Callable[[float], str]) -> Callable[[Row], Cell]:
        return lambda row: (show(row.cost[measure]), row.cost[measure]) if row.cost else ("", math.inf)

    def number(measure: str, digits: int) -> Callable[[Row], Cell]:
        return lambda row: (f"{(mean := row.estimate(measure).mean):.{digits}f}", mean)

    columns: dict[str, Callable[[Row], Cell]] = {
        "setting": lambda row: (row.title, row.title),
        "test acc. %": share(f"test_accuracy{last}"),
        "held-out acc. %": share("val_accuracy"),
        "train acc. %": share(f"train_accuracy{last}"),
    }
    if study.measure != MEASURE:
        columns |= {"gap, points": share(study.measure), "epochs": number("epochs", 1)}
    columns |= {
        f"{'accuracy' if study.measure == MEASURE else 'gap'} less the reference's, points": less,
        "adjusted p": adjusted,
        "seeds": lambda row: (str(len(row.results)), len(row.results)),
    }
    if study.figure == "ranking":
        ranked = {s.row.title: s for s in scores(rows)}
        columns |= {
            "Omega": lambda row: (f"{ranked[row.title].omega:.4g}", ranked[row.title].omega),
            "score": lambda row: (f"{ranked[row.title].score:.0f}", ranked[row.title].score),
            "tier": lambda row: (ranked[row.title].tier, ranked[row.title].tier),
        }
    if any(row.cost for row in rows):
        columns |= {
            "parameters": cost("parameters", count),
            "FLOPs/image": cost("flops", count),
            "latency, ms": cost("latency_ms", "{:.2f}".format),
            "peak MiB": cost("peak_memory_mib", "{:.1f}".format),
        }
    columns["s a run"] = number("seconds", 0)

    def kind(head: str, row: Row) -> str:
        if columns[head] is less and row.title in found and found[row.title].found:
            return " class=found"
        return " class=left" if head == "setting" else ""

    head = "".join(f"<th class='sorts{' left' if text == 'setting' else ''}'>{escape(text)}</th>" for text in columns)
    body = ""
    for row in rows:
        body += "<tr>"
        for text, cell in columns.items():
            shown, value = cell(row)
            body += f"<td{kind(text, row)} data-sort='{escape(str(value), quote=True)}'>{escape(shown)}</td>"
        body += "</tr>"
    return (
        f"<p><strong>{escape(name)}</strong></p><div "
        f"class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div><p "
        "class='note'>Means over seeds, with 95 % intervals. Bold: a difference was found. A click on a head "
        "sorts.</p>"
    )


def _runs(results: Results) -> str:
    lines = "".join(
        f"<tr><td class=left>{escape(name)}</td><td class=left>{escape(row.title)}</td><td>{seed}</td>"
        f"<td>{100 * r['val_accuracy']:.2f}</td><td>{100 * r['test_accuracy']:.2f}</td>"
        f"<td>{100 * r['train_accuracy']:.2f}</td><td>{r['best_epoch']}</td><td>{r['epochs']}</td>"
        f"<td>{r['seconds']:.1f}</td></tr>"
        for name, rows in results.panels.items()
        for row in rows
        for seed, r in row.results.items()
    )
    networks = "".join(
        f"<tr><td class=left>{escape(row.title)}</td><td class=left><code>{escape(_network(row))}</code></td></tr>"
        for row in results.rows
    )
    names = ("data", "setting", "seed", "held-out %", "test %", "train %", "best epoch", "epochs", "s")
    heads = "".join(f"<th class=sorts>{name}</th>" for name in names)
    return (
        "<h2>Every run</h2><details><summary>The networks</summary><div "
        f"class='scroll'><table><tbody>{networks}</tbody></table></div></details><details><summary>{results.finished} "
        "runs</summary><div "
        f"class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _network(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.trial.network.items())

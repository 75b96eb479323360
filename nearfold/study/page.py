"""The page of a study: one HTML file that asks for nothing outside itself, for a screen of any width and for print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from nearfold.study.authors import Points
from nearfold.study.catalogue.readings import scores
from nearfold.study.charts import Chart, draw
from nearfold.study.compare import MEASURE, accuracy, against_reference, differences, points
from nearfold.study.report import CSS
from nearfold.study.results import Results, Row
from nearfold.study.table import count

MORE_CSS = """
.pictures { overflow-x: auto; }
.pictures svg { min-width: 620px; }
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
        "<h2>What was asked</h2>" + _paragraphs([study.question, f"What was published: {study.claim}"]),
        "<h2>The answer</h2><div class='answer'>"
        + _unfinished(results, missing)
        + _paragraphs(answer(results))
        + "</div>",
        "<h2>The figures</h2>" + "".join(map(_figure, draw(results, authors))),
        "<h2>The table</h2>" + "".join(_table(name, rows, results) for name, rows in results.panels.items()),
        _protocol(results, facts),
        _failures(results),
        _runs(results),
        f"<h2>To reproduce</h2><pre><code>{escape(command)}</code></pre><p>Beside this page: <code>runs.csv</code>, "
        "a line for every run, and <code>results.json</code>, with every run's whole configuration.</p>"
        f"<footer>{escape(' · '.join(f'{name} {value}' for name, value in environment.items()))}</footer>",
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(study.title)}</title><style>{CSS}{MORE_CSS}</style></head><body><main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main><script>{SORT}</script></body></html>\n"
    )


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _figure(chart: Chart) -> str:
    return (
        f"<figure><div class='pictures'>{chart.picture}</div><figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


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


def _table(name: str, rows: Sequence[Row], results: Results) -> str:
    reference = results.reference(rows)
    gaps = results.study.figure == "gaps"
    measure = "gap_last" if gaps else MEASURE
    against = {d.row.title: d for d in differences(rows, reference, measure)} if reference is not None else {}
    columns = [
        "setting",
        "test acc. %",
        "held-out acc. %",
        "train acc. %",
        "less the reference's, points",
        "adjusted p",
        "seeds",
    ]
    if gaps:
        columns[4] = "gap less the reference's, points"
    ranked = {s.row.title: s for s in scores(rows)} if results.study.figure == "ranking" else {}
    columns += ["gap, last weights", "epochs"] if gaps else []
    columns += ["Omega", "score", "tier"] if ranked else []
    costs = any(row.cost for row in rows)
    columns += ["parameters", "FLOPs/image", "latency, ms", "peak MiB"] if costs else []
    columns += ["s a run"]
    body = ""
    for row in rows:
        d = against.get(row.title)
        last = "_last" if gaps else ""
        measures = (f"test_accuracy{last}", "val_accuracy", f"train_accuracy{last}")
        cells: list[tuple[str, float | str]] = [
            (row.title, row.title),
            *((accuracy(e).replace(" %", ""), e.mean) for e in map(row.estimate, measures)),
            ("", -math.inf) if d is None else (points(d.estimate).replace(" points", ""), d.estimate.mean),
            ("", math.inf) if d is None or math.isnan(d.p) else (f"{d.p:.3g}", d.p),
            (str(len(row.results)), len(row.results)),
        ]
        if gaps:
            gap, epochs = row.estimate("gap_last"), row.estimate("epochs")
            cells += [(accuracy(gap).replace(" %", ""), gap.mean), (f"{epochs.mean:.1f}", epochs.mean)]
        if ranked:
            s = ranked[row.title]
            cells += [(f"{s.omega:.4g}", s.omega), (f"{s.score:.0f}", s.score), (s.tier, s.tier)]
        if costs:
            c = row.cost
            texts = (f"{c[n]:.2f}" if n in ("latency_ms", "peak_memory_mib") else count(c[n]) for n in COLUMNS if c)
            cells += [(t, float(c[n])) for t, n in zip(texts, COLUMNS, strict=True)] if c else [("", "")] * 4
        seconds = row.estimate("seconds").mean
        cells.append((f"{seconds:.0f}", seconds))
        found = " class=found" if d is not None and d.found else ""
        body += "<tr>" + "".join(
            f"<td{' class=left' if i == 0 else found if i == 4 else ''} "
            f"data-sort='{escape(str(value), quote=True)}'>{escape(text)}</td>"
            for i, (text, value) in enumerate(cells)
        ) + "</tr>"  # fmt: skip
    head = "".join(
        f"<th class='sorts{' left' if i == 0 else ''}'>{escape(text)}</th>" for i, text in enumerate(columns)
    )
    return (
        f"<p><strong>{escape(name)}</strong></p><div "
        f"class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div><p "
        "class='note'>Means over seeds, with 95 % intervals. Bold: a difference was found. A click on a head "
        "sorts.</p>"
    )


COLUMNS = ("parameters", "flops", "latency_ms", "peak_memory_mib")


def _failures(results: Results) -> str:
    if not results.failures:
        return ""
    items = "".join(f"<li>{escape(name)}: <code>{escape(error)}</code></li>" for name, error in results.failures)
    return (
        "<h2>Runs that failed</h2><div class='failed'><p>They are in no table and no figure; <code>--retry</code> "
        f"does them again:</p><ul>{items}</ul></div>"
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
        f"<h2>Every run</h2><details><summary>The networks</summary><div class='scroll'><table><tbody>{networks}"
        f"</tbody></table></div></details><details><summary>{results.finished} runs</summary>"
        f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _network(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.trial.network.items())

"""Studies whose results are made up, and what a page of theirs is made of."""

from collections import Counter
from html.parser import HTMLParser

import torch

from nearfold.study.authors import Points
from nearfold.study.catalogue.spectrum import RECIPE, SPECTRUM, along
from nearfold.study.grid import Data, Study, Trial
from nearfold.study.looks import Look, Looks
from nearfold.study.plots import FAMILIES
from nearfold.study.record import Record
from nearfold.study.results import Results, Row, together
from nearfold.train import Recipe

COSTS = {"parameters": 10, "flops": 100.0, "latency_ms": 1.0, "images_per_second": 5.0, "peak_memory_mib": 2.0}


class Tags(HTMLParser):
    """Counts tags with their attributes' names; of addresses, styles and handlers also what they say."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.addresses = Counter(), [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        addresses = [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert all(address.startswith(("#", "data:image/png")) for address in addresses), addresses
        self.addresses += addresses
        self.found[tag, tuple(sorted(name for name, _ in attrs))] += 1


def result(test, *, train=0.99, val=None, epochs=3, run="0"):
    return {
        "test_accuracy": test, "val_accuracy": test if val is None else val, "train_accuracy": train,
        "test_accuracy_last": test, "train_accuracy_last": train, "best_epoch": 2, "epochs": epochs, "seconds": 1.5,
        "run": run,
    }  # fmt: skip


def record(name, figure="settings"):
    """A study in which every text that comes from outside is the name, or begins with it."""
    trials, rows = [], []
    for i in range(3):
        network = {"name": "spectrum", "operation": "window(3) | box | kernel", "width": 8, "depth": 1, "note": name}
        trials.append(Trial({"data": name, "x" + name: f"{name}{i}"}, network, Data(name), Recipe()))
        found = {s: result(0.8 + 0.05 * i + 0.01 * s, train=1.0, run=name) for s in range(2)}
        rows.append(Row(trials[-1], found, COSTS | {"flops": 100 + i}))
    measure = "gap_last" if figure == "gaps" else "test_accuracy"
    families = dict(zip((f"{name}{i}" for i in range(3)), FAMILIES, strict=False)) if figure == "spectrum" else {}
    study = Study(name, "cpu", name, name, name, trials, 2, "x" + name, f"{name}0", (name,), figure=figure,
                  measure=measure, cost=True, families=families)  # fmt: skip
    theirs = [Points(name, name, {f"{name}0": [80.0], f"{name}1": [81.0]})]
    results = Results(study, rows, 9, [(name, name)], {name: 100})
    look = Look(f"{name}0", torch.full((4, 4), 1 / 16), (1, 1))
    seen = Looks(torch.zeros(1, 8, 8, dtype=torch.uint8), name, [look], [(name, name)])
    return Record(results, [name], name, {name: name}, [name], theirs, seen if figure == "spectrum" else None)


def results_of(by_setting, figure="settings", train=0.99, cost=False, **options):
    """A study with one data set and these test accuracies, one a seed."""
    trials, rows = [], []
    for i, (setting, tests) in enumerate(by_setting.items()):
        network = {"name": "spectrum", "operation": "window(3) | box | kernel", "width": 8, "depth": 1}
        trial = Trial({"data": "digits", "setting": setting}, network, Data("digits"), Recipe())
        trials.append(trial)
        costs = COSTS | {"flops": 100 * (i + 1), "latency_ms": i + 1.0}
        found = {seed: result(test, train=train) for seed, test in enumerate(tests)}
        rows.append(Row(trial, found, costs if cost else {}))
    reference = next(iter(by_setting))
    study = Study(
        "s", "cpu", "A title <&>", "Which?", "That one.", trials, 3, "setting", reference, figure=figure, **options
    )
    return Results(study, rows, sum(map(len, by_setting.values())), [])


def spectrum_of(by_stop, train=None, tested=400):
    """The spectrum study on digits with these test (and training) accuracies, by the operators' short names."""
    stops = [stop for stop in SPECTRUM if stop.name in by_stop]
    study = along({Data("digits"): (8, 8)}, RECIPE, stops=stops)
    rows = []
    for i, (trial, stop) in enumerate(zip(study.trials, stops, strict=True)):
        trains = (train or {}).get(stop.name, (1.0,) * len(by_stop[stop.name]))
        found = {s: result(test, train=trains[s]) for s, test in enumerate(by_stop[stop.name])}
        rows.append(Row(trial, found, COSTS | {"flops": 1_000_000 * (i + 1), "images_per_second": 100.0 * (i + 1)}))
    return Results(study, together(rows), sum(map(len, by_stop.values())), [], {"digits": tested})

"""`nearfold search`: the space, the budget, who proposes, halving, the comparison, and going on after a kill."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from nearfold.cli import main
from nearfold.grammar import parse
from nearfold.models import SpectrumNet
from nearfold.study import given, tasks
from nearfold.study.fourteen import FOURTEEN
from nearfold.study.local import Local
from nearfold.study.measure import count_flops, count_parameters
from nearfold.study.search import Budget, Settings, open_search
from nearfold.study.search import propose as propose_module
from nearfold.study.search.budget import Networks, OverBudget
from nearfold.study.search.command import found_layers
from nearfold.study.search.halving import rungs
from nearfold.study.search.layers import AS_IT_IS, LayerSpace, read, text_of, written
from nearfold.study.search.propose import Proposer
from nearfold.study.search.report import leave, summary, verdict
from nearfold.study.search.space import Space
from nearfold.study.store import run_key
from nearfold.study.tasks import build
from nearfold.train import load_data, prepare

pytest.importorskip("optuna")
SPACE = Space(16, (8, 8))
FEW = {name: FOURTEEN[name] for name in ("convolution 3x3", "self-attention", "ConvNN")}


def drawn(count, seed=0, space=SPACE):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        try:
            found.append(space.draw(lambda name, among: rng.choice(among)))
        except ValueError:
            found.append(None)
    return found


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", limit=60, validation=1 / 3)


# --- the space


def test_what_is_drawn_is_of_the_language_and_leads_back_to_its_choices():
    found = [notation for notation in drawn(120) if notation is not None]
    assert len(found) > 100 and len(set(found)) > 100
    for notation in found:
        assert str(parse(notation)) == notation and SPACE.parameters(notation) is not None


def test_words_of_every_kind_are_drawn():
    text = " ".join(filter(None, drawn(400)))
    words = "window( all nearest( blend( deformable( scan( axial( & branch( a*( softmax( generated( selective table("
    words += " mean max depthwise separable reverse dilation= self random( causal ranked"
    assert [word for word in words.split() if word not in text] == []


def test_sizes_fit_the_grid_and_heads_the_channels():
    text = " ".join(filter(None, drawn(400, space=Space(6, (4, 4)))))
    assert "window(3)" in text and "window(7" not in text and "nearest(16" not in text
    assert "heads=2" in text and "heads=4" not in text and "table(16)" in text


def test_what_it_starts_from_lies_in_the_space_but_for_acmix():
    sized = {title: str(parse(n).map(lambda part: part.sized(64))) for title, n in FOURTEEN.items()}
    assert len(FOURTEEN) == 14
    assert [title for title, n in sized.items() if SPACE.parameters(n) is None] == ["ACmix"]
    assert SPACE.parameters("all | row | table(65)") is None


# --- the budget


@pytest.mark.parametrize(("kind", "most"), [("params", 30_000), ("flops", 2_500_000)])
def test_networks_have_the_budget_by_a_count_of_their_own(digits, kind, most):
    networks = Networks(digits, Budget(kind, most), width=16)
    notations = [*FOURTEEN.values(), *(n for n in drawn(6) if n)]
    seen = 0
    for notation in notations:
        sized = str(parse(notation).map(lambda part: part.sized(64)))
        try:
            network = networks.around(sized)
        except ValueError:  # over the budget, or heads that do not divide a branch's channels
            continue
        seen += 1
        model = build(network, digits)
        assert isinstance(model, SpectrumNet) and model.stem.kernel_size == (1, 1)
        spent = count_parameters(model) if kind == "params" else count_flops(model, (1, 8, 8))
        assert 0.95 * most <= spent <= most, sized
    assert seen >= 14


def test_an_operator_over_the_budget_and_a_budget_too_coarse_are_told_apart(digits):
    with pytest.raises(OverBudget, match="one channel wide"):
        Networks(digits, Budget("params", 3000), width=16).around("window(7) | box | kernel")
    deep = Networks(digits, Budget("params", 1), width=16, depth=12)
    least = deep.price("window(3) | box | mean", 1)
    coarse = Networks(
        digits, Budget("params", least + 33 * 12 - 1), width=16, depth=12
    )  # MLPs of 2 channels take one more
    with pytest.raises(ValueError, match="larger budget") as told:
        coarse.around("window(3) | box | mean")
    assert not isinstance(told.value, OverBudget)
    with pytest.raises(ValueError, match="table is for 65 positions"):
        Networks(digits, Budget("flops", 3e6), width=16).around("all | row | table(65)")
    with pytest.raises(ValueError, match=r"Budget\.kind must be one of"):
        Budget("seconds", 1)


def test_rungs():
    assert rungs(12) == (1, 4, 12) and rungs(1) == (1,) and rungs(27) == (3, 9, 27)


# --- who proposes


def answers(proposer, count, good):
    """Ask and tell: an operation is good where `good` says so; how many of the second half were."""
    seen = []
    for _ in range(count):
        proposal = proposer.ask()
        if proposal.refused:
            proposer.tell(proposal, {}, whole=False)
            continue
        seen.append(proposal.notation)
        proposer.tell(proposal, {1: 0.9 if good(proposal.notation) else 0.1}, whole=True)
    return seen


def test_the_same_answers_lead_to_the_same_proposals_and_others_to_others():
    def scan(notation):
        return "scan" in notation

    a, b, c = (answers(Proposer(SPACE, seed), 40, scan) for seed in (0, 0, 1))
    assert a == b and a != c
    d = answers(Proposer(SPACE, 0), 40, lambda notation: not scan(notation))
    assert d[:5] == a[:5] and d != a


def test_nothing_is_proposed_twice_though_one_kind_is_the_best_by_far():
    best = {f"window({k}) | box | depthwise" for k in (3, 5, 7)}
    told = Proposer(SPACE, first=4)
    for notation in sorted(best):
        assert told.know(notation, {9: 0.99})
    assert told.know("all | row | mean", {9: 0.1})
    seen = answers(told, 150, best.__contains__)
    assert len(seen) > 50 and len(set(seen)) == len(seen) and not best & set(seen)


def test_it_learns_and_what_it_was_told_beforehand_counts():
    def alone(notation):
        return not notation.startswith(("a*", "branch"))

    def rate(notations):
        return sum(map(alone, notations)) / len(notations)

    seen = answers(Proposer(SPACE), 60, alone)
    assert rate(seen[:10]) < 0.6 < rate(seen[30:])
    told = Proposer(SPACE, first=4)
    assert told.know(FOURTEEN["selective scan"], {9: 0.9}) and not told.know(FOURTEEN["ACmix"], {9: 0.9})
    assert told.know("branch(0.5, all | row | mean, window(3) | box | kernel, mix)", {9: 0.1})
    assert told.know("a*(all | row | mean) + b*(window(3) | box | kernel)", {9: 0.2})
    assert told.know("branch(0.25, all | row | mean, window(3) | box | kernel, mix)", {9: 0.2})
    assert rate(answers(told, 20, alone)) > 0.6


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="pip install optuna"):
        propose_module.Proposer(SPACE)


# --- the search, with trainings that are made up


def number(*parts):
    return int(hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:8], 16) / 2**32


class Made:
    """Stands for training: accuracies from the configuration. It counts, and can be interrupted."""

    def __init__(self, stop=None, test_of=0):
        self.keys, self.stop, self.test_of = [], stop, test_of

    def __call__(self, config, place, weights, work):
        if self.stop is not None and len(self.keys) >= self.stop:
            raise KeyboardInterrupt
        self.keys.append(run_key(config))
        operation, recipe = text_of(config["network"]), config["recipe"]
        seed, epochs = recipe["seed"], recipe.get("epochs", 20)
        if "| max" in operation:
            raise RuntimeError("no memory left")
        if weights is not None:
            weights.parent.mkdir(exist_ok=True)
            weights.touch()
        val = 0.5 + 0.4 * number(operation) + 0.05 * number(operation, seed)
        test = 0.5 + 0.4 * number(operation, self.test_of) + 0.05 * number(operation, seed, "test")
        return {
            "train_accuracy": 1.0, "train_accuracy_last": 1.0, "val_accuracy": val, "test_accuracy": test,
            "test_accuracy_last": test, "train_loss": 0.1, "best_epoch": epochs, "epochs": epochs, "steps": epochs,
            "seconds": 10.0 * epochs, "images_per_second": 1.0, "history": [],
        }  # fmt: skip


def settings(out, **changed):
    usual = {"limit": 60, "trials": 10, "generation": 5, "epochs": 9, "width": 8, "depth": 1, "finalists": 2}
    usual |= {"budget": Budget("params", 9000), "seeds": 3, "start": FEW, "out": out}
    return Settings("digits", **(usual | changed))


def made(monkeypatch, asked, train=None):
    """A search with made-up trainings: what it found, the lines it said, and what was trained."""
    train = train or Made()
    lines = []
    monkeypatch.setitem(tasks.TASKS, "train", train)
    return open_search(asked).run(Local(1), lines.append), lines, train


def same(found):
    """What two searches have in common if they are one."""
    return (
        [(one.notation, one.values) for one in found.tried],
        dict(found.refused), found.spent, found.difference, [one.results for one in found.finalists],
    )  # fmt: skip


def test_a_search_halves_chooses_by_validation_and_counts_everything(tmp_path, monkeypatch):
    found, lines, train = made(monkeypatch, settings(tmp_path))
    assert len(found.tried) == 10 and len({one.notation for one in found.tried}) == 10
    assert not {one.notation for one in found.tried} & {one.notation for one in found.known.values()}
    for start in (0, 5):  # a generation: five, two of them, one of these
        group = [one for one in found.tried[start : start + 5] if one.values]
        for shorter, longer, kept in ((1, 3, -(-len(group) // 3)), (3, 9, 1)):
            ranked = sorted((one for one in group if shorter in one.values), key=lambda one: -one.values[shorter])
            assert {id(one) for one in group if longer in one.values} == {id(one) for one in ranked[:kept]}
    finalists = {side: [one for one in found.finalists if one.side == side] for side in ("known", "search")}
    best_known = sorted(found.known.values(), key=lambda one: -one.values[9])[:2]
    assert {id(one.tried) for one in finalists["known"]} == {id(one) for one in best_known}
    assert all(one.results.keys() == {1, 2, 3} for one in found.finalists)
    ours, known = found.best("search"), found.best("known")
    assert ours.chosen_by == max(one.chosen_by for one in finalists["search"])
    gaps = [ours.test[seed] - known.test[seed] for seed in (1, 2, 3)]
    assert found.difference.mean == pytest.approx(sum(gaps) / 3) and found.difference.n == 3
    spent = found.spent
    assert sum(side.runs + side.failed for side in spent.values()) == len(train.keys) == len(set(train.keys))
    assert spent["known"].epochs == 27 and spent["known"].seconds == 270
    assert spent["finalists"].runs == 3 * len(found.finalists)
    assert lines[-1].endswith("[100%]") and "left]" in lines[0]


def test_what_test_images_say_decides_nothing_before_the_end(tmp_path, monkeypatch):
    one, lines, _ = made(monkeypatch, settings(tmp_path / "a"), Made(test_of=0))
    other, _, _ = made(monkeypatch, settings(tmp_path / "b"), Made(test_of=1))
    assert same(one)[:3] == same(other)[:3] and one.difference != other.difference
    assert one.best("search").tried.notation == other.best("search").tried.notation
    assert one.winner.tried.notation == other.winner.tried.notation
    assert not any("test" in line for line in lines)


def test_an_interrupted_search_goes_on_and_comes_to_the_same(tmp_path, monkeypatch):
    whole, _, all_of_it = made(monkeypatch, settings(tmp_path / "whole"))
    trained = []
    for stop in (1, 5, 9):  # among the known, in the first generation and in the second
        train = Made(stop)
        with pytest.raises(KeyboardInterrupt):
            made(monkeypatch, settings(tmp_path / "killed"), train)
        trained += train.keys
    again, _, train = made(monkeypatch, settings(tmp_path / "killed"))
    assert len(trained) == 15 and sorted(trained + train.keys) == sorted(all_of_it.keys)
    assert same(again) == same(whole)


def test_more_trials_go_on_from_those_there_are(tmp_path, monkeypatch):
    few, _, _ = made(monkeypatch, settings(tmp_path, trials=5))
    more, _, train = made(monkeypatch, settings(tmp_path, trials=10))
    assert [one.notation for one in more.tried[:5]] == [one.notation for one in few.tried]
    assert len(train.keys) < 30


def test_a_budget_of_latency_is_measured_and_what_is_over_it_is_not_trained(tmp_path, monkeypatch):
    def cost(config, place, weights, work):
        slow = "nearest" in config["network"]["operation"]
        usual = {"parameters": 1, "flops": 1, "images_per_second": 1.0, "peak_memory_mib": 1.0}
        return usual | {"latency_ms": 3.0 if slow else 1.0}

    monkeypatch.setitem(tasks.TASKS, "cost", cost)
    asked = settings(tmp_path, budget=Budget("latency_ms", 2))
    found, _, _ = made(monkeypatch, asked)
    assert found.left_out == {"ConvNN": "takes 3.00 ms"} and found.refused["over the budget"] > 0
    assert not any("nearest" in one.notation for one in found.tried)
    assert {one.network["hidden"] for one in found.tried} == {16}
    assert {one.latency_ms for one in [*found.tried, *found.known.values()]} == {1.0}
    assert "| MLP | ms |" in summary(found, "nearfold search", "")


def test_no_generation_begins_when_time_is_up(tmp_path, monkeypatch):
    asked = settings(tmp_path, minutes=0.01)
    with pytest.raises(ValueError, match="no time for one generation"):
        made(monkeypatch, asked)
    found, _, _ = made(monkeypatch, settings(tmp_path, minutes=23.5))  # 4.5 known, 18 finalists: one begins
    assert len(found.tried) == 5


def test_known_operators_that_cannot_be_had_are_told(tmp_path, monkeypatch):
    start = FEW | {"wide": "window(7) | box | kernel", "broken": "window(3) | box | max"}
    found, lines, _ = made(monkeypatch, settings(tmp_path, start=start, budget=Budget("params", 3000)))
    assert found.left_out.keys() == {"wide", "broken"} and found.spent["known"].failed == 1
    assert any("FAILED: RuntimeError: no memory left" in line for line in lines)
    with pytest.raises(ValueError, match=r"no known operator .* 3,000 parameters: wide: "):
        made(monkeypatch, settings(tmp_path, start={"wide": start["wide"]}, budget=Budget("params", 3000)))


def test_settings_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"Settings\.seeds must be at least 2, got 1"):
        Settings("digits", Budget("params", 1e4), seeds=1)
    with pytest.raises(ValueError, match=r"Settings\.start must name an operator"):
        Settings("digits", Budget("params", 1e4), start={})


# --- layer by layer, in a network that is given

NET = """
from collections import OrderedDict

import torch
from torch import nn

torch.set_default_dtype(torch.float32)

def trained():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )

def other():
    return trained()[:2]

def frozen():
    return trained().requires_grad_(False)

def hooked():
    net = trained()
    net[2].register_forward_hook(lambda *_: None)
    return net

def named():
    net = trained()
    return nn.Sequential(OrderedDict((f"a; b: {i}", layer) for i, layer in enumerate(net)))

def lazy():
    return nn.Sequential(nn.LazyConv2d(8, 3), *trained()[3:])

def double():
    return trained().double()

def lost():
    net = trained()
    net[0].weight.data[0, 0, 0, 0] = float("nan")
    return net

def a_tuple():
    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x
    return Pair(*trained())

def never_the_same():
    net = trained()
    nn.init.normal_(net[7].weight, generator=torch.Generator().manual_seed(torch.seed() % 2**31))
    return net
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path}/net.py:trained"


def of_layers(out, net, **changed):
    usual = {"budget": Budget("flops", 30_000), "model": net, "trials": 6, "generation": 3, "width": 32, "depth": 2}
    start = FEW | {"plus ConvNN": "({self}) + near*(nearest(3, cosine, self) | ranked | kernel)"}
    return settings(out, **(usual | {"start": start} | changed))


def test_layers_that_may_be_exchanged_and_what_by(tmp_path, net):
    search = open_search(of_layers(tmp_path, net))
    assert isinstance(search.space, LayerSpace)
    strided, inner = search.space.layers
    assert (strided.name, inner.name) == ("0", "2")  # the pointwise one is kept
    assert strided.known["self-attention"] == "all(stride=2) | row | softmax(heads=4)" and inner.site.grid == (4, 4)
    assert "convolution 3x3" not in inner.known and "stride=2" in strided.known["plus ConvNN"]
    assert search.start[AS_IT_IS] == AS_IT_IS and read(search.start["ConvNN"]).keys() == {"0", "2"}
    for text in search.start.values():
        assert written(read(text)) == text
        choices = search.space.parameters(text)
        assert search.space.draw(lambda name, among, choices=choices: choices[name]) == text
    assert search.space.parameters("2: window(7) | box | depthwise") is None
    only = open_search(of_layers(tmp_path, net, layers="2"))
    assert [layer.name for layer in only.space.layers] == ["2"]


def test_a_plan_starts_with_the_weights_of_the_network(tmp_path, net, digits):
    search = open_search(of_layers(tmp_path, net, budget=Budget("flops", 1e9)))
    x = torch.randn(4, 1, 8, 8)
    model = given.load(net)
    for title, same in (("plus ConvNN", True), ("ConvNN", False)):
        plan = search.networks.around(search.start[title])
        changed = build(plan, digits)
        assert changed[7].weight.equal(model[7].weight) and type(changed[2]) is not type(model[2])
        assert torch.allclose(changed.eval()(x), model.eval()(x), atol=1e-5) is same
    broken = search.networks.given | {"convert": {"2": "all | row | table(9)"}}
    with pytest.raises(ValueError, match=r"layer 2 does not become all \| row \| table"):
        build(broken, digits)
    with pytest.raises(ValueError, match=r"layer 9 does not become .*there is no such layer"):
        build(search.networks.given | {"convert": {"2": FEW["ConvNN"], "9": FEW["ConvNN"]}}, digits)
    with pytest.raises(ValueError, match="is not the model that this run was planned with"):
        build(search.networks.given | {"sha256": "0"}, digits)


def test_a_search_of_layers_has_what_is_over_the_budget_left_out_and_goes_on(tmp_path, monkeypatch, net):
    found, _, train = made(monkeypatch, of_layers(tmp_path, net))
    most = found.settings.budget.most
    assert found.networks.costs[AS_IT_IS][1] < most and AS_IT_IS in found.known
    assert found.left_out == {
        "self-attention": "takes 56,480 of 30,000 FLOPs of an image",
        "plus ConvNN": "takes 36,000 of 30,000 FLOPs of an image",
    }
    assert all(found.networks.costs[one.notation][1] <= most for one in [*found.tried, *found.known.values()])
    assert len(found.tried) == 6 and all(read(one.notation).keys() <= {"0", "2"} for one in found.tried)
    again, _, more = made(monkeypatch, of_layers(tmp_path, net))
    assert same(again) == same(found) and train.keys and not more.keys


def test_a_search_of_layers_from_the_first_run_to_the_files(tmp_path, net):
    torch.set_num_threads(1)
    start = {"plus ConvNN": "({self}) + near*(nearest(3, cosine, self) | ranked | kernel)"}
    few = {"trials": 1, "generation": 1, "epochs": 1, "finalists": 1, "seeds": 2, "start": start}
    asked = of_layers(tmp_path, net, budget=Budget("params", 5000), **few)
    found = open_search(asked).run(Local(1), lambda line: None)
    text, _ = leave(found, "nearfold search", tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    assert "| parameters | FLOPs |" in text and content["verdict"] in text and content["settings"]["model"] == net
    assert content["tried"][0]["convert"] == read(content["tried"][0]["notation"])
    with pytest.raises(ValueError, match="has the results of another search"):
        open_search(replace(asked, layers="2"))


def test_a_network_that_cannot_be_searched_is_told(tmp_path, net):
    for model, told in (
        ("nowhere", "MODEL must be timm:NAME"),
        (net.replace("trained", "other"), r"for each of the 10 classes of digits, \(2, 10\) .*got \(2, 8, 4, 4\)"),
        (net.replace("trained", "a_tuple"), "must return the logits alone, a tensor; got tuple"),
        ("resnet8s_conv", "does not take images of digits"),
        (net.replace("trained", "never_the_same"), "has other weights every time"),
        (net.replace("trained", "named"), "a layer is called 'a; b: 0'"),
        (net.replace("trained", "lazy"), "lazy layers.* run it once"),
        (net.replace("trained", "double"), r"has weights of torch\.float64.*return model\.float"),
        (net.replace("trained", "lost"), "not finite"),
        ("", "MODEL must be timm:NAME"),
        ("transformers:vit", "alone has fresh weights of transformers"),
    ):
        with pytest.raises(ValueError, match=told):
            open_search(of_layers(tmp_path, model))
    with pytest.raises(ValueError, match=r"layers='blocks\.\*' matches no layer .*; there is 0, 2"):
        open_search(of_layers(tmp_path, net, layers="blocks.*"))
    with pytest.raises(ValueError, match=r"layers=, .* are of a trained network: give model="):
        settings(tmp_path, layers="blocks.*")
    with pytest.raises(ValueError, match="width= and depth= are of the small networks"):
        of_layers(tmp_path, net, width=8)
    with pytest.raises(ValueError, match="mean= and std= go together"):
        open_search(of_layers(tmp_path, net, mean=(0.1,)))
    with pytest.raises(ValueError, match="std= must be above 0"):
        open_search(of_layers(tmp_path, net, mean=(0.1,), std=(0.0,)))
    with pytest.raises(ValueError, match="must have a number for each of 1 channels"):
        open_search(of_layers(tmp_path, net, mean=(0.1, 0.2), std=(1, 1)))


def test_what_was_frozen_is_trained_too_and_counted(tmp_path, net, digits):
    search = open_search(of_layers(tmp_path, net.replace("trained", "frozen")))
    search.networks.around(AS_IT_IS)
    assert search.networks.costs[AS_IT_IS][0] == sum(p.numel() for p in given.load(net).parameters())
    built = build(search.networks.around(search.start["ConvNN"]), digits)
    assert all(p.requires_grad for p in built.parameters())


def test_layers_that_cannot_be_exchanged_are_told(tmp_path, net):
    search = open_search(of_layers(tmp_path, net.replace("trained", "hooked")))
    assert [layer.name for layer in search.space.layers] == ["0"] and "hook" in search.kept["2"]
    assert any(line.startswith("2: kept: ") and "hook" in line for line in found_layers(search))


def test_another_forward_or_another_stride_is_another_model(tmp_path, net):
    path = tmp_path / "net.py"
    before = given.given(net, None)["sha256"]
    path.write_text(NET.replace("nn.ReLU()", "nn.GELU()"))
    after = given.given(net, None)["sha256"]
    path.write_text(NET + "# a word\n")
    assert len({before, after, given.given(net, None)["sha256"]}) == 3


def test_seeds_decide_new_weights_whatever_seed_the_function_sets(tmp_path, net, digits):
    search = open_search(of_layers(tmp_path, net))
    plan = search.networks.around(search.start["ConvNN"]) | {"convert": {"2": "all | row | softmax(heads=2)"}}

    def drawn_by(seed, cold):
        if cold:
            given._checked.cache_clear()
        torch.manual_seed(seed)
        return build(plan, digits)[2].state_dict()

    one, again, other = drawn_by(1, cold=False), drawn_by(1, cold=True), drawn_by(2, cold=True)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_network_is_looked_at_before_it_is_trained_on_with_images_as_it_was_trained(tmp_path, net):
    usual = open_search(of_layers(tmp_path, net))
    same = open_search(of_layers(tmp_path, net, mean=usual.data.mean.tolist(), std=usual.data.std.tolist()))
    x = prepare(usual.data.val.images, usual.data)
    with torch.no_grad():
        right = (given.load(net).eval()(x).argmax(1) == usual.data.val.labels).float().mean().item()
    assert usual.before == same.before == pytest.approx(right)
    assert f"{100 * usual.before:.1f} % of the validation images" in found_layers(usual)[-1]
    otherwise = open_search(of_layers(tmp_path, net, mean=(0.0,), std=(1.0,))).networks
    otherwise.around(AS_IT_IS)
    assert otherwise.costs[AS_IT_IS][0] == sum(p.numel() for p in given.load(net).parameters())
    raw = build(otherwise.given, usual.data)
    assert torch.allclose(raw(x), given.load(net)(usual.data.val.images.float() / 255), atol=1e-5)


def test_images_are_normalised_as_a_timm_model_says(tmp_path, digits):
    (tmp_path / "seen.py").write_text(
        "from torch import nn\n\ndef seen():\n    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))\n"
        "    nn.init.ones_(model[0].weight)\n    model.default_cfg = {'mean': (0.25,), 'std': (0.125,)}\n"
        "    return model\n"
    )
    model = given.build(given.given(f"{tmp_path}/seen.py:seen", None), digits)
    x = prepare(digits.train.images[:3], digits)
    raw = digits.train.images[:3].float() / 255
    assert torch.allclose(model(x), (raw - 0.25) / 0.125, atol=1e-5)


# --- for real


def test_a_small_search_from_the_first_run_to_the_files(tmp_path, capsys):
    torch.set_num_threads(1)
    few = {"convolution 3x3": FOURTEEN["convolution 3x3"]}
    asked = settings(tmp_path, trials=3, generation=3, epochs=2, finalists=1, seeds=2, start=few)
    found = open_search(asked).run(Local(1), lambda line: None)
    text, paths = leave(found, "nearfold search", tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    assert [path.name for path in paths] == ["summary.md", "result.json"]
    with pytest.raises(ValueError, match=r"has the results of another search \(budget: .*name another folder"):
        open_search(replace(asked, budget=Budget("params", 9e4)))
    open_search(replace(asked, trials=9))  # goes on
    assert content["trials"] == 3 and content["proposed"] == 3 + sum(content["refused"].values())
    assert content["verdict"] == verdict(found) and content["verdict"] in text
    assert content["winner"] in text and content["xray"]["layers"]
    assert content["difference"]["mean"] == found.difference.mean
    assert parse(content["winner"]) and all(one["test"] for one in content["finalists"])
    assert "3 operations" in text or "3 were" in text


COMMAND = ["search", "--data=digits", "--limit=90", "--params=9000", "--width=8", "--trials=9", "--epochs=3"]
COMMAND += ["--finalists=1", "--seeds=2", "--jobs=1"]


def launch(out):
    return subprocess.Popen(
        [sys.executable, "-m", "nearfold", *COMMAND, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(out):
    return {path.name: path.read_bytes() for path in (out / "runs").glob("*.json")}


def without_seconds(value):
    """A result without what no two searches share: times, and where they lie."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k not in ("seconds", "out", "command")}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(tmp_path):
    deaths = 0
    for goal in (9, 20):
        process = launch(tmp_path / "killed")
        limit = time.monotonic() + 300
        while len(finished(tmp_path / "killed")) < goal and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        deaths += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        before = finished(tmp_path / "killed")
        assert len(before) >= goal
    assert deaths == 2
    for name in ("killed", "whole"):
        text, _ = launch(tmp_path / name).communicate(timeout=600)
        assert "The finalists" in text, text
    assert before.items() <= finished(tmp_path / "killed").items()  # to the byte, seconds too: nothing was done again
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("killed", "whole")]
    assert finished(tmp_path / "killed").keys() == finished(tmp_path / "whole").keys()
    assert without_seconds(results[0]) == without_seconds(results[1])


def test_the_command_asks_for_one_budget(capsys):
    assert main(["search", "--data", "digits"]) == 2
    assert main(["search", "--data", "digits", "--params", "9", "--flops", "9"]) == 2
    assert main(["search", "--data", "digits", "--params", "900"]) == 2
    told = capsys.readouterr().err
    assert "one of the arguments --params --flops --latency-ms is required" in told and "not allowed with" in told
    assert "no known operator can be trained within 900 parameters" in told

"""Studies whose networks start from trained weights, with layers exchanged that walk along the spectrum."""

from __future__ import annotations

import pytest
import torch

from nearfold.models import create, pretrained
from nearfold.study import surgery, tasks
from nearfold.study.catalogue.surgery import LAYERS, OPERATIONS
from nearfold.study.grid import Data, Trial, training
from nearfold.study.plan import fingerprint
from nearfold.study.tasks import Place
from nearfold.train import Recipe, load_data


@pytest.mark.parametrize("name", [name for name, changes in OPERATIONS.items() if changes])
def test_all_start_as_the_network_that_was_trained_and_arrive(name):
    torch.manual_seed(0)
    model, x = create("resnet8s_conv", widths=(8, 8, 8)).eval(), torch.randn(2, 3, 32, 32)
    before = model(x)
    network = {"name": "resnet8s_conv", "layers": LAYERS, **OPERATIONS[name]}
    surgery.operate(model, network, (3, 32, 32))
    torch.testing.assert_close(model.eval()(x), before)
    surgery.arrive(model, network)
    found = {str(group.layer.operation) for group in model.groups}
    if "along" in network:
        assert found == {f"nearest(9, blend({float(network['along']['lam'][1])}), padding=1) | box | kernel"}
    else:
        assert found == {network["convert"].replace("{self}", "window(3) | box | kernel")}


def test_a_run_starts_from_the_weights_and_ends_where_it_was_sent(tmp_path, monkeypatch):
    made = create("resnet8s_conv", in_chans=1, widths=(8, 8, 8), num_classes=10)
    with torch.no_grad():
        made.stem.weight.fill_(0.5)  # a fresh network's would be made from the images
    given = []

    def loaded(name, **arguments):
        given.append(arguments.pop("pretrained", False))
        network = create(name, widths=(8, 8, 8), **arguments)
        network.load_state_dict(made.state_dict())
        return network

    monkeypatch.setattr(tasks, "create", loaded)
    seen = {}
    real = tasks.fit

    def fit(model, *rest, schedule, **options):
        seen["stem"] = model.stem.weight.clone()
        result = real(model, *rest, schedule=schedule, **options)
        seen["done"], seen["op"] = schedule.done, str(model.groups[0].layer.operation)
        return result

    monkeypatch.setattr(tasks, "fit", fit)
    network = {"name": "resnet8s_conv", "pretrained": True, "layers": LAYERS, **OPERATIONS["lambda to 0.5"]}
    trial = Trial(
        {"data": "digits", "network": "x"}, network, Data("digits"), Recipe(epochs=1, batch_size=100, device="cpu")
    )
    config = training(trial, 0, fingerprint(load_data("digits"))).config
    result = tasks.train(config, Place(tmp_path, {}), None, None)
    assert given == [True] and torch.equal(seen["stem"], made.stem.weight)
    assert seen["done"] == result["steps"] and seen["op"].startswith("nearest(9, blend(0.5)")


def test_a_rule_that_fits_no_layer_is_said():
    model = create("resnet8s_conv", widths=(8, 8, 8))
    with pytest.raises(ValueError, match="no layer matches Rule"):
        surgery.operate(model, {"name": "resnet8s_conv", "convert": "attention", "layers": "nowhere"}, (3, 32, 32))


def test_the_network_of_the_study_comes_along():
    assert "resnet8s_conv" in pretrained.pretrained()


def test_a_run_is_filed_under_the_weights_that_it_starts_from(monkeypatch):
    network = {"name": "resnet8s_conv", "pretrained": True}
    trial = Trial({"data": "digits", "network": "x"}, network, Data("digits"), Recipe(device="cpu"))
    prints = fingerprint(load_data("digits"))
    config = training(trial, 0, prints).config
    digest = pretrained.weights_of("resnet8s_conv").sha256
    assert config["network"]["pretrained"] == digest
    assert surgery.arguments(config["network"]) == network
    with pytest.raises(ValueError, match=r"planned with other weights of resnet8s_conv .*plan it again"):
        surgery.arguments(config["network"] | {"pretrained": "0" * 64})

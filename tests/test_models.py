"""Every network of the table: what all of them promise, and that their sizes are the published ones.

The tests read the table: a network that enters it is tested without a change here.
"""

from __future__ import annotations

import csv
import inspect
from pathlib import Path

import pytest
import torch
from helpers.cells import slow_but
from helpers.networks import CLASSES, NAMES, every, every_kind, images, one_of_each_kind, sizes, tiny
from torch.testing import assert_close

import nearfold
from nearfold import cli
from nearfold._torchvision import load
from nearfold.models import MODELS, Entry, Published, create, list_models, register
from nearfold.models import network as network_module
from nearfold.models.densenet import DenseNet
from nearfold.models.resnet import ACMIX, ResNet
from nearfold.models.table import agrees, count, number
from nearfold.models.vgg import VGG

RUNS = Path(__file__).resolve().parents[2] / "shared" / "reference" / "convnn_runs.csv"


def gradients(network, x) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(2)  # dropout
    network.zero_grad()
    features = network.forward_features(x)  # of all tokens: the head of some networks reads one
    (network.forward_head(features).square().sum() + features.square().mean()).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in network.named_parameters() if p.requires_grad}


def one_of_each_family() -> list[str]:
    return list({MODELS[name].network: name for name in reversed(NAMES)}.values())


@every
def test_any_size_goes(name):
    network = tiny(name).eval()
    for which in (0, 1):
        y = network(images(name, which))
        assert y.shape == (2, CLASSES)
        assert y.isfinite().all()


@every
def test_every_parameter_learns_and_checkpointing_changes_nothing(name, monkeypatch):
    network, x = tiny(name).train(), images(name)
    state = {n: t.clone() for n, t in network.state_dict().items()}
    grads = gradients(network, x)
    assert [n for n, g in grads.items() if g is None or not g.isfinite().all()] == []
    # a bias before a norm or a softmax shifts what they take away again
    assert [n for n, g in grads.items() if not n.endswith("bias") and not g.any()] == []
    network.load_state_dict(state)  # running means too
    network.set_grad_checkpointing()
    real, blocks = network_module.checkpoint, []
    monkeypatch.setattr(
        network_module, "checkpoint", lambda block, *a, **k: blocks.append(block) or real(block, *a, **k)
    )
    again = gradients(network, x)
    assert len(blocks) >= 2
    for n, gradient in grads.items():
        assert_close(again[n], gradient, msg=lambda text, n=n: f"{n}: {text}")


@every_kind
def test_features_are_what_feature_info_says(name):
    maps = tiny(name, features_only=True).eval()
    x = images(name, 1)
    found = maps(x)
    assert [m.shape[1] for m in found] == maps.feature_info.channels()
    assert sorted(maps.feature_info.reduction()) == maps.feature_info.reduction()
    for m, reduction in zip(found, maps.feature_info.reduction(), strict=True):
        for got, side in zip(m.shape[2:], x.shape[2:], strict=True):
            assert abs(got - side / reduction) < 1
    for module in maps.feature_info.module_name():
        maps.network.get_submodule(module)
    last = tiny(name, features_only=True, out_indices=(-1,)).eval()
    (only,) = last(x)
    assert torch.equal(only, found[-1])
    sum(m.square().mean() for m in found).backward()
    unused = [n for n, p in maps.named_parameters() if p.requires_grad and p.grad is None]
    assert all("norm" in n or "class_token" in n for n in unused), unused  # of the head, a norm at most is left


@every_kind
def test_the_head_can_be_exchanged(name):
    network, x = tiny(name).eval(), images(name, 1)
    before = network.forward_head(network.forward_features(x), pre_logits=True)
    assert before.shape == (2, network.num_features)
    assert_close(network.get_classifier()(before), network(x))
    network.reset_classifier(0)
    assert_close(network(x), before)
    network.reset_classifier(3)
    assert network(x).shape == (2, 3)
    assert network.num_classes == network.arguments["num_classes"] == network.default_cfg["num_classes"] == 3
    assert create(name, **MODELS[name].tiny, num_classes=0, img_size=sizes(name)[1]).eval()(x).shape == before.shape


@pytest.mark.parametrize("name", ["vgg11_conv", "densenet121_conv", "vit_tiny_attention", "swin_tiny", "pvt_tiny"])
def test_an_image_that_is_too_small_is_said(name):
    with pytest.raises(ValueError, match=r"x must be \(B, channels, H, W\) with H and W of at least \d+, got shape"):
        tiny(name, img_size=(64, 64))(torch.zeros(1, 3, 3, 64))


@every_kind
def test_every_network_takes_any_number_of_channels(name):
    assert tiny(name, in_chans=1).eval()(images(name, 1)[:, :1]).shape == (2, CLASSES)


@pytest.mark.parametrize("name", [name for name in NAMES if MODELS[name].published.parameters])
def test_parameters_are_the_published_ones(name):
    published = MODELS[name].published
    with torch.device("meta"):
        network = create(name, num_classes=published.classes)
    built = sum(p.numel() for p in network.parameters())
    assert agrees(built, published.parameters) is published.reached
    if not published.reached:
        assert published.reading
        assert built == pytest.approx(number(published.parameters), rel=0.05)


COUNTED = [name for name in NAMES if MODELS[name].published.macs]


@pytest.mark.parametrize("name", slow_but({MODELS[name].network: name for name in COUNTED}.values(), COUNTED))
def test_multiply_adds_are_the_published_ones_within_3_percent(name):
    row = count(name)
    assert row.macs == pytest.approx(number(row.printed_macs), rel=0.03)


@pytest.mark.parametrize("name", slow_but(("gwo_deformable", "vgg11_conv", "vit_base_kvt"), one_of_each_kind()))
def test_compiled_gives_the_same(name):
    torch._dynamo.reset()
    network, x = tiny(name).eval().double(), images(name, 1).double()  # in float32 near-ties are ranked by rounding
    with torch.no_grad():
        assert_close(torch.compile(network, backend="eager", fullgraph=True)(x), network(x))


@pytest.mark.parametrize("name", slow_but(("vgg11_conv", "vit_base_attention"), one_of_each_family()))
def test_exported_gives_the_same(name):
    network, x = tiny(name).eval(), images(name, 1)
    with torch.no_grad():
        assert_close(torch.export.export(network, (x,)).module()(x), network(x))


# sizes of the public code's runs


def logged() -> list[tuple[dict[str, str], int]]:
    """Layer, classes and parameters of every kind of VGG-11 run in the public logs."""
    wanted = ("K", "kernel_size", "branch_ratio", "aggregation_type", "dataset", "layer")
    with RUNS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["arg_model"] == "vgg11"]
    kinds = {tuple(row[f"arg_{n}"] for n in wanted): int(row["arg_total_params"]) for row in rows}
    return [(dict(zip(wanted, kind, strict=True)), total) for kind, total in sorted(kinds.items())]


def test_vgg11_has_the_parameters_of_every_logged_run():
    if not RUNS.exists():
        pytest.skip(f"no logs at {RUNS}")
    runs = logged()
    assert len(runs) > 100 and {run["dataset"] for run, _ in runs} == {"cifar10", "cifar100"}
    assert {run["layer"] for run, _ in runs} == {"Branching"}
    wrong = []
    for run, total in runs:
        kernel = "kernel(coordinates)" if run["aggregation_type"] == "Loc_Col" else "kernel"
        layer = (
            f"branch({run['branch_ratio']}, nearest({run['K']}, cosine, self, padding=1) | ranked | {kernel}, "
            f"window({run['kernel_size']}) | box | kernel, mix)"
        )
        with torch.device("meta"):
            network = VGG(11, layer, num_classes=10 if run["dataset"] == "cifar10" else 100)
        built = sum(p.numel() for p in network.parameters())
        wrong += [(run, built, total)] * (built != total)
    assert wrong == []


@pytest.mark.parametrize("ratio", [0, 0.125, 0.5, 0.875, 1])
def test_a_hybrid_vgg_has_one_size_at_every_ratio(ratio):
    layer = f"branch({ratio}, nearest(9, cosine, self) | ranked | kernel, window(3) | box | kernel, mix)"
    with torch.device("meta"):
        network = create("vgg11_hybrid", layer=layer)
    assert sum(p.numel() for p in network.parameters()) == 130_015_690


def test_the_public_acmix_code_has_its_own_size():
    with torch.device("meta"):
        network = create("acmix_resnet50", layer=ACMIX)
    assert sum(p.numel() for p in network.parameters()) == 18_333_976


# torchvision's weights


def torchvision():
    try:
        return load("torchvision.models")
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))


TORCHVISION = {
    "vgg11_bn": lambda **small: create("vgg11_conv", **small),
    "resnet18": lambda: create("resnet18_conv", num_classes=10),
    "resnet50": lambda: create("resnet50_conv", bias="none", num_classes=10),
    "densenet121": lambda: create("densenet121_conv", num_classes=10),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_weights_load_and_give_its_output(name):
    with torch.device("meta"):
        theirs, ours = getattr(torchvision(), name)(num_classes=10), TORCHVISION[name]()
    theirs_shapes = {n: t.shape for n, t in theirs.state_dict().items()}
    assert {n: t.shape for n, t in ours.state_dict().items()} == theirs_shapes
    small = {}
    if name == "vgg11_bn":  # a classifier of 120 million parameters takes long, and shows nothing more
        small = {"hidden": 8}
        theirs.classifier = create("vgg11_conv", **small).classifier
    theirs.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for n, tensor in theirs.state_dict().items():  # also the running means, whose first values hide what a norm does
        if tensor.dim() > 1:
            torch.nn.init.kaiming_normal_(tensor)
        elif tensor.dtype == torch.float32:
            torch.nn.init.uniform_(tensor, *((0.5, 1.5) if n.endswith(("weight", "var")) else (-0.1, 0.1)))
    ours = TORCHVISION[name](**small).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 49, 64)
    with torch.no_grad():
        wanted = theirs(x)
        assert_close(ours(x), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("name", "omega"), [("gwo_conv", 6), ("gwo_deformable", 8.003), ("gwo_depthwise", 8), ("gwo_resnet18", 60)]
)
def test_gwos_networks_have_the_published_omega(name, omega):
    found = nearfold.complexity(create(name))
    assert round(found.omega, 3) == omega
    assert found.unknown == ()


# the table


def test_printed_numbers_are_read_by_their_digits():
    assert agrees(10_649_999, "10.6M") and agrees(10_699_999, "10.6M")  # rounded, cut off
    assert not agrees(10_700_000, "10.6M") and not agrees(10_549_999, "10.6M")
    assert not agrees(128_812_811, "128,812,810")
    with pytest.raises(ValueError, match="printed number"):
        number("ten")


def test_the_command_prints_the_table(capsys):
    assert cli.main(["models", "gwo_*"]) == 0
    _, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == list_models("gwo_*")
    assert any(row.split()[:2] == ["gwo_deformable", "265,096"] for row in rows)
    assert cli.main(["models", "no_such"]) == 2
    assert "no_such" in capsys.readouterr().err


def test_names_and_arguments_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="vgg11_hybrid"):
        create("vgg11_hybird")
    with pytest.raises(ValueError, match="sizes"):
        create("vgg11_conv", sizes=3)
    with pytest.raises(ValueError, match="already"):
        register("vgg11_conv", MODELS["vgg11_conv"])
    with pytest.raises(ValueError, match="out_indices"):
        tiny("vgg11_conv", out_indices=(0,))
    with pytest.raises(ValueError, match=r"out_indices.*0 to 5"):
        tiny("vgg11_conv", features_only=True, out_indices=(6,))
    with pytest.raises(ValueError, match="img_size"):
        tiny("vgg11_conv", img_size=(1, 2, 3))
    with pytest.raises(ValueError, match="num_classes"):
        tiny("vgg11_conv").reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool"):
        tiny("vgg11_conv").reset_classifier(3, "max")


@pytest.mark.parametrize(
    ("family", "arguments", "named"),
    [
        (VGG, {"depth": 12}, "depth"),
        (VGG, {"layer": "window(3)"}, "window"),
        (ResNet, {"depths": (1, 1, 1)}, "depths"),
        (ResNet, {"depths": (1, 1, 1, 1), "block": "wide"}, "block"),
        (ResNet, {"depths": (1, 1, 1, 1), "bias": True}, "bias"),
        (ResNet, {"depths": (1, 1, 1, 1), "layer": "block(2) | box | softmax", "strided": True}, "stride"),
        (DenseNet, {"depths": ()}, "depths"),
    ],
)
def test_bad_arguments_are_refused_by_name(family, arguments, named):
    with pytest.raises(ValueError, match=named):
        family(**arguments)


def test_the_table_is_well_kept():
    for name, entry in MODELS.items():
        accepted = inspect.signature(entry.network).parameters
        assert {"num_classes", "in_chans", "img_size"} | entry.arguments.keys() | entry.tiny.keys() <= accepted.keys()
        assert entry.text and name == name.lower()
        if entry.published.parameters or entry.published.macs:
            assert entry.published.source, f"{name}: where was it published?"
    assert Entry(VGG, {}, "x").published == Published()

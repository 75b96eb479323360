"""Surgery: everything around a layer that must stay as it was, and which layers a rule matches."""

from __future__ import annotations

import copy
import multiprocessing
import os

import pytest
import torch
from helpers.surgery import BOUND, NEAR, multihead, off
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from nearfold import Rule, convert, parse
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("float64")

# --- everything around the layer


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.ReLU(),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_mode_and_frozen_parameters_stay(dtype):
    model = net().to(dtype)
    model[0].requires_grad_(False)
    model[3].eval()
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    y = model(x)
    report = convert(model, Rule(f"({{self}}) + new*({NEAR})"))
    assert report.exact and {p.dtype for p in model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[3].parameters())
    assert model[0].training and not model[3].training and model.training
    assert not any(name.endswith("bias") for name, _ in model[3].named_parameters())
    model[1].reset_running_stats()
    budget = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    assert off(model(x).double(), y.double()) <= budget


def test_undo_gives_the_same_modules_back():
    model = net()
    old = list(model)
    x = torch.randn(1, 3, 6, 6)
    model.eval()
    y, keys = model(x), list(model.state_dict())
    report = convert(model, Rule("deformable(3) | box | kernel", kernel_size=3))
    assert list(model.state_dict()) != keys
    model.train()
    report.undo()
    assert list(model) == old and list(model.state_dict()) == keys
    assert all(m.training for m in model.modules())  # the mode is the model's of now
    assert torch.equal(model.eval()(x), y)
    with pytest.raises(ValueError, match="the old layers are in the model already"):
        report.undo()
    report.apply()
    assert off(model(x), y) <= BOUND
    model[0] = nn.Identity()
    with pytest.raises(ValueError, match="1 layers are no longer in the model"):
        report.undo()
    assert isinstance(model[3], Mixer)


def test_a_layer_in_two_places_stays_one():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv, nn.ReLU())})
    report = convert(model, Rule(NEAR))
    assert len(report.rows) == 1 and model["a"] is model["b"][0] and isinstance(model["a"], Mixer)
    report.undo()
    assert model["a"] is model["b"][0] is conv


def test_a_converted_model_is_a_model():
    """It trains, is copied, saved and loaded like any other."""
    model = net()
    convert(model, Rule(f"({{self}}) + new*({NEAR})", kernel_size=3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(2, 3, 6, 6)
    before = model(x).detach()
    model(x).square().sum().backward()
    assert model[0].rates.grad.abs().item() > 0
    optimizer.step()
    assert not torch.equal(model(x), before)
    twin = copy.deepcopy(model)
    other = net()
    convert(other, Rule(f"({{self}}) + new*({NEAR})", kernel_size=3))
    other.load_state_dict(model.state_dict())
    for copied in (twin, other):
        assert torch.equal(copied.eval()(x), model.eval()(x))
        copied.train(), model.train()
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    assert off(compiled(x), model(x)) <= BOUND


def wrapped_in_ddp():
    """In a process that frees nothing: torch's ~ProcessGroupGloo may wait for itself (docs/log.md)."""
    torch.manual_seed(0)
    model = net()
    x = torch.randn(2, 3, 6, 6)
    y = model(x).detach()
    assert convert(model, Rule(f"({{self}}) + new*({NEAR})", kernel_size=3)).exact
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert off(wrapped(x), y) <= BOUND
    wrapped(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
        convert(wrapped, Rule(NEAR))
    os._exit(0)


@pytest.mark.slow
def test_it_is_wrapped_in_ddp_afterwards():
    process = multiprocessing.get_context("spawn").Process(target=wrapped_in_ddp)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_torchs_encoder_layer_runs_in_evaluation():
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    whole = copy.deepcopy(model)
    x = torch.randn(2, 10, 12)
    y = model(x)
    assert convert(model, Rule("{self}", kind="attention")).exact
    assert off(model(x), y) <= 1e-11  # torch's fused path sums in another order
    hidden = torch.ones(10, 10, dtype=torch.bool).triu(1)
    assert off(model(x, mask=hidden), whole(x, mask=hidden)) <= 1e-11


def test_calls_that_the_words_do_not_say_are_refused():
    model = multihead()
    report = convert(model, Rule("nearest(3, scaled) | ranked | softmax(heads={heads})"))
    assert not report.exact
    x, other = torch.randn(2, 10, 12), torch.randn(2, 10, 12)
    with pytest.raises(ValueError, match="reads one input, but was called with other keys"):
        model.attn(x, other, other)
    with pytest.raises(ValueError, match="attn_mask was given"):
        model.attn(x, x, x, attn_mask=torch.zeros(10, 10, dtype=torch.bool))


# --- what matches

NAMES = ["stem.0", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.attn"]


def named() -> nn.Module:
    def block(**children: nn.Module) -> nn.Module:
        made = nn.Module()
        for name, child in children.items():
            made.add_module(name, child)
        return made

    conv = lambda k: nn.Conv2d(4, 4, k, padding=k // 2)  # noqa: E731
    return block(
        stem=nn.Sequential(conv(7)),
        layer1=nn.Sequential(block(conv1=conv(1), conv2=conv(3))),
        layer2=nn.Sequential(block(conv1=conv(3), attn=nn.MultiheadAttention(4, 2))),
    )


@pytest.mark.parametrize(("conditions", "expected"), [
    ({}, NAMES),
    ({"kind": "conv"}, NAMES[:4]),
    ({"kind": "attention"}, NAMES[4:]),
    ({"kind": nn.Conv2d, "kernel_size": 3}, NAMES[2:4]),
    ({"kind": "MultiheadAttention"}, NAMES[4:]),
    ({"kernel_size": (3, 3)}, NAMES[2:4]),
    ({"kernel_size": (1, 3)}, None),
    ({"name": "*.conv1"}, [NAMES[1], NAMES[3]]),
    ({"stage": 2}, NAMES[3:]),
    ({"stage": (1, 2), "kind": "conv"}, NAMES[1:4]),
    ({"where": lambda site: site.operation == parse("window(7) | box | kernel")}, NAMES[:1]),
    ({"name": "layer9*"}, None),
])  # fmt: skip
def test_conditions(conditions, expected):
    model = named()
    rule = Rule(lambda site: "all | row | softmax" if site.kind == "attention" else NEAR, **conditions)
    if expected is None:
        with pytest.raises(ValueError, match="no layer matches Rule"):
            convert(model, rule)
        return
    report = convert(model, rule)
    assert [row.name for row in report.replaced] == expected
    kept = [row.name for row in report.rows if row.status == "kept"]
    assert sorted(kept + expected) == sorted(NAMES)


def test_the_first_rule_that_matches_decides():
    model = named()
    rules = [Rule(lambda site: None, kernel_size=1), Rule(NEAR, kind="conv"), Rule("{self}", stage=7)]
    report = convert(model, rules)
    assert [row.name for row in report.replaced] == [NAMES[0], *NAMES[2:4]]
    reasons = {row.name: row.reason for row in report.rows if row.status == "kept"}
    assert reasons == {NAMES[1]: "the rule keeps it", NAMES[4]: "no rule"}
    assert "unused: no layer matches Rule(to='{self}', stage=7)" in str(report)


def noted(*args):
    return None


REFUSED = {
    "hooks": (lambda conv: conv.register_forward_hook(noted), "it has a forward hook (noted), which would be lost"),
    "parametrizations": (lambda conv: weight_norm(conv), "it has parametrizations, which would be lost"),
    "padding": (lambda conv: setattr(conv, "padding_mode", "circular"), "no word for padding_mode=circular"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_layers_that_would_lose_something_are_refused(what):
    model = net()
    REFUSED[what][0](model[0])
    before = model[0]
    report = convert(model, Rule(NEAR))
    assert [(row.name, row.status) for row in report.rows] == [("0", "refused"), ("3", "replaced")]
    assert report.rows[0].reason == REFUSED[what][1] and model[0] is before


def test_what_does_not_divide_is_refused_with_the_reason():
    model = net()
    report = convert(model, Rule("all | row | softmax(heads=5)"))
    assert not report.replaced and "heads=5 must divide the 8 channels" in report.rows[0].reason
    model = multihead()
    report = convert(model, Rule("window({size}) | box | kernel"))
    assert report.rows[0].reason == "it has no size, which to='window({size}) | box | kernel' asks for"


@pytest.mark.parametrize(("conditions", "refused"), [
    ({}, ["0", "2"]),
    ({"kind": "conv"}, ["0"]),
    ({"kind": nn.Conv2d}, ["0"]),
    ({"kind": "MaxPool2d", "name": "2"}, ["2"]),
    ({"kernel_size": 3}, ["0"]),
    ({"where": lambda site: True}, []),
    ({"name": "3"}, []),
])  # fmt: skip
def test_a_layer_is_refused_only_where_a_rule_asks_for_it(conditions, refused):
    """Every layer that mixes positions is in the report; what no rule is about is kept."""
    circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(circular, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    report = convert(model, [Rule(NEAR, **conditions), Rule(NEAR, name="3")])
    assert [row.name for row in report.rows] == ["0", "2", "3"]
    assert [row.name for row in report.rows if row.status == "refused"] == refused
    assert report.rows[1].reason == "no rule to replace a MaxPool2d"


def test_lazy_layers_are_refused():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3))
    report = convert(model, Rule(NEAR))
    assert report.rows[0].reason == "lazy, and not initialised yet: run the model once"


WRONG = [
    (lambda: convert(net(), []), "rules must be one Rule or several"),
    (lambda: convert(net(), Rule("window(3) | bx | kernel")), "'bx' is not a shape"),
    (lambda: convert(nn.DataParallel(net()), Rule(NEAR)), "wrapped in DataParallel"),
    (lambda: convert(torch.compile(net()), Rule(NEAR)), "wrapped in OptimizedModule"),
    (lambda: convert(nn.Conv2d(4, 4, 3), Rule(NEAR)), "the model itself is the layer Conv2d"),
    (lambda: convert("resnet50", Rule(NEAR)), "model must be an nn.Module, got str"),
    (lambda: Rule(3), "to must be an operation"),
    (lambda: Rule("window({kernel}) | box | kernel"), "nothing is called {kernel} here"),
    (lambda: convert(net(), Rule(NEAR), input_size=(5, 8, 8)), "does not run on an input of size"),
    (lambda: convert(net(), Rule(NEAR), input_size=(3,)), "input_size must be channels and grid"),
    (lambda: convert(net(), Rule(NEAR, start={"lam": 0})), "has no lam to change"),
    (lambda: convert(net(), Rule(NEAR, start={"depth": 0})), "depth: what changes is one of ratio"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("{", r"\{")):
        call()


def test_the_report_adds_up():
    model = net()
    before = sum(p.numel() for p in model.parameters())
    report = convert(model, Rule(f"({{self}}) + new*({NEAR})", name="3"), input_size=(3, 8, 8))
    (row,) = report.replaced
    assert (row.parameters, row.parameters_after) == (576, 1153)
    assert row.flops == 2 * 64 * 8 * 8 * 9
    assert row.flops_after == 2 * row.flops + 2 * 64 * 64 * 8  # the other kernel, and every pair compared
    text = str(report)
    assert f"parameters {before:,} -> {sum(p.numel() for p in model.parameters()):,}" in text
    assert text.startswith("Sequential: 1 replaced, 1 kept") and "; exact" in text and "73,728 -> 212,992" in text

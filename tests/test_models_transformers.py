"""ViT, Swin, PVT and SAN: sizes of the public runs, and the same numbers as torchvision or a formula written out.

What every network of the table promises is in test_models.py.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from nearfold._torchvision import load
from nearfold.models import MODELS, create
from nearfold.models.pvt import PyramidVisionTransformer, ReducedACmix, ReducedAttention
from nearfold.models.san import PatchwiseAttention, SelfAttentionNetwork, weighted_patches
from nearfold.models.shift import ShiftConv
from nearfold.models.swin import SwinTransformer
from nearfold.models.table import agrees, count, macs
from nearfold.models.vit import ATTENTION, VisionTransformer, token_code
from nearfold.nn import Mixer

RUNS = Path(__file__).resolve().parents[2] / "shared" / "reference" / "convnn_runs.csv"
logs = pytest.mark.skipif(not RUNS.exists(), reason=f"no logs at {RUNS}")


def total(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def on_meta(make, **arguments):
    with torch.device("meta"):
        return make(**arguments)


def doubled(network: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, every parameter and running mean drawn anew: ones and zeros hide faults."""
    network = network.double().eval()
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.normal_(0, 0.3)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return network


pytestmark = pytest.mark.usefixtures("seeded")


# ViT


CONVOLUTIONS = {"depthwise": "depthwise", "depthwise-separable": "separable", "standard": "kernel"}
CANDIDATES = {"all": "", "random": ", random({n})", "spatial": ", grid({n})"}
BIASED = "Baseline_Test_lr4"
"""The runs before the biases of the attention's projections went."""


def vit_of(run: dict[str, str]) -> dict | None:
    """The arguments of the network of a logged run; None where the words cannot say it."""
    layer, heads = run["layer"], int(run["num_heads"])
    arguments = {"heads": heads, "num_classes": 10 if run["dataset"] == "cifar10" else 100}
    similarity = {"cosine": "cosine", "matmul": "scaled"}[run["magnitude_type"]]
    candidates = CANDIDATES[run["sampling_type"]].format(n=run["num_samples"])
    kernel = CONVOLUTIONS[run["convolution_type"]]
    near = f"nearest({run['K']}, {similarity}{candidates}) | ranked | softmax(heads={{heads}})*{kernel}"
    if layer == "Attention":
        return arguments | {"layer": "attention", "bias": run["folder"] == BIASED}
    if layer == "KvtAttention":
        return arguments | {"layer": f"nearest({run['K']}, scaled) | ranked | softmax(heads={{heads}})"}
    if layer == "LocalAttention":
        return arguments | {"layer": "local"}
    if layer == "SparseAttention":
        return arguments | {"layer": "sparse" if "Strided" in run["run"] else "sparse_local"}
    if layer == "BranchAttention":
        return arguments | {"layer": f"branch({run['branch_ratio']}, {near}, {ATTENTION}, split)"}
    assert layer == "ConvNNAttention", layer
    return None if heads > 1 else arguments | {"layer": near}  # the public kernel is shared by the heads


def logged() -> list[dict[str, str]]:
    with RUNS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["arg_model"] == "VIT"]
    return [{k.removeprefix("arg_"): v for k, v in row.items()} | {"folder": row["run"].split("/")[0]} for row in rows]


@logs
def test_vit_tiny_has_the_parameters_of_every_logged_run():
    runs = logged()
    assert len(runs) == 258
    built: dict[tuple, int] = {}
    wrong, unsaid = [], []
    for run in runs:
        arguments = vit_of(run)
        if arguments is None:
            unsaid.append(run["run"])
            continue
        kind = tuple(arguments.items())
        if kind not in built:
            built[kind] = total(on_meta(VisionTransformer, **arguments))
        if built[kind] != int(run["total_params"]):
            wrong.append((run["run"], built[kind], run["total_params"]))
    assert wrong == []
    assert len(unsaid) == 6 and all(run.startswith("Conv_test_lr4/") for run in unsaid)


@logs
def test_vit_tiny_does_the_multiplications_of_the_logged_run():
    (logged_flops,) = {float(r["gflops"]) for r in logged() if r["layer"] == "Attention" and r["dataset"] == "cifar10"}
    network = on_meta(VisionTransformer, num_classes=10).eval()
    # the logs count norms as well
    assert 2 * macs(network, (3, 224, 224)) / 1e9 == pytest.approx(logged_flops, rel=1e-3)


def attention(x, block, heads):
    """(B, N, D): softmax attention with a block's own weights, by torch."""
    weights = [getattr(block, f"{name}_weight") for name in ("query", "key", "value")]
    query, key, value = (F.linear(x, w).unflatten(2, (heads, -1)).transpose(1, 2) for w in weights)
    y = F.scaled_dot_product_attention(query, key, value)
    return F.linear(y.transpose(1, 2).flatten(2), block.out_weight)


def test_vit_with_attention_is_its_formula():
    network = doubled(VisionTransformer(width=12, depth=2, heads=3, patch=8, num_classes=5))
    image = torch.randn(2, 3, 27, 41, dtype=torch.float64)
    x = F.conv2d(image, network.embed.weight, network.embed.bias, stride=8).flatten(2).transpose(1, 2)
    x = F.layer_norm(x, (12,), network.norm.weight, network.norm.bias)
    x = torch.cat([network.class_token.expand(2, 1, 12), x], 1)
    for token in range(x.shape[1]):
        for j in range(0, 12, 2):
            angle = torch.tensor(token / 10000 ** (j / 12))
            x[:, token, j] += angle.sin()
            x[:, token, j + 1] += angle.cos()
    for block in network.blocks:
        normed = F.layer_norm(x, (12,), block.norm1.weight, block.norm1.bias)
        x = x + attention(normed, block.attention, heads=3)
        normed = F.layer_norm(x, (12,), block.norm2.weight, block.norm2.bias)
        first, _, second = block.mlp
        x = x + F.linear(F.gelu(F.linear(normed, first.weight, first.bias)), second.weight, second.bias)
    assert_close(network(image), F.linear(x[:, 0], network.head.weight, network.head.bias), atol=1e-5, rtol=1e-5)


def test_vit_takes_any_notation_for_tokens():
    network = VisionTransformer("scan(state=4) | causal | selective(heads={heads})", width=8, depth=1, heads=2)
    assert str(network.blocks[0].attention.operation) == "scan(state=4) | causal | selective(heads=2)"
    assert network(torch.zeros(1, 3, 33, 40)).shape == (1, 1000)
    with pytest.raises(ValueError, match="attnetion"):
        VisionTransformer("attnetion")
    with pytest.raises(ValueError, match="at least 16"):
        network(torch.zeros(1, 3, 15, 40))


def test_the_code_of_a_token_does_not_depend_on_how_many_there_are():
    assert torch.equal(token_code(9, 7, torch.zeros(1))[:4], token_code(4, 7, torch.zeros(1)))


# Swin


def from_torchvision(state: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """torchvision's Swin under our names."""
    found = {}
    for name, tensor in state.items():
        part, *rest = name.split(".")
        end = ".".join(rest)
        if name.endswith("relative_position_index"):
            continue
        if part != "features":
            found[name] = tensor
        elif rest[0] == "0":
            found[end.replace("0.0", "embed").replace("0.2", "embed_norm")] = tensor
        elif int(rest[0]) % 2 == 0:
            found[".".join(["merges", str(int(rest[0]) // 2), *rest[1:]])] = tensor
        else:
            stem, last = f"layers.{int(rest[0]) // 2}.{rest[1]}", ".".join(rest[2:])
            if last.startswith("attn.qkv"):
                for letter, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    found[f"{stem}.attention.{letter}_{rest[-1]}"] = third
            elif last.startswith("attn.proj"):
                found[f"{stem}.attention.out_{rest[-1]}"] = tensor
            elif last == "attn.relative_position_bias_table":
                table = tensor.T.unflatten(1, (2 * size - 1, 2 * size - 1))
                found[f"{stem}.attention.relative_bias"] = table
            else:
                found[f"{stem}.{last.replace('mlp.3', 'mlp.2')}"] = tensor
    return found


@pytest.mark.parametrize("grid", [(28, 14), (14, 14), (15, 9), (3, 29), (23, 40), (6, 6)], ids=str)
def test_swin_is_torchvisions(grid):
    """At every size: maps that the window does not divide are padded, and maps of one window do not shift."""
    theirs = doubled(
        load("torchvision.models.swin_transformer").SwinTransformer(
            [4, 4], 8, [2, 2], [2, 4], [7, 7], num_classes=5, stochastic_depth_prob=0.0
        )
    )
    ours = doubled(SwinTransformer(width=8, depths=(2, 2), heads=(2, 4), num_classes=5))
    ours.load_state_dict(from_torchvision(theirs.state_dict(), 7))
    x = torch.randn(2, 3, 4 * grid[0] + 3, 4 * grid[1], dtype=torch.float64)
    assert_close(ours(x), theirs(x), atol=1e-10, rtol=1e-10)


def test_patches_merge_as_torchvisions_at_odd_sizes():
    theirs = doubled(load("torchvision.models.swin_transformer").PatchMerging(8))
    ours = SwinTransformer(width=8, depths=(1, 1), heads=(1, 1)).merges[1].double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("layer", ["attention", "acmix"])
def test_a_map_of_one_window_does_not_shift(layer):
    network = doubled(SwinTransformer(layer, width=8, depths=(2,), heads=(2,), window=4))
    mixer = network.layers[0][1].attention
    for grid, shift in (((4, 3), "0"), ((9, 4), "(2, 0)"), ((4, 5), "(0, 2)"), ((5, 6), "2")):
        still = Mixer(str(mixer.operation).replace("shift=2", f"shift={shift}"), 8).double()
        still.load_state_dict(mixer.state_dict())
        x = torch.randn(1, 8, *grid, dtype=torch.float64)
        assert_close(mixer(x), still(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "parameters"), [("acmix_swin_tiny", 28_649_908), ("acmix_swin_small", 50_345_080)])
def test_acmix_swin_has_the_public_codes_size_not_the_printed_one(name, parameters):
    row = count(name)
    assert row.parameters == parameters
    assert not agrees(parameters, row.printed_parameters) and "rounded up" in row.reading


# ACmix's convolution half


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_shift_conv_is_the_word_shift(heads):
    mixer = Mixer(f"window(3) | box | shift({heads}, bias)", 8, backend="oracle").double()
    shift = doubled(ShiftConv(8, 8, heads))
    state = mixer.state_dict() | dict(shift.state_dict())
    mixer.load_state_dict(state)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    maps = [
        torch.einsum("oc,bchw->bohw", getattr(mixer, f"{n}_weight"), x) + getattr(mixer, f"{n}_bias")[:, None, None]
        for n in ("query", "key", "value")
    ]
    assert_close(shift(*maps), mixer(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("heads", [2, 6, 8])
@pytest.mark.parametrize("word", ["shift({})", "shift({}, bias)", "shift({}, interleaved)"])
def test_maps_then_shifts_are_the_merged_kernel(heads, word):
    """Many heads: the maps first are fewer multiplications; few: both as one kernel."""
    fast = Mixer(f"window(3) | box | {word.format(heads)}", 24, backend="conv").double()
    slow = Mixer(fast.operation, 24, backend="oracle").double()
    slow.load_state_dict(doubled(fast).state_dict())
    x = torch.randn(2, 24, 5, 4, dtype=torch.float64, requires_grad=True)
    y, truth = fast(x), slow(x)
    assert_close(y, truth, atol=1e-10, rtol=0)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *fast.parameters()], upstream)
    for mine, theirs in zip(got, torch.autograd.grad(truth, [x, *slow.parameters()], upstream), strict=True):
        assert_close(mine, theirs, atol=1e-9, rtol=0)


def test_shift_conv_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="heads=3"):
        ShiftConv(8, 8, 3)
    with pytest.raises(ValueError, match="out_channels=6"):
        ShiftConv(8, 6, 2)


# PVT


def reduced(x, grid, layer, query, key, value, out):
    """Spatial-reduction attention with 2 heads, written out with loops over heads."""
    source = x.transpose(1, 2).unflatten(2, grid)
    conv, norm = layer.reduction.conv, layer.reduction.norm
    source = F.conv2d(source, conv.weight, conv.bias, stride=conv.stride).flatten(2).transpose(1, 2)
    source = F.layer_norm(source, (8,), norm.weight, norm.bias)
    query, key, value = F.linear(x, *query), F.linear(source, *key), F.linear(source, *value)
    heads = []
    for q, k, v in zip(query.chunk(2, -1), key.chunk(2, -1), value.chunk(2, -1), strict=True):
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 2.0, -1) @ v)
    return F.linear(torch.cat(heads, -1), *out), (query, key, value)


def test_reduced_attention_is_its_formula():
    layer = doubled(ReducedAttention(8, 2, 3))
    x = torch.randn(2, 7 * 6, 8, dtype=torch.float64)
    pairs = [(getattr(layer.mixer, f"{n}_weight"), getattr(layer.mixer, f"{n}_bias")) for n in LETTERS]
    assert_close(layer(x, (7, 6)), reduced(x, (7, 6), layer, *pairs)[0], atol=1e-10, rtol=0)


LETTERS = ("query", "key", "value", "out")


def test_reduced_acmix_is_its_formula():
    layer = doubled(ReducedACmix(8, 2, 3))
    x = torch.randn(2, 8 * 6, 8, dtype=torch.float64)
    y, (query, key, value) = reduced(
        x, (8, 6), layer, *((getattr(layer, n).weight, getattr(layer, n).bias) for n in LETTERS)
    )
    maps = [query.transpose(1, 2).unflatten(2, (8, 6))]
    rows, columns = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    for t in (key, value):  # 2 x 2 cells: every position reads its own
        maps.append(t.transpose(1, 2).unflatten(2, (2, 2))[:, :, rows][..., columns])
    convolution = layer.shift(*maps).flatten(2).transpose(1, 2)
    assert_close(layer(x, (8, 6)), layer.rates[0] * y + layer.rates[1] * convolution, atol=1e-10, rtol=0)


def test_acmix_without_reduction_is_the_sum_in_words():
    layer = doubled(ReducedACmix(8, 2, 1))
    mixer = Mixer("a*(all | row | softmax(heads=2)) + b*(window(3) | box | shift(2, bias))", 8).double()
    state = {"rates": layer.rates} | {f"1.{n}": t for n, t in layer.shift.state_dict().items()}
    for name in LETTERS:
        linear, stem = getattr(layer, name), "0." * (name == "out")
        state |= {f"{stem}{name}_weight": linear.weight, f"{stem}{name}_bias": linear.bias}
    mixer.load_state_dict(state)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    assert_close(layer(tokens, (5, 6)).transpose(1, 2).unflatten(2, (5, 6)), mixer(x), atol=1e-10, rtol=0)
    # a token before the map is a map of its own to the convolution: nothing reaches the others through it
    tokens = torch.cat([torch.randn(2, 1, 8, dtype=torch.float64), tokens], 1)
    with torch.no_grad():
        layer.rates.copy_(torch.tensor([0.0, 1.0]))
    alone = layer(tokens[:, :1], (1, 1))
    both = layer(tokens, (5, 6))
    assert_close(both[:, :1], alone, atol=1e-10, rtol=0)
    assert_close(both[:, 1:], layer(tokens[:, 1:], (5, 6)), atol=1e-10, rtol=0)


def test_pvt_resizes_its_code_of_positions():
    arguments = MODELS["pvt_tiny"].tiny | {"num_classes": 5}
    network = create("pvt_tiny", img_size=(64, 96), **arguments).eval()
    assert [tuple(p.shape[2:]) for p in network.places] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    other = create("pvt_tiny", img_size=(96, 64), **arguments).eval()
    state = network.state_dict()
    for i in range(4):
        state[f"places.{i}"] = F.interpolate(state[f"places.{i}"], other.places[i].shape[2:], mode="bilinear")
    other.load_state_dict(state)
    x = torch.randn(1, 3, 96, 64)
    assert_close(network(x), other(x))
    assert not torch.equal(network(x), network(x.flip(3)))
    with pytest.raises(ValueError, match="img_size must be at least 32"):
        create("pvt_tiny", img_size=31)
    with pytest.raises(ValueError, match="at least 32"):
        network(torch.zeros(1, 3, 64, 31))
    with pytest.raises(ValueError, match="layer must be one of attention, acmix"):
        PyramidVisionTransformer("window(3) | box | kernel")


# SAN


def test_patchwise_attention_is_its_formula():
    layer = doubled(PatchwiseAttention(64, 3))
    x = torch.randn(2, 64, 4, 5, dtype=torch.float64)
    query, key, value = layer.query(x), layer.key(x), layer.value(x)
    y = torch.zeros(2, 16, 4, 5, dtype=torch.float64)
    at = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    for i in range(4):
        for j in range(5):
            # mirrored at the border: -1 is 1, and one beyond the end is one before it
            reads = [(3 - abs(3 - abs(i + r)), 4 - abs(4 - abs(j + c))) for r, c in at]
            patch = torch.stack([key[:, :, r, c] for r, c in reads], 2).flatten(1)
            weight = layer.weigh(torch.cat([query[:, :, i, j], patch], 1)[..., None, None]).reshape(2, 2, 9)
            for s, (r, c) in enumerate(reads):
                y[:, :, i, j] += value[:, :, r, c] * weight[:, :, s].repeat_interleave(8, 1)
    assert_close(layer(x), y, atol=1e-10, rtol=0)


def test_acmix_adds_a_convolution_over_the_same_projections():
    layer = doubled(PatchwiseAttention(64, 3, acmix=True))
    x = torch.randn(2, 64, 4, 5, dtype=torch.float64)
    y = layer(x)
    with torch.no_grad():
        first, second = layer.rates.clone()
        layer.rates.copy_(torch.tensor([1.0, 0.0]))
        plain = PatchwiseAttention(64, 3).double().eval()
        plain.load_state_dict(layer.state_dict(), strict=False)
        assert_close(layer(x), plain(x), atol=1e-12, rtol=0)
        convolution = layer.shift(layer.query(x), layer.key(x), layer.narrow(layer.value(x)))
    assert_close(y, first * plain(x) + second * convolution, atol=1e-10, rtol=0)


def test_weighted_patches_have_gradients():
    value = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 2, 9, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: weighted_patches(v, w, 3), (value, weight))


def test_san_refuses_what_it_cannot_build():
    with pytest.raises(ValueError, match="width must be a multiple of 64"):
        SelfAttentionNetwork(width=32)
    with pytest.raises(ValueError, match="depths must be at most 5"):
        SelfAttentionNetwork(depths=(1,) * 6)
    with pytest.raises(ValueError, match="layer must be one of"):
        SelfAttentionNetwork("convnn")


# across


def test_only_pvt_owns_something_for_every_position():
    for name in ("vit_tiny_convnn", "acmix_swin_tiny", "acmix_san10"):
        one, other = (create(name, img_size=size, **MODELS[name].tiny) for size in (64, (96, 160)))
        other.load_state_dict(one.state_dict())
    assert create("swin_tiny", **MODELS["swin_tiny"].tiny).feature_info[0]["reduction"] == 4
    with pytest.raises(ValueError, match="depths and heads"):
        SwinTransformer(depths=(1, 1), heads=(1,))

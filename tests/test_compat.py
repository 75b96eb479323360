"""Layers of the public ConvNN and ACmix code give its outputs and gradients.

The stored cases (../shared/golden beside the repository) hold what that code computed in float32.
The formulas written out here need no files.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.public_configs import attention_config, attention_state, convnn_config, convnn_state

from nearfold.compat import LAYERS, ReferenceLayer, UnsupportedReference, from_reference
from nearfold.nn import Mixer

pytestmark = pytest.mark.usefixtures("seeded")

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
CASES = sorted(GOLDEN.glob("*.npz"))


class Case:
    """One stored case: the layer, its input, and what the public code made of it."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            tensors = {name: torch.tensor(file[name]) for name in file.files if name != "meta"}
            self.meta = json.loads(str(file["meta"]))
        self.x, self.y, self.gx, self.gy = (tensors[name] for name in ("x", "y", "gx", "gy"))
        self.state = {n.removeprefix("param/"): t for n, t in tensors.items() if n.startswith("param/")}
        self.grads = {n.removeprefix("grad/"): t for n, t in tensors.items() if n.startswith("grad/")}

    def build(self, state: dict | None = None) -> ReferenceLayer:
        return from_reference(self.meta["layer"], self.meta["config"], self.state if state is None else state)


golden = pytest.mark.parametrize(
    "path",
    CASES or [pytest.param(None, marks=pytest.mark.skip(reason=f"no stored cases in {GOLDEN}"))],
    ids=lambda path: path.stem if path else "none",
)


def relative(mine: torch.Tensor, truth: torch.Tensor) -> float:
    assert mine.shape == truth.shape
    return ((mine - truth).abs().max() / truth.abs().max()).item()


@golden
def test_outputs_and_gradients_are_the_public_ones(path):
    case = Case(path)
    layer, x = case.build(), case.x.clone().requires_grad_()
    y = layer(x)
    assert relative(y, case.y) <= 1e-5
    y.backward(case.gy)
    assert relative(x.grad, case.gx) <= 1e-4
    mine = {name: p.grad for name, p in layer.named_parameters()}
    assert mine.keys() == case.grads.keys() == case.state.keys()
    largest = max(truth.abs().max() for truth in case.grads.values())
    for name, truth in case.grads.items():
        if case.meta["layer"] == "ACmix" and name == "conv_p.bias":
            # the bias is added to the position of query and of key alike and cancels in their difference:
            # its true gradient is zero, and the stored one is the rounding noise of a sum of about 1e4 terms
            assert truth.abs().max() <= 1e-6 * largest, "the stored gradient is no longer noise"
            assert mine[name].abs().max() <= 1e-6 * largest, name
        else:
            assert relative(mine[name], truth) <= 1e-4, name


@golden
def test_the_state_dict_goes_both_ways(path):
    case = Case(path)
    layer = case.build()
    assert list(layer.state_dict()) == list(case.state)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, case.state[name])
    other = case.build({name: torch.randn_like(tensor) for name, tensor in case.state.items()})
    assert relative(other(case.x), case.y) > 1e-2
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(case.x), layer(case.x))


@golden
def test_the_nearfold_layer_itself_gives_the_same(path):
    case = Case(path)
    layer = case.build()
    if "magnitude_type" in case.meta["config"] and case.meta["config"].get("num_heads", 1) > 1:
        with pytest.raises(UnsupportedReference, match="mixes up positions and channels"):
            layer.to_nearfold()
        return
    ours = layer.to_nearfold()
    assert isinstance(ours, Mixer)
    assert relative(ours(case.x), case.y) <= 1e-5
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert relative(ours(case.x), case.y) <= 1e-5, "the weights are copies"


@golden
def test_a_state_that_does_not_fit_is_refused(path):
    case = Case(path)
    for name, tensor in case.state.items():
        with pytest.raises(ValueError, match="does not fit config"):
            case.build({**case.state, name: torch.cat([tensor, tensor])})
        if name == "conv1d_layer.bias" and case.meta["layer"] in ("Conv1d_NN", "Conv2d_NN"):
            continue  # those convert without a bias too
        with pytest.raises(ValueError, match=r"lacks|does not fit config"):
            case.build({n: t for n, t in case.state.items() if n != name})
    with pytest.raises(ValueError, match=r"public\.weight"):
        case.build({**case.state, "public.weight": torch.ones(3)})


# --- formulas written out, without stored files


def agree(layer: ReferenceLayer, formula, x: torch.Tensor) -> None:
    """Output and every gradient, in float64, against the formula of (x, parameters by their public names)."""
    layer = layer.double()
    twin = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    a, b = (x.double().clone().requires_grad_() for _ in range(2))
    y, truth = layer(a), formula(b, twin)
    torch.testing.assert_close(y, truth, rtol=1e-10, atol=1e-10)
    gy = torch.randn_like(truth)
    y.backward(gy)
    truth.backward(gy)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, twin[name].grad, rtol=1e-10, atol=1e-10, msg=name)


def sorted_columns(x: torch.Tensor, score: torch.Tensor, k: int) -> torch.Tensor:
    """Features (B, C, N * k) of the k best of every position: the position itself, then by falling score."""
    score = score.clone()
    score.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    index = score.sort(-1, descending=True).indices[..., :k]
    return x.gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1))


def cosines(x: torch.Tensor) -> torch.Tensor:
    unit = x / x.norm(dim=1, keepdim=True)
    return unit.transpose(1, 2) @ unit


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("name", "grid"), [("Conv2d_NN", (5, 6)), ("Conv1d_NN", (11,))])
def test_convnn_by_formula(name, grid, metric):
    def formula(x, p):
        flat = x.flatten(2)
        score = cosines(flat) if metric == "cosine" else -torch.cdist(flat.transpose(1, 2), flat.transpose(1, 2))
        columns = sorted_columns(flat, score.detach(), 5)
        y = F.conv1d(columns, p["conv1d_layer.weight"], p["conv1d_layer.bias"], stride=5)
        return y.unflatten(2, grid)

    layer = from_reference(name, convnn_config(magnitude_type=metric), convnn_state())
    agree(layer, formula, torch.randn(2, 4, *grid))


@pytest.mark.parametrize(("name", "grid"), [("Conv2d_Branching", (5, 6)), ("Conv1d_Branching", (11,))])
def test_convnn_branching_by_formula(name, grid):
    ones, conv = (1,) * len(grid), F.conv2d if len(grid) == 2 else F.conv1d
    state = {
        "branch1.conv1d_layer.weight": torch.randn(2, 4, 5),
        "branch1.conv1d_layer.bias": torch.randn(2),
        "branch2.weight": torch.randn(4, 4, *(3 for _ in grid)),
        "branch2.bias": torch.randn(4),
        "pointwise_conv.weight": torch.randn(6, 6, *ones),
        "pointwise_conv.bias": torch.randn(6),
    }

    def formula(x, p):
        columns = sorted_columns(x.flatten(2), cosines(x.flatten(2)).detach(), 5)
        near = F.conv1d(columns, p["branch1.conv1d_layer.weight"], p["branch1.conv1d_layer.bias"], stride=5)
        window = conv(x, p["branch2.weight"], p["branch2.bias"], padding=1)
        both = torch.cat([near.unflatten(2, grid), window], 1)
        return conv(both, p["pointwise_conv.weight"], p["pointwise_conv.bias"])

    layer = from_reference(name, convnn_config(kernel_size=3, branch_ratio=1 / 3), state)
    agree(layer, formula, torch.randn(2, 4, *grid))


def test_branching_with_attention_holds_the_attending_layer():
    near = {
        "conv1d_layer.weight": torch.randn(4, 1, 5),
        "conv1d_layer.bias": torch.randn(4),
        "pointwise_conv.weight": torch.randn(2, 4, 1),
        "pointwise_conv.bias": torch.randn(2),
        **{f"w_{c}.weight": torch.randn(4, 4, 1) for c in "qkv"},
        "w_o.weight": torch.randn(2, 2, 1),
    }
    state = {
        **{f"branch1.{name}": tensor for name, tensor in near.items()},
        "branch2.weight": torch.randn(4, 4, 3, 3),
        "branch2.bias": torch.randn(4),
        "pointwise_conv.weight": torch.randn(6, 6, 1, 1),
        "pointwise_conv.bias": torch.randn(6),
    }
    config = convnn_config(attention_dropout=0.0)
    alone = from_reference("Conv2d_NN_Attn", config | {"out_channels": 2}, near).double()

    def formula(x, p):
        own = {name: p[f"branch1.{name}"] for name in near}
        both = [
            torch.func.functional_call(alone, own, x),
            F.conv2d(x, p["branch2.weight"], p["branch2.bias"], padding=1),
        ]
        return F.conv2d(torch.cat(both, 1), p["pointwise_conv.weight"], p["pointwise_conv.bias"])

    config |= {"kernel_size": 3, "branch_ratio": 1 / 3}
    agree(from_reference("Conv2d_Attn_Branching", config, state), formula, torch.randn(2, 4, 5, 6))


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_by_formula(heads, biases):
    def formula(x, p):
        q, k, v = (split(F.linear(x, p[f"W_{c}.weight"], p.get(f"W_{c}.bias")), heads) for c in "qkv")
        alpha = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(12 / heads), -1)
        return F.linear((alpha @ v).transpose(1, 2).flatten(2), p["W_o.weight"], p.get("W_o.bias"))

    config = {"d_hidden": 12, "num_heads": heads, "attention_dropout": 0.0}
    layer = from_reference("MultiHeadAttention", config, attention_state(biases=biases))
    agree(layer, formula, torch.randn(2, 9, 12))


@pytest.mark.parametrize("heads", [1, 3])
def test_convnn_attention_by_formula(heads):
    """The public code takes a key per row, and with several heads reads its (N, d) outputs as (d, N)."""

    def formula(x, p):
        q, k, v = (split(F.linear(x, p[f"W_{c}.weight"]), heads) for c in "qkv")
        score, index = (k @ q.transpose(2, 3) / math.sqrt(12 / heads)).sort(-1, descending=True)
        alpha, index = torch.softmax(score[..., :4], -1), index[..., :4]
        near = torch.take_along_dim(v.unsqueeze(2), index.unsqueeze(-1), 3)
        y = torch.einsum("bhns,bhnsd,ds->bhnd", alpha, near, p["conv.weight"][:, 0])
        if heads > 1:
            y = y.transpose(1, 2).reshape(2, 9, 12)
            y = y.view(2, 9, heads, -1).transpose(1, 2).reshape(2, heads, -1, 9).transpose(2, 3)
        return F.linear(y.transpose(1, 2).flatten(2), p["W_o.weight"])

    state = attention_state() | {"conv.weight": torch.randn(12 // heads, 1, 4)}
    layer = from_reference("MultiHeadConvNNAttention", attention_config(num_heads=heads), state)
    agree(layer, formula, torch.randn(2, 9, 12))


def test_arguments_that_are_left_out_are_the_public_defaults():
    state = attention_state() | {"conv.weight": torch.randn(12, 12, 4)}
    config = attention_config(num_heads=1, convolution_type="standard")
    left_out = {name: value for name, value in config.items() if name != "convolution_type"}
    given, usual = (from_reference("MultiHeadConvNNAttention", c, state) for c in (config, left_out))
    x = torch.randn(2, 9, 12)
    assert torch.equal(given(x), usual(x))


def test_branching_attention_by_formula():
    """Unlike ours, the public branches split the input channels too."""
    first, dim = 4, 12
    state = {
        **{f"convnn.W_{c}.weight": torch.randn(first, first) for c in "qkvo"},
        "convnn.conv.weight": torch.randn(first, 1, 4),
        **{f"attention.W_{c}.weight": torch.randn(dim - first, dim - first) / 3 for c in "qkvo"},
        "pointwise_linear.weight": torch.randn(dim, dim),
        "pointwise_linear.bias": torch.randn(dim),
    }

    def formula(x, p):
        a, b = x[..., :first], x[..., first:]
        q, k, v = (F.linear(a, p[f"convnn.W_{c}.weight"]) for c in "qkv")
        score, index = (k @ q.transpose(1, 2) / math.sqrt(first)).sort(-1, descending=True)
        near = torch.take_along_dim(v.unsqueeze(1), index[..., :4].unsqueeze(-1), 2)
        alpha = torch.softmax(score[..., :4], -1)
        near = torch.einsum("bns,bnsd,ds->bnd", alpha, near, p["convnn.conv.weight"][:, 0])
        q, k, v = (F.linear(b, p[f"attention.W_{c}.weight"]) for c in "qkv")
        dense = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(dim - first), -1) @ v
        both = [F.linear(near, p["convnn.W_o.weight"]), F.linear(dense, p["attention.W_o.weight"])]
        return F.linear(torch.cat(both, -1), p["pointwise_linear.weight"], p["pointwise_linear.bias"])

    config = attention_config(num_heads=1, branch_ratio=1 / 3)
    agree(from_reference("MultiHeadBranchingAttention", config, state), formula, torch.randn(2, 9, 12))


# --- the module


def test_a_reference_layer_is_an_ordinary_module():
    layer, x = from_reference("Conv2d_NN", convnn_config(), convnn_state()), torch.randn(2, 4, 5, 6)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin.get_parameter("conv1d_layer.bias").add_(1)
    torch.testing.assert_close(twin(x), y + 1)
    assert torch.equal(layer(x), y)
    assert layer.double()(x.double()).dtype == torch.float64
    for grid in ((1, 1), (7, 2)):
        assert layer.float()(torch.randn(1, 4, *grid)).shape == (1, 6, *grid)


def test_every_layer_has_a_case_here_or_among_the_stored_ones():
    """The layers without any are listed, so that the list can only shrink."""
    here = {"Conv1d_NN", "Conv2d_NN", "Conv1d_Branching", "Conv2d_Branching", "Conv2d_Attn_Branching"}
    here |= {"MultiHeadAttention", "MultiHeadConvNNAttention", "MultiHeadBranchingAttention"}
    stored = {"ACmix", "Conv2d_NN_Attn", "MultiHeadKvtAttention", "MultiHeadSparseAttention"}
    untested = {"MultiHeadConvNNAttention_Old", "MultiHeadConvNNAttention_Sampled"}
    assert set(LAYERS) == here | stored | untested
    if CASES:
        assert stored <= {Case(path).meta["layer"] for path in CASES}

"""Graph convolutions against ViG's and DGCNN's formulas, written with a gather of every neighbour or number by number.

Nothing here goes through the oracle: these tests say that the words mean what the field means by them.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import close, positions, scrambled

from nearfold import parse
from nearfold.kernels import engine
from nearfold.kernels.edges import largest
from nearfold.lower import lower
from nearfold.lower.verdict import Facts
from nearfold.nn import EdgeConv, MaxRelativeConv2d, Mixer

pytestmark = pytest.mark.usefixtures("float64")
BACKENDS = ("auto", "oracle")


def agree(layer, x, truth):
    """Output and every gradient, on the fast path and on the oracle."""
    x = x.requires_grad_()
    probe = torch.randn(layer(x).shape)
    leaves = [x, *layer.parameters()]
    wanted = torch.autograd.grad((truth(x) * probe).sum(), leaves)
    for backend in BACKENDS:
        layer.backend = backend
        close(layer(x), truth(x))
        found = torch.autograd.grad((layer(x) * probe).sum(), leaves)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)


def nearest(x, k, metric):
    """Neighbours (B, N, k) of every position, as the papers' code finds them: all pairs, then topk."""
    rows = x.flatten(2).mT
    if metric == "cosine":
        rows = F.normalize(rows, dim=-1)
    return (-torch.cdist(rows, rows)).topk(k, -1).indices


def neighbours(x, index):
    """What every position reads (B, C, N, k)."""
    flat = x.flatten(2)
    return torch.stack([flat[b][:, index[b]] for b in range(len(flat))])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("out_channels", [6, 4])
def test_max_relative_is_vigs(groups, out_channels):
    """x_i and max(x_j - x_i) side by side, channel after channel, then a grouped map."""
    layer = scrambled(Mixer(f"nearest(5, cosine) | ranked | max*relative(groups={groups})", 6, out_channels))

    def truth(x):
        index = nearest(x.detach(), 5, "cosine")
        far = (neighbours(x, index) - x.flatten(2)[..., None]).amax(-1)
        both = torch.stack([x.flatten(2), far], 2).flatten(1, 2)
        weight = layer.edge_weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)  # ours stand one after the other
        return F.conv1d(both, weight[..., None], layer.bias, groups=groups).unflatten(2, x.shape[2:])

    assert layer.edge_weight.shape == (out_channels, 12 // groups)
    agree(layer, torch.randn(2, 6, 4, 5), truth)


@pytest.mark.parametrize(("slope", "bias"), [(0.2, True), (0.0, False)])
def test_edgeconv_is_dgcnns(slope, bias):
    """max over j of LeakyReLU(W [x_i, x_j - x_i])."""
    layer = scrambled(Mixer(f"nearest(4, euclidean) | ranked | max*edge(slope={slope})", 3, 7, bias=bias))

    def truth(x):
        index = nearest(x.detach(), 4, "euclidean")
        own = x.flatten(2)[..., None].expand(-1, -1, -1, 4)
        pair = torch.cat([own, neighbours(x, index) - own], 1)
        each = F.leaky_relu(F.conv2d(pair, layer.edge_weight[..., None, None], getattr(layer, "bias", None)), slope)
        return each.max(-1).values.unflatten(2, x.shape[2:])

    agree(layer, torch.randn(2, 3, 4, 5), truth)


@pytest.mark.parametrize("how", ["max", "mean", "ones"])
def test_a_perceptron_of_two_layers(how):
    """PyTorch Geometric's EdgeConv with Linear, ReLU, Linear, as max, mean and sum."""
    text = "nearest(4, euclidean) | ranked | " + ("" if how == "ones" else f"{how}*") + "edge(hidden=5, slope=0.0)"
    layer = scrambled(Mixer(text, 3, 7))

    def truth(x):
        index = nearest(x.detach(), 4, "euclidean")
        own = x.flatten(2)[..., None].expand(-1, -1, -1, 4)
        pair = torch.cat([own, neighbours(x, index) - own], 1).movedim(1, -1)
        hidden = F.relu(F.linear(pair, layer.hidden_weight, layer.hidden_bias))
        each = F.linear(hidden, layer.edge_weight, layer.bias)
        y = each.amax(2) if how == "max" else each.mean(2) if how == "mean" else each.sum(2)
        return y.mT.unflatten(2, x.shape[2:])

    agree(layer, torch.randn(2, 3, 4, 5), truth)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_window_number_by_number(stride):
    """The mean over a 3 x 3 window of a perceptron of pairs, with fewer of them at the border."""
    layer = scrambled(Mixer(f"window(3, stride={stride}) | box | mean*edge", 2, 3))
    at = positions((4, 5))
    queries = [p for p in at if p[0] % stride == 0 and p[1] % stride == 0]

    def truth(x):
        columns = []
        for b in range(len(x)):
            for i in queries:
                near = [j for j in at if max(abs(i[0] - j[0]), abs(i[1] - j[1])) <= 1]
                total = 0.0
                for j in near:
                    own, other = x[b, :, i[0], i[1]], x[b, :, j[0], j[1]]
                    total = total + F.leaky_relu(layer.edge_weight @ torch.cat([own, other - own]) + layer.bias, 0.2)
                columns.append(total / len(near))
        return torch.stack(columns).unflatten(0, (len(x), -1)).mT.unflatten(2, (-(-4 // stride), -(-5 // stride)))

    agree(layer, torch.randn(2, 2, 4, 5), truth)


def test_attention_over_differences_number_by_number():
    """Heads of a softmax weigh x_j - x_i, whose sum stands beside x_i under one map."""
    layer = scrambled(Mixer("nearest(3, dot) | ranked | softmax(heads=2, project=none)*relative", 4, 5))

    def truth(x):
        flat, columns = x.flatten(2), []
        for b in range(len(x)):
            for i in range(flat.shape[2]):
                parts = []
                for half in flat[b].split(2):
                    score = half.T @ half[:, i]
                    best, index = score.topk(3)
                    share = best.softmax(0)
                    parts.append(sum(share[s] * (half[:, index[s]] - half[:, i]) for s in range(3)))
                columns.append(layer.edge_weight @ torch.cat([flat[b, :, i], *parts]) + layer.bias)
        return torch.stack(columns).unflatten(0, (len(x), -1)).mT.unflatten(2, x.shape[2:])

    agree(layer, torch.randn(2, 4, 3, 3), truth)


@pytest.mark.parametrize("text", ["nearest(4, cosine) | ranked | max", "axial(1) | box | max", "block(2) | box | max"])
def test_the_largest_of_any_neighbours(text):
    layer = Mixer(text, 3)
    at = positions((4, 6))

    def truth(x):
        if "nearest" in text:
            return neighbours(x, nearest(x.detach(), 4, "cosine")).amax(-1).unflatten(2, x.shape[2:])

        def same(i, j):
            if "axial" in text:
                return i[0] == j[0]
            return (i[0] // 2, i[1] // 2) == (j[0] // 2, j[1] // 2)

        columns = [x.flatten(2)[..., [n for n, j in enumerate(at) if same(i, j)]].amax(-1) for i in at]
        return torch.stack(columns, -1).unflatten(2, (4, 6))

    agree(layer, torch.randn(2, 3, 4, 6), truth)


def test_of_equal_values_the_first_slot_has_the_gradient():
    layer, x = Mixer("nearest(3, dot) | ranked | max", 2, ndim=1), torch.zeros(1, 2, 5, requires_grad=True)
    for backend in BACKENDS:
        layer.backend = backend
        (found,) = torch.autograd.grad(layer(x).sum(), x)
        assert found[0].tolist() == [[5.0, 0.0, 0.0, 0.0, 0.0]] * 2
    rows = torch.tensor([[[1.0], [math.nan], [7.0]]])
    assert largest(rows, torch.tensor([[[0, 1, 2], [2, 0, -1], [-1, -1, -1]]]))[1].tolist() == [[[1], [2], [-1]]]


@pytest.mark.parametrize("name", engine.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_is_a_loops(name, dtype):
    """Few levels: many are equal, and the first counts."""
    rows = torch.randn(2, 9, 37, dtype=dtype).mul(2).round()
    at = torch.randint(-3, 9, (2, 70, 5)).clamp(min=-1)
    rows[0, 3, 5] = math.nan
    with engine.forced(name):
        best, where = largest(rows, at)
    for b, m, c in ((b, m, c) for b in range(2) for m in range(70) for c in range(37)):
        read = [n for n in at[b, m].tolist() if n >= 0]
        lost = [n for n in read if rows[b, n, c].isnan()]
        first = max(read, key=lambda n: rows[b, n, c].item(), default=-1) if not lost else lost[0]
        assert where[b, m, c] == first
        assert best[b, m, c] == (rows[b, first, c] if read else 0) or lost


@pytest.mark.parametrize("name", engine.names())
def test_the_largest_has_both_derivatives(name):
    rows = torch.randn(2, 7, 21, requires_grad=True)
    at = torch.randint(-1, 7, (2, 5, 3))
    with engine.forced(name):
        torch.library.opcheck(largest.registered, (rows, at))
        assert torch.autograd.gradcheck(lambda rows: largest(rows, at)[0], rows)
        assert torch.autograd.gradgradcheck(lambda rows: largest(rows, at)[0].square(), rows)
        with pytest.raises(ValueError, match="beyond"):
            largest(rows, at + 7)


@pytest.mark.parametrize("weight", ["max", "max*relative", "mean*relative", "max*edge", "mean*edge(hidden=3)", "edge"])
@pytest.mark.parametrize("own", ["", ", self"])
def test_a_nan_query_is_lost_alone(weight, own):
    layer, x = Mixer(f"nearest(2, dot{own}) | ranked | {weight}", 4), torch.randn(1, 4, 3, 3)
    x[0, :, 2, 2] = math.nan
    for backend in BACKENDS:
        layer.backend = backend
        lost = layer(x).isnan().any(1)[0]
        assert lost[2, 2] and lost.sum() == 1, backend


@pytest.mark.parametrize("name", ["relative", "edge", "edge(hidden=4)"])
@pytest.mark.parametrize(
    "path", ["nearest(3, dot) | ranked", "window(3) | box", "window(3) & nearest(2, cosine) | box"]
)
def test_no_row_runs_on_the_oracle(path, name):
    for rho in ("max", "mean"):
        facts = Facts(parse(f"{path} | {rho}*{name}"), 2, torch.float32, "cpu", True)
        assert lower(facts) == "edges" == lower(Facts(facts.op, 2, torch.bfloat16, "cuda", True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("all | row | mean*relative", "reads neighbours next to the query's own position"),
        ("deformable(3) | box | edge", "use nearest(k), window(size)"),
        ("nearest(3, dot, cross) | ranked | softmax*relative", "which path nearest(3, dot, cross) does not have"),
        ("nearest(3, dot) | ranked | softmax(heads=2)*edge", "leave heads out"),
        ("nearest(3, dot) | ranked | max*kernel", "a kernel needs a fixed number of slots"),
        ("all | row | max", "max goes with path window or block or nearest"),
        ("nearest(3, dot) | ranked | max*edge(hidden=-1)", "hidden must be an integer >= 0"),
        ("nearest(3, dot) | ranked | max*edge(slope=2.0)", "slope must be from 0 (ReLU) to 1"),
    ],
)
def test_what_does_not_go_together_says_so(text, said):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert said in str(error.value)


def test_channels_that_groups_do_not_divide_say_so():
    with pytest.raises(ValueError, match="groups=4 must divide the 6 value channels"):
        Mixer("nearest(9, cosine) | ranked | max*relative(groups=4)", 6)


def test_a_window_whose_padding_has_no_query_says_so():
    with pytest.raises(ValueError, match="leaves outputs without a query"):
        Mixer("window(3, padding=3) | box | mean*edge", 4)(torch.randn(1, 4, 6, 6))


@pytest.mark.parametrize("aggregation", ["max", "mean", "sum"])
@pytest.mark.parametrize("hidden", [0, 5])
def test_points_have_the_neighbours_of_their_positions(aggregation, hidden):
    """Every pair one by one: neighbours by the coordinates, values by the features."""
    layer = scrambled(EdgeConv(3, 4, 5, aggregation=aggregation, hidden=hidden))
    x, position = torch.randn(2, 3, 12, requires_grad=True), torch.rand(2, 12, 2)

    def truth(x):
        out = []
        for b in range(2):
            for i in range(12):
                near = (position[b] - position[b, i]).norm(dim=1).argsort()[:5]
                each = []
                for j in near:
                    y = torch.cat([x[b, :, i], x[b, :, j] - x[b, :, i]])
                    if hidden:
                        y = F.leaky_relu(layer.hidden_weight @ y + layer.hidden_bias, 0.2)
                        each.append(layer.edge_weight @ y + layer.bias)
                    else:
                        each.append(F.leaky_relu(layer.edge_weight @ y + layer.bias, 0.2))
                stacked = torch.stack(each)
                out.append({"max": stacked.amax(0), "mean": stacked.mean(0), "sum": stacked.sum(0)}[aggregation])
        return torch.stack(out).unflatten(0, (2, 12)).mT

    close(layer(x, position), truth(x))
    probe, leaves = torch.randn(2, 4, 12), [x, *layer.parameters()]
    found, wanted = (torch.autograd.grad((y * probe).sum(), leaves) for y in (layer(x, position), truth(x)))
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


def test_points_without_positions_have_the_neighbours_of_their_features():
    layer, x = EdgeConv(3, 4, 5), torch.randn(2, 3, 12)
    close(layer(x), layer(x, x.mT))
    assert layer(x[:0], torch.rand(0, 12, 3)).shape == (0, 4, 12)
    assert EdgeConv(3, 4)(x[..., :7], torch.rand(2, 7, 3)).shape == (2, 4, 7)


def test_points_compile_and_run_under_autocast():
    layer, x, position = EdgeConv(3, 4, 5), torch.randn(2, 3, 12), torch.rand(2, 12, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x, position), layer(x, position))
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, position)
    torch.testing.assert_close(y.float(), layer(x, position), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: EdgeConv(3, 4)(torch.randn(2, 3, 8), torch.randn(2, 7, 3)), "8 points in each of 2 inputs"),
        (lambda: EdgeConv(3, 4)(torch.randn(2, 3, 8), torch.full((2, 8, 3), math.nan)), "row 0 is not finite"),
        (lambda: EdgeConv(3, 4)(torch.randn(2, 3, 8), [1.0]), "position must be a torch.Tensor"),
        (lambda: EdgeConv(3, 4, aggregation="min"), "aggregation must be one of max, mean, sum"),
    ],
)
def test_wrong_points_are_named(call, said):
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)


def test_the_named_layer_is_the_catalogues():
    layer = MaxRelativeConv2d(8, 8)
    assert layer.operation == parse("nearest(9, cosine) | ranked | max*relative(groups=4)")
    assert MaxRelativeConv2d(8, 4, stride=2)(torch.randn(1, 8, 5, 6)).shape == (1, 4, 3, 3)

"""`blend`: smooth in the size of the grid, with exact ties, and with a lambda that a layer finds by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nearfold import mixing_matrix, parse
from nearfold.grammar.similarity import Blend, Place, Position
from nearfold.nn import ConvNN2d, Mixer
from nearfold.surgery.schedule import SpectrumSchedule

F64 = torch.float64
GRIDS = [(n, m) for n in range(1, 70, 3) for m in (n, n // 2 + 1)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_longest_axis_runs_from_minus_one_to_one_at_every_size(grid):
    place = Place(grid, torch.device("cpu"), F64)
    x = torch.randn(2, 1, grid[0] * grid[1], 3, dtype=F64)
    where = place.exact() * 2 / max(max(grid) - 1, 1)
    longest = max(range(2), key=lambda a: grid[a])
    if grid[longest] > 1:
        assert_close(where[:, longest].aminmax(), (-torch.ones((), dtype=F64), torch.ones((), dtype=F64)))
    for lam in (0.0, 0.3, 0.9):
        query, key = Blend(lam).embed(x, x, place, {})
        assert query is key
        assert_close(query[..., -2:], ((1 - lam) * where).expand_as(query[..., -2:]))
        if lam and x.shape[2] > 1:
            std = x.flatten(1).std(1).view(2, 1, 1, 1)
            assert_close(query[..., :-2], lam * x / std, rtol=1e-4, atol=1e-6)  # std has a floor added
    assert_close(Position().embed(x, x, place, {})[0][0, 0], where)


@pytest.mark.parametrize("size", [(31, 31), (32, 20), (33, 9), (7, 48)], ids=str)
@pytest.mark.parametrize("backend", ["oracle", "knn"])
def test_where_features_are_equal_ties_are_exact_at_every_lambda(size, backend):
    flat = torch.full((1, 3, *size), 0.37)
    chosen = [
        mixing_matrix(Mixer(f"nearest(9, {near}) | ranked | ones", 3, backend=backend), flat) > 0
        for near in ("position", "blend(0)", "blend(0.3)", "blend(0.77)", "blend(0.999)")
    ]
    for other in chosen[1:]:
        assert torch.equal(other, chosen[0])


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("path", ["nearest(6, {}, self=-0.5, again=-0.25)", "nearest(6, {})", "window(3, {})"])
def test_scores_are_those_of_the_definition(path, lam):
    """Softmax over minus the distance of [lam f / std, (1 - lam) p], one position at a time."""
    shape = "box" if path.startswith("window") else "ranked"
    layer = Mixer(f"{path.format(f'blend({lam})')} | {shape} | softmax(project=none, scale=3.0)", 2).double()
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 4, dtype=F64)
    p = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(4), indexing="ij"), -1).reshape(-1, 2).double() * 2 / 4
    f = x[0].flatten(1).T / (x.std() + 1e-6)
    score = -torch.cdist(torch.cat([lam * f, (1 - lam) * p], 1), torch.cat([lam * f, (1 - lam) * p], 1))
    expected = torch.zeros(20, 20, dtype=F64)
    for i in range(20):
        if shape == "box":
            slots = [(j, score[i, j]) for j in range(20) if (p[i] - p[j]).abs().max() < 0.75]
        elif "again" in path:
            others = score[i].clone()
            others[i] = -0.25
            slots = [(j.item(), others[j]) for j in others.argsort(descending=True, stable=True)[:5]]
            slots.append((i, torch.tensor(-0.5)))
        else:
            slots = [(j.item(), score[i, j]) for j in score[i].argsort(descending=True, stable=True)[:6]]
        weights = torch.softmax(torch.stack([3 * s.double() for _, s in slots]), 0)
        for (j, _), w in zip(slots, weights, strict=True):
            expected[i, j] += w
    assert_close(mixing_matrix(layer, x)[0, 0], expected, atol=1e-9, rtol=0)
    assert_close(layer(x)[0].flatten(1), x[0].flatten(1) @ expected.T, atol=1e-9, rtol=0)


LEARNED = [
    "nearest(7, blend(0.4, learned)) | ranked | softmax(heads=2)",
    "nearest(7, blend(0.4, cosine, learned), self) | box | softmax(project=none)",
    "nearest(5, blend(0.4, learned, unit), self) | ranked | inverse(heads=2)*depthwise",
    "window(3, blend(0.4, learned)) | box | softmax(heads=2, project=v)",
    "all(blend(0.4, learned)) | row | identity(project=none)",
]


@pytest.mark.parametrize("notation", LEARNED)
def test_a_learned_blend_starts_as_the_fixed_one_and_has_its_derivative(notation):
    torch.manual_seed(1)
    layer = Mixer(notation, 4).double()
    fixed = Mixer(notation.replace(", learned", ""), 4).double()
    fixed.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "blend_logit"})
    assert layer.blend_logit.shape == (layer.operation.weight.heads,)
    assert_close(layer.blend_logit.sigmoid(), torch.full_like(layer.blend_logit, 0.4))
    x, times = torch.randn(2, 4, 5, 4, dtype=F64), torch.randn(2, 4, 5, 4, dtype=F64)
    assert_close(layer(x), fixed(x), atol=1e-7, rtol=1e-7)  # the logit is kept in float32
    (layer(x) * times).sum().backward()
    for head in range(len(layer.blend_logit)):  # a step so small that nobody's neighbours change
        with torch.no_grad():
            ends = []
            for step in (1e-6, -1e-6):
                layer.blend_logit[head] += step
                ends.append((layer(x) * times).sum())
                layer.blend_logit[head] -= step
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(slope) > 1e-5
        assert_close(layer.blend_logit.grad[head], slope, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("notation", LEARNED)
def test_every_backend_learns_what_the_oracle_learns(notation):
    torch.manual_seed(2)
    layer = Mixer(notation, 4)
    oracle = Mixer(notation, 4, backend="oracle")
    oracle.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 6, 5)
    for one in (layer, oracle):
        one(x).square().sum().backward()
    assert_close(layer.blend_logit.grad, oracle.blend_logit.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("truth", [0.1, 0.9])
def test_a_layer_finds_the_place_of_its_teacher(truth):
    torch.manual_seed(3)
    words = "nearest(9, blend({}), self) | ranked | softmax(project=none, scale=4.0)"
    teacher, layer = Mixer(words.format(truth), 3), Mixer(words.format("0.5, learned"), 3)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(120):
        x = torch.randn(8, 3, 7, 7)
        loss = (layer(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(layer.blend_logit.sigmoid().item() - truth) < 0.08


def test_a_lambda_at_the_end_of_its_range_stays_finite():
    layer = Mixer("nearest(5, blend(0.5, learned), self) | ranked | softmax", 4)
    for logit in (-1e4, 1e4):
        nn.init.constant_(layer.blend_logit, logit)
        y = layer(torch.randn(1, 4, 6, 6))
        y.sum().backward()
        assert y.isfinite().all() and layer.query_weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("notation", "message"),
    [
        ("nearest(9, blend(0, learned)) | ranked | softmax", "from 0.001 to 0.999"),
        ("nearest(9, blend(1.0, learned)) | ranked | softmax", "from 0.001 to 0.999"),
        ("nearest(9, blend(0.5, learned)) | ranked | kernel", "rho ones reads none: use softmax"),
        ("nearest(9, blend(0.5, learned), self, again=-1) | ranked | softmax", "again does not go with"),
    ],
)
def test_what_cannot_be_learned_is_refused(notation, message):
    with pytest.raises(ValueError, match=message):
        parse(notation)


def test_no_schedule_moves_a_learned_lambda():
    layer = Mixer("nearest(9, blend(0.5, learned)) | ranked | softmax", 4)
    with pytest.raises(ValueError, match="no Mixer of the model"):
        SpectrumSchedule(nn.Sequential(layer), {"lam": (0, 1)}, steps=3)


def test_convnn_projects_nothing_unless_asked():
    assert [n for n, _ in ConvNN2d(4, 4).named_parameters()] == ["weight", "bias"]
    asked = Mixer("nearest(9, cosine, self) | ranked | softmax(project=qk)*kernel", 4)
    assert {"query_weight", "key_weight"} < {n for n, _ in asked.named_parameters()}
    assert str(ConvNN2d(4, 4).operation) == "nearest(9, cosine, self) | ranked | kernel"

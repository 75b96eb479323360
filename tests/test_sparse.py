"""Exact zeros: sparsemax, entmax, thresholds and top-p against their formulas, written out; and what runs them.

Nothing but the last part goes through the oracle: tau is bisected, one number at a time.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import close, mask_of, project, scrambled

from nearfold.kernels.entmax import entmax
from nearfold.lower.backends import dense
from nearfold.nn import Mixer
from nearfold.study.measure import peak_bytes
from nearfold.testing import make, run

pytestmark = pytest.mark.usefixtures("float64")
POWERS = {"sparsemax": 1, "entmax": 2}


def bisected(row, power):
    """The tau under which sum of max(z - tau, 0) ** power is one, of a list of numbers."""
    low, high = max(row) - 1, max(row)
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if sum(max(z - tau, 0) ** power for z in row) > 1 else (low, tau)
    return (low + high) / 2


def shares(score, power):
    """By bisection; the gradient of tau is that of the equation which it solves."""
    z = score / power
    rows = [[v for v in row if v > -math.inf] for row in z.detach().flatten(0, -2).tolist()]
    tau = torch.tensor([bisected(row, power) if row else 0.0 for row in rows]).view(*z.shape[:-1], 1)
    above = (z - tau).clamp(min=0)
    slope = (power * above.detach() ** (power - 1) * (above > 0)).sum(-1, keepdim=True)
    tau = tau + ((above**power).sum(-1, keepdim=True) - 1) / slope.clamp(min=1e-9)
    return (z - tau).clamp(min=0) ** power


def agree(layer, x, truth):
    """Output and every gradient, on the fast path and on the oracle."""
    probe = torch.randn(layer(x).shape)
    wanted = torch.autograd.grad((truth(x) * probe).sum(), [x, *layer.parameters()])
    for layer.backend in ("auto", "oracle"):
        close(layer(x), truth(x))
        found = torch.autograd.grad((layer(x) * probe).sum(), [x, *layer.parameters()])
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
    layer.backend = "auto"


def attention(layer, x, mask, weigh):
    """Attention with a mask over all positions, its scores made into shares by ``weigh(score)``."""
    q, k, v = project(layer, x)
    score = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    y = (weigh(score) @ v).transpose(1, 2).flatten(2)
    return F.linear(y, layer.out_weight, layer.out_bias).transpose(1, 2).unflatten(2, x.shape[2:])


def near(grid, reach):
    return mask_of(grid, lambda i, j: max(abs(p - q) for p, q in zip(i, j, strict=True)) <= reach)


@pytest.mark.parametrize("rho", POWERS)
@pytest.mark.parametrize("path", ["all | row", "all | strided(3)", "window(3) | box", "nearest(5, scaled) | ranked"])
def test_shares_are_those_of_the_formula(rho, path):
    layer = scrambled(Mixer(f"{path} | {rho}(heads=2, scale=3.0)", 6))
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    i, j = torch.arange(20)[:, None], torch.arange(20)
    mask = {"all": torch.ones(20, 20, dtype=torch.bool), "window": near((4, 5), 1)}.get(path[:6].split(" ")[0])
    mask = (i - j) % 3 == 0 if "strided" in path else mask
    zeros = []

    def weigh(score):
        chosen = score
        if mask is None:
            best = torch.zeros_like(score).scatter(-1, score.topk(5, -1).indices, 1).bool()
            chosen = score.masked_fill(~best, -math.inf)
        alpha = shares(3.0 * chosen, POWERS[rho])
        zeros.append((alpha[chosen > -math.inf] == 0).double().mean())
        return alpha

    agree(
        layer, x, lambda x: attention(layer, x, torch.ones(20, 20, dtype=torch.bool) if mask is None else mask, weigh)
    )
    assert 0.05 < zeros[0] < 0.95, "some are exactly zero"


@pytest.mark.parametrize("rho", POWERS)
def test_under_masks_of_keys_and_of_pairs(rho):
    layer, x = scrambled(Mixer(f"all | row | {rho}(heads=2)", 6, ndim=1)), torch.randn(2, 6, 9)
    pairs = torch.rand(2, 1, 9, 9) < 0.6
    pairs[:, :, 3] = False  # this one may read nothing
    keep = torch.arange(9) < torch.tensor([[5], [9]])
    for given, mask in ((pairs, pairs), (keep, keep[:, None, None])):
        truth = attention(layer, x, mask, lambda score: shares(score, POWERS[rho]))
        for layer.backend in ("auto", "dense", "oracle"):
            y = layer(x, mask=given)
            asks = keep if given is keep else torch.ones_like(keep)
            close(y.mT[asks], truth.mT[asks])


@pytest.mark.parametrize("power", POWERS.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_threshold_is_found_on_every_kind_of_row(power, dtype):
    steep = torch.tensor([2.0**-n for n in range(300)])  # what sparsemax's own iteration takes one by one
    rows = [
        *(scale * torch.randn(300) for scale in (0.001, 0.1, 1.0, 10.0, 1e4)),
        torch.zeros(300), torch.ones(300) * 7, steep, -steep, 1 - steep.cumsum(0) / 2,
        torch.randn(300).round(), torch.cat([torch.tensor([1.0]), torch.zeros(299)]),
        torch.randn(300).masked_fill(torch.arange(300) > 0, -math.inf),
    ]  # fmt: skip
    score = torch.stack(rows).to(dtype)
    alpha, truth = entmax(score, power), shares(score.double(), power)
    # a score of 10,000 has an ulp of its own
    bound = torch.finfo(dtype).eps * (40 + 4 * score.masked_fill(score == -math.inf, 0).abs().amax(-1, keepdim=True))
    assert ((alpha.double() - truth).abs() <= bound).all()
    assert ((alpha.double().sum(-1, keepdim=True) - 1).abs() <= 40 * torch.finfo(dtype).eps).all()


def test_rows_without_a_number():
    score = torch.tensor([[0.3, 0.1], [-math.inf, -math.inf], [math.nan, 0.0], [math.inf, 0.0]])
    for power in (1, 2):
        alpha = entmax(score, power)
        close(alpha[0].sum(), torch.tensor(1.0))
        assert not alpha[1].any() and alpha[2:].isnan().all()
        assert entmax(score[:0], power).shape == (0, 2) and entmax(score[:, :0], power).shape == (4, 0)


@pytest.mark.parametrize("power", POWERS.values())
def test_derivatives_and_registration(power):
    score = torch.randn(3, 7, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: entmax(s, power), score)
    assert torch.autograd.gradgradcheck(lambda s: entmax(s, power), score)
    torch.library.opcheck(entmax.registered, (score, power))


def test_misuse_says_so():
    for score, power in ((torch.ones(3), 3), (torch.ones(3, dtype=torch.long), 1), (torch.tensor(1.0), 2)):
        with pytest.raises(ValueError, match=r"power 1 \(sparsemax\) or 2 \(entmax 1.5\)"):
            entmax(score, power)


SEVERAL = [
    "all | row | entmax(heads=2)", "all | causal | sparsemax", "all(euclidean) | row | softmax(heads=2)",
    "all(dot) | strided(2) | identity", "all(euclidean) | row | inverse(project=qkv)", "all | strided(2) | mean",
    "all(scaled(bias=alibi), stride=2) | row | softmax(heads=2)", "all(blend(0.5, learned)) | causal | softmax",
]  # fmt: skip


@pytest.mark.parametrize("text", SEVERAL)
def test_several_blocks_are_one(text, monkeypatch):
    layer, x = make(text, (6, 5))
    truth = run(layer, x, "oracle")
    made = []
    monkeypatch.setattr(dense, "checkpoint", lambda f, *args, **named: made.append(1) or original(f, *args, **named))
    monkeypatch.setattr(dense, "BLOCK_BYTES", 2 * 2 * 30 * 8 * 7)
    errors = run(layer, x, "dense").errors(truth)
    assert max(errors.values()) < 1e-12, errors
    assert len(made) > 1
    slope = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)[0]
    twice = torch.autograd.grad(slope.square().sum(), x)[0]
    layer.backend = "oracle"
    slope = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    torch.testing.assert_close(twice, torch.autograd.grad(slope.square().sum(), x)[0], rtol=1e-8, atol=1e-9)


original = dense.checkpoint


def test_no_matrix_of_all_pairs_is_held():
    layer, x = make("all | row | entmax", (64, 64), torch.float32, batch=1)
    x.requires_grad_()
    assert peak_bytes(lambda: layer(x).sum().backward(), x.device) < 32 << 20, "the matrix alone is 64 MiB"


# --- how many of the k: by hand, query by query


def pruned(score, k, least, top_p):
    """A mask of the slots that are left."""
    kept = torch.zeros_like(score, dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, score.shape[:-1])).tolist():
        row = score[tuple(at)].tolist()
        order = sorted(range(len(row)), key=lambda j: -row[j])[:k]
        order = [j for j in order if least is None or row[j] >= least]
        total, held = sum(math.exp(row[j]) for j in order), 0.0
        for j in order:
            if top_p is None or held < top_p * total:
                kept[tuple(at)][j] = True
            held += math.exp(row[j])
    return kept


@pytest.mark.parametrize(
    ("least", "top_p"), [(0.1, None), (None, 0.7), (-0.2, 0.5), (None, 1e-6), (100.0, None), (-100.0, None)]
)
def test_thresholds_and_top_p_leave_what_they_say(least, top_p):
    said = "".join(f", {name}={n}" for name, n in (("least", least), ("top_p", top_p)) if n is not None)
    layer = scrambled(Mixer(f"nearest(8, scaled{said}) | ranked | softmax(heads=2)", 6))
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    counts = []

    def weigh(score):
        kept = pruned(score.detach(), 8, least, top_p)
        counts.extend(kept.sum(-1).flatten().tolist())
        lowest = torch.finfo(score.dtype).min
        return torch.softmax(score.masked_fill(~kept, lowest), -1).masked_fill(~kept, 0)

    agree(layer, x, lambda x: attention(layer, x, torch.ones(20, 20, dtype=torch.bool), weigh))
    if least == 100.0:
        assert set(counts) == {0}, "nothing is left, and nothing is read"
    elif least == -100.0:
        assert set(counts) == {8}
    elif top_p == 1e-6:
        assert set(counts) == {1}, "one always holds the share"
    else:
        assert len(set(counts)) > 2, "the data decides how many"


def test_a_kernel_reads_zero_where_nothing_is_left():
    """ConvNN with a threshold: the own slot stays, the maps of ranks that are not there add nothing."""
    layer = scrambled(Mixer("nearest(4, cosine, self=0.1, least=0.3) | ranked | kernel", 3, 5))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)

    def truth(x):
        flat, columns = x.flatten(2), []
        unit = F.normalize(flat, dim=1)
        score = (unit.mT @ unit).detach()
        for b in range(2):
            for i in range(16):
                row = score[b, i].tolist()
                others = sorted((j for j in range(16) if j != i), key=lambda j: -row[j])[:3]
                y = layer.bias + layer.weight[:, :, 0] @ flat[b, :, i]
                for rank, j in enumerate(others):
                    if row[j] >= 0.3:
                        y = y + layer.weight[:, :, rank + 1] @ flat[b, :, j]
                columns.append(y)
        return torch.stack(columns).unflatten(0, (2, 16)).mT.unflatten(2, (4, 4))

    agree(layer, x, truth)


def test_a_nan_query_is_lost_alone():
    for text in ("nearest(3, cosine, top_p=0.5) | ranked | ones", "nearest(3, dot, least=0.0) | box | entmax(heads=2)"):
        layer, x = Mixer(text, 4), torch.randn(1, 4, 3, 3)
        x[0, :, 2, 2] = math.nan
        for layer.backend in ("auto", "oracle"):
            lost = layer(x).isnan().any(1)[0]
            assert lost[2, 2] and lost.sum() == 1, (text, layer.backend)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nearest(4, top_p=1.0) | ranked | ones", "nearest: top_p must be above 0 and below 1; leave it out for all"),
        ("nearest(4, top_p=0) | ranked | ones", "got top_p=0.0"),
        ("nearest(4, least=0.5, by=dot) | ranked | ones", "nearest: least must be left out beside by and again"),
        (
            "nearest(4, top_p=0.5, self, again=0.0) | ranked | ones",
            "nearest: top_p must be left out beside by and again",
        ),
        ("all | row | entmax(heads=4, kv=3)", "entmax: kv must be a divisor of heads=4, got kv=3"),
        ("all | row | sparsemax(order=2)", "sparsemax has no argument 'order'"),
    ],
)
def test_what_cannot_be_says_so(text, said):
    with pytest.raises(ValueError) as error:
        Mixer(text, 4)
    assert said in str(error.value)

"""Masks of the keys: positions that are not there, in every operation that can do without some.

Shape legend: B batch, C channels, N positions.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cells import slow_but

from nearfold import parse
from nearfold.grammar.vocabulary import cases, words_in
from nearfold.lower.plan import verdicts
from nearfold.lower.verdict import Facts
from nearfold.nn import Mixer, SelfAttention
from nearfold.testing import BUDGET, Outcome, context_for, make

CASES = cases()
TAKING = [name for name, text in CASES.items() if all(word.takes_keys for word in words_in(parse(text)))]
QUICK = (
    "conv", "depthwise", "pool_mean", "deformable", "deformable_v2", "involution", "swin", "acmix", "attention",
    "attention_causal", "linear_attention", "kvt", "convnn", "convnn_random", "nearest_padded", "nearest_cross",
    "cross_attention", "nearest_indexer", "blocks_pooled", "mamba", "mamba2", "scan_cross", "union_kernel",
    "union_local_nearest", "criss_cross", "neighborhood",
)  # fmt: skip


def outcome(layer, x, keep, backend):
    """Output and gradients for a fixed upstream gradient, with garbage wherever there is no key."""
    layer.backend = backend
    if layer.sampler is not None:
        layer.sampler[1] = 7
    layer.zero_grad()
    context = context_for(layer, x)
    read = x if context is None else context.detach()
    read = read.masked_fill(~keep[:, None], math.nan).requires_grad_()
    y = layer(read, mask=keep) if context is None else layer(x, read, keep)
    if context is None:  # what is not there asks nothing
        steps = [-(-n // m) for n, m in zip(x.shape[2:], y.shape[2:], strict=True)]
        asks = keep[(slice(None), *(slice(None, None, step) for step in steps))]
        if asks.shape[1:] == y.shape[2:]:
            y = y.masked_fill(~asks[:, None], 0)
    steps = torch.arange(y.numel(), dtype=torch.float64)
    y.backward((torch.cos(steps) + 0.5).to(y).view_as(y))
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in layer.named_parameters()}
    return Outcome({"y": y.detach(), "read": read.grad} | grads)


def keys_of(layer, x):
    read = x if (context := context_for(layer, x)) is None else context
    keep = torch.rand(read.shape[0], *read.shape[2:], generator=torch.Generator().manual_seed(3)) < 0.6
    keep[0, ..., -1], keep[1, ..., -1] = False, True
    return keep


@pytest.mark.parametrize("grid", [(5, 4), (4, 3)])
@pytest.mark.parametrize("name", slow_but(QUICK, TAKING))
def test_every_backend_is_the_oracle(name, grid):
    layer, x = make(CASES[name], grid)
    keep = keys_of(layer, x)
    truth = outcome(layer, x, keep, "oracle")
    assert all(t.isfinite().all() for t in truth.tensors.values()), "garbage got in"
    able = [
        {n for n, v in verdicts(Facts(p, x.dim() - 2, x.dtype, "cpu", True)).items() if v.ok and v.keys}
        for p in layer.operation.parts
    ]  # fmt: skip
    for backend in ("auto", *sorted(set.intersection(*able) - {"oracle"})):
        for tensor, error in outcome(layer, x, keep, backend).errors(truth).items():
            assert error <= BUDGET[torch.float64], (name, backend, tensor, error)


def test_hardly_any_operation_with_a_mask_runs_on_the_oracle():
    slow = []
    for name in TAKING:
        for part in parse(CASES[name]).parts:
            found = verdicts(Facts(part, 2, torch.float32, "cpu", True))
            if not any(v.ok and v.keys and n != "oracle" for n, v in found.items()):
                slow.append(name)
    assert set(slow) == KNOWN_SLOW


KNOWN_SLOW = {
    "window_euclidean", "window_inverse", "window_position", "bilateral",  # distances over a table of slots
}  # fmt: skip

QUICK_ALONE = ("conv", "kvt", "mamba", "attention_alibi", "union_kernel", "deformable", "linear_attention", "sinks")
# what depends on where the map ends, whatever is there
ENDS = (
    "reflect", "inside", "coordinates", "position", "blend", "table", "grid(", "scattered", "cross", "experts",
    "bins", "agent", "spread", "spectral", "global_filter", "reweighted", "synthesized", "projected", "beside",
)  # fmt: skip
ALONE = [name for name in TAKING if not any(w in str(parse(CASES[name])) for w in ENDS)]


def on_a_line(name):
    """A layer in evaluation mode and two sequences of twelve; skips what is made for more grid axes."""
    try:
        layer, x = make(CASES[name], (12,))
        layer.eval()(x)
    except ValueError as error:
        if "grid axes" not in str(error):
            raise
        pytest.skip("made for more than one grid axis")
    return layer, x


@pytest.mark.parametrize("name", slow_but(QUICK_ALONE, ALONE))
def test_a_padded_sequence_is_what_it_is_alone(name):
    """Against the same layer on every sequence by itself, without any mask."""
    layer, x = on_a_line(name)
    y = layer(x, mask=torch.tensor([12, 7]))
    for b, n in enumerate((12, 7)):
        alone = layer(x[b : b + 1, :, :n])
        torch.testing.assert_close(y[b : b + 1, :, : alone.shape[2]], alone, rtol=1e-10, atol=1e-11)


# what knows no distance: without the absent positions the others close up
FREE = [
    name for name in TAKING
    if parse(CASES[name]).parts[0].path.word in ("all", "nearest", "scan")
    and not any(w in CASES[name] for w in (*ENDS, "bias", "rotary", "strided", "window", "stride=", "padding"))
    and not getattr(parse(CASES[name]).parts[0].weight.kernel, "everywhere", False)
    and "seeds" not in CASES[name]  # whose outputs are no positions
]  # fmt: skip


@pytest.mark.parametrize(
    "name", slow_but(("mamba", "mamba2", "kvt", "linear_attention", "nearest_indexer_causal"), FREE)
)
def test_positions_in_the_middle_are_as_if_they_were_never_there(name):
    layer, x = on_a_line(name)
    keep = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool).expand(2, -1)
    alone = layer(x[..., keep[0]])
    torch.testing.assert_close(layer(x, mask=keep)[..., keep[0]], alone, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", ["row", "causal"])
@pytest.mark.parametrize("rho", ["mean", "ones"])
def test_sums_without_scores(rho, shape):
    layer, x = Mixer(f"all | {shape} | {rho}", 4, ndim=1).eval(), torch.randn(1, 4, 6)
    keep = torch.tensor([[False, True, True, False, True, True]])
    torch.testing.assert_close(layer(x, mask=keep)[..., keep[0]], layer(x[..., keep[0]]))


def test_lengths_masks_and_pairs_say_the_same():
    layer, x = Mixer("all | row | softmax(heads=2)", 6, ndim=1), torch.randn(3, 6, 9)
    lengths = torch.tensor([9, 1, 4])
    keep = torch.arange(9) < lengths[:, None]
    one = layer(x, mask=lengths)
    for other in (keep, keep[:, None, None], keep[:, None, None].expand(3, 1, 9, 9)):
        torch.testing.assert_close(layer(x, mask=other).mT[keep], one.mT[keep])


def test_a_query_that_may_read_nothing_reads_nothing():
    for text in ("all | row | softmax", "nearest(3, dot) | ranked | softmax", "window(3) | box | softmax"):
        layer = Mixer(f"{text}(heads=2, project=none)", 4, ndim=1)
        y = layer(torch.randn(2, 4, 5), mask=torch.tensor([0, 5]))
        assert (y[0] == 0).all() and (y[1] != 0).any()


def test_tokens_take_lengths_and_masks():
    layer, x = SelfAttention(8, 2), torch.randn(2, 6, 8)
    torch.testing.assert_close(layer(x, mask=torch.tensor([6, 4]))[1:, :4], layer(x[1:, :4]))


def test_nested_tensors_in_and_out():
    layer, parts = SelfAttention(8, 2), [torch.randn(n, 8, requires_grad=True) for n in (5, 1, 7)]
    x = torch.nested.nested_tensor([p.detach() for p in parts], layout=torch.jagged, requires_grad=True)
    y = layer(x)
    y.values().square().sum().backward()
    for part, made in zip(parts, y.unbind(), strict=True):
        alone = layer(part[None])[0]
        torch.testing.assert_close(made, alone)
        alone.square().sum().backward()
    torch.testing.assert_close(x.grad.values(), torch.cat([p.grad for p in parts]))
    with pytest.raises(ValueError, match="without context and mask"):
        layer(x, mask=torch.tensor([5, 1, 7]))


def test_images_take_maps():
    layer, x = Mixer("nearest(4, dot) | ranked | softmax(heads=2)", 4), torch.randn(2, 4, 5, 6)
    keep = torch.zeros(2, 5, 6, dtype=torch.bool)
    keep[:, :3, :4] = True
    torch.testing.assert_close(layer(x, mask=keep)[:, :, :3, :4], layer(x[:, :, :3, :4]))
    torch.testing.assert_close(layer(x, mask=keep.flatten(1)), layer(x, mask=keep))


@pytest.mark.parametrize("text", ["window(3) | box | softmax(heads=2)", "nearest(3, dot) | ranked | softmax(heads=2)"])
def test_it_compiles_in_one_graph(text):
    layer, x = Mixer(text, 4, ndim=1), torch.randn(2, 4, 7)
    keep = torch.arange(7) < torch.tensor([[7], [3]])
    torch._dynamo.reset()  # what other tests compiled at other sizes would leave these open
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=keep), layer(x, mask=keep))


@pytest.mark.parametrize("text", ["conv", "kvt", "attention", "neighborhood"])
def test_under_autocast(text):
    layer, x = Mixer(text, 8), torch.randn(2, 8, 5, 6)
    keep = torch.rand(2, 5, 6) < 0.7
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, mask=keep)
    error = (y.float() - layer(x, mask=keep)).norm() / layer(x, mask=keep).norm()
    assert error < 0.05


@pytest.mark.parametrize(
    ("text", "mask", "said"),
    [
        ("conv", torch.ones(2, 4, dtype=torch.bool), r"mask of the keys must be bool of shape \(2, 5\)"),
        ("conv", torch.ones(2, 5), "got torch.float32"),
        ("conv", torch.tensor([5, 6]), "integers from 0 to 5, got shape .2,., from 5 to 6"),
        ("conv", torch.tensor([5, 4, 3]), r"must be 2 integers from 0 to 5, got shape \(3,\)"),
        ("dynamic_conv", torch.tensor([5, 4]), r"experts\(4\) reads every position of the map"),
        ("blend", torch.tensor([5, 4]), r"blend\(0.5\) reads every position of the map"),
        ("pvt_linear", torch.ones(2, 1, 5, 5, dtype=torch.bool), "a mask of pairs goes with the paths all, nearest"),
    ],
)
def test_a_wrong_mask_says_so(text, mask, said):
    with pytest.raises(ValueError, match=said):
        Mixer(text, 4, ndim=1)(torch.randn(2, 4, 5), mask=mask)


def test_a_backend_that_knows_no_mask_says_which_do():
    with pytest.raises(ValueError, match=r"backend='local' does not run .* with a mask; those that do: gather, oracle"):
        Mixer("window(3) | box | softmax", 4, ndim=1, backend="local")(torch.randn(1, 4, 5), mask=torch.tensor([3]))

"""Every lowering equals the oracle: over the hand-written cases, generated operations, sizes and dtypes."""

import contextlib

import pytest
import torch
from helpers.cells import slow_but
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nearfold import CATALOGUE, parse
from nearfold.grammar.vocabulary import words_in
from nearfold.grammar.word import WORDS
from nearfold.kernels import engine
from nearfold.lower import lower
from nearfold.lower.plan import BACKENDS
from nearfold.lower.verdict import Facts
from nearfold.nn import (
    ACmix2d,
    BranchingAttention,
    BranchingConv2d,
    ConvNN1d,
    ConvNN2d,
    ConvNNAttention,
    KVTAttention,
    Mixer,
)
from nearfold.testing import (
    BUDGET,
    CASES,
    GRIDS,
    check_compiled,
    check_gradients,
    conform,
    forward,
    grid_for,
    make,
    operations,
    poisoned_empties,
    run,
    tie_prone,
)


def small_enough(text: str, grid: tuple[int, ...]) -> bool:
    """A window without padding needs room."""
    return not (("padding=0" in text or "padding=1" in text) and "window" in text and min(grid) < 3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float64(name, grid):
    if not small_enough(CASES[name], grid):
        with pytest.raises(ValueError, match="does not fit"):
            conform(CASES[name], grid)
        return
    with poisoned_empties():
        conform(CASES[name], grid)


@pytest.mark.parametrize("name", CASES)
def test_without_the_engine(name):
    with poisoned_empties(), engine.forced(engine.OFF):
        conform(CASES[name], (7, 6))


@pytest.mark.parametrize("dtype", [d for d in BUDGET if d != torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_low_precision(name, dtype):
    conform(CASES[name], (6, 7), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["convnn", "kvt", "nearest_euclidean", "convnn_random"])
def test_many_positions(name, dtype):
    """Enough keys for the two-step search, and a number that its classes do not divide."""
    conform(CASES[name], (27, 23), dtype)


@pytest.mark.parametrize("candidates", ["all", "grid(24)"])
def test_many_ties_go_to_the_lowest_index(candidates):
    layer, x = make(f"nearest(9, dot, {candidates}) | ranked | kernel", (26, 25), torch.float32)
    x = x.mul(2).round()
    errors = run(layer, x, "auto").errors(run(layer, x, "oracle"))
    assert max(errors.values()) <= BUDGET[torch.float32], errors


QUIETLY = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
OPERATIONS = given(op=operations(), grid=st.tuples(st.integers(1, 7), st.integers(1, 6)), seed=st.integers(0, 99))


def near_a_pole(op):
    """Whether `inverse` reads scores that are no distances: at zero 1 / (1e-8 - score) multiplies rounding by 1e8."""
    return any(part.weight.rho.word == "inverse" and part.path.similarity.word != "euclidean" for part in op.parts)


def check_generated(op, grid, seed):
    try:
        forward(*make(op, grid))
    except ValueError as e:  # a combination that cannot be: refused in words, and by the oracle alike
        layer, x = make(op, grid)
        layer.backend = "oracle"
        with pytest.raises(ValueError, match=r"does not fit|padding|axis|axes") as refused:
            forward(layer, x)
        assert str(refused.value) == str(e)
        return
    assume(not tie_prone(op) and not near_a_pole(op))
    conform(op, grid, seed=seed)


@settings(QUIETLY, max_examples=15)
@OPERATIONS
def test_generated(op, grid, seed):
    check_generated(op, grid, seed)


@pytest.mark.slow
@settings(QUIETLY, max_examples=135)
@OPERATIONS
def test_generated_in_number(op, grid, seed):
    """Others than above: what is drawn follows from the name of the test."""
    check_generated(op, grid, seed)


def test_cases_cover_the_vocabulary():
    used = {type(word) for text in CASES.values() for word in words_in(parse(text))}
    missing = [cls.word for kind in WORDS.values() for cls in kind.values() if cls not in used]
    assert not missing, f"CASES lacks {missing}"


def test_rounding_decides_no_case():
    """Or one machine's products would order equally near positions in one way, and another's in another."""
    assert not [text for text in CASES.values() if tie_prone(parse(text))]


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    check_gradients(CASES[name], (4, 4) if "padding=0" in CASES[name] else (3, 4))


# the quick tests compile the named layers, too: convnn, kvt, branch and acmix among them
@pytest.mark.parametrize("name", slow_but(("conv", "deformable"), [name for name in CASES if name in CATALOGUE]))
def test_compiles_in_one_graph(name):
    layer, x = make(CASES[name], (6, 5), torch.float32)
    other = make(CASES[name], (7, 9), torch.float32)[1]
    # words made for one number of positions; and swin_shifted has the graph of these two, and takes as long
    fixed = ("table(", "synthesized(", "projected(", "beside(")
    one_size = any(word in CASES[name] for word in fixed) or name in ("block", "swin")
    check_compiled(layer, [x] if one_size else [x, other])


LAYERS = {
    "ConvNN1d": (lambda: ConvNN1d(8, 8, candidates="random(6)"), (2, 8, 11)),
    "ConvNN2d": (lambda: ConvNN2d(8, 8, shuffle="both", stride=2), (2, 8, 6, 4)),
    "ConvNNAttention": (lambda: ConvNNAttention(8, 2), (2, 13, 8)),
    "KVTAttention": (lambda: KVTAttention(8, 2, k=5), (2, 13, 8)),
    "BranchingConv2d": (lambda: BranchingConv2d(8, 8), (2, 8, 5, 4)),
    "BranchingAttention": (lambda: BranchingAttention(8, 2), (2, 13, 8)),
    "ACmix2d": (lambda: ACmix2d(8, 8, num_heads=2), (2, 8, 5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_named_layers_compile(name):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    check_compiled(build(), [torch.randn(shape)])


@pytest.mark.slow
def test_compiles_with_inductor():
    torch.manual_seed(0)
    check_compiled(ConvNN2d(8, 8), [torch.randn(2, 8, 6, 5)], backend="inductor")


def test_random_candidates_compile_in_training():
    layer = ConvNN2d(4, 4, candidates="random(6)").train()
    x = torch.randn(1, 4, 5, 5)
    layer.sampler[1] = 0
    eager = [layer(x) for _ in range(2)]
    layer.sampler[1] = 0
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for y in eager:
        torch.testing.assert_close(compiled(x), y)
    assert layer.sampler[1] == 2


@pytest.mark.parametrize("name", CASES)
def test_autocast(name):
    layer, x = make(CASES[name], (6, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = forward(layer, x.requires_grad_())
    y.float().square().sum().backward()
    assert y.dtype in (torch.bfloat16, torch.float32)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())
    layer.eval()
    with torch.no_grad():
        truth = forward(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(layer, x)
            layer.backend = "oracle"
            same = forward(layer, x)
    # the oracle rounds the same queries and keys, so it chooses the same neighbours
    assert (y - same).norm() <= 0.05 * same.norm()
    if "nearest" not in CASES[name]:  # against full precision, rounded queries may choose others
        assert (y - truth).norm() <= 0.05 * truth.norm()


@pytest.mark.parametrize("name", CASES)
def test_empty_and_single_batches(name):
    layer, x = make(CASES[name], (5, 4), torch.float32)
    layer.eval()
    empty = x[:0].requires_grad_()
    y = forward(layer, empty)
    assert y.shape == (0, *forward(layer, x[:1]).shape[1:])
    y.sum().backward()
    assert empty.grad is None or empty.grad.shape == empty.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", CASES)
def test_one_sample_does_not_depend_on_the_others(name):
    layer, x = make(CASES[name], (5, 4))
    layer.eval()
    torch.testing.assert_close(forward(layer, x)[1:], forward(layer, x[1:]), rtol=1e-11, atol=1e-12)


def test_asking_for_a_backend_never_falls_back():
    for name in BACKENDS:
        facts = Facts(parse("nearest(3, cosine) | ranked | kernel"), 2, torch.float32, "cpu", True)
        if name == "knn":
            assert lower(facts, name) == name
        else:
            with pytest.raises(ValueError, match=f"backend='{name}' cannot run .* Those that can: knn, oracle"):
                lower(facts, name)
    with pytest.raises(ValueError, match="backend='cudnn' is not one of"):
        Mixer("window(3) | box | kernel", 4, backend="cudnn")(torch.randn(1, 4, 5, 5))


def test_ops_pass_opcheck():
    from nearfold.kernels.aggregate import aggregate
    from nearfold.kernels.select import select

    q, k = torch.randn(2, 2, 5, 3, requires_grad=True), torch.randn(2, 2, 7, 3, requires_grad=True)
    at = torch.arange(7)
    torch.library.opcheck(select.registered, (q, k, 3, "dot", False, at[:5], at, [7], [1, 2, 1], True, float("-inf")))
    torch.library.opcheck(select.registered, (q, k, 3, "euclidean", False, at[:5], at, [7], [0, -1, 1], False, 0.0))
    index = torch.randint(-1, 6, (2, 5, 3, 2))
    value = torch.randn(2, 6, 4, requires_grad=True)
    alpha, weight = torch.randn(2, 5, 3, 2, requires_grad=True), torch.randn(6, 2, 3, requires_grad=True)
    torch.library.opcheck(aggregate.registered, (value, index, alpha, weight, 2))
    torch.library.opcheck(aggregate.registered, (value, index, None, None, 1))


def test_the_suite_sees_a_wrong_kernel(monkeypatch):
    """Break the tie rule, the stride of a view and a gradient of the PyTorch path: each must show."""
    from nearfold.kernels import local, local_attention_torch, select_torch

    def backwards(score, k):
        best, index = score.flip(-1).topk(k, -1)
        return best, score.shape[-1] - 1 - index

    def shifted(p, o, s, out):
        return right(p, tuple(0 for _ in o), s, out)

    right = local.shifted
    broken = [
        ("nearest(5, position(chebyshev)) | ranked | kernel", [(select_torch, "ranked", backwards)]),
        ("window(3) | box | softmax", [(local, "shifted", shifted), (local_attention_torch, "shifted", shifted)]),
        (
            "nearest(5, euclidean) | ranked | softmax",
            [(select_torch, "_metric_grad", lambda g, apart, metric, squared: -g[..., None] * apart)],
        ),
    ]
    for op, patches in broken:
        with monkeypatch.context() as m, engine.forced("off"):
            conform(op, (5, 4))
            for module, name, wrong in patches:
                m.setattr(module, name, wrong)
            with pytest.raises(AssertionError, match="is off by"):
                conform(op, (5, 4))


def test_poison_reaches_empty_memory():
    with poisoned_empties():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()


@pytest.mark.parametrize("name", ["convnn", "kvt", "branch"])
def test_runs_are_deterministic(name):
    layer, x = make(CASES[name], (9, 8), torch.float32)
    first, second = run(layer, x, "auto"), run(layer, x, "auto")
    assert all(torch.equal(t, second.tensors[n]) for n, t in first.tensors.items())


def test_grid_for_sequences():
    assert grid_for(parse("window(3) | causal | kernel"), (5, 4)) == (5,)


def _digits(levels: float) -> torch.Tensor:
    """Real images of few grey levels: equal distances between different pairs are common."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[:12], dtype=torch.float64) / levels
    return torch.stack([images, images.roll(1, 2)], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("levels", [16, 3, 7.3])
@pytest.mark.parametrize(
    "path", ["euclidean, self", "euclidean(squared)", "blend(0.35), self", "euclidean, grid(5)", "euclidean, window(5)"]
)
def test_equal_distances_on_real_images(path, levels, dtype):
    layer, _ = make(f"nearest(9, {path}) | ranked | kernel", (8, 8), dtype, channels=2)
    x = _digits(levels).to(dtype)
    errors = run(layer, x, "auto").errors(run(layer, x, "oracle"))
    assert max(errors.values()) <= BUDGET[dtype], errors


def test_distances_far_from_the_origin():
    """Norms and products cancel there; the neighbours must still be the true ones."""
    torch.manual_seed(0)
    layer, x = make("nearest(5, euclidean) | ranked | softmax(project=none)*kernel", (20, 20), torch.float32)
    for shift in (0.0, 100.0, 1000.0):
        moved = x + shift
        errors = run(layer, moved, "auto").errors(run(layer, moved, "oracle"))
        assert max(errors.values()) <= 5e-5, (shift, errors)


def test_zero_vectors_have_a_bounded_gradient():
    torch.manual_seed(0)
    layer = Mixer("nearest(5, cosine) | ranked | softmax(project=none)*kernel", 4)
    x = torch.relu(torch.randn(2, 4, 6, 6) - 1.5).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.abs().max() < 1e3


def test_checkpointing_changes_nothing():  # of random candidates: tests/test_torch_stack.py
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    plain = ConvNN2d(4, 4)
    y = torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
    y.sum().backward()
    again = x.grad.clone()
    x.grad = None
    plain(x).sum().backward()
    assert torch.equal(again, x.grad)


@pytest.mark.parametrize("path", ["cosine", "cosine, window(7)", "position(dilation=2)", "euclidean"])
def test_memory_grows_with_n_not_its_square(path):
    """Peak of live allocations at 4x the positions: a matrix of all pairs would take 16x."""
    from nearfold.study.measure import peak_bytes

    def peak(side: int) -> int:
        layer, x = make(f"nearest(9, {path}) | ranked | kernel", (side, side), torch.float32, batch=1)
        x.requires_grad_()
        return peak_bytes(lambda: layer(x).sum().backward(), x.device)

    block = 60 << 20  # a block of scores, its masks, tiles
    assert peak(96) < block, "a float32 matrix of all pairs alone is 324 MiB"


LINEAR = [
    "window(7, mode=inside) | box | softmax",
    "window(7) | box | generated(groups=2)",
    "deformable(3) | box | modulated*kernel",
    "block(8, scaled(bias=table), shift=4) | box | softmax",
    "all | strided(96) | softmax",
    "all(elu) | row | normalized",
    "all(elu) | causal | normalized",
    "scan(state=16) | causal | selective",
    "scan(state=16, order=snake) | causal | selective(heads=2)",
]


@pytest.mark.parametrize("text", LINEAR)
@pytest.mark.parametrize("which", ["engine", engine.OFF])
def test_memory_of_linear_operators_is_linear(text, which):
    """No matrix of all pairs, no window of all channels, no state of all positions: 324, 115 and 18 MiB and more."""
    from nearfold.study.measure import peak_bytes

    layer, x = make(text, (96, 96), torch.float32, batch=1)
    x.requires_grad_()
    with engine.forced(engine.OFF) if which == engine.OFF else contextlib.nullcontext():
        assert peak_bytes(lambda: layer(x).sum().backward(), x.device) < 60 << 20


def test_looks_follows_rates_and_layers():
    from nearfold.look import looks

    x = torch.randn(1, 4, 9)
    layer = Mixer("0.0*(all | row | ones) + 1.0*(window(3) | box | depthwise)", 4, ndim=1)
    assert looks(layer, x, (0,))[0, 2:].sum() == 0
    shuffled = ConvNN2d(2, 2, shuffle="both")
    assert looks(shuffled, torch.randn(1, 2, 6, 6), (1, 1)).shape == (1, 3, 3)
    tokens = KVTAttention(8, 2, k=3)
    found = looks(tokens, torch.randn(2, 8, 8), (4,))
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert (found > 0).sum(1).max() <= 6  # three keys a head


@pytest.mark.parametrize("text", ["nearest(4, cosine) | ranked | kernel", "window(3) | box | softmax"])
def test_forward_mode_is_refused_or_right(text):
    layer, x = make(text, (4, 3))
    layer.eval()
    direction = torch.randn_like(x)
    with pytest.raises(NotImplementedError, match="backend='oracle'"):
        torch.func.jvp(layer, (x,), (direction,))
    layer.backend = "oracle"
    _, tangent = torch.func.jvp(layer, (x,), (direction,))
    numeric = (layer(x + 1e-6 * direction) - layer(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("levels", [2, 50, 5000, 10**9], ids=["ties everywhere", "many", "few", "none"])
def test_the_search_is_a_stable_sort(levels):
    """Few values or many: the k best are those of a stable descending sort, in its order."""
    from nearfold.kernels.select_torch import ranked

    generator = torch.Generator().manual_seed(0)
    for count in (128, 300, 1033, 4096):
        score = (torch.randn(2, 20, count, generator=generator) * levels).round() / levels
        truth = score.sort(dim=-1, descending=True, stable=True)
        for k in (1, 9, 30):
            best, index = ranked(score.clone(), k)
            assert torch.equal(index, truth.indices[..., :k]) and torch.equal(best, truth.values[..., :k])

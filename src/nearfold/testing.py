"""The conformance suite: every lowering equals the oracle, forward and every gradient.

Shipped with the package, so that a new lowering, similarity or path is tested without touching a test file:
`CASES` are the words' own examples, `operations` draws from the registry, `conform` compares one backend with
the oracle, `check_*` test what else a layer promises. Needs the extra `dev` for the generated part only.

The oracle shares small parts with the backends (embeddings, geometry, rho): those are held against torch's own layers
and hand-written formulas by tests/test_equivalence_*.py, not by this suite.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nearfold.grammar import Basic, Operation, Weight, parse
from nearfold.grammar.similarity import Similarity
from nearfold.grammar.vocabulary import cases, words_in
from nearfold.grammar.word import WORDS, Word
from nearfold.grammar.words import ORDERS, Candidates
from nearfold.lower.meaning import meaning
from nearfold.lower.plan import verdicts
from nearfold.lower.verdict import Facts
from nearfold.nn.mixer import Mixer

# largest relative error, root mean square over a tensor, of a backend against the oracle in the same dtype;
# measured over CASES (float32 2e-6, bfloat16 9e-3, float16 1.2e-3) and given a factor of two to four. A processor
# without AVX-512 has 1.6e-2 in bfloat16, and 2.0e-2 in gradients that are zero in exact arithmetic (of a key's bias)
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}

CASES = cases()
GRIDS: tuple[tuple[int, ...], ...] = ((7, 6), (1, 1), (2, 1), (3, 8))


def _rms(x: Tensor) -> float:
    return x.double().nan_to_num().square().mean().sqrt().item() if x.numel() else 0.0


@dataclass(frozen=True)
class Outcome:
    """What one run gave: output, gradients at x and at every parameter."""

    tensors: dict[str, Tensor]

    def errors(self, other: Outcome) -> dict[str, float]:
        """Relative error of every tensor against the other's, NaN-aware: NaN must be in the same places."""
        found = {}
        # a gradient that is zero in exact arithmetic is rounding noise of the size of the others
        floor = 0.1 * max([_rms(t) for t in other.tensors.values()] + [1.0])
        for name, truth in other.tensors.items():
            mine = self.tensors[name].double()
            truth = truth.double()
            if not torch.equal(mine.isnan(), truth.isnan()) or mine.shape != truth.shape:
                found[name] = float("inf")
                continue
            gap = (mine - truth).nan_to_num()
            scale = max(_rms(truth), floor)
            found[name] = _rms(gap) / scale
        return found


def run(layer: Mixer, x: Tensor, backend: str) -> Outcome:
    """Output and every gradient of a layer on one backend, for a fixed upstream gradient."""
    layer.backend = backend
    if layer.sampler is not None:
        layer.sampler[1] = 7
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    context = context_for(layer, x)
    y = layer(x) if context is None else layer(x, context)
    steps = torch.arange(y.numel(), dtype=torch.float64)
    y.backward((torch.cos(steps) + 0.5).to(y).view_as(y))
    found = {"y": y.detach(), "x": x.grad}
    if context is not None:
        found["context"] = context.grad
    for name, p in layer.named_parameters():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return Outcome({name: t for name, t in found.items() if t is not None})


def context_for(layer: Mixer, x: Tensor) -> Tensor | None:
    """A second input for a layer that reads one: a sequence of five positions, whatever the grid of x."""
    if not layer.operation.needs_context:
        return None
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(1, layer.context_channels, 5, *(1,) * (x.dim() - 3), generator=generator).to(x)
    return one.repeat(x.shape[0], *(1,) * (x.dim() - 1)).requires_grad_()


def forward(layer: Mixer, x: Tensor) -> Tensor:
    """The layer's output, with a `context_for` where it reads a second input."""
    context = context_for(layer, x)
    y: Tensor = layer(x) if context is None else layer(x, context.detach())
    return y


def grid_for(op: Operation, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Causal windows that name no axes are for sequences: their grid keeps the first axis only."""
    return grid[:1] if op.for_sequences else grid


def fitted(op: Operation, grid: tuple[int, ...]) -> Operation:
    """The operation with its tables made for as many positions as the grid has."""
    return op.map(lambda part: part.sized(math.prod(grid)))


def make(
    op: Operation | str,
    grid: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    channels: int = 8,
    batch: int = 2,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Mixer, Tensor]:
    """A layer in training mode, and an input for it."""
    op = parse(op) if isinstance(op, str) else op
    grid = grid_for(op, grid)
    op = fitted(op, grid)
    generator = torch.Generator().manual_seed(seed)
    layer = Mixer(op, channels, channels, ndim=len(grid))
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5 + (p.dim() > 1) * 0.1)
    x = torch.randn(batch, channels, *grid, generator=generator)
    return layer.to(device, dtype).train(), x.to(device, dtype)


def backends_of(op: Operation, ndim: int, dtype: torch.dtype, device: str = "cpu") -> list[str]:
    """Backends that run every part of an operation, and "auto"; the oracle is the truth, not a candidate."""
    able = [
        {n for n, v in verdicts(Facts(p, ndim, dtype, device, True)).items() if v.ok and n != "oracle"}
        for p in op.parts
    ]
    return ["auto", *sorted(set.intersection(*able))]


def conform(
    op: Operation | str,
    grid: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    device: str = "cpu",
) -> float:
    """Compare every backend of an operation with the oracle; the largest error over all tensors.

    Raises:
        AssertionError: naming operation, backend, dtype, tensor, error and budget.

    >>> conform("window(3) | box | kernel", (5, 4)) < 1e-12
    True
    """
    layer, x = make(op, grid, dtype, seed=seed, device=device)
    truth = run(layer, x, "oracle")
    worst = 0.0
    for backend in backends_of(layer.operation, x.dim() - 2, dtype, x.device.type):
        for name, error in run(layer, x, backend).errors(truth).items():
            worst = max(worst, error)
            if not error <= BUDGET[dtype]:
                raise AssertionError(
                    f"{layer.operation} on {backend}, grid {tuple(x.shape[2:])}, {dtype}: {name} is off by "
                    f"{error:.2e} (budget {BUDGET[dtype]:.0e})"
                )
    return worst


@contextlib.contextmanager
def poisoned_empties() -> Iterator[None]:
    """Inside, memory that torch.empty leaves unset is NaN, so that reading it shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic  # a module whose attribute is a property: no type checker knows it
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def tie_prone(op: Operation) -> bool:
    """Whether positions are equally near in exact arithmetic only, so that rounding decides which comes first.

    The zero border of ``padding`` differs in coordinates alone, and mirrored ones are equally far from a query.
    """
    for part in op.parts:
        near = part.path.similarity
        if meaning(part.path).border(part) and (near.coordinates or 0 < getattr(near, "lam", 0) < 1):
            return True
    return False


def check_gradients(op: Operation | str, grid: tuple[int, ...] = (3, 4)) -> None:
    """torch.autograd.gradcheck of output against input and every parameter, float64, on the chosen backend."""
    layer, x = make(op, grid, batch=1)
    names = [n for n, _ in layer.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        if layer.sampler is not None:
            layer.sampler[1] = 7
        params = dict(zip(names, values, strict=True))
        context = context_for(layer, x)
        y: Tensor = torch.func.functional_call(layer, params, (x,) if context is None else (x, context.detach()))
        return y

    values = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=True, atol=1e-6)


def check_compiled(layer: torch.nn.Module, inputs: list[Tensor], backend: str = "aot_eager") -> None:
    """torch.compile(fullgraph=True) gives the eager output and input gradient, at every size in turn."""
    layer.eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for x in inputs:
        a, b = (x.detach().clone().requires_grad_() for _ in range(2))
        context = context_for(layer, x) if isinstance(layer, Mixer) else None
        more = () if context is None else (context.detach(),)
        y, z = layer(a, *more), compiled(b, *more)
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
        y.sum().backward()
        z.sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)


def operations() -> Any:
    """A hypothesis strategy over valid `Basic` operations, drawn from the registry of words."""
    from hypothesis import strategies as st

    def value(cls: type[Word], hint: Any, name: str) -> Any:
        members = typing.get_args(hint) or (hint,)
        if name == "by":
            return st.one_of(st.none(), st.none(), words("similarity"), words("selector"))
        for kind, word in (("similarity", Similarity), ("candidates", Candidates)):
            if word in members:
                return words(kind)
        table: dict[str, Any] = {
            "k": st.integers(1, 12),
            "size": st.sampled_from([1, 2, 3, 5]),
            "dilation": st.integers(1, 2),
            "stride": st.integers(1, 3),
            "step": st.integers(1, 3),
            "lam": st.sampled_from([0.0, 0.3, 1.0]),
            "heads": st.sampled_from([1, 2, 4]),
            "groups": st.sampled_from([1, 2]),
            "r": st.integers(1, 5),
            "inset": st.integers(0, 1),
            "scale": st.sampled_from([1.0, 0.5, -1.0]),
            "project": st.sampled_from([None, "none", "v", "qk", "qkv", "qkvo"]),
            "metric": st.sampled_from(["euclidean", "cosine", "chebyshev"]),
            "padding": st.sampled_from([0, 1, 2, "same"]),
            "include_self": st.sampled_from([False, True, 0.5]),
            "again": st.sampled_from([None, -0.1]),
            "recall": st.sampled_from([1.0, 0.9]),  # exact at such sizes
            "coordinates": st.sampled_from([False, True, "sinusoidal", "fourier", "learned"]),
            "bias": st.sampled_from(["none", "none", "table", "alibi"]),
            "mode": st.sampled_from(["zeros", "reflect", "inside"]),
            "shift": st.integers(0, 2),
            "state": st.integers(1, 5),
            "order": st.sampled_from(ORDERS),
            "axes": st.sampled_from([(), (0,), (1,), (0, 1)]),
            "kv": st.sampled_from([None, 1, 2]),
            "reduction": st.integers(0, 3),
            "activation": st.sampled_from(["none", "softmax", "sigmoid"]),
            "count": st.integers(1, 3),
            "temperature": st.sampled_from([1.0, 30.0]),
            "scan_heads": st.sampled_from([None, 1, 2]),
            "rank": st.sampled_from([None, 2]),
            "inputs": st.just(1),  # made to fit by `fitted`
            "outputs": st.none(),
        }
        if name in table or bool in members:
            return table.get(name, st.booleans())
        return st.sampled_from(_seen(cls, name))  # of a word that this table does not know

    def words(kind: str) -> Any:
        def build(cls: type) -> Any:
            hints = typing.get_type_hints(cls)
            fields = {f.name: value(cls, hints[f.name], f.name) for f in dataclasses.fields(cls)}
            return st.fixed_dictionaries(fields).map(lambda kwargs: _attempt(cls, **kwargs))

        return st.sampled_from(sorted(WORDS[kind].values(), key=lambda c: c.word)).flatmap(build).filter(bool)

    def assemble(parts: tuple[Any, ...]) -> Operation | None:
        path, shape, rho, kernel = parts
        if shape.word not in path.shapes:
            return None
        op = _attempt(Basic, path, shape, _attempt(Weight, rho, kernel))
        return op if op is not None and _attempt(Mixer, op, 8) is not None else None

    kernels = st.one_of(st.none(), words("kernel"))
    parts = st.tuples(words("path"), words("shape"), words("rho"), kernels)
    return parts.map(assemble).filter(lambda op: op is not None)


def _seen(cls: type[Word], name: str) -> list[Any]:
    """The values that an argument has in the word's own examples."""
    inside = [word for text in cls.examples.values() for word in words_in(parse(text)) if type(word) is cls]
    values = list(dict.fromkeys(getattr(word, name) for word in inside))
    if not values:
        raise ValueError(f"{cls.__name__}.{name}: no values to draw; give {cls.__name__} examples = {{name: notation}}")
    return values


def _attempt(make_it: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return make_it(*args, **kwargs)
    except ValueError:
        return None

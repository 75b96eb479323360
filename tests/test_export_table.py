"""Every operator that has a name leaves by torch.export and comes back: as it is, and in core ATen without ours.

In core ATen it computes what the library does: ties, NaN and odd sizes included.
"""

from __future__ import annotations

import io
import logging

import pytest
import torch
from helpers.cells import slow_but
from torch.export import Dim

import nearfold.kernels
from nearfold.export import decompositions
from nearfold.export.table import LEFT_OUT, torchs
from nearfold.grammar import CATALOGUE
from nearfold.nn import ConvNN2d, Mixer
from nearfold.testing import context_for, make

QUICK = (
    "local_nearest",
    "vsa",
    "convnn",
    "indexed",
    "attention_local",
    "deformable_v2",
    "mamba",
    "gated_deltanet",
    "entmax",
    "vig",
    "nsa",
)


SPREAD = ("hyena", "hyena_heads", "s4d", "ckconv")
"""By FFT a NaN spreads over the whole map, by core ATen only to what reads it."""


ANGLES = [n for n, entry in CATALOGUE.items() if "cosine" in entry.notation or "blend" in entry.notation]
"""Whole vectors at equal angles are equally near only up to rounding."""


NOT = {"nan": SPREAD, "whole": ANGLES, "equal": ("local_nearest",)}
"""The last one reads a position once that the window has, too: then it counts which of equal ones is chosen, and the
projections, products of other shapes, round equal positions to nearly equal ones."""


def operators():
    """The names of all operators that are no gradients."""
    import importlib
    import pkgutil

    for module in pkgutil.iter_modules(nearfold.kernels.__path__):
        if module.name != "triton":
            importlib.import_module(f"nearfold.kernels.{module.name}")
    names = {
        n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("nearfold::")
    }
    return {n for n in names if not n.endswith("_backward")}


def test_every_operator_has_a_form_or_a_reason():
    had = {op._schema.name.split("::")[1] for op in decompositions()}
    assert had | LEFT_OUT.keys() == operators() and not had & LEFT_OUT.keys()


def lowered(layer, inputs, **options):
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    with torch.no_grad():
        return in_aten(torch.export.export(layer, inputs, **options))


def in_aten(exported):
    program = exported.run_decompositions(decompositions())
    left = [str(node.target) for node in program.graph.nodes if "nearfold" in str(node.target)]
    assert not left, left
    return program.module()


def inputs_like(x, kind):
    draws = torch.Generator().manual_seed(3)
    if kind == "whole":
        return torch.randint(-2, 3, x.shape, generator=draws).to(x.dtype)
    if kind == "equal":  # the same seven positions again and again
        few = torch.randn(*x.shape[:2], 7, generator=draws).to(x.dtype)
        return few[..., torch.arange(x[0, 0].numel()) % 7].view(x.shape)
    made = torch.randn(x.shape, generator=draws).to(x.dtype)
    if kind == "nan":
        made.flatten(2)[0, :, 5] = float("nan")
    return made


@pytest.mark.parametrize("name", slow_but(QUICK, CATALOGUE))
def test_a_row_loads_again_and_needs_no_operator_of_ours(name):
    """A graph that switches gradients off and on could be made, and not be saved."""
    layer, x = make(CATALOGUE[name].operation, (9, 10), torch.float64)
    context = context_for(layer.eval(), x)
    others = () if context is None else (context.detach(),)
    exported, kept = torch.export.export(layer, (x, *others)), io.BytesIO()
    torch.export.save(exported, kept)
    kept.seek(0)
    torch.testing.assert_close(torch.export.load(kept).module()(x, *others), layer(x, *others))
    program = in_aten(exported)
    for kind in ("random", "whole", "equal", "nan"):
        if name in NOT.get(kind, ()):
            continue
        given = inputs_like(x, kind)
        with torch.no_grad():
            found, wanted = program(given, *others), layer(given, *others)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(
    "notation",
    [
        "nearest(40, cosine, self) | ranked | kernel",
        *slow_but(
            ("nearest(4, scaled) | causal | softmax(heads=2)",),
            (
                "nearest(40, euclidean) | box | softmax*depthwise",
                "nearest(9, position, padding=1) | ranked | kernel",
                "nearest(5, dot, window(5)) | box | kernel",
                "nearest(5, euclidean, window(5), least=-3.5) | ranked | mean",
                "nearest(4, scaled) | causal | softmax(heads=2)",
            ),
        ),
        "window(3, mode=reflect) | box | softmax(heads=2)",
        "window(5, dilation=2, stride=2) | box | softmax(heads=2)",
    ],
)
def test_searches_and_windows_with_open_sizes(notation):
    """Also more neighbours than there are positions, and rules of where to look."""
    layer = Mixer(notation, 8).eval()
    x = torch.randn(2, 8, 9, 10)
    sizes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    program = lowered(layer, (x,), dynamic_shapes=sizes)
    for shape in ((2, 8, 9, 10), (3, 8, 14, 7), (2, 8, 5, 6)):
        given = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program(given), layer(given), rtol=1e-4, atol=1e-5)


def test_low_precision_is_computed_as_the_library_does():
    layer = ConvNN2d(8, 8, k=5).to(torch.bfloat16).eval()
    x = torch.randn(2, 8, 9, 10, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(lowered(layer, (x,))(x), layer(x), rtol=2e-2, atol=2e-2)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("op", "args", "options"),
    [
        ("sort.stable", (draw(3, 9),), {"stable": True, "dim": 0, "descending": True}),
        ("sort.stable", (draw(3, 9),), {"stable": True}),
        ("searchsorted.Tensor", (draw(5).sort().values, draw(4)), {}),
        ("searchsorted.Tensor", (torch.arange(5), torch.tensor([-1, 0, 3, 9])), {"right": True}),
        ("cummax.default", (draw(4, 7), 1), {}),
        ("log_sigmoid.default", (torch.linspace(-200, 50, 99, dtype=torch.float64),), {}),
        ("adaptive_avg_pool1d.default", (draw(2, 3, 11), [4]), {}),
        ("adaptive_avg_pool2d.default", (draw(2, 3, 5, 11), [2, 7]), {}),
    ],
)
def test_forms_of_torch_s_own_operators(op, args, options):
    name, overload = op.split(".")
    ours = getattr(getattr(torch.ops.aten, name), overload)
    torch.testing.assert_close(torchs.table()[ours](*args, **options), ours(*args, **options))


def test_qr_is_one_with_a_positive_diagonal():
    x = draw(2, 6, 4)
    q, r = torchs.linalg_qr(x)
    torch.testing.assert_close(q @ r, x)
    torch.testing.assert_close(q.mT @ q, torch.eye(4, dtype=x.dtype).expand(2, 4, 4))
    assert (r.diagonal(dim1=-2, dim2=-1) > 0).all() and torch.equal(r, r.triu())

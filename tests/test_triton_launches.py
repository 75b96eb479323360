"""What our kernels are launched with, asked for on the meta device: at the benchmark's own sizes, and nothing runs."""

from __future__ import annotations

import re
import subprocess
from unittest import mock

import pytest
import test_torch_stack as stack
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from nearfold.kernels import aggregate_torch, cuda
from nearfold.kernels.triton import compiled, launches, sass
from nearfold.nn import Mixer
from nearfold.nn.functional import knn_attention


@triton.jit(do_not_specialize=("free",))
def toy(x, y, nothing, one, even, odd, large, free, flag, real, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0)


def launched(**options) -> launches.Launch:
    toy.fn.__module__ = "nearfold.toy"  # of others' kernels nothing is kept
    numbers = torch.empty(20, dtype=torch.bfloat16, device="meta")
    with launches.asked() as found:
        toy[(3,)](numbers, numbers[1:], None, 1, 48, 17, 2**31, 1, True, 2.0, BLOCK=16, **options)
    (launch,) = found
    return launch


def test_a_launch_is_written_as_triton_compiles_it():
    launch = launched(num_warps=8, maxnreg=128)
    variant = launch.variant()
    assert launch.name == "toy.toy" and launch.grid == (3,)
    assert variant["constexprs"] == {"nothing": None, "one": 1, "BLOCK": 16}
    assert variant["signature"] == {
        "x": "*bf16",
        "y": "*bf16:1",
        "even": "i32:16",
        "odd": "i32",
        "large": "i64:16",
        "free": "i32",
        "flag": "i1",
        "real": "fp32",
    }
    assert (variant["num_warps"], variant["num_stages"], variant["maxnreg"]) == (8, 3, 128)


def test_launches_that_one_compilation_serves_have_one_key():
    assert launches.key(launched().variant()) == launches.key(launched(num_stages=3).variant())
    assert launches.key(launched().variant()) != launches.key(launched(num_stages=2).variant())


def test_a_launch_that_is_seen_is_made(monkeypatch):
    made = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *given, **named: made.append((self, given, named)))
    monkeypatch.setattr(toy.fn, "__module__", "nearfold.toy")
    numbers = torch.empty(20)
    with launches.seen() as found:
        toy[(3,)](numbers, numbers, None, 1, 48, 17, 1, 1, True, 2.0, BLOCK=16, num_warps=2)
        assert len(found) == 1 and found[0].options["num_warps"] == 2
    ((fn, given, named),) = made
    assert fn is toy and given[0] is numbers and given[3:] == (1, 48, 17, 1, 1, True, 2.0)
    assert named == {"grid": (3,), "warmup": False, "BLOCK": 16, "num_warps": 2}
    monkeypatch.setattr(toy.fn, "__module__", "another.library")
    with launches.seen() as found:
        toy[(3,)](numbers, numbers, None, 1, 48, 17, 1, 1, True, 2.0, BLOCK=16)
    assert len(made) == 2 and not found


def test_of_any_size_and_without_a_device():
    q, k, v = torch.empty(3, 64, 64, 2**16, 64, device="meta", dtype=torch.bfloat16).requires_grad_().unbind()
    with launches.asked() as found:
        y = knn_attention(q, k, v, 9)
        y.backward(torch.empty_like(y))
    assert y.shape == q.shape
    names = {launch.name.partition(".")[0] for launch in found}
    assert names == {"threshold", "softmax", "aggregate", "by_key", "select_backward"}  # too many keys for two passes
    (largest,) = {launch.arguments["M"] for launch in found if launch.name == "threshold._select_kernel"}
    assert largest == 2**16


@pytest.mark.parametrize(
    ("operation", "kernel"),
    [
        ("window(3) | box | softmax(heads=2)", "local_attention._key_kernel"),
        ("deformable(3) | box | modulated*kernel", "corners._backward_kernel"),
        ("scan(state=3) | causal | selective", "scan._gradient_kernel"),
    ],
)
def test_layers_ask_for_their_kernels(operation, kernel):
    layer = Mixer(operation, 8, 8).to("meta")
    with launches.asked() as found:
        layer(torch.empty(2, 8, 9, 10, device="meta")).sum().backward()
    assert kernel in {launch.name for launch in found}


BY_TORCH = {"GatedDeltaNet"}
"""Layers that PyTorch's own operators do on a GPU."""

WAITS = pytest.mark.xfail(
    strict=True,
    raises=RuntimeError,
    reason="windows that move inside have no kernel for their scores: PyTorch walks over tiles, and looks at indices",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=WAITS) if n == "NeighborhoodAttention2d" else n for n in stack.LAYERS]
)
def test_nothing_waits_for_the_device(name):
    """A CUDA graph could not hold that; on the meta device there is no number to wait for."""
    layer, x = stack.made(name, "meta")
    walk = aggregate_torch.tiles
    with launches.asked() as found, mock.patch.object(aggregate_torch, "tiles", walk):
        layer(x.requires_grad_()).sum().backward()
    assert bool(found) is (name not in BY_TORCH)


def test_outside_it_nothing_is_asked_for_or_patched():
    before = triton.runtime.jit.KernelInterface.__getitem__
    with launches.asked():
        assert cuda.kernels("select", torch.empty(1, device="meta")) is not None
    assert cuda.kernels("select", torch.empty(1, device="meta")) is None
    assert triton.runtime.jit.KernelInterface.__getitem__ is before


# Where an axis of length 1 is mirrored, a coordinate is inside if -|i| > -1, which ptxas 12.8 and 12.9 take for false.
# Triton 3.6 wrote it so; the second asks for a register that is zero, which any assembler may see through.
MIRROR = tl.constexpr("abs.s32 $0, $1; neg.s32 $0, $0;")
NEVER = tl.constexpr("and.b32 $0, $1, 0; add.s32 $0, $0, -1;")
PLAIN = tl.constexpr("mov.u32 $0, $1;")


@triton.jit
def read_inside(x, out, count, CODE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, count):
        i = tl.inline_asm_elementwise(CODE, "=r,r", [at + k], dtype=tl.int32, is_pure=True, pack=1)
        total += tl.load(x + at, mask=i > -1, other=0.0)
    tl.store(out + at, total)


def reads(code: str) -> dict:
    types = {"x": "*fp32", "out": "*fp32", "count": "i32"}
    return compiled.compile_variant(
        {"fn": read_inside, "signature": types, "constexprs": {"CODE": code, "BLOCK": 128}}, 90
    )


def test_loads_that_the_assembler_drops_are_seen():
    kept, gone = reads(PLAIN.value), reads(NEVER.value)
    assert "lost" not in kept and kept["ptx_loads"] == 1 <= kept["sass_loads"]
    assert gone["lost"] == "loses loads: 1 before the assembler, 0 after it"


def test_a_mirrored_axis_of_length_one_is_read_by_some_assemblers_only():
    said = subprocess.run([sass.tool("ptxas"), "--version"], capture_output=True, text=True, check=True).stdout
    if not re.search(r"release 12\.[89]\b", said):
        pytest.skip(f"another ptxas than those known for it: {said.splitlines()[-1]}")
    assert "loses loads" in reads(MIRROR.value)["lost"]

"""What our kernels are launched with, asked for on the meta device: at the benchmark's own sizes, and nothing runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from nearfold.kernels import cuda
from nearfold.kernels.triton import launches
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


def test_of_any_size_and_without_a_device():
    q, k, v = torch.empty(3, 64, 64, 2**16, 64, device="meta", dtype=torch.bfloat16).requires_grad_().unbind()
    with launches.asked() as found:
        y = knn_attention(q, k, v, 9)
        y.backward(torch.empty_like(y))
    assert y.shape == q.shape
    names = {launch.name.partition(".")[0] for launch in found}
    assert names == {"select", "aggregate"}
    (largest,) = {launch.arguments["M"] for launch in found if launch.name.startswith("select")}
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


def test_outside_it_nothing_is_asked_for_or_patched():
    before = triton.runtime.jit.KernelInterface.__getitem__
    with launches.asked():
        assert cuda.kernels("select", torch.empty(1, device="meta")) is not None
    assert cuda.kernels("select", torch.empty(1, device="meta")) is None
    assert triton.runtime.jit.KernelInterface.__getitem__ is before

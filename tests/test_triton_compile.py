"""Every Triton kernel compiles for A100 and H100/H200 without a device, and stays within what they have.

The modules of nearfold.kernels.triton that list VARIANTS are found by themselves. To save time, of every kernel only
the smallest and the largest variant of each element width is compiled for sm_90, and the largest for sm_80; all of
them: `python -m nearfold.kernels.triton.compiled`. In a process of its own, for the tests of the kernels themselves
need Triton's interpreter, which compiles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from helpers import gpu_launches

from nearfold.kernels.triton import compiled as compiled_module
from nearfold.kernels.triton.compiled import NUMBERS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SHARED = {80: 160 * 1024, 90: 227 * 1024}  # bytes that a block may have
SPILLS = {  # (module, kernel): bytes that a thread may spill; others none
    ("aggregate", "_dense_entries_kernel"): 16,
    ("grouped_conv", "_conv_kernel"): 8,
    ("scan", "_gradient_kernel"): 64,
    ("select_backward", "_query_kernel"): 8,
    ("threshold", "_select_kernel"): 64,
}

# A product that tensor cores and asynchronous copies serve, one that asks for too much shared memory, and a kernel
# whose values cannot fit into one warp's registers.
TOY = """
import triton
import triton.language as tl


@triton.jit
def product(a, b, out, N, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    square = at[:, None] * stride + at[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        total += tl.dot(tl.load(a + start * BLOCK + square), tl.load(b + start * BLOCK + square))
    tl.store(out + square, total)


@triton.jit
def crowded(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(out + at, value - tl.sum(value))


def of_product(block, stages):
    return lambda: dict(
        fn=product,
        signature={"a": "*bf16", "b": "*bf16", "out": "*fp32", "N": "i32", "stride": "i32:16"},
        constexprs={"BLOCK": block},
        num_warps=4,
        num_stages=stages,
    )


def of_crowded():
    return dict(fn=crowded, signature={"x": "*fp32", "out": "*fp32"}, constexprs={"SIZE": 8192}, num_warps=1)


VARIANTS = [of_product(64, 3), of_product(32, 2), of_product(128, 5), of_crowded]
"""


def compiled(*arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "nearfold.kernels.triton.compiled", *arguments, "--json"],
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), path]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def results(*arguments: str, path: str = "") -> list[dict]:
    done = compiled(*arguments, path=path)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(result: dict, tiny: bool = False) -> list[str]:
    """What is beyond the bounds, in words; at tiny sizes nobody minds what is spilled."""
    who = f"{result['module']}.{result['kernel']} {result['constexprs']} for sm_{result['arch']}"
    spills = SPILLS.get((result["module"], result["kernel"]), 0)
    if "error" in result:
        return [f"{who} does not compile: {result['error'][-1500:]}"]
    found = [f"{who} {result['lost']}"] if "lost" in result else []
    if result["stack"] > spills and not tiny:
        found.append(f"{who} spills {result['stack']} bytes, allowed {spills}")
    if result["shared"] > SHARED[result["arch"]]:
        found.append(f"{who} takes {result['shared']} bytes of shared memory, there are {SHARED[result['arch']]}")
    return found


@pytest.mark.parametrize(("arch", "which"), [("80", "largest"), ("90", "extremes")])
def test_every_kernel_compiles_and_fits(arch, which, record_property):
    found = results("--arch", arch, "--choose", which)
    known = {(result["module"], result["kernel"]) for result in found}
    assert known and known >= SPILLS.keys(), "a kernel in SPILLS is gone"
    for result in found:
        label = f"{result['module']}.{result['kernel']} {result['types']} {result['constexprs']} sm_{arch}"
        record_property(label, {n: result.get(n) for n in NUMBERS})
    faulty = [line for result in found for line in faults(result)]
    assert not faulty, "\n".join(faulty)


@pytest.mark.parametrize("part", ["benchmark", "aggregate", "others"])
def test_what_is_launched_compiles_and_fits(part):
    """With the options of a launch, for every specialisation that the benchmark and the GPU's tests ask for.

    Of each one type; all types, and tiles of every size: NEARFOLD_LAUNCHES=all, ten minutes.
    """
    if part == "benchmark":
        variants = gpu_launches.distinct(gpu_launches.benchmark(), whole=True)
    else:
        found = gpu_launches.distinct(gpu_launches.tests(), whole=os.environ.get("NEARFOLD_LAUNCHES") == "all")
        variants = [v for v in found if v["fn"].__module__.endswith(".aggregate") == (part == "aggregate")]
    assert len(variants) > 20
    faulty = []
    for variant in variants:
        result = compiled_module.described(variant, 90)
        try:
            result |= compiled_module.compile_variant(variant, 90)
            single = of_one_feature(variant)
            if "lost" in result and single and "lost" not in compiled_module.compile_variant(single, 90):
                del result["lost"]
        except Exception as error:
            result["error"] = repr(error)
        faulty += faults(result, tiny=part != "benchmark")
    assert not faulty, "\n".join(faulty)


def of_one_feature(variant: dict) -> dict | None:
    """The variant of a head of one feature, without the compiler's knowledge that it is one; None for others.

    Known to be one, all lanes beyond the first are dead, and the assembler is right to take their loads away.
    """
    known = {n: v for n, v in variant["constexprs"].items() if n in ("e", "d", "e_read", "d_read") and v == 1}
    if not known:
        return None
    rest = {n: v for n, v in variant["constexprs"].items() if n not in known}
    return variant | {"signature": variant["signature"] | dict.fromkeys(known, "i32"), "constexprs": rest}


def test_the_bounds_see(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    found = results("toy", "--arch", "90", "--choose", "extremes", path=str(tmp_path))
    assert [(r["kernel"], r["constexprs"].get("BLOCK")) for r in found] == [
        ("product", 32),
        ("product", 128),
        ("crowded", None),
    ]
    small, large, crowded = found
    assert not faults(small) and 0 < small["registers"] <= 255
    assert "shared memory" in faults(large)[0] and large["tensor_cores"] == "wgmma"
    assert "spills" in faults(crowded)[0]
    odd = results("toy", "--arch", "90", "--choose", "extremes", "--odd", path=str(tmp_path))
    assert [r["registers"] for r in odd] != [r["registers"] for r in found]


def test_it_refuses_what_it_cannot_compile(tmp_path):
    (tmp_path / "toy.py").write_text(TOY.replace('"N": "i32", ', ""))
    done = compiled("toy", "--arch", "90", path=str(tmp_path))
    assert done.returncode == 1
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(("signature lacks N" in faults(r)[0]) == (r["kernel"] == "product") for r in found)
    done = compiled("toy", path=str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset it" in done.stderr

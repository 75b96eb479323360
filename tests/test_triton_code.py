"""Faults of Triton and its assembler that kernels keep clear of; and loads and stores are still there in machine code.

ptxas 12.8.93 and 12.9.86 take -|i| > -1 for false, which i = 0 makes true: where an axis of one position was mirrored
by n - 1 - |n - 1 - |i||, window attention's backward kept none of its 48 loads. Which instructions Triton makes of a
formula differs by its version: with 3.6 the old formula fails here, with 3.9 it does not.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import nearfold

pytest.importorskip("triton", reason="triton is not installed")

from nearfold.kernels.triton import compiled, sass

ARCH = 90
KERNELS = Path(nearfold.__file__).parent / "kernels" / "triton"
TOY = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry toy(.param .u64 x, .param .u64 out)
{{
  .reg .pred %there; .reg .b32 %i, %found; .reg .b64 %from, %to;
  ld.param.u64 %from, [x];
  ld.param.u64 %to, [out];
  mov.u32 %i, %tid.x;
  {condition}
  mov.b32 %found, 0;
  @%there ld.global.b32 %found, [%from];
  st.global.b32 [%to], %found;
  ret;
}}
"""
CONDITIONS = {
    "kept": "setp.gt.s32 %there, %i, 3;",
    "never true": "xor.b32 %i, %i, %i; setp.gt.s32 %there, %i, 3;",
    "the fault": "abs.s32 %i, %i; neg.s32 %i, %i; setp.gt.s32 %there, %i, -1;",
}


def lost(ptx: str, cubin: bytes) -> str:
    """What the assembler has dropped of loads and stores, in words."""
    return compiled.lost(sass.traffic(ptx, sass.instructions(sass.dump(cubin, "-sass"))))


def scans(source: str) -> list[tuple[int, bool]]:
    """Lines with an associative scan, and whether it says how it runs."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    found = [call for call in calls if getattr(call.func, "attr", "") == "associative_scan"]
    return [(call.lineno, len(call.args) > 3 or any(k.arg == "reverse" for k in call.keywords)) for call in found]


def test_no_scan_is_reversed():
    """Triton's are wrong on a device where the order of steps matters, and right in the interpreter."""
    for given in ("reverse=True", "True"):
        assert scans(f"tl.associative_scan(x, 0, f, {given})") == [(1, True)]
    found = {file.name: scans(file.read_text()) for file in KERNELS.glob("*.py")}
    assert any(found.values())
    assert not [(name, line) for name, lines in found.items() for line, reversed_ in lines if reversed_]


@pytest.mark.slow
@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_count_sees(condition, tmp_path):
    ptx = TOY.format(condition=CONDITIONS[condition])
    (tmp_path / "toy.ptx").write_text(ptx)
    made = tmp_path / "toy.cubin"
    subprocess.run([sass.tool("ptxas"), f"-arch=sm_{ARCH}", tmp_path / "toy.ptx", "-o", made], check=True)
    found = lost(ptx, made.read_bytes())
    if condition == "the fault" and not found:
        pytest.skip("this ptxas knows that -|0| > -1")
    assert found == ("" if condition == "kept" else "loses loads: 1 before the assembler, 0 after it")


def windows() -> list[dict[str, Any]]:
    """Of window attention, mirrored, what 32 features of a head compile."""
    from nearfold.kernels.triton import local_attention as kernels

    found = [make() for make in kernels.VARIANTS]
    return [v for v in found if v["constexprs"].get("MIRROR") == 1 and v["constexprs"]["BE"] == 32]


@pytest.mark.slow
def test_mirrored_windows_keep_their_loads():
    """On two axes, the third has one position and is known to: ACmix's window attention."""
    seen = set()
    for variant in windows():
        constants = variant["constexprs"]
        assert constants["n0"] == 1
        made = compiled.built(variant, ARCH)
        name = variant["fn"].__name__
        assert "ld.global" in made.asm["ptx"] and "st.global" in made.asm["ptx"]
        assert not (gone := lost(made.asm["ptx"], made.asm["cubin"])), f"{name} {constants}: {gone}"
        seen.add(name)
    assert seen == {"_forward_kernel", "_query_kernel", "_key_kernel"}


def bytes_of_loads(ptx: str) -> list[int]:
    """Of every load from memory, how many bytes a thread reads at once.

    >>> bytes_of_loads("@%p1 ld.global.v4.b32 {...}; ld.global.L1::evict_last.b16 { %rs1 }")
    [16, 2]
    """
    found = re.findall(r"\bld\.global\b\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return [int(many or 1) * int(bits) // 8 for many, bits in found]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["attention_scale", "attention_scale_entries", "attention_scale_rows"])
def test_rows_of_a_head_are_read_in_wide_pieces(case):
    """Of 64 features, 16 bytes at a time: a head's width is an argument, for a quotient is no known multiple of 16."""
    from nearfold.kernels.triton import aggregate as kernels

    (variant,) = [make() for make in kernels.VARIANTS if make.__name__ == case]
    loads = bytes_of_loads(compiled.built(variant, ARCH).asm["ptx"])
    assert loads.count(16) >= 2
    assert loads.count(2) <= 4, f"{loads.count(2)} loads of one number"  # of alpha


@pytest.mark.slow
def test_windows_are_read_in_wide_pieces():
    """Features of a position lie side by side, whatever the operands' layout."""
    for variant in windows():
        loads = bytes_of_loads(compiled.built(variant, ARCH).asm["ptx"])
        name = f"{variant['fn'].__name__} {variant['signature']['query']}"
        assert set(loads) <= {4, 16} and loads.count(16) > loads.count(4), f"{name}: {loads}"  # 4: a row's softmax


@pytest.mark.slow
def test_channels_of_a_group_are_read_along_their_positions():
    """Threads beside one another read numbers beside one another, and a channel's weights in wide pieces."""
    from nearfold.kernels.triton import grouped_conv as kernels

    found = [make() for make in kernels.VARIANTS if make()["fn"] is kernels._conv_kernel]
    found = [v for v in found if v["constexprs"]["BLOCK_W"] >= 4 and v["constexprs"]["SHIFT"]]
    assert found
    for variant in found:
        ptx, constants = compiled.built(variant, ARCH).asm["ptx"], variant["constexprs"]
        loads = bytes_of_loads(ptx)
        weights, near = constants["BLOCK_W"] // 4, constants["BLOCK_M"] // 128  # loads of a thread for a channel
        assert loads.count(16) * near == (len(loads) - loads.count(16)) * weights > 0, f"{constants}: {loads}"
        assert "shfl" not in ptx


@pytest.mark.slow
def test_recurrences_stay_in_a_thread():
    """Of the scan's gradient: a thread holds many positions of a channel, so few numbers go from thread to thread."""
    from nearfold.kernels.triton import scan as kernels

    found = [v for v in (make() for make in kernels.VARIANTS) if v["fn"] is kernels._gradient_kernel]
    assert found
    for variant in found:
        numbers = variant["constexprs"]["T"] * variant["constexprs"]["BC"] // 32  # of a thread
        exchanged = compiled.built(variant, ARCH).asm["ptx"].count("shfl")
        assert exchanged < 24 * numbers, f"{exchanged} for {numbers} numbers"  # 21; 31 were rows known to be aligned

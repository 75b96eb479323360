"""A launch as an H200 would run it at best: what its compiled code takes of every unit, and of which the most.

A bound is from below: the shortest way through a loop, nothing waits for memory, every multiprocessor is busy.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, inf

from torch import Tensor

from benchmarks.gpu.work import WORK, Main
from nearfold.kernels.triton import compiled, launches, sass
from nearfold.kernels.triton.launches import Launch
from nearfold.kernels.triton.sass import Instruction, Loop

# An H200, and what a multiprocessor does in a clock (NVIDIA, CUDA C++ Programming Guide, "Throughput of Native
# Arithmetic Instructions", capability 9.0; Hopper's white paper).
PROCESSORS, SCHEDULERS, LANES = 132, 4, 32
CLOCK = 1.83e9  # what it holds under load; its boost is 1.98
BYTES, TENSOR = 4.8e12, 989e12  # a second, of memory and of bfloat16 on the tensor cores (half of it in TF32)
REGISTERS, WARPS, BLOCKS, SHARED = 65536, 64, 32, 228 * 1024

MOST_A_SCORE, WIDE = 8, 8  # the targets for main loops: instructions of a search, bytes a lane of a read

# names of instructions, and how many clocks one of a warp keeps a scheduler's share of its unit
HALF = (
    *("IADD3", "LOP3", "SHF", "LEA", "PRMT", "SEL", "FSEL", "ISETP", "FSETP", "PLOP3", "FMNMX", "IMNMX"),
    *("VIMNMX", "IABS", "I2F", "F2I", "I2FP", "F2F"),
)
CLOCKS = {**dict.fromkeys(HALF, 2), **dict.fromkeys(("MUFU", "POPC", "FLO"), 8), "SHFL": 4}
LOST = "main loops that read nothing"
MEMORY = (*sass.READS, *sass.WRITES, "LDS", "STS", "LDSM")


@dataclass(frozen=True)
class Counted:
    """A main loop as compiled: for one unit the instructions on the shortest way and in all, and what is among them."""

    main: Main
    least: float
    all: float
    half: float  # clocks of the unit for integers and comparisons, as instructions that keep the scheduler
    loads: tuple[int, ...]  # bytes a lane, of every read of global memory
    ffma: int
    spills: int
    within: int  # instructions of the loops within
    unrolled: int

    @property
    def misses(self) -> list[str]:
        """Which of the code's own targets it misses."""
        found: list[str] = []
        if self.main.trips == 0:
            return found
        if self.main.unit == "score" and self.least > MOST_A_SCORE:
            found.append(f"{self.least:.1f} instructions a score, more than {MOST_A_SCORE}")
        if self.main.product and self.ffma:
            found.append(f"{self.ffma} FFMA in a product that tensor cores could make")
        if narrow := sum(width < WIDE for width in self.loads):
            found.append(f"{narrow} of {len(self.loads)} reads below {WIDE} bytes a lane")
        if self.spills:
            found.append(f"{self.spills} instructions for what is spilled")
        return found


@dataclass(frozen=True)
class Kernel:
    """A launch, compiled."""

    name: str
    launch: Launch
    registers: int
    shared: int
    stack: int
    loops: tuple[Counted, ...]
    bounds: dict[str, float]  # milliseconds, by what takes them

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at a time.

        A warp's registers are given out by 256, shared memory by 128 bytes, and 1 KiB of it a program is the system's.
        """
        return resident(self.registers, self.shared, self.launch.options["num_warps"])

    @property
    def bound(self) -> float:
        """Milliseconds."""
        return max(self.bounds.values())


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs of so many registers a thread, bytes and warps that a multiprocessor of an H200 holds.

    >>> resident(255, 0, 4), resident(128, 40960, 4), resident(32, 0, 1)
    (2, 4, 32)
    """
    per_warp = ceil(registers * LANES / 256) * 256
    by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps
    by_shared = SHARED // (ceil((shared + 1024) / 128) * 128)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)


def _clocks(way: Iterable[Instruction]) -> dict[str, float]:
    """Clocks of a scheduler's share of each unit, for one warp."""
    found: Counter[str] = Counter()
    for i in way:
        found["issue"] += 1
        if i.name in HALF:
            found["integers and comparisons"] += 2
        elif i.name in CLOCKS:
            found["special functions"] += CLOCKS[i.name]
        elif i.name in MEMORY:
            found["loads and stores"] += SCHEDULERS  # if lanes read the same, one is enough for any width
        elif i.name in ("HGMMA", "HMMA"):
            found["tensor cores"] += _operations(i) / (TENSOR / CLOCK / PROCESSORS / SCHEDULERS)
    return dict(found)


def _operations(i: Instruction) -> float:
    """Of one warp's part of a product, in bfloat16's: TF32 counts twice.

    >>> [_operations(Instruction(0, "", code, "")) for code in ("HGMMA.64x64x16.F32.BF16", "HMMA.16816.F32.BF16")]
    [32768.0, 4096.0]
    """
    parts = i.opcode.split(".")
    twice = 2 if "TF32" in i.opcode else 1
    if i.name == "HGMMA":
        m, n, k = map(int, parts[1].split("x"))
        return 2.0 * m * n * k / 4 * twice
    return {"16816": 4096.0, "1688": 2048.0, "1684": 1024.0}[parts[1]] * twice


def kernel(launch: Launch) -> Kernel:
    """Compile a launch, and count; ValueError where nothing says what its loops do."""
    if launch.name not in WORK:
        raise ValueError(f"{launch.name}: benchmarks/gpu/work.py does not say what its main loops do; add it to WORK")
    found = _compiled(_Key(launch))
    registers, shared, stack, code, ptx = found
    mains = WORK[launch.name](launch.arguments)
    found_loops = sass.loops(code)
    chosen = _chosen(found_loops, mains)
    if len(chosen) < len(mains):  # the assembler has lost them: what is left computes something else
        return Kernel(launch.name, launch, registers, shared, stack, (), {LOST: inf})
    warps = launch.options["num_warps"]
    total: Counter[str] = Counter(_clocks(_once(code, found_loops, chosen)))
    counted = []
    for loop, main, unrolled in zip(chosen, mains, _unrolled(found_loops, chosen, sass.ptx_loops(ptx)), strict=True):
        way = loop.shortest()
        mine = [i for i in way if i in set(loop.own)]
        within = [one for one in loop.inner if one not in chosen]
        clocks = Counter(_clocks(mine))
        for one in within:
            for unit, more in _clocks(one.shortest()).items():
                clocks[unit] += more * main.within
        for unit in clocks:
            total[unit] += clocks[unit] * main.trips / unrolled
        each = main.units * unrolled / LANES / warps
        counted.append(
            Counted(
                main,
                clocks["issue"] / each,
                (len(loop.own) + main.within * sum(len(one.own) for one in within)) / each,
                clocks["integers and comparisons"] / each,
                tuple(i.width for i in loop.own if i.name in sass.READS),
                loop.counted(("FFMA",)),
                loop.counted(sass.SPILLS),
                sum(len(one.own) for one in within),
                unrolled,
            )
        )
    programs = launch.grid[0]
    share = programs * warps / PROCESSORS / SCHEDULERS / CLOCK * 1e3
    bounds = {unit: clocks * share for unit, clocks in total.items()}
    tensors = {t.untyped_storage()._cdata: t for t in launch.arguments.values() if isinstance(t, Tensor)}
    bounds["memory"] = sum(size(t) for t in tensors.values()) / BYTES * 1e3
    return Kernel(launch.name, launch, registers, shared, stack, tuple(counted), bounds)


def _weight(loop: Loop) -> int:
    return loop.counted((*sass.READS, *sass.TENSOR_CORES))


def _once(code: list[Instruction], found: list[Loop], chosen: list[Loop]) -> list[Instruction]:
    """What is outside loops, and what is around the chosen ones, which a program goes through once at least."""
    inside = {id(i) for loop in found if loop in chosen or not _around(loop, chosen) for i in loop.own}
    return [i for i in code if id(i) not in inside]


def _around(loop: Loop, others: list[Loop]) -> bool:
    """Whether one of the others is within the loop."""
    return any(one in others or _around(one, others) for one in loop.inner)


def _chosen(found: list[Loop], mains: list[Main]) -> list[Loop]:
    """The loops that read and multiply most, and the longest that do not; in the order of the code.

    Fewer where the code has no more that read. What does not read is neither around what does nor within it.
    """
    hot = sorted((loop for loop in found if loop.is_hot), key=_weight, reverse=True)
    alone = [loop for loop in found if not loop.is_hot and not _around(loop, hot)]
    alone = [loop for loop in alone if not any(_around(one, [loop]) for one in found)]
    many = sum(main.hot for main in mains)
    cold = sorted(alone, key=lambda loop: len(loop.own), reverse=True)[: len(mains) - many]
    return sorted([*hot[:many], *cold], key=lambda loop: loop.start)


def _unrolled(found: list[Loop], chosen: list[Loop], before: list[int]) -> list[int]:
    """How often the assembler has unrolled each of the chosen loops, from what each of all read ``before``.

    Where it has left as many loops as there were, they are in the same order; else those that read more read more
    before, too. Of a loop that reads nothing it is not known, and taken to be once.
    """
    if len(found) == len(before):
        known = {loop.start: many for loop, many in zip(found, before, strict=True)}
    else:
        hot = sorted((loop for loop in chosen if loop.is_hot), key=_weight)
        known = dict(zip((loop.start for loop in hot), sorted(sorted(before)[-len(hot) :] if hot else []), strict=True))
    return [max(1, round(_weight(loop) / many)) if (many := known.get(loop.start, 0)) else 1 for loop in chosen]


class _Key:
    """A launch, equal to those that one compilation serves."""

    def __init__(self, launch: Launch) -> None:
        self.variant = launch.variant()
        self.key = launches.key(self.variant)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


@functools.cache
def _compiled(key: _Key) -> tuple[int, int, int, list[Instruction], str]:
    done = compiled.built(key.variant, 90)
    used = compiled.resources(done.asm["cubin"])
    code = sass.instructions(sass.dump(done.asm["cubin"], "-sass"))
    return used["registers"], done.metadata.shared, used["stack"], code, done.asm["ptx"]


def size(t: Tensor) -> int:
    """Bytes of a tensor, once each where it is expanded."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())

"""Machine code of a compiled kernel (SASS): its instructions, its loops, what they read and write in global memory.

Triton's wheel brings the disassembler. A loop is what a branch backward closes; the instructions of a loop within it
are the inner loop's. Counts are of the code, not of a run: of an instruction that a condition guards nobody knows how
often it is due.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)", re.MULTILINE)
PTX_READS = re.compile(
    r"\bld\.(?:\w+\.)*global\b|\bcp\.async\.c[ag]\.shared|\bcp\.async\.bulk\S*?\.shared::\w+\.global"
)
PTX_WRITES = re.compile(r"\b(?:st|red|atom)\.(?:\w+\.)*global\b|\bcp\.(?:reduce\.)?async\.bulk\S*?\.global\.shared")
PTX_PRODUCTS = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\S*")
READS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")  # all but the first go into shared memory
WRITES = ("STG", "RED", "REDG", "ATOMG", "UTMASTG", "UTMAREDG", "ATOM")
SPILLS = ("LDL", "STL")
TENSOR_CORES = ("HGMMA", "HMMA", "QGMMA", "IGMMA", "IMMA", "DMMA", "QMMA")
WIDTH = re.compile(r"\.(?:U|S)?(8|16|64|128)(?=\.|$)")


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``name`` is the opcode without its modifiers, ``guard`` the predicate it depends on."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode's first word.

        >>> Instruction(0, "", "LDG.E.128", "R4, desc[UR6][R2.64]").name
        'LDG'
        """
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes a lane that a load or store moves.

        >>> [Instruction(0, "", f"LDG.E{w}", "").width for w in (".128", ".64", "", ".U16", ".U8.CONSTANT")]
        [16, 8, 4, 2, 1]
        """
        found = WIDTH.search(self.opcode)
        return int(found[1]) // 8 if found else 4


@dataclass
class Loop:
    """Instructions from the first to the branch that leads back to it, without those of the loops within."""

    start: int
    end: int
    own: list[Instruction] = field(default_factory=list)
    inner: list[Loop] = field(default_factory=list)

    def counted(self, names: Iterable[str]) -> int:
        """How many of the loop's own instructions have one of these names."""
        return sum(i.name in names for i in self.own)

    def shortest(self) -> list[Instruction]:
        """The instructions of the shortest way through, in which no loop within is entered that need not be.

        >>> text = "/*0000*/ FADD R1, R1, R1 ; /*0010*/ @P0 BRA 0x40 ; /*0020*/ MUFU.EX2 R1, R1 ; /*0030*/ FMUL R1 ;"
        >>> (loop,) = loops(instructions(text + " /*0040*/ @P1 BRA 0x0 ; /*0050*/ EXIT ;"))
        >>> [i.name for i in loop.own], [i.name for i in loop.shortest()]
        (['FADD', 'BRA', 'MUFU', 'FMUL', 'BRA'], ['FADD', 'BRA', 'BRA'])
        """
        code = sorted((i for one in self._all() for i in one.own), key=lambda i: i.address)
        ways: list[list[Instruction] | None] = [None] * (len(code) + 1)
        ways[0] = []
        at = {one.address: i for i, one in enumerate(code)}
        for i, one in enumerate(code):
            before = ways[i]
            if before is None:
                continue
            way, target = [*before, one], _target(one)
            ahead = [] if target is None or target <= one.address else [at.get(target, len(code))]
            if target is None or one.guard or ".U" in one.opcode or one.name == "JMP":
                ahead.append(i + 1)
            for j in ahead if one.address < self.end else []:
                found = ways[j]
                if found is None or len(way) < len(found):
                    ways[j] = way
            if one.address == self.end:
                return way
        return self.own  # the way is not straight enough to follow

    def _all(self) -> list[Loop]:
        return [self, *(one for loop in self.inner for one in loop._all())]

    @property
    def is_hot(self) -> bool:
        """Whether it does what a kernel is for: it reads global memory or multiplies on the tensor cores."""
        return self.counted(READS) > 0 or self.counted(TENSOR_CORES) > 0


@functools.cache
def tool(name: str) -> str:
    """Triton's wheel brings it; where another build does not, CUDA's."""
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(found) if found.exists() else name


def dump(cubin: bytes, option: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool("cuobjdump"), option, file.name], check=True, capture_output=True, text=True).stdout


def instructions(text: str) -> list[Instruction]:
    """Of one function, from the disassembler's text, without what only fills up its end.

    >>> code = "/*0010*/ @!P1 BRA 0x30 ; /* 0x1 */ /*0020*/ LDG.E R1, desc[UR4][R2.64] ; /*0030*/ EXIT ; /*0040*/ NOP ;"
    >>> [(i.address, i.guard, i.opcode) for i in instructions(code)]
    [(16, '!P1', 'BRA'), (32, '', 'LDG.E'), (48, '', 'EXIT')]
    """
    if len(functions := FUNCTION.findall(text)) > 1:
        raise ValueError(f"the code holds several functions, {', '.join(functions)}: their addresses would collide")
    found = [Instruction(int(a, 16), guard, opcode, rest.strip()) for a, guard, opcode, rest in LINE.findall(text)]
    ends = [i for i, one in enumerate(found) if one.name == "EXIT"]
    halt = next((i for i in range(len(found) - 1, -1, -1) if _target(found[i]) == found[i].address), len(found))
    return [i for i in found[: max([halt, *(e + 1 for e in ends)])] if i.name != "NOP" and _target(i) != i.address]


def _target(instruction: Instruction) -> int | None:
    """Where a branch leads."""
    if instruction.name not in ("BRA", "JMP"):
        return None
    found = re.findall(r"0x([0-9a-f]+)", instruction.operands)
    return int(found[-1], 16) if found else None


def loops(code: list[Instruction]) -> list[Loop]:
    """All loops, in the order of their starts; of two branches to one start the later one closes it.

    >>> text = "/*0000*/ MOV R1, R2 ; /*0010*/ LDG.E R1, R2 ; /*0020*/ FADD R1, R1, R1 ; /*0030*/ @P0 BRA 0x20 ;"
    >>> outer, inner = loops(instructions(text + " /*0040*/ @P1 BRA 0x10 ; /*0050*/ EXIT ;"))
    >>> [i.name for i in outer.own], [i.name for i in inner.own], outer.inner == [inner]
    (['LDG', 'BRA'], ['FADD', 'BRA'], True)
    """
    ends: dict[int, int] = {}
    for i in code:
        target = _target(i)
        if target is not None and target < i.address:
            ends[target] = max(ends.get(target, 0), i.address)
    found = [Loop(start, end) for start, end in sorted(ends.items())]
    for one in found:
        around = [o for o in found if o is not one and o.start <= one.start and one.end <= o.end]
        if around:
            min(around, key=lambda o: o.end - o.start).inner.append(one)
    for i in code:
        holding = [o for o in found if o.start <= i.address <= o.end]
        if holding:
            min(holding, key=lambda o: o.end - o.start).own.append(i)
    return found


def ptx_loops(ptx: str) -> list[int]:
    r"""Of every loop before the assembler, in their order, its own reads of global memory and products.

    >>> ptx_loops("$L__BB0_1:\n ld.global.b32 {a}, [b];\n@%p1 bra $L__BB0_1;\n st.global.b32 [b], {a};")
    [1]
    """
    lines = ptx.splitlines()
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"(\$L__BB\w+):", line))}
    ends: dict[int, int] = {}
    for n, line in enumerate(lines):
        if (m := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)) and labels.get(m[1], n) < n:
            ends[labels[m[1]]] = n
    counts = dict.fromkeys(sorted(ends), 0)
    for n, line in enumerate(lines):
        around = [start for start, end in ends.items() if start <= n <= end]
        if around and (PTX_READS.search(line) or PTX_PRODUCTS.search(line)):
            counts[min(around, key=lambda start: ends[start] - start)] += 1
    return list(counts.values())


def _different(ptx: str, pattern: re.Pattern[str]) -> set[tuple[str, ...]]:
    """Names, guards and addresses of the instructions that match: a register is written once, but for a loop's own."""
    found = ((pattern.search(line), line) for line in re.split(r"[;\n]", ptx))
    return {(m[0], *re.findall(r"@!?%\w+|\[[^\]]*\]", line)) for m, line in found if m}


def traffic(ptx: str, code: list[Instruction]) -> dict[str, int]:
    r"""How many instructions read and write global memory, before the assembler and after it.

    Before it those that differ in their address or in what guards them: the assembler reads the same place once.

    >>> ptx = '''@%p1 ld.global.L1::evict_last.v4.b32 {a}, [b]; cp.async.cg.shared.global [s], [b], 16;
    ... cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [s], [b]; ld.shared.b32 a, [s];
    ... st.global.b32 [b], {a}; red.global.add.f32 [b], a; cp.async.bulk.tensor.2d.global.shared::cta [b], [s];'''
    >>> traffic(ptx, [Instruction(0, "", "LDG.E.128", ""), Instruction(16, "", "LDS", "")])
    {'ptx_loads': 3, 'sass_loads': 1, 'ptx_stores': 3, 'sass_stores': 0}
    >>> again = "@%p1 ld.global.b32 {a}, [ %r1 + 8 ];\n@%p1 ld.global.b32 {b}, [ %r1 + 8 ];"
    >>> [traffic(code, [])["ptx_loads"] for code in (again, again.replace("p1", "p2", 1), again.replace("8", "4", 1))]
    [1, 2, 2]
    """
    return {
        "ptx_loads": len(_different(ptx, PTX_READS)),
        "sass_loads": sum(i.name in READS for i in code),
        "ptx_stores": len(_different(ptx, PTX_WRITES)),
        "sass_stores": sum(i.name in WRITES for i in code),
    }

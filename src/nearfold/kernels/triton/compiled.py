"""`python -m nearfold.kernels.triton.compiled`: compiles every kernel for a GPU without one, and tells what each needs.

Registers, shared memory and stack are read from the machine code, so they are what a device would use; a variant whose
loads or stores the assembler has dropped is a fault. A variant of a kernel stands in its module's list VARIANTS, as a
function without arguments that returns a dict with `fn`, `signature` (argument to Triton type), `constexprs`,
`num_warps` and `num_stages`; arguments that 1 is passed for stand in `constexprs`. A launch compiles anew for integers
that are multiples of 16, as strides mostly are: those are written "i32:16", or stand in `attrs` as Triton has it;
pointers are multiples of 16 unless written "*bf16:1". With --odd integers count as any other, which takes more
registers, for elements are then read one by one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import pkgutil
import re
import sys
import time
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import nearfold.kernels.triton as package
from nearfold.kernels.triton import sass

ALIGNED = [["tt.divisibility", 16]]
INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "mma": "mma.sync"}  # the tensor cores', best first
TRAFFIC = ("ptx_loads", "sass_loads", "ptx_stores", "sass_stores")
NUMBERS = ("registers", "shared", "stack", "tensor_cores", *TRAFFIC, "seconds")
FIELDS = ("module", "kernel", "arch", *NUMBERS, "types", "constexprs", "lost", "error")


def modules(names: Iterable[str] = ()) -> list[ModuleType]:
    """The modules of those names, or all of this package that list VARIANTS."""
    found = [importlib.import_module(name) for name in names]
    if not found:
        inside = (m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "compiled")
        found = [importlib.import_module(f"{package.__name__}.{name}") for name in inside]
    return [m for m in found if hasattr(m, "VARIANTS")]


def chosen(variants: Iterable[dict[str, Any]], which: str = "all") -> list[dict[str, Any]]:
    """All variants; or the smallest and the largest of every kernel and element width; or of every kernel the largest.

    Small and large are the products of the integer constants; of equal ones the wider elements are larger.

    >>> sizes = [
    ...     dict(fn=print, signature={"x": f"*fp{bits}"}, constexprs={"BLOCK": block})
    ...     for bits, block in ((16, 64), (16, 256), (16, 128), (32, 256))
    ... ]
    >>> [v["constexprs"]["BLOCK"] for v in chosen(sizes, "extremes")]
    [64, 256, 256]
    >>> [v["signature"]["x"] for v in chosen(sizes, "largest")]
    ['*fp32']
    """
    if which == "all":
        return list(variants)
    alike: dict[Any, list[dict[str, Any]]] = {}
    for variant in sorted(variants, key=_size):
        alike.setdefault((variant["fn"], _widths(variant) if which == "extremes" else 0), []).append(variant)
    ends = (0, -1) if which == "extremes" else (-1,)
    return [same[i] for same in alike.values() for i in ends[: len(same)]]


def _types(variant: dict[str, Any]) -> tuple[str, ...]:
    return tuple(t for t in variant["signature"].values() if t.startswith("*"))


def _widths(variant: dict[str, Any]) -> tuple[int, ...]:
    """Bits of the elements of its tensors."""
    return tuple(sorted({int(re.sub(r"\D", "", t)) for t in _types(variant)}))


def _size(variant: dict[str, Any]) -> tuple[int, int]:
    constants = [v for v in variant["constexprs"].values() if isinstance(v, int) and not isinstance(v, bool) and v > 0]
    return math.prod(constants), sum(_widths(variant))


def compile_variant(variant: dict[str, Any], arch: int, odd: bool = False) -> dict[str, Any]:
    """Registers and stack of a thread, shared memory of a block (bytes), loads and stores, for sm_ARCH.

    The stack holds what did not fit into registers: bytes that were spilled. With ``odd``, integers are
    multiples of nothing.
    """
    start = time.perf_counter()
    done = built(variant, arch, odd)
    code = sass.instructions(sass.dump(done.asm["cubin"], "-sass"))
    found = {
        **resources(done.asm["cubin"]),
        "shared": done.metadata.shared,  # dynamic: the machine code does not tell
        "tensor_cores": next((name for name, word in INSTRUCTIONS.items() if word in done.asm["ptx"]), "none"),
        **sass.traffic(done.asm["ptx"], code),
        "seconds": round(time.perf_counter() - start, 2),
    }
    if gone := lost(found):
        found["lost"] = gone
    return found


def lost(result: dict[str, Any]) -> str:
    """What the assembler has dropped of a kernel's loads and stores, in words; empty where all are there.

    It may copy them, as where it unrolls a loop, and reads the same place once; but it has no reason to drop one:
    what is not needed Triton's own compiler leaves out before. Where a condition that guards them is folded away by
    mistake, they are gone.

    >>> lost({"ptx_loads": 48, "sass_loads": 0, "ptx_stores": 2, "sass_stores": 8})
    'loses loads: 48 before the assembler, 0 after it'
    """
    found = [(what, result[f"ptx_{what}"], result[f"sass_{what}"]) for what in ("loads", "stores")]
    return "; ".join(f"loses {what}: {m} before the assembler, {n} after it" for what, m, n in found if n < m)


def built(variant: dict[str, Any], arch: int, odd: bool = False) -> Any:
    """The compiled kernel, with its stages in ``asm``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn, constexprs = variant["fn"], variant["constexprs"]
    types = {a: "constexpr" if a in constexprs else variant["signature"].get(a, "") for a in fn.arg_names}
    missing = [a for a, t in types.items() if not t]
    if missing:
        raise ValueError(f"{fn.__name__}: signature lacks {', '.join(missing)}")
    marked = {i for i, t in enumerate(types.values()) if t.endswith(":16")} | {i for (i,) in variant.get("attrs", ())}
    pointers = {i for i, t in enumerate(types.values()) if t.startswith("*") and not t.endswith(":1")}
    even = sorted(pointers if odd else pointers | marked)
    plain = {a: t.partition(":")[0] for a, t in types.items()}
    source = ASTSource(fn, plain, dict(constexprs), {(i,): ALIGNED for i in even})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=_options(variant))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a thread."""
    text = sass.dump(cubin, "--dump-resource-usage")
    numbers = {name: [int(n) for n in re.findall(rf"\b{name}:(\d+)", text)] for name in ("REG", "STACK")}
    if not all(numbers.values()):
        raise RuntimeError(f"cuobjdump --dump-resource-usage told no registers or no stack:\n{text}")
    return {"registers": max(numbers["REG"]), "stack": max(numbers["STACK"])}


def compile_all(names: Iterable[str], arches: Iterable[int], which: str, odd: bool) -> Iterable[dict[str, Any]]:
    """One result per `chosen` variant and architecture; where one does not compile, ``error`` says why."""
    for module in modules(names):
        for variant in chosen([make() for make in module.VARIANTS], which):
            for arch in arches:
                result = described(variant, arch)
                try:
                    result |= compile_variant(variant, arch, odd)
                except Exception as error:  # Triton's errors and those of its assembler share no class
                    result["error"] = f"{type(error).__name__}: {error}"
                yield result


def described(variant: dict[str, Any], arch: int) -> dict[str, Any]:
    """Which variant it is."""
    constants = {k: getattr(v, "__name__", v) for k, v in variant["constexprs"].items()}
    return {
        "module": variant["fn"].__module__.rpartition(".")[2],
        "kernel": variant["fn"].__name__,
        "arch": arch,
        "types": ", ".join(_types(variant)),
        "constexprs": {**constants, **_options(variant)},
    }


def _options(variant: dict[str, Any]) -> dict[str, int]:
    return {n: v for n, v in variant.items() if n not in ("fn", "signature", "constexprs", "attrs")}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nearfold.kernels.triton.compiled", description=__doc__)
    parser.add_argument("modules", nargs="*", help="modules with a list VARIANTS (default: all in nearfold)")
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90], help="compute capabilities (default: 80 90)")
    parser.add_argument(
        "--choose",
        choices=("all", "extremes", "largest"),
        default="all",
        help="variants: all (default), the smallest and the largest of every kernel and element width, or the largest",
    )
    parser.add_argument("--odd", action="store_true", help="integers are no multiples of 16")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: Triton then interprets kernels and compiles none; unset it")
    failed = 0
    for result in compile_all(args.modules, args.arch, args.choose, args.odd):
        failed += "error" in result or "lost" in result
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            print("  ".join(f"{name} {result[name]}" for name in FIELDS if name in result), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

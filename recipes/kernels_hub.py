"""Lay our kernels out as Hugging Face's package `kernels` loads them, without the rest of the library.

python recipes/kernels_hub.py FOLDER

FOLDER/build/torch-universal holds the operators in PyTorch and Triton, for every device: Python files alone, for
that is what "universal" means there. Beside it stands, where the compiled engine is installed, a variant for processors
like this one, in which the engine serves CPU tensors; `kernels` takes it first where torch is a build for the CPU. The
engine does not know torch's version, but it fits one Python: this one, and where it has the stable ABI (built on 3.12
or newer) all later ones. Elsewhere PyTorch serves, with a warning.

    from kernels import get_local_kernel

    ops = get_local_kernel(Path("FOLDER"))
    ops.select, ops.aggregate  # nearfold.kernels.select.select ...

or `LOCAL_KERNELS=nearfold/kernels=FOLDER` and `get_kernel("nearfold/kernels", version=1)`. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
from pathlib import Path

import nearfold

SOURCE = Path(nearfold.__file__).parent
VERSION = 1
"""Of what the functions take and return; users of the Hub choose by it."""
OPERATORS = {
    "aggregate": "aggregate",
    "attention": "attention",
    "corners": "corners",
    "entmax": "entmax",
    "fast_weights": "fast_weights",
    "local_attention": "local_attention",
    "sampled": "sampled",
    "scan": "selective_scan",
    "select": "select",
    "slot_scores": "slot_scores",
    "weigh": "slot_softmax",
}
"""By module of `nearfold.kernels`: the function that a user of the folder finds in it."""
BELOW = ("_kept.py", "_numbers.py", "_scrambled.py")
TOOLS = {"compiled.py", "launches.py", "sass.py"}
"""Of `kernels/triton`: what compiles and counts, and is no kernel."""
UNIVERSAL = "torch-universal"
LEAST_TORCH = "29"  # as in pyproject.toml


def carried(text: str, depth: int) -> str:
    """A file's text for a package of any name: imports are relative, operators have a namespace of their own.

    Both this copy and an installed nearfold can then be in one process.

    >>> print(carried('from nearfold.kernels import engine; x = torch.ops.nearfold.select, "nearfold::select"', 1))
    from ..kernels import engine; x = torch.ops.nearfold_hub.select, "nearfold_hub::select"
    """
    text = re.sub(r"^(\s*)from nearfold\.", rf"\1from {'.' * (depth + 1)}", text, flags=re.MULTILINE)
    return text.replace('"nearfold::', '"nearfold_hub::').replace("torch.ops.nearfold.", "torch.ops.nearfold_hub.")


def engine() -> Path | None:
    """The compiled engine's file, where it is installed."""
    from nearfold.kernels.engine import _compiled

    module = _compiled()
    return None if isinstance(module, ImportError) else Path(str(module.__file__))


def lay_out(variant: Path, compiled: Path | None) -> None:
    """Write one variant into a new folder, named as `kernels` names it."""
    files = [SOURCE / name for name in BELOW]
    files += [p for p in (SOURCE / "kernels").rglob("*.py") if p.name not in TOOLS]
    for path in files:
        inside = path.relative_to(SOURCE)
        (variant / inside).parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        (variant / inside).write_text(carried(text, len(inside.parts) - 1), encoding="utf-8")
    imports = [f"from .kernels.{module} import {name}" for module, name in OPERATORS.items()]
    names = ", ".join(f'"{name}"' for name in sorted(OPERATORS.values()))
    head = f'"""The operators of nearfold {nearfold.__version__}: tensors in, tensors out."""'
    (variant / "__init__.py").write_text("\n".join([head, "", *imports, "", f"__all__ = [{names}]", ""]))
    if compiled is not None:
        shutil.copy(compiled, variant / "kernels")
    digest = hashlib.sha256()
    for path in sorted(p for p in variant.rglob("*") if p.is_file()):
        digest.update(path.relative_to(variant).as_posix().encode() + path.read_bytes())
    metadata = {
        "id": f"_nearfold_{re.sub(r'[^a-z0-9]', '_', variant.name)}_{digest.hexdigest()[:10]}",
        "name": "nearfold",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},  # one must be named, also of a universal variant
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Write the folder; ValueError where there is one already."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(argv).folder
    if (folder / "build").exists():
        raise ValueError(f"folder={str(folder)!r} has a build already: name a new one, or remove it")
    variants: dict[str, Path | None] = {UNIVERSAL: None}
    compiled = engine()
    if compiled is not None:
        variants[f"torch-stable-abi{LEAST_TORCH}-cpu-{platform.machine()}-{platform.system().lower()}"] = compiled
    for name, binary in variants.items():
        lay_out(folder / "build" / name, binary)
        print(folder / "build" / name, "" if binary is None else binary.name)
    shutil.copy(Path(__file__).resolve().parents[1] / "LICENSE", folder)


if __name__ == "__main__":
    main()

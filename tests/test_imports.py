"""Imports run downward only, and `import nearfold` stays light. Read from the syntax tree of every module."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import nearfold

PACKAGE = Path(nearfold.__file__).parent
# A part may import the parts with a smaller number; "" is the package itself, its public face.
RANK = {
    "_kept": -1,
    "_numbers": -1,
    "_scrambled": -1,
    "options": -1,
    "_images": 0,
    "_own_code": 0,
    "_pages": 0,
    "_torchvision": 0,
    "grammar": 0,
    "kernels": 0,
    "lower": 1,
    "extend": 2,
    "nn": 2,
    "": 3,
    "testing": 3,
    "look": 3,
    "recognise": 3,
    "catalogue_page": 4,
    "periodic": 5,
    "mixing": 4,
    "surgery": 4,
    "models": 5,
    "compat": 6,
    "export": 6,
    "structures": 5,
    "train": 6,
    "examine": 7,
    "explorer": 7,
    "study": 8,
    "recipes": 9,
    "cli": 9,
    "app": 9,
    "__main__": 10,
}
FORWARDED = {"nearfold.lower": ["nearfold.look"]}
"""What a package's `__getattr__` fetches from above it: names that have moved up, where users have them."""
HEAVY = (
    "triton",
    "torchvision",
    "timm",
    "gradio",
    "ray",
    "optuna",
    "sklearn",
    "matplotlib",
    "pyarrow",
    "PIL",
    "rich",
    "tensorboard",
)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def type_checking(node: ast.stmt) -> bool:
    """Whether a type checker alone reads it."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def without_getattr(source: str) -> str:
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "__getattr__"]
    return ast.unparse(tree)


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Full names of everything of nearfold that a module's code imports, wherever in it."""
    found = set()
    base = module.split(".") if is_package else module.split(".")[:-1]
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not type_checking(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            anchor = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join(anchor + ([node.module] if node.module else []))
            # `from nearfold.a import b` imports the module nearfold.a.b where there is one
            names = {f"{origin}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name in MODULES}
            found |= modules
            if modules != names:
                found.add(origin)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return {name for name in found if name.split(".")[0] == "nearfold"}


def part(module: str) -> str:
    return [*module.split("."), ""][1]


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports although it is not below it."""
    own = part(module)
    return sorted(
        name for name in imported(source, module, is_package) if part(name) != own and RANK[part(name)] >= RANK[own]
    )


def test_every_part_of_the_package_has_a_place():
    assert {part(module) for module in MODULES} <= RANK.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    path = MODULES[module]
    source, is_package = path.read_text(), path.name == "__init__.py"
    forwarded = FORWARDED.get(module, [])
    assert upward(source, module, is_package) == forwarded
    if forwarded:  # and only when somebody asks
        assert upward(without_getattr(source), module, is_package) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("nearfold.lower.plan", "from nearfold.nn import Mixer", ["nearfold.nn"]),
        ("nearfold.lower.plan", "from nearfold import nn", ["nearfold.nn"]),
        ("nearfold.lower.plan", "import nearfold.nn.mixer as m", ["nearfold.nn.mixer"]),
        ("nearfold.lower.plan", "def f():\n    from ..nn.mixer import Mixer", ["nearfold.nn.mixer"]),
        ("nearfold.grammar.words", "import nearfold", ["nearfold"]),
        ("nearfold.grammar.words", "from nearfold.kernels.select import select", ["nearfold.kernels.select"]),
        ("nearfold.kernels.select", "from nearfold.grammar import parse", ["nearfold.grammar"]),
        (
            "nearfold.kernels.select",
            "import importlib\nimportlib.import_module('nearfold.cli')",
            ["nearfold.cli"],
        ),
        ("nearfold.look", "from nearfold import surgery_of_another_kind", ["nearfold"]),
        ("nearfold.models.small", "import nearfold\nimport torch", []),
        ("nearfold.models.small", "from .small import x\nfrom nearfold.nn import Mixer", []),
    ],
)
def test_the_reader_sees_upward_imports(module, source, found):
    assert upward(source, module) == found


BACKENDS = [m for m in MODULES if m.startswith("nearfold.lower.backends.")]


@pytest.mark.parametrize("module", BACKENDS)
def test_backends_do_not_import_each_other(module):
    others = set(BACKENDS) - {module}
    assert imported(MODULES[module].read_text(), module, False).isdisjoint(others)


def test_there_are_backends():
    assert len(BACKENDS) >= 4


LIGHT = {"nearfold": (), "nearfold.train": ("safetensors",), "nearfold.look": (), "nearfold.cli": ()}
"""What is imported often and should be there at once, and what else it must not load."""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """By every module in turn, in one process: the top-level modules that it and those before it load.

    Beyond those of torch alone, whose own FLOP counter, for which our operators register their formulas, imports
    Triton where it is installed. The last one, rich, is heavy: the tests would see it.
    """
    code = (
        "import importlib, json, sys, torch, torch.utils.flop_counter\n"
        "before, found = set(sys.modules), {}\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    found[name] = sorted({name.partition('.')[0] for name in set(sys.modules) - before})\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, *LIGHT, "rich"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name: set(modules) for name, modules in json.loads(done.stdout).items()}


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_nothing_heavy(module, loaded):
    assert "nearfold" in loaded[module]
    assert loaded[module].isdisjoint((*HEAVY, *LIGHT[module]))


def test_a_heavy_import_would_be_seen(loaded):
    assert "rich" in loaded["rich"]


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("nearfold.kernels.triton")])
def test_triton_is_imported_by_its_kernels_only(module):
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    assert not any(name.partition(".")[0] == "triton" for name in names)


TRACED = ("grammar", "kernels", "lower", "nn", "models", "_kept", "_numbers")


def unions(source: str) -> list[int]:
    """Lines with isinstance(x, A | B), which torch 2.9's compiler cannot trace."""
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and len(n.args) == 2]
    return [n.lineno for n in calls if getattr(n.func, "id", "") == "isinstance" and isinstance(n.args[1], ast.BinOp)]


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) in TRACED])
def test_the_oldest_compiler_can_trace_it(module):
    assert unions("isinstance(x, int | str)") and not unions("isinstance(x, (int, str))")
    assert unions(MODULES[module].read_text()) == []

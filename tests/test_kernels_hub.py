"""recipes/kernels_hub.py: the operators without the library, by hand and by Hugging Face's `kernels`."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "recipes" / "kernels_hub.py"
UNIVERSAL = "torch-universal"

COMPARED = """
import torch

def compare(ops):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 30, 8, requires_grad=True) for _ in range(3))
    where = torch.arange(30)
    score, index = ops.select(q, k, 5, "dot", False, where, where, [30], [0, -1, 1], False, 0.0)
    value = v.transpose(1, 2).flatten(2)
    alpha = score.softmax(-1).permute(0, 2, 3, 1).contiguous()
    y = ops.aggregate(value, index.permute(0, 2, 3, 1).contiguous(), alpha, None, 1)
    weight = torch.randn(7, 16, 5)
    first = index[:, :1].permute(0, 2, 3, 1).contiguous()
    z = ops.aggregate(value, first, None, weight, 1)
    grads = torch.autograd.grad(y.square().sum() + z.square().sum(), (q, k, v))

    best = (q @ k.mT).topk(5)
    share = torch.zeros(2, 2, 30, 30).scatter(3, best.indices, best.values.softmax(-1))
    plain = (share @ v).transpose(1, 2).flatten(2)
    read = value[torch.arange(2)[:, None, None], best.indices[:, 0]]
    kernel = torch.einsum("bmsc,ocs->bmo", read, weight)
    truth = torch.autograd.grad(plain.square().sum() + kernel.square().sum(), (q, k, v))
    assert torch.equal(index, best.indices)
    for ours, theirs in ((score, best.values), (y, plain), (z, kernel), *zip(grads, truth)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
"""
BLOCKED = "import sys\nsys.modules['nearfold'] = None\n" + COMPARED
BY_HAND = (
    BLOCKED
    + """
import importlib.util, json, os, pathlib
folder = pathlib.Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
ops = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ops)
compare(ops)
print(sys.modules[name + ".kernels.engine"].describe())
for path in sorted((folder / "kernels").glob("*.py")):
    importlib.import_module(f"{name}.kernels.{path.stem}")
if os.environ.get("TRITON_INTERPRET"):
    with sys.modules[name + ".kernels.cuda"].interpreted():
        compare(ops)
    assert name + ".kernels.triton.select" in sys.modules and name + ".kernels.triton.aggregate" in sys.modules
"""
)
BY_KERNELS = (
    BLOCKED
    + """
import pathlib
from kernels import get_kernel, get_local_kernel
for ops in (get_local_kernel(pathlib.Path(sys.argv[1])), get_kernel("nearfold/kernels", version=1)):
    compare(ops)
    print(pathlib.Path(ops.__file__).parent.name)
"""
)


def run(program: str, argument: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(argument)],
        capture_output=True, text=True, timeout=300, env=os.environ | environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    runpy.run_path(str(SCRIPT))["main"]([str(folder)])
    return folder


def test_what_is_written(folder):
    variants = {path.name: path for path in (folder / "build").iterdir()}
    assert UNIVERSAL in variants and (folder / "LICENSE").exists()
    assert {path.suffix for path in variants[UNIVERSAL].rglob("*.*")} == {".py", ".json"}
    left = re.compile(r'"nearfold::|ops\.nearfold\.|^\s*(from|import) nearfold', re.MULTILINE)
    assert [p for path in variants.values() for p in path.rglob("*.py") if left.search(p.read_text())] == []
    ids = {json.loads((path / "metadata.json").read_text())["id"] for path in variants.values()}
    assert len(ids) == len(variants) and all(name.isidentifier() for name in ids)
    with pytest.raises(ValueError, match="has a build already"):
        runpy.run_path(str(SCRIPT))["main"]([str(folder)])


@pytest.mark.slow
def test_the_universal_variant_needs_torch_alone(folder):
    assert run(BY_HAND, folder / "build" / UNIVERSAL) == "PyTorch\n"


@pytest.mark.slow
def test_its_triton_kernels_run(folder):
    pytest.importorskip("triton")
    run(BY_HAND, folder / "build" / UNIVERSAL, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_engines_variant(folder):
    others = [path for path in (folder / "build").iterdir() if path.name != UNIVERSAL]
    if not others:
        pytest.skip("the engine is not compiled here")
    assert run(BY_HAND, others[0]).startswith("C++")


@pytest.mark.slow
def test_the_package_loads_it(folder):
    """By its path, and by a name that stands for the path; the engine's variant first, where there is one."""
    pytest.importorskip("kernels")
    best = max((path.name for path in (folder / "build").iterdir()), key=lambda name: name != UNIVERSAL)
    said = run(BY_KERNELS, folder, LOCAL_KERNELS=f"nearfold/kernels={folder}", HF_HUB_OFFLINE="1")
    assert said.splitlines() == [best, best]

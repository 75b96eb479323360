"""What the distributions contain, and that the package installs with and without a compiler. No network, no pip."""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import nearfold

ROOT = Path(__file__).resolve().parent.parent
BACKEND = """
import sys
from scikit_build_core.build import build_sdist, build_wheel
kind, target, *settings = sys.argv[1:]
{"sdist": build_sdist, "wheel": build_wheel}[kind](target, dict(s.split("=") for s in settings))
"""


FOUND = """
from importlib.resources import files
import nearfold.study.document as document
print(document.__file__)
print(*sorted(path.name for path in (files("nearfold.study") / "templates").iterdir()))
for name in ("study.html.jinja", "parts.html.jinja", "page.css", "sort.js"):
    document.template(name)
"""


def files(folder: Path, pattern: str) -> set[str]:
    """Paths relative to the folder's parent, as archives spell them."""
    return {path.relative_to(folder.parent).as_posix() for path in folder.rglob(pattern)}


def build(kind: str, source: Path, target: Path, *settings: str, **environ: str) -> Path:
    """What pip would call for it, in the tree `source`; the one file it leaves in the new folder `target`."""
    pytest.importorskip("scikit_build_core")
    done = subprocess.run(
        [sys.executable, "-c", BACKEND, kind, str(target), *settings],
        capture_output=True,
        text=True,
        cwd=source,
        env=os.environ | environ,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder / "dist")) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"nearfold-{nearfold.__version__}"


def test_the_sdist_has_all_sources(unpacked):
    for folder in ("src", "tests", "benchmarks", "recipes"):
        assert files(unpacked / folder, "*.py") == files(ROOT / folder, "*.py")
    assert files(unpacked / "src/nearfold/kernels/cpp", "*") == files(ROOT / "src/nearfold/kernels/cpp", "*")
    assert files(unpacked, "*.so") == set()
    root = {path.name for path in unpacked.iterdir() if path.is_file()}
    assert root >= {"pyproject.toml", "CMakeLists.txt", "Makefile", "constraints.txt", "LICENSE", "README.md"}


def test_without_a_compiler_a_wheel_of_pure_python_is_built(unpacked, tmp_path):
    """From the unpacked sdist, as pip does it where no wheel fits."""
    if not shutil.which("cmake") or not (shutil.which("ninja") or shutil.which("make")):
        pytest.skip("needs CMake, and ninja or make")
    broken = {"CC": "/bin/false", "CXX": "/bin/false"}
    wheel = build("wheel", unpacked, tmp_path / "dist", f"build-dir={tmp_path / 'build'}", **broken)
    assert wheel.name == f"nearfold-{nearfold.__version__}-py3-none-any.whl"

    info = f"nearfold-{nearfold.__version__}.dist-info"
    package = {name for name in files(unpacked / "src/nearfold", "*.*") if "/cpp/" not in name}
    assert "nearfold/py.typed" in package
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if not name.startswith(info)} == package
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert "nearfold = nearfold.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Version"] == nearfold.__version__
    extras = [
        "data",
        "vision",
        "hub",
        "images",
        "tensorboard",
        "ray",
        "search",
        "onnx",
        "openvino",
        "executorch",
        "int8",
        "stacks",
        "ocr",
        "docs",
        "all",
        "dev",
    ]
    assert metadata.get_all("Provides-Extra") == extras

    # out of the wheel itself, with nothing of the source tree beside it
    there = os.pathsep.join([str(wheel), *(path for path in sys.path if path.endswith("site-packages"))])
    command = [sys.executable, "-S", "-c", FOUND]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": there}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    where, names = done.stdout.splitlines()
    assert where.startswith(str(wheel)) and names == "page.css parts.html.jinja sort.js study.html.jinja"


def test_what_is_generated_is_marked_as_generated():
    """So that a reader of a change is not shown it; reads .gitattributes as git does, of files that are there."""
    marked = [
        line.split()[0] for line in (ROOT / ".gitattributes").read_text().splitlines() if "generated=true" in line
    ]
    found = {path for pattern in marked for path in ROOT.glob(pattern)}
    pages = {path for suffix in ("html", "svg") for path in ROOT.glob(f"docs/**/*.{suffix}")}
    assert pages and pages <= found and len(found) > len(pages)
    assert all(list(ROOT.glob(pattern)) for pattern in marked)


def test_the_version_is_the_same_everywhere():
    """The changelog has notes for it, which the release takes; the conda recipe names it."""
    assert f"\n## [{nearfold.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert f'  version: "{nearfold.__version__}"\n' in (ROOT / "packaging/conda/recipe.yaml").read_text()


def test_the_conda_recipe_asks_for_what_the_package_asks_for():
    yaml = pytest.importorskip("yaml")
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    recipe = yaml.safe_load((ROOT / "packaging/conda/recipe.yaml").read_text())["requirements"]
    called = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
    for here, there in (("run", project["project"]["dependencies"]), ("host", project["build-system"]["requires"])):
        wanted = {tuple(each.split(">=")) for each in there}
        found = {tuple(each.split(" >=")) for each in recipe[here] if " >=" in each}
        assert found == {(called.get(name, name), version) for name, version in wanted}


def test_every_source_is_compiled_for_platforms_that_are_not_here():
    """packaging/cross.py, which reads CMakeLists.txt; continuous integration runs what it lists."""
    pytest.importorskip("nanobind")
    cross = runpy.run_path(str(ROOT / "packaging/cross.py"))
    every = set((ROOT / "src/nearfold/kernels/cpp").glob("*.cpp"))
    for target, sets in cross["TARGETS"].items():
        found = cross["commands"](target)
        left_out = {path for path in every if "windows" in target and path.stem.startswith("module")}
        assert {Path(command[-1]) for command in found.values()} == every - left_out
        assert ("-mavx512f" in found.get("avx512/select", [])) == ("avx512" in sets), target


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="Linux on x86-64")
def test_instruction_sets_are_those_of_the_processor():
    """The engine's own reading of the processor, against the kernel's."""
    from nearfold.kernels import engine

    if engine.get() is None:
        pytest.skip("needs the compiled engine")
    said = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].splitlines()[0].split()
    avx2 = {"avx2", "fma", "bmi2"} <= set(said)
    avx512 = avx2 and {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= set(said)
    assert ("avx2" in engine.names(), "avx512" in engine.names()) == (avx2, avx512)
    assert "amx" not in engine.names() or {"amx_tile", "amx_bf16"} <= set(said)


def test_building_needs_no_torch():
    with (ROOT / "pyproject.toml").open("rb") as file:
        requires = tomllib.load(file)["build-system"]["requires"]
    assert [name for name in requires if name.startswith("torch")] == []


def test_the_engine_is_built_where_a_compiler_is():
    """An installation goes on without an engine that fails to compile, so somebody has to notice."""
    headers = f"-I{sysconfig.get_path('include')}"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    check = ["-x", "c++", "-fsyntax-only", headers, "-include", "Python.h", os.devnull]
    if not compiler or subprocess.run([compiler, *check], capture_output=True).returncode:
        pytest.skip("no working C++ compiler, or no Python headers")
    engine = importlib.util.find_spec("nearfold.kernels._engine")
    assert engine and engine.origin, "to see what failed: .venv/bin/python -m pip install -c constraints.txt -v -e ."
    # one compiled by hand would go on serving, unnoticed, when the sources no longer compile
    assert not Path(engine.origin).is_relative_to(ROOT / "src"), "delete the engine in the source tree"

"""README and docs run as written: every code block, and every command in a folder that has the files they name."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nearfold.train
from nearfold import _torchvision, cli
from nearfold.recipes import generated, imagenet

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / "docs/studies/README.md"]
)
PAGES = [page for page in PAGES if page.name != "log.md"]  # what was run once, on a machine that is named
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAM = r"(?:nearfold|torchrun|python -m nearfold[\w.]*)"
INLINE = re.compile(rf"`({PROGRAM}(?: [^`]+)?)`")

LONG = {
    "nearfold study spectrum": "minutes: `make demo`, which tests/test_study_spectrum.py rehearses",
    "nearfold study run": "hours of runs: tests/test_study_engine.py",
    "nearfold models": "half a minute for the whole table: tests/test_models.py runs a part and counts every row",
    "nearfold search": "minutes: tests/test_search.py does a small one",
    "nearfold budget": "minutes on a real network: tests/test_study_budget.py",
    "nearfold explore": "it serves until Ctrl-C: tests/test_explorer.py",
    "nearfold evaluate": "the data are not here: tests/test_pretrained.py does it on digits",
    "nearfold train --model resnet8": "the data are not here: tests/test_train_fast.py does it on digits",
    "torchrun": "a network at full size, or several machines: tests/test_recipes_imagenet.py rehearses every row",
    "python -m nearfold.recipes.imagenet resnet50": "as above",
    "python -m nearfold.recipes.detection": "a minute: tests/test_recipes.py",
    "python -m nearfold.recipes.denoise": "45 minutes: tests/test_recipes.py",
    "python -m nearfold.recipes.ocr": "minutes, and a wheel: tests/test_recipes_ocr.py",
    "python -m nearfold.kernels.triton.compiled": "minutes: tests/test_triton_compile.py",
}
"""Commands whose arguments are only read here, by how they begin, and where they are run instead."""
TEMPLATE = re.compile(r"\b[A-Z]{3,}\b|\.\.\.")
"""A word in capitals stands for something: no command to run."""


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    lines: list[str] = []
    for language, block in FENCED.findall(text):
        if language != "python":
            lines += block.replace("\\\n", " ").splitlines()
    outside = FENCED.sub("", text)
    lines += re.findall(r"^ {4}(\S.*)$", outside, re.MULTILINE)
    lines += [" ".join(found.split()) for found in INLINE.findall(outside)]
    plain = (re.split(r"\s#\s", line)[0].strip() for line in lines)
    return [
        line for line in plain if re.match(rf"{PROGRAM}(?: |$)", line) and " " in line and not TEMPLATE.search(line)
    ]


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands(page)})


def short(command: str) -> bool:
    return not any(command.startswith(start) for start in LONG)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the pages name."""
    pil = pytest.importorskip("PIL.Image")
    from sklearn.datasets import load_sample_image

    pil.fromarray(load_sample_image("china.jpg")).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_only(argv: list[str], monkeypatch) -> None:
    """The command line is read by its own parser; what it would do is not done."""
    if argv[0] == "nearfold":
        cli._parser().parse_args(argv[1:])
        return
    module = argv[argv.index("-m") + 1]
    rest = argv[argv.index("-m") + 2 :]
    if argv[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(argv[1:])
    if module == "nearfold.recipes.imagenet":
        monkeypatch.setattr(imagenet, "open_data", lambda *a, **k: (_ for _ in ()).throw(ValueError("read")))
        with pytest.raises(SystemExit) as stop:
            imagenet.main(rest)
        assert stop.value.code == 2
    elif module == "nearfold":
        cli._parser().parse_args(rest)
    else:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(module).main([*rest, "--help"])
        assert stop.value.code == 0


READ = [c for c in COMMANDS if c[1].startswith("nearfold ") or not short(c[1])]


@pytest.mark.parametrize(("page", "command"), READ, ids=str)
def test_commands_are_read(page, command, monkeypatch, capsys):
    read_only(shlex.split(command), monkeypatch)
    assert "error" not in capsys.readouterr().err.replace("error: read", "")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if short(c[1])], ids=str)
def test_commands_run_as_written(page, command, folder, capsys):
    argv = shlex.split(command)
    if "torchvision:" in command or "timm:" in command:
        try:
            _torchvision.load("torchvision")
        except ImportError as error:
            pytest.skip(f"torchvision: {error}")
    if argv[0] == "nearfold":
        once = ["--epochs", "1"] if argv[1] == "train" else []  # the others are like the first
        assert cli.main([*argv[1:], *once]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out
    elif argv[2] == "nearfold.grammar.vocabulary":
        runpy.run_module(argv[2], run_name="__main__")
        assert capsys.readouterr().out.startswith("# The words")
    else:
        module = {"nearfold.recipes.imagenet": imagenet, "nearfold.recipes.generated": generated}[argv[2]]
        module.main(argv[3:])


@pytest.mark.slow
def test_the_rehearsal_runs_as_written(folder):
    """docs/training.md, Rehearsals: on two processes, with the data that the command above it writes."""
    rehearsal = [c for _, c in COMMANDS if c.startswith("torchrun") and "--tiny" in c]
    (data,) = [c for _, c in COMMANDS if "generated generated" in c]
    assert len(rehearsal) == 1
    generated.main(shlex.split(data)[3:])
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(rehearsal[0])[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "test accuracy" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=lambda p: p.name
)
def test_code_blocks_run_as_written(page, folder, monkeypatch):
    """One page, one namespace; training at full size is called with what it takes, and not done."""
    if page.name == "training.md":
        generated.main(["imagenet", "--layout", "parquet", "--images", "64"])
        called = []
        signature = inspect.signature(nearfold.train.fit)
        monkeypatch.setattr(nearfold.train, "fit", lambda *a, **k: called.append(signature.bind(*a, **k)))
    text = page.read_text(encoding="utf-8")
    if (
        "import torchvision" in text or "import timm" in text
    ):  # a wheel of another torch needs help, whoever came before
        try:
            _torchvision.load("torchvision")
        except ImportError as error:
            pytest.skip(f"torchvision: {error}")
    blocks = [code for language, code in FENCED.findall(text) if language == "python"]
    exec(compile("\n".join(blocks), page.name, "exec"), {"__name__": "__main__"})
    if page.name == "training.md":
        assert len(called) == 1


def test_there_are_commands_and_every_exception_is_used():
    assert len(COMMANDS) >= 15
    for start in LONG:
        assert any(command.startswith(start) for _, command in COMMANDS), start


def test_links_lead_somewhere():
    for page in [*PAGES, *(ROOT / "docs").rglob("*.md")]:
        prose = re.sub(r"`[^`]*`", "", FENCED.sub("", page.read_text(encoding="utf-8")))
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", prose):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_the_map_names_files_that_are_there():
    package = ROOT / "src/nearfold"
    rows = re.findall(
        r"^\|.*\|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where is what")[1], re.M
    )
    named = [name for row in rows for name in re.findall(r"`([\w/]+(?:\.py)?)`", row) if name != "supports"]
    assert len(named) > 25
    assert [name for name in named if not (package / name).exists()] == []

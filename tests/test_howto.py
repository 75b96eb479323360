"""The pages of docs/howto run as they stand: the code of a page in one namespace, from top to bottom."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers.cells import slow_but

from nearfold import _torchvision, cli

PAGES = {page.stem: page for page in sorted((Path(__file__).resolve().parents[1] / "docs" / "howto").glob("*.md"))}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = ("timm", "yaml", "ultralytics", "peft", "torchao")


@pytest.mark.parametrize("name", slow_but(["acmix-in-yolo"], PAGES))
def test_page(name, capsys, own_words, tmp_path, monkeypatch):
    page = PAGES[name]
    text = page.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) >= 3 and "assert" in text
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))  # ultralytics writes its settings when it is imported
    for module in NEEDS:
        if re.search(rf"^(import|from) {module}\b", text, re.MULTILINE):
            if module not in ("yaml", "torchao"):  # they import torchvision
                try:
                    _torchvision.load("torchvision")
                except ImportError as error:
                    pytest.skip(f"torchvision: {error}")
            pytest.importorskip(module)
    torch.manual_seed(0)
    code = compile("\n".join(blocks), str(page), "exec", dont_inherit=True)  # without this file's annotations
    exec(code, {"__name__": page.stem})  # names must resolve as in a script
    assert "Traceback" not in capsys.readouterr().out


def test_an_own_word_is_trained_from_the_command_line(tmp_path, monkeypatch, capsys, own_words):
    """The commands of the page, with its first block in the file that they name."""
    text = PAGES["own_word"].read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in re.findall(r"^nearfold .*$", text, re.MULTILINE)]
    assert len(commands) == 2 and commands[1] == [*commands[0], "--resume"]
    monkeypatch.chdir(tmp_path)
    Path("criss_cross.py").write_text(BLOCK.findall(text)[0])
    for command in commands:
        assert cli.main([*command, "--limit", "60", "--device", "cpu"]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.startswith("criss_cross | box | softmax(heads=2)\ndigits: test accuracy")
    said = json.loads(Path("runs/own/network.json").read_text())
    assert said["import"] == "criss_cross.py" and said["op"] == "criss_cross | box | softmax(heads=2)"


def test_there_are_pages():
    assert {"convnn-in-resnet50", "sparse-vit", "acmix-in-yolo"} <= PAGES.keys()

"""The pages of docs/howto run as they stand: the code of a page in one namespace, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.cells import slow_but

from nearfold import _torchvision

PAGES = {page.stem: page for page in sorted((Path(__file__).resolve().parents[1] / "docs" / "howto").glob("*.md"))}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = {"timm": "timm", "yaml": "yaml"}


@pytest.mark.parametrize("name", slow_but(["acmix-in-yolo"], PAGES))
def test_page(name, capsys, own_words):
    page = PAGES[name]
    text = page.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) >= 3 and "assert" in text
    for module in NEEDS:
        if f"import {module}" in text:
            if module == "timm":
                try:
                    _torchvision.load("torchvision")
                except ImportError as error:
                    pytest.skip(f"torchvision: {error}")
            pytest.importorskip(module)
    torch.manual_seed(0)
    code = compile("\n".join(blocks), str(page), "exec", dont_inherit=True)  # without this file's annotations
    exec(code, {"__name__": page.stem})  # names must resolve as in a script
    assert "Traceback" not in capsys.readouterr().out


def test_there_are_pages():
    assert {"convnn-in-resnet50", "sparse-vit", "acmix-in-yolo"} <= PAGES.keys()

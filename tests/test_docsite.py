"""The documentation's site: what it is made of, what stops its build, and the build itself."""

from __future__ import annotations

import html
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from docsite import operators, pages
from docsite.links import broken
from nearfold.grammar import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def staged(tmp_path):
    return pages.Staged(ROOT, tmp_path / "pages")


def test_written_pages_keep_their_links(staged):
    pages.written(staged)
    text = (staged.folder / "benchmarks.md").read_text()
    assert "](benchmarks/curves-intel-xeon-amx.png)" in text and "](benchmarks/tables.md)" in text
    assert "](../files/recipes/own_study.py.md)" in (staged.folder / "studies/index.md").read_text()
    assert (staged.folder / "files/recipes/own_study.py.md").is_file()
    assert "`nearest(4, cosine) | ranked | max`" in (staged.folder / "words.md").read_text()


def test_what_is_not_put_again_is_swept(staged):
    staged.put("a.md", "# A\n")
    again = pages.Staged(ROOT, staged.folder)
    again.put("b.md", "# B\n")
    again.sweep()
    assert [path.name for path in staged.folder.iterdir()] == ["b.md"]


@pytest.mark.parametrize("name", ["conv", "acmix", "branch", "mamba", "cross_attention"])
def test_the_page_of_an_operator(name):
    entry = CATALOGUE[name]
    text = operators.page(entry)
    assert " ".join(text.split("\n\n")[1].split()) == entry.notation
    code = text.split("```python\n")[1].split("```")[0]
    exec(code, {})
    for word in entry.words:
        assert word in text


def test_a_name_without_a_docstring_is_found():
    api = pytest.importorskip("docsite.api", reason="needs the extra docs", exc_type=ImportError)

    def said():
        """Say it."""

    def silent():
        pass

    class Half:
        """Say it."""

        def silent(self):
            pass

    Half.__module__ = Half.silent.__module__ = "nearfold.of_tests"
    module = SimpleNamespace(
        __name__="nearfold.of_tests", __all__=["said", "silent", "Half"], said=said, silent=silent, Half=Half
    )
    assert list(api.undocumented(module)) == ["nearfold.of_tests.silent", "nearfold.of_tests.Half.silent"]


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text('<h1 id="top"></h1><a href="../b.html#no">b</a><a href="https://x.org">')
    (tmp_path / "b.html").write_text('<a href="a/#top">a</a><a href="a/">a</a><img src="c.png">')
    assert broken(tmp_path) == ["a/index.html: ../b.html#no is no place in the page", "b.html: c.png is not there"]


@pytest.mark.slow
def test_the_site_is_built_and_has_a_page_for_every_operator(tmp_path):
    """Strictly, and without pictures, which take as long again."""
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("needs the extra docs: pip install -c constraints.txt -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "docsite", "build", "--no-pictures", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name, entry in CATALOGUE.items():
        raw = (tmp_path / f"operators/{name}.html").read_text(encoding="utf-8")
        text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", raw)).split())
        assert entry.title in text and entry.notation in text, name

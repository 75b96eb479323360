"""`nearfold ops --html`: one page, every row with its picture or why there is none, nothing from outside."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from html.parser import HTMLParser

import pytest
import torch

from nearfold import catalogue_page, periodic
from nearfold.cli import main
from nearfold.grammar import CATALOGUE, Entry
from nearfold.grammar.presets import FAMILIES


class Page(HTMLParser):
    """Tags and attributes, and the texts of the rows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.inside = [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "tr" and "id" in attrs:
            self.inside = attrs["id"]
            self.rows[self.inside] = ""

    def handle_endtag(self, tag):
        self.inside = "" if tag == "tr" else self.inside

    def handle_data(self, data):
        if self.inside:
            self.rows[self.inside] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "made" / "ops.html"
    assert main(["ops", "--html", str(path)]) == 0
    return path.read_text(encoding="utf-8")


def pixels(uri):
    """The levels of a picture that `drawn` made."""
    png = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + data)
        chunks[kind], at = data, at + 12 + size
    columns, rows = struct.unpack(">II", chunks[b"IHDR"][:8])
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(chunks[b"PLTE"]) == 768 and len(chunks[b"tRNS"]) == 256
    return [list(raw[r * (columns + 1) + 1 : (r + 1) * (columns + 1)]) for r in range(rows)]


def test_every_operator_is_a_row_with_a_picture(written):
    page = Page(written)
    assert page.rows.keys() == CATALOGUE.keys()
    for name, entry in CATALOGUE.items():
        said = page.rows[name]
        assert all(part in said for part in (entry.title, entry.notation, entry.source)), name
        assert str(periodic.year(entry) or "") in said
    pictures = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(pictures) == len(CATALOGUE), "every matrix can be drawn"
    assert all(uri.startswith("data:image/png;base64,") for uri in pictures)
    assert all(family in written for family in FAMILIES)


def test_the_page_asks_for_nothing(written):
    page = Page(written)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}
    for tag, attrs in page.tags:
        where = [v for k, v in attrs.items() if k in ("src", "srcset", "data", "action", "poster")]
        assert all(v.startswith("data:") for v in where), (tag, where)
        assert not [k for k in attrs if k.startswith("on")]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", written)
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert links and all(re.match(r"https://(arxiv\.org/abs/\d|doi\.org/10\.)", link) for link in links)


def test_a_picture_says_which_weights_there_are():
    matrix = torch.tensor([[1.0, 0.0], [-0.25, 0.25], [0.0, -1.0]])
    assert pixels(catalogue_page.drawn(matrix)) == [[127, 0], [128 + 64, 64], [0, 255]]
    conv = catalogue_page.matrix_of(CATALOGUE["conv"])
    assert conv.shape == (64, 64) and (conv[27] > 0).nonzero().flatten().tolist() == [
        18,
        19,
        20,
        26,
        27,
        28,
        34,
        35,
        36,
    ]
    assert catalogue_page.matrix_of(CATALOGUE["cross_attention"]).shape == (64, 16), "another map is read"
    causal = catalogue_page.matrix_of(CATALOGUE["attention_causal"])
    assert not causal.triu(1).any() and causal.diagonal().all()


def test_a_row_whose_matrix_cannot_be_drawn_says_why():
    odd = Entry("odd", "Odd <b>", "0.0*(window(3) | box | ones) + 0.0*(window(5) | box | ones)", ("a", "b", "c"), "x")
    text = catalogue_page.page({"none & such": [(odd, None)]})
    assert "No picture: its matrix on this map is zero" in text and "<img " not in text
    assert "Odd &lt;b&gt;" in text and "none &amp; such" in text and "<b>" not in text.split("<script>")[0]


def test_a_part_of_the_catalogue(tmp_path, capsys):
    path = tmp_path / "few.html"
    assert main(["ops", "--family", "graphs", "--html", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert Page(path.read_text()).rows.keys() == {"vig", "edgeconv"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["conv", "--html", "x.html"], "leave it out where operators are named"),
        (["--html", "x.txt"], "name a file that ends with .html"),
        (["--html", "x.html", "--since", "2999"], "the latest is of 20"),
    ],
)
def test_misuse_is_one_line(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ops", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())

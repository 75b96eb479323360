"""The explorer's page in a real browser: its numbers are the library's, and it can be used as it says.

Skipped where Chromium, Playwright or ONNX Runtime Web of npm is not there. The last is looked for in the folder that
NEARFOLD_ORT_WEB names, or where `make explorer` unpacks it.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nearfold.explorer.command import server
from nearfold.explorer.graphs import SIDE, kept
from nearfold.explorer.operators import GRID, OPERATORS, START
from nearfold.explorer.page import AT, write
from nearfold.grammar import parse
from nearfold.look import mixing_matrix
from nearfold.look.layers import FEATURES, Reading, features, plain_layer
from nearfold.models import create
from nearfold.models.look import readings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TOLERANCE = 1e-4
ROOT = Path(__file__).parents[1]
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip
SETTLED = "globalThis.explorer !== undefined && explorer.settled()"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    runtime = Path(os.environ.get("NEARFOLD_ORT_WEB", ROOT / "build" / "onnxruntime-web"))
    if not runtime.is_dir():
        pytest.skip(f"no onnxruntime-web in {runtime}: make explorer, or NEARFOLD_ORT_WEB=FOLDER")
    folder = tmp_path_factory.mktemp("explorer")
    write(folder, {"resnet8s_hybrid": kept("resnet8s_hybrid")}, runtime)
    with server(folder, 0) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/"
        serving.shutdown()
        thread.join()


@pytest.fixture
def opened(browser, address):
    """A function that opens the page: the part of the address behind #, and a context's options."""
    contexts, faults = [], []

    def opened(link="", **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith((address, "data:", "blob:")) or faults.append(request.url)
        )
        page.goto(address + link)
        page.wait_for_function(SETTLED)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults


def pixels(page, side):
    return torch.tensor(page.evaluate(f"[...explorer.pixels({side}, {side})]")).view(3, side, side)


def rows(page):
    page.evaluate("explorer.answered()")
    return {title: torch.tensor(row) for title, row in page.evaluate("explorer.rows()").items()}


def assert_rows(page, at, lam, **chosen):
    """All pictures are rows of the library's matrices; of nearly equal neighbours either may be read."""
    x, found = features(pixels(page, SIDE), (GRID, GRID)), rows(page)
    assert found.keys() == {operator.title for operator in OPERATORS.values()}
    for operator in OPERATORS.values():
        notation = operator.written(lam, **{name: (START | chosen)[name] for name in operator.hears})
        op = parse(notation)
        layer = plain_layer(op, 1 if op.for_sequences else 2, len(FEATURES))
        matrix = mixing_matrix(layer, x.flatten(2) if op.for_sequences else x)[0].mean(0)
        row = matrix[at[0] * GRID + at[1]]
        torch.testing.assert_close(
            found[operator.title], row, rtol=0, atol=TOLERANCE, msg=lambda m, n=notation: f"{n}: {m}"
        )
        said = page.locator("figure", has=page.get_by_role("heading", name=operator.title, exact=True))
        assert Reading("", "", row, matrix, 0).summary == said.locator(".summary").inner_text()
        assert said.locator("code").inner_text() == notation
        assert said.locator("canvas").get_attribute("aria-label").startswith(f"{operator.title} reads ")


def test_the_page_shows_the_librarys_numbers(opened):
    page = opened()
    assert_rows(page, AT, 0.5)
    page.locator("#photo").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    at = (AT[0] + 2, AT[1] - 4)
    assert page.inner_text("#where") == f"Row {at[0] + 1}, column {at[1] + 1} of {GRID}."
    for slider, steps in (("k", -1), ("window", 1), ("heads", 1), ("lambda", 3)):
        page.locator(f"#{slider}").focus()
        for _ in range(abs(steps)):
            page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")
    assert_rows(page, at, 0.53, k=4, window=11, heads=2)

    link = page.evaluate("location.hash")
    again = opened(link)
    assert again.evaluate("explorer.state()") == page.evaluate("explorer.state()")
    before, after = rows(page), rows(again)
    assert all(torch.equal(before[title], after[title]) for title in before)


def test_layers_of_a_network_and_a_file(opened, tmp_path):
    page = opened("#view=resnet8s_hybrid&photo=china&at=3,20")
    small = pixels(page, 32)
    share = tuple((n + 0.5) / GRID for n in (3, 20))
    wanted = readings(create("resnet8s_hybrid", pretrained=True), small, share)
    found = rows(page)
    assert list(found) == [reading.title for reading in wanted]
    for reading in wanted:
        row = reading.row.flatten()
        torch.testing.assert_close(found[reading.title], row, rtol=0, atol=TOLERANCE * float(row.max()))

    (tmp_path / "mine.onnx").write_bytes(kept("resnet8s_attention"))
    page.set_input_files("#model", tmp_path / "mine.onnx")
    page.wait_for_function("document.querySelector('#view').selectedOptions[0].text === 'layers of mine.onnx'")
    page.wait_for_function(SETTLED)
    assert "all | row | softmax" in page.locator("code").first.inner_text()
    for wrong, said in ((kept("conv-window3"), "does not say what its layers read"), (b"nonsense", "cannot be read")):
        (tmp_path / "wrong.onnx").write_bytes(wrong)
        page.set_input_files("#model", tmp_path / "wrong.onnx")
        page.wait_for_function(f"document.querySelector('#status').textContent.includes({said!r})")


def test_a_photograph_of_ones_own_stays_in_the_page(opened, tmp_path):
    generator = torch.Generator().manual_seed(0)
    given = F.interpolate(torch.rand(1, 3, 12, 16, generator=generator), (300, 400), mode="bilinear")[0]
    Image.fromarray((given * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "own.png")
    page = opened()
    before = rows(page)
    page.set_input_files("#own", tmp_path / "own.png")
    page.locator("#private").wait_for(state="visible")
    page.wait_for_function(SETTLED)
    assert_rows(page, AT, 0.5)
    assert not torch.equal(before["Self-attention"], rows(page)["Self-attention"])
    assert "photo" not in page.evaluate("location.hash")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(opened, scheme):
    page = opened(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ground = page.evaluate("getComputedStyle(document.querySelector('main')).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(27, 30, 34)"}[scheme]
    corner = page.evaluate(
        "[...document.querySelector('figure canvas').getContext('2d').getImageData(4, 4, 1, 1).data]"
    )
    assert (sum(corner[:3]) / 3 < 128) == (scheme == "dark")
    page.locator("#photo").tap(position={"x": 10, "y": 10})
    assert page.inner_text("#where") == f"Row 1, column 1 of {GRID}."
    controls = "[...document.querySelectorAll('canvas, input, select, button')]"
    assert page.evaluate(f"{controls}.every(e => e.ariaLabel || e.labels?.length || e.textContent.trim())")

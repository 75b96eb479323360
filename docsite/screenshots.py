"""Look at the built site in Chromium: every page fits a phone, and pictures of some pages.

python -m docsite.screenshots FOLDER writes pages at 1280 and 390 pixels, light and dark; with --table FILE also the
page of `nearfold ops --html` that docs/commands.md shows. Needs Playwright (pip install playwright) and a Chromium of
the system.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

SITE = Path(__file__).resolve().parents[1] / "site"
SHOWN = (
    "index.html", "idea.html", "operators/index.html", "operators/swin.html", "api/nn.html", "studies/index.html",
    "benchmarks.html", "decisions/index.html", "words.html",
)  # fmt: skip
WIDTHS = (1280, 390)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def wide(browser: Browser) -> list[str]:
    """Pages that scroll sideways on a phone, and pages that say something on the console."""
    found = []
    tab = browser.new_page(viewport={"width": WIDTHS[-1], "height": 844})
    said: list[str] = []
    tab.on("pageerror", lambda error: said.append(str(error)))
    for path in sorted(SITE.rglob("*.html")):
        said.clear()
        tab.goto(path.as_uri(), wait_until="load")
        name = path.relative_to(SITE).as_posix()
        if tab.evaluate(WIDER):
            found.append(f"{name} is wider than {WIDTHS[-1]} pixels")
        found += [f"{name}: {error}" for error in said]
    tab.close()
    return found


def shots(browser: Browser, folder: Path) -> None:
    """Pictures of the pages in `SHOWN`."""
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            for name in SHOWN:
                tab.goto((SITE / name).as_uri(), wait_until="load")
                tab.screenshot(path=folder / f"{name.replace('/', '-')[:-5]}-{width}-{scheme}.png")
            tab.close()


def table(browser: Browser, file: Path) -> None:
    """The upper end of the page that `nearfold ops --html` writes."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "ops.html"
        subprocess.run([sys.executable, "-m", "nearfold", "ops", "--html", str(page)], check=True)
        tab = browser.new_page(viewport={"width": 1280, "height": 640}, color_scheme="light")
        tab.goto(page.as_uri(), wait_until="load")
        tab.screenshot(path=file)
        tab.close()


def main() -> int:
    """Look: the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docsite.screenshots", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", type=Path, metavar="FILE")
    args = parser.parse_args()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        shots(browser, args.folder)
        if args.table:
            table(browser, args.table)
        wrong = wide(browser)
        browser.close()
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

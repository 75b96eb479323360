"""Look at the built site in Chromium: every page fits a phone, and pictures of some pages.

python -m docsite.screenshots FOLDER writes pages at 1280 and 390 pixels, light and dark. With --pictures FOLDER, which
is docs/pictures, it writes the pages of commands that the documentation shows, too; that of the explorer needs ONNX
Runtime Web in build/onnxruntime-web (make explorer). Needs Playwright (pip install playwright) and a Chromium of the
system.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from nearfold.explorer.command import server

ROOT = Path(__file__).resolve().parents[1]
SITE, RUNTIME = ROOT / "site", ROOT / "build" / "onnxruntime-web"
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


COMMANDS = {
    "table": (640, "ops --html {page}"),
    "xray": (1370, "xray resnet8s_attention --pretrained --images 4 --out {page}"),
}
"""Pictures of the upper ends of pages: how many pixels of it, and the command that writes it."""


def pictures(browser: Browser, folder: Path) -> None:
    """What docs/pictures has of pages."""
    with tempfile.TemporaryDirectory() as made:
        for name, (height, command) in COMMANDS.items():
            page = Path(made) / f"{name}.html"
            words = [word.format(page=page) for word in command.split()]
            subprocess.run([sys.executable, "-m", "nearfold", *words], check=True)
            taken(browser, page.as_uri(), folder / f"{name}.png", height)
        where = Path(made) / "explorer"
        there = ["--out", str(where), "--runtime", str(RUNTIME)]
        subprocess.run([sys.executable, "-m", "nearfold", "explore", *there], check=True)
        with server(where, 0) as serving:
            threading.Thread(target=serving.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{serving.server_port}/"
            taken(browser, address, folder / "explorer.png", 1045, "globalThis.explorer?.settled()")
            serving.shutdown()


def taken(browser: Browser, address: str, file: Path, height: int, ready: str = "true") -> None:
    """The upper end of a page, once it is ready."""
    tab = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
    tab.goto(address, wait_until="load")
    tab.wait_for_function(ready)
    tab.screenshot(path=file)
    tab.close()


def main() -> int:
    """Look: the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docsite.screenshots", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        shots(browser, args.folder)
        if args.pictures:
            pictures(browser, args.pictures)
        wrong = wide(browser)
        browser.close()
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

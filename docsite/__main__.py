"""python -m docsite build: the site in site/, or why not; python -m docsite serve: while pages are written."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from docsite import api, config, figures, operators, pages
from docsite.links import broken

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "docsite"


def stage(pictures: bool = True) -> Path:
    """Lay out everything that the site is made of: the configuration's path.

    Raises:
        ValueError: a public name has no docstring.
    """
    staged = pages.Staged(ROOT, WORK / "pages")
    api.write(staged)
    pages.written(staged)
    operators.write(staged, WORK / "pictures", pictures)
    figures.write(staged)
    staged.sweep()
    return config.write(staged, WORK / "mkdocs.yml")


def build(pictures: bool, out: Path) -> list[str]:
    """Build the site and put it into a folder: what is wrong with it.

    Raises:
        ValueError: the folder holds something else; a public name has no docstring.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "sitemap.xml").is_file():
        raise ValueError(f"--out {out}: holds something that is no site; name a new folder")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", str(stage(pictures))]
    if subprocess.run(command, cwd=WORK, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode:
        return ["zensical build --strict failed, as it says above"]
    made = WORK / "site"  # it builds nowhere but beside its configuration
    wrong = broken(made)
    if not wrong:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    return wrong


def serve() -> None:
    """Serve the site while docs/ is edited; ends with Ctrl-C."""
    command = [sys.executable, "-m", "zensical", "serve", "-f", str(stage())]
    server = subprocess.Popen(command, cwd=WORK, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        seen = pages.newest(ROOT)
        while server.poll() is None:
            time.sleep(1)
            if (now := pages.newest(ROOT)) != seen:
                seen = now
                stage()
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait()


def main(argv: list[str] | None = None) -> int:
    """Build or serve: the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docsite", description=__doc__)
    parser.add_argument("what", choices=("build", "serve"))
    parser.add_argument("--no-pictures", action="store_true", help="leave out the operators' pictures, half a minute")
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="the folder of the site (default: site)")
    args = parser.parse_args(argv)
    if args.what == "serve":
        serve()
        return 0
    try:
        wrong = build(not args.no_pictures, args.out.resolve())
    except ValueError as error:
        wrong = str(error).splitlines()
    for line in wrong:
        print(f"docs: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

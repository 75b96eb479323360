"""The site's configuration: what is said in mkdocs.yml, and the navigation, which follows from the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from docsite.pages import Staged

PAGES = Path(__file__).parent
Nav = list[Any]


def navigation(staged: Staged) -> Nav:
    """The pages in their order, by section."""
    lists = staged.lists

    def listed(name: str) -> Nav:
        return [page for pages in lists[name].values() for page in pages]

    studies = sorted(page for page in staged.titles if page.startswith("studies/") and page.endswith("summary.md"))
    families = [{family.capitalize(): pages} for family, pages in lists["operators"].items()]
    explorer = [{"Explorer": page} for page in ("explorer/index.md", "explorer/index.html") if staged.has(page)][:1]
    sections: dict[str, Nav] = {
        "Start": ["index.md", "install.md"],
        "The idea": ["idea.md", "words.md", "complexity.md", "xray.md", "alignment.md", "explorer.md", *explorer],
        "How to": [*listed("howto"), "library.md", "commands.md", "convert.md", "training.md", "export.md", "gpu.md"],
        "Operators": ["operators/index.md", *families],
        "Reference": listed("api"),
        "Studies": [
            "studies/index.md", *studies, "search.md", "denoising.md", "ocr.md", {"Trained networks": listed("models")},
        ],
        "Project": [
            {"Benchmarks": ["benchmarks.md", *listed("benchmarks")]}, {"Decisions": listed("decisions")},
            "log.md", "changelog.md", "contributing.md",
        ],
    }  # fmt: skip
    return [{section: [_titled(page, staged) for page in pages]} for section, pages in sections.items()]


def _titled(page: Any, staged: Staged) -> Any:
    """A page with the title that the navigation shows."""
    if isinstance(page, dict):
        return {title: [_titled(inner, staged) for inner in inside] if isinstance(inside, list) else inside
                for title, inside in page.items()}  # fmt: skip
    return {staged.titles[page]: page} if page in staged.titles else page


def write(staged: Staged, path: Path) -> Path:
    """Write the configuration beside the pages: its path."""
    said = yaml.safe_load((PAGES / "mkdocs.yml").read_text(encoding="utf-8"))
    said["nav"] = navigation(staged)
    text = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path

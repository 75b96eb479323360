"""Pages that are written: from docs/ and a few files beside it to the site, their links changed with them."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "LICENSE": "LICENSE.txt"}
"""Files outside docs/ that are pages of the site."""
RESULTS = "benchmarks/results"
LEFT_OUT = ("store",)  # folders of docs/ that hold every run of a study
SHOWN = {".py": "python", ".sh": "bash", ".yml": "yaml", ".toml": "toml"}
"""Sources that pages link to: each becomes a page that shows it."""
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")


class Staged:
    """The folder that the site is built from; what a build leaves unwritten is swept out of it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.titles: dict[str, str] = {}
        self.lists: dict[str, dict[str, list[str]]] = {}
        self._kept: set[Path] = set()

    def put(self, name: str, content: str | bytes) -> None:
        """Write a file, unless it says so already: a server would take it for a change."""
        path = self.folder / name
        raw = content.encode() if isinstance(content, str) else content
        if not path.is_file() or path.read_bytes() != raw:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        self._kept.add(path)
        if name.endswith(".md") and isinstance(content, str) and (head := re.search(r"^# (.+)$", content, re.M)):
            self.titles[name] = head[1].replace("`", "")

    def has(self, name: str) -> bool:
        """Whether a file of this name was put."""
        return self.folder / name in self._kept

    def sweep(self) -> None:
        """Remove what was not put."""
        for path in [p for p in self.folder.rglob("*") if p.is_file() and p not in self._kept]:
            path.unlink()


def sources(root: Path) -> dict[str, str]:
    """Files of the repository that go into the site: where each lies there.

    >>> sources(Path(__file__).resolve().parents[1])["docs/studies/README.md"]
    'studies/index.md'
    """
    found = dict(OUTSIDE)
    for folder, place in (("docs", ""), (RESULTS, "benchmarks")):
        for path in sorted((root / folder).rglob("*")):
            inside = path.relative_to(root / folder)
            if path.is_file() and not set(inside.parts) & set(LEFT_OUT) and path.suffix != ".json":
                name = "index.md" if inside.name == "README.md" else inside.name
                found[path.relative_to(root).as_posix()] = PurePosixPath(place, inside.parent, name).as_posix()
    return found


def newest(root: Path) -> float:
    """When the written pages were last changed."""
    return max((root / name).stat().st_mtime for name in sources(root))


def written(staged: Staged) -> None:
    """Put all written pages, and lists of those that come in numbers."""
    places = sources(staged.root)
    for name, place in places.items():
        path = staged.root / name
        if path.suffix == ".md":
            staged.put(place, rewritten(path.read_text(encoding="utf-8"), name, place, places, staged))
        else:
            staged.put(place, path.read_bytes())
    _list(
        staged,
        "decisions",
        "Decisions",
        "Choices with alternatives worth remembering, in the order in which they were made.",
    )
    _list(staged, "howto", "How to", "Each page is run as a test.")
    _list(staged, "models", "Trained networks", "Small networks whose weights come with the package.")
    _list(
        staged,
        "benchmarks",
        "Every table",
        "One file for each processor, as `make bench` and the recipes write them.",
        "tables.md",
    )


def _list(staged: Staged, folder: str, title: str, said: str, name: str = "index.md") -> None:
    """A page that links to every page of a folder."""
    rows = {p: t for p, t in sorted(staged.titles.items()) if p.startswith(f"{folder}/") and p != f"{folder}/index.md"}
    lines = [f"- [{t}]({PurePosixPath(p).relative_to(folder)})" for p, t in rows.items()]
    staged.put(f"{folder}/{name}", "\n".join([f"# {title}", "", said, "", *lines, ""]))
    staged.lists[folder] = {"": [f"{folder}/{name}", *rows]}


def rewritten(text: str, name: str, place: str, places: dict[str, str], staged: Staged) -> str:
    """A page with its links as they are in the site, and tables as Python's Markdown reads them.

    A link to a file that is no page leads to a page that shows it, or to a copy.
    """

    def link(found: re.Match[str]) -> str:
        wanted = os.path.normpath(os.path.join(os.path.dirname(name), found[2]))
        target = places.get(wanted) or _beside(wanted, places, staged)
        if target is None:
            return found[0]  # the build will say that it is not there
        return found[1] + os.path.relpath(target, os.path.dirname(place) or ".") + found[3]

    def outside(part: str) -> str:
        pieces = re.split(r"(`[^`\n]*`)", part)
        return "".join(p if p.startswith("`") else LINK.sub(link, p) for p in pieces)

    blocks, last, out = list(FENCE.finditer(text)), 0, []
    for block in blocks:
        out += [outside(text[last : block.start()]), block[0]]
        last = block.end()
    return _tables("".join([*out, outside(text[last:])]))


def _tables(text: str) -> str:
    r"""In tables, code whose bars are escaped for GitHub: here a bar in code is no border.

    >>> print(_tables(r"| `a \| b` | c \| d |"))
    | `a | b` | c \| d |
    """
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if line.startswith("|"):
            lines[i] = re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line)
    return "\n".join(lines)


def _beside(wanted: str, places: dict[str, str], staged: Staged) -> str | None:
    """Where a file or folder of the repository that is no page is found in the site."""
    path = staged.root / wanted
    if path.is_dir():
        indexes = {
            "docs/decisions": "decisions/index.md",
            "docs/studies": "studies/index.md",
            RESULTS: "benchmarks/tables.md",
        }
        return indexes.get(wanted)
    if not path.is_file():
        return None
    if path.suffix not in SHOWN:
        staged.put(f"files/{wanted}", path.read_bytes())
        return f"files/{wanted}"
    source = path.read_text(encoding="utf-8")
    staged.put(f"files/{wanted}.md", f"# {wanted}\n\n```{SHOWN[path.suffix]}\n{source}```\n")
    return f"files/{wanted}.md"

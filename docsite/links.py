"""What a built page points to must be there: pages, files, pictures, and places in pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The targets and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.targets.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken(site: Path) -> list[str]:
    """Every target inside a site that is not there, with the page that points to it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.html").write_text('<p id="x"><a href="#x">ok</a> <a href="#y">no</a> <img src="b.png">')
    >>> broken(folder)
    ['a.html: #y is no place in the page', 'a.html: b.png is not there']
    """
    files = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in files.items():
        if path.name == "404.html":  # its targets count from the address that was not found
            continue
        for target in dict.fromkeys(page.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or not target:
                continue
            where = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if where.is_dir():
                where /= "index.html"
            if not where.is_file():
                found.append(f"{path.relative_to(site)}: {target} is not there")
            elif parts.fragment and where in files and unquote(parts.fragment) not in files[where].anchors:
                found.append(f"{path.relative_to(site)}: {target} is no place in the page")
    return found

"""What the pages of all studies are made of: one HTML document that asks for nothing outside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f4f1; color: #22262b; font: 16px/1.6 "Source Sans 3", "Segoe UI",
  "Helvetica Neue", Helvetica, Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 44px 48px 60px; background: #fff; }
h1 { font-size: 31px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.3px; }
h2 { font-size: 20px; margin: 42px 0 8px; padding-top: 14px; border-top: 1px solid #e3e3de; }
p, ul { max-width: 76ch; margin: 10px 0; }
.under { color: #666; margin-top: 0; }
.answer { background: #f6f8fb; border-left: 4px solid #2f6db3; padding: 8px 20px; margin: 14px 0; }
.answer p { max-width: none; }
code { font: 13px/1.5 "DejaVu Sans Mono", Menlo, Consolas, monospace; background: #f3f3ef;
  padding: 1px 4px; border-radius: 3px; }
pre { background: #f3f3ef; padding: 12px 16px; overflow-x: auto; border-radius: 4px; }
pre code { padding: 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin: 12px 0; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid #444; padding: 5px 8px;
  vertical-align: bottom; line-height: 1.3; }
td { text-align: right; padding: 5px 8px; border-bottom: 1px solid #e8e8e4; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th.left, td.left { text-align: left; }
td code { white-space: normal; }
table.narrow { width: auto; }
table.narrow td { padding: 3px 28px 3px 0; }
tr.best td { background: #eef4ea; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; }
.scroll { overflow-x: auto; }
figure { margin: 14px 0 6px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption, .note { color: #555; font-size: 14.5px; line-height: 1.5; max-width: 84ch; margin-top: 8px; }
.failed { background: #fdf1ee; border-left: 4px solid #c8402a; padding: 8px 20px; }
footer { color: #777; font-size: 13.5px; margin-top: 40px; border-top: 1px solid #e3e3de; padding-top: 12px; }
.pictures { overflow-x: auto; }
.pictures svg { min-width: 620px; }
@media (max-width: 720px) { main { padding: 24px 18px; } }
"""


def document(title: str, sections: Sequence[str], *, css: str = "", script: str = "") -> str:
    """A whole page; empty sections are left out.

    >>> document("A < B", ["<p>one</p>", ""]).count("A &lt; B")
    1
    """
    scripts = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{css}</style></head><body><main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>{scripts}</body></html>\n"
    )


def paragraphs(texts: Sequence[str]) -> str:
    """A paragraph for every text.

    >>> paragraphs(["a & b"])
    '<p>a &amp; b</p>'
    """
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def figure(picture: str, caption: str) -> str:
    """An SVG element with a caption; where the screen is narrow it scrolls rather than shrinks."""
    return f"<figure><div class='pictures'>{picture}</div><figcaption>{escape(caption)}</figcaption></figure>"


def failures(found: Sequence[tuple[str, str]], then: str) -> str:
    """The runs that failed, (label, error), and what becomes of them; nothing where there is none."""
    if not found:
        return ""
    items = "".join(f"<li>{escape(name)}: <code>{escape(error)}</code></li>" for name, error in found)
    return (
        "<h2>Runs that failed</h2><div class='failed'><p>They are in no table and no figure, "
        f"{escape(then)}:</p><ul>{items}</ul></div>"
    )


def again(command: str, text: str, environment: Mapping[str, str]) -> str:
    """How to make the page again, and on what it was made."""
    machine = " · ".join(f"{name} {value}" for name, value in environment.items())
    return (
        f"<h2>To reproduce</h2><pre><code>{escape(command)}</code></pre>{paragraphs([text])}"
        f"<footer>{escape(machine)}</footer>"
    )

"""A page for every operator of the catalogue, and the periodic table that leads to them; all said by the library."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import nearfold
from docsite.pages import Staged
from nearfold.catalogue_page import CHANNELS, COLOURS, SIDE, matrix_of, png
from nearfold.grammar import CATALOGUE, Basic, Branch, Entry, Operation, Sum
from nearfold.grammar.complexity import primitives
from nearfold.grammar.presets import FAMILIES
from nearfold.grammar.word import Word
from nearfold.look.layers import features, read
from nearfold.look.picture import load_image
from nearfold.lower import Explanation, explain, parameters
from nearfold.nn import Mixer
from nearfold.periodic import year

PHOTO, GRID, PATCH = "sample:flower.jpg", (14, 21), (5, 11)  # the position asked: on the edge of the blossom
CELL = 16  # pixels of a patch in the picture
MARK = (11, 95, 255)
ADDRESS = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
MAPS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def write(staged: Staged, kept: Path, pictures: bool = True) -> None:
    """Put the page of every operator and the table.

    Args:
        staged: where to.
        kept: a folder that keeps pages and pictures between builds, until the code changes that makes them.
        pictures: whether there are any.
    """
    for entry in CATALOGUE.values():
        why = _pictures(staged, entry, kept) if pictures else "This site was built without pictures."
        text = kept / f"{entry.name}-{_version(entry)}{'' if pictures else '-bare'}.md"
        if not text.is_file():
            kept.mkdir(parents=True, exist_ok=True)
            text.write_text(page(entry, why), encoding="utf-8")
        staged.put(f"operators/{entry.name}.md", text.read_text(encoding="utf-8"))
    staged.put("operators/index.md", table(staged))
    staged.lists["operators"] = {
        family: [f"operators/{name}.md" for name in names] for family, names in FAMILIES.items()
    }


def table(staged: Staged) -> str:
    """All operators by family, each with its matrix where one was drawn."""
    lines = [
        "# The periodic table",
        "",
        f"{len(CATALOGUE)} operators of the field, by family. A picture is the operator's mixing matrix with plain",
        f"weights on a map of {SIDE} x {SIDE} positions (or a sequence of {SIDE * SIDE}): a row for every output",
        "position, a column for every input position; blue weighs positive, orange negative. `nearfold ops` prints",
        "the table, `nearfold ops --html ops.html` writes it as a page to search and sort. The words that operators",
        "are made of: [the words](../words.md).",
    ]
    for family, names in FAMILIES.items():
        lines += ["", f"## {family.capitalize()}", "", '<div class="nf-cards" markdown>', ""]
        for name in names:
            drawn = f"![](matrices/{name}.png)" if staged.has(f"operators/matrices/{name}.png") else ""
            lines.append(f"- [{drawn}**{name}** {CATALOGUE[name].title}]({name}.md)")
        lines += ["", "</div>"]
    return "\n".join(lines) + "\n"


def page(entry: Entry, why: str = "") -> str:
    """The page of one operator, in Markdown.

    Args:
        entry: of the catalogue.
        why: the reason for which there is no picture, or "".

    >>> page(CATALOGUE["conv"], "none").splitlines()[:3]
    ['# Convolution 3x3', '', '    window(3) | box | kernel']
    """
    op = entry.operation
    code, shape = example(entry)
    told = explain(op, shape)
    lines = [f"# {entry.title}", "", *(f"    {line}" for line in _spelled(entry.notation)), ""]
    lines += [f"`{entry.name}` in code and on the command line · {_paper(entry)}", ""]
    lines += ["| word | here |", "|---|---|"]
    lines += [f"| {word} | {said} |" for word, said in zip(("path", "shape", "weight"), entry.words, strict=True)]
    lines += ["", "## Where it looks", "", *([why] if why else _shown(entry)), ""]
    lines += ["## Formula", "", *formula(op), "", "## Code", "", "```python", *code.splitlines(), "```", ""]
    lines += ["## Cost", "", *_cost(entry, told), "", "## What runs it", "", *_backends(told), ""]
    lines += ["## Beside it in the table", "", *neighbours(entry), ""]
    return "\n".join(lines)


def _shown(entry: Entry) -> list[str]:
    """The two pictures of an operator, and how to read them."""
    flower = f"A photograph of a flower, and over it what {entry.title} reads for one position"
    return [
        '<div class="nf-pictures" markdown>',
        "",
        f"![{flower}](looks/{entry.name}.webp)",
        "",
        f"![The mixing matrix of {entry.title}](matrices/{entry.name}.png)",
        "",
        "</div>",
        "",
        f"Left: what one position (framed) of a photograph, seen as {GRID[0]} x {GRID[1]} patches, reads; blue weighs",
        f"positive, orange negative. Right: the whole mixing matrix on a map of {SIDE} x {SIDE} positions, a row for",
        "every output, a column for every input. Layers have plain weights, none is trained",
        "([how](../api/look.md#nearfold.look.look)); colours follow the square root of the weight. Photograph:",
        "flickr.com/photos/vultilion, CC BY 2.0, from scikit-learn.",
    ]


def _spelled(notation: str) -> list[str]:
    """A notation over lines that a phone can show, where it has parts."""
    return re.sub(r" ([+&]) ", r"\n\1 ", notation).split("\n")


def _paper(entry: Entry) -> str:
    found = re.fullmatch(r"(arXiv|doi) (\S+)", entry.source)
    when = f", {year(entry)}" if year(entry) else ""
    return f"[{entry.source}]({ADDRESS[found[1]]}{found[2]}){when}" if found else entry.source


def example(entry: Entry) -> tuple[str, tuple[int, ...]]:
    """Code that makes a layer and calls it, which has run, and the shape of its input.

    >>> print(example(CATALOGUE["conv"])[0].splitlines()[-1])
    layer(torch.randn(1, 64, 8, 8)).shape  # (1, 64, 8, 8)
    """
    op = entry.operation
    line = op.for_sequences
    refused = ""
    for side in (SIDE, 14):  # a table is made for one number of positions
        shape = (1, CHANNELS, side * side) if line else (1, CHANNELS, side, side)
        made = f'layer = Mixer("{entry.name}", {CHANNELS}{", ndim=1" if line else ""})'
        drawn = f"torch.randn{shape}"
        levels = max(getattr(part.path, "levels", 1) for part in op.parts)
        second = "" if not op.needs_context else f"context={drawn}" if levels == 1 else f"context=[{drawn}] * {levels}"
        call = f"layer({drawn}{', ' + second if second else ''})"
        space: dict[str, object] = {"Mixer": Mixer, "torch": torch}
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of slots that so small a map cannot fill
                exec(made, space)
                out = tuple(eval(call, space).shape)
        except ValueError as error:
            refused = str(error)
            continue
        head = "import torch\nfrom nearfold.nn import Mixer\n\n"
        return f"{head}{made}  # or by its notation\n{call}.shape  # {out}", shape
    raise ValueError(f"{entry.name}: no example runs: {refused}")


# --- the formula


def formula(op: Operation) -> list[str]:
    """The one formula with what an operation leaves of it, and what its letters are.

    >>> print(formula(nearfold.parse("all | row | softmax"))[2])
    y_i = sum over s of alpha[i, s] * value[index[i, s]]
    """
    parts = list(op.parts)
    names = [f"y{n}" for n in range(1, len(parts) + 1)] if len(parts) > 1 else ["y"]
    lines = ["", "```text"]
    if len(parts) > 1:
        each = iter(names)
        lines += [f"y = {_combined(op, each)}", ""]
    for name, part in zip(names, parts, strict=True):
        rho, kernel = part.weight.rho, part.weight.kernel
        factors = [*(["alpha[i, s]"] if rho.word != "ones" else []), *(["W_s"] if kernel else [])]
        lines.append(f"{name}_i = sum over s of {' * '.join([*factors, 'value[index[i, s]]'])}")
    lines += ["```", ""]
    for name, part in zip(names, parts, strict=True):
        if len(parts) > 1:
            lines += [f"`{name}`: `{part}`", ""]
        lines += [f"- {letter}: {said}" for letter, said in _letters(part)] + [""]
    return lines


def _combined(op: Operation, names: Iterator[str]) -> str:
    """Sums and branches, over the names of their parts."""
    if isinstance(op, Basic):
        return next(names)
    inside = [_combined(operand, names) for operand in op.operands]
    if isinstance(op, Branch):
        both = f"[{inside[0]} for {op.ratio:.4g} of the channels, {inside[1]} for the others]"
        return f"mix({both})" if op.mix else both
    assert isinstance(op, Sum)
    inside = [f"({one})" if " + " in one else one for one in inside]
    terms = [f"{rate} * {one}" if rate is not None else one for rate, one in zip(op.rates, inside, strict=True)]
    return " + ".join(terms)


def _letters(part: Basic) -> Iterator[tuple[str, str]]:
    """What the letters of the formula are for a part, in the words' own sentences."""
    rho, kernel = part.weight.rho, part.weight.kernel
    paths = " ".join(_said(path) for path in part.path.inside)
    yield "`index`", f"{paths} {_said(part.shape)}"
    if part.path.searches or rho.needs_score:
        yield "`score`", _said(part.path.similarity)
    if rho.word != "ones":
        yield "`alpha`", _said(rho)
    if kernel is not None:
        yield "`W`", _said(kernel)
    if maps := [MAPS[letter] for letter in part.weight.projections]:
        yield "`value`", f"learned pointwise maps make {', '.join(maps)}."
    else:
        yield "`value`", "the input itself, without a map."


def _said(word: Word) -> str:
    text = " ".join((word.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")
    return f"`{word}`. {text}"


# --- facts


def _cost(entry: Entry, told: Explanation) -> list[str]:
    op, ndim = told.operation, len(told.shape) - 2
    omega = nearfold.complexity(Mixer(op, CHANNELS, ndim=ndim))
    scores = " + ".join(f"{name} {score:g}" for name, score in primitives(op).items())
    rows = [
        ("parameters", f"{told.parameters:,}"),
        ("FLOPs, forward", f"{told.forward_flops:,}"),
        ("FLOPs, backward", f"{told.backward_flops:,}"),
        ("least traffic, float32", f"{told.bytes:,} bytes"),
        ("C_D, what has to be said", f"{omega.c_d:g} = {scores}"),
        ("C_P, millions of parameters that generate", f"{omega.c_p:.4g}"),
        ("Omega = C_D + alpha C_P", f"{omega.omega:.4g} (alpha = {omega.alpha:g})"),
    ]
    shape, out = (" x ".join(map(str, s)) for s in (told.shape, told.out_shape))
    lines = [
        f"One layer of {CHANNELS} channels, {shape} to {out} (batch, channels, positions). A multiply and an add are"
    ]
    lines += ["two FLOPs; [how complexity is counted](../complexity.md).", "", "| cost | |", "|---|---:|"]
    lines += [f"| {name} | {said} |" for name, said in rows]
    if any(part.backend == "oracle" for part in told.parts):
        lines += ["", "FLOPs of what the oracle runs are not counted."]
    if specs := parameters(op, CHANNELS, CHANNELS, ndim):
        lines += ["", "| parameter | shape |", "|---|---|"]
        lines += [f"| `{name}` | {' x '.join(map(str, spec.shape)) or 'a number'} |" for name, spec in specs.items()]
    return lines


def _backends(told: Explanation) -> list[str]:
    """What can run each part on a CPU in float32, the first choice first."""
    lines = ["On a CPU, in float32, with gradients. `nearfold explain` says why the others do not."]
    for part in told.parts:
        if len(told.parts) > 1:
            lines += ["", f"`{part.operation}`:"]
        lines += ["", "| backend | equal to the oracle | how |", "|---|---|---|"]
        able = {name: verdict for name, verdict in part.verdicts.items() if verdict.ok}
        for name in sorted(able, key=lambda name: name != part.backend):
            chosen = f"**{name}**" if name == part.backend else name
            reason = able[name].reason.replace("|", "\\|")
            lines.append(f"| {chosen} | {able[name].exactness} | {reason} |")
    return lines


def neighbours(entry: Entry) -> list[str]:
    """Operators that differ from one in one word, and the rest of its family.

    >>> [line for line in neighbours(CATALOGUE["conv"]) if "another weight" in line][0][:40]
    '- another weight: [depthwise](depthwise.'
    """
    lines, said = [], set()
    if isinstance(entry.operation, Basic):
        own = _words(entry.operation)
        for i, word in enumerate(("path", "shape", "weight")):
            found = [
                other.name
                for other in CATALOGUE.values()
                if isinstance(op := other.operation, Basic)
                and [a == b for a, b in zip(own, _words(op), strict=True)] == [n != i for n in range(3)]
            ]
            if found:
                lines.append(f"- another {word}: {_links(found)}")
                said |= set(found)
    family, names = next((family, names) for family, names in FAMILIES.items() if entry.name in names)
    rest = [name for name in names if name != entry.name and name not in said]
    if rest:
        lines.append(f"- {family}: {_links(rest)}")
    return lines or ["Nothing is near it."]


def _words(op: Basic) -> tuple[str, str, str]:
    kernel = op.weight.kernel
    return op.path.word, op.shape.word, op.weight.rho.word + (f"*{kernel.word}" if kernel else "")


def _links(names: list[str]) -> str:
    return ", ".join(f"[{name}]({name}.md)" for name in names)


# --- pictures


def _pictures(staged: Staged, entry: Entry, kept: Path) -> str:
    """Put an operator's two pictures, drawn or kept: why there are none, or ""."""
    base = kept / f"{entry.name}-{_version(entry)}"
    look, matrix, none = (base.with_suffix(suffix) for suffix in (".webp", ".png", ".txt"))
    if not (matrix.is_file() or none.is_file()):
        kept.mkdir(parents=True, exist_ok=True)
        try:
            drawn, table = over_photograph(entry), png(matrix_of(entry))
        except ValueError as error:
            none.write_text(f"No picture: {error}", encoding="utf-8")
        else:
            look.write_bytes(drawn)
            matrix.write_bytes(table)
    if none.is_file():
        return none.read_text(encoding="utf-8")
    staged.put(f"operators/looks/{entry.name}.webp", look.read_bytes())
    staged.put(f"operators/matrices/{entry.name}.png", matrix.read_bytes())
    return ""


def _version(entry: Entry) -> str:
    """Changes with the operator, and with any code that its page comes from."""
    return hashlib.sha256(f"{entry} {_sources()}".encode()).hexdigest()[:16]


@functools.cache
def _sources() -> str:
    package = Path(nearfold.__file__).parent
    parts = ("grammar", "kernels", "look", "lower", "nn", "recognise")
    files = [p for part in parts for p in sorted((package / part).rglob("*.py"))]
    digest = hashlib.sha256()
    for path in (Path(__file__), package / "catalogue_page.py", package / "periodic.py", *files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def over_photograph(entry: Entry) -> bytes:
    """What one position reads, in colour over a grey photograph: a WebP file.

    Raises:
        ValueError: it reads a second input.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = read(entry.operation, features(load_image(PHOTO), GRID), PATCH).row
    raw = io.BytesIO()
    Image.fromarray(coloured(row).numpy()).save(raw, "webp", quality=80)
    return raw.getvalue()


def coloured(row: Tensor) -> Tensor:
    """A row of weights (h, w) over the photograph, its position framed: (H, W, 3), uint8."""
    h, w = row.shape
    bright = load_image(PHOTO).mean(0)[None, None]
    grey = torch.nn.functional.interpolate(bright, (h * CELL, w * CELL), mode="area")[0, 0] * 0.55 + 0.45
    share = (row / row.abs().max().clamp(min=1e-30)).repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)[..., None]
    colours = torch.tensor(COLOURS) / 255
    ink = torch.where(share < 0, colours[1], colours[0])
    level = 0.9 * share.abs().sqrt()
    pixels = grey[..., None] * (1 - level) + ink * level
    top, left = PATCH[0] * CELL, PATCH[1] * CELL
    for width, colour in ((3, (255, 255, 255)), (2, MARK)):  # a frame around the patch, not over it
        for a in range(-width, 0):
            frame = pixels[top + a : top + CELL - a, left + a : left + CELL - a]
            for edge in (frame[0], frame[-1], frame[:, 0], frame[:, -1]):
                edge.copy_(torch.tensor(colour) / 255)
    return (pixels * 255).round().to(torch.uint8)

"""Image files that nobody vouches for: the formats that are meant and no other, upright, within limits that are said.

Everything in the package that reads an image reads it here; and pages take theirs from `jpeg_uri`.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".bmp": "BMP", ".gif": "GIF",
    ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".pgm": "PPM", ".ppm": "PPM", ".pbm": "PPM", ".pnm": "PPM",
}  # fmt: skip
"""What ends the name of an image file, and Pillow's name of its format. Whatever its name, a file may have any of these
formats and no other: among the others are programs, such as PostScript."""

MOST_BYTES = 2**29
"""Of an encoded image."""
MOST_PIXELS = 2**27
"""Of an image."""
MOST_ASPECT = 100
"""Of the longer side to the shorter one: resized by its shorter side, a line of pixels would take all memory."""

_MOST_NAMED = 5
_named: dict[str, set[str]] = {}  # what Pillow and we warned of, and the images of which it was said
_GRAY_MODES = {"1", "L", "LA"}
_DEEP_MODES = {"I", "F"}  # and I;16 of every kind


def read_file(path: Path, most: int = MOST_BYTES, where: str = "") -> bytes:
    """Read a file, and nothing that waits or never ends.

    Args:
        path: The file.
        most: Bytes that it may have.
        where: For messages; empty: the path.

    Raises:
        ValueError: It cannot be read, has more bytes, or is a pipe, a device or a folder.
    """
    where = where or str(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(
                    f"{where} is a pipe, a device or a folder, not a file: name another one, or move it away"
                )
            content = b""
            if status.st_size <= most:
                with open(descriptor, "rb", buffering=0, closefd=False) as file:
                    content = file.read(most + 1) or b""
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({first_line(error)}): restore it") from error
    if max(status.st_size, len(content)) > most:
        raise ValueError(
            f"{where} has {status.st_size:,} bytes, at most {most:,} are read: make it smaller, or move it away"
        )
    return content


def picture(encoded: bytes, where: str, mode: str = "") -> Image:
    """Decode an image with Pillow, and turn it upright as its EXIF orientation says.

    Where Pillow warns, of damaged EXIF data for instance, a warning names the image: the first few of each kind.

    Args:
        encoded: The file's content, in one of the formats of :data:`SUFFIXES`. Of several frames the first is read.
        where: For messages.
        mode: Pillow's name of what to convert to; empty: ``"L"`` where the image is gray, else ``"RGB"``.

    Raises:
        ValueError: It does not decode, is larger or thinner than is read, or has more than 8 bits a channel.
    """
    from PIL import Image, UnidentifiedImageError

    formats = sorted(set(SUFFIXES.values()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is said
        try:
            with Image.open(io.BytesIO(encoded), formats=formats) as image:
                refused = _refusal(image)
                plain, damage = (None, "") if refused else _decoded(image, mode)
        except Exception as error:  # Pillow raises nearly anything on broken bytes
            unknown = isinstance(error, UnidentifiedImageError)
            why = f"its content is none of {', '.join(formats)}" if unknown else first_line(error)
            raise ValueError(f"{where} does not decode as an image ({why}): replace or delete it") from error
    if plain is None:
        raise ValueError(f"{where} {refused}")
    problems = [*(f"Pillow warns: {first_line(warning.message)}" for warning in said), *([damage] if damage else [])]
    for problem in dict.fromkeys(problems):
        named = _named.setdefault(problem, set())
        if where not in named and len(named) < _MOST_NAMED:  # catch_warnings makes Python forget what it has shown
            named.add(where)
            last = " (no further image with this is named)" if len(named) == _MOST_NAMED else ""
            warnings.warn(f"{where}: {problem}{last}", stacklevel=2)
    return plain


def _refusal(image: Image) -> str:
    """Why an image is not read, by what is known before it is decoded; empty: it is."""
    width, height = image.size
    if width * height > MOST_PIXELS or max(width, height) > MOST_ASPECT * min(width, height):
        return (
            f"has {width} x {height} pixels: at most {MOST_PIXELS:,} are read, and {MOST_ASPECT} times as many along "
            "one side as along the other; crop it or delete it"
        )
    if _deep(image):
        return "has more than 8 bits a channel: convert it to 8 bits (which level is white, the file does not say)"
    return ""


def _deep(image: Image) -> bool:
    """Whether Pillow would clip an image, or take the upper half of its bits, to make it 8-bit."""
    if image.mode in _DEEP_MODES or image.mode.startswith("I;16"):
        return True
    bits = getattr(image, "tag_v2", {}).get(258, 8)  # TIFF's BitsPerSample
    if max(bits if isinstance(bits, tuple) else (bits,)) > 8:
        return True
    for _, _, _, how in getattr(image, "tile", []):
        for part in how if isinstance(how, tuple) else (how,):
            if image.format == "PNG" and isinstance(part, str) and re.search(r";16", part):
                return True
            if image.format == "PPM" and isinstance(part, int) and part > 255:  # its brightest value
                return True
    return False


def _decoded(image: Image, mode: str) -> tuple[Image, str]:
    """Convert an image and turn it upright; return what is wrong with its orientation too."""
    from PIL.Image import Exif, Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    image.load()  # which turns some formats already, and then forgets the orientation
    mode = mode or ("L" if image.mode in _GRAY_MODES else "RGB")
    # Transparency is dropped; of a palette Pillow wants to be told so.
    plain = (image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image).convert(mode)
    try:
        if image.info.get("exif"):
            Exif().load(image.info["exif"])  # raises where Pillow has let it pass
        orientation = image.getexif().get(0x112, 1)
    except Exception as error:  # as when it decodes
        return plain, f"damaged EXIF data ({first_line(error)}), taken as it lies"
    if isinstance(orientation, int) and orientation in turns:
        return plain.transpose(turns[orientation]), ""
    known = isinstance(orientation, int) and orientation in (0, 1)
    return plain, "" if known else f"unknown EXIF orientation {orientation!r:.40}, taken as it lies"


def first_line(error: object) -> str:
    """Return the first line of an error's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def jpeg_uri(pixels: Tensor, side: int | None = None) -> str:
    """An image (3, H, W), or (1, H, W), from 0 to 1 as JPEG in a data URI; a square where a side is given."""
    from PIL import Image as Pillow

    raw = (pixels.expand(3, -1, -1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Pillow.fromarray(raw)
    if side is not None:
        image = image.resize((side, side), Pillow.Resampling.LANCZOS)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()

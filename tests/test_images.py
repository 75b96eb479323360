"""Images are read in one place: only the formats that are meant, upright, within limits, the same for every reader."""

import ast
import io
import os
import stat
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import nearfold
from nearfold import _images
from nearfold._images import SUFFIXES, picture
from nearfold.look import load_image
from nearfold.train import load_data, open_data

PACKAGE = Path(nearfold.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def folder_with(root, content, name="z.png"):
    """A data set of two classes with one image of this content among others."""
    for label in "ab":
        (root / "train" / label).mkdir(parents=True)
        for number in range(9):
            shade = 20 * number
            (root / "train" / label / f"{number}.png").write_bytes(encoded(Image.new("RGB", (20, 20), (shade, 9, 9))))
    (root / "train" / "a" / name).write_bytes(content)
    return root


def by_look(root, content, name):
    root.mkdir(exist_ok=True)
    path = root / name
    path.write_bytes(content)
    return numpy.asarray(load_image(path).movedim(0, -1) * 255).round().astype("uint8")


def by_memory(root, content, name):
    data = load_data(folder_with(root, content, name), image_size=20)
    return len(data.train) + len(data.val) + len(data.test)


def by_stream(root, content, name):
    """Every image of every split, as workers read them."""
    data = open_data(folder_with(root, content, name), image_size=8)
    for share in data.splits.values():
        read = share.records.reader(1)
        for row in share.rows.tolist():
            picture(read(row), share.records.where(row), "RGB")


READERS = pytest.mark.parametrize("reader", [by_look, by_memory, by_stream])


# Formats.


def opens_of_pillow(source):
    """The calls of PIL.Image.open in a module, under whatever name, and the formats that each allows."""
    tree = ast.parse(source)
    modules, functions, found = {"PIL.Image"}, set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "PIL":
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "Image"}
        if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            functions |= {alias.asname or alias.name for alias in node.names if alias.name == "open"}
        if isinstance(node, ast.Import):
            modules |= {alias.asname for alias in node.names if alias.name == "PIL.Image" and alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            of_pillow = called in functions or (called.endswith(".open") and called.removesuffix(".open") in modules)
            if of_pillow or called.rpartition(".")[2] in ("imread", "read_image", "decode_image"):
                found.append(next((ast.unparse(word.value) for word in node.keywords if word.arg == "formats"), None))
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from PIL import Image\nImage.open(x)", [None]),
        ("from PIL import Image as I\nI.open(x, formats=['PNG'])", ["['PNG']"]),
        ("import PIL.Image\nPIL.Image.open(x)", [None]),
        ("import PIL.Image as P\ndef f(): return P.open(x)", [None]),
        ("from PIL.Image import open as o\no(x)", [None]),
        ("import matplotlib.pyplot as plt\nplt.imread(x)", [None]),
        ("open(x)\npath.open()", []),
    ],
)
def test_what_opens_an_image_is_found(source, found):
    assert opens_of_pillow(source) == found


def test_images_are_opened_in_one_place_with_formats_that_are_named():
    words = ("PIL", "imread", "read_image", "decode_image")
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in SOURCES}
    found = {path: opens_of_pillow(text) for path, text in texts.items() if any(word in text for word in words)}
    assert {path: opens for path, opens in found.items() if opens} == {"_images.py": ["formats"]}


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
UNMEANT = {
    "postscript": POSTSCRIPT,
    "postscript in a DOS header": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<II", 30, len(POSTSCRIPT))
    + bytes(18)
    + POSTSCRIPT,
    "icon": encoded(Image.new("RGB", (16, 16)), "ICO"),
    "targa": encoded(Image.new("RGB", (16, 16)), "TGA"),
    "photoshop": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(12 + 2 + 243),
    "pixmap in C": b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #000000",\n"a"};\n',
    "fits": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(80),
    "nothing": b"",
}


@READERS
@pytest.mark.parametrize("content", UNMEANT.values(), ids=UNMEANT)
@pytest.mark.parametrize("name", ["z.jpg", "z.tiff"])
def test_other_formats_are_refused_whatever_the_name(tmp_path, reader, content, name):
    with pytest.raises(
        ValueError, match=rf"{name} does not decode as an image \(its content is none of BMP, GIF, JPEG"
    ):
        reader(tmp_path, content, name)


def test_no_program_is_started(tmp_path, monkeypatch):
    """A Ghostscript of our own would leave a mark, and does where Pillow is asked to read any format."""
    mark, program = tmp_path / "started", tmp_path / "gs"
    program.write_text(f'#!/bin/sh\ntouch "{mark}"\n[ "$1" = --version ] && echo 9.50 && exit 0\nexit 1\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for reader in (by_look, by_memory, by_stream):
        with pytest.raises(ValueError, match=r"z\.jpg does not decode"):
            reader(tmp_path / reader.__name__, POSTSCRIPT, "z.jpg")
    assert not mark.exists()
    (tmp_path / "x.jpg").write_bytes(POSTSCRIPT)
    anyone = "from PIL import Image\ntry: Image.open('x.jpg').load()\nexcept Exception: pass"
    subprocess.run([sys.executable, "-c", anyone], cwd=tmp_path, check=True)  # a process of its own: Pillow remembers
    assert mark.exists()


@pytest.mark.parametrize("kind", sorted(set(SUFFIXES.values())))
def test_every_format_that_is_meant_is_read(tmp_path, kind):
    image = Image.new("RGB", (20, 20), (200, 100, 0))
    assert by_look(tmp_path, encoded(image, kind), "z.png").mean((0, 1)) == pytest.approx([200, 100, 0], abs=3)
    assert picture(encoded(image, kind), "z").mode == "RGB"
    assert by_memory(tmp_path / "data", encoded(image, kind), "z.png") == 19


# Limits.


def bitmap(width, height):
    """The header of an image that has no pixels."""
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


@READERS
@pytest.mark.parametrize("size", [(65_000, 1), (3, 60_000), (101, 1), (12_000, 12_000), (30_000, 30_000)])
def test_large_and_thin_images_are_refused_by_name(tmp_path, reader, size):
    with pytest.raises(ValueError, match=r"z\.bmp (has \d+ x \d+ pixels: at most 134,217,728|.*exceeds limit)"):
        reader(tmp_path, bitmap(*size), "z.bmp")


def test_a_thin_image_within_the_limit_is_read(tmp_path):
    assert by_memory(tmp_path, encoded(Image.new("L", (200, 2))), "z.png") == 19


# More than 8 bits.


def png(colour_type, channels, bits=16, width=3, height=2):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + bytes(width * channels * bits // 8)) * height
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(bits, samples, kind=1, width=4, height=4):
    tags = [(256, 3, 1, width), (257, 3, 1, height), (259, 3, 1, 1), (262, 3, 1, 2 if samples > 1 else 1)]
    tags += [(277, 3, 1, samples), (278, 3, 1, height), (279, 4, 1, width * height * samples * bits // 8)]
    tags += [(258, 3, samples, bits), (273, 4, 1, 512), (339, 3, 1, kind)]
    if samples > 1:  # several values do not fit into the entry
        tags[7] = (258, 3, samples, 400)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    body = head.ljust(400, b"\0") + struct.pack("<H", bits) * samples
    return body.ljust(512, b"\0") + bytes(width * height * samples * bits // 8)


DEEP = {
    "gray PNG": png(0, 1),
    "RGB PNG": png(2, 3),
    "gray PNG with alpha": png(4, 2),
    "RGBA PNG": png(6, 4),
    "gray TIFF": tiff(16, 1),
    "RGB TIFF": tiff(16, 3),
    "float TIFF": tiff(32, 1, kind=3),
    "int TIFF": tiff(32, 1, kind=2),
    "gray PGM": b"P5 4 4 65535\n" + bytes(32),
    "12-bit PGM": b"P5 4 4 4095\n" + bytes(32),
    "RGB PPM": b"P6 4 4 65535\n" + bytes(96),
    "plain PPM": b"P3 1 1 300\n1 2 3\n",
    "float map": b"Pf 2 2 -1.0\n" + bytes(16),
}


@READERS
@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_more_than_8_bits_are_refused_by_every_reader(tmp_path, reader, content):
    with pytest.raises(ValueError, match=r"z\.png has more than 8 bits a channel: convert it to 8 bits"):
        reader(tmp_path, content, "z.png")


def test_8_bits_and_fewer_are_read():
    made = (png(0, 1, 8), png(2, 3, 8), tiff(8, 1), tiff(8, 3), b"P6 2 2 15\n" + bytes(12), b"P4 8 2\n\0\0")
    assert [picture(content, "x").mode for content in made] == ["L", "RGB", "L", "RGB", "RGB", "L"]


# EXIF.


def corners():
    """An image that tells how it was turned."""
    image = Image.new("RGB", (32, 16), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 16, 8))  # red above on the left
    return image


def turned(orientation, kind):
    exif = Image.Exif()
    exif[0x112] = orientation
    return encoded(corners(), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_every_reader_turns_a_photograph_upright(tmp_path, orientation, kind):
    content = turned(orientation, kind)
    looked = by_look(tmp_path, content, "z.jpg")
    trained = numpy.asarray(picture(content, "z.jpg"))
    assert numpy.array_equal(looked, trained)
    assert trained.shape[:2] == ((32, 16) if orientation >= 5 else (16, 32))
    height, width = trained.shape[0] // 2, trained.shape[1] // 2
    quarters = trained[:height, :width], trained[:height, width:], trained[height:, :width], trained[height:, width:]
    red = [quarter[2:-2, 2:-2, 0].mean() > 128 for quarter in quarters]
    where = {0: 0, 1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[orientation]  # as EXIF defines them
    assert red == [number == where for number in range(4)]


def entries(*tags, end=bytes(4)):
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + end


ORIENTATION = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
DAMAGED = {
    "other tags": (entries(ORIENTATION, struct.pack("<HHI", 0x100, 7, 4) + b"abcd"), True),
    "cut": (entries(ORIENTATION, ORIENTATION)[:-11], True),
    "cut before": (entries(ORIENTATION)[:-9], False),
    "junk": (b"Exif\0\0junkjunk", False),
    "unknown": (entries(struct.pack("<HHIHH", 0x112, 3, 1, 77, 0)), False),
    "text": (entries(struct.pack("<HHI", 0x112, 2, 4) + b"6\0\0\0"), False),
}


@READERS
@pytest.mark.parametrize(("exif", "turns"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_exif_is_said_at_most_and_the_same_everywhere(tmp_path, monkeypatch, reader, exif, turns):
    monkeypatch.setattr(_images, "_named", {})
    content, name = encoded(Image.new("RGB", (40, 30)), "JPEG", exif=exif), "z.jpg"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reader(tmp_path, content, name)
        assert picture(content, f"again {name}").size == ((30, 40) if turns else (40, 30))
    texts = [str(warning.message) for warning in said if name in str(warning.message)]
    assert all("\n" not in text for text in texts)
    assert turns or len(texts) == 2, "what is taken as it lies is said"


def test_the_first_few_images_of_a_kind_of_damage_are_named(monkeypatch):
    monkeypatch.setattr(_images, "_named", {})
    content = encoded(Image.new("RGB", (40, 30)), "JPEG", exif=DAMAGED["junk"][0])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name in "aabcdaefgh":
            picture(content, name)
    assert [str(warning.message)[:2] for warning in said] == ["a:", "b:", "c:", "d:", "e:"]
    assert str(said[-1].message).endswith("(no further image with this is named)")


def test_transparency_is_dropped_without_a_word(recwarn):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 200, 100, 0])
    plain = picture(encoded(image, "PNG", transparency=b"\xff\x10"), "x")
    assert plain.mode == "RGB" and plain.getpixel((0, 0)) == (200, 100, 0) and not recwarn


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(6, 55), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_exif_stops_a_reader(changes):
    exif = bytearray(
        entries(ORIENTATION, struct.pack("<HHI", 0x100, 7, 4) + b"abcd", struct.pack("<HHII", 0x132, 2, 20, 50))
    )
    for place, value in changes:
        exif[place % len(exif)] = value
    content = encoded(Image.new("RGB", (8, 6)), "JPEG", exif=bytes(exif))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert picture(content, "x").size in ((8, 6), (6, 8))

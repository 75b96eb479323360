"""The picture of where operators look: what it reads, what it says, and what it refuses."""

from __future__ import annotations

import argparse

import numpy
import pytest
import torch

from nearfold.grammar import CATALOGUE
from nearfold.look import DEFAULT, load_image, look
from nearfold.look.layers import FEATURES, Reading, features, plain_layer, read
from nearfold.look.picture import _pooled
from nearfold.models.look_command import arguments, run

SIZE = 8


@pytest.fixture(scope="module")
def image():
    rng = numpy.random.default_rng(0)
    return rng.integers(0, 256, (32, 48, 3), dtype=numpy.uint8)


@pytest.fixture(scope="module")
def x(image):
    return features(load_image(image), (SIZE, SIZE))


def words(figure):
    return [text.get_text() for panel in figure.axes for text in panel.texts]


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_every_entry_of_the_catalogue_is_read(name, x):
    if CATALOGUE[name].operation.needs_context:
        with pytest.raises(ValueError, match="there is one image"):
            read(name, x, (3, 4))
        return
    found = read(name, x, (3, 4))
    assert found.title == CATALOGUE[name].title and found.row.shape == (SIZE, SIZE)
    assert found.matrix.isfinite().all() and found.matrix.abs().sum() > 0
    assert torch.equal(found.matrix[found.line].unflatten(0, (SIZE, SIZE)), found.row)


def test_plain_layers_say_what_their_words_say(x):
    row = read("conv", x, (3, 4)).row
    assert row[2:5, 3:6].allclose(torch.tensor(1 / 9)) and row.sum().isclose(torch.tensor(1.0))
    row = read("attention", x, (3, 4)).row
    assert row.sum().isclose(torch.tensor(1.0)) and row.argmax() == 3 * SIZE + 4, "a patch is most like itself"
    assert read("attention", x, (3, 4)).row.allclose(read("attention_multiquery", x, (3, 4)).row), "heads see alike"
    found = read("convnn", x, (3, 4))
    assert found.summary == "reads 9 of 64 positions, spread as over 9.0" and found.row[3, 4] > 0
    assert read("swin", x, (3, 4)).row[7].abs().max() == 0 and not read("swin", x, (3, 4)).signed
    scan = read("mamba", x, (3, 4))
    assert scan.signed and scan.matrix.triu(1).abs().max() == 0
    torch.testing.assert_close(read("conv", x, (0, 0)).matrix, read("depthwise", x, (0, 0)).matrix)
    strided = read("conv_strided", x, (7, 7))
    assert strided.matrix.shape == (16, 64) and strided.line == 15


def test_deformable_slots_slide_uphill():
    x = torch.zeros(1, len(FEATURES), 5, 5)
    still = read("deformable_v2", x, (2, 2)).row
    assert still[1:4, 1:4].allclose(torch.tensor(0.5 / 9))
    x[:, FEATURES.index("slope right")] = 1.0
    x[:, FEATURES.index("slope down")] = -1.0
    assert read("deformable", x, (2, 2)).row[0:3, 2:5].allclose(torch.tensor(1 / 9)), "one up, one right"
    torch.testing.assert_close(
        read("deformable(3, groups=2) | box | kernel", x, (2, 2)).matrix, read("deformable", x, (2, 2)).matrix
    )


def test_a_flat_image_has_no_features_and_a_ramp_its_slope():
    assert features(torch.full((3, 16, 16), 0.3), (4, 4)).abs().max() < 0.05
    ramp = torch.linspace(0, 1, 64).square().expand(3, 64, 64)  # steeper to the right
    slope = features(ramp, (4, 4))[0, FEATURES.index("slope right")]
    assert (slope[:, :2] < 0).all() and (slope[:, 2:] > 0).all() and slope.std(0).max() < 1e-5


def test_plain_layers_are_the_same_every_time():
    state = torch.random.get_rng_state()
    one, two = (plain_layer(CATALOGUE["involution"].operation) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_figure_names_and_marks(image, tmp_path):
    notation = "window(5) | box | softmax(heads=2)*kernel(groups=2)"
    figure = look(image, ["mamba", notation, "pool_mean"], (31, 47), size=SIZE)
    said = " ".join(words(figure))
    assert (
        "Selective scan (Mamba)" in said and "row 31, column 47 of 32 x 48 pixels" in said and "8 x 8 patches" in said
    )
    assert notation in " ".join(reversed(words(figure))) and "reads 9 of 64 positions" in said
    frame = figure.axes[0].patches[-1]
    assert frame.get_x() + frame.get_width() == 48 and frame.get_y() + frame.get_height() == 32
    assert [axes.get_ylabel() for axes in figure.axes].count("weight") == 3
    assert [axes.get_xlabel() for axes in figure.axes].count("input position (raster order)") == 3
    figure.savefig(tmp_path / "look.png")
    assert (tmp_path / "look.png").stat().st_size > 10_000


def test_no_text_lies_on_another(image):
    figure = look(image, ["scan_cross", "acmix", "swin", "conv", "branch"], (0, 0), size=SIZE)
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    boxes = [text.get_window_extent(renderer) for axes in figure.axes for text in axes.texts if text.get_text()]
    boxes += [text.get_window_extent(renderer) for text in figure.texts]
    boxes += [axes.xaxis.label.get_window_extent(renderer) for axes in figure.axes if axes.get_xlabel()]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            # lines of one heading touch by a pixel, no more
            overlap = min(box.y1, other.y1) - max(box.y0, other.y0), min(box.x1, other.x1) - max(box.x0, other.x0)
            assert min(overlap) < 2


def test_pooling_keeps_single_points():
    matrix = torch.zeros(1000, 500)
    matrix[7, 3], matrix[900, 450], matrix[900, 451] = 1, -2, 1
    pooled = _pooled(matrix)
    assert max(pooled.shape) < 200 and pooled.max() == 1 and pooled.min() == -2


def test_a_reading_of_nothing():
    assert Reading("", "", torch.zeros(2, 2), torch.zeros(4, 4), 0).summary.startswith("reads 0 of 4 positions")


def test_names_are_where_users_have_them():
    import nearfold
    from nearfold import lower, mixing

    assert lower.looks is nearfold.look.looks and "looks" in lower.__all__
    assert mixing.mixing_matrix is nearfold.mixing_matrix is nearfold.look.mixing_matrix
    assert nearfold.look.look is look


def test_images_of_every_kind(tmp_path):
    from PIL import Image

    grey = numpy.linspace(0, 1, 12 * 10).reshape(12, 10)
    assert load_image(grey).shape == (3, 12, 10)
    assert load_image(numpy.zeros((4, 5, 4), dtype=numpy.uint8)).shape == (3, 4, 5)
    Image.fromarray((grey * 255).astype(numpy.uint8)).save(tmp_path / "grey.png")
    torch.testing.assert_close(load_image(tmp_path / "grey.png"), load_image(grey), rtol=0, atol=1 / 255)
    assert load_image("sample:flower.jpg").shape == (3, 427, 640)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "nowhere.jpg"}, "nowhere.jpg: no such file"),
        ({"image": __file__}, "does not decode as an image"),
        ({"image": "sample:dog.jpg"}, "sample:china.jpg and sample:flower.jpg"),
        ({"image": numpy.zeros((4, 4, 2))}, r"\(4, 4, 2\)"),
        ({"image": numpy.full((9, 9), 3.5)}, "from 0 to 1, got values from 3.5"),
        ({"at": (32, 0)}, r"\(32, 0\) is outside the image, which has 32 rows and 48 columns"),
        ({"at": (0, -1)}, "outside"),
        ({"size": 40}, "from 2 to 32"),
        ({"operations": ["convn"]}, "'convn' is not the name of an operator .did you mean convnn"),
        ({"operations": ["zzz"]}, "nearfold ops"),
        ({"operations": ["window(3) | box"]}, r"\^"),
        ({"operations": ["all(cross) | row | softmax"]}, "one image"),
        ({"operations": []}, "at least one operation"),
    ],
)  # fmt: skip
def test_what_is_refused(change, said, image):
    given = {"image": image, "operations": ["conv"], "at": (3, 3), "size": SIZE} | change
    with pytest.raises(ValueError, match=said):
        look(given["image"], given["operations"], given["at"], size=given["size"])


def test_the_command(tmp_path, capsys, image):
    from PIL import Image

    Image.fromarray(image).save(tmp_path / "photo.png")
    parser = argparse.ArgumentParser()
    arguments(parser)
    out = tmp_path / "new" / "seen.svg"
    given = [str(tmp_path / "photo.png"), "--op", "conv", "--op", "all | row | mean", "--at", "5,6", "--size", "6"]
    assert run(parser.parse_args([*given, "--out", str(out)])) == 0
    assert capsys.readouterr().out.strip() == str(out) and out.read_text().lstrip().startswith("<?xml")
    with pytest.raises(ValueError, match=r"\.png, \.pdf"):
        run(parser.parse_args([*given, "--out", "look.doc"]))
    plain = parser.parse_args(["sample:china.jpg"])
    assert plain.operations is None and plain.at is None and set(DEFAULT) <= set(CATALOGUE)
    with pytest.raises(SystemExit):
        parser.parse_args(["photo.jpg", "--at", "5"])
    assert "wanted row and column" in capsys.readouterr().err

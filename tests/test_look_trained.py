"""What the layers of a network read of an image, each of its own map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nearfold.cli import main
from nearfold.look import mixing_matrix
from nearfold.models import create, look_into
from nearfold.models import look as trained


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create("resnet8s_hybrid", widths=(8, 8, 8))


def test_every_layer_is_read_on_its_own_map(network):
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = trained.readings(network, pixels, (0.4, 0.7))
    assert [r.title for r in found] == [f"groups.{i}.layer" for i in range(3)]
    assert [tuple(r.row.shape) for r in found] == [(16, 16), (8, 8), (4, 4)]
    assert [r.line for r in found] == [6 * 16 + 11, 3 * 8 + 5, 1 * 4 + 2]
    assert network.training  # as it was
    network.eval()
    mean, std = (torch.tensor(network.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    x = ((pixels - mean) / std)[None]
    with torch.no_grad():
        for i, reading in enumerate(found):
            group = network.groups[i]
            before = (
                network.stages(x)[i - 1] if i else nn.functional.gelu(network.stem(nn.functional.pad(x, (0, 1, 0, 1))))
            )
            x_i = nn.functional.gelu(group.norm1(nn.functional.max_pool2d(group.conv(before), 2)))
            matrix = mixing_matrix(group.layer, x_i)[0].mean(0)
            torch.testing.assert_close(reading.matrix, matrix)
            torch.testing.assert_close(reading.row.flatten(), matrix[reading.line])
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_the_middle_square_is_seen(network):
    pixels = torch.zeros(3, 40, 80)
    pixels[:, :, 20:60] = 1.0
    assert trained.seen(network, pixels).min() > 0.9999
    with pytest.raises(ValueError, match=r"at=\(20, 10\) is outside the image's middle square"):
        look_into(network, pixels.movedim(0, 2), (20, 10))


def test_it_is_drawn_and_says_what_it_is(network):
    figure = look_into(network, torch.rand(40, 40, 3), (20, 20))
    said = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "resnet8s_hybrid" in said and "32 x 32 pixels" in said and "trained on" not in said
    titles = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert [f"groups.{i}.layer" for i in range(3)] == [t for t in titles if t.startswith("groups.")]


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (nn.Identity(), "must be a network of nearfold.models with Mixer layers on maps, got Identity"),
        ("no_such", "no network is called 'no_such'"),
    ],
)
def test_what_cannot_be_drawn_is_said(model, error):
    with pytest.raises(ValueError, match=error):
        look_into(model, torch.rand(32, 32, 3))


def test_the_command_names_what_there_is(tmp_path, capsys):
    assert main(["look", "sample:flower.jpg", "--model", "resnet18_conv", "--out", str(tmp_path / "x.png")]) == 2
    assert "no weights come along for 'resnet18_conv'" in capsys.readouterr().err
    for more in (["--op", "conv"], ["--size", "20"]):
        assert main(["look", "sample:flower.jpg", "--model", "resnet8s_conv", *more]) == 2
        assert "leave out --op and --size, or --model" in capsys.readouterr().err

"""The views of an image that training sees, and the one that is evaluated."""

from dataclasses import replace

import pytest
import torch
from helpers.feeds import CPU, NEEDS_TORCHVISION, RECIPE
from PIL import Image

from nearfold.train import open_data, transforms
from nearfold.train.distributed import Team
from nearfold.train.seeds import generator

pytest.importorskip("pyarrow")
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.usefixtures("small_pieces"),
]


def gradient(width, height):
    """Red grows from left to right, green from top to bottom."""
    red = torch.linspace(0, 255, width).expand(height, width)
    green = torch.linspace(0, 255, height)[:, None].expand(height, width)
    return Image.fromarray(torch.stack([red, green, 0 * red], -1).to(torch.uint8).numpy())


def test_the_evaluated_view_is_the_centre():
    image = gradient(300, 200)
    resized = image.resize((384, 256), Image.Resampling.BICUBIC).crop((80, 16, 304, 240))
    wanted = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(224, 224, 3).permute(2, 0, 1)
    view = transforms.evaluation_view(image, 224)
    assert view.shape == (3, 224, 224) and (view.int() - wanted.int()).abs().max() <= 2


def test_random_boxes():
    image, draws = Image.new("RGB", (300, 200)), torch.Generator().manual_seed(0)
    boxes = torch.tensor([transforms._random_box(image, draws) for _ in range(2000)]).float()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 300 and boxes[:, 3].max() <= 200
    area, ratio = width * height / 60_000, width / height
    assert 0.075 < area.min() < 0.1 and area.max() > 0.8 and 0.74 <= ratio.min() < 0.77 and 1.3 < ratio.max() <= 1.35
    middle = (boxes[:, 0] + boxes[:, 2]).mean() / 2
    assert abs(middle - 150) < 5
    assert transforms._random_box(Image.new("RGB", (1000, 10)), draws) == (493, 0, 506, 10)


def test_half_of_the_views_are_mirrored():
    image = gradient(64, 64)
    views = [transforms.training_view(image, 8, "resized_crop", generator(n)) for n in range(400)]
    rising = sum(bool(view[0, 0, -1] > view[0, 0, 0]) for view in views)
    assert 160 < rising < 240
    assert all(view[1, -1, 0] > view[1, 0, 0] for view in views), "never upside down"


@NEEDS_TORCHVISION
def test_erasing():
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    erased = []
    for n in range(200):
        plain = transforms.training_view(image, 32, "resized_randaugment", generator(n))
        view = transforms.training_view(image, 32, "resized_erasing", generator(n))
        changed = (plain != view).any(0)
        if changed.any():
            assert (view[:, changed] == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None]).all()
            erased.append(float(changed.float().mean()))
    assert 30 < len(erased) < 70 and max(erased) < 0.4


@NEEDS_TORCHVISION
def test_views_leave_the_global_generator_alone(image_folders):
    data = open_data(image_folders / "folder", image_size=16)
    before = torch.get_rng_state()
    for workers in (0, 1):
        feed = data.open_feed(replace(RECIPE, augment="resized_erasing"), Team(0, 1, CPU), workers)
        list(feed.train(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_views_differ_between_epochs_and_images():
    image = gradient(64, 64)
    draws = [generator(0, "view", epoch, row) for epoch in range(2) for row in range(2)]
    views = [transforms.training_view(image, 8, "resized_crop", d) for d in draws]
    assert len({view.numpy().tobytes() for view in views}) == 4

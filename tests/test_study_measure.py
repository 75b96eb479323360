import torch
from torch import nn

from nearfold.study.measure import count_flops, measure


def batch(n=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4


def network(width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 4),
    )  # fmt: skip


def test_costs_of_a_known_network():
    model = network()
    cost = measure(model, *batch())
    assert cost.parameters == (3 * 8 * 9 + 8) + 16 + (8 * 4 + 4)
    assert cost.flops == 2 * (3 * 9 * 8 * 64) + 2 * (8 * 4)
    assert cost.images_per_second > 0


def test_peak_memory_is_at_least_what_must_live_and_grows_with_the_batch():
    small, large = (measure(network(), *batch(n)).peak_memory_mib for n in (64, 256))
    # the outputs of convolution and norm live together at the end of the forward pass
    assert large >= 2 * 256 * 8 * 64 * 4 / 2**20
    assert 3 < large / small < 5
    assert large < 20 * 256 * 8 * 64 * 4 / 2**20


def test_the_measured_model_is_left_as_it_was():
    model = network().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model, *batch())
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())


def test_flops_scale_with_the_image():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert count_flops(conv, (3, 16, 16)) == 4 * count_flops(conv, (3, 8, 8)) > 0

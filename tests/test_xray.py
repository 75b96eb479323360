"""The x-ray: measures of known matrices by their closed forms, foreign layers as ours, and a model left as it was."""

from __future__ import annotations

import copy
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from nearfold import Rule, convert, xray
from nearfold.cli import main
from nearfold.examine.images import images_of, normalised
from nearfold.examine.layout import Layout, placed
from nearfold.examine.network import receptive_fields
from nearfold.examine.reading import probed
from nearfold.examine.suggest import suggest
from nearfold.look import mixing_matrix
from nearfold.look.measures import measure
from nearfold.models import create
from nearfold.nn import ConvNN2d, Mixer

ROOT = Path(__file__).parents[1]
SIDE = 6
N = SIDE * SIDE


def places():
    return torch.stack(torch.unravel_index(torch.arange(N), (SIDE, SIDE)), -1).double()


def test_reading_everything_alike():
    found = measure(torch.full((2, 1, N, N), 1 / N), (SIDE, SIDE))
    apart = torch.cdist(places(), places())
    expected = {
        "distance": float(apart.mean()), "reach": 1.0, "spread": N, "participation": N, "most95": math.ceil(0.95 * N),
        "itself": 1 / N, "before": (N + 1) / 2 / N, "beside": 0.0, "negative": 0.0, "anisotropy": 0.0, "rank": 1 / N,
        "translation": 1.0, "content": 0.0,
    }  # fmt: skip
    mean = found.mean()
    for name, value in expected.items():
        assert mean[name] == pytest.approx(value, abs=1e-6), name
    assert math.isnan(mean["heads"])


def test_a_convolution_of_equal_weights():
    conv = Mixer("window(3) | box | ones", 4)
    x = torch.randn(3, 4, SIDE, SIDE)
    found = measure(mixing_matrix(conv, x), (SIDE, SIDE)).mean()
    reads = [min(i + 1, SIDE - 1) - max(i - 1, 0) + 1 for i in range(SIDE)]
    spread = sum(a * b for a in reads for b in reads) / N
    assert found["spread"] == pytest.approx(spread, abs=1e-6)
    assert found["window3"] == found["translation"] == pytest.approx(1.0, abs=1e-6)
    assert found["content"] == found["negative"] == 0.0
    inner = measure(mixing_matrix(conv, x), (SIDE, SIDE)).spread
    assert inner.shape == (3, 1)
    middle = measure(mixing_matrix(conv, x, rows=[2 * SIDE + 2]), (SIDE, SIDE), torch.tensor([2 * SIDE + 2])).mean()
    assert middle["distance"] == pytest.approx((4 + 4 * math.sqrt(2)) / 9, abs=1e-6)
    assert middle["before"] == pytest.approx(5 / 9, abs=1e-6)


def test_a_line_a_block_and_a_sign():
    line = Mixer("window((1, 5)) | box | ones", 2)
    found = measure(mixing_matrix(line, torch.randn(1, 2, SIDE, SIDE)), (SIDE, SIDE)).mean()
    assert found["anisotropy"] == pytest.approx(1.0, abs=1e-6)
    block = Mixer("block(3) | box | mean", 2)
    found = measure(mixing_matrix(block, torch.randn(2, 2, SIDE, SIDE)), (SIDE, SIDE)).mean()
    assert found["spread"] == pytest.approx(9, abs=1e-6)
    assert found["rank"] == pytest.approx(4 / N, abs=1e-6)
    assert found["translation"] < 0.9
    signed = torch.tensor([[3.0, -1.0], [0.0, 2.0]])[None, None]
    assert measure(signed, (2,)).mean()["negative"] == pytest.approx((0.25 + 0) / 2)
    assert math.isnan(measure(signed, (2,), signed=False).mean()["negative"])


def test_rows_that_share_nothing_and_a_scan():
    one, other = torch.eye(N).roll(1, 1), torch.eye(N).roll(3, 1)
    found = measure(torch.stack([one, other])[:, None], (SIDE, SIDE))
    assert found.content.flatten().tolist() == pytest.approx([1.0, 1.0])
    heads = measure(torch.stack([one, other])[None], (SIDE, SIDE))
    assert float(heads.heads) == pytest.approx(1.0)
    scan = Mixer("scan(state=4) | causal | selective", 4, ndim=1).eval()
    matrix = mixing_matrix(scan, torch.randn(2, 4, 20))
    assert measure(matrix, (20,)).mean()["before"] == pytest.approx(1.0, abs=1e-6)


def test_tokens_beside_the_map():
    matrix = torch.zeros(1, 1, N, N + 1)
    matrix[..., 0] = 0.25
    matrix[0, 0, :, 1:] = torch.eye(N) * 0.75
    found = measure(matrix, (SIDE, SIDE), beside=1).mean()
    assert found["beside"] == pytest.approx(0.25)
    assert found["distance"] == 0.0
    assert found["itself"] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="2 tokens beside it"):
        measure(matrix, (SIDE, SIDE), beside=2)


def test_sequences_that_are_no_map_are_refused():
    assert placed(14 * 14 + 1, (224, 224)) == (1, (14, 14))
    with pytest.raises(ValueError, match="60 positions are no map of an image of 8 x 8"):
        placed(60, (8, 8))


class Attention(nn.Module):
    """An attention of somebody's: tokens, two heads."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, N, D))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 8, 2, stride=2), Attention()

    def forward(self, x):
        return self.attn(self.stem(x).flatten(2).mT)


def test_a_foreign_network_is_measured_by_its_own_weights_and_left_as_it_was():
    torch.manual_seed(0)
    net = Tokens().train()
    x = torch.randn(5, 3, 2 * SIDE, 2 * SIDE)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seen = xray(net, x, batch=3)
    stem, attention = seen.layers
    assert (stem.way, attention.way) == ("words", "words")
    assert attention.grid == (SIDE, SIDE)
    assert attention.beside == 0
    assert attention.images == 5
    with torch.no_grad():
        tokens = net.stem(x).flatten(2).mT
        q, k, _ = net.attn.qkv(tokens).view(5, N, 3, 2, -1).permute(2, 0, 3, 1, 4)
        alpha = (q @ k.mT / 2).softmax(-1)
    expected = measure(alpha, (SIDE, SIDE)).mean()
    for name in ("distance", "spread", "window3", "translation", "heads"):
        assert attention.measures[name] == pytest.approx(expected[name], abs=1e-5), name
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_what_has_no_words_is_differentiated():
    class Odd(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).tanh()

    torch.manual_seed(0)
    odd = Odd(3, 4, 3, padding=1)
    seen = xray(nn.Sequential(odd, nn.Conv2d(4, 4, 1)), torch.randn(2, 3, SIDE, SIDE))
    (layer,) = seen.layers
    assert layer.way == "derivative"
    assert layer.measures["window3"] == pytest.approx(1.0, abs=1e-6)
    assert 0 < layer.measures["content"] < 0.5


def test_the_derivative_of_a_linear_layer_has_the_measures_of_its_weights():
    class Halved(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) / 2

    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    halved = Halved(3, 4, 3, padding=1)
    halved.load_state_dict(conv.state_dict())
    x = torch.randn(3, 3, SIDE, SIDE)
    (known,), (asked,) = (xray(nn.Sequential(layer), x).layers for layer in (conv, halved))
    assert (known.way, asked.way) == ("words", "derivative")
    assert asked.measures["content"] == 0
    assert asked.measures["translation"] == pytest.approx(1, abs=1e-6)
    assert asked.measures["spread"] == pytest.approx(known.measures["spread"], rel=0.05)  # two signs, not all channels
    whole = mixing_matrix(halved, x[:1])
    many = probed(halved, halved, x[:1], torch.arange(N), Layout(1), probes=512)
    torch.testing.assert_close(many, whole[0, 0], rtol=0.2, atol=0.02)


def test_layers_maps_are_compared():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1))
    seen = xray(net, torch.randn(16, 3, 8, 8), batch=8)
    assert torch.allclose(seen.alike.diagonal(), torch.ones(2).double())
    assert 0.3 < seen.alike[0, 1] < 1
    assert seen.alike[0, 1] == pytest.approx(float(seen.alike[1, 0]))
    few = xray(net, torch.randn(3, 3, 8, 8))
    assert few.alike.isnan().all()
    assert [field.name for field in few.fields] == ["0", "1"]


def test_a_vector_is_asked_whole():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    first, vector = receptive_fields(net, torch.randn(2, 3, 9, 9), {"conv": net[0], "vector": net[2]})
    assert first.side <= 3 and vector.side > 7  # every pixel counts, those at the border less


def test_the_page_has_the_networks_that_were_counted():
    """docs/xray.md is what recipes/xray_networks.py makes of its results."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "xray_networks.py"))
    kept = json.loads(recipe["KEPT"].read_text())
    assert len(kept) >= 40 and list(kept) == [f"{name}:{n}" for name, all_ in recipe["NETWORKS"].items() for n in all_]
    assert recipe["table"](kept) in recipe["PAGE"].read_text()


@pytest.mark.slow
def test_the_command_writes_a_page_and_numbers(tmp_path, capsys):
    page, numbers = tmp_path / "x.html", tmp_path / "x.json"
    given = ["xray", "resnet8s_attention", "--pretrained", "--images", "4", "--suggest"]
    assert main([*given, "--out", str(page), "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    assert "groups.1.layer" in printed
    assert "nearest(" in printed
    assert "output changes by" in printed
    text = page.read_text()
    assert text.count("<details") == 7
    assert "http" not in text
    assert '"reach"' in numbers.read_text()


@pytest.mark.parametrize(("name", "side"), [("ViTModel", 14), ("Dinov2Model", 16), ("beit", 14)])
def test_a_network_of_transformers_by_name(name, side, tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "x.json"
    given = ["xray", f"transformers:{name}", "--images", "2", "--out", str(tmp_path / "x.html"), "--json", str(out)]
    assert main(given) == 0
    assert "note: a small configuration" in capsys.readouterr().out
    (found,) = json.loads(out.read_text()).values()
    attentions = [one for one in found["layers"] if "softmax" in one["notation"]]
    assert [(one["grid"], one["beside"]) for one in attentions] == [([side, side], 1)] * 2
    assert all("mean over all" in one["reason"] for one in found["left"])


def test_a_network_of_transformers_that_takes_no_images(capsys):
    pytest.importorskip("transformers")
    assert main(["xray", "transformers:BertModel"]) == 2
    assert "takes input_ids, and no images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["xray", "nothing_like_it"], "MODEL must be a network"),
        (["xray", "resnet8s_conv", "--out", "x.png"], "--out x.png: the page is HTML"),
        (["xray", "torchvision:resnet18"], "--input must say the size"),
        (["xray", "resnet8s_conv", "--data", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_the_command_refuses(given, said, capsys):
    assert main(given) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        (torch.zeros(1, 3, 8, 8), {}, "two or more"),
        (torch.zeros(2, 3, 8, 8), {"batch": 1}, "batch must be 2 or more"),
        (torch.zeros(2, 3, 8, 8).long(), {}, "floating point"),
    ],
)
def test_what_is_refused(images, options, said):
    with pytest.raises(ValueError, match=said):
        xray(nn.Sequential(ConvNN2d(3, 4, k=2)), images, **options)


def test_signs_are_told_where_they_are_known():
    x = torch.randn(2, 4, SIDE, SIDE)
    for text, known in (("box | separable", True), ("box | experts(2)", False), ("box | kernel(groups=4)", True)):
        (layer,) = xray(nn.Sequential(Mixer(f"window(3) | {text}", 4)), x).layers
        assert math.isnan(layer.measures["negative"]) != known, text


def test_attention_on_maps_becomes_nearest():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Mixer("all | row | softmax(heads=2)", 8))
    report = convert(net, Rule("nearest(5, scaled) | ranked | softmax(heads=2)", name="1"))
    (row,) = report.replaced
    assert (row.grade, row.reason) == ("approximate", "exact only up to 5 positions")


@torch.no_grad()
def test_every_suggestion_is_tried_alone():
    net = create("resnet8s_attention", pretrained=True).eval()
    x = normalised(net, images_of(None, 4, (3, 32, 32)))[0]
    before = net(x)
    found = suggest(net, x, xray(net, x, network=False))
    assert len({one.rule.name for one in found}) > 1
    for one in found:
        twin = copy.deepcopy(net)
        convert(twin, one.rule)
        after = twin(x)
        assert one.change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert one.same == float((after.argmax(1) == before.argmax(1)).double().mean())
    assert torch.equal(net(x), before)


class Attends(nn.Module):
    """Self-attention as torch is called by most."""

    def __init__(self, dropout=0.0, **options):
        super().__init__()
        self.first, self.options = nn.Conv2d(3, 8, 1), options
        self.attention = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        y = self.first(x).flatten(2).mT
        return self.attention(y, y, y, **self.options)[0]


def attended(net, x):
    (one,) = xray(net, x).layers
    return one


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"need_weights": True}, {"need_weights": False}, {"dropout": 0.3}], ids=str)
def test_torchs_attention_is_read_in_the_words_however_it_is_called(options, training):
    torch.manual_seed(0)
    net, x = Attends(**options).train(training), torch.randn(2, 3, SIDE, SIDE)
    before = torch.get_rng_state()
    one = attended(net, x)
    assert one.way == "words" and one.measures["spread"] > 30
    assert torch.equal(before, torch.get_rng_state()) and not net.calls and net.training == training


def test_what_is_query_key_and_value_at_once_is_differentiated_as_one():
    torch.manual_seed(0)
    causal, x = torch.ones(N, N, dtype=torch.bool).triu(1), torch.randn(2, 3, SIDE, SIDE)
    net = Attends(attn_mask=causal).eval()
    one = attended(net, x)
    y = net.first(x[:1]).flatten(2).mT.detach()
    J_MOND = torch.autograd.functional.jacobian(lambda t: net.attention(t, t, t, attn_mask=causal)[0], y)[0, :, :, 0]
    known = measure(J_MOND.square().sum((1, 3)).sqrt()[None, None], (SIDE, SIDE)).mean()
    assert one.way == "derivative" and one.measures["before"] == 1
    assert one.measures["spread"] == pytest.approx(known["spread"], rel=0.15)
    hooked = Attends().eval()
    plain = attended(hooked, x).measures["spread"]
    hooked.attention.register_forward_hook(lambda *call: None)
    assert attended(hooked, x).measures["spread"] == pytest.approx(plain, rel=0.2)


def test_several_maps_are_not_taken_for_one():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

        def forward(self, x):
            y = x.flatten(2).mT
            return self.attention(y + 1, y, y)[0]

    seen = xray(Two().eval(), torch.randn(2, 3, SIDE, SIDE))
    assert not seen.layers and "a second input" in seen.left[0].reason


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_given_two_maps_is_not_differentiated_by_one(channels):
    class Product(nn.Module):
        def forward(self, a, b):
            return F.avg_pool2d(a, 3, 1, 1) * F.max_pool2d(b, 3, 1, 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = Product()

        def forward(self, x):
            return self.product(x[:, :channels] + 1, x)

    seen = xray(Net(), torch.randn(2, 3, SIDE, SIDE))
    assert not seen.layers and any("several maps" in left.reason for left in seen.left), seen.left


def test_one_image_is_told_with_its_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match=f"--data {tmp_path} has 1 image: two at least"):
        images_of(str(tmp_path), 4, (3, 8, 8))


def test_a_model_may_write_into_what_it_is_given():
    class Writes(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.mul_(2))

    x = torch.randn(2, 3, SIDE, SIDE)
    before = x.clone()
    seen = xray(nn.Sequential(Writes(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)), x)
    assert torch.equal(x, before) and seen.fields


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: {"images": x.double()}, r"images are torch.float64.*images.to\(torch.float32\)"),
        (lambda x: {"images": x.where(x < 1, torch.inf)}, "must be finite"),
        (lambda x: {"batch": 2.5}, "batch must be 2 or more.*2.5"),
    ],
)
def test_images_that_cannot_be_measured_are_told(change, said):
    given = {"images": torch.randn(2, 3, SIDE, SIDE)}
    with pytest.raises(ValueError, match=said):
        xray(nn.Conv2d(3, 4, 3), **given | change(torch.ones(2, 3, SIDE, SIDE).cumsum(0)))


def test_files_that_cannot_be_written_are_told_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for options in (["--out", str(tmp_path / "file" / "x.html")], ["--json", str(tmp_path)]):
        assert main(["xray", "resnet8s_conv", "--images", "2", *options]) == 2
        assert options[0] in capsys.readouterr().err

"""Checkpoints of the public networks: files with their names and shapes, computed as they compute.

The layers themselves are compared with stored outputs of the public code in test_compat.py; here the networks around
them are written out.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfold.compat import NETWORKS, UnsupportedReference, from_reference, load_checkpoint
from nearfold.models import Network

BOUND = 1e-11


pytestmark = pytest.mark.usefixtures("float64")


def close(mine: Tensor, truth: Tensor) -> None:
    assert mine.shape == truth.shape and truth.abs().max() > 1e-3
    assert (mine - truth).abs().max().item() <= BOUND * truth.abs().max().item()


def linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, Tensor]:
    found = {f"{name}.weight": torch.randn(out, into) / math.sqrt(into)}
    return found | ({f"{name}.bias": torch.randn(out)} if bias else {})


def conv(name: str, out: int, into: int, size: int, bias: bool = True) -> dict[str, Tensor]:
    found = {f"{name}.weight": torch.randn(out, into, size, size) / (size * math.sqrt(into))}
    return found | ({f"{name}.bias": torch.randn(out)} if bias else {})


def norm(name: str, width: int, batch: bool = True) -> dict[str, Tensor]:
    found = {f"{name}.weight": 1 + 0.1 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}
    if batch:
        found |= {f"{name}.running_mean": 0.1 * torch.randn(width), f"{name}.running_var": 1 + torch.rand(width)}
        found |= {f"{name}.num_batches_tracked": torch.tensor(3)}
    return found


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) + 1 :]: t for n, t in state.items() if n.startswith(f"{prefix}.")}


def batch_norm(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.batch_norm(x, s[f"{name}.running_mean"], s[f"{name}.running_var"], s[f"{name}.weight"], s[f"{name}.bias"])


def layer_norm(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"])


def mapped(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))


# --- ConvNN: VGG and ResNet

ARGS = {
    "K": 9, "kernel_size": 3, "padding": 1, "sampling_type": "all", "num_samples": -1, "sample_padding": 0,
    "shuffle_pattern": "NA", "shuffle_scale": 2, "magnitude_type": "cosine", "similarity_type": "Col",
    "aggregation_type": "Col", "lambda_param": 0.5, "branch_ratio": 0.5, "img_size": [3, 32, 32],
}  # fmt: skip


def public_layer(kind: str, out: int, into: int) -> dict[str, Tensor]:
    """A layer's own state, by its public names."""
    if kind == "Conv2d":
        return {n[2:]: t for n, t in conv("c", out, into, 3).items()}
    if kind == "ConvNN":
        return {"conv1d_layer.weight": torch.randn(out, into, 9) / (3 * math.sqrt(into))}
    first = out // 2
    half = conv("branch2", out - first, into, 3)
    near = {"branch1.conv1d_layer.weight": torch.randn(first, into, 9) / (3 * math.sqrt(into))}
    near["branch1.conv1d_layer.bias"] = torch.randn(first)
    point = {"pointwise_conv.weight": torch.randn(out, out, 1, 1), "pointwise_conv.bias": torch.randn(out)}
    return near | half | point


def run_public(kind: str, state: dict[str, Tensor], x: Tensor, out: int) -> Tensor:
    if kind == "Conv2d":
        return F.conv2d(x, state["weight"], state.get("bias"), padding=1)
    name = {"ConvNN": "Conv2d_NN", "Branching": "Conv2d_Branching"}[kind]
    config = ARGS | {"in_channels": x.shape[1], "out_channels": out, "stride": 9}
    return from_reference(name, config, state)(x)


def vgg_state(kind: str, width: int = 4, hidden: int = 12) -> dict[str, Tensor]:
    state, into, at = {}, 3, 0
    for step in (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"):
        if step == "M":
            at += 1
            continue
        state |= {f"features.{at}.{n}": t for n, t in public_layer(kind, width * step, into).items()}
        state |= norm(f"features.{at + 1}", width * step)
        into, at = width * step, at + 3
    state |= linear("classifier.0", hidden, into * 49) | linear("classifier.3", hidden, hidden)
    return state | linear("classifier.6", 10, hidden)


@pytest.mark.parametrize("kind", ["Conv2d", "ConvNN", "Branching"])
def test_convnn_vgg(kind, tmp_path):
    state = vgg_state(kind)
    torch.save({"model_state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, tmp_path / "vgg.pt")
    net = load_checkpoint("convnn_vgg", tmp_path / "vgg.pt", ARGS | {"layer": kind, "model": "vgg11"}).eval()
    assert isinstance(net, Network)
    x = truth = torch.randn(2, 3, 32, 32)
    at = 0
    for step in (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"):
        if step == "M":
            truth, at = F.max_pool2d(truth, 2), at + 1
            continue
        truth = run_public(kind, under(state, f"features.{at}"), truth, 4 * step)
        truth, at = F.relu(batch_norm(state, f"features.{at + 1}", truth)), at + 3
    truth = F.adaptive_avg_pool2d(truth, 7).flatten(1)
    truth = F.relu(mapped(state, "classifier.3", F.relu(mapped(state, "classifier.0", truth))))
    close(net(x), mapped(state, "classifier.6", truth))


@pytest.mark.parametrize("kind", ["Conv2d", "ConvNN", "Branching"])
def test_convnn_resnet(kind):
    width, depths = 4, (2, 1, 1, 1)
    state = conv("first_conv.0", width, 3, 7, bias=False) | norm("first_conv.1", width)
    into = width
    for i, depth in enumerate(depths):
        out = width * 2**i
        for j in range(depth):
            block = f"layer{i + 1}.{j}"
            for n, read in ((1, into), (2, out)):
                own = public_layer(kind, out, read)
                own.pop("bias", None)
                for name, t in own.items():  # registered twice, as in the public block
                    state[f"{block}.conv{n}.{name}"] = state[f"{block}.layer{n}.0.{name}"] = t
                state |= norm(f"{block}.layer{n}.1", out)
            if into != out:
                state |= conv(f"{block}.identity", out, into, 1, bias=False)
            into = out
    state |= linear("classifier.2", 5, into * 49)
    net = load_checkpoint("convnn_resnet", state, ARGS | {"layer": kind}).eval()
    x = torch.randn(1, 3, 32, 32)
    y = F.relu(batch_norm(state, "first_conv.1", F.conv2d(x, state["first_conv.0.weight"], None, 2, 3)))
    y = F.max_pool2d(y, 3, 2, 1)
    for i, depth in enumerate(depths):
        for j in range(depth):
            block, came, out = f"layer{i + 1}.{j}", y, width * 2**i
            for n in (1, 2):
                y = run_public(kind, under(state, f"{block}.conv{n}"), y, out)
                y = F.relu(batch_norm(state, f"{block}.layer{n}.1", y))
            beside = state.get(f"{block}.identity.weight")
            y = F.relu(y + (came if beside is None else F.conv2d(came, beside)))
    close(net(x), mapped(state, "classifier.2", F.adaptive_avg_pool2d(y, 7).flatten(1)))
    assert [m.shape[1] for m in net.stages(x)] == [4, 8, 16, 32]


# --- ConvNN: ViT

VIT = {
    "Attention": {},
    "KvtAttention": {"K": 5},
    "ConvNNAttention": {"K": 4, "sampling_type": "all", "num_samples": -1, "magnitude_type": "matmul",
                        "coordinate_encoding": False, "convolution_type": "depthwise", "softmax_topk_val": True},
    "BranchAttention": {"K": 4, "branch_ratio": 0.5, "sampling_type": "all", "num_samples": -1,
                        "magnitude_type": "matmul", "coordinate_encoding": False, "convolution_type": "depthwise",
                        "softmax_topk_val": True},
}  # fmt: skip


def public_attention(kind: str, width: int) -> dict[str, Tensor]:
    if kind == "KvtAttention":
        return linear("qkv", 3 * width, width, bias=False) | linear("proj", width, width, bias=False)
    if kind == "BranchAttention":
        half = width // 2
        inner = {f"convnn.{n}": t for n, t in public_attention("ConvNNAttention", half).items()}
        inner |= {f"attention.{n}": t for n, t in public_attention("Attention", half).items()}
        return inner | linear("pointwise_linear", width, width)
    state = {n: t for c in "qkvo" for n, t in linear(f"W_{c}", width, width, bias=False).items()}
    return state | ({"conv.weight": torch.randn(width, 1, 4)} if kind == "ConvNNAttention" else {})


@pytest.mark.parametrize("kind", VIT)
def test_convnn_vit(kind):
    width, depth, patch = 8, 2, 4
    state = conv("patch_embedding.linear_projection", width, 3, patch) | norm("patch_embedding.norm", width, False)
    state["positional_encoding.cls_tokens"] = torch.randn(1, 1, width)
    single = torch.float32  # as the public table is, and ours
    frequency = torch.exp(torch.arange(0, width, 2, dtype=single) * (-math.log(10000.0) / width))
    at = torch.arange(17, dtype=single)[:, None] * frequency
    code = torch.stack([at.sin(), at.cos()], -1).flatten(1).double()
    state["positional_encoding.pe"] = code[None]
    for i in range(depth):
        block = f"transformer_encoder.{i}"
        state |= {f"{block}.attention.{n}": t for n, t in public_attention(kind, width).items()}
        state |= norm(f"{block}.norm1", width, False) | norm(f"{block}.norm2", width, False)
        state |= linear(f"{block}.mlp.0", 16, width) | linear(f"{block}.mlp.3", width, 16)
    state |= linear("classifier", 10, width)
    config = {"layer": kind, "num_heads": 1, "attention_dropout": 0.1, **VIT[kind]}
    net = load_checkpoint("convnn_vit", state, config).eval()
    x = torch.randn(2, 3, 16, 16)
    y = F.conv2d(x, state["patch_embedding.linear_projection.weight"], state["patch_embedding.linear_projection.bias"],
                 patch).flatten(2).mT  # fmt: skip
    y = torch.cat(
        [state["positional_encoding.cls_tokens"].expand(2, -1, -1), layer_norm(state, "patch_embedding.norm", y)], 1
    )
    y = y + code
    classes = {
        "Attention": "MultiHeadAttention",
        "KvtAttention": "MultiHeadKvtAttention",
        "ConvNNAttention": "MultiHeadConvNNAttention",
        "BranchAttention": "MultiHeadBranchingAttention",
    }
    for i in range(depth):
        block = f"transformer_encoder.{i}"
        given = config | {"d_hidden": width, "dim": width, "attention_dropout": 0.0, "topk": config.get("K")}
        layer = from_reference(classes[kind], given, under(state, f"{block}.attention"))
        y = y + layer(layer_norm(state, f"{block}.norm1", y))
        h = mapped(state, f"{block}.mlp.0", layer_norm(state, f"{block}.norm2", y))
        y = y + mapped(state, f"{block}.mlp.3", F.gelu(h))
    close(net(x), mapped(state, "classifier", y[:, 0]))


# --- ACmix: ResNet and Swin


def acmix_state(width: int, heads: int) -> dict[str, Tensor]:
    state = {n: t for i in (1, 2, 3) for n, t in conv(f"conv{i}", width, width, 1).items()}
    state |= conv("conv_p", width // heads, 2, 1)
    state |= {"fc.weight": torch.randn(9, 3 * heads, 1, 1), "dep_conv.weight": torch.randn(width, 9, 3, 3)}
    return state | {"rate1": torch.tensor([0.7]), "rate2": torch.tensor([-0.4])}


def test_acmix_resnet(tmp_path):
    width, depths = 8, (1, 2, 1, 1)
    state = conv("conv1", width, 3, 7, bias=False) | norm("bn1", width)
    into = width
    for i, depth in enumerate(depths):
        inner = width * 2**i
        for j in range(depth):
            block = f"layer{i + 1}.{j}"
            state |= conv(f"{block}.conv1", inner, into, 1, bias=False) | norm(f"{block}.bn1", inner)
            state |= {f"{block}.conv2.{n}": t for n, t in acmix_state(inner, 4).items()} | norm(f"{block}.bn2", inner)
            state |= conv(f"{block}.conv3", 4 * inner, inner, 1, bias=False) | norm(f"{block}.bn3", 4 * inner)
            if not j:
                state |= conv(f"{block}.downsample.0", 4 * inner, into, 1, bias=False)
                state |= norm(f"{block}.downsample.1", 4 * inner)
            into = 4 * inner
    state |= linear("fc", 10, into)
    torch.save(state, tmp_path / "acmix.pth")
    net = load_checkpoint("acmix_resnet", str(tmp_path / "acmix.pth")).eval()
    x = torch.randn(1, 3, 64, 96)
    y = F.relu(batch_norm(state, "bn1", F.conv2d(x, state["conv1.weight"], None, 2, 3)))
    y = F.max_pool2d(y, 3, 2, 1)
    for i, depth in enumerate(depths):
        inner = width * 2**i
        for j in range(depth):
            block, came, stride = f"layer{i + 1}.{j}", y, 2 if i and not j else 1
            y = F.relu(batch_norm(state, f"{block}.bn1", F.conv2d(y, state[f"{block}.conv1.weight"])))
            config = {"in_planes": inner, "out_planes": inner, "stride": stride}
            y = from_reference("ACmix", config, under(state, f"{block}.conv2"))(y)
            y = F.relu(batch_norm(state, f"{block}.bn2", y))
            y = batch_norm(state, f"{block}.bn3", F.conv2d(y, state[f"{block}.conv3.weight"]))
            if not j:
                came = F.conv2d(came, state[f"{block}.downsample.0.weight"], None, stride)
                came = batch_norm(state, f"{block}.downsample.1", came)
            y = F.relu(y + came)
    close(net(x), mapped(state, "fc", y.mean((2, 3))))


def swin_attention(s: dict[str, Tensor], x: Tensor, size: int, shift: int) -> Tensor:
    """The public layer inside its roll, one pair of positions at a time in the mask. x (B, H, W, C)."""
    B, H, W, C = x.shape
    heads = s["relative_position_bias_table"].shape[1]
    x = torch.roll(x, (-shift, -shift), (1, 2))
    qkv = mapped(s, "qkv", x)
    maps = qkv.reshape(B, H * W, 3 * heads, -1).permute(0, 2, 3, 1)  # B, 3 heads, d, HW
    made = torch.einsum("tm,bmdn->bdtn", s["fc.weight"].flatten(1), maps) + s["fc.bias"][:, None]
    wide = made.flatten(1, 2).unflatten(2, (H, W))
    out_conv = F.conv2d(wide, s["dep_conv.weight"], None, padding=1, groups=C // heads)
    q, k, v = qkv.unflatten(3, (3, heads, -1)).permute(3, 0, 4, 1, 2, 5).flatten(3, 4)  # B, heads, HW, d
    row, column = torch.arange(H * W) // W, torch.arange(H * W) % W
    score = q @ k.mT / math.sqrt(C // heads)
    dr, dc = row[:, None] - row + size - 1, column[:, None] - column + size - 1
    same = (row[:, None] // size == row // size) & (column[:, None] // size == column // size)
    index = (dr * (2 * size - 1) + dc).masked_fill(~same, 0)
    score = score + s["relative_position_bias_table"][index].permute(2, 0, 1)
    if shift:  # positions that the roll brought together do not see each other

        def region(at: Tensor, n: int) -> Tensor:
            return (at >= n - size).int() + (at >= n - shift).int()

        own = region(row, H) * 3 + region(column, W)
        same = same & (own[:, None] == own)
    score = score.masked_fill(~same, float("-inf"))
    y = (score.softmax(-1) @ v).transpose(1, 2).reshape(B, H, W, C)
    y = s["rate1"] * mapped(s, "proj", y) + s["rate2"] * out_conv.permute(0, 2, 3, 1)
    return torch.roll(y, (shift, shift), (1, 2))


def test_acmix_swin():
    width, depths, heads, size = 8, (2, 2), (2, 4), 4
    state = conv("patch_embed.proj", width, 3, 4) | norm("patch_embed.norm", width, False)
    for i, (depth, many) in enumerate(zip(depths, heads, strict=True)):
        C = width * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            own = linear("qkv", 3 * C, C) | linear("proj", C, C) | {"fc.bias": torch.randn(9)}
            own |= {"fc.weight": torch.randn(9, 3 * many, 1, 1), "dep_conv.weight": torch.randn(C, 9, 3, 3)}
            own |= {"rate1": torch.tensor([0.7]), "rate2": torch.tensor([-0.4])}
            own["relative_position_bias_table"] = torch.randn((2 * size - 1) ** 2, many)
            own["relative_position_index"] = torch.zeros(size**2, size**2, dtype=torch.long)
            state |= {f"{block}.attn.{n}": t for n, t in own.items()}
            state |= norm(f"{block}.norm1", C, False) | norm(f"{block}.norm2", C, False)
            state |= linear(f"{block}.mlp.fc1", 4 * C, C) | linear(f"{block}.mlp.fc2", C, 4 * C)
            if j and i == 0:  # the second stage's map is one window: the public code neither shifts nor masks it
                state[f"{block}.attn_mask"] = torch.zeros(4, size**2, size**2)
        if i == 0:
            state |= norm("layers.0.downsample.norm", 4 * C, False)
            state |= linear("layers.0.downsample.reduction", 2 * C, 4 * C, bias=False)
    state |= norm("norm", 2 * width, False) | linear("head", 10, 2 * width)
    net = load_checkpoint("acmix_swin", {"model": state}).eval()
    x = torch.randn(2, 3, 32, 32)
    y = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 4).permute(0, 2, 3, 1)
    y = layer_norm(state, "patch_embed.norm", y)
    for i, depth in enumerate(depths):
        if i:
            y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1)
            y = mapped(state, "layers.0.downsample.reduction", layer_norm(state, "layers.0.downsample.norm", y))
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            shift = size // 2 if f"{block}.attn_mask" in state else 0
            y = y + swin_attention(under(state, f"{block}.attn"), layer_norm(state, f"{block}.norm1", y), size, shift)
            h = F.gelu(mapped(state, f"{block}.mlp.fc1", layer_norm(state, f"{block}.norm2", y)))
            y = y + mapped(state, f"{block}.mlp.fc2", h)
    close(net(x), mapped(state, "head", layer_norm(state, "norm", y).mean((1, 2))))


# --- what does not fit

WRONG = [
    ("convnn_vit", {}, {}, "lacks 'patch_embedding.linear_projection.weight'"),
    ("vgg", {}, {}, "network='vgg' is not one of: convnn_vgg"),
    ("convnn_vgg", "nowhere.pt", {}, "checkpoint='nowhere.pt': there is no such file"),
    ("convnn_vgg", {"epoch": 3}, {}, "holds no state dict; it has: epoch"),
    ("convnn_vgg", vgg_state("Conv2d"), {}, "layer=None is not one of: Conv2d, ConvNN"),
    ("convnn_vgg", vgg_state("Conv2d"), {"layer": "ConvNN"}, "lacks 'K'"),
    ("convnn_vgg", vgg_state("Conv2d"), ARGS | {"layer": "ConvNN"}, "features.0: state does not fit config"),
    ("convnn_vgg", vgg_state("ConvNN"), ARGS | {"layer": "Conv2d"}, "missing features.0.weight"),
    ("convnn_vgg", vgg_state("Conv2d") | {"extra": torch.zeros(1)}, {"layer": "Conv2d"}, "unexpected extra"),
    ("convnn_vgg", vgg_state("Conv2d") | {"classifier.3.weight": torch.zeros(3, 3)}, {"layer": "Conv2d"},
     "does not fit convnn_vgg: .*size mismatch for classifier.3.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("network", "checkpoint", "config", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_what_does_not_fit_is_said(network, checkpoint, config, message):
    with pytest.raises(ValueError, match=r"(?s)" + message):
        load_checkpoint(network, checkpoint, config)


def test_candidates_that_are_drawn_in_evaluation_are_refused():
    with pytest.raises(UnsupportedReference, match="draws new candidates in evaluation too"):
        load_checkpoint(
            "convnn_vgg", vgg_state("ConvNN"), ARGS | {"layer": "ConvNN", "sampling_type": "random", "num_samples": 9}
        )


def test_every_network_is_tested():
    assert set(NETWORKS) == {"convnn_vgg", "convnn_resnet", "convnn_vit", "acmix_resnet", "acmix_swin"}

"""Vision transformers whose attention is any operation over tokens (arXiv 2606.14725; 2010.11929).

The layout is the public ConvNN-Attention network's: patches through a convolution and a layer norm, a class token, a
fixed sinusoidal code of the tokens' places, pre-norm blocks, and a classifier on the class token without a norm before
it. Nothing is owned per position, so that any image size goes.

Shape legend: B images, N tokens, D features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.models.network import TOKENS, Network
from nearfold.models.parts import classifier, require_size
from nearfold.models.registry import Entry, Published, register
from nearfold.nn import Mixer, TokenMixer

CONVNN = "nearest(9, scaled) | ranked | softmax(heads={heads})*depthwise"
ATTENTION = "all | row | softmax(heads={heads})"
CONV = "window(9) | box | ones(project=vo)*kernel"
LAYERS = {
    "attention": ATTENTION,
    "kvt": "nearest(100, scaled) | ranked | softmax(heads={heads})",
    "local": "window(257) | box | softmax(heads={heads}, project=qkv)",
    "sparse": "all | strided(14) | softmax(heads={heads})",
    "sparse_local": "block(49) | box | softmax(heads={heads})",
    "neighborhood": "window(9, mode=inside) | box | softmax(heads={heads})",
    "convnn": CONVNN,
    "branch_conv": f"branch(0.5, {CONVNN}, {CONV}, split)",
    "branch_attention": f"branch(0.5, {CONVNN}, {ATTENTION}, split)",
}
"""The layers that have a name, as notation; ``{heads}`` is the network's."""
LOCAL_HEAD = 64
"""Features of a head of the local layer, whatever the width: the public one's ``dim_head``."""


class _Narrow(TokenMixer):
    """Tokens (B, N, D) to tokens of another width (B, N, inner)."""

    def __init__(self, operation: str, width: int, inner: int, bias: bool) -> None:
        Mixer.__init__(self, operation, width, inner, ndim=1, bias=bias)


def token_layer(layer: str | Operation, width: int, heads: int, *, bias: bool = False) -> nn.Module:
    """What stands where attention stands: tokens (B, N, width) to the same shape.

    Args:
        layer: a name of `LAYERS`, an operation for sequences or its notation, in which ``{heads}`` becomes the number.
        width: features of a token.
        heads: heads.
        bias: of the projections and kernels.

    A branch is followed by a linear map with a bias, as in the public code.

    >>> token_layer("kvt", 12, 3)
    TokenMixer(nearest(100, scaled) | ranked | softmax(heads=3), 12, 12, ndim=1)
    """
    layer = str(layer)
    operation = LAYERS.get(layer, layer).replace("{heads}", str(heads))
    if layer == "local":
        inner = min(LOCAL_HEAD, width) * heads
        return nn.Sequential(_Narrow(operation, width, inner, bias), nn.Linear(inner, width, bias=bias))
    mixer = TokenMixer(operation, width, bias=bias)
    return nn.Sequential(mixer, nn.Linear(width, width)) if layer.startswith("branch") else mixer


def token_code(count: int, width: int, like: Tensor) -> Tensor:
    """Sine and cosine, in turns, of the token's number at wavelengths from 2 pi to 2 pi 10000: (count, width).

    Source: arXiv 1706.03762, 3.5.

    >>> token_code(2, 4, torch.zeros(1))[0]
    tensor([0., 1., 0., 1.])
    """
    even = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    place = torch.arange(count, device=like.device, dtype=torch.float32)
    angle = place[:, None] * torch.exp(even * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width].to(like.dtype)


class TransformerBlock(nn.Module):
    """x + layer(norm(x), *more), then x + MLP(norm(x)); tokens (B, N, D) to the same shape."""

    def __init__(self, layer: nn.Module, width: int, mlp_ratio: float = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = layer
        self.norm2 = nn.LayerNorm(width, eps)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        x = x + self.attention(self.norm1(x), *more)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(Network):
    """Patches, a class token, blocks, a linear classifier: (B, in_chans, H, W) to (B, num_classes).

    Args:
        layer: a name of `LAYERS`, or any operation for sequences of tokens, or its notation.
        width: features of a token.
        depth: blocks.
        heads: heads of the layer.
        patch: side of a patch; what an image has beyond a multiple of it is not read.
        bias: of the layer's projections and kernels.
        mlp_ratio: hidden features of the MLP, over width.
        num_classes, in_chans, img_size: as in `nearfold.models.create`; any size of at least one patch fits.

    >>> net = VisionTransformer("all | row | softmax(heads=2)", width=8, depth=1, patch=4, num_classes=5)
    >>> net(torch.zeros(1, 3, 9, 17)).shape
    torch.Size([1, 5])
    """

    pools, global_pool = TOKENS, "token"
    undecayed = ("class_token",)

    def __init__(
        self,
        layer: str | Operation = "attention",
        *,
        width: int = 192,
        depth: int = 12,
        heads: int = 1,
        patch: int = 16,
        bias: bool = False,
        mlp_ratio: float = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: tuple[int, int] = (224, 224),
    ) -> None:
        super().__init__()
        self.num_features, self.num_classes, self.patch = width, num_classes, patch
        self.embed = nn.Conv2d(in_chans, width, patch, patch)
        self.norm = nn.LayerNorm(width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(token_layer(layer, width, heads, bias=bias), width, mlp_ratio) for _ in range(depth)
        )
        self.head = classifier(width, num_classes)
        ends = sorted({-(-depth * (i + 1) // 4) - 1 for i in range(4)})
        self.feature_info = [
            {"num_chs": width, "reduction": patch, "module": f"blocks.{end}", "block": end} for end in ends
        ]

    def tokens(self, x: Tensor) -> Tensor:
        """The class token and the patches, before the blocks: (B, 1 + N, D)."""
        require_size(x, self.patch)
        x = self.norm(self.embed(x).flatten(2).transpose(1, 2))
        x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
        return x + token_code(x.shape[1], x.shape[2], x)

    def stages_and_last(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The patches' features behind every quarter of the blocks, as maps, and all tokens, the class token first."""
        grid = tuple(n // self.patch for n in x.shape[2:])
        ends = {info["block"] for info in self.feature_info}
        x = self.tokens(x)
        maps = []
        for i, block in enumerate(self.blocks):
            x = self.run(block, x)
            if i in ends:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))
        return maps, x


PROJECTIONS = tuple(f"{name}_weight" for name in ("query", "key", "value", "out"))


def init_linear(network: nn.Module) -> None:
    """Linear maps and projections: weights from a normal of deviation 0.02, biases zero, as Swin's and PVT's are."""
    for module in network.modules():
        drawn = ("weight",) if isinstance(module, nn.Linear) else PROJECTIONS if isinstance(module, Mixer) else ()
        for name, tensor in module.named_parameters():
            last = name.rpartition(".")[2]
            if last in drawn:
                nn.init.trunc_normal_(tensor, std=0.02)
            elif last.replace("bias", "weight") in drawn:
                nn.init.zeros_(tensor)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "heads": 1},
    "small": {"width": 384, "heads": 6},
    "base": {"width": 768, "heads": 12},
}
TEXTS = {
    "attention": "attention",
    "kvt": "attention to the 100 best keys",
    "local": "attention in a window, heads of 64 features",
    "sparse": "attention to every 14th token",
    "sparse_local": "attention in blocks of 49 tokens",
    "neighborhood": "attention to 9 neighbouring tokens in raster order",
    "convnn": "ConvNN attention, k = 9",
    "branch_conv": "half the channels ConvNN attention, half a convolution over 9 tokens",
    "branch_attention": "half the channels ConvNN attention, half attention",
}
SOURCE = "logs of the public ConvNN-Attention runs (arXiv 2606.14725), CIFAR-10 at 224 px"
COUNTS = {
    "attention": ("5,479,306", "no biases on the four projections (5,488,522 with them); one head"),
    "kvt": ("5,479,306", "no biases on the four projections"),
    "local": (
        "4,299,658",
        "one head of 64 features. The public layer cuts 128-token pieces that also read their neighbours, with rotary "
        "positions; here every token reads 128 to either side, without them. Neither counts in parameters",
    ),
    "sparse": ("5,479,306", "every token reads those a multiple of 14 away"),
    "sparse_local": ("5,479,306", "blocks of 49 tokens"),
    "neighborhood": ("", "over tokens in raster order, the class token first, as the public network calls NATTEN"),
    "convnn": (
        "5,500,042",
        "one head: with more, the public kernel over ranks is shared by the heads, here every channel has its own",
    ),
    "branch_conv": ("", "the public layer gives its convolution half biases; here the projections have none"),
    "branch_attention": ("5,049,610", "each half reads its own channels; a linear map with a bias follows"),
}

for _size, _arguments in SIZES.items():
    for _layer, _text in TEXTS.items():
        _count, _reading = COUNTS[_layer]
        register(
            f"vit_{_size}_{_layer}",
            Entry(
                VisionTransformer,
                {"layer": _layer, **_arguments},
                f"ViT-{_size.capitalize()}: {_text}",
                tiny={"width": 12, "depth": 2, "heads": 1 if _size == "tiny" else 2},
                published=Published(parameters=_count, source=SOURCE, reading=_reading, classes=10)
                if _size == "tiny" and _count
                else Published(reading=_reading),
            ),
        )

SMALL = {"width": 96, "depth": 6, "heads": 1, "patch": 4}
RANDOM = "nearest(9, scaled, random(32)) | ranked | softmax(heads=1)*depthwise"
for _name, _layer, _text in (
    ("attention", "attention", "attention"),
    ("convnn_random", RANDOM, "ConvNN attention, among 32 random keys in training"),
):
    register(
        f"vit_mini32_{_name}",
        Entry(
            VisionTransformer,
            {"layer": _layer, **SMALL},
            f"a small ViT for 32 px, patches of 4: {_text}",
            input_size=(3, 32, 32),
            num_classes=10,
            tiny={"width": 12, "depth": 2},
        ),
    )

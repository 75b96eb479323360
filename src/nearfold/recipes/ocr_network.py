"""PP-OCRv4's recogniser of text lines, with the weights that were published: PyTorch modules out of its ONNX file.

The file is in the wheel rapidocr-onnxruntime 1.4.4 (Apache-2.0). A small convolutional network makes one token of every
eight columns of pixels, two blocks of attention over the tokens follow (SVTR, arXiv 2205.00159), and a layer that names
one of 6,625 characters for every token, the first of which is "none" (CTC, Graves et al. 2006, doi
10.1145/1143844.1143891).

Shape legend: B lines, W columns of pixels, N = W // 8 tokens, D = 120 features, V characters.
"""

from __future__ import annotations

import importlib.util
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold.recipes.onnx_part import Graph, Part, filled, read

INSTALL = "pip install rapidocr-onnxruntime==1.4.4 onnx onnxruntime"
FILE = "models/ch_PP-OCRv4_rec_infer.onnx"
HEIGHT = 48
"""Rows of pixels."""
STRIDE = 8
"""Columns of pixels a token."""
HEADS = 8
FEATURES, SQUEEZED, MIXED, EXPANDED, JOINED, LAST = (
    "p2o.AveragePool.1", "swish_12.tmp_0", "transpose_50.tmp_0", "swish_15.tmp_0", "p2o.Concat.8", "swish_17.tmp_0"
)  # fmt: skip
"""Where the graph is cut: these tensors are made and read by PyTorch's modules or by ours."""
BLOCKS = ((43, 77, 78, 44, 79, 80), (45, 81, 82, 46, 83, 84))
"""Numbers, in the file, of a block's layers: norm, query key and value, out, norm, and the two of the MLP."""
FINAL_NORM, HEAD = 47, 85


def model_file() -> Path:
    """The ONNX file in the wheel, which is looked up and not imported.

    Raises:
        ImportError: the wheel is not installed, or is another version without this file.
    """
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    file = Path(found.origin).parent / FILE if found is not None and found.origin else None
    if file is None or not file.is_file():
        what = "is not installed" if file is None else f"has no {FILE} in the version that is installed"
        raise ImportError(f"the recogniser's weights are in rapidocr-onnxruntime 1.4.4, which {what}: {INSTALL}")
    return file


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on tokens (B, N, D)."""

    def __init__(self, graph: Graph, numbers: tuple[int, ...]) -> None:
        super().__init__()
        norm1, qkv, out, norm2, first, second = numbers
        self.norm1, self.norm2 = layer_norm(graph, norm1), layer_norm(graph, norm2)
        self.fc1, self.fc2 = linear(graph, first), linear(graph, second)
        projection = linear(graph, qkv)
        self.attn = nn.MultiheadAttention(projection.in_features, HEADS, batch_first=True)
        filled(self.attn, in_proj_weight=projection.weight, in_proj_bias=projection.bias)
        self.attn.out_proj.load_state_dict(linear(graph, out).state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.fc2(F.silu(self.fc1(self.norm2(x))))


class Recogniser(nn.Module):
    """(B, 3, 48, W), grey values from -1 to 1 -> scores of the characters (B, N, V), before their softmax.

    Args:
        graph: the file's, as `read` gives it.

    Attributes:
        backbone: the convolutional part, (B, 3, 48, W) -> (B, 480, 1, N); the rest is `read_features`.
        characters: what every number stands for.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.characters = ("", *graph.notes["character"].split("\n"), " ")
        self.backbone = Part(graph, "x", FEATURES)
        self.squeeze, self.expand = Part(graph, FEATURES, SQUEEZED), Part(graph, MIXED, EXPANDED)
        self.blocks = nn.ModuleList(Block(graph, numbers) for numbers in BLOCKS)
        self.norm = layer_norm(graph, FINAL_NORM)
        self.last, self.head = Part(graph, JOINED, LAST), linear(graph, HEAD)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 48, W) -> (B, N, V)."""
        return self.read_features(self.backbone(x))

    def read_features(self, features: Tensor) -> Tensor:
        """What follows the backbone: (B, 480, 1, N) -> (B, N, V)."""
        squeezed = self.squeeze(features)
        x = squeezed.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        mixed = self.norm(x).transpose(1, 2).unflatten(2, squeezed.shape[2:])
        joined = self.last(torch.cat([features, self.expand(mixed)], 1))
        return self.head(joined.squeeze(2).transpose(1, 2))

    def attention(self, block: int) -> Any:
        """The attention layer of a block, whatever stands there now."""
        return self.blocks[block].attn

    @torch.no_grad()
    def texts(self, features: Tensor, batch: int = 16) -> list[str]:
        """The text of every line, of what the backbone made of them: (B, 480, 1, N)."""
        return [t for part in features.split(batch) for t in decoded(self.read_features(part), self.characters)]


def decoded(scores: Tensor, characters: tuple[str, ...]) -> list[str]:
    """The best character of every token (B, N, V); of equal ones in a row one is kept, and 0 is none.

    >>> decoded(torch.eye(3)[torch.tensor([[1, 1, 0, 1, 2, 2]])], ("", "a", "b"))
    ['aab']
    """
    return ["".join(characters[best] for best, _ in groupby(row)) for row in scores.argmax(-1).tolist()]


def load() -> Recogniser:
    """The recogniser with the weights of the wheel, in evaluation.

    Raises:
        ImportError: the wheel or onnx is not installed.
    """
    return Recogniser(read(model_file())).eval()


def linear(graph: Graph, number: int) -> nn.Linear:
    """A layer of the file; its weight lies there as (in, out)."""
    weight, bias = (graph.tensor(f"linear_{number}.{part}_0") for part in "wb")
    return filled(nn.Linear(*weight.shape), weight=weight.T, bias=bias)


def layer_norm(graph: Graph, number: int) -> nn.LayerNorm:
    """A layer of the file, where it is ten operations: difference over sqrt(variance + eps), times w, plus b."""
    weight, bias = (graph.tensor(f"layer_norm_{number}.{part}_0") for part in "wb")
    makers = {node.output: node for node in graph.nodes}
    times = next(node for node in graph.nodes if f"layer_norm_{number}.w_0" in node.inputs)
    root = makers[makers[times.inputs[0]].inputs[1]]
    eps = graph.tensor(makers[root.inputs[0]].inputs[1]).item()
    return filled(nn.LayerNorm(len(weight), eps), weight=weight, bias=bias)


def difference(net: Recogniser, width: int, seed: int = 0) -> float:
    """By how much the probabilities differ from onnxruntime's on two lines of noise, `width` columns wide, at most.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"the network is compared with onnxruntime, which is not installed: {INSTALL}") from error
    x = torch.randn(2, 3, HEIGHT, width, generator=torch.Generator().manual_seed(seed))
    session = onnxruntime.InferenceSession(str(model_file()), providers=["CPUExecutionProvider"])
    (truth,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        return (net(x).softmax(-1) - torch.from_numpy(truth)).abs().max().item()

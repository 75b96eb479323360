"""ACmix: attention and convolution over the same projections."""

from __future__ import annotations

from nearfold.grammar import Basic, Operation, Sum, Weight
from nearfold.grammar.similarity import Scaled
from nearfold.grammar.words import Box, Shift, Softmax, Window
from nearfold.nn.mixer import Mixer


class ACmix2d(Mixer):
    """Attention in a window plus a convolution, over the same three 1x1 projections (arXiv 2111.14556).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; num_heads must divide them.
        attention_kernel: window of the attention half; int or (rows, columns).
        conv_kernel: window of the convolution half.
        num_heads: heads of both.
        stride: outputs on a strided grid.
        dilation: of both windows.
        bias: biases on the projections.
        backend: "auto", or a backend's name.

    Output = rates[0] * attention + rates[1] * convolution, rates learnable, 0.5 each at the start. Any size: also
    odd with a stride, and smaller than the window (reflection repeats).

    >>> import torch
    >>> ACmix2d(16, 32, num_heads=4, stride=2)(torch.randn(1, 16, 5, 7)).shape
    torch.Size([1, 32, 3, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        attention_kernel: int | tuple[int, int] = 7,
        conv_kernel: int | tuple[int, int] = 3,
        num_heads: int = 4,
        *,
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = _acmix(attention_kernel, conv_kernel, num_heads, stride, dilation)
        super().__init__(operation, in_channels, out_channels, bias=bias, backend=backend)


def _acmix(
    attention_kernel: int | tuple[int, int],
    conv_kernel: int | tuple[int, int],
    num_heads: int,
    stride: int | tuple[int, int],
    dilation: int | tuple[int, int],
    interleaved: bool = False,
) -> Operation:
    attention = Basic(
        Window(attention_kernel, Scaled(relative=True), stride=stride, dilation=dilation, mode="reflect"),
        Box(),
        Weight(Softmax(heads=num_heads, project="qkv")),
    )
    convolution = Basic(
        Window(conv_kernel, stride=stride, dilation=dilation), Box(), Weight(kernel=Shift(num_heads, interleaved))
    )
    return Sum((("a", attention), ("b", convolution)))

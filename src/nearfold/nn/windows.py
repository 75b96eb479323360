"""Layers over a window: deformable, involution, dynamic and large-kernel convolution, pooling. (B, C, *grid)."""

from __future__ import annotations

from nearfold._numbers import flag, integer
from nearfold.grammar import Basic, Weight
from nearfold.grammar.words import (
    Box,
    Deformable,
    Dense,
    Depthwise,
    Experts,
    Generated,
    Max,
    Mean,
    Modulated,
    Ones,
    Window,
)
from nearfold.nn.mixer import Mixer


class DeformConv2d(Mixer):
    """Convolution whose window bends: every slot is moved by an offset that a convolution of the input makes.

    Args:
        in_channels: channels of the input (B, in_channels, H, W).
        out_channels: channels of the output.
        kernel_size: int or (rows, columns).
        stride: outputs on a strided grid.
        padding: "same" or the zeros added on each side.
        dilation: of the window before it bends.
        groups: of the kernel, as in nn.Conv2d.
        offset_groups: groups of channels that move on their own.
        modulated: version 2: every slot is also turned up or down, by a sigmoid of a second convolution.
        bias: a learned bias.
        backend: "auto", or a backend's name.

    The offsets start at zero, where it is nn.Conv2d (version 2: half of it). ``weight`` and ``bias`` load an nn.Conv2d;
    ``offset_weight`` and ``mask_weight`` make channels in the order of torchvision's and the papers' code: (group,
    slot, row before column). Sources: arXiv 1703.06211, eq. 2 to 4; 1811.11168, eq. 1.

    >>> import torch
    >>> DeformConv2d(16, 32, modulated=True)(torch.randn(1, 16, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        modulated: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        path = Deformable(kernel_size, stride=stride, dilation=dilation, padding=padding, groups=offset_groups)
        weight = Weight(Modulated() if flag("modulated", modulated) else Ones(), Dense(groups))
        super().__init__(Basic(path, Box(), weight), in_channels, out_channels, bias=bias, backend=backend)


class Involution2d(Mixer):
    """A kernel for every position, made from the features there; groups of channels share it (arXiv 2103.06255).

    Args:
        channels: of input and output (B, channels, H, W).
        kernel_size: int or (rows, columns).
        stride: outputs on a strided grid; the kernels are made at the strided positions.
        groups: of channels that share a kernel; default channels / 16.
        reduction: of the channels between the two pointwise maps that make the kernel; 0: one map.
        bias: biases on these maps.
        backend: "auto", or a backend's name.

    The paper's batch norm between the two maps is left out: put one around the layer.

    >>> import torch
    >>> Involution2d(32, groups=4)(torch.randn(1, 32, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 7,
        *,
        stride: int | tuple[int, int] = 1,
        groups: int | None = None,
        reduction: int = 4,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        groups = max(1, integer("channels", channels) // 16) if groups is None else groups
        operation = Basic(Window(kernel_size, stride=stride), Box(), Weight(Generated(groups, reduction)))
        super().__init__(operation, channels, bias=bias, backend=backend)


class DynamicConv2d(Mixer):
    """A convolution whose kernel is mixed from several for every input (arXiv 1912.03458).

    Args:
        in_channels: channels of the input (B, in_channels, H, W).
        out_channels: channels of the output.
        kernel_size: int or (rows, columns).
        experts: kernels that are mixed.
        reduction: of the channels inside the map that makes the shares.
        temperature: of the softmax over the experts; the paper lowers it from 30 to 1 early in training.
        stride: outputs on a strided grid.
        dilation: of the window.
        bias: a learned bias.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> DynamicConv2d(16, 32, experts=3)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        experts: int = 4,
        reduction: int = 4,
        temperature: float = 30.0,
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        window = Window(kernel_size, stride=stride, dilation=dilation)
        operation = Basic(window, Box(), Weight(kernel=Experts(experts, reduction, temperature)))
        super().__init__(operation, in_channels, out_channels, bias=bias, backend=backend)


class LargeKernelConv2d(Mixer):
    """A depthwise convolution over a large window (arXiv 2203.06717).

    Args:
        channels: of input and output (B, channels, H, W).
        kernel_size: int or (rows, columns).
        stride: outputs on a strided grid.
        dilation: of the window.
        bias: a learned bias.
        backend: "auto", or a backend's name.

    >>> import torch
    >>> LargeKernelConv2d(16, 13)(torch.randn(1, 16, 8, 8)).shape
    torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 31,
        *,
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = Basic(Window(kernel_size, stride=stride, dilation=dilation), Box(), Weight(kernel=Depthwise()))
        super().__init__(operation, channels, bias=bias, backend=backend)


POOLS = {"mean": Mean, "max": Max}


class Pool2d(Mixer):
    """Average or max pooling: an operation without a weight.

    Args:
        channels: of input and output (B, channels, H, W).
        kernel_size: int or (rows, columns).
        kind: mean (over the positions inside the grid) or max.
        stride: default kernel_size.
        padding: positions added on each side, which count for nothing.

    >>> import torch
    >>> Pool2d(3, 2)(torch.arange(12.0).reshape(1, 3, 2, 2)).flatten().tolist()
    [1.5, 5.5, 9.5]
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 2,
        kind: str = "mean",
        *,
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        if kind not in POOLS:
            raise ValueError(f"kind must be one of {', '.join(POOLS)}, got {kind!r}")
        window = Window(kernel_size, stride=kernel_size if stride is None else stride, padding=padding)
        super().__init__(Basic(window, Box(), Weight(POOLS[kind]())), channels)

"""Conversion of ACmix."""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.compat.reference import Config, Conversion, State, UnsupportedReference
from nearfold.nn.acmix import _acmix
from nearfold.nn.mixer import Mixer


def acmix(c: Config, state: State) -> Conversion:
    """ACmix: `ACmix2d` with the channel order of the public convolution half."""
    attention, window = c.get("kernel_att", 7), c.get("kernel_conv", 3)
    stride, heads = c.get("stride", 1), c.get("head", 4)
    for name, value, only in (("dilation", c.get("dilation", 1), 1), ("kernel_conv", window, 3)):
        if value != only:
            raise UnsupportedReference(
                f"ACmix: the public layer fails with {name}={value}; nearfold.nn.ACmix2d supports it"
            )
    if attention % 2 == 0:
        raise UnsupportedReference(f"ACmix: the public layer fails with an even kernel_att={attention}")
    op = _acmix(attention, window, heads, stride, 1, interleaved=True)
    layer = Mixer(op, c["in_planes"], c["out_planes"])

    def mapping(s: State) -> State:
        found = {"rates": torch.cat([s["rate1"], s["rate2"]])}
        for ours, theirs in (("query", "conv1"), ("key", "conv2"), ("value", "conv3"), ("0.position", "conv_p")):
            found[f"{ours}_weight"] = s[f"{theirs}.weight"].flatten(1)
            found[f"{ours}_bias"] = s[f"{theirs}.bias"]
        found["1.weight"] = s["fc.weight"].flatten(1)
        found["1.shift_weight"] = s["dep_conv.weight"]
        return found

    def check(x: Tensor) -> None:
        if stride > 1 and any(n % stride for n in x.shape[2:]):
            raise UnsupportedReference(
                f"ACmix: the public layer fails on {tuple(x.shape[2:])} with stride={stride}; nearfold.nn.ACmix2d "
                "takes any size"
            )

    return Conversion(layer, mapping, check)

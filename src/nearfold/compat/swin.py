"""The layer of the public ACmix Swin: attention in shifted blocks, and a convolution of the rolled map."""

from __future__ import annotations

import torch
from torch import Tensor

from nearfold.compat.reference import State
from nearfold.grammar import Basic, Sum, Weight
from nearfold.grammar.similarity import Scaled
from nearfold.grammar.words import Block, Box, Shift, Softmax, Window
from nearfold.lower.parameters import operand
from nearfold.lower.plan import Context, apply
from nearfold.nn.mixer import Mixer
from nearfold.recognise.layouts import QKV, divided, named


class RolledACmix(Mixer):
    """A sum of block attention and a convolution that reads the map rolled by the blocks' shift.

    The public code rolls the map so that shifted blocks become plain ones, and runs the convolution on what it then
    has: its zero border lies where the map was cut. Reproduced here for its checkpoints only (arXiv 2111.14556's code).
    """

    def __init__(self, channels: int, size: int, heads: int, shift: int) -> None:
        attention = Basic(Block(size, Scaled(bias="table"), shift), Box(), Weight(Softmax(heads=heads)))
        convolution = Basic(Window(3), Box(), Weight(kernel=Shift(heads, interleaved=True, bias=True)))
        super().__init__(Sum((("a", attention), ("b", convolution))), channels)
        self.shift = shift

    def _run(self, x: Tensor, context: Context | None = None, mask: Tensor | None = None) -> Tensor:
        params = self.tensors()
        assert isinstance(self.operation, Sum)
        (_, attention), (_, convolution) = self.operation.terms
        a, b = params["rates"].unbind()
        rolled = torch.roll(x, (-self.shift, -self.shift), (2, 3))
        conv = apply(convolution, operand(params, 1), rolled, out_channels=self.made_channels, backend=self.backend)
        own = apply(attention, operand(params, 0), x, out_channels=self.made_channels, backend=self.backend, mask=mask)
        return a * own + b * torch.roll(conv, (self.shift, self.shift), (2, 3))


def acmix_swin_layer(state: State, size: int, shift: int) -> RolledACmix:
    """The layer from the state of the public ``WindowAttention_acmix``.

    Raises:
        ValueError: when names or shapes are not those of that layer.
    """
    table = state["relative_position_bias_table"]
    channels, heads = len(state["proj.weight"]), table.shape[1]
    layer = RolledACmix(channels, size, heads, shift)
    found = named(divided(QKV, state["qkv.weight"], state["qkv.bias"])) | {
        "rates": torch.cat([state["rate1"], state["rate2"]]),
        "0.relative_bias": table.T.reshape(heads, 2 * size - 1, 2 * size - 1),
        "0.out_weight": state["proj.weight"],
        "0.out_bias": state["proj.bias"],
        "1.weight": state["fc.weight"].flatten(1),
        "1.slot_bias": state["fc.bias"],
        "1.shift_weight": state["dep_conv.weight"],
    }
    try:
        layer.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"not the state of WindowAttention_acmix: {error}") from error
    return layer

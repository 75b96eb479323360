"""Layers and networks of the public ConvNN and ACmix code, by class name, constructor arguments and weights.

`from_reference` returns a `ReferenceLayer`: it holds the public layer's parameters under their own names, so that
its state dict goes both ways and every gradient is the one the public code would see, and computes with a Nearfold
layer; `ReferenceLayer.to_nearfold` hands that layer out with the weights copied. `load_checkpoint` does so for whole
networks. Where the public code is at fault, an explicit option of the operation reproduces it, or
`UnsupportedReference` says why not.

`from_deformable_detr` and `quicken` are for transformers' Deformable DETR.
"""

from nearfold.compat.checkpoints import NETWORKS, load_checkpoint
from nearfold.compat.deformable_detr import from_deformable_detr, quicken
from nearfold.compat.layers import LAYERS, from_reference
from nearfold.compat.reference import ReferenceLayer, UnsupportedReference

__all__ = [
    "LAYERS",
    "NETWORKS",
    "ReferenceLayer",
    "UnsupportedReference",
    "from_deformable_detr",
    "from_reference",
    "load_checkpoint",
    "quicken",
]

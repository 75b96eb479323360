"""Layers that do not mix positions: tables of qualified names. Those that are in none are tried: `alone`."""

from __future__ import annotations

from torch import nn

from nearfold.recognise.foreign import names_of

_TORCH = "torch.nn.modules"
# Every layer of these modules reads one position for each it makes, but for norms with statistics over positions.
ELEMENTWISE = (
    f"{_TORCH}.activation", f"{_TORCH}.batchnorm", f"{_TORCH}.dropout", f"{_TORCH}.instancenorm",
    f"{_TORCH}.normalization", "timm.layers.activations", "timm.layers.activations_me", "timm.layers.drop",
    "timm.layers.layer_scale", "timm.layers.norm", "timm.layers.norm_act", "torchvision.ops.stochastic_depth",
)  # fmt: skip
ELEMENTWISE_LAYERS = (
    f"{_TORCH}.linear.Identity", f"{_TORCH}.activation.Softmax2d", "torchvision.ops.misc.FrozenBatchNorm2d",
    "torchvision.ops.misc.Permute", "torchvision.models.convnext.LayerNorm2d",
)  # fmt: skip
# These too, but they change where a position lies, or what it is: a layer behind them does not follow directly.
OTHERS = (f"{_TORCH}.flatten", f"{_TORCH}.padding", f"{_TORCH}.sparse")
OTHER_LAYERS = (f"{_TORCH}.channelshuffle.ChannelShuffle", "timm.layers.patch_dropout.PatchDropout")
LINEAR = f"{_TORCH}.linear.Linear"
# A softmax over an axis other than the channels' may be half of an attention.
SOFTMAXES = tuple(f"{_TORCH}.activation.{name}" for name in ("Softmax", "LogSoftmax", "Softmin"))

# Own parameters of containers, which are added or multiplied at each position: class and position tokens, scales.
OWN: dict[str, tuple[str, ...]] = {
    "torchvision.models.vision_transformer.VisionTransformer": ("class_token",),
    "torchvision.models.vision_transformer.Encoder": ("pos_embedding",),
    "torchvision.models.convnext.CNBlock": ("layer_scale",),
    "timm.models.vision_transformer.VisionTransformer": ("cls_token", "reg_token", "pos_embed"),
    "timm.models.convnext.ConvNeXtBlock": ("gamma",),
    "timm.models.mlp_mixer.ResBlock": ("ls1", "ls2"),
    "transformers.models.vit.modeling_vit.ViTEmbeddings": ("cls_token", "mask_token", "position_embeddings"),
}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an nn.Linear.

    >>> is_linear(nn.Linear(1, 1)), is_linear(nn.Bilinear(1, 1, 1))
    (True, False)
    """
    return LINEAR in names_of(module)


def is_elementwise(module: nn.Module) -> bool:
    """Whether a layer keeps the map as it is, position by position.

    >>> is_elementwise(nn.GELU()), is_elementwise(nn.Flatten()), is_elementwise(nn.MultiheadAttention(1, 1))
    (True, False, False)
    """
    for name in names_of(module):
        if name in SOFTMAXES:
            return bool(module.dim == 1)
        if name == f"{_TORCH}.activation.MultiheadAttention":
            return False
        if name.rpartition(".")[0] in ELEMENTWISE or name in ELEMENTWISE_LAYERS:
            return True
    return False


def is_pointwise(module: nn.Module) -> bool:
    """Whether a layer without a rule reads one position for each that it makes.

    >>> is_pointwise(nn.Flatten()), is_pointwise(nn.Softmax(dim=-1)), is_pointwise(nn.Upsample(scale_factor=2))
    (True, False, False)
    """
    others = any(n.rpartition(".")[0] in OTHERS or n in OTHER_LAYERS for n in names_of(module))
    return others or is_elementwise(module) or is_linear(module)


def strange_parameters(module: nn.Module) -> tuple[str, ...]:
    """Own parameters of a container that no table explains."""
    own = [name for name, p in module._parameters.items() if p is not None]
    known = {name for cls in names_of(module) for name in OWN.get(cls, ())}
    return tuple(name for name in own if name not in known)


def gathers_statistics(module: nn.Module) -> bool:
    """Whether a norm takes its mean and variance over positions.

    >>> gathers_statistics(nn.GroupNorm(2, 4)), gathers_statistics(nn.LayerNorm(4))
    (True, False)
    """
    if isinstance(module, nn.modules.batchnorm._NormBase):  # batch and instance norms
        return module.running_mean is None
    return isinstance(module, nn.GroupNorm)

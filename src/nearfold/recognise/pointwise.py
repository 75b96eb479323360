"""Layers that do not mix positions: tables of qualified names, and a trial for those that are in none."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nearfold.recognise.foreign import count, names_of
from nearfold.recognise.trial import copied, quiet

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
    if any(f"{_TORCH}.instancenorm" in name for name in names_of(module)):
        return not getattr(module, "track_running_stats", False)
    return any(name == f"{_TORCH}.normalization.GroupNorm" for name in names_of(module))


TRIED = "tried alone"
LARGEST = 1 << 22  # parameters of a layer that is tried


@torch.no_grad()
def acts_alone(module: nn.Module) -> bool:
    """Whether a layer, run alone, reads one position for each that it makes, wherever its channels may be.

    A copy in float64 runs on random maps of several sizes, with channels along the second and the last axis; one
    position after the other gets other values. It passes if it runs on some, and on all of these nothing else changes.

    >>> acts_alone(nn.Softplus()), acts_alone(nn.Softmax(dim=-1)), acts_alone(nn.Conv1d(4, 4, 3, padding=1))
    (True, False, False)
    """
    if count(module) > LARGEST or "forward" in vars(module):
        return False
    sizes = {n for p in module.parameters(recurse=False) for n in p.shape if n > 1} or {8}
    cpu = torch.device("cpu")
    passed = False
    try:
        alone = copied(module, cpu)[0].to(cpu, torch.float64)
    except Exception:
        return False
    with quiet(cpu):
        generator = torch.Generator().manual_seed(0)
        for x, axis in _maps(sorted(sizes), generator):
            try:
                y = _output(alone(x))
            except Exception:
                continue
            if not _one_position(alone, x, y, axis, generator):
                return False
            passed = True
    return passed


def _maps(sizes: list[int], generator: torch.Generator) -> Iterator[tuple[Tensor, int]]:
    taken = set(sizes)
    a, b = (n for n in range(3, 100) if n not in taken and (n + 1) not in taken), 2  # no axis is mistaken for channels
    first = next(a)
    for channels in sizes[:4]:
        for grid in ((first,), (b, first + 1)):
            for axis, shape in ((-1, (1, *grid, channels)), (1, (1, channels, *grid))):
                yield 3 * torch.randn(shape, dtype=torch.float64, generator=generator), axis


def _output(made: object) -> Tensor:
    if not isinstance(made, Tensor):
        raise TypeError("makes no tensor")
    return made


def _one_position(module: nn.Module, x: Tensor, y: Tensor, axis: int, generator: torch.Generator) -> bool:
    """Whether the output at a position changes with the input there, and no other does."""
    x_Np, y_Np = x.movedim(axis, -1), y.movedim(axis, -1) if y.dim() == x.dim() else y
    if x_Np.shape[:-1] != y_Np.shape[:-1]:
        return False
    for at in range(x_Np[..., 0].numel()):
        other = x_Np.clone().flatten(0, -2)
        other[at] = 5 * torch.randn(other.shape[-1], dtype=x.dtype, generator=generator)
        changed = _output(module(other.view(x_Np.shape).movedim(-1, axis))).movedim(axis, -1) - y_Np
        rows = changed.flatten(0, -2)
        rows[at] = 0
        if not bool((rows.abs() <= 1e-13 * (1 + y.abs().max())).all()):
            return False
    return True

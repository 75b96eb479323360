"""The deformable attention of transformers' Deformable DETR: its layers as ours, and its networks on our kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nearfold.nn.deformable import MultiScaleDeformableAttention
from nearfold.nn.functional import deform_attn
from nearfold.recognise.deformable import CORE, require_deformable


def from_deformable_detr(layer: nn.Module) -> MultiScaleDeformableAttention:
    """Our layer with the weights of a ``DeformableDetrMultiscaleDeformableAttention``, in its dtype, on its device.

    Its call is ours: the query with its positional encoding added, and no tuple back.

    Raises:
        ValueError: for a layer of another class, or one that computes something else.
    """
    module = require_deformable(layer)
    own = MultiScaleDeformableAttention(module.d_model, module.n_heads, levels=module.n_levels, points=module.n_points)
    weight = module.value_proj.weight
    own.to(weight.device, weight.dtype).load_state_dict(module.state_dict())
    return own.train(module.training)


class DeformableCore(nn.Module):
    """`deform_attn`, called as transformers calls its ``MultiScaleDeformableAttention``: no parameters."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """(B, M, H * d), as there."""
        wide: dict[str, Any] = {"dtype": value.dtype}
        return deform_attn(
            value, value_spatial_shapes_list, sampling_locations.to(**wide), attention_weights.to(**wide)
        )


def quicken(model: nn.Module) -> int:
    """Have every deformable attention of a Deformable DETR computed by our kernel, in place; how many there are.

    Weights, names and state dict stay as they are. Other networks of transformers that have a class of the same name
    and call (such as RT-DETR) are left alone.
    """
    cores = [m for m in model.modules() if _is_core(getattr(m, "attn", None))]
    for module in cores:
        module.attn = DeformableCore()
    return len(cores)


def _is_core(module: Any) -> bool:
    own = type(module)
    return f"{own.__module__}.{own.__qualname__}" == CORE and "forward" not in vars(module)

"""What each operator of PyTorch makes of the places of its inputs, and whether it mixes positions.

A table of rules by name. What torch tags as pointwise is; what is in no table may do anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from nearfold.recognise.operators import axes, entries, products, views, windows
from nearfold.recognise.operators.call import Call, Unfollowed, tensors
from nearfold.recognise.place import Place, unknown

Rule = Callable[[Call], Place | list[Place]]


def rule_of(call: Call) -> Rule | None:
    """The rule that follows an operator, where there is one."""
    pointwise = torch.Tag.pointwise in call.func.tags or call.name in entries.UNTAGGED
    return RULES.get(call.name, entries.pointwise if pointwise else None)


def follow(call: Call) -> list[Place]:
    """The places of what a call made; sets ``call.mixes``."""
    try:
        rule = rule_of(call)
        if rule is None:
            raise Unfollowed
        found = rule(call)
        return found if isinstance(found, list) else [found] * len(call.made)
    except (Unfollowed, AssertionError, RuntimeError, IndexError, KeyError, TypeError, ValueError):
        call.mixes = True
        source = next(p for t in tensors(call.given) if (p := call.place(t)) is not None)
        alike = [t.shape == call.made[0].shape and call.place(t) is source for t in tensors(call.given)]
        if len(call.made) == 1 and any(alike) and not source.wild:  # the axes are likely what they were
            low = tuple(torch.zeros_like(t) for t in source.low)
            return [replace(source, low=low, high=low, kind="?", exact=False)]
        return [unknown(source, t.shape) for t in call.made]


_GROUPS: tuple[tuple[Rule, str], ...] = (
    (entries.same, "_to_copy clone alias detach contiguous lift_fresh lift_fresh_copy dropout native_dropout _conj "
            "_neg_view fill zero bernoulli"),
    (entries.copied, "copy"),
    (views.viewed, "view _unsafe_view _reshape_alias reshape permute transpose t expand select unsqueeze squeeze split "
            "split_with_sizes chunk unbind repeat channel_shuffle unsafe_split diagonal movedim swapaxes"),
    (views.moving, "flip roll rot90 unfold pixel_shuffle pixel_unshuffle"),
    (views.sliced, "slice"),
    (views.indexed, "index index_select gather"),
    (views.joined, "cat stack"),
    (axes.reduced, "mean sum amax amin max min var std var_mean std_mean linalg_vector_norm logsumexp prod any all "
               "argmax argmin median nansum norm aminmax"),
    (axes.along, " ".join(sorted(axes.SOFTMAXES | axes.FOURIER)) +
                 " cumsum cumprod cummax cummin logcumsumexp sort topk"),
    (axes.glu, "glu"),
    (axes.normed(axes.layer_axes), "native_layer_norm _fused_rms_norm rms_norm"),
    (axes.normed(axes.batch_axes), "native_batch_norm _native_batch_norm_legit cudnn_batch_norm"),
    (axes.normed(lambda call, t: ()), "_native_batch_norm_legit_no_training"),
    (axes.group_norm, "native_group_norm"),
    (products.product("self", "mat2"), "mm bmm"),
    (products.product("mat1", "mat2"), "addmm"),
    (products.product("batch1", "batch2"), "baddbmm"),
    (products.attention, " ".join(f"_scaled_dot_product_{name}" for name in (
        "flash_attention_for_cpu", "flash_attention", "efficient_attention", "attention_math", "cudnn_attention",
        "fused_attention_overrideable", "attention_math_for_mps")) + " scaled_dot_product_attention"),
    (windows.convolution, "convolution"),
    (windows.pooled(1), "avg_pool1d max_pool1d"),
    (windows.pooled(2), "avg_pool2d max_pool2d_with_indices"),
    (windows.pooled(3), "avg_pool3d max_pool3d_with_indices"),
    (windows.adaptive(1), "adaptive_avg_pool1d adaptive_max_pool1d"),
    (windows.adaptive(2), "_adaptive_avg_pool2d adaptive_max_pool2d"),
    (windows.adaptive(3), "_adaptive_avg_pool3d adaptive_max_pool3d"),
    *((windows.upsampled(taps, n), f"upsample_{name}{n}d") for name, taps, axes in (
        ("nearest", 1, (1, 2, 3)), ("linear", 2, (1,)), ("bilinear", 2, (2,)), ("trilinear", 2, (3,)),
        ("bicubic", 4, (2,))) for n in axes),
    (windows.padded, "constant_pad_nd " +
     " ".join(f"{m}_pad{n}d" for m in ("reflection", "replication") for n in (1, 2, 3))),
    (entries.embedding, "embedding"),
    (views.as_real, "view_as_real"),
    (axes.as_complex, "view_as_complex"),
)  # fmt: skip
RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS for name in names.split()}
# What is new: of the shape of its arguments, and of nothing they hold.
EMPTY = frozenset(
    (
        "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
        "new_empty", "new_full", "new_empty_strided", "empty_strided", "zero", "fill",
    )
)  # fmt: skip

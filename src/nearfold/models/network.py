"""What all networks share: stages, a head that can be exchanged, checkpointed stages, features instead of logits.

A network's methods go by timm's names, so that timm's training scripts and wrappers take it as one of theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nearfold.nn import no_weight_decay

POOLS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "avg": lambda x, axes: x.mean(axes),
    "max": lambda x, axes: x.amax(axes),
    "avgmax": lambda x, axes: (x.mean(axes) + x.amax(axes)) / 2,
}
MAPS = (*POOLS, "")
TOKENS = ("token", *POOLS, "")


class Network(nn.Module):
    """An image classifier: (B, in_chans, H, W) -> (B, num_classes).

    A subclass sets ``num_features`` (channels before the classifier), ``num_classes``, ``head_name`` (the classifier's
    dotted name) and ``feature_info`` (one entry a stage: ``num_chs``, ``reduction``, ``module``), and implements
    `stages`, or `stages_and_last` where the head reads something else than the last map; `forward_head` where more than
    pooling stands between what it reads and the classifier.

    ``architecture`` and ``arguments`` are what `create` made it from; ``pretrained_cfg``, which timm also calls
    ``default_cfg``, is timm's description of its input. Weights start as PyTorch's layers start theirs.
    """

    num_features: int
    num_classes: int
    head_name: str = "head"
    feature_info: list[dict[str, Any]]
    pools: tuple[str, ...] = ("avg",)
    """What ``global_pool`` may be: how positions become one. "" leaves the map, or all tokens; "token" is the first."""
    global_pool: str = "avg"
    undecayed: tuple[str, ...] = ()
    """Parameters of its own that no decay of weights should touch: tokens and places."""
    grad_checkpointing: bool = False
    architecture: str = ""
    arguments: dict[str, Any]
    default_cfg: dict[str, Any]
    pretrained_cfg: dict[str, Any]

    def stages(self, x: Tensor) -> list[Tensor]:
        """The maps (B, num_chs, H / reduction, W / reduction) behind every stage, in the order of feature_info."""
        return self.stages_and_last(x)[0]

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, or the last tokens: what the head reads."""
        return self.stages_and_last(x)[1]

    def stages_and_last(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What `stages` and `forward_features` return, by one pass."""
        maps = self.stages(x)
        return maps, maps[-1]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Iterable[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps behind some stages, with what the head reads before them: timm's method of this name.

        Args:
            x: (B, in_chans, H, W).
            indices: stages, counted from 0, negative ones from the end; a number: the last so many; None: all.
            norm: has no effect: a stage is followed by no norm here.
            stop_early: has no effect: all stages run.
            output_fmt: "NCHW" for maps, "NLC" for rows of positions.
            intermediates_only: the maps alone.

        Raises:
            ValueError: for a stage that is not there, or another format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        count = len(self.feature_info)
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices={indices} asks for the last {indices} of {count} stages; 1 to {count} go")
            indices = range(count - indices, count)
        wanted = _chosen("indices", indices, count)
        maps, last = self.stages_and_last(x)
        found = [maps[i] if output_fmt == "NCHW" else maps[i].flatten(2).transpose(1, 2) for i in wanted]
        return found if intermediates_only else (last, found)

    def pooled(self, x: Tensor) -> Tensor:
        """The last map (B, C, H, W), or tokens (B, 1 + N, C) with the class token first, by ``global_pool``: (B, C)."""
        if self.global_pool == "":
            return x
        if self.global_pool == "token":
            return x[:, 0]
        return POOLS[self.global_pool](*((x, (2, 3)) if x.dim() == 4 else (x[:, 1:], (1,))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` returned -> (B, num_classes); ``pre_logits``: (B, num_features)."""
        x = self.pooled(x)
        out: Tensor = x if pre_logits else self.get_classifier()(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def run(self, block: Callable[..., Tensor], x: Tensor) -> Tensor:
        """block(x); its inner tensors are made again in the backward where gradients are checkpointed."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, x, use_reentrant=False)
            return out
        return block(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: every block's inner tensors are made again in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that a decay of weights should leave alone, beside vectors.

        timm's method of this name: what the layers say (`nearfold.nn.no_weight_decay`), and class tokens and places.
        """
        own = {name for name, _ in self.named_parameters() if name.partition(".")[0] in self.undecayed}
        return own | no_weight_decay(self)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.get_submodule(self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer, for other classes; 0 leaves the features as they are.

        ``global_pool`` is one of `pools`, as timm names them; None leaves the pooling as it is.

        Raises:
            ValueError: for a negative number, or a pooling that the network, or its classifier, cannot do.
        """
        if type(num_classes) is not int or num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes!r}")
        self.pool_by(self.global_pool if global_pool is None else global_pool, num_classes)
        old = next(iter(self.parameters()))
        new = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.set_submodule(self.head_name, new.to(old.device, old.dtype))
        self.num_classes = num_classes
        if hasattr(self, "arguments"):
            self.arguments = self.arguments | {"num_classes": num_classes}
            self.pretrained_cfg = self.default_cfg = self.default_cfg | {"num_classes": num_classes}

    def pool_by(self, global_pool: str, num_classes: int) -> None:
        """Set ``global_pool`` for a classifier of so many classes; ValueError where it cannot be."""
        if global_pool not in self.pools:
            able = ", ".join(map(repr, self.pools))
            raise ValueError(f"global_pool must be one of {able} for {type(self).__name__}, got {global_pool!r}")
        if global_pool == "" and num_classes and "token" not in self.pools:
            raise ValueError(
                f"global_pool='' leaves a map, which a classifier of {num_classes} classes does not take; "
                "give num_classes=0"
            )
        if hasattr(self, "arguments") and (global_pool != self.global_pool or "global_pool" in self.arguments):
            self.arguments = self.arguments | {"global_pool": global_pool}
        self.global_pool = global_pool

    def remove_head(self) -> None:
        """Take away what turns the last map into classes."""
        self.reset_classifier(0)

    def fitted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of this network made for images of another size, as it is for this one's.

        A network that owns something for every position resamples it; most own nothing of the kind.
        """
        return state

    def start(self, images: Tensor) -> None:
        """What a fresh network takes from its training images (B, in_chans, H, W) before the first step: nothing here.

        `nearfold.train.begin` calls it, with images normalised as in training.
        """

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``; see `nearfold.models.hub.save_pretrained`."""
        from nearfold.models.hub import save_pretrained

        save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the network to the Hugging Face Hub; see `nearfold.models.hub.push_to_hub`."""
        from nearfold.models.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **overrides: Any) -> Self:
        """A network from a folder or from the Hub, weights loaded; see `nearfold.models.hub.from_pretrained`.

        Raises:
            ValueError: also when what is saved there is a network of another class than this one.
        """
        from nearfold.models.hub import from_pretrained

        network = from_pretrained(source, **overrides)
        if not isinstance(network, cls):
            raise ValueError(
                f"{source} holds a {type(network).__name__}, got {cls.__name__}.from_pretrained; use "
                "nearfold.models.from_pretrained, which makes what is there"
            )
        return network


class FeatureInfo:
    """What `features_only` returns, stage by stage: timm's methods of the same names."""

    def __init__(self, entries: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.out_indices = tuple(out_indices)
        self.info = [dict(entries[i], index=i) for i in self.out_indices]

    def channels(self) -> list[int]:
        """Channels of every map."""
        return [entry["num_chs"] for entry in self.info]

    def reduction(self) -> list[int]:
        """Pixels per position of every map, along one axis."""
        return [entry["reduction"] for entry in self.info]

    def module_name(self) -> list[str]:
        """The module behind which every map is taken."""
        return [entry["module"] for entry in self.info]


def _chosen(name: str, indices: Iterable[int] | None, count: int) -> list[int]:
    """Numbers of stages from 0 on, of those asked for."""
    wanted = list(range(count) if indices is None else indices)
    if not wanted or any(not -count <= i < count for i in wanted):
        raise ValueError(f"{name} must be some of 0 to {count - 1}, the network's stages; got {wanted}")
    return [i % count for i in wanted]


class Features(nn.Module):
    """A network without its head: (B, in_chans, H, W) -> the maps of some of its stages.

    Args:
        network: the network; its classifier is removed.
        out_indices: stages, counted from 0; negative ones from the end; all of them by default.
    """

    def __init__(self, network: Network, out_indices: Iterable[int] | None = None) -> None:
        super().__init__()
        wanted = _chosen("out_indices", out_indices, len(network.feature_info))
        network.remove_head()
        self.network = network
        self.feature_info = FeatureInfo(network.feature_info, wanted)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps (B, C, H, W) of the chosen stages."""
        maps = self.network.stages(x)
        return [maps[i] for i in self.feature_info.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory, as `Network.set_grad_checkpointing` does."""
        self.network.set_grad_checkpointing(enable)

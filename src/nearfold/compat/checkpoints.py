"""Whole networks of the public ConvNN and ACmix code, from their checkpoints, by parameters' names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.compat.layers import LAYERS, from_reference
from nearfold.compat.reference import State, UnsupportedReference
from nearfold.compat.swin import RolledACmix, acmix_swin_layer
from nearfold.models.network import Network
from nearfold.models.resnet import ResNet
from nearfold.models.swin import SwinTransformer
from nearfold.models.vgg import VGG
from nearfold.models.vit import VisionTransformer
from nearfold.nn import Mixer
from nearfold.options import line
from nearfold.surgery.report import few

HOLDERS = ("state_dict", "model", "model_state_dict", "module")
MAPS = {
    "ConvNN": "Conv2d_NN",
    "ConvNN_Attn": "Conv2d_NN_Attn",
    "Branching": "Conv2d_Branching",
    "Branching_Attn": "Conv2d_Attn_Branching",
}
TOKENS = {
    "Attention": "MultiHeadAttention",
    "ConvNNAttention": "MultiHeadConvNNAttention",
    "KvtAttention": "MultiHeadKvtAttention",
    "SparseAttention": "MultiHeadSparseAttention",
    "BranchAttention": "MultiHeadBranchingAttention",
}
Config = Mapping[str, Any]


@dataclass
class Plan:
    """A network of ours, and where the public one's tensors go.

    Attributes:
        network: to be filled.
        layers: by the public prefix, the layer that stands there: our name, and how to make it from its own state.
        renamed: our name of a tensor outside these layers; None: it is not needed.
    """

    network: nn.Module
    layers: dict[str, tuple[str, Callable[[State], nn.Module]]] = field(default_factory=dict)
    renamed: Callable[[str], str | None] = lambda name: name


def load_checkpoint(
    network: str, checkpoint: str | Path | Mapping[str, Any], config: Config | None = None
) -> nn.Module:
    """A network of the public code with its weights, computed by our layers.

    Args:
        network: one of `NETWORKS`: convnn_vgg, convnn_resnet, convnn_vit, acmix_resnet, acmix_swin.
        checkpoint: the file (torch.save, or .safetensors), or its content; a state dict, or a dict that holds one.
        config: the run's arguments by their public names; ``layer`` and those of the layer are needed for the ConvNN
            networks, ``num_heads`` for attention. Sizes are read from the weights.

    Raises:
        UnsupportedReference: for a layer whose fault is not reproduced; see `from_reference`.
        ValueError: for an unknown network, a missing argument, or tensors that do not fit; all are named.

    >>> from nearfold.models.resnet import ResNet
    >>> load_checkpoint("convnn_lenet", {})
    Traceback (most recent call last):
    ValueError: network='convnn_lenet' is not one of: convnn_vgg, convnn_resnet, convnn_vit, acmix_resnet, acmix_swin
    """
    if network not in NETWORKS:
        raise ValueError(f"network={network!r} is not one of: {', '.join(NETWORKS)}")
    left = tensors_of(checkpoint)
    try:
        plan = NETWORKS[network](left, dict(config or {}))
    except KeyError as missing:
        raise ValueError(f"the checkpoint or config of {network} lacks {missing.args[0]!r}") from None
    except ValueError:
        raise
    except Exception as error:  # shapes and types of any kind came from the file
        raise ValueError(f"the checkpoint or config is not of {network}: {line(error)}") from error
    for prefix, (name, make) in plan.layers.items():
        own = {key[len(prefix) + 1 :]: left.pop(key) for key in list(left) if key.startswith(f"{prefix}.")}
        if not own:
            raise ValueError(f"the checkpoint of {network} has nothing under {prefix!r}; is it of this network?")
        try:
            plan.network.set_submodule(name, make(own))
        except UnsupportedReference:
            raise
        except ValueError as error:
            raise ValueError(f"{prefix}: {line(error)}") from error
        except Exception as error:
            raise ValueError(f"{prefix} of the checkpoint is not of {network}: {line(error)}") from error
    ours = {plan.renamed(name): tensor for name, tensor in left.items() if plan.renamed(name) is not None}
    try:
        found = plan.network.load_state_dict(ours, strict=False)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit {network}: {line(error)}") from error
    inside = tuple(f"{name}." for name, _ in plan.layers.values())
    missing_ = [name for name in found.missing_keys if not name.startswith(inside)]
    if missing_ or found.unexpected_keys:
        raise ValueError(
            f"the checkpoint does not fit {network}: missing {few(missing_) or 'nothing'}; unexpected "
            f"{few(found.unexpected_keys) or 'nothing'}"
        )
    return plan.network


def tensors_of(checkpoint: str | Path | Mapping[str, Any]) -> State:
    """The tensors of a checkpoint by name: of a file or its content, a state dict or what holds one.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    content = _read(Path(checkpoint)) if isinstance(checkpoint, str | Path) else checkpoint
    for _ in range(8):  # one that holds itself would never end
        if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
            raise ValueError(f"the checkpoint holds a {type(content).__name__}, and no tensors by name")
        if all(isinstance(t, Tensor) for t in content.values()):
            break
        holder = next((name for name in HOLDERS if isinstance(content.get(name), Mapping)), None)
        if holder is None:
            raise ValueError(f"the checkpoint holds no state dict; it has: {few(list(map(str, content)))}")
        content = content[holder]
    else:
        raise ValueError("the checkpoint holds dicts in dicts, and no state dict")
    prefix = "module." if content and all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r}: there is no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _said(path, "safetensors", lambda: load_file(path))
    return _said(path, "a checkpoint", lambda: torch.load(path, map_location="cpu", weights_only=True))


def _said(path: Path, wanted: str, read: Callable[[], Any]) -> Any:
    """What was read; whatever a library raises over a broken file is a ValueError that names the file."""
    try:
        return read()
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as {wanted} ({line(error)}): fetch it again; a file that holds more than "
            "tensors and plain values is not read, since it could run code: save its state dict alone"
        ) from error


def _layer(kind: str, config: Config) -> Callable[[State], nn.Module]:
    def make(state: State) -> nn.Module:
        layer = from_reference(kind, dict(config), state)
        try:
            return layer.to_nearfold()
        except UnsupportedReference:  # no operation does what it does; the layer as it was
            return layer

    return make


def _kind(config: Config, kinds: dict[str, str]) -> str:
    if config.get("layer") not in kinds:
        raise ValueError(f"config: layer={config.get('layer')!r} is not one of: {', '.join(kinds)}")
    kind = kinds[config["layer"]]
    assert not kind or kind in LAYERS
    return kind


def _on_maps(plan: Plan, config: Config, public: Callable[[str], str]) -> Plan:
    """Every `Mixer` of the network is a public layer."""
    kind = _kind(config, {"Conv2d": ""} | MAPS)
    for name, module in plan.network.named_modules():
        if kind and isinstance(module, Mixer):
            given = {"in_channels": module.in_channels, "out_channels": module.out_channels, "attention_dropout": 0.0}
            sampled = {"sampling_type": "all", "num_samples": -1, "sample_padding": 0}
            plan.layers[public(name)] = (name, _layer(kind, sampled | {**config, "stride": config["K"]} | given))
    return plan


def _vgg(state: State, config: Config) -> Plan:
    depth = sum(name.startswith("features.") and name.endswith("running_mean") for name in state) + 3
    network = VGG(
        depth,
        num_classes=len(state["classifier.6.weight"]),
        in_chans=next(iter(config.get("img_size", (3,)))),
        width=len(state["features.1.running_mean"]),
        hidden=len(state["classifier.0.weight"]),
    )
    return _on_maps(Plan(network), config, lambda name: name)


class _Block(nn.Module):
    """Two layers, each with a norm and a ReLU, and the identity or a 1x1 map beside them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        conv = "window(3) | box | kernel"
        self.conv1 = Mixer(conv, in_channels, out_channels, bias=False)
        self.conv2 = Mixer(conv, out_channels, out_channels, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels
        self.identity = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(y + self.identity(x))


class PublicResNet(Network):
    """The ConvNN code's ResNet-18 and -34: no strides behind the stem, a 7x7 map before the classifier."""

    head_name = "classifier.2"

    def __init__(self, depths: tuple[int, ...], num_classes: int, width: int = 64) -> None:
        super().__init__()
        stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.first_conv = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        channels, self.feature_info = width, []
        for i, depth in enumerate(depths):
            made = width * 2**i
            blocks = [_Block(channels if j == 0 else made, made) for j in range(depth)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": made, "reduction": 4, "module": f"layer{i + 1}"})
            channels = made
        self.num_features, self.num_classes = channels * 49, num_classes
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(channels * 49, num_classes))

    def stages(self, x: Tensor) -> list[Tensor]:
        """The maps of the four groups."""
        maps, x = [], self.first_conv(x)
        for entry in self.feature_info:
            for block in self.get_submodule(entry["module"]).children():
                x = self.run(block, x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        out: Tensor = self.classifier[:-1](x) if pre_logits else self.classifier(x)
        return out


_ALIAS = re.compile(r"^(layer\d\.\d+)\.layer([12])\.([01])\.(.*)$")


def _blocks(state: State, group: str) -> int:
    """How many numbered blocks there are under a prefix."""
    found = {name[len(group) + 1 :].partition(".")[0] for name in state if name.startswith(f"{group}.")}
    return len({int(n) for n in found if n.isdecimal()})


def _resnet(state: State, config: Config) -> Plan:
    depths = tuple(_blocks(state, f"layer{i}") for i in (1, 2, 3, 4))
    width = len(state["first_conv.1.running_mean"])
    network = PublicResNet(depths, len(state["classifier.2.weight"]), width)

    def renamed(name: str) -> str | None:
        alias = _ALIAS.match(name)
        if alias is None:
            return name
        # the public block registers its layers twice, once inside a Sequential with the norm
        return f"{alias[1]}.bn{alias[2]}.{alias[4]}" if alias[3] == "1" else None

    return _on_maps(Plan(network, renamed=renamed), config, lambda name: name)


_VIT_NAMES = {
    "patch_embedding.linear_projection.": "embed.",
    "patch_embedding.norm.": "norm.",
    "positional_encoding.cls_tokens": "class_token",
    "transformer_encoder.": "blocks.",
    "classifier.": "head.",
}


def _vit(state: State, config: Config) -> Plan:
    embed = state["patch_embedding.linear_projection.weight"]
    width, depth = len(embed), _blocks(state, "transformer_encoder")
    network = VisionTransformer(
        "all | row | softmax",
        width=width,
        depth=depth,
        heads=1,
        patch=embed.shape[2],
        mlp_ratio=len(state["transformer_encoder.0.mlp.0.weight"]) / width,
        num_classes=len(state["classifier.weight"]),
        in_chans=embed.shape[1],
    )
    heads = config["num_heads"]
    given = {**config, "d_hidden": width, "dim": width, "num_heads": heads, "attention_dropout": 0.0}
    given.setdefault("topk", config.get("K", 100))
    make = _layer(_kind(config, TOKENS), given)
    layers = {f"transformer_encoder.{i}.attention": (f"blocks.{i}.attention", make) for i in range(depth)}

    def renamed(name: str) -> str | None:
        if name == "positional_encoding.pe":  # computed for the tokens at hand
            return None
        for theirs, ours in _VIT_NAMES.items():
            if name.startswith(theirs):
                return (ours + name[len(theirs) :]).replace(".mlp.3.", ".mlp.2.")
        return name

    return Plan(network, layers, renamed)


def _acmix_resnet(state: State, config: Config) -> Plan:
    depths = tuple(_blocks(state, f"layer{i}") for i in (1, 2, 3, 4))
    width = len(state["bn1.running_mean"])
    network = ResNet(depths, "bottleneck", strided=True, width=width, num_classes=len(state["fc.weight"]))
    plan = Plan(network)
    for i, depth in enumerate(depths):
        for j in range(depth):
            given = {
                "in_planes": width * 2**i,
                "out_planes": width * 2**i,
                "kernel_att": config.get("k_att", 7),
                "head": config.get("head", 4),
                "kernel_conv": config.get("k_conv", 3),
                "stride": 2 if i and not j else 1,
            }
            name = f"layer{i + 1}.{j}.conv2"
            plan.layers[name] = (name, _layer("ACmix", given))
    return plan


_SWIN_NAMES = (
    (re.compile(r"^patch_embed\.proj\."), "embed."),
    (re.compile(r"^patch_embed\.norm\."), "embed_norm."),
    (re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\."), r"layers.\1.\2.mlp.0."),
    (re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\."), r"layers.\1.\2.mlp.2."),
    (re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\."), r"layers.\1.\2."),
)
_MERGE = re.compile(r"^layers\.(\d+)\.downsample\.")


def _acmix_swin(state: State, config: Config) -> Plan:
    groups = _blocks(state, "layers")
    depths = tuple(_blocks(state, f"layers.{i}.blocks") for i in range(groups))
    tables = [state[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(groups)]
    window = (round(len(tables[0]) ** 0.5) + 1) // 2
    width = len(state["patch_embed.proj.weight"])
    network = SwinTransformer(
        width=width,
        depths=depths,
        heads=tuple(table.shape[1] for table in tables),
        window=window,
        patch=state["patch_embed.proj.weight"].shape[2],
        num_classes=len(state["head.weight"]),
        in_chans=state["patch_embed.proj.weight"].shape[1],
    )
    plan = Plan(network)
    for i, depth in enumerate(depths):
        for j in range(depth):
            # a table of its own size: the public code makes the window as small as the map it is built for
            size = (round(len(tables[i]) ** 0.5) + 1) // 2
            masked = f"layers.{i}.blocks.{j}.attn_mask" in state
            shift = window // 2 if masked else 0

            def make(own: State, size: int = size, shift: int = shift) -> RolledACmix:
                return acmix_swin_layer(own, size, shift)

            plan.layers[f"layers.{i}.blocks.{j}.attn"] = (f"layers.{i}.{j}.attention", make)

    def renamed(name: str) -> str | None:
        if name.endswith("attn_mask"):
            return None
        merge = _MERGE.match(name)
        if merge:
            return f"merges.{int(merge[1]) + 1}.{name[merge.end() :]}"
        for theirs, ours in _SWIN_NAMES:
            name = theirs.sub(ours, name)
        return name

    plan.renamed = renamed
    return plan


NETWORKS: dict[str, Callable[[State, Config], Plan]] = {
    "convnn_vgg": _vgg,
    "convnn_resnet": _resnet,
    "convnn_vit": _vit,
    "acmix_resnet": _acmix_resnet,
    "acmix_swin": _acmix_swin,
}
"""The networks whose checkpoints load."""

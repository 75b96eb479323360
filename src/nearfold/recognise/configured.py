"""Models of transformers by name: made small, with random weights, and an input of the right kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nearfold.options import meant
from nearfold.recognise.trial import trial

# Sizes that most configurations have; what a network is made of does not depend on them.
LAYERS = {
    name: 2 for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
}
WIDTHS = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads",
                     "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim"), 128),
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048,
}  # fmt: skip
TOKENS = 16
SECONDS = 4000  # samples of sound


def models(library: ModuleType, name: str) -> Iterator[nn.Module]:
    """Models of one name, the smallest first: sizes reduced, the number of layers reduced, as configured by default.

    Args:
        library: transformers.
        name: of a model's class (ViTModel), of a configuration's (ViTConfig), or what it calls the type (vit).

    Raises:
        ValueError: when there is none, or it has no configuration of its own.
    """
    model, config = _classes(library, name)
    failed: Exception | None = None
    any_made = False
    for sizes in (LAYERS | WIDTHS, LAYERS, {}):
        try:
            made = model(_config(config, sizes))
        except Exception as error:
            failed = error
            continue
        any_made = True
        yield made.eval()
    if failed is not None and not any_made:
        raise ValueError(f"transformers:{name}: {type(failed).__name__}: {failed}") from failed


def _classes(library: ModuleType, name: str) -> tuple[Any, Any]:
    auto = library.models.auto
    configs = auto.configuration_auto.CONFIG_MAPPING_NAMES
    cls: Any = getattr(library, configs.get(name, name), None) if name.isidentifier() or name in configs else None
    if _is(cls, library.PreTrainedModel) and cls.config_class is not None:
        return cls, cls.config_class
    if _is(cls, library.PreTrainedConfig):
        made = library.AutoModel._model_mapping.get(cls, None)
        made = made[0] if isinstance(made, tuple) else made
        if made is not None:
            return made, cls
    known = [*configs, *(n for n in dir(library) if n.endswith("Model"))]
    raise ValueError(f"transformers:{name}: no model or configuration of this name{meant(name, known, 5)}")


def _is(cls: Any, base: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, base)


def _config(config: Any, sizes: dict[str, int]) -> Any:
    """A configuration with those of the sizes that it has, in its parts as well."""
    default = config()
    given: dict[str, Any] = {k: v for k, v in sizes.items() if type(getattr(default, k, None)) is int}
    for part in getattr(default, "sub_configs", None) or {}:
        own = getattr(default, part, None)
        if own is not None:
            given[part] = own.to_dict() | {k: v for k, v in sizes.items() if type(getattr(own, k, None)) is int}
    return config(**given)


def of_images(library: ModuleType, name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model that takes images, of the first of the sizes of `models` with which it runs, and the size of an image.

    Raises:
        ValueError: as `models` does, or it takes no images, or runs with none of them.
    """
    errors = []
    for model in models(library, name):
        given = next(inputs(model))
        if "pixel_values" not in given:
            raise ValueError(f"transformers:{name} takes {next(iter(given))}, and no images")
        size = tuple(given["pixel_values"].shape[1:])
        try:
            trial(model, size, None, lambda twin, modules, args, kwargs: twin(*args, **kwargs))
        except ValueError as error:
            errors.append(error)
            continue
        return model, size
    raise ValueError(f"transformers:{name}: {errors[0]}") from errors[0]


def inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Arguments of a model by name: of its main input, then of all that it takes; pixels, ids or sound."""
    main = model.main_input_name
    takes = inspect.signature(model.forward).parameters
    makers = {
        "pixel_values": _pixels, "input_ids": _ids, "decoder_input_ids": _ids, "input_features": _spectrum,
        "input_values": lambda config: torch.zeros(1, SECONDS),
    }  # fmt: skip
    if main not in makers:
        raise ValueError(f"{type(model).__name__} takes {main}, of which no example can be made")
    needed = {main: makers[main](model.config)}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        needed["decoder_input_ids"] = _ids(model.config)
    yield needed
    yield needed | {n: make(model.config) for n, make in makers.items() if n in takes and n not in needed}


def _pixels(config: Any) -> Tensor:
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None) or 224
    size = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(1, getattr(config, "num_channels", 3), *size)


def _ids(config: Any) -> Tensor:
    return torch.arange(3, 3 + TOKENS)[None]


def _spectrum(config: Any) -> Tensor:
    bands = int(getattr(config, "num_mel_bins", 0) or getattr(config, "input_feat_per_channel", 80))
    length = 2 * getattr(config, "max_source_positions", 100)
    if getattr(config, "input_feat_per_channel", None):
        return torch.zeros(1, 64, bands)
    return torch.zeros(1, bands, length)

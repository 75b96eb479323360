"""Networks in folders and on the Hugging Face Hub: ``config.json`` and ``model.safetensors``, in timm's layout.

timm reads such a folder too, after ``import nearfold.models.timm``:
``timm.create_model("local-dir:FOLDER", pretrained=True)``.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nearfold.grammar import Operation
from nearfold.models.network import Features, Network
from nearfold.models.registry import create
from nearfold.options import line

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CARD = """\
---
library_name: nearfold
pipeline_tag: image-classification
license: {license}
tags:
- image-classification
- nearfold
---
# {name}

`{architecture}` of Nearfold, {parameters:,} parameters.

```python
import nearfold.models

network = nearfold.models.from_pretrained("{repo}")
```
"""


def save_pretrained(model: Network, folder: str | os.PathLike[str]) -> None:
    """Write a network's arguments and weights to a folder, which is made where there is none.

    Raises:
        ValueError: for a module that `create` did not make, or an argument that JSON cannot hold.
    """
    config = config_of(model)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    # safetensors wants tensors of their own, in order
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, path / WEIGHTS, metadata={"format": "pt"})


def from_pretrained(source: str | os.PathLike[str], *, revision: str | None = None, **overrides: Any) -> nn.Module:
    """A network with its weights, from a folder or from the Hub.

    Args:
        source: a folder that `save_pretrained` wrote, or a repository on the Hub, OWNER/NAME.
        revision: branch, tag or commit, on the Hub.
        overrides: arguments of `create` in place of the saved ones. With another ``num_classes`` the classifier is
            new; ``img_size`` and ``features_only`` change; what would change other weights is refused.

    Raises:
        ValueError: when there is no such folder, a file of it cannot be read, or its weights do not fit.
        ImportError: for a repository, where huggingface_hub is not installed.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     create("gwo_conv", width=4).save_pretrained(folder)
    ...     from_pretrained(folder, num_classes=3).fc3
    Linear(in_features=84, out_features=3, bias=True)
    """
    config_file, weights_file = _files(source, revision)
    config, state = _config(config_file), _weights(weights_file)
    only = {name: overrides.pop(name) for name in ("features_only", "out_indices") if name in overrides}
    saved = config.get("model_args", {})

    def make() -> Network:
        network = create(config["architecture"], **(saved | overrides))
        assert isinstance(network, Network)
        return network

    try:
        with torch.device("meta"):  # what is too large for the weights that are there is never made
            _fitting(make(), state, saved, overrides, str(source))
        network = make()
        network.load_state_dict(_fitting(network, state, saved, overrides, str(source)))
    except Misfit:
        raise
    except Exception as error:  # arguments of any type and size came from the file
        raise ValueError(
            f"{config_file} and {WEIGHTS} beside it make no network ({line(error)}): save or fetch them again"
        ) from error
    if only.get("features_only"):
        return Features(network, only.get("out_indices"))
    if only.get("out_indices") is not None:
        raise ValueError("out_indices goes with features_only=True")
    return network


def push_to_hub(
    model: Network,
    repo_id: str,
    *,
    commit_message: str = "Add model",
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    license: str = "apache-2.0",
) -> str:
    """Upload a network's folder, and a short model card where the repository has none.

    Args:
        model: the network.
        repo_id: OWNER/NAME, or NAME for the token's owner; made where there is none.
        commit_message: of the upload.
        private: whether a new repository is private.
        token: default: the one that ``hf auth login`` stored.
        revision: branch to upload to.
        license: on the card.

    Returns:
        The address of the commit.

    Raises:
        ImportError: where huggingface_hub is not installed.
    """
    api = _hub("push_to_hub").HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        if not api.file_exists(repo, "README.md", revision=revision):
            text = CARD.format(
                name=repo.rpartition("/")[2],
                architecture=model.architecture,
                parameters=sum(p.numel() for p in model.parameters()),
                repo=repo,
                license=license,
            )
            (Path(folder) / "README.md").write_text(text)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=commit_message, revision=revision
        )  # fmt: skip
    return str(commit.commit_url)


def config_of(model: Network) -> dict[str, Any]:
    """What ``config.json`` says of a network."""
    if not isinstance(model, Network) or not model.architecture:
        raise ValueError(
            f"save_pretrained is for networks that nearfold.models.create made, got {type(model).__name__}; "
            "keep other modules with safetensors.torch.save_model"
        )
    arguments = {name: _plain(name, value) for name, value in model.arguments.items()}
    described = {name: _plain(name, value) for name, value in model.pretrained_cfg.items() if name not in SOURCES}
    channels, size = arguments["in_chans"], arguments["img_size"]
    return {
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": described | {"num_classes": model.num_classes, "input_size": [channels, *size]},
    }


SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "architecture")
"""What timm notes about where weights came from."""


def _plain(name: str, value: Any) -> Any:
    """A value as JSON has it: operations in the notation, tuples as lists."""
    if isinstance(value, Operation):
        return str(value)
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise ValueError(f"{name}={value!r} cannot be kept in {CONFIG}; give numbers, strings or a notation") from None


class Misfit(ValueError):
    """Weights are not those of the network."""


def _config(file: Path) -> dict[str, Any]:
    """What ``config.json`` holds, with types as `save_pretrained` writes them."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({line(error)}): save or fetch it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{file} names no architecture; save_pretrained writes one that does")
    if not isinstance(config.get("model_args", {}), dict):
        raise ValueError(f"{file}: model_args must be arguments by name, got {line(str(config['model_args']))}")
    return config


def _weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # of safetensors, which has errors of its own, of the system, of types torch lacks
        raise ValueError(f"{file} cannot be read as safetensors ({line(error)}): save or fetch it again") from error


def _fitting(
    network: Network, state: dict[str, Tensor], saved: dict[str, Any], overrides: dict[str, Any], source: str
) -> dict[str, Tensor]:
    """All weights, but those of a classifier for other classes."""
    head = f"{network.head_name}."
    own = network.state_dict()
    if overrides.get("num_classes", saved.get("num_classes")) != saved.get("num_classes"):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
        state |= {name: tensor for name, tensor in own.items() if name.startswith(head)}
    state = network.fitted(state)
    wrong = [
        f"{name} ({_size(state, name)}, wanted {_size(own, name)})"
        for name in sorted(state.keys() | own.keys())
        if _size(state, name) != _size(own, name)
    ]
    if wrong:
        changed = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        why = f"with {changed} it is another network" if changed else "the file is not this network's"
        raise Misfit(f"{source}: weights do not fit, {why}: {', '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}")
    return state


def _size(state: dict[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "absent"


def _files(source: str | os.PathLike[str], revision: str | None) -> tuple[Path, Path]:
    """The two files, downloaded where the source is on the Hub."""
    folder = Path(source)
    if folder.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; save_pretrained writes {CONFIG} and {WEIGHTS}")
        return folder / CONFIG, folder / WEIGHTS
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or text.endswith("/"):
        raise ValueError(f"{text!r} is neither a folder nor a repository on the Hub, OWNER/NAME")
    download = _hub("from_pretrained").hf_hub_download
    config, weights = (download(text, name, revision=revision) for name in (CONFIG, WEIGHTS))
    return Path(config), Path(weights)


def _hub(wanted: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{wanted} with the Hugging Face Hub needs huggingface_hub: pip install huggingface_hub, "
            "or work with a local folder"
        ) from error
    return huggingface_hub

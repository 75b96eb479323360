"""`describe` on networks by name: what is unknown, and that every field stated is a right one."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from named_networks import TIMM, TORCHVISION, TRANSFORMERS
from torch import nn

from nearfold.recognise import configured, describe
from nearfold.recognise.command import described, import_library

SHARE = 0.05  # of all entries of a network of timm or torchvision, over all of them
SAMPLE = ("resnet18", "convnext_atto")


def share(found) -> tuple[int, int]:
    """Unknown entries, and all of them."""
    return len(found.unknown), len(found.unknown) + len(found.rows) + sum(found.pointwise.values())


def of_library(source: str, name: str) -> nn.Module:
    try:
        import_library("torchvision", source)
        library = importlib.import_module("timm" if source == "timm" else "torchvision.models")
    except ImportError as error:
        pytest.skip(str(error))
    return library.create_model(name) if source == "timm" else library.get_model(name, weights=None)


@pytest.mark.parametrize("name", SAMPLE)
def test_common_networks_of_timm_have_nothing_unknown(name):
    found = describe(of_library("timm", name), (3, TIMM[name], TIMM[name]))
    assert found.unknown == () and found.rows


@pytest.mark.slow
@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_little_is_unknown_in_networks_of(source):
    names = TIMM if source == "timm" else TORCHVISION
    counts = [share(describe(of_library(source, name), (3, size, size))) for name, size in names.items()]
    unknown, entries = map(sum, zip(*counts, strict=True))
    assert unknown <= SHARE * entries, f"{unknown} of {entries}"


@pytest.mark.slow
def test_little_is_unknown_in_networks_of_transformers():
    pytest.importorskip("transformers")
    unknown, entries = map(sum, zip(*(share(described(name)) for name in TRANSFORMERS), strict=True))
    assert unknown <= 0.15 * entries, f"{unknown} of {entries}"


def test_a_model_of_transformers_by_its_name():
    code = "from nearfold.recognise.command import run; print(run('transformers:vit'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ViTModel on pixel_values 3x224x224" in done.stdout and "window(16, stride=16, padding=0)" in done.stdout
    assert "softmax(heads=4)" in done.stdout and "unknown:" not in done.stdout
    assert "field: how many positions" in done.stdout and "C_D: the primitives" in done.stdout


def test_a_name_that_transformers_does_not_know():
    pytest.importorskip("transformers")
    import_library("torchvision", "transformers")
    with pytest.raises(ValueError, match=r"no model or configuration of this name; close to it: .*ViTModel"):
        next(configured.models(importlib.import_module("transformers"), "VitModle"))

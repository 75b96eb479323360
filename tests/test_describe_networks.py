"""`describe` on networks by name: what is unknown, and that every field stated is a right one."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys

import pytest
import torch
from gradients import Tally, check
from named_networks import TIMM, TORCHVISION, TRANSFORMERS
from torch import nn

from nearfold.recognise import Description, configured, describe
from nearfold.recognise.command import described, import_library

LEAST = {"timm": 0.05, "torchvision": 0.05, "transformers": 0.15}  # what may be unknown, of rows and unknown entries
SAMPLE = ("resnet18", "convnext_atto")
# Whose rows are compared with gradients in the quick tests; all others in the slow ones.
CHECKED = {"timm": ("convnextv2_atto", "resnet50d"), "torchvision": ("squeezenet1_0",), "transformers": ("GPT2Model",)}
SHALLOW = {"beit_base_patch16_224": {"depth": 2}, "cait_xxs24_224": {"depth": 2}}  # large, and of blocks that are alike


def require_few(found: list[Description], source: str) -> None:
    """Few entries are unknown; with those that are pointwise in the sum, the share is smaller."""
    unknown, rows = sum(len(f.unknown) for f in found), sum(len(f.rows) for f in found)
    strict, easy = unknown + rows, unknown + rows + sum(sum(f.pointwise.values()) for f in found)
    print(
        f"{source}: {unknown} unknown; {unknown / strict:.1%} without pointwise layers, {unknown / easy:.1%} with them"
    )
    assert rows
    assert unknown <= LEAST[source] * strict


def of_library(source: str, name: str, **settings: int) -> nn.Module:
    try:
        import_library("torchvision", source)
        library = importlib.import_module("timm" if source == "timm" else "torchvision.models")
    except ImportError as error:
        pytest.skip(str(error))
    return library.create_model(name, **settings) if source == "timm" else library.get_model(name, weights=None)


@pytest.mark.parametrize("name", SAMPLE)
def test_common_networks_of_timm_have_nothing_unknown(name):
    found = describe(of_library("timm", name), (3, TIMM[name], TIMM[name]))
    assert found.unknown == () and found.rows


@pytest.mark.slow
@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_little_is_unknown_in_networks_of(source):
    names = TIMM if source == "timm" else TORCHVISION
    require_few([describe(of_library(source, name), (3, size, size)) for name, size in names.items()], source)


@pytest.mark.slow
def test_little_is_unknown_in_networks_of_transformers():
    pytest.importorskip("transformers")
    require_few([described(name) for name in TRANSFORMERS], "transformers")


def compared(source: str, name: str) -> Tally:
    """All rows of a network, next to gradients."""
    torch.manual_seed(0)
    if source != "transformers":
        size = (TIMM if source == "timm" else TORCHVISION)[name]
        return check(of_library(source, name, **SHALLOW.get(name, {})), (3, size, size))[1]
    pytest.importorskip("transformers")
    import_library("torchvision", "transformers")
    for model in configured.models(importlib.import_module("transformers"), name):
        for inputs in configured.inputs(model):
            with contextlib.suppress(ValueError):
                return check(model, None, inputs)[1]
    raise AssertionError(f"{name} does not run")


@pytest.mark.parametrize(("source", "name"), [(source, name) for source, names in CHECKED.items() for name in names])
def test_rows_are_what_gradients_show(source, name):
    tally = compared(source, name)
    assert tally.wrong == []
    assert tally.words and tally.pointwise


@pytest.mark.slow
@pytest.mark.parametrize("source", CHECKED)
def test_rows_of_all_networks_are_what_gradients_show(source):
    names = {"timm": TIMM, "torchvision": TORCHVISION, "transformers": TRANSFORMERS}[source]
    tallies = {name: compared(source, name) for name in names if name not in CHECKED[source]}
    wrong = {name: tally.wrong for name, tally in tallies.items() if tally.wrong}
    total = sum(tallies.values(), Tally())
    print(f"{source}: {total.words} paths, {total.fields} fields ({total.tight} of them reached) and {total.pointwise} "
          f"pointwise layers compared, {len(total.left)} rows left out, {len(total.wrong)} wrong")  # fmt: skip
    assert wrong == {}
    assert len(total.left) <= 0.02 * total.words, total.left
    assert total.tight >= 0.8 * total.fields


@pytest.mark.slow
def test_a_model_of_transformers_by_its_name():
    code = "from nearfold.recognise.command import text; print(text('transformers:vit'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ViTModel on pixel_values 3x224x224" in done.stdout and "window(16, stride=16, padding=0)" in done.stdout
    assert "softmax(heads=4)" in done.stdout and "unknown:" not in done.stdout
    assert "field: how many positions" in done.stdout and "C_D: the primitives" in done.stdout


def test_a_name_that_transformers_does_not_know():
    pytest.importorskip("transformers")
    import_library("torchvision", "transformers")
    with pytest.raises(ValueError, match=r"no model or configuration of this name; did you mean .*ViTModel"):
        next(configured.models(importlib.import_module("transformers"), "VitModle"))

"""One set of names: what the catalogue calls an operator is understood everywhere, and what is meant is suggested."""

from __future__ import annotations

import pytest
import torch

import nearfold
from nearfold import CATALOGUE, parse
from nearfold.cli import main
from nearfold.grammar.notation import did_you_mean
from nearfold.models.registry import MODELS, close_to
from nearfold.nn import (
    BlockAttention2d,
    BranchingConv2d,
    ConvNN1d,
    ConvNN2d,
    ConvNN3d,
    KVTAttention,
    Mixer,
    SelfAttention,
)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_name_is_its_operation(name):
    assert parse(name) == CATALOGUE[name].operation
    assert parse(f"0.5*{name} + 0.5*(conv)").terms[0] == (0.5, CATALOGUE[name].operation)
    assert parse(f"branch(0.5, {name}, conv)").first == CATALOGUE[name].operation


def test_layers_take_names():
    assert Mixer("convnn", 4).operation == Mixer(CATALOGUE["convnn"].notation, 4).operation
    with pytest.raises(ValueError, match="did you mean swin"):
        Mixer("swim", 4)


def test_what_is_meant_is_found_by_letters_and_by_the_fields_words():
    meant = {"convolution": "conv", "conv2d": "conv", "self-attention": "attention", "Involution": "involution",
             "mambo": "mamba", "neighborhood": "neighborhood", "deformable_conv": "deformable"}  # fmt: skip
    for text, name in meant.items():
        assert did_you_mean(text).startswith(f" (did you mean {name}"), text
    assert did_you_mean("yolo") == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "swim", "--shape", "1,8,8,8"], "did you mean swin"),
        (["ops", "convolution"], "did you mean conv"),
        (["look", "sample:china.jpg", "--op", "self-attention"], "did you mean attention"),
        (["train", "--op", "convn"], "did you mean convnn"),
        (["models", "resnet51"], "close to it: "),
        (["models", "hybrid"], "close to it: "),
    ],
)
def test_the_command_line_suggests(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_networks_are_found_by_a_part_of_their_name():
    assert all("resnet50" in name for name in close_to("resnet50").removeprefix("close to it: ").split(", "))
    assert set(close_to("vgg11_hybird").removeprefix("close to it: ").split(", ")) <= set(MODELS)


@pytest.mark.parametrize(
    ("layer", "arguments", "said"),
    [
        (ConvNN2d, {"kernel_size": 3}, "ConvNN2d has no argument 'kernel_size'; here it is k. It takes: in_channels"),
        (ConvNN2d, {"candidate": "all"}, "here it is candidates"),
        (BlockAttention2d, {"window_size": 7}, "here it is block_size"),
        (SelfAttention, {"nhead": 2}, "here it is num_heads"),
        (KVTAttention, {"heads": 2}, "here it is num_heads"),
        (Mixer, {"dim": 2}, "here it is in_channels"),
        (Mixer, {"zzz": 2}, "Mixer has no argument 'zzz'. It takes: operation"),
    ],
)
def test_an_argument_of_another_library_says_what_it_is_called_here(layer, arguments, said):
    with pytest.raises(TypeError, match=said):
        layer(4, 4, **arguments)


@pytest.mark.parametrize(
    ("layer", "argument"),
    [(layer, name) for layer in (ConvNN1d, ConvNN2d, ConvNN3d, BranchingConv2d) for name in layer.elsewhere],
)
def test_what_a_layer_has_no_argument_for_an_operation_says(layer, argument):
    with pytest.raises(TypeError, match=f"{layer.__name__} has no argument '{argument}': say it to Mixer") as raised:
        layer(4, 4, **{argument: 1})
    example = str(raised.value).partition("such as ")[2]
    said, plain = eval(example, {"Mixer": Mixer}), layer(64, 64).operation
    assert said.operation != plain and said(torch.randn(1, 64, 4, 4)).shape == (1, 64, 4, 4)


def test_a_prompt_completes_what_there_is():
    there = dir(nearfold)
    assert {"convert", "describe", "mixing_matrix", "nn", "lower", "train", "study", "parse"} <= set(there)
    for name in there:
        assert hasattr(nearfold, name)


def test_no_hint_names_a_package_that_cannot_be_fetched():
    """There is no release yet: `pip install 'nearfold[...]'` finds nothing."""
    from pathlib import Path

    for file in Path(nearfold.__file__).parent.rglob("*.py"):
        assert "install 'nearfold" not in file.read_text(), file

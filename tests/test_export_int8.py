"""int8: which weights become so, that positions stay integers, and what other people's quantisers make of the files."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from nearfold.export import to_int8, to_onnx
from nearfold.export.int8 import WEIGHTED
from nearfold.grammar import CATALOGUE
from nearfold.models.small import SpectrumNet
from nearfold.nn import ConvNN2d, DeformConv2d, Mixer, TokenMixer, select_in_float32
from nearfold.testing import context_for, make

LAYERS = {
    "conv": "window(3) | box | kernel",
    "hybrid": "branch(0.5, nearest(5, cosine, self) | ranked | kernel, window(3) | box | kernel, mix)",
    "convnn": "nearest(5, cosine, self) | ranked | kernel",
    "kvt": "nearest(5, scaled) | ranked | softmax(heads=2)",
    "attention": "all | row | softmax(heads=2)",
    "acmix": CATALOGUE["acmix"].notation,
}
IN_LAYERS = {
    "conv": ["weight"],
    "hybrid": ["mix_weight", "0.weight", "1.weight"],
    "convnn": ["weight"],
    "kvt": ["query_weight", "key_weight", "value_weight", "out_weight"],
    "attention": ["query_weight", "key_weight", "value_weight", "out_weight"],
    "acmix": ["query_weight", "key_weight", "value_weight", "1.weight"],
}


def network(name):
    torch.manual_seed(0)
    return SpectrumNet(LAYERS[name], 1, 10, width=8, depth=1).eval()


def images(count=8):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def x86():
    found = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", reason="the extra int8")
    return found.X86InductorQuantizer().set_global(found.get_default_x86_inductor_quantization_config())


def xnnpack():
    found = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", reason="extra executorch")
    config = found.get_symmetric_quantization_config(is_per_channel=True)
    return found.XNNPACKQuantizer().set_global(config)


QUANTISERS = {"x86": x86, "xnnpack": xnnpack}


@pytest.mark.slow
@pytest.mark.parametrize("cell", [f"{n} {q}" for n in LAYERS for q in QUANTISERS])
def test_weights_of_projections_and_kernels_are_int8(cell):
    name, which = cell.split()
    net, x = network(name), images()
    made = to_int8(net, x[:2], x.split(4), QUANTISERS[which](), dynamic="batch")
    assert {f"blocks.0.mixer.{weight}" for weight in IN_LAYERS[name]} <= set(made.weights)
    assert {"stem.weight", "classifier.weight", "blocks.0.mlp.1.weight"} <= set(made.weights)
    assert "place" in made.left and not set(made.left) & set(made.weights)
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    held = [b.numel() for b in made.model.buffers() if b.dtype == torch.int8 and b.dim() > 1]
    assert sum(held) >= sum(sizes[name] for name in made.weights) > 0.8 * sum(sizes.values())
    assert 0 < made.difference < 0.3
    assert (made.moved is None) == (name in ("conv", "attention", "acmix"))
    with torch.no_grad():
        apart = (made.model(x) - net(x)).abs().max() / net(x).abs().max()
    assert 0 < apart < 0.4
    assert "int8: " in str(made) and "place" in str(made)


@pytest.mark.slow
@pytest.mark.parametrize("which", QUANTISERS)
@pytest.mark.parametrize("name", ["deformable_v2", "nsa", "moba", "swin", "involution", "edgeconv", "sapa", "dat"])
def test_rows_of_the_catalogue(name, which):
    layer, x = make(CATALOGUE[name].operation, (16, 16), torch.float32)
    context = context_for(layer.eval(), x)
    args = (x,) if context is None else (x, context.detach())
    made = to_int8(layer, args, [args, args], QUANTISERS[which]())
    found, wanted = made.model(*args), layer(*args)
    # not the largest difference: of noise, one position that is another one gives any number
    assert made.weights and 0 < (found - wanted).norm() < 0.3 * wanted.norm()
    assert not found.requires_grad and all(p.requires_grad for p in layer.parameters())


def rounded_before(graph, target):
    """What is rounded to int8 on the way to operators of this kind, but for what products with weights give."""
    waiting = [node for node in graph.graph.nodes if node.target is target]
    assert waiting
    seen, found = set(), []
    while waiting:
        node = waiting.pop()
        if node in seen or node.target in WEIGHTED:
            continue
        seen.add(node)
        if ".quantize_per" in str(node.target) and node.args[0].target not in WEIGHTED:
            found.append(node.args[0])
        waiting += node.all_input_nodes
    return found


@pytest.mark.slow
@pytest.mark.parametrize("which", QUANTISERS)
@pytest.mark.parametrize("case", ["scores", "places"])
def test_what_decides_is_not_rounded(case, which):
    """Scores of a search and places between positions come of weights in int8, and are float32 from there on."""
    torch.manual_seed(0)
    if case == "scores":
        net, x, target = network("kvt"), images(), torch.ops.aten.topk.default
    else:
        net, x, target = DeformConv2d(8, 8, 3).eval(), torch.randn(2, 8, 9, 9), torch.ops.aten.floor.default
        torch.nn.init.normal_(next(p for name, p in net.named_parameters() if "offset" in name), std=0.1)
    made = to_int8(net, x, [x], QUANTISERS[which]())
    assert rounded_before(made.model, target) == []
    assert made.weights and made.moved is not None and 0 < made.moved < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("which", QUANTISERS)
@pytest.mark.parametrize("name", ["conv", "hybrid", "acmix"])
def test_a_norm_behind_the_layer(name, which):
    """torchao folds it into the convolution before it, whose weight it reads; the model stays what it was."""
    torch.manual_seed(0)
    net = nn.Sequential(Mixer(LAYERS[name], 8, bias=False), nn.BatchNorm2d(8))
    x = torch.randn(4, 8, 8, 8)
    net(x)
    net.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    made = to_int8(net, x, [x], QUANTISERS[which]())
    assert {f"0.{weight}" for weight in IN_LAYERS[name]} <= set(made.weights)
    assert made.difference < 0.1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.slow
def test_no_weights_no_batches_no_quantiser():
    net, x = network("conv"), images()
    with pytest.raises(ValueError, match="batches holds nothing"):
        to_int8(net, x[:2], [], x86(), dynamic="batch")
    with pytest.raises(ValueError, match=r"images\.split"):
        to_int8(net, x[:2], x, x86())
    with pytest.raises(ValueError, match=r"does not take \[\(8, 1, 8, 8\)\].*'batch' leaves"):
        to_int8(net, x[:2], [x], x86())
    with pytest.raises(ValueError, match="quantizer must be one of torchao's"):
        to_int8(net, x[:2], [x], "x86")
    with pytest.raises(ValueError, match="training mode"):
        to_int8(copy.deepcopy(net).train(), x[:2], [x], x86())
    with pytest.raises(ValueError, match="finds no weights: was its configuration set"):
        to_int8(net, x[:2], [x[:2]], type(x86())())


def test_without_torchao_the_extra_is_named():
    if importlib.util.find_spec("torchao") is not None:
        pytest.skip("torchao is installed")
    with pytest.raises(ImportError, match=r"nearfold\[int8\]"):
        to_int8(network("conv"), images(2), [images(2)], None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "acmix"])
def test_onnxruntime_quantises_the_file(name, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    net, x = network(name), images(16)
    plain, folded, small = (tmp_path / f"{each}.onnx" for each in ("plain", "folded", "small"))
    to_onnx(net, x[:2], plain, dynamic="batch")
    quantization.quant_pre_process(plain, folded, skip_symbolic_shape=True)
    entry = onnx.load(folded).graph.input[0].name

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{entry: x.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    quantization.quantize_static(folded, small, Reader(), per_channel=True)
    graph = onnx.load(small).graph
    arrays = [onnx.numpy_helper.to_array(each) for each in graph.initializer]
    held = sum(a.size for a in arrays if a.dtype == "int8" and a.ndim > 1)
    assert held > 0.8 * sum(p.numel() for p in net.parameters())
    made = {out: node.op_type for node in graph.node for out in node.output}
    searches = [node for node in graph.node if node.op_type == "TopK"]
    assert bool(searches) == (name == "hybrid")
    indices = [node.input[1] for node in graph.node if node.op_type in ("GatherElements", "Gather")]
    assert not any("Quantize" in made.get(each, "") for each in indices)
    found = onnxruntime.InferenceSession(small).run(None, {entry: x.numpy()})[0]
    with torch.no_grad():
        wanted = net(x)
    assert 0 < (torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max() < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv", "hybrid", "kvt", "attention"])
def test_executorch_runs_what_was_quantised(name, tmp_path):
    """With XNNPACK for what it knows; without outputs in int8 its lowering gave other numbers."""
    quantiser = xnnpack()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    net, x = network(name), images(4)
    made = to_int8(net, x, [x], quantiser, stable_topk=True).model
    with torch.no_grad():
        program, wanted = torch.export.export(made, (x,)), made(x)
    edge = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
    )
    targets = [str(node.target) for node in edge.exported_program().graph.nodes]
    assert any("delegate" in each for each in targets) and not any("aten.convolution" in each for each in targets)
    (tmp_path / "net.pte").write_bytes(edge.to_executorch().buffer)
    found = Runtime.get().load_program(tmp_path / "net.pte").load_method("forward").execute([x])[0]
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.slow
def test_inductor_lowers_what_was_quantised():
    net, x = network("hybrid"), images()
    made = to_int8(net, x, [x], x86()).model
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        fast = torch.compile(made)(x)
        counted = torch._dynamo.utils.counters["inductor"]
        assert counted["qconv_unary_lower_count"] and counted["qlinear_unary_lower_count"]
        torch.testing.assert_close(fast, made(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_torchao_takes_projections_by_their_names():
    quantization = pytest.importorskip("torchao.quantization", reason="the extra int8")
    torch.manual_seed(0)
    net = nn.Sequential(TokenMixer(LAYERS["kvt"], 32)).eval()
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        before = net(x)
        config = quantization.Int8WeightOnlyConfig()
        names = {f"0.{each}": config for each in IN_LAYERS["kvt"]}
        quantization.quantize_(net, quantization.FqnToConfig(names), filter_fn=None)
        assert all(type(net.get_parameter(each)) is not nn.Parameter for each in names)
        assert 0 < (net(x) - before).abs().max() / before.abs().max() < 0.2


@pytest.mark.parametrize("cast", ["autocast", "whole"])
@pytest.mark.parametrize("notation", [LAYERS["kvt"], "nearest(5, scaled) | ranked | softmax(heads=2)*depthwise"])
def test_selection_in_float32(notation, cast):
    """The neighbours, and with them the output, are nearer those of unrounded projections."""
    torch.manual_seed(0)
    layer = Mixer(notation, 16).eval()
    x = torch.randn(4, 16, 12, 12).bfloat16().float()
    layer.bfloat16().float()  # so that only products are rounded
    with torch.no_grad():
        wanted = layer(x)
        apart = {}
        for on in (False, True):
            assert select_in_float32(layer, on) == 1
            if cast == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    found = layer(x)
            else:
                found = copy.deepcopy(layer).bfloat16()(x.bfloat16())
            assert found.dtype == torch.bfloat16
            apart[on] = (found.float() - wanted).abs().mean().item()
        assert apart[True] < 0.7 * apart[False]
        select_in_float32(layer)
        assert torch.equal(layer(x), wanted)


def test_selection_in_float32_trains():
    layer = Mixer(LAYERS["kvt"], 8).bfloat16()
    select_in_float32(layer)
    x = torch.randn(2, 8, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.query_weight.grad.abs().sum() > 0


def test_selection_in_float32_of_shared_projections():
    """In a sum only the operand that searches reads them; the other one's numbers are what they were."""
    torch.manual_seed(0)
    layer = Mixer("a*(nearest(5, scaled) | ranked | softmax(heads=2)) + b*(window(3) | box | softmax(heads=2))", 16)
    layer.eval().bfloat16().float()
    x = torch.randn(2, 16, 9, 9).bfloat16().float()
    with torch.no_grad():
        wanted, apart = layer(x), {}
        for on in (False, True):
            select_in_float32(layer, on)
            apart[on] = (copy.deepcopy(layer).bfloat16()(x.bfloat16()).float() - wanted).abs().mean().item()
    assert apart[True] < 0.9 * apart[False]


def test_nothing_to_select_in_float32():
    with pytest.raises(ValueError, match="no layer searches by projected"):
        select_in_float32(nn.Sequential(ConvNN2d(4, 4, k=3), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="on must be"):
        select_in_float32(Mixer(LAYERS["kvt"], 8), "yes")


@pytest.fixture(scope="module")
def recipe():
    """recipes/int8.py, where there is a tree around the package."""
    place = importlib.util.spec_from_file_location("int8_recipe", Path(__file__).parents[1] / "recipes" / "int8.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def test_the_page_has_what_was_measured(recipe):
    """docs/howto/int8.md is what recipes/int8.py makes of its results."""
    kept = json.loads(recipe.KEPT.read_text())
    assert recipe.page(kept) in recipe.PAGE.read_text()
    assert {f"{layer}, digits" for layer in recipe.LAYER} <= set(kept)

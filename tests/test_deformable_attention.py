"""Deformable attention on one map and on several: Deformable DETR's own module, and the formula number by number."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import nearfold
from nearfold import describe
from nearfold._torchvision import load
from nearfold.compat import from_deformable_detr, quicken
from nearfold.kernels import engine
from nearfold.kernels.sampled import sampled, sampled_backward
from nearfold.nn import MultiScaleDeformableAttention, deform_attn
from nearfold.testing import poisoned_empties

every_path = pytest.mark.parametrize("isa", engine.names())

# B, M, H, d, P, the maps
SIZES = {
    "detr": (1, 20, 8, 32, 4, [(8, 9), (4, 5), (2, 3), (1, 1)]),
    "odd": (2, 7, 3, 5, 3, [(5, 6), (3, 2)]),
    "one": (1, 1, 1, 1, 1, [(1, 1)]),
    "line": (2, 5, 2, 70, 20, [(1, 9)]),
    "no queries": (2, 0, 2, 4, 2, [(3, 3)]),
    "no batch": (0, 4, 2, 4, 2, [(3, 3)]),
}


def operands(size, dtype=torch.float64, spread=0.7, seed=0):
    B, M, H, d, P, shapes = size
    generator = torch.Generator().manual_seed(seed)
    axes, L = len(shapes[0]), len(shapes)
    value = torch.randn(B, sum(map(math.prod, shapes)), H, d, generator=generator, dtype=torch.float64)
    where = 0.5 + spread * torch.randn(B, M, H, L, P, axes, generator=generator, dtype=torch.float64)
    weights = torch.randn(B, M, H, L, P, generator=generator, dtype=torch.float64).flatten(3).softmax(-1)
    return [t.to(dtype).requires_grad_() for t in (value, where, weights.unflatten(3, (L, P)))]


def run(function, tensors, grad=None):
    """Output and every gradient."""
    y = function(*tensors)
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))]


def assert_same(found, truth, tolerance):
    for f, t in zip(found, truth, strict=True):
        assert f.shape == t.shape
        if t.numel():
            assert (f.double() - t.double()).abs().max() <= tolerance * max(1.0, t.abs().max().item())


@pytest.fixture(scope="module")
def detr():
    load("torchvision")  # before transformers, which imports it
    pytest.importorskip("transformers")
    from transformers.models.deformable_detr import modeling_deformable_detr

    return modeling_deformable_detr


@every_path
@pytest.mark.parametrize("name", SIZES)
def test_it_is_transformers(name, isa, detr):
    tensors, shapes = operands(SIZES[name]), SIZES[name][-1]
    if not tensors[0].numel() or not tensors[1].numel():
        with engine.forced(isa):
            found = run(lambda *t: deform_attn(t[0], shapes, *t[1:]), tensors)
        assert found[0].shape == (SIZES[name][0], SIZES[name][1], SIZES[name][2] * SIZES[name][3])
        assert all(not f.any() for f in found)
        return
    core = detr.MultiScaleDeformableAttention()
    with engine.forced(isa), poisoned_empties():
        found = run(lambda *t: deform_attn(t[0], shapes, *t[1:]), tensors)
    truth = run(lambda *t: core(t[0], None, shapes, None, *t[1:], 64), tensors)
    assert_same(found, truth, 1e-12)


def plain(value, shapes, where, weights):
    """The formula, one number at a time: hats of width one around every position."""
    B, _, H, d = value.shape
    y = torch.zeros(B, where.shape[1], H, d, dtype=value.dtype)
    for b, m, h in itertools.product(*map(range, y.shape[:3])):
        first = 0
        for level, shape in enumerate(shapes):
            for p in range(where.shape[4]):
                at = [where[b, m, h, level, p, -1 - a] * n - 0.5 for a, n in enumerate(shape)]
                for flat, position in enumerate(itertools.product(*map(range, shape))):
                    share = math.prod(max(0.0, 1 - abs(float(x) - n)) for x, n in zip(at, position, strict=True))
                    y[b, m, h] += weights[b, m, h, level, p] * share * value[b, first + flat, h]
            first += math.prod(shape)
    return y.flatten(2)


@every_path
@pytest.mark.parametrize("shapes", [[(7,), (4,)], [(3, 4, 2), (1, 2, 5)], [(4, 3)]], ids=str)
def test_it_is_the_formula_on_one_to_three_axes(shapes, isa):
    tensors = operands((2, 3, 2, 3, 2, shapes))
    with engine.forced(isa):
        y = deform_attn(tensors[0], torch.tensor(shapes), *tensors[1:])
        assert_same([y], [plain(tensors[0].detach(), shapes, *(t.detach() for t in tensors[1:]))], 1e-12)
        assert gradcheck(lambda *t: deform_attn(t[0], shapes, *t[1:]), tensors, fast_mode=True)


@every_path
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_low_precision(dtype, tolerance, isa):
    tensors, shapes = operands(SIZES["odd"], dtype), SIZES["odd"][-1]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    with engine.forced(isa):
        found = run(lambda *t: deform_attn(t[0], shapes, *t[1:]), tensors)
    assert all(f.dtype == dtype for f in found)
    truth = run(lambda *t: deform_attn(t[0], shapes, *t[1:]), wide)
    assert_same(found, truth, tolerance)
    mixed = deform_attn(tensors[0], shapes, *(t.float() for t in tensors[1:]))
    assert mixed.dtype == dtype


@every_path
def test_nowhere_and_far_away(isa):
    value, where, weights = operands((1, 4, 2, 3, 2, [(3, 4)]))
    with torch.no_grad():
        where[0, 0, 0] = 1e30
        where[0, 1, 0, 0, 0, 1] = float("-inf")
        where[0, 2, 1, 0, 1, 0] = float("nan")
    with engine.forced(isa):
        y, d_value, d_where, d_weights = run(lambda *t: deform_attn(t[0], [(3, 4)], *t[1:]), [value, where, weights])
    lost = torch.zeros(1, 4, 2, 3, dtype=torch.bool)
    lost[0, 2, 1] = True
    assert torch.equal(y.isnan(), lost.flatten(2))
    assert not y[0, 0, :3].any()
    assert d_where.isfinite().all() and d_weights.isfinite().all()
    assert d_value[0, 0, 1].isnan().all() and d_value[0, 1:].isfinite().all() and d_value[0, 0, 0].isfinite().all()
    assert not d_where[0, 0, 0].any() and not d_where[0, 2, 1, 0, 1].any() and not d_weights[0, 2, 1, 0, 1]


def test_operator_and_second_derivatives():
    tensors, shapes = operands((2, 3, 2, 2, 2, [(4, 3), (2, 2)]), spread=0.3), [(4, 3), (2, 2)]
    assert gradgradcheck(lambda *t: deform_attn(t[0], shapes, *t[1:]), tensors, fast_mode=True)
    value, place, share = (t.detach().flatten(-2) if t.dim() == 4 else t.detach().flatten(3, 4) for t in tensors)
    args = value, 3 * place, share, [4, 3, 2, 2]
    torch.library.opcheck(sampled.registered, args)
    grad = sampled(*args)
    torch.library.opcheck(sampled_backward.registered, (grad, *args))
    with engine.forced("off"):
        torch.library.opcheck(sampled.registered, args)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        sampled.registered(*(t.to("meta") for t in args[:3]), args[3])
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 4 * 4  # B M S corners C


def test_compiles():
    tensors, shapes = operands(SIZES["odd"], torch.float32), SIZES["odd"][-1]

    def call(*t):
        return deform_attn(t[0], shapes, *t[1:])

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, tensors), run(call, tensors), 1e-6)


def foreign(detr, levels=2, heads=4, points=3):
    from transformers import DeformableDetrConfig

    torch.manual_seed(0)
    config = DeformableDetrConfig(d_model=24, num_feature_levels=levels, encoder_attention_heads=heads)
    layer = detr.DeformableDetrMultiscaleDeformableAttention(config, heads, points).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return layer


@pytest.mark.parametrize("levels, boxes, masked", [(2, False, False), (2, True, True), (1, False, True)])
def test_the_layer_is_transformers(levels, boxes, masked, detr):
    theirs = foreign(detr, levels)
    ours = from_deformable_detr(theirs)
    assert dict(ours.state_dict()).keys() == dict(theirs.state_dict()).keys()
    shapes = [(5, 4), (3, 2)][:levels]
    N = sum(map(math.prod, shapes))
    x, memory = torch.randn(2, 6, 24).double().requires_grad_(), torch.randn(2, N, 24).double().requires_grad_()
    reference = torch.rand(2, 6, levels, 4 if boxes else 2).double().requires_grad_()
    mask = torch.rand(2, N) < 0.7 if masked else None
    grad = torch.randn(2, 6, 24).double()
    sizes = torch.tensor(shapes)

    def call(x, memory, reference, *_):
        found = theirs(
            x, attention_mask=mask, encoder_hidden_states=memory, reference_points=reference, spatial_shapes=sizes,
            spatial_shapes_list=shapes, level_start_index=None,
        )  # fmt: skip
        return found[0]

    truth = run(call, [x, memory, reference, *theirs.parameters()], grad)
    found = run(
        lambda x, memory, reference, *_: ours(x, reference, memory, shapes, mask),
        [x, memory, reference, *ours.parameters()],
        grad,
    )
    assert_same(found, truth, 1e-12)
    if masked:
        odd = memory.detach().masked_fill(~mask[..., None], 1e6)
        assert torch.allclose(ours(x, reference, odd, shapes, mask), found[0])


def test_a_new_layer_starts_as_published(detr):
    from transformers import DeformableDetrConfig, DeformableDetrModel

    config = DeformableDetrConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=8, decoder_ffn_dim=8, num_queries=3, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, backbone_config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]},
    )  # fmt: skip
    model = DeformableDetrModel(config).eval()
    theirs = model.encoder.layers[0].self_attn
    ours = MultiScaleDeformableAttention(64, 8)
    assert torch.allclose(ours.sampling_offsets.bias, theirs.sampling_offsets.bias, atol=1e-6)
    for name in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias"):
        assert not ours.get_parameter(name).any() and not theirs.get_parameter(name).any()
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        before, names = model(pixel_values=x).last_hidden_state, list(model.state_dict())
        assert quicken(model) == 2
        after = model(pixel_values=x).last_hidden_state
    assert list(model.state_dict()) == names
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert quicken(model) == 0


def test_describe_knows_it(detr):
    one = describe(foreign(detr, levels=1))
    said = "points({}, groups=4, cross) | box | modulated(activation=softmax, project=vo)"
    assert str(one.rows[0].operation) == said.format(3) and "the caller gives" in one.rows[0].note
    assert one.rows[0].c_p == sum(p.numel() for p in foreign(detr, levels=1).parameters()) / 1e6
    several = describe(foreign(detr, levels=2))
    assert str(several.rows[0].operation) == said.format(3).replace("cross", "levels=2, cross")
    own = describe(MultiScaleDeformableAttention(24, 4, levels=1))
    assert str(own.rows[0].operation) == said.format(4)

    class Other(detr.DeformableDetrMultiscaleDeformableAttention):
        def forward(self, hidden_states, **others):
            return hidden_states.flip(1), None

    changed = foreign(detr, levels=1)
    changed.__class__ = Other
    assert "points(" not in str(describe(changed))
    with pytest.raises(ValueError, match="DeformableDetrMultiscaleDeformableAttention"):
        from_deformable_detr(changed)
    odd = foreign(detr, levels=1)
    odd.value_proj = torch.nn.Sequential(torch.nn.Linear(24, 24))
    with pytest.raises(ValueError, match=r"value_proj must be a plain nn\.Linear"):
        from_deformable_detr(odd)
    assert "points(" not in str(describe(odd))
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        from_deformable_detr(torch.nn.Linear(2, 2))


V, W, A = (1, 6, 2, 3), (1, 5, 2, 1, 4, 2), (1, 5, 2, 1, 4)


@pytest.mark.parametrize(
    "value, shapes, where, weights, message",
    [
        ((1, 6, 6), [(2, 3)], W, A, r"value must be \(B, N, H, d\)"),
        (V, [(2, 4)], W, A, r"the 8 positions of the maps \[\(2, 4\)\]"),
        (V, [(2, 3, 1)], W, A, "spatial_shapes must be"),
        (V, [], W, A, "one shape for each map"),
        (V, 7, W, A, "one shape for each map"),
        (V, [(2, 0)], W, A, "spatial_shapes must be"),
        (V, [(2, 3)], (1, 5, 3, 1, 4, 2), (1, 5, 3, 1, 4), "heads, points and one to three axes"),
        (V, [(1, 3), (1, 3)], W, A, "2 maps of spatial_shapes"),
        (V, [(2, 3)], W, (1, 5, 2, 1, 3), r"attention_weights must be \(1, 5, 2, 1, 4\)"),
    ],
)
def test_refusals(value, shapes, where, weights, message):
    with pytest.raises(ValueError, match=message):
        deform_attn(torch.zeros(value), shapes, torch.zeros(where), torch.zeros(weights))


def test_more_refusals():
    assert nearfold.deform_attn is deform_attn
    value, where, weights = torch.zeros(V), torch.zeros(W), torch.zeros(A)
    with pytest.raises(ValueError, match="one floating dtype"):
        deform_attn(value, [(2, 3)], where.double(), weights.double())
    with pytest.raises(ValueError, match="one floating dtype"):
        deform_attn(value.long(), [(2, 3)], where, weights)
    with pytest.raises(ValueError, match=r"attention_weights must be a torch\.Tensor"):
        deform_attn(value, [(2, 3)], where, None)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda v: deform_attn(v, [(2, 3)], where, weights).sum())(value)
    layer = MultiScaleDeformableAttention(8, 2, levels=1)
    x, at = torch.zeros(1, 5, 8), torch.zeros(1, 5, 1, 2)
    for wrong, message in (
        ((x[..., :7], at, x, [(1, 5)]), r"query must be \(B, N, 8\)"),
        ((x, at, x[0], [(1, 5)]), r"value must be \(B, N, 8\)"),
        ((x, at[:, :, 0], x, [(1, 5)]), r"reference_points must be \(1, 5, 1 or 1, 2 or 4\)"),
        ((x, at, x, [(1, 5), (1, 1)]), r"\(height, width\) of 1 maps"),
        ((x, at, x, [(1, 5)], torch.ones(1, 5)), "mask must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*wrong)
    with pytest.raises(ValueError, match="num_heads=3 must divide embed_dim=8"):
        MultiScaleDeformableAttention(8, 3)

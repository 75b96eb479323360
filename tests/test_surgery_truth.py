"""Surgery says exact where it is: over generated modules, and attention however it is called.

The oracle is a copy of the original, run on the same inputs as the converted model.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.same_models import BOUND, CALLS, KEPT, decoder, encoder, note, outcome, require_same, size, state
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.nn.utils.parametrizations import orthogonal

from nearfold import Rule, convert

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore")]

# --- what is generated


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Centred(nn.Conv2d):
    """Keeps the base's forward, and gives it another weight."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Named(nn.Conv2d):
    """Adds nothing that its forward uses."""

    def extra_repr(self):
        return "named"


def patched(layer):
    own = type(layer).forward
    layer.forward = lambda x: own(layer, x) + 1


def accumulated(layer):
    KEPT.append(layer.weight.view_as(layer.weight).grad_fn.next_functions[0][0])
    KEPT[-1].register_hook(note("node"))


def grown(layer):
    layer.register_parameter("lora", nn.Parameter(torch.randn(2)))


CHANGES = {
    "nothing": lambda layer: None,
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(note("forward pre")),
    "forward hook": lambda layer: layer.register_forward_hook(note("forward")),
    "full backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(note("backward pre")),
    "full backward hook": lambda layer: layer.register_full_backward_hook(note("backward")),
    "state-dict hook": lambda layer: layer._register_state_dict_hook(note("state")),
    "state-dict pre-hook": lambda layer: layer.register_state_dict_pre_hook(note("state pre")),
    "load pre-hook": lambda layer: layer.register_load_state_dict_pre_hook(note("load pre")),
    "load post-hook": lambda layer: layer.register_load_state_dict_post_hook(note("load post")),
    "gradient mask": lambda layer: layer.weight.register_hook(lambda grad: CALLS.append("gradient")),
    "accumulated": lambda layer: layer.weight.register_post_accumulate_grad_hook(note("accumulated")),
    "node": accumulated,
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "orthogonal": orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "patched": patched,
    "grown": grown,
    "frozen": lambda layer: layer.requires_grad_(False),
    "weight frozen": lambda layer: layer.weight.requires_grad_(False),
    "marked": lambda layer: setattr(layer.weight, "no_decay", True),
}

convolutions = st.fixed_dictionaries(
    {
        "cls": st.sampled_from([nn.Conv2d, nn.Conv2d, nn.Conv2d, Named, Doubled, Centred, nn.ConvTranspose2d]),
        "kernel_size": st.sampled_from([1, 2, 3, 4, (1, 3), (3, 2), 5]),
        "padding": st.sampled_from([0, 1, 2, (0, 1), "same", "valid"]),
        "stride": st.sampled_from([1, 1, 2, (1, 2)]),
        "dilation": st.sampled_from([1, 1, 2]),
        "groups": st.sampled_from([1, 1, 2, 4]),
        "padding_mode": st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]),
        "bias": st.booleans(),
        "change": st.sampled_from(["nothing"] * 12 + list(CHANGES)),
    }
)


def conv(cls, change, **arguments) -> nn.Module | None:
    try:
        if cls is nn.ConvTranspose2d:
            arguments.pop("padding_mode")
        layer = cls(4, 4, **arguments)
        CHANGES[change](layer)
    except (ValueError, TypeError, RuntimeError):
        return None
    return layer


class Chain(nn.Module):
    """Layers one after the other; ``twice`` runs the first one again, ``tied`` are weights in two layers."""

    def __init__(self, layers: list[nn.Module], twice: bool, tied: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if twice:
            self.layers.append(self.layers[0])
        last = self.layers[-1]
        if tied and last is not layers[0] and getattr(last, "weight", last).shape == layers[0].weight.shape:
            if tied == "parameter" and "weight" in last._parameters and "weight" in layers[0]._parameters:
                last.weight = layers[0].weight
            elif tied == "memory" and "weight" in last._parameters:
                last.weight = nn.Parameter(layers[0].weight.data)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@st.composite
def chains(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    layers = [conv(**draw(convolutions)) for _ in range(draw(st.integers(1, 3)))]
    layers = [layer for layer in layers if layer is not None] or [nn.Conv2d(4, 4, 3, padding=1)]
    return Chain(layers, draw(st.booleans()), draw(st.sampled_from(["", "", "parameter", "memory"])))


RULES = [
    "{self}",
    "window(5, stride={stride}, dilation={dilation}) | box | kernel",
    "window(5, stride={stride}, dilation={dilation}, padding={padding}) | box | kernel",
    "({self}) + new*(nearest(4, cosine, self, stride={stride}) | ranked | kernel)",
    "deformable(3, stride={stride}) | box | modulated*kernel",
    "nearest(9, blend(0), padding=1, stride={stride}) | box | kernel",
    "nearest(9, cosine, self) | ranked | kernel",
    "branch(0, nearest(4, cosine, self, stride={stride}) | ranked | kernel, {self}, mix)",
]

# --- the oracle


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chains(), st.sampled_from(RULES), st.booleans(), st.booleans())
def test_exact_means_exact(model, rule, sized, train):
    model.train(train)
    shared = len({p.data_ptr() for p in model.parameters()})
    try:
        old = copy.deepcopy(model)
    except RuntimeError:  # the old weight_norm cannot be copied
        assume(False)
    before, layers = state(model), list(model.layers)
    marks = [hasattr(p, "no_decay") for p in model.parameters()]
    grid = (9, 8) if sized else None
    try:
        report = convert(model, Rule(rule, kind="conv"), input_size=grid and (4, *grid))
    except ValueError:
        assert state(model)[:3] == before[:3]
        return
    assert f"-> {size(model):,}" in str(report) and all(m.training == train for m in model.modules())
    replaced = {int(row.name.removeprefix("layers.")) for row in report.replaced}
    assert [a is b for a, b in zip(layers, model.layers, strict=True)] == [
        layers.index(layer) not in replaced for layer in layers
    ]
    if report.exact:
        for shape in ((2, 4, 8, 9), (1, 4, 3, 3), (3, 4, 1, 1), (1, 4, 2, 5), (2, 4, 16, 7), (4, 6, 5)):
            require_same(old, model, torch.randn(shape))
        if rule == "{self}":
            assert (size(model), size(model, True)) == (size(old), size(old, True))
            assert len({p.data_ptr() for p in model.parameters()}) == shared
            assert marks == [hasattr(p, "no_decay") for p in model.parameters()]
    x = torch.randn(2, 4, 8, 9)
    ran = outcome(model, x, train=True)
    report.undo()
    undone = state(model.train(train))[0]
    assert undone == before[0]
    wanted = outcome(model, x, train=True)  # a copy does not have the hooks on weights
    assert not report.exact or (ran and ran[2]) == (wanted and wanted[2])


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in ("nothing", "frozen", "weight frozen", "marked")])
def test_what_would_be_lost_is_refused_and_named(change):
    layer = nn.Conv2d(4, 4, 3, padding=1)
    CHANGES[change](layer)
    model = nn.Sequential(layer, nn.Conv2d(4, 4, 3, padding=1))
    report = convert(model, Rule("{self}"))
    assert [row.status for row in report.rows] == ["refused", "replaced"]
    reason = report.rows[0].reason
    assert model[0] is layer and ("lost" in reason or "of its own" in reason), reason


# --- attention


class Attends(nn.Module):
    def __init__(self, width: int, **arguments) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, **arguments)

    def forward(self, x, memory, padding, hidden, weights):
        made, alpha = self.attn(x, memory, memory, key_padding_mask=padding, attn_mask=hidden, need_weights=weights)
        return torch.cat([made.flatten(), alpha.flatten()]) if alpha is not None else made.flatten()


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    arguments=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "batch_first": st.booleans(),
            "dropout": st.sampled_from([0.0, 0.0, 0.3]),
            "add_bias_kv": st.sampled_from([False, False, False, True]),
            "add_zero_attn": st.sampled_from([False, False, False, True]),
            "kdim": st.sampled_from([None, None, None, 4]),
        }
    ),
    rule=st.sampled_from(["{self}", "({self}) + new*(nearest(2, cosine) | ranked | softmax(heads=2))",
                          "nearest(64, scaled) | ranked | softmax(heads={heads})"]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_multihead_attention_on_every_call(arguments, rule, seed):
    torch.manual_seed(seed)
    width = 6
    model = Attends(width, **arguments, vdim=arguments["kdim"])
    old = copy.deepcopy(model)
    model.attn.in_proj_bias is None or model.attn.in_proj_bias.data.normal_()
    old.load_state_dict(model.state_dict())
    report = convert(model, Rule(rule, kind="attention"))
    assert report.replaced or report.rows[0].status == "refused"
    if not (report.replaced and report.exact):
        return
    for queries, keys in ((5, 5), (3, 7), (1, 1)):
        x, memory = torch.randn(2, queries, width), torch.randn(2, keys, arguments["kdim"] or width)
        padding, hidden = torch.zeros(2, keys, dtype=torch.bool), torch.zeros(queries, keys, dtype=torch.bool)
        padding[1, keys // 2 + 1 :], hidden[:, keys // 2 + 1 :] = True, True
        if not arguments["batch_first"]:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        for masks in ((None, None), (padding, None), (None, hidden), (padding, hidden)):
            for weights in (False, True) if masks == (None, None) or masks == (padding, hidden) else (False,):
                call = lambda m, masks=masks, weights=weights: _Bound(m, *masks, weights)  # noqa: E731
                assert require_same(call(old), call(model), x, memory)
                if queries == keys:
                    assert require_same(call(old), call(model), x)


class _Bound(nn.Module):
    """Attention with its masks: a model of one or two inputs."""

    def __init__(self, model, padding, hidden, weights):
        super().__init__()
        self.model, self.rest = model, (padding, hidden, weights)

    def forward(self, x, memory=None):
        return self.model(x, x if memory is None else memory, *self.rest)


class Encoded(nn.Module):
    def __init__(self, model, **masks):
        super().__init__()
        self.model, self.masks = model, masks

    def forward(self, *inputs):
        return self.model(*inputs, **self.masks)


PADDING = torch.arange(9) >= torch.tensor([[9], [4]])
CAUSAL = torch.ones(9, 9, dtype=torch.bool).triu(1)
TRANSFORMERS = {
    "encoder": (encoder, {}, 1),
    "encoder, padding": (encoder, {"src_key_padding_mask": PADDING}, 1),
    "encoder, causal": (encoder, {"mask": CAUSAL, "is_causal": True}, 1),
    "encoder, norm first": (lambda: encoder(norm_first=True), {"src_key_padding_mask": PADDING}, 1),
    "decoder": (decoder, {}, 2),
    "decoder, masks": (decoder, {"tgt_mask": CAUSAL, "memory_key_padding_mask": PADDING[:, :5]}, 2),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), {"tgt_mask": CAUSAL}, 2),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_torchs_transformers_with_their_masks(case):
    build, masks, inputs = TRANSFORMERS[case]
    torch.manual_seed(0)
    model = build()
    old = copy.deepcopy(model)
    report = convert(model, Rule("{self}", kind="attention"))
    assert report.exact and report.replaced
    given = [torch.randn(2, 9, 8), torch.randn(2, 5, 8)][:inputs]
    if case == "transformer":
        given = given[::-1]
    assert require_same(Encoded(old, **masks), Encoded(model, **masks), *given)
    with torch.no_grad():  # torch's own fused and nested paths
        before, after = (Encoded(m.eval(), **masks)(*given) for m in (old, model))
    assert (after - before).abs().max() <= BOUND


@pytest.mark.parametrize("train", [True, False])
def test_padding_is_left_out_by_operations_of_any_kind(train):
    """A padded sequence is what it is alone, without its padding."""
    torch.manual_seed(0)
    model = encoder(dropout=0.0)
    convert(model, Rule("nearest(2, cosine) | ranked | softmax(heads={heads})", kind="attention"))
    model.train(train)
    x = torch.randn(2, 9, 8)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model(x, src_key_padding_mask=PADDING)
            alone = model(x[1:, :4])
        assert (y[1:, :4] - alone).abs().max() <= BOUND

"""Surgery's two properties over generated modules: all or nothing, and exact means exact.

The oracle is here: a copy of the original and the converted model run on the same inputs.
"""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.nn.utils.parametrizations import orthogonal

from nearfold import Rule, convert
from nearfold.nn import Mixer

BOUND = 1e-11
CALLS: list[str] = []
KEPT: list[object] = []  # nodes live as long as somebody holds them


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(before)


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


def note(name):
    return lambda *args, **kwargs: CALLS.append(name)


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


def state(model: nn.Module):
    """Everything of a model that a conversion could touch."""
    found = []
    for name, module in model.named_modules():
        hooks = {k: [id(h) for h in v.values()] for k, v in vars(module).items() if "hooks" in k and v is not None}
        owned = {n: id(t) for own in (module._parameters, module._buffers) for n, t in own.items()}
        found.append((name, id(module), module.training, owned, hooks, sorted(vars(module))))
    weights = [(n, p.requires_grad, p._version, p.sum().item()) for n, p in model.named_parameters()]
    return found, weights, [(n, b.double().sum().item()) for n, b in model.named_buffers()], torch.get_rng_state().sum()


def outcome(model: nn.Module, *inputs: Tensor, train: bool):
    """Output, gradients of the inputs, and which hooks ran; None where the model does not run."""
    CALLS.clear()
    model.train(train)
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(1)
    try:
        y = model(*given)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    except (RuntimeError, ValueError):
        return None
    return y.detach(), [x.grad for x in given], sorted(CALLS)


def require_same(old: nn.Module, new: nn.Module, *inputs: Tensor) -> bool:
    for train in (False, True):
        wanted = outcome(old, *inputs, train=train)
        if wanted is None:
            return False
        found = outcome(new, *inputs, train=train)
        assert found is not None, "the converted model does not run where the original does"
        assert found[0].shape == wanted[0].shape
        scale = wanted[0].abs().max().clamp(min=1e-30)
        assert (found[0] - wanted[0]).abs().max() <= BOUND * scale
        for mine, theirs in zip(found[1], wanted[1], strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or (mine - theirs).abs().max() <= BOUND * theirs.abs().max().clamp(min=1e-30)
    return True


def size(model: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


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


def encoder(**arguments):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **arguments)
    return nn.TransformerEncoder(layer, 2)


def decoder():
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)


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


# --- all or nothing


class Trips(nn.Module):
    """Raises at its nth call."""

    def __init__(self, nth: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = [nth], error
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.left[0] -= 1
        self.runs += 1
        if self.left[0] == 0:
            raise self.error
        return x


def network(trips: nn.Module) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), trips, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Dropout()
    )
    model[0].weight.requires_grad_(False)
    model[1].register_forward_hook(note("norm"))
    model[3].eval()
    return model


ERRORS = [KeyboardInterrupt, RuntimeError, MemoryError, ValueError, SystemExit]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("nth", range(1, 5))
def test_whatever_is_raised_the_model_is_as_it_was(error, nth):
    model = network(Trips(nth, error("stop")))
    before, runs = state(model), model[2].runs
    try:
        convert(
            model, Rule("({self}) + new*(nearest(4, cosine, stride={stride}) | ranked | kernel)"), input_size=(3, 7, 7)
        )
    except (error, ValueError):
        assert state(model)[:3] == before[:3] and model[2].runs is runs and runs == 0
    else:
        assert nth == 4  # it does not run so often


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["to", "where", "build", "check"])
def test_an_interrupted_rule_or_layer_changes_nothing(error, where, monkeypatch):
    model, count = network(nn.Identity()), [0]
    before = state(model)

    def trip(*args, **kwargs):
        count[0] += 1
        if count[0] == 2:
            raise error("stop")
        return {"to": "{self}", "where": True}.get(where)

    if where in ("build", "check"):
        own = Mixer.__init__ if where == "build" else Mixer.forward
        name = "__init__" if where == "build" else "forward"
        monkeypatch.setattr(Mixer, name, functools.wraps(own)(lambda *a, **k: (trip(), own(*a, **k))[1]))
    rule = Rule(trip if where == "to" else "window(3, padding={padding}) | box | kernel",
                where=trip if where == "where" else None)  # fmt: skip
    try:
        convert(model, rule, input_size=(3, 7, 7))
    except error:
        assert state(model)[:3] == before[:3]
    else:
        assert error in (RuntimeError, ValueError, MemoryError) and where in ("build", "check", "to")


# --- frozen one by one


@pytest.mark.parametrize("keep", ["bias", "weight", "in_proj", "out_proj", ""])
def test_frozen_parameters_stay_frozen_one_by_one(keep):
    model = nn.Sequential(encoder(), nn.Conv1d(9, 9, 3, padding=1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(keep in name if keep else False)
    before = size(model, True)
    report = convert(model, [Rule("{self}", kind="attention"), Rule("window(5) | box | kernel", kind="conv")])
    assert len(report.replaced) == 3 and report.exact
    grown = 9 * 9 * 2 if keep == "weight" else 0  # a larger window has a larger weight
    assert size(model, True) == before + grown


# --- what is said


def test_k_larger_than_the_positions_is_said():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(4), nn.Conv2d(4, 4, 3, padding=1))
    report = convert(model, Rule("({self}) + n*(nearest(9, cosine, self) | ranked | kernel)"), input_size=(4, 8, 8))
    reasons = {row.name: row.reason for row in report.replaced}
    assert "k=9 is more than the 4 positions there are" in reasons["2"] and "k=9" not in reasons["0"]
    assert report.exact and "k=9 is more" in str(report)


class HomeMadeAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ x


def test_a_rule_that_matches_nothing_names_the_attention_there_is():
    model = nn.Sequential(HomeMadeAttention(), HomeMadeAttention())
    with pytest.raises(ValueError, match=r"there is 0, 1 \(HomeMadeAttention: called attention, and no rule for"):
        convert(model, Rule("{self}", kind="attention"))
    both = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Conv2d(4, 4, 3)})
    with pytest.raises(ValueError, match=r"there is a \(MultiheadAttention: its name is another\)"):
        convert(both, Rule("{self}", kind="attention", name="encoder*"))


def test_inputs_of_any_kind_are_compared():
    torch.manual_seed(0)
    model = decoder().eval()
    x, memory = torch.randn(2, 7, 8), torch.randn(2, 5, 8)
    rule = Rule("nearest(7, scaled) | ranked | softmax(heads={heads})", name="*self_attn")
    report = convert(model, rule, inputs={"tgt": x, "memory": memory})
    assert report.difference_seen is not None and report.difference_seen < 1e-12
    assert report.replaced[0].flops_after is not None
    with pytest.raises(ValueError, match="input_size and inputs were both given"):
        convert(model, rule, inputs=(x, memory), input_size=(7, 8))
    with pytest.raises(ValueError, match="inputs must be a tensor, a tuple of arguments or a dict, got str"):
        convert(model, rule, inputs="x")


class Reads(nn.Module):
    """Uses its layer in other ways than by calling it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3, padding=1), how
        self.plain = [self.conv] if how == "list" else None
        self.bound = self.conv.forward if how == "bound" else None

    def forward(self, x):
        if self.how == "functional":
            return nn.functional.conv2d(x, self.conv.weight, padding=self.conv.padding)
        return self.plain[0](x) if self.plain else self.bound(x) if self.bound else self.conv(x)


@pytest.mark.parametrize("how", ["list", "bound", "functional", "called"])
def test_a_layer_that_is_used_in_other_ways(how):
    model = Reads(how)
    old = copy.deepcopy(model)
    before = state(model)
    rule = Rule("({self}) + n*(nearest(4, cosine) | ranked | kernel)")
    try:
        report = convert(model, rule, input_size=(3, 8, 8))
    except ValueError as error:
        assert how == "functional" and "does not run with the new layers" in str(error)
        assert state(model)[:3] == before[:3]
        return
    assert bool(report.replaced) == (how == "called")
    assert require_same(old, model, torch.randn(2, 3, 6, 5))

"""Attention that is read by its members is believed only where it computes what the words say; masks; scans."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfold import Rule, convert, describe, parse
from nearfold._torchvision import load
from nearfold.lower.plan import apply
from nearfold.nn.mixer import TokenMixer
from nearfold.recognise.attention import attention_of, why_not
from nearfold.surgery.masks import readable

load("torchvision")  # before transformers and timm, which import it


class Plain(nn.Module):
    """Self-attention as many write it; subclasses break one thing each."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * q.shape[-1] ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj((self.scores(q, k).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Capped(Plain):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return 50 * torch.tanh(super().scores(q, k) / 50)


class Unscaled(Plain):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT


class Sigmoid(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sigmoid()


class Channels(Plain):
    """Attention of channels to channels."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x).mT, self.k_proj(x).mT, self.v_proj(x).mT
        return self.out_proj((self.scores(q, k).softmax(-1) @ v).mT)


class Normalised(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(4), nn.LayerNorm(4)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.q_norm(q), self.k_norm(k))


class Scaling(Plain):
    """What starts without an effect: a bias on the scores that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(4, 1, 1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) * (1 + self.gain)


class Given(Plain):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Low(nn.Linear):
    """A map with a low-rank addition, as LoRA makes them."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        self.a, self.b = nn.Parameter(torch.randn(2, like.in_features)), nn.Parameter(torch.randn(like.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


def with_low_rank() -> nn.Module:
    layer = Plain()
    layer.v_proj = Low(layer.v_proj)
    return layer


def test_members_and_a_run_make_an_attention():
    layer = Plain().half()
    assert str(attention_of(layer).operation) == "all | row | softmax(heads=4)"
    assert why_not(layer) is None and why_not(nn.GELU()) is None
    with torch.device("meta"):
        assert str(attention_of(Plain(32, 2)).operation) == "all | row | softmax(heads=2)"


@pytest.mark.parametrize(("make", "why"), [
    (Capped, "checked on a random input, it is not all"),
    (Unscaled, "checked on a random input, it is not all"),
    (Sigmoid, "checked on a random input, it is not all"),
    (Channels, "checked on a random input, it is not all"),
    (Normalised, r"no word for its k_norm \(LayerNorm\), q_norm \(LayerNorm\)"),
    (Scaling, "no word for its gain"),
    (Given, "no word for what its caller gives as bias"),
    (with_low_rank, "its v_proj is a Low that computes something of its own"),
    (lambda: Plain(16, 5), "does not tell how many heads"),
])  # fmt: skip
def test_what_computes_something_else_is_not_said_and_not_replaced(make, why):
    class Attention(nn.Module):  # a network around it, so that it has a name
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = make(), Plain(16, 2)

    model = Attention()
    found = describe(model)
    assert [row.name for row in found.rows] == ["other"]
    with pytest.raises(ValueError, match=why):
        attention_of(model.layer)
    old = model.layer
    report = convert(model, Rule("{self}", kind="attention"))
    assert [row.name for row in report.replaced] == ["other"] and model.layer is old


def test_a_check_leaves_the_layer_alone():
    layer, calls = Plain(), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.q_proj.register_forward_hook(lambda *_: calls.append(1))
    before, state = {n: t.clone() for n, t in layer.state_dict().items()}, torch.get_rng_state()
    layer.train()
    assert attention_of(layer) and layer.training and not calls
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


# --- masks: a slot that one forbids is not valid


@pytest.mark.parametrize("text", [
    "all | row | softmax(heads=2)", "all | causal | softmax(heads=2)", "all(scaled(rotary)) | row | softmax(heads=2)",
    "nearest(3, scaled) | ranked | softmax(heads=2)", "nearest(3, cosine) | causal | softmax*depthwise",
    "all(elu) | row | normalized(heads=2)",
])  # fmt: skip
def test_masked_keys_are_as_if_they_were_not_there(text):
    torch.manual_seed(0)
    layer, x = TokenMixer(text, 8).double(), torch.randn(3, 7, 8, dtype=torch.double)
    mask = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    mask[0, :, :, 4:] = False
    mask[1, :, 2] = False
    masked, whole = layer(x, mask=mask), layer(x)
    assert torch.allclose(masked[0, :4], layer(x[:1, :4])[0], atol=1e-12)
    assert torch.allclose(masked[2], whole[2], atol=1e-12) and not torch.allclose(masked[0], whole[0], atol=1e-3)
    layer.backend = "oracle"
    assert torch.allclose(layer(x, mask=mask), masked, atol=1e-12)
    nothing = layer(x[1:2], mask=torch.zeros_like(mask[:1]))[0]
    assert torch.allclose(masked[1, 2], nothing[2], atol=1e-12) and torch.allclose(nothing, nothing[:1], atol=1e-12)


@pytest.mark.parametrize(("text", "mask", "why"), [
    ("pooled(2) | causal | softmax", (1, 1, 5, 5), "a mask of pairs goes with the paths all, nearest"),
    ("nearest(3, scaled, self) | ranked | softmax", (1, 1, 5, 5), "a mask of pairs goes with the paths all, nearest"),
    ("all | row | softmax", (1, 1, 5, 4), r"mask must be bool of shape \(batch or 1, heads or 1, 5, 5\)"),
    ("all | row | softmax", (5, 5), "mask of the keys must be bool of shape"),
])  # fmt: skip
def test_masks_that_do_not_fit_are_refused(text, mask, why):
    with pytest.raises(ValueError, match=why):
        TokenMixer(text, 8)(torch.randn(2, 5, 8), mask=torch.ones(mask, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend='knn' knows no mask of pairs"):
        layer = TokenMixer("nearest(3, scaled) | ranked | softmax", 8, backend="knn")
        layer(torch.randn(2, 5, 8), mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


def test_masks_of_other_libraries():
    keys = torch.tensor([[1, 1, 0], [1, 1, 1]])
    added = torch.zeros(2, 1, 1, 3).masked_fill(keys[:, None, None] == 0, torch.finfo(torch.float32).min)
    for mask in (keys[:, None, None].bool(), added):
        assert torch.equal(readable(mask, 2, 4, 3), keys[:, None, None].bool().expand(2, 1, 4, 3))
    with pytest.raises(ValueError, match="must be a tensor"):
        readable([[1]], 1, 1, 1)
    with pytest.raises(ValueError, match="cannot have the shape"):
        readable(torch.ones(2, 1, 4, 5, dtype=torch.bool), 2, 4, 3)


@pytest.mark.parametrize("base", [100, 500000.0, 1e6])
def test_rotary_positions_have_a_base(base):
    op = parse(f"all(scaled(rotary={base})) | row | softmax(project=none)")
    assert parse(str(op)) == op and op != parse("all(scaled(rotary)) | row | softmax(project=none)")
    x = torch.randn(1, 8, 5, dtype=torch.double)
    angle = torch.arange(5)[:, None] * float(base) ** (-torch.arange(4, dtype=torch.double) / 4)
    turn = torch.polar(torch.ones_like(angle), angle)
    q = torch.view_as_real(torch.complex(*x[0].T.unflatten(1, (2, 4)).unbind(1)) * turn).flatten(1)
    want = F.softmax(q @ q.T / 8**0.5, -1) @ x[0].T
    assert torch.allclose(apply(op, {}, x)[0].T, want, atol=1e-12)
    with pytest.raises(ValueError, match="rotary must be a flag, or the base of its frequencies, above 1"):
        parse("all(scaled(rotary=1)) | row | softmax")


# --- timm


def timm_layer(name: str, *args: object, **kwargs: object) -> nn.Module:
    pytest.importorskip("timm")
    module, _, cls = name.rpartition(".")
    torch.manual_seed(0)
    layer: nn.Module = getattr(load(f"timm.{module}"), cls)(*args, **kwargs)
    layer.eval()
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.3)
    return layer


def test_timm_attention_takes_masks():
    model = nn.ModuleDict({"attn": timm_layer("layers.Attention", 16, 4, qkv_bias=True)})
    x, mask = torch.randn(2, 7, 16), torch.ones(7, 7).tril().bool()
    ways = [{}, {"attn_mask": mask}, {"is_causal": True}]
    before = [model["attn"](x, **way) for way in ways]
    (row,) = convert(model, Rule("{self}", kind="attention")).replaced
    assert row.grade == "exact"
    assert all((model["attn"](x, **way) - y).abs().max() < 1e-5 for way, y in zip(ways, before, strict=True))


@pytest.mark.parametrize(("name", "args", "why"), [
    ("layers.AttentionRope", {"num_heads": 4}, "rotary positions of an image"),
    ("models.eva.EvaAttention", {"num_heads": 4, "norm_layer": nn.LayerNorm}, "rotary positions of an image"),
    ("models.beit.Attention", {"num_heads": 4, "window_size": (2, 3)}, "entries of its own for the class token"),
    ("models.swin_transformer_v2.WindowAttention", {"num_heads": 4, "window_size": (4, 4)}, "its cpb_mlp.0"),
    ("models.pvt_v2.Attention", {"num_heads": 4, "sr_ratio": 2}, "no word for its norm (LayerNorm), sr (Conv2d)"),
    ("models.davit.ChannelAttention", {"num_heads": 4}, "it is not all"),
    ("models.cait.TalkingHeadAttn", {"num_heads": 4}, "no word for its proj_l"),
    ("models.vision_transformer_sam.Attention", {"use_rel_pos": True, "input_size": (3, 3)}, "rel_pos_h"),
    ("models.levit.Attention", {"key_dim": 4, "num_heads": 4}, ""),
])  # fmt: skip
def test_timm_attention_that_has_no_words(name, args, why):
    layer = timm_layer(name, 16, **args)
    assert why in (why_not(layer) or "")
    found = describe(nn.ModuleDict({"attn": layer}))
    assert found.unknown and not any("softmax" in row.notation for row in found.rows)


def test_timm_attention_with_whole_keys_is_replaced():
    model = nn.ModuleDict({"attn": timm_layer("models.pvt_v2.Attention", 16, num_heads=4)})
    x = torch.randn(2, 6, 16)
    before = model["attn"](x, [2, 3])
    assert len(convert(model, Rule("{self}", kind="attention")).replaced) == 1
    assert (model["attn"](x, [2, 3]) - before).abs().max() < 1e-5


# --- state spaces

SCANS = [
    ("Mamba", {"state_size": 4}, "selective(rank=2)"),
    ("Mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}, "selective(heads=8)"),
    ("FalconMamba", {"state_size": 4}, "selective(rank=2)"),
]


def scanner(name: str, sizes: dict[str, object]) -> nn.Module:
    tf = pytest.importorskip("transformers")
    config = getattr(tf, f"{name}Config")(hidden_size=32, num_hidden_layers=1, vocab_size=50, **sizes)
    return getattr(tf, f"{name}Model")(config)


@pytest.mark.parametrize(("name", "sizes", "weight"), SCANS)
def test_the_sentence_of_a_state_space(name, sizes, weight):
    """Path recurrence, Shape causal, Weight selective."""
    model = scanner(name, sizes)
    rows = {row.name: row for row in describe(model).rows}
    assert rows["layers.0.mixer"].words == (f"scan(state={sizes['state_size']})", "causal", weight)
    assert rows["layers.0.mixer.conv1d"].notation == "window(4) | causal | depthwise"
    mixer = model.layers[0].mixer
    own = rows["layers.0.mixer"].parameters + rows["layers.0.mixer.conv1d"].parameters
    around = sum(p.numel() for part in (mixer.in_proj, mixer.out_proj) for p in part.parameters())
    assert own + around == sum(p.numel() for p in mixer.parameters())


@pytest.mark.parametrize("kind", ["conv", None])
def test_a_state_space_is_kept_whole(kind):
    """Its convolution is read by the layer around it, and cannot be replaced on its own."""
    model = scanner("Mamba", {"state_size": 4})
    with pytest.raises(ValueError, match="no layer matches"):
        convert(model, Rule("window(5) | causal | depthwise", kind=kind, name="layers.*"))
    assert type(model.layers[0].mixer.conv1d) is nn.Conv1d and model(torch.randint(3, 50, (2, 5)))[0].isfinite().all()


def test_another_recurrence_is_not_said():
    model = scanner("Mamba", {"state_size": 4})
    cls = type(model.layers[0].mixer)

    class Doubled(cls):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
            return 2 * super().forward(hidden_states, *args, **kwargs)

    model.layers[0].mixer.__class__ = Doubled
    unknown = {s.name: s.reason for s in describe(model).unknown}
    assert "they differ by" in unknown["layers.0.mixer"]

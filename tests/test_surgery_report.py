"""What surgery says: frozen parameters, too large a k, rules that match nothing, and layers used in other ways."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.same_models import decoder, encoder, require_same, size, state
from torch import nn

from nearfold import Rule, convert
from nearfold._torchvision import load

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore")]


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


@pytest.mark.parametrize("fused", [True, False], ids=["nn.MultiheadAttention", "timm"])
def test_flops_of_fused_attention_are_counted(fused):
    """Before and after are one operation, so they cost the same: projections, scores and sums."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            if fused:
                self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
            else:
                self.attn = load("timm.layers").Attention(16, 4)

        def forward(self, x):
            tokens = x.flatten(2).mT
            y = self.attn(tokens, tokens, tokens, need_weights=False)[0] if fused else self.attn(tokens)
            return y.mT.reshape(x.shape)

    rule = Rule("nearest(36, scaled) | ranked | softmax(heads={heads})", kind="attention")
    (row,) = convert(Net().eval(), rule, input_size=(16, 6, 6)).replaced
    assert row.flops == row.flops_after == 2 * 4 * 36 * 16 * 16 + 2 * 2 * 36 * 36 * 16

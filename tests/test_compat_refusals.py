"""What the public code gets wrong, and configurations and states that do not fit, are refused with the reason."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.public_configs import (
    acmix_config,
    acmix_state,
    attention_config,
    attention_state,
    convnn_config,
    convnn_state,
)

from nearfold.compat import UnsupportedReference, from_reference

pytestmark = pytest.mark.usefixtures("seeded")

ATTN = {"d_hidden": 12, "num_heads": 3}
REFUSED = [
    (
        "Conv2d_NN",
        convnn_config(sampling_type="random", num_samples=8),
        "draws new candidates in evaluation too",
    ),
    ("Conv1d_NN", convnn_config(sampling_type="random", num_samples=8), "candidates='random(8)'"),
    (
        "Conv2d_NN",
        convnn_config(sampling_type="spatial", num_samples=3, padding=1),
        "sampling_type='spatial' with padding=1",
    ),
    (
        "Conv2d_NN",
        convnn_config(similarity_type="Loc", sampling_type="spatial"),
        "equally far from others in space",
    ),
    (
        "Conv2d_NN",
        convnn_config(similarity_type="Loc_Col", lambda_param=0),
        "lambda_param=0 compares positions only",
    ),
    ("Conv2d_NN", convnn_config(in_channels=1), "the cosine of one channel is 1 or -1"),
    (
        "Conv2d_NN",
        convnn_config(magnitude_type="euclidean", padding=1, aggregation_type="Loc_Col"),
        "border positions are equally far",
    ),
    (
        "Conv2d_Branching",
        convnn_config(kernel_size=3, shuffle_pattern="BA"),
        "shuffle_pattern='BA' inside a branch",
    ),
    ("Conv2d_NN_Attn", convnn_config(sampling_type="spatial"), "softmaxes over tokens instead of neighbours"),
    (
        "Conv2d_NN_Attn",
        convnn_config(aggregation_type="Loc_Col"),
        "projects the coordinates with the features",
    ),
    ("Conv2d_NN_Attn", convnn_config(shuffle_pattern="B"), "shuffle_pattern='B' is not converted"),
    ("Conv2d_NN_Attn", convnn_config(attention_dropout=0.1), "attention_dropout=0.1 has no counterpart"),
    ("MultiHeadAttention", {**ATTN, "attention_dropout": 0.1}, "attention_dropout=0.1 has no counterpart"),
    ("MultiHeadKvtAttention", {"dim": 12, "num_heads": 3, "attn_drop": 0.1}, "dropout has no counterpart"),
    (
        "MultiHeadSparseAttention",
        {**ATTN, "attention_dropout": 0.2, "attn_mode": "all"},
        "attention_dropout=0.2",
    ),
    ("MultiHeadConvNNAttention", attention_config(sampling_type="random", num_samples=8), "evaluation too"),
    (
        "MultiHeadConvNNAttention",
        attention_config(coordinate_encoding=True),
        "cannot be built in the public code",
    ),
    (
        "MultiHeadBranchingAttention",
        attention_config(num_heads=1, branch_ratio=0),
        "the branch that was not built",
    ),
    (
        "MultiHeadBranchingAttention",
        attention_config(num_heads=1, branch_ratio=1),
        "the branch that was not built",
    ),
    ("MultiHeadBranchingAttention", attention_config(num_heads=2), "only num_heads=1 is converted"),
    ("ACmix", acmix_config(dilation=2), "fails with dilation=2; nearfold.nn.ACmix2d supports it"),
    ("ACmix", acmix_config(kernel_conv=5), "fails with kernel_conv=5; nearfold.nn.ACmix2d supports it"),
    ("ACmix", acmix_config(kernel_att=4), "fails with an even kernel_att=4"),
]


@pytest.mark.parametrize(("layer", "config", "reason"), REFUSED, ids=[f"{n}-{r[:30]}" for n, _, r in REFUSED])
def test_faults_of_the_public_code_are_refused_with_the_reason(layer, config, reason):
    with pytest.raises(UnsupportedReference, match=re.escape(reason)) as caught:
        from_reference(layer, config, {})
    assert layer in str(caught.value)


SPATIAL = {"sampling_type": "spatial", "num_samples": 3}
REFUSED_INPUTS = [
    ("Conv2d_NN", convnn_config(**SPATIAL), convnn_state(), (5, 6), "a 5 x 6 map exchanges rows and columns"),
    (
        "Conv2d_NN",
        convnn_config(**SPATIAL | {"num_samples": 6, "sample_padding": 1}),
        convnn_state(),
        (7, 7),
        "repeats",
    ),
    ("Conv1d_NN", convnn_config(**SPATIAL | {"num_samples": 9}), convnn_state(), (7,), "num_samples=9"),
    ("ACmix", acmix_config(stride=2), acmix_state(), (5, 6), "fails on (5, 6) with stride=2"),
]


@pytest.mark.parametrize(("layer", "config", "state", "grid", "reason"), REFUSED_INPUTS)
def test_inputs_that_the_public_code_gets_wrong_are_refused(layer, config, state, grid, reason):
    built = from_reference(layer, config, state)
    with pytest.raises(UnsupportedReference, match=re.escape(reason)):
        built(torch.randn(1, 4, *grid))
    fine = [8 for _ in grid]
    if layer != "Conv1d_NN":
        assert built(torch.randn(1, 4, *fine)).shape[0] == 1


def test_more_samples_than_tokens_are_refused():
    state = attention_state() | {"conv.weight": torch.randn(4, 1, 4)}
    layer = from_reference("MultiHeadConvNNAttention", attention_config(**SPATIAL | {"num_samples": 8}), state)
    with pytest.raises(UnsupportedReference, match="num_samples=8 repeats candidates among 6 tokens"):
        layer(torch.randn(1, 6, 12))
    assert layer(torch.randn(1, 9, 12)).shape == (1, 9, 12)


ACMIX_STATE = acmix_state()
WRONG = [
    ("Conv3d_NN", {}, {}, "layer='Conv3d_NN' is not known; choose from: Conv1d_NN, Conv2d_NN"),
    ("Conv2d_NN", {}, {}, "config of Conv2d_NN lacks 'K'"),
    (
        "Conv2d_NN",
        convnn_config(stride=1),
        convnn_state(),
        "K and stride must be equal, got K=5 and stride=1",
    ),
    (
        "Conv2d_NN",
        convnn_config(magnitude_type="dot"),
        convnn_state(),
        "magnitude_type='dot' is not one of: cosine, euclidean",
    ),
    (
        "Conv2d_NN",
        convnn_config(similarity_type="C"),
        convnn_state(),
        "similarity_type='C' is not one of: Col, Loc, Loc_Col",
    ),
    ("Conv2d_NN", convnn_config(shuffle_pattern="AB"), convnn_state(), "shuffle_pattern='AB' is not one of"),
    ("Conv2d_NN", convnn_config(), {}, "weight: expected (6, 4, 5), got None"),
    ("Conv2d_NN", convnn_config(), convnn_state(k=9), "weight: expected (6, 4, 5), got (6, 4, 9)"),
    ("Conv2d_NN", convnn_config(out_channels=8), convnn_state(), "weight: expected (8, 4, 5), got (6, 4, 5)"),
    ("Conv2d_NN", convnn_config(), {**convnn_state(), "w_q.weight": torch.ones(4, 4)}, "w_q.weight"),
    ("MultiHeadAttention", {**ATTN, "num_heads": 5}, attention_state(), "heads=5 must divide the 12"),
    (
        "MultiHeadAttention",
        ATTN,
        {"W_q.weight": torch.ones(12, 12)},
        "state of MultiHeadAttention lacks 'W_k.weight'",
    ),
    ("MultiHeadAttention", ATTN, {}, "state of MultiHeadAttention lacks 'W_q.weight'"),
    ("MultiHeadAttention", ATTN, attention_state(16), "query_weight: expected (12, 12), got (16, 16)"),
    (
        "MultiHeadSparseAttention",
        {**ATTN, "attn_mode": "some"},
        {},
        "attn_mode='some' is not one of: all, local, strided",
    ),
    (
        "MultiHeadConvNNAttention",
        attention_config(magnitude_type="l1"),
        {},
        "magnitude_type='l1' is not one of: matmul",
    ),
    (
        "MultiHeadConvNNAttention",
        attention_config(convolution_type="x"),
        {},
        "convolution_type='x' is not one of",
    ),
    (
        "ACmix",
        acmix_config(),
        {n: p for n, p in ACMIX_STATE.items() if n != "fc.weight"},
        "state of ACmix lacks 'fc.weight'",
    ),
    ("ACmix", acmix_config(head=4), ACMIX_STATE, "0.position_weight: expected (2, 2), got (4, 2)"),
]


@pytest.mark.parametrize(("layer", "config", "state", "message"), WRONG, ids=[f"{w[0]}-{w[3][:30]}" for w in WRONG])
def test_wrong_configurations_and_states(layer, config, state, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        from_reference(layer, config, state)
    assert not isinstance(caught.value, UnsupportedReference)

"""Configurations and states of the public code's layers."""

from __future__ import annotations

import math

import torch


def convnn_config(**changes) -> dict:
    return {
        "in_channels": 4,
        "out_channels": 6,
        "K": 5,
        "stride": 5,
        "padding": 0,
        "sampling_type": "all",
        "num_samples": -1,
        "sample_padding": 0,
        "shuffle_pattern": "NA",
        "shuffle_scale": 1,
        "magnitude_type": "cosine",
        "similarity_type": "Col",
        "aggregation_type": "Col",
        "lambda_param": 0.5,
        **changes,
    }


def convnn_state(channels: int = 4, k: int = 5) -> dict:
    return {"conv1d_layer.weight": torch.randn(6, channels, k), "conv1d_layer.bias": torch.randn(6)}


def attention_config(**changes) -> dict:
    return {
        "d_hidden": 12,
        "num_heads": 3,
        "attention_dropout": 0.0,
        "K": 4,
        "sampling_type": "all",
        "num_samples": -1,
        "sample_padding": 0,
        "magnitude_type": "matmul",
        "seq_length": 9,
        "coordinate_encoding": False,
        "convolution_type": "depthwise",
        "softmax_topk_val": True,
        **changes,
    }


def attention_state(dim: int = 12, biases: bool = False) -> dict:
    state = {f"W_{c}.weight": torch.randn(dim, dim) / math.sqrt(dim) for c in "qkvo"}
    return state | ({f"W_{c}.bias": torch.randn(dim) for c in "qkvo"} if biases else {})


def acmix_config(**changes) -> dict:
    return {
        "in_planes": 4,
        "out_planes": 8,
        "kernel_att": 3,
        "head": 2,
        "kernel_conv": 3,
        "stride": 1,
        "dilation": 1,
    } | changes


def acmix_state(k: int = 3) -> dict:
    return {
        "rate1": torch.ones(1),
        "rate2": torch.ones(1),
        **{f"conv{i}.weight": torch.randn(8, 4, 1, 1) for i in (1, 2, 3)},
        **{f"conv{i}.bias": torch.randn(8) for i in (1, 2, 3)},
        "conv_p.weight": torch.randn(4, 2, 1, 1),
        "conv_p.bias": torch.randn(4),
        "fc.weight": torch.randn(k * k, 6, 1, 1),
        "dep_conv.weight": torch.randn(8, k * k, k, k),
    }

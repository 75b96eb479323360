"""Paths whose slots' positions are whole and follow from the grid alone: a table of integers, for every backend.

Shape legend: M outputs, S slots, H heads, o outputs of an axis, s slots of an axis, a grid axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nearfold._numbers import shown
from nearfold.grammar import Basic
from nearfold.grammar.word import as_tuple
from nearfold.grammar.words import Path
from nearfold.lower.bias import alibi, score_bias
from nearfold.lower.call import Call, count_positions
from nearfold.lower.meaning import Lengths, PathMeaning, meaning
from nearfold.lower.parameters import bias_reach
from nearfold.lower.selection import Selection, added, masked_pairs, metric_scores, readable

Reads = Callable[[Any, tuple[int, ...], torch.device], tuple[Tensor, Tensor]]
"""(path, grid, device) -> positions (N, S), int64, and which slots are valid (N, S), bool."""


def is_table(path: Path) -> bool:
    """Whether the positions of a path's slots are whole and known from the grid alone."""
    return meaning(path).is_table(path)


def owns_slots(op: Basic) -> bool:
    """Whether parameters hold a number for each slot: on the map such a slot costs as much as its numbers do."""
    return op.weight.kernel is not None or meaning(op.weight.rho).per_slot


def axis_reads(op: Basic, grid: Lengths, axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis: positions read (o, s), which of them are valid (o, s), and the queries' own positions (o,)."""
    path = meaning(op.path)
    assert isinstance(path, AxesMeaning)
    return path.axis(op, grid, axis, device)


def window_index(op: Basic, grid: Lengths, device: torch.device, missing: int = 0) -> tuple[Tensor, Tensor]:
    """Raster positions (M, S) that the slots read, ``missing`` where they read none, and which read one."""
    return meaning(op.path).index(op, grid, device, missing)


def home_index(op: Basic, grid: Lengths, device: torch.device) -> Tensor:
    """Raster positions (M,) of the queries."""
    return meaning(op.path).home(op, grid, device)


class TableMeaning(PathMeaning):
    """A path that is a table."""

    table = True

    def takes_mask(self, op: Basic) -> bool:
        # every output has a query of its own, which is one of the map's positions
        return not getattr(op.path, "padded", False) and getattr(op.path, "padding", "same") == "same"

    def select(self, call: Call) -> Selection:
        flat_MS, valid_MS = self.places(call)
        home_M = self.home(call.op, call.grid, call.value.device)
        valid = valid_MS[None, None]
        if call.mask is not None:
            valid = valid & readable(masked_pairs(call.mask, home_M, None, flat_MS))
        score = None
        if call.op.weight.rho.needs_score:
            q, k = call.embedded()
            q_M = q[:, :, home_M]
            k_MS = k[:, :, flat_MS]
            score = metric_scores(call.similarity.reduced, call.similarity.squared, q_M[..., None, :], k_MS).squeeze(-2)
            bias = score_bias(call.op, call.params, call.grid, flat_MS, score)
            score = score if bias is None else score + bias
            plus = added(call, home_M, None, flat_MS)
            score = (score if plus is None else score + plus).masked_fill(~valid, float("-inf"))
        index = flat_MS[None, None].expand_as(valid).masked_fill(~valid, 0)
        return Selection(index, valid, score, count_positions(call.padded))

    def places(self, call: Call, missing: int = 0) -> tuple[Tensor, Tensor]:
        """`index` of a call, whose keys may lie on another grid."""
        return self.index(call.op, call.grid, call.value.device, missing)

    def own(self, call: Call) -> Tensor:
        return self.home(call.op, call.grid, call.value.device)


class OwnTable(TableMeaning):
    """A path from outside, by what it reads; outputs lie on the input's grid."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    def index(self, op: Basic, grid: Lengths, device: torch.device, missing: int = 0) -> tuple[Tensor, Tensor]:
        read = self.reads(op.path, grid, device)
        if not (isinstance(read, tuple) and len(read) == 2 and all(isinstance(t, Tensor) for t in read)):
            raise ValueError(
                f"{op.path}: must read a pair of tensors, positions and which are valid, got {shown(read)}"
            )
        index, valid = read
        N, given = math.prod(grid), (tuple(index.shape), index.dtype, tuple(valid.shape), valid.dtype)
        if index.dim() != 2 or given != ((N, index.shape[1]), torch.long, (N, index.shape[1]), torch.bool):
            raise ValueError(
                f"{op.path}: must read int64 positions ({N}, slots) and say in bool ({N}, slots) which are valid, got "
                f"{given[1]} {given[0]} and {given[3]} {given[2]}"
            )
        if not torch.compiler.is_compiling() and not index.is_meta:
            outside = index[valid & ((index < 0) | (index >= N))]
            if outside.numel():
                raise ValueError(
                    f"{op.path}: reads position {int(outside[0])} of {N}; say that such a slot is not valid"
                )
        return index.masked_fill(~valid, missing), valid

    def home(self, op: Basic, grid: Lengths, device: torch.device) -> Tensor:
        return torch.arange(math.prod(grid), device=device)


class AxesMeaning(TableMeaning):
    """A table whose slots are a product of axes: a window or a block."""

    def steps(self, op: Basic, grid: Lengths) -> Lengths:
        """How far slots that are next to one another lie apart, on every axis."""
        return as_tuple(getattr(op.path, "dilation", 1), len(grid), "dilation")

    def axis(self, op: Basic, grid: Lengths, axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """One axis: positions read (o, s), which of them are valid (o, s), and the queries' own positions (o,)."""
        raise NotImplementedError

    def index(self, op: Basic, grid: Lengths, device: torch.device, missing: int = 0) -> tuple[Tensor, Tensor]:
        """As `window_reads` says, by a few operations on as many numbers as there are slots."""
        at, valid, _ = _axes(op, grid, device)
        return in_raster(at, valid, grid, missing)

    def home(self, op: Basic, grid: Lengths, device: torch.device) -> Tensor:
        return _raster(_axes(op, grid, device)[2], grid).flatten()

    def bias(self, op: Basic, params: dict[str, Tensor], grid: Lengths, query_M: Tensor, like: Tensor) -> Tensor:
        at_MSa, valid_MS, home_Ma = window_reads(op, grid, like.device)
        offset_MSa = (home_Ma[:, None] - at_MSa).masked_fill(~valid_MS[..., None], 0)
        if op.path.similarity.bias == "alibi":
            wide = torch.promote_types(like.dtype, torch.float32)
            return alibi(op, offset_MSa.to(wide).square().sum(-1).sqrt()).to(like.dtype)
        reach = bias_reach(op, len(grid))
        steps = self.steps(op, grid)
        # how far the query lies behind the key, in steps, as Swin counts; from no tensor of the host, which a CUDA
        # graph could not hold
        behind = [offset_MSa[..., a] // step + n - 1 for a, (step, n) in enumerate(zip(steps, reach, strict=True))]
        row_MS = flatten(torch.stack(behind, -1), tuple(2 * n - 1 for n in reach))
        return params["relative_bias"].to(like.dtype).flatten(1)[:, row_MS]


def _axes(op: Basic, grid: tuple[int, ...], device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`axis_reads` of every axis, shaped so that they broadcast to (o of every axis, s of every axis), or (o ...)."""
    return spread_out([axis_reads(op, grid, axis, device) for axis in range(len(grid))])


def spread_out(each: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What `axis_reads` says of every axis, so that all broadcast together."""
    ndim = len(each)
    at, valid, home = [], [], []
    for axis, (at_os, valid_os, home_o) in enumerate(each):
        alone = [1] * ndim
        alone[axis] = at_os.shape[0]
        slots = [1] * ndim
        slots[axis] = at_os.shape[1]
        at.append(at_os.view(*alone, *slots))
        valid.append(valid_os.view(*alone, *slots))
        home.append(home_o.view(alone))
    return at, valid, home


def in_raster(at: list[Tensor], valid: list[Tensor], grid: Lengths, missing: int) -> tuple[Tensor, Tensor]:
    """Raster positions (M, S) on a grid, ``missing`` where a slot reads none, and which slots read one."""
    inside = valid[0]
    for more in valid[1:]:
        inside = inside & more
    flat = _raster(at, grid).masked_fill(~inside, missing)
    ndim = len(grid)
    shape = math.prod(flat.shape[:ndim]), math.prod(flat.shape[ndim:])
    flat, inside = flat.reshape(shape), inside.reshape(shape)
    if torch.compiler.is_compiling():
        # as views, their strides are minima of open sizes, which nothing proves equal
        whole = torch.contiguous_format
        return flat.clone(memory_format=whole), inside.clone(memory_format=whole)
    return flat, inside


def window_reads(op: Basic, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions read (M, S, a), valid (M, S), and the queries' own positions (M, a), slots in raster order."""
    at, valid, home = _axes(op, grid, device)
    ndim = len(grid)
    at_oosa = torch.stack(torch.broadcast_tensors(*at), -1)
    shape = math.prod(at_oosa.shape[:ndim]), math.prod(at_oosa.shape[ndim:-1]), ndim
    at_MSa = at_oosa.reshape(shape)
    valid_MS = torch.stack(torch.broadcast_tensors(*valid), -1).reshape(shape).all(-1)
    home_Ma = torch.stack(torch.broadcast_tensors(*home), -1).reshape(shape[0], ndim)
    return at_MSa, valid_MS, home_Ma


def flatten(at: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Positions as tuples (..., a) -> raster index (...)."""
    return _raster([at[..., axis] for axis in range(len(grid))], grid)


def _raster(at: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    flat = at[0]
    for n, more in zip(grid[1:], at[1:], strict=True):
        flat = flat * n + more
    return flat

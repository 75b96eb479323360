"""`lower`: choose the backend of every `Basic` operation, from static facts only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from nearfold._kept import once
from nearfold._numbers import shown
from nearfold.grammar import Basic, Operation, parse
from nearfold.grammar.vocabulary import words_in
from nearfold.kernels.names import require_tensors
from nearfold.lower import oracle
from nearfold.lower.backends import (
    beside,
    block,
    blocks,
    conv,
    dense,
    edges,
    fast,
    fft,
    gather,
    knn,
    linear,
    local,
    pooled,
    sampled,
    scan,
    sdpa,
    transposed,
    union,
)
from nearfold.lower.call import Run
from nearfold.lower.execute import Sizes, Step, step
from nearfold.lower.frame import Frame, Source
from nearfold.lower.meaning import meaning
from nearfold.lower.verdict import Facts, Verdict

BACKENDS: dict[str, ModuleType] = {
    m.NAME: m
    for m in (
        conv,
        transposed,
        block,
        sdpa,
        linear,
        fft,
        scan,
        fast,
        knn,
        local,
        gather,
        union,
        blocks,
        pooled,
        beside,
        sampled,
        edges,
        dense,
    )
}  # in order of preference
PAIRED = ("sdpa", "dense", "gather")  # those that heed a mask of pairs
ORACLE = Verdict.yes("the formula itself, dense and slow", "bitwise")


def verdicts(facts: Facts) -> dict[str, Verdict]:
    """Every backend's verdict, in order of preference; the oracle last."""
    kernel = facts.op.weight.kernel
    if kernel is not None and kernel.edges:
        no = Verdict.no(f"kernel {kernel.word} reads pairs of positions")
        return dict.fromkeys(BACKENDS, no) | {edges.NAME: edges.supports(facts), "oracle": ORACLE}
    return {name: module.supports(facts) for name, module in BACKENDS.items()} | {"oracle": ORACLE}


@once
def lower(facts: Facts, backend: str = "auto") -> str:
    """Name of the backend that runs these facts.

    A backend asked for by name never falls back: ValueError with the reason and those that can.

    >>> from nearfold import parse
    >>> lower(Facts(parse("window(3) | box | kernel"), 2, torch.float32, "cpu", True))
    'conv'
    """
    found = verdicts(facts)
    if backend == "auto":
        return next(name for name, verdict in found.items() if verdict.ok)
    if backend not in found:
        raise ValueError(f"backend={backend!r} is not one of: auto, {', '.join(found)}")
    if not found[backend].ok:
        others = ", ".join(name for name, verdict in found.items() if verdict.ok)
        raise ValueError(
            f"backend={backend!r} cannot run {facts.op}: {found[backend].reason}. Those that can: {others}"
        )
    return backend


def _require_mask(op: Operation, mask: Tensor, x: Tensor, context: Tensor | None) -> None:
    for part in op.parts:
        if not (meaning(part.path).takes_mask(part) and meaning(part.weight.rho).takes_mask):
            raise ValueError(
                f"{part}: a mask of pairs goes with the paths all, nearest(k) without self, padding and indexer, and "
                "those of fixed positions (window, block, first ...), and with a rho that reads scores or none: no "
                "table, agent, and no kernel as long as the map"
            )
        if mask.is_floating_point():
            _require_added(part, mask)
    keys = math.prod((x if context is None else context).shape[2:])
    wanted = (x.shape[0], mask.shape[1] if mask.dim() == 4 else 1, math.prod(x.shape[2:]), keys)
    fits = mask.dim() == 4 and all(n in (1, m) for n, m in zip(mask.shape[:2], wanted[:2], strict=True))
    right = mask.dtype == torch.bool or mask.is_floating_point()
    if not right or not fits or tuple(mask.shape[2:]) != wanted[2:]:
        raise ValueError(
            f"mask must be bool of shape (batch or 1, heads or 1, {wanted[2]}, {keys}), True where a query may read a "
            f"key, or floating point, added to the scores, got {mask.dtype} {tuple(mask.shape)}"
        )


def _require_added(part: Basic, mask: Tensor) -> None:
    """ValueError where numbers cannot be added to the scores."""
    if not meaning(part.weight.rho).adds:
        raise ValueError(
            f"{part}: a mask of numbers is added to scores, which rho {part.weight.rho.word} does not weigh by: use "
            "softmax, sparsemax, entmax, sigmoid, relu or identity, or a mask of bools"
        )
    if getattr(part.path, "by", None) is not None:
        raise ValueError(f"{part}: a mask of numbers is added to the scores that choose and weigh; leave by out")


def _require_keys(op: Operation, keep: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
    """Which keys there are, as bool (B, N')."""
    for part in op.parts:
        odd = next((word for word in words_in(part) if not word.takes_keys), None)
        if odd is not None:
            raise ValueError(f"{part}: {odd} reads every position of the map, whatever a mask says")
        if context is not None and not part.cross:
            raise ValueError(f"{op}: the mask says which keys there are; {part} reads x, the other parts the context")
    read = x if context is None else context
    grid = tuple(read.shape[2:])
    if keep.dim() == 1 and not keep.is_floating_point() and keep.dtype != torch.bool and len(grid) == 1:
        if keep.shape[0] != x.shape[0] or not (torch.compiler.is_compiling() or _in_range(keep, grid[0])):
            raise ValueError(
                f"mask as lengths must be {x.shape[0]} integers from 0 to {grid[0]}, got shape {tuple(keep.shape)}"
                f"{f', from {int(keep.min())} to {int(keep.max())}' if keep.is_cpu and keep.numel() else ''}"
            )
        return torch.arange(grid[0], device=keep.device) < keep[:, None]
    if keep.dtype != torch.bool or tuple(keep.shape) not in ((x.shape[0], *grid), (x.shape[0], math.prod(grid))):
        raise ValueError(
            f"mask of the keys must be bool of shape {(x.shape[0], *grid)} or {(x.shape[0], math.prod(grid))}, True "
            f"where there is one{', or integers, the lengths' if len(grid) == 1 else ''}; for every query and key "
            f"(batch or 1, heads or 1, queries, keys), bool or numbers; got {keep.dtype} {tuple(keep.shape)}"
        )
    return keep.flatten(1)


def _in_range(lengths: Tensor, most: int) -> bool:
    """Whether lengths are some; on a device nobody asks, for the answer would be waited for."""
    return not lengths.is_cpu or bool(((lengths >= 0) & (lengths <= most)).all())


def _run(name: str, at: Frame) -> Run:
    """What a backend runs on this frame: some settle more of it beforehand, in `prepare`."""
    module = oracle if name == "oracle" else BACKENDS[name]
    prepare: Callable[[Frame], Run] | None = getattr(module, "prepare", None)
    run: Run = module.run if prepare is None else prepare(at)
    return run


def _masked(facts: Facts, backend: str, masked: str) -> str:
    """The backend that runs an operation with a mask: of "keys", or of "pairs" of query and key."""
    if masked == "keys":
        able = [name for name, verdict in verdicts(facts).items() if verdict.ok and verdict.keys]
        if backend not in ("auto", *able):
            raise ValueError(
                f"backend={backend!r} does not run {facts.op} with a mask; those that do: {', '.join(able)}"
            )
        return able[0] if backend == "auto" else backend
    pairs = {name: BACKENDS[name].supports(facts).ok for name in PAIRED} | {"oracle": True}
    if backend not in ("auto", *pairs):
        raise ValueError(f"backend={backend!r} knows no mask of pairs: leave it at auto, or take {', '.join(pairs)}")
    return next(name for name, ok in pairs.items() if ok) if backend == "auto" else backend


@once
def planned(
    op: Operation,
    tail: tuple[int, ...],
    out_channels: int,
    source: Source,
    dtype: torch.dtype,
    device: str,
    grad: bool,
    backend: str,
    drawing: bool,
    masked: str,
) -> Step:
    """All that a call on inputs (B, *tail) of these facts need not ask again; ``source``: another input's grids, or ().

    Raises:
        ValueError: where the input is none for the operation.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"x must be floating point, got {dtype}; convert it with x.float()")
    if min(tail) == 0:
        raise ValueError(f"x must have channels and positions, got {tuple(tail)} after the batch axis")

    def choose(basic: Basic, at: Frame) -> Run:
        facts = Facts(basic, len(tail) - 1, dtype, device, grad)
        return _run(_masked(facts, backend, masked) if masked else lower(facts, backend), at)

    return step(op, Sizes(tail[0], out_channels, tuple(tail[1:]), source, drawing), choose)


Context = Tensor | Sequence[Tensor]
"""A second input: a map, or several."""


def operation(given: Operation | str) -> Operation:
    """An operation itself, or the one that a notation says; ValueError for anything else."""
    op = parse(given) if isinstance(given, str) else given
    if not isinstance(op, Operation):
        raise ValueError(f"operation must be an Operation or its notation, got {shown(given)}")
    return op


def apply(
    op: Operation | str,
    params: dict[str, Tensor],
    x: Tensor,
    *,
    out_channels: int | None = None,
    backend: str = "auto",
    draw: Tensor | None = None,
    context: Context | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Run an operation on x (B, C, *grid) with parameters as `parameters` names them: (B, O, *out).

    Args:
        op: an operation or its notation.
        params: tensors by name.
        x: the input; its dtype and device are the output's.
        out_channels: O, default C.
        backend: "auto", or a backend's name for every part.
        draw: (seed, draws), int64 of shape (2,): draw random candidates; None searches all of them.
        context: (B, C', *grid'), the second input, from which `cross` paths take keys and values; a list of them for a
            path with ``levels``.
        mask: which keys there are, bool (B, N') or (B, *grid'), or on sequences the integers (B,) of their lengths: a
            slot that reads another position is not valid, and what x holds there is never looked at. Or bool
            (B|1, H|1, N, N'), True where a query may read a key, for paths `all`, `nearest` and those of fixed
            positions; or floating point of this shape, added to the scores (the neighbours of `nearest` are chosen by
            the sums), -inf where a key is not read. `nearest` then runs on the oracle.
    """
    require_tensors(x=x)
    if x.dim() < 3:
        raise ValueError(f"x must be (batch, channels, *grid), got shape {tuple(x.shape)}")
    made = x.shape[1] if out_channels is None else out_channels
    return run(operation(op), params, x, made, backend, draw, context, mask)


def run(
    op: Operation,
    params: dict[str, Tensor],
    x: Tensor,
    out_channels: int,
    backend: str = "auto",
    draw: Tensor | None = None,
    context: Context | None = None,
    mask: Tensor | None = None,
    precise: bool = False,
) -> Tensor:
    """As `apply`, of an `Operation` on a tensor; ``precise``: queries and keys of a search are float32 at least."""
    if torch.compiler.is_dynamo_compiling():
        from nearfold.lower.inductor import repaired  # it brings torch's compiler in, which takes a second

        repaired()
    source: Source = ()
    if context is not None:
        if not (isinstance(context, (list, tuple)) and any(getattr(p.path, "levels", 1) > 1 for p in op.parts)):
            require_tensors(context=context)
        maps = [context] if isinstance(context, Tensor) else list(context)
        _require_context(op, maps, x)
        source = tuple(maps[0].shape[2:])
        if not isinstance(context, Tensor):
            source = tuple(tuple(one.shape[2:]) for one in maps)
            context = torch.cat([one.flatten(2) for one in maps], 2)
    keep = None
    if mask is not None:
        require_tensors(mask=mask)
        if mask.is_floating_point() and mask.dim() == 4:
            _require_mask(op, mask, x, context)
        elif mask.dim() == 4 and x.dim() != 5 and mask.shape[1:3] == (1, 1) and mask.shape[0] == x.shape[0]:
            mask = mask[:, 0, 0]  # the same for every query
        if mask.dim() == 4 and (x.dim() != 5 or mask.shape[1:] != x.shape[2:]):
            _require_mask(op, mask, x, context)
        else:
            keep, mask = _require_keys(op, mask, x, context), None
            lost = ~keep.view(keep.shape[0], 1, *(x if context is None else context).shape[2:])
            if context is None:
                x = x.masked_fill(lost, 0)
            else:
                context = context.masked_fill(lost, 0)
    found = planned(
        op,
        x.shape[1:],
        out_channels,
        source,
        x.dtype,
        x.device.type,
        torch.is_grad_enabled(),
        backend,
        draw is not None,
        "pairs" if mask is not None else "keys" if keep is not None else "",
    )
    return found.run(params, x, (draw, context, mask, keep, precise), {})


def _require_context(op: Operation, maps: list[Tensor], x: Tensor) -> None:
    for one in maps:
        require_tensors(context=one)
    if not op.needs_context:
        raise ValueError(
            f"{op}: reads one input; leave context out, or write all(cross), nearest(k, cross) or window(size, cross)"
        )
    for part in op.parts:
        if part.cross and (wanted := getattr(part.path, "levels", 1)) != len(maps):
            raise ValueError(
                f"{part}: reads {wanted} map{'s' * (wanted > 1)}; context must be {'a list of them' * (wanted > 1)}"
                f"{'a tensor' * (wanted == 1)}, got {len(maps)}"
            )
    for one in maps:
        if (
            one.dim() < 3
            or one.shape[:2] != (x.shape[0], maps[0].shape[1])
            or one.dtype != x.dtype
            or 0 in one.shape[1:]
        ):
            raise ValueError(
                "context must be (B, C, *grid) with the batch and dtype of x, got "
                f"{tuple(one.shape)} {one.dtype} next to {tuple(x.shape)} {x.dtype}"
            )

"""Attention of any class, by its members: read from tables, and believed only where it computes what the words say.

What is read is run: a copy of the layer, with random weights, next to the operation in the words with the same weights.
Where the two differ, or the copy does not run, the layer is not said to be anything.

Shape legend: B batch, N positions, d features of a head.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nearfold._images import first_line
from nearfold.grammar import Basic, Weight
from nearfold.grammar.place import Place, angles
from nearfold.grammar.similarity import Scaled
from nearfold.grammar.words import All, Causal, Row, Softmax, Window
from nearfold.lower.meaning import meaning
from nearfold.lower.plan import apply
from nearfold.recognise.checked import (
    BATCH,
    POSITIONS,
    config_of,
    kind_of,
    random_copy,
    remembered,
    require_alike,
    signature,
)
from nearfold.recognise.foreign import Match, Unsaid
from nearfold.recognise.layouts import (
    CAUSAL,
    CONTEXTS,
    FEATURES,
    HEADS,
    KNOWN,
    OUTSIDE,
    SCALES,
    SETTINGS,
    Layout,
    layout_of,
    member,
    tensors_of,
    unexplained,
    without_norm,
)

NOTE = "without a mask, unless the caller gives one"


@dataclass(frozen=True)
class Attention:
    """An attention that was said and run.

    Attributes:
        operation: what it does.
        layout: where its parts are.
        arguments: names of its forward's arguments.
        returns: how many values it returns as a tuple; 0: a tensor alone.
        added: whether positions that its caller gives are added to what makes queries and keys.
    """

    operation: Basic
    layout: Layout
    arguments: tuple[str, ...]
    returns: int = 0
    added: bool = False

    def match(self, module: nn.Module) -> Match:
        """For `describe`."""
        maps = [tuple(member(module, name).parameters()) for name in self.layout.maps]
        biases = [b for b in (getattr(module, f"{c}_bias", None) for c in "qv") if isinstance(b, nn.Parameter)]
        generating = sum(p.numel() for each in maps for p in each) + sum(b.numel() for b in biases)
        notes = [NOTE] if self.arguments[1:] and not self.operation.shape.causal else []
        if self.added:
            notes.append("queries and keys are made of the input plus the positions that the caller gives")
        if self.layout.norm:
            notes.append("the input is added to its output, and a norm follows")
        return Match(self.operation, generating, axis=-1, note="; ".join(notes))

    def call(self, module: nn.Module, x: Tensor) -> dict[str, Any]:
        """What its caller gives with x (B, N, D), by name: rotary positions, and the mask of a causal layer."""
        return _call(_arguments(module), self.operation, x.shape[-1] // self.operation.weight.rho.heads, x)

    def tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Its weights by the names of `nearfold.lower.parameters`."""
        return tensors_of(module, self.layout)


def attention_of(module: nn.Module, cross: bool = False) -> Attention | None:
    """What a module is as an attention; None where it does not look like one.

    Args:
        module: any.
        cross: whether what it is in says that keys and values come from another input.

    Raises:
        Unsaid: why it looks like one and is none that the words can say.
    """
    layout = layout_of(module)
    if layout is None or "forward" in vars(module):
        return None
    key = (cross, *signature(module))
    return remembered(_READ, key, lambda: _read(module, layout, cross))


_READ: dict[Any, Attention | str] = {}


def why_not(module: nn.Module) -> str | None:
    """Why an attention layer cannot be said; None where it can, or is none by its members and its name.

    >>> why_not(nn.Linear(3, 3))
    """
    try:
        attention = attention_of(module)
    except Unsaid as why:
        return str(why)
    named = "att" in type(module).__name__.lower() and not isinstance(module, nn.MultiheadAttention)
    return "called attention, and no rule for this class" if attention is None and named else None


def _first(owners: tuple[Any, ...], names: tuple[str, ...], kind: Any) -> Any:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, kind) and not isinstance(value, bool):
                return value
    return None


def _read(module: nn.Module, layout: Layout, cross: bool) -> Attention:
    if layout.norm and not isinstance(member(module, layout.norm), nn.Module):
        layout = without_norm(layout)
    arguments = _arguments(module)
    for name, what in OUTSIDE.items():
        if name in arguments:
            raise Unsaid(f"no word for {what} ({name})")
    if unknown := [name for name in list(arguments)[1:] if name not in KNOWN]:
        raise Unsaid(f"no word for what its caller gives as {unknown[0]}")
    config = config_of(module)
    for name, (odd, what) in SETTINGS.items():
        if odd(getattr(config, name, None)):
            raise Unsaid(f"no word for {what} ({name}={getattr(config, name)})")
    if more := sorted(dict.fromkeys(unexplained(module, layout))):
        raise Unsaid(f"no word for its {', '.join(_kinds(module, more))}")
    if "window" in type(module).__name__.lower():
        raise Unsaid("its name says that its caller cuts the map into windows, and nothing says which")
    cross = cross or _is_cross(member(module, layout.core), arguments)
    operation, added = _operation(module, layout, config, arguments, cross)
    if cross:
        if not meaning(operation.path).everywhere or operation.path.similarity.placed:
            raise Unsaid(f"no word for {operation.path} over another input")
        operation = dataclasses.replace(operation, path=All(cross=True), shape=Row())
    return _checked(module, Attention(operation, layout, tuple(arguments), added=added), arguments)


def _is_cross(core: nn.Module, arguments: dict[str, inspect.Parameter]) -> bool:
    needed = any(name in arguments and arguments[name].default is inspect.Parameter.empty for name in CONTEXTS)
    return needed or bool(getattr(core, "is_cross_attention", False)) or "Cross" in type(core).__name__


def _kinds(module: nn.Module, names: list[str]) -> list[str]:
    """Names of parts, with their classes."""
    made = []
    for name in names:
        part = member(module, name)
        made.append(f"{name} ({type(part).__name__})" if isinstance(part, nn.Module) else name)
    return made


def _arguments(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of a module's forward by name, without those that it only passes on."""
    every = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return {p.name: p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _operation(
    module: nn.Module, layout: Layout, config: Any, arguments: dict[str, inspect.Parameter], cross: bool
) -> tuple[Basic, bool]:
    core = member(module, layout.core)
    tensors = tensors_of(module, layout)
    width = tensors["query_weight"].shape[1]
    inner = tensors["query_weight"].shape[0]
    features = _first((core, module), FEATURES, int)
    heads = _first((core, module), HEADS, int) or (inner // features if features else None)
    if not heads or inner % heads:
        raise Unsaid("it does not tell how many heads it has")
    features = inner // heads
    made = tensors["out_weight"].shape[0] if layout.out else inner
    if any(tensors[f"{name}_weight"].shape[1] != width for name in ("key", "value")):
        raise Unsaid("keys and values of another width than the queries")
    if inner != width or made != width:
        raise Unsaid("no word for heads of fewer or more channels than the input has")
    shared = tensors["key_weight"].shape[0] // features
    if tensors["value_weight"].shape != tensors["key_weight"].shape or not shared or heads % shared:
        raise Unsaid("keys and values of different widths")
    scale = _first((core, module), SCALES, float)
    factor = 1.0 if scale is None else scale * math.sqrt(features)
    factor = 1.0 if abs(factor - 1) < 1e-6 else round(factor, 12)
    weight = Weight(
        Softmax(heads, scale=factor, project=None if layout.out else "qkv", kv=None if shared == heads else shared)
    )
    rotary, added = _rotary(core, config, arguments, features)
    similarity, causal = Scaled(rotary=rotary), _is_causal(core, config, cross)
    window = _sliding(core, config)
    if window is not None:
        if not causal:
            raise Unsaid(f"no word for a window of {window} that its caller's mask makes")
        return Basic(Window(window, similarity), Causal(), weight), added
    return Basic(All(similarity), Causal() if causal else Row(), weight), added


def _is_causal(core: nn.Module, config: Any, cross: bool) -> bool:
    if cross:
        return False
    if type(config).__name__ in CAUSAL or bool(getattr(core, "is_causal", False)):
        return True
    if getattr(core, "is_decoder", False):
        raise Unsaid("a decoder that does not tell whether it is causal")
    return False


def _sliding(core: nn.Module, config: Any) -> int | None:
    kind = kind_of(core, config)
    if kind not in (None, "full_attention", "attention", "sliding_attention"):
        raise Unsaid(f"no word for a layer of the type {kind}")
    own: Any = getattr(core, "sliding_window", getattr(config, "sliding_window", None))
    if kind in ("full_attention", "attention"):
        own = None
    if own is None:
        return None
    if not isinstance(own, int) or own < 1:
        raise Unsaid(f"no word for sliding_window={own!r}")
    return own


def _rotary(
    core: nn.Module, config: Any, arguments: dict[str, inspect.Parameter], features: int
) -> tuple[bool | float, bool]:
    """The base of rotary positions (False: there are none), and whether positions are added instead."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None and getattr(config, "rope_theta", None) is not None:  # transformers 4
        rope = {"rope_theta": config.rope_theta, "rope_type": "default"} | (getattr(config, "rope_scaling", None) or {})
    if "position_embeddings" not in arguments:
        if rope is not None:
            raise Unsaid("rotary positions that it makes itself")
        return False, False
    if rope is None:
        return False, True
    if "rope_theta" not in rope and (kind := kind_of(core, config)) is not None:
        rope = rope.get(kind) or {}
    spelled, base = rope.get("rope_type", "default"), rope.get("rope_theta")
    if spelled != "default" or base is None or "mrope_section" in rope:
        raise Unsaid(f"no word for rotary positions of the type {spelled}")
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if part != 1.0:
        raise Unsaid(f"no word for rotary positions in {part:g} of each head's features")
    rotary = True if base == 10000 else float(base)
    _require_turns(core, config, rotary, features)
    return rotary, False


def _require_turns(core: nn.Module, config: Any, rotary: bool | float, features: int) -> None:
    """Unsaid unless what makes the positions, beside the attention in its library's file, makes ours of 0, 1, 2 ..."""
    beside = vars(sys.modules[type(core).__module__])
    makers = [cls for name, cls in beside.items() if name.endswith("RotaryEmbedding") and isinstance(cls, type)]
    own = [cls for cls in makers if cls.__module__ == type(core).__module__]
    x, at = torch.zeros(1, POSITIONS, features), torch.arange(POSITIONS)[None]
    ours = rotary_embeddings(rotary, features, POSITIONS, x)
    for maker in own:
        try:
            made = maker(config=config).to("cpu")(x, at)
            if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(made, ours, strict=True)):
                return
        except Exception:  # another kind of positions, with other arguments
            continue
    raise Unsaid("rotary positions of a kind that could not be checked")


# --- the check


def visible(op: Basic, positions: int, device: torch.device) -> Tensor:
    """Which keys a query of a causal operation may read (N, N)."""
    at_N = torch.arange(positions, device=device)
    behind_NN = at_N[:, None] - at_N[None]
    window = getattr(op.path, "size", positions)
    assert isinstance(window, int)
    return (behind_NN >= 0) & (behind_NN < window)


def rotary_embeddings(rotary: bool | float, features: int, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (1, N, d), as transformers hands them to its layers."""
    wide = torch.promote_types(like.dtype, torch.float32)
    turn_Np = angles(Place((positions,), like.device, wide), features // 2, rotary)[:, 0]
    turn_1Nd = torch.cat([turn_Np, turn_Np], -1)[None]
    return turn_1Nd.cos().to(like.dtype), turn_1Nd.sin().to(like.dtype)


def _checked(module: nn.Module, read: Attention, arguments: dict[str, inspect.Parameter]) -> Attention:
    """The same, run; Unsaid where it does not do what was read."""
    op = read.operation
    rho = op.weight.rho
    try:
        twin = random_copy(module)
    except Exception as error:
        raise Unsaid(f"no copy of it could be made to check what it does: {error}") from error
    tensors = tensors_of(twin, read.layout)
    width = tensors["query_weight"].shape[1]
    x = 2 * torch.randn(BATCH, POSITIONS, width, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    given = _call(arguments, op, width // rho.heads, x)
    context = None
    if op.cross:
        context = torch.randn(BATCH, POSITIONS + 2, width, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
        given |= {name: context for name in CONTEXTS if name in arguments}
    with torch.no_grad():
        try:
            made = twin(x, **given)
        except Exception as error:
            raise Unsaid(
                f"it does not run by itself on ({BATCH}, {POSITIONS}, {width}): {first_line(error)}"
            ) from error
        y = made[0] if isinstance(made, tuple) else made
        ours = apply(op, tensors, x.mT, context=None if context is None else context.mT).mT
        if read.layout.norm:
            ours = member(twin, read.layout.norm)(ours + x)
    if not isinstance(y, Tensor) or y.shape != ours.shape:
        raise Unsaid(f"it does not return (B, N, {width}) first")
    require_alike(y, ours, str(op))
    return dataclasses.replace(read, returns=len(made) if isinstance(made, tuple) else 0)


FILLED: dict[str, Callable[[int], Any]] = {"height": lambda n: 1, "width": lambda n: n, "feat_size": lambda n: (1, n)}
"""Arguments that say how tokens lie on a map; they change nothing where all of them look at all of them."""


def _call(arguments: dict[str, inspect.Parameter], op: Basic, features: int, x: Tensor) -> dict[str, Any]:
    N = x.shape[1]
    given: dict[str, Any] = {}
    similarity = op.path.similarity
    if op.shape.causal and "attention_mask" in arguments:
        hidden = ~visible(op, N, x.device)
        given["attention_mask"] = torch.zeros(1, 1, N, N, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)
    if similarity.rotary and "position_embeddings" in arguments:
        given["position_embeddings"] = rotary_embeddings(similarity.rotary, features, N, x)
    for name, parameter in list(arguments.items())[1:]:
        if name in FILLED:
            given[name] = FILLED[name](N)
        elif parameter.default is parameter.empty and name not in given and name not in CONTEXTS:
            raise Unsaid(f"it needs {name} from its caller")
    return given

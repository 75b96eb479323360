"""One run of a model, without arithmetic where that is possible: FLOPs, receptive fields, and what mixes positions.

Every tensor carries a `Place`: what each entry of it depends on, and which channel and position it is. A layer that is
known carries it on by its operation, everything else operator by operator. Where an nn.Linear sees the position change
along its last axis, it mixes positions: this is a token MLP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from nearfold.grammar.words import All, Window
from nearfold.recognise.blocks import AT_CALL
from nearfold.recognise.compared import Comparisons
from nearfold.recognise.field import through
from nearfold.recognise.foreign import Match, Unsaid, names_of
from nearfold.recognise.observation import Frame, Observation
from nearfold.recognise.operators import EMPTY, Call, follow
from nearfold.recognise.place import (
    SHIFT,
    Place,
    begin,
    gathered,
    join,
    number,
    orderly,
    over,
    renumbered,
    same,
    settled,
    stage,
    text,
    unknown,
    varies,
)
from nearfold.recognise.pointwise import is_linear
from nearfold.recognise.trial import trial
from nearfold.recognise.walk import Layer, one_position

PICKING = ("index", "index_select", "gather", "embedding")  # entries of their first tensor


def observe(
    model: nn.Module,
    layers: list[Layer],
    input_size: tuple[int, ...] | None,
    glued: frozenset[str],
    inputs: dict[str, Any] | None = None,
) -> Observation:
    """Run a copy of a model once on one input of this size (without the batch), and watch.

    Args:
        model: left as it is.
        layers: of `walk`.
        input_size: channels and grid.
        glued: qualified names of containers whose own forward is known.
        inputs: instead of a size, the model's arguments by name; fields are in the first that is a tensor.

    Raises:
        ValueError: when the model does not run on that input.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    >>> from nearfold.recognise.walk import walk
    >>> seen = observe(model, walk(model), (3, 8, 8), frozenset())
    >>> seen.flops["0"], seen.fields["0"]
    (13824, '3')
    """

    def run(twin: nn.Module, modules: dict[nn.Module, nn.Module], args: Any, kwargs: Any) -> Observation:
        watch = _Watch(model, modules, layers, glued)
        with watch.hooks(), FlopCounterMode(display=False) as watch.counter, _Escapes(watch), watch:
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    watch.begin(t, None if t.dim() < 3 else 1)
            twin(*args, **kwargs)
        return watch.seen

    return trial(model, input_size, inputs, run)


class _Escapes(TorchFunctionMode):
    """Values that leave the tensors: what is made of them cannot be followed."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("numpy", "tolist", "item", "__array__", "__bool__", "__int__", "__float__", "__index__"):
            self.watch.escaped(name, args)
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    counter: FlopCounterMode

    def __init__(
        self, model: nn.Module, twins: dict[nn.Module, nn.Module], layers: list[Layer], glued: frozenset[str]
    ) -> None:
        super().__init__()
        self.seen = Observation()
        self.glued = glued
        self.root = twins[model]
        self.by_module = {twins[layer.modules[0]]: layer for layer in layers}
        said = {twins[module]: layer.match for layer in layers if layer.match for module in layer.modules}
        self.known = {module for module, match in said.items() if not match.followed}
        self.followed = said.keys() - self.known
        self.leaves = {twins[layer.modules[0]] for layer in layers if not layer.match and not layer.listed}
        self.names = {twins[module]: name for name, module in model.named_modules()}
        self.folded: set[str] = set()
        self.places, self.solid = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.written: dict[int, tuple[int, Tensor]] = {}  # when memory was last written to, and through which tensor
        self.placed, self.clock = WeakIdKeyDictionary(), 0
        self.lost = False
        self.stack: list[Frame] = []
        self.comparisons = Comparisons()
        for module in self.root.modules():
            for t in module._parameters.values():
                if t is not None:
                    self.solid[t] = True
        for module, twin in twins.items():  # buffers without zeros and without what would mask in a softmax
            for name, buffer in module._buffers.items():
                if buffer is None or buffer.is_meta or not buffer.is_floating_point():
                    continue
                if bool(((buffer != 0) & (buffer.abs() < 1e4)).all()):
                    self.solid[twin._buffers[name]] = True

    # --- modules

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        def entered(*call: Any) -> None:
            with _apart():
                self._enter(*call)

        def left(*call: Any) -> None:
            with _apart():
                self._leave(*call)

        for module in self.names:  # of a copy: nobody takes them away
            module.register_forward_pre_hook(entered, with_kwargs=True)
            module.register_forward_hook(left)
        yield

    def begin(self, t: Tensor, axis: int | None) -> None:
        """Label an input of the model; fields are those in the first."""
        self.comparisons.batch = t.shape[0] if t.dim() else 1
        place, first = begin(t.shape, axis), next(iter(self.places.values()), None)
        if first is not None:
            lost = unknown(first, t.shape)
            place = dataclasses.replace(lost, channel=place.channel, position=place.position, wild=False)
        self._put(t, place)

    def _inside(self) -> bool:
        """Whether what runs now belongs to a layer whose operation is known."""
        return any(self._whole(frame.module) for frame in self.stack)

    def _whole(self, module: nn.Module) -> bool:
        return module in self.known or (module in self.by_module and is_linear(module))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        inside, own = self._inside(), self.names[module]
        layer = None if inside else self.by_module.get(module)
        main = next((t for t in given if t.is_floating_point() and t.dim() > 2), None)
        lies = None if inside or main is None or own in self.seen.ran else self.place(main)
        if lies is not None:
            self.seen.lies[own] = lies
        self.seen.ran.add(own)
        if layer is not None and given:
            if is_linear(module):
                self._look(layer.name, given[0])
            for name in names_of(module):
                if layer.match is not None and name in AT_CALL:
                    try:
                        self.seen.calls[layer.name] = AT_CALL[name](module, layer.match, args, kwargs)
                    except Unsaid as why:
                        self.seen.calls[layer.name] = str(why)
            match = self.seen.calls.get(layer.name, layer.match)
            if isinstance(match, Match) and _folds(module, match, given[0]):
                note = "parts of the map are folded into the batch; it looks within each of them"
                self.seen.calls[layer.name] = dataclasses.replace(match, note=note)
                self.folded.add(layer.name)
            if isinstance(match, Match):
                self._ordered(given[0], match)
        place = self.place(given[0]) if given else None
        position = None if place is None or place.wild else place.position
        self.stack.append(Frame(module, self.counter.get_total_flops(), given, position))

    def _ordered(self, x: Tensor, match: Match) -> None:
        """Note where a container rearranged the positions that a layer is about to read."""
        place = self.place(x)
        if place is None or place.wild or x.dim() < 3:
            return
        axis = match.axis % x.dim()
        dims = [d for d in range(1, x.dim()) if d != axis]
        windows = any(isinstance(part.path, Window) for part in match.operation.parts)
        if gathered(place.position, axis) or (windows and not orderly(place.position.narrow(axis, 0, 1), dims)):
            self._note("a rearrangement of positions")

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self.stack.pop()
        if self._inside():
            return
        given, name, layer = frame.given, self.names[module], self.by_module.get(module)
        self.seen.flops[name] = self.seen.flops.get(name, 0) + self.counter.get_total_flops() - frame.flops
        for outer in self.stack if layer is not None else ():
            outer.called.append(name)
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        places = [p for t in given if (p := self.place(t)) is not None]
        if layer is not None and made and places and is_linear(module):
            self._behind_linear(name, given[0], made[0])
        elif layer is not None and made and places and module in self.known:
            self._behind(layer, given, places, made)
        if self._whole(module) and places:  # nothing that depends on the input leaves unseen
            for t in made:
                if self.places.get(t) is None:
                    self._put(t, unknown(places[0], t.shape))
        if (layer is None and not frame.compared) or not made or not given:
            return
        place = self.place(made[0])
        if place is not None and made[0].dim():
            match = self.seen.calls.get(name, layer and layer.match)
            self.seen.fields[name] = text(place, match.axis if isinstance(match, Match) else -1)

    def _behind(self, layer: Layer, given: list[Tensor], places: list[Place], made: list[Tensor]) -> None:
        """Places of what a layer that is known has made."""
        y, x = made[0], given[0]
        match = self.seen.calls.get(layer.name, layer.match)
        main = self.place(x)
        if not isinstance(match, Match) or layer.name in self.folded:
            place = unknown(places[0], y.shape, match.axis if isinstance(match, Match) else None)
        else:
            like = [p for p in places if p.position.dim() == len(x.shape)]
            looks = all(isinstance(part.path, All) for part in match.operation.parts)
            if main is None or looks:
                main = join([over(p, range(p.position.dim())) for p in like], x.dim()) if like else unknown(
                    places[0], x.shape)  # fmt: skip
            if getattr(layer.modules[0], "shuffle", "none") != "none" and not looks:
                main = dataclasses.replace(main, kind="?")
            place = renumbered(through(main, match.operation, x.shape, y.shape, match.axis), y.shape, match.axis)
            if one_position(match):
                self.comparisons.alike(main, place)
                self.comparisons.through(x, y, layer.name)
        self._put(y, place)
        for t in made[1:]:
            if t is not y:
                self._put(t, unknown(place, t.shape))

    # --- nn.Linear

    def _look(self, name: str, x: Tensor) -> None:
        place = self.place(x)
        if place is None or place.wild or x.dim() < 1 or x.shape[-1] < 2:
            return
        channels = varies(place.channel, (-1,))
        positions = varies(place.position, (-1,)) and bool(
            (place.position % SHIFT != place.position[..., :1] % SHIFT).any()
        )
        rows = math.prod(x.shape[1:-1])
        kind = "both" if channels and positions else "positions" if positions else "channels"
        self.seen.linears[name] = "all" if kind == "both" and rows == 1 else kind

    def _behind_linear(self, name: str, x: Tensor, y: Tensor) -> None:
        place = self.place(x)
        if place is None:
            return
        kind = self.seen.linears.get(name, "channels")
        behind = over(place, (x.dim() - 1,))
        if kind == "channels":
            self.comparisons.through(x, y, name)
        else:
            behind = settled(behind)
        if kind == "positions":  # hidden tokens are along the last axis, the channels stay where they were
            rows = [d for d in range(x.dim()) if varies(place.position, (d,))]
            self._put(y, dataclasses.replace(behind, position=number(y.shape, rows) + stage()))
        else:
            if place.wild:
                behind = renumbered(behind, y.shape, -1)
            self._put(y, dataclasses.replace(behind, channel=number(y.shape, (-1,)), masked=False))

    # --- tensors

    def place(self, t: Tensor) -> Place | None:
        """Where a tensor comes from; unknown where something else has written to its memory since."""
        place = self.places.get(t)
        if self.written:
            when, writer = self.written.get(t.untyped_storage()._cdata, (0, t))
            if writer is not t and self.placed.get(t, 0) < when:
                source = place or self.places[writer]
                return unknown(source, t.shape)
        if self.lost and place is not None and place.kind != "?":
            return dataclasses.replace(place, kind="?")
        return place

    def escaped(self, name: str, args: tuple[Any, ...]) -> None:
        """Note that values that depend on the input are looked at."""
        if any(isinstance(t, Tensor) and self.place(t) is not None for t in args) and not self._inside():
            self._note(name.strip("_"))
            self.lost = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside():
            return func(*args, **kwargs)
        given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        with _apart():
            places = {
                id(t): p for t in tree_leaves(given) if isinstance(t, Tensor) and (p := self.place(t)) is not None
            }
        out = func(*args, **kwargs)
        with _apart():
            self._follow(func, given, places, out)
        return out

    def _follow(self, func: Any, given: dict[str, Any], places: dict[int, Place], out: Any) -> None:
        """Place what an operator has made."""
        tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        inplace = name.endswith("_") and not name.endswith("__")
        solid = {id(t) for t in tensors if t in self.solid}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = name.rstrip("_")
        if not made or (name in EMPTY and not inplace):
            return
        if not places:
            picked = name in PICKING and id(tensors[0]) in solid
            if solid and (picked or all(id(t) in solid or t.numel() == 1 for t in tensors)):
                for t in made:
                    self.solid[t] = True
            return
        if name in EMPTY:  # filled: it depends on nothing any more, if it is all of its memory
            behind = [unknown(next(iter(places.values())), t.shape) for t in made]
            self.comparisons.forget(made)
        else:
            call = Call(name, func, given, lambda t: places.get(id(t)), lambda t: id(t) in solid, made)
            behind = follow(call)
            if call.mixes:
                self._mixed(name, behind[0], call)
            self._compare(call)
        for t, place in zip(made, behind, strict=True):
            was = places.get(id(t))
            if inplace and (was is None or not same(was, place)):
                self.clock += 1
                self.written[t.untyped_storage()._cdata] = self.clock, t
                if name == "copy" and t._is_view():
                    self._note("writes to parts of a tensor")
            self._put(t, place)

    def _put(self, t: Tensor, place: Place) -> None:
        self.places[t], self.placed[t] = place, self.clock
        self.comparisons.see(place)

    def _compare(self, call: Call) -> None:
        """Note an attention of a forward itself where a call completes one, once in a call of the module."""
        if not self.stack:
            return
        frame = self.stack[-1]
        name = self.names[frame.module]
        done = self.comparisons.step(call, frame, name, call.mixes)
        if done is None or frame.compared:
            return
        frame.compared = True
        compared, explained = done
        before = self.seen.compared.setdefault(name, compared)
        if before == compared:
            for owner, operator in explained:
                self.seen.glue.get(owner, Counter())[operator.removeprefix("_")] -= 1

    def _mixed(self, name: str, behind: Place, call: Call) -> None:
        """Note an operator that mixes positions: the mean over all of them is a pooling that has a word."""
        module = self.stack[-1].module if self.stack else self.root
        if module in self.followed:
            return
        left = [d for d, n in enumerate(behind.position.shape) if n > 1 and behind.channel.shape[d] == 1]
        pooled = name == "mean" and not left and not behind.wild
        if pooled and module not in self.leaves:
            if not any(n in self.glued for n in names_of(module)):
                field = text(over(behind, range(behind.position.dim())), -1)
                self.seen.means[self.names[module]] = field, self._share(call.main("self").position)
        else:
            self._note(name)

    def _share(self, positions: Tensor) -> str:
        """How many of a module's positions there are, where they are not all."""
        given = self.stack[-1].position if self.stack else None
        mine, its = positions.flatten(), None if given is None else given.flatten()
        if its is None or mine.numel() >= its.numel() or not bool(torch.isin(mine, its).all()):
            return ""
        return f"of {mine.numel()} of its {its.numel()} positions"

    def _note(self, what: str) -> None:
        """Note an operation of a forward itself, unless that forward is known."""
        module = self.stack[-1].module if self.stack else self.root
        if not any(n in self.glued for n in names_of(module)):
            self.seen.glue.setdefault(self.names[module], Counter())[what.removeprefix("_")] += 1


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What is done within is no part of the run."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _folds(module: nn.Module, match: Match, x: Tensor) -> bool:
    """Whether a layer that looks everywhere is given several parts of the one input as a batch."""
    batch = 1 if isinstance(module, nn.MultiheadAttention) and not module.batch_first else 0
    everywhere = any(isinstance(part.path, All) for part in match.operation.parts)
    return everywhere and x.dim() > 2 and x.shape[batch] != 1

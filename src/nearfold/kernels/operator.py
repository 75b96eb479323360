"""`operator`: torch.library's custom operators, called directly where nobody listens to torch's dispatcher.

A call through the dispatcher takes about 20 microseconds of boxing, which a small layer pays several times. Plain CPU
tensors that no mode, transform, tracer, profiler or compiler watches do not need it: their result is the same. All
others get the registered operator.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from nearfold._kept import is_idle

P = ParamSpec("P")
R = TypeVar("R")

PLAIN = (Tensor, nn.Parameter)


def is_tensors(x: Any) -> bool:
    """Whether an argument is a list of tensors."""
    return isinstance(x, (list, tuple)) and len(x) > 0 and isinstance(x[0], Tensor)


def opened(values: Sequence[Any]) -> list[Any]:
    """Lists of tensors among the values, opened."""
    return [one for v in values for one in (v if is_tensors(v) else (v,))]


def lengths(values: Sequence[Any]) -> list[int | None]:
    """How many tensors are in each list of them; None for any other value. What `nested` undoes `opened` with."""
    return [len(v) if is_tensors(v) else None for v in values]


def nested(counts: Sequence[int | None], values: Iterable[Any]) -> tuple[Any, ...]:
    """Back into lists of so many."""
    rest = iter(values)
    return tuple(next(rest) if n is None else [next(rest) for _ in range(n)] for n in counts)


def unwatched(args: Sequence[Any]) -> bool:
    """Whether a call on these arguments may leave the dispatcher out: nothing would be seen or done on the way."""
    if not is_idle():
        return False
    for x in args:  # noqa: SIM110, a generator costs as much as the checks do
        if isinstance(x, Tensor) and (type(x) not in PLAIN or not x.is_cpu or x.is_neg()):
            return False
    return True


class Operator(Generic[P, R]):
    """An operator of torch.library that is made by `operator`. Called as its function is."""

    def __init__(self, name: str, body: Callable[P, R]) -> None:
        self.__doc__, self.__name__, self.__module__ = body.__doc__, body.__name__, body.__module__
        self.__wrapped__ = body
        self.registered = torch.library.custom_op(name, body, mutates_args=())
        self.register_fake = self.registered.register_fake
        self._body = body
        self._defaults = tuple(p.default for p in inspect.signature(body).parameters.values())
        self._function: Callable[..., R] | None = None
        takes, gives = torch.library.infer_schema(body, mutates_args=()).split(" -> ")
        self._takes_lists, self._gives_list = "Tensor[]" in takes, "Tensor[]" in gives

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As torch.library's: the gradient, for both ways of a call."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        run: Callable[..., R] = self._body

        def forward(ctx: Any, counts: list[int | None] | None, *args: Any) -> Any:
            ctx.counts_given = counts
            given = args if counts is None else nested(counts, args)
            with torch._C._AutoDispatchBelowAutograd():
                output = run(*given)
            setup_context(ctx=ctx, inputs=given, output=output)
            return tuple(output) if isinstance(output, list) else output  # autograd.Function sees into no list

        def backed(ctx: Any, *grads: Any) -> Any:
            made = backward(ctx, *grads)
            made = made if isinstance(made, tuple) else (made,)
            if ctx.counts_given is not None:
                each = zip(made, ctx.counts_given, strict=True)
                made = [g for m, n in each for g in ([m] if n is None else m or [None] * n)]
            return None, *made

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backed)}
        function: Any = type(f"{self.__name__}_direct", (torch.autograd.Function,), methods)
        self._function = function.apply

    def __call__(self, *args: P.args, **named: P.kwargs) -> R:
        """What the function returns."""
        each = opened(args) if self._takes_lists else args
        if named or not unwatched(each):
            made: R = self.registered(*args, **named)
            return made
        if self._function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*each):
            whole = (*args, *self._defaults[len(args) :])
            counts, operands = (lengths(whole), opened(whole)) if self._takes_lists else (None, whole)
            found: Any = self._function(counts, *operands)
            return list(found) if self._gives_list else found  # type: ignore[return-value]
        with torch._C._AutoDispatchBelowAutograd():
            return self._body(*args, **named)


@contextlib.contextmanager
def differentiated() -> Iterator[None]:
    """Within it autograd records, inside an operator, too: there torch has taken its keys out of the dispatcher."""
    keys, excluded = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradOther, keys.AutogradNestedTensor, keys.AutogradFunctionality):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def operator(name: str) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorator: the function becomes the operator ``name`` ("nearfold::select"), with the schema of its annotations.

    The function must not change its arguments nor return one of them, nor a view of one. As
    ``torch.library.custom_op`` (PyTorch, "Custom Python Operators"), which it is everywhere but in a plain call.

    >>> @operator("nearfold_example::twice")
    ... def twice(x: torch.Tensor) -> torch.Tensor:
    ...     return 2 * x
    >>> twice(torch.ones(2))
    tensor([2., 2.])
    """

    def made(body: Callable[P, R]) -> Operator[P, R]:
        return Operator(name, body)

    return made

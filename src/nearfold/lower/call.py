"""What every backend is handed: one `Basic` operation on one input, projected and padded.

Shape legend: B batch, C channels, H heads, d features of a head, N positions (padded grid), M outputs, a axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from nearfold.grammar import Basic
from nearfold.grammar.place import Place
from nearfold.grammar.similarity import Dot, Scaled, Similarity
from nearfold.kernels import cuda
from nearfold.kernels.names import LOW
from nearfold.lower.frame import Frame
from nearfold.lower.geometry import query_index
from nearfold.lower.meaning import meaning
from nearfold.lower.parameters import LETTERS


@dataclass
class Call:
    """One call of a `Basic` operation. ``query``, ``key``: (B, C, *padded) or None where no one reads them.

    ``at`` is what follows from sizes, ``x`` the input itself, ``mask`` which of the keys a query may read, or what is
    added to its scores, -inf where it may not (B|1, H|1, N, N'); None: every one. ``keep`` says which positions are
    there at all (B, N'); what is not is zero in ``x``, query, key and value.
    """

    at: Frame
    params: dict[str, Tensor]
    value: Tensor
    query: Tensor | None
    key: Tensor | None
    x: Tensor
    draw: Tensor | None = None
    mask: Tensor | None = None
    keep: Tensor | None = None
    _rows: Tensor | None = None

    def rows(self) -> Tensor:
        """The value as contiguous rows (B, N, C); made once, and shared with a query that is the same tensor."""
        if self._rows is None:
            self._rows = self.value.flatten(2).transpose(1, 2).contiguous()
        return self._rows

    @property
    def op(self) -> Basic:
        """The operation, as far as the map can fill it."""
        return self.at.op

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of queries, filled to whole blocks where `block` asks for it."""
        return self.at.grid

    @property
    def ndim(self) -> int:
        """Grid axes."""
        return len(self.at.grid)

    @property
    def heads(self) -> int:
        """Groups of channels that look on their own."""
        return self.at.heads

    @property
    def similarity(self) -> Similarity:
        """The similarity of the path."""
        return self.at.op.path.similarity

    @property
    def padded(self) -> tuple[int, ...]:
        """The grid that values and keys live on (and queries, but for `cross`)."""
        return self.at.padded

    @property
    def stride(self) -> tuple[int, ...]:
        """Output stride per axis."""
        return self.at.stride

    @property
    def out_grid(self) -> tuple[int, ...]:
        """Output grid."""
        return self.at.out_grid

    def query_index(self) -> Tensor:
        """Positions (M,) of the padded grid that `all` and `nearest` answer for."""
        return query_index(self.grid, self.at.padding, self.stride, self.value.device)

    def embedded(self) -> tuple[Tensor, Tensor]:
        """Query (B|1, H|1, N, e) and key for the similarity's metric, in float32 at least."""
        return self.similarity.embed(*self._features(rows=True), self.params)

    def ranked(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """Query and key for a search, and a factor of the scores, or one per head (H, 1, 1).

        The factor is positive and does not change who is nearest.
        """
        return self.similarity.embed_ranked(*self._features(rows=True), self.params)

    def compared(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """As `ranked`, for the search that is fast.

        bfloat16 and float16 stay what they are where the device multiplies them as they are, with
        sums in float32.
        """
        plain = self.value.dtype in LOW and self.similarity in (Dot(), Scaled())
        if not plain or cuda.kernels("select", self.value) is None:
            return self.ranked()
        assert self.query is not None and self.key is not None
        query = split_heads(self.query, self.heads)
        key = query if self.key is self.query else split_heads(self.key, self.heads)
        return query, key, query.shape[-1] ** -0.5 if self.similarity == Scaled() else 1.0

    def embedded_differences(self) -> tuple[Tensor, Tensor, float]:
        """As `embedded`, and a factor of the scores, for softmax; views where they can be."""
        return self.similarity.embed_differences(*self._features(rows=False), self.params)

    def _features(self, rows: bool) -> tuple[Tensor, Tensor, Place]:
        """Query and key (B, H, N, d) and where they are; ``rows``: share `rows` with a value that is the same."""
        like = self.value
        dtype = torch.promote_types(like.dtype, torch.float32)
        place = Place(self.padded, like.device, dtype)
        if not self.similarity.uses_features:
            empty = torch.empty(1, 1, 0, 0, device=like.device, dtype=dtype)
            return empty, empty, place
        assert self.query is not None and self.key is not None
        if rows and self.query is self.value and self.heads == 1:
            query = self.rows()[:, None].to(dtype)
        else:
            query = split_heads(self.query, self.heads).to(dtype)
        return query, query if self.key is self.query else split_heads(self.key, self.heads).to(dtype), place


_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
Run = Callable[[Call], Tensor]
"""What a backend does with a call: (B, O, *out_grid)."""


def count_positions(grid: tuple[int, ...]) -> int:
    """Positions of a grid."""
    total = 1
    for n in grid:
        total *= n
    return total


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp ...) is at work on one of the tensors."""
    if torch.compiler.is_compiling() or not _functorch.maybe_current_level():
        return False
    return any(_functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def _in_reverse_mode(x: Tensor) -> bool:
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def derivative_of(*tensors: Tensor) -> str:
    """How a derivative is being taken that our operators cannot give, in words; empty where none is.

    What they give is reverse mode as torch.autograd records it. torch.func.vmap alone works: it calls them in a loop.
    """
    if torch.compiler.is_compiling():
        return ""
    if forward_ad._current_level < 0 and not _functorch.maybe_current_level():
        return ""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return "forward-mode differentiation (torch.func.jvp)"
    if any(map(_in_reverse_mode, tensors)):
        return "differentiation by torch.func (grad, vjp, jacrev)"
    return ""


def refuse_trace(name: object) -> None:
    """NotImplementedError under torch.jit.trace, which does not know operators of other libraries."""
    if torch.jit.is_tracing():
        raise NotImplementedError(
            f"{name}: torch.jit.trace (TensorBoard's add_graph) cannot record its operators; use torch.export.export, "
            "or, for inputs of one size, trace it with backend='oracle'"
        )


def refuse_derivatives(call: Call) -> None:
    """NotImplementedError under a derivative that our operators answer with zero, or with an error of torch's own."""
    refuse_trace(call.op)
    if how := derivative_of(call.value, *call.params.values()):
        instead = "" if "forward" in how else ", or differentiate with torch.autograd.grad"
        raise NotImplementedError(f"{call.op}: {how} runs on the oracle only; pass backend='oracle'{instead}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would run a convolution of x in; None where it is off."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, C, *grid) -> (B, H, N, d)."""
    x = x if x.dim() == 3 else x.flatten(2)
    return x.unflatten(1, (heads, x.shape[1] // heads)).transpose(2, 3)


def pointwise(x: Tensor, weight_oc: Tensor, bias_o: Tensor | None, planes: bool = False) -> Tensor:
    """A pointwise map of the channels: (B, C, *grid) -> (B, O, *grid). ``planes``: into maps, not rows of channels."""
    if planes and x.is_contiguous():
        if x.dim() in _CONV and torch.compiler.is_exporting():  # where quantisers look for weights
            return _CONV[x.dim()](x, weight_oc[(..., *(None,) * (x.dim() - 2))], bias_o)
        x_BCN, weight_BOC = x.flatten(2), weight_oc.expand(x.shape[0], -1, -1)
        if bias_o is None:
            return torch.bmm(weight_BOC, x_BCN).view(x.shape[0], weight_oc.shape[0], *x.shape[2:])
        # expanded over the batch first: the gradient then sums along rows, and only then over the batch
        y = torch.baddbmm(bias_o[:, None].expand(x.shape[0], -1, 1), weight_BOC, x_BCN)
        return y.view(x.shape[0], weight_oc.shape[0], *x.shape[2:])
    if x.dim() == 3:  # a sequence: every view costs a microsecond or more
        return F.linear(x.transpose(1, 2), weight_oc, bias_o).transpose(1, 2)
    y = F.linear(x.flatten(2).transpose(1, 2), weight_oc, bias_o)
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


def project(op: Basic, letter: str, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """f_Q, f_K or f_V of the input: learned, or the identity."""
    if letter not in op.weight.projections:
        return x
    name = LETTERS[letter]
    return pointwise(x, params[f"{name}_weight"], params.get(f"{name}_bias"), meaning(op.path).planes)

"""How cases are made: layers, their peers, inputs. Which ones are run, at what size, is `cases.CASES`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import optional, peers
from benchmarks.case import Case, Forward, Peer
from nearfold.kernels import engine
from nearfold.kernels.select import select
from nearfold.nn import ACmix2d, ConvNN2d, ConvNNAttention, KVTAttention, Mixer, TokenMixer
from nearfold.nn import knn_attention as ours_knn_attention

SAMPLE = 512  # queries that are checked where the scores of all would not fit
PYTORCH_PATH = "nearfold (PyTorch path)"
Shape = tuple[int, ...]


def _optional(make: Callable[[], Forward], absent: dict[str, str], name: str) -> Forward | None:
    """A peer's forward, or None with the reason noted."""
    try:
        return make()
    except ImportError as error:
        absent[name] = f"not installed ({error})"
    except Exception as error:  # a compiler that is missing or fails has many faces
        absent[name] = f"does not run here ({type(error).__name__})"
    return None


def _with_path(forward: Forward, found: dict[str, Peer], wanted: bool = True) -> dict[str, Peer]:
    """The peers, and before them ours without the compiled engine, where there is one."""
    wanted = wanted and engine.get() is not None
    return ({PYTORCH_PATH: Peer(forward, engine=False)} if wanted else {}) | found


def knn_attention(shape: Shape, k: int, naive: str = "timed", pytorch_path: bool = True) -> Case:
    """The core: query, key and value (B, H, N, d).

    The naive formulation is "timed" as well, only "checks", or only "samples": it checks the outputs of some queries,
    and all gradients that come from them, where its scores of all queries would not fit into memory.
    """
    inputs = tuple(torch.randn(3, *shape).unbind())
    chosen = torch.randperm(shape[2])[:SAMPLE]
    whole = {"naive": Peer(lambda q, key, v: peers.naive_knn_attention(q, key, v, k), timed=naive == "timed")}
    sampled = Peer(
        lambda q, key, v: torch.zeros_like(q).index_copy(2, chosen, whole["naive"].forward(q[:, :, chosen], key, v)),
        timed=False,
        part=lambda y, *_: y[:, :, chosen],
    )
    found = {f"naive, {SAMPLE} queries": sampled} if naive == "samples" else whole
    found["SDPA"] = Peer(F.scaled_dot_product_attention, same=False)
    ours = lambda q, key, v: ours_knn_attention(q, key, v, k)  # noqa: E731
    return Case(inputs, ours, _with_path(ours, found, pytorch_path))


def convnn(shape: Shape, k: int, conv: bool = True, pytorch_path: bool = True) -> Case:
    """ConvNN2d with as many channels out as in."""
    layer, plain = ConvNN2d(shape[1], shape[1], k), nn.Conv2d(shape[1], shape[1], 3, padding=1)
    found = {"naive": Peer(lambda x: peers.naive_convnn(layer, x))}
    if conv:
        found["nn.Conv2d 3x3"] = Peer(plain, same=False)
    return Case((torch.randn(shape),), layer, _with_path(layer, found, pytorch_path), module=layer, others=(plain,))


def convnn_random(shape: Shape, k: int, r: int) -> Case:
    """ConvNN2d that searches r drawn positions: both draw the same ones."""
    layer = ConvNN2d(shape[1], shape[1], k, candidates=f"random({r})").train()
    sampler = layer.sampler
    assert sampler is not None
    found = {"naive": Peer(lambda x: peers.naive_convnn_random(layer, x, r))}

    def rewind() -> None:
        sampler[1] = 0  # draws so far

    return Case((torch.randn(shape),), layer, _with_path(layer, found), module=layer, before=rewind)


def _dense_attention(shape: Shape, heads: int) -> tuple[nn.MultiheadAttention, Forward]:
    dense = nn.MultiheadAttention(shape[2], heads, batch_first=True)
    return dense, lambda x: dense(x, x, x, need_weights=False)[0]


def convnn_attention(shape: Shape, heads: int, k: int) -> Case:
    """ConvNNAttention as a module."""
    layer = ConvNNAttention(shape[2], heads, k)
    with torch.no_grad():
        layer.tensors()["weight"].normal_()  # it starts as ones, which many a mistake would survive
    dense, attend = _dense_attention(shape, heads)
    found = {
        "naive": Peer(lambda x: peers.naive_convnn_attention(layer, x, k, heads)),
        "nn.MultiheadAttention": Peer(attend, same=False),
    }
    return Case((torch.randn(shape),), layer, _with_path(layer, found), module=layer, others=(dense,))


def kvt(shape: Shape, heads: int, k: int) -> Case:
    """KVTAttention as a module."""
    layer = KVTAttention(shape[2], heads, k)
    dense, attend = _dense_attention(shape, heads)
    found = {
        "naive": Peer(lambda x: peers.naive_kvt(layer, x, k, heads)),
        "nn.MultiheadAttention": Peer(attend, same=False),
    }
    return Case((torch.randn(shape),), layer, _with_path(layer, found), module=layer, others=(dense,))


def acmix(shape: Shape, window: int, heads: int) -> Case:
    """ACmix2d with as many channels out as in."""
    layer, plain = ACmix2d(shape[1], shape[1], window, 3, heads), nn.Conv2d(shape[1], shape[1], 3, padding=1)
    found = {
        "unfold": Peer(lambda x: peers.unfold_acmix(layer, x, window, heads)),
        "nn.Conv2d 3x3": Peer(plain, same=False),
    }
    return Case((torch.randn(shape),), layer, _with_path(layer, found), module=layer, others=(plain,))


def neighbourhood(shape: Shape, window: int, heads: int, compiled: bool = True) -> Case:
    """Attention in a window, projections included."""
    layer, x = Mixer(f"window({window}) | box | softmax(heads={heads})", shape[1]), torch.randn(shape)
    found = {"unfold": Peer(lambda x: peers.unfold_neighbourhood(layer, x, window, heads))}
    absent: dict[str, str] = {}
    name = "FlexAttention" + (", compiled" if compiled else "")
    flex = _optional(lambda: optional.flex_neighbourhood(layer, x, window, heads, compiled), absent, name)
    if flex is not None:
        found[name] = Peer(flex, backward=False, dtype=torch.float32)
    reach = window // 2
    # NATTEN moves the window inside at the border, Nearfold masks: only positions further inside compute the same
    inside = lambda y, *_: y[:, :, reach:-reach, reach:-reach]  # noqa: E731
    name = "NATTEN na2d"
    na2d = _optional(lambda: optional.natten_neighbourhood(layer, x, window, heads), absent, name)
    if na2d is not None:
        found[name] = Peer(na2d, backward=False, dtype=torch.float32, part=inside)
    return Case((x,), layer, _with_path(layer, found), absent, module=layer)


def search(shape: Shape, k: int) -> Case:
    """`nearfold::select` alone: the nearest of N keys for each of N queries, (N, d) both."""
    N = shape[0]
    at = torch.arange(N)

    def ours(query: Tensor, key: Tensor) -> Tensor:
        q, near = query[None, None], key[None, None]
        return select(q, near, k, "euclidean", False, at, at, [N], [0, -1, 1], False, 0.0)[1][0, 0]

    def distances(index: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Which neighbours were found shows in how far they are: equal ones may be exchanged."""
        return (query[:, None].double() - key[index].double()).norm(dim=-1).sort(-1).values

    found = {
        "torch addmm + topk": Peer(lambda q, x: peers.addmm_topk(q, x, k), backward=False, part=distances),
        "torch cdist + topk": Peer(lambda q, x: peers.cdist_topk(q, x, k), backward=False, part=distances),
    }
    absent: dict[str, str] = {}
    for name, make in (("scikit-learn brute", optional.sklearn_search), ("FAISS IndexFlatL2", optional.faiss_search)):
        forward = _optional(lambda make=make: make(k), absent, name)  # type: ignore[misc]
        if forward is not None:
            found[name] = Peer(forward, backward=False, dtype=torch.float32, part=distances, allocator=False)
    return Case((torch.randn(shape), torch.randn(shape)), ours, _with_path(ours, found), absent, backward=False)


def conv_tax(shape: Shape) -> Case:
    """A convolution written in the grammar."""
    layer, plain = Mixer("window(3) | box | kernel", shape[1]), nn.Conv2d(shape[1], shape[1], 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    peer = Peer(plain, gradients=lambda: {n: p.grad for n, p in plain.named_parameters() if p.grad is not None})
    return Case((torch.randn(shape),), layer, {"nn.Conv2d 3x3": peer}, module=layer, others=(plain,))


def attention_tax(shape: Shape, heads: int) -> Case:
    """Attention written in the grammar."""
    layer = TokenMixer(f"all | row | softmax(heads={heads})", shape[2])
    dense = peers.attention_module(layer, shape[2], heads)
    peer = Peer(
        lambda x: dense(x, x, x, need_weights=False)[0], gradients=lambda: peers.attention_module_gradients(dense)
    )
    return Case((torch.randn(shape),), layer, {"nn.MultiheadAttention": peer}, module=layer, others=(dense,))

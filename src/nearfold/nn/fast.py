"""Fast weights over tokens (B, N, D): matrices that every token writes and reads.

Each is the recurrence between a value and an output map. The short convolutions in front of query, key and value, and
the norm and the gate between recurrence and output map, which the papers' blocks have, stand around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nearfold._numbers import flag, integer
from nearfold.grammar import Basic, Weight
from nearfold.grammar.words import MLSTM as MLSTMWord
from nearfold.grammar.words import RWKV7 as RWKV7Word
from nearfold.grammar.words import Additive, Causal, Delta, FastWeights, Scan
from nearfold.nn.mixer import TokenMixer


def _operation(
    embed_dim: int,
    num_heads: int,
    state: int | None,
    reverse: bool,
    rho: Callable[..., FastWeights],
    **arguments: object,
) -> Basic:
    """The recurrence between its two maps; ValueError where the heads do not part the channels."""
    integer("embed_dim", embed_dim)
    integer("num_heads", num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
    path = Scan(embed_dim // num_heads if state is None else state, reverse=reverse)
    return Basic(path, Causal(), Weight(rho(num_heads, "vo", **arguments)))


class _FastWeights(TokenMixer):
    """The layer of one rho; see `DeltaNet`."""

    _rho: Callable[..., FastWeights]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        state: int | None = None,
        *,
        reverse: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = _operation(embed_dim, num_heads, state, reverse, self._rho)
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class DeltaNet(_FastWeights):
    """The delta rule: every token replaces a share of what is held under its key: (B, N, D) -> (B, N, D).

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and y_t = S_t^T q_t / sqrt(state); keys and queries are unit
    vectors.

    Args:
        embed_dim: D.
        num_heads: heads; each holds a matrix of ``state`` times D / heads numbers.
        state: features of a head's query and key; default D / heads.
        reverse: from the last token to the first.
        bias: biases on the value and the output map.
        backend: "auto", or a backend's name.

    Raises:
        ValueError: where num_heads does not divide embed_dim.

    Sources: arXiv 2102.11174; 2406.06484 (in parallel).

    >>> import torch
    >>> DeltaNet(32, 4)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    _rho = staticmethod(Delta)


class GatedDeltaNet(_FastWeights):
    """The delta rule on a state that decays by one number of each head: (B, N, D) -> (B, N, D).

    S_t = decay_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, with the decay made of the token as in Mamba-2. The
    mixer of Qwen3-Next. Arguments as in `DeltaNet`.

    Source: arXiv 2412.06464.

    >>> import torch
    >>> GatedDeltaNet(32, 4, state=16)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    _rho = staticmethod(partial(Delta, decay="head"))


class KimiDeltaAttention(_FastWeights):
    """`GatedDeltaNet` with a decay for each feature of the key: (B, N, D) -> (B, N, D).

    Arguments as in `DeltaNet`. Source: arXiv 2510.26692.

    >>> import torch
    >>> KimiDeltaAttention(32, 4)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    _rho = staticmethod(partial(Delta, decay="channel"))


class Retention(TokenMixer):
    """Linear attention that forgets at a fixed rate of each head: (B, N, D) -> (B, N, D).

    y_i = sum over j <= i of gamma^(i - j) (q_i . k_j) v_j / sqrt(state), gamma = 1 - 2^(-5 - h) in head h, pairs of
    features turned by their time. The norms that the public code divides scores by are left out: the group norm behind
    undoes them.

    Args:
        embed_dim: D.
        num_heads: heads; each holds a matrix of ``state`` times D / heads numbers.
        state: features of a head's query and key, an even number; default D / heads.
        gated: the decay of a head is made of the token instead (gated retention).
        reverse: from the last token to the first.
        bias: biases on the value and the output map.
        backend: "auto", or a backend's name.

    Raises:
        ValueError: where num_heads does not divide embed_dim, or state is odd.

    Sources: arXiv 2307.08621; 2405.05254 (gated).

    >>> import torch
    >>> Retention(32, 4)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        state: int | None = None,
        *,
        gated: bool = False,
        reverse: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        decay = "head" if flag("gated", gated) else "fixed"
        operation = _operation(embed_dim, num_heads, state, reverse, Additive, decay=decay)
        super().__init__(operation, embed_dim, bias=bias, backend=backend)


class GatedLinearAttention(_FastWeights):
    """Linear attention with a decay for each feature of the key, made of the token: (B, N, D) -> (B, N, D).

    S_t = diag(decay_t) S_{t-1} + k_t v_t^T and y_t = S_t^T q_t / sqrt(state). Arguments as in `DeltaNet`.

    Source: arXiv 2312.06635.

    >>> import torch
    >>> GatedLinearAttention(32, 4, state=4)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    _rho = staticmethod(partial(Additive, decay="channel"))


class MLSTM(_FastWeights):
    """The matrix memory of xLSTM, with exponential input gates: (B, N, D) -> (B, N, D).

    C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t and y_t = C_t^T q_t / max(|n_t . q_t|, 1), in a form
    that no gate overflows; k is divided by sqrt(state). Its output gate stands behind it. Arguments as in `DeltaNet`.

    Source: arXiv 2405.04517.

    >>> import torch
    >>> MLSTM(32, 4)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    _rho = staticmethod(MLSTMWord)


class RWKV7(TokenMixer):
    """RWKV-7's recurrence: the delta rule with a decay and a learning rate for each feature: (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        num_heads: heads; each holds a matrix of ``state`` times D / heads numbers.
        state: features of a head's query and key; default D / heads.
        rank: of the maps that make decays and rates.
        reverse: from the last token to the first.
        bias: biases on the value and the output map.
        backend: "auto", or a backend's name.

    Raises:
        ValueError: where num_heads does not divide embed_dim.

    Its shift of tokens, the mixture with the first layer's values, and the norm and the gate stand around it. Source:
    arXiv 2503.14456.

    >>> import torch
    >>> RWKV7(32, 4, rank=8)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        state: int | None = None,
        *,
        rank: int = 32,
        reverse: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        operation = _operation(embed_dim, num_heads, state, reverse, RWKV7Word, rank=rank)
        super().__init__(operation, embed_dim, bias=bias, backend=backend)

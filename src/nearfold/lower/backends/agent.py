"""`agent`: agents attend to all positions, and all positions to the agents: F.scaled_dot_product_attention, twice.

Shape legend: B batch, H heads, N positions, P agents, e features of a head.
"""

from __future__ import annotations

from torch import Tensor

from nearfold.grammar import Basic
from nearfold.grammar.words import Agent
from nearfold.kernels.attention import attention
from nearfold.lower.backends.pooled import means
from nearfold.lower.call import Call, split_heads
from nearfold.lower.verdict import Facts, Verdict

NAME = "agent"


def supports(facts: Facts) -> Verdict:
    """Rho agent on up to three axes."""
    if not isinstance(facts.op.weight.rho, Agent):
        return Verdict.no(f"rho is {facts.op.weight.rho.word}, not agent")
    if facts.ndim > 3:
        return Verdict.no(f"torch pools 1 to 3 axes, not {facts.ndim}")
    return Verdict.yes("F.scaled_dot_product_attention of the agents, then to the agents", "roundoff")


def takes_keys(op: Basic) -> bool:
    """Whether it heeds a mask of the keys."""
    return True


def run(call: Call) -> Tensor:
    """(B, C, *grid)."""
    rho = call.op.weight.rho
    assert isinstance(rho, Agent) and call.query is not None and call.key is not None
    pooled, there = means(call, call.query, rho.size, True)
    query, agents, key, value = (split_heads(t, call.heads) for t in (call.query, pooled, call.key, call.value))
    heard = attention(agents, key, value, None if call.keep is None else call.keep[:, None, None])
    y = attention(query, agents, heard, there)
    if there is not None:  # where nobody is
        y = y.masked_fill(~there.any(-1, True), 0)
    return y.transpose(2, 3).flatten(1, 2).unflatten(2, call.grid)

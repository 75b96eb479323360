"""Successive halving: many train briefly, the best of them longer (arXiv 1502.07943), generation by generation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nearfold.study.search.budget import Networks, OverBudget
from nearfold.study.search.layers import LayerNetworks
from nearfold.study.search.propose import Proposal, Proposer
from nearfold.study.search.runs import Config, Runs

KEPT = 3
"""One of so many goes on to the next rung, which is so many times as long."""
PATIENCE = 30
"""Proposals for each network of a generation, at most: later on most have been tried before."""


def rungs(epochs: int, count: int = 3) -> tuple[int, ...]:
    """The lengths of the runs, in epochs: the last is the whole recipe.

    >>> rungs(12), rungs(2)
    ((1, 4, 12), (1, 2))
    """
    return tuple(sorted({max(1, round(epochs / KEPT**i)) for i in range(count)}))


@dataclass
class Tried:
    """An operation that was trained: its network, validation accuracy by epochs of its runs, latency if measured."""

    notation: str
    network: Config
    values: dict[int, float] = field(default_factory=dict)
    latency_ms: float | None = None

    @property
    def rank(self) -> tuple[int, float]:
        """Who came further is before who did not; then validation accuracy."""
        last = max(self.values, default=0)
        return last, self.values.get(last, 0.0)


@dataclass
class Halving:
    """The generations of a search.

    Attributes:
        proposer: who proposes.
        networks: around the operations.
        runs: who trains.
        epochs: of the rungs, the shortest first.
        seed: of every run.
        tried: what was trained so far, by notation, the known operations included.
        refused: proposals that were not trained, by reason.
    """

    proposer: Proposer
    networks: Networks | LayerNetworks
    runs: Runs
    epochs: tuple[int, ...]
    seed: int = 0
    tried: dict[str, Tried] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    def generation(self, count: int, name: str, say: Callable[[str], None]) -> list[Tried]:
        """Propose at most `count` operations that were never tried, halve them, and tell what they came to.

        Returns:
            Those that were trained; none where nothing new was proposed.
        """
        asked = self._ask(count)
        going = [tried for _, tried in asked]
        for rung, epochs in enumerate(self.epochs):
            if rung:
                going = sorted(going, key=lambda tried: -tried.rank[1])[: math.ceil(len(going) / KEPT)]
            self._train(going, epochs)
            going = [tried for tried in going if epochs in tried.values]
            if not going:
                break
            best = max(going, key=lambda tried: tried.values[epochs])
            say(
                f"{name}, {len(going)} x {epochs} epochs: best {100 * best.values[epochs]:.1f} % of the validation "
                f"images, {best.notation}"
            )
        for proposal, tried in asked:
            self.proposer.tell(proposal, tried.values, whole=self.epochs[-1] in tried.values)
        return [tried for _, tried in asked]

    def _train(self, going: Sequence[Tried], epochs: int) -> None:
        results = self.runs.train("search", [tried.network for tried in going], epochs, [self.seed])
        for tried, result in zip(going, results, strict=True):
            if self.seed in result:
                tried.values[epochs] = result[self.seed]["val_accuracy"]

    def _ask(self, count: int) -> list[tuple[Proposal, Tried]]:
        """New operations that fit the budget; what is refused is told at once, and counted."""
        found: list[tuple[Proposal, Tried]] = []
        for _ in range(PATIENCE * count):
            if len(found) == count:
                break
            proposal = self.proposer.ask()
            why, tried = self._look(proposal)
            if tried is None:
                self.refused[why] += 1
                self.proposer.tell(proposal, {}, whole=False)
                continue
            self.tried[proposal.notation] = tried
            found.append((proposal, tried))
        return found

    def _look(self, proposal: Proposal) -> tuple[str, Tried | None]:
        """Why a proposal is not trained, or what is to be trained."""
        if proposal.refused:
            return "refused by the grammar", None
        if proposal.notation in self.tried:
            return "tried before", None
        try:
            network = self.networks.around(proposal.notation)
        except OverBudget:
            return "over the budget", None
        except ValueError:
            return self.networks.unfit, None
        budget = self.networks.budget
        tried = Tried(proposal.notation, network)
        if budget.measured:
            cost = self.runs.costs([network])[0]
            if cost is None or cost["latency_ms"] > budget.most:
                return "over the budget", None
            tried.latency_ms = cost["latency_ms"]
        return "", tried

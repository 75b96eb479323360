"""Who proposes: Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) over the space.

It keeps nothing on disk. Given the same answers in the same order it proposes the same, so that a search that was
killed is asked and told again from the runs that have finished.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nearfold.study.search.layers import LayerSpace
from nearfold.study.search.space import Space, Value

STEP = 0.15
"""Share of the choices that are drawn anew for every time in a row that what was proposed is not new."""
STEPS = 30
"""Times in a row, at most."""


@dataclass
class Proposal:
    """An operation that was proposed; ``notation`` is empty where the grammar refuses it, and ``refused`` says why."""

    notation: str
    refused: str
    trial: Any = field(repr=False)


class Proposer:
    """Proposes operations of a space, and learns from what they come to.

    The estimator proposes what it holds best, and that again and again. An operation that was proposed before is
    changed, a few choices at random and more of them every time, until it is a new one.

    Args:
        space: of the operations.
        seed: of what it draws.
        first: so many answers are awaited, those of `know` included, before it guides what it draws.

    Raises:
        ImportError: Optuna is not installed.
    """

    def __init__(self, space: Space | LayerSpace, seed: int = 0, first: int = 10) -> None:
        optuna = _optuna()
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=first)
            self._study: Any = optuna.create_study(direction="maximize", sampler=sampler)
        finally:
            optuna.logging.set_verbosity(before)
        self._space, self._random = space, random.Random(seed)
        self._known: set[str] = set()
        self._states = optuna.trial.TrialState

    def know(self, notation: str, values: Mapping[int, float]) -> bool:
        """Learn from an operation that nobody proposed; False where it lies outside the space.

        Args:
            notation: of the operation.
            values: validation accuracy by epochs of the runs it had, the last of them at full length.
        """
        parameters = self._space.parameters(notation)
        if parameters is None:
            return False
        import optuna

        among: dict[str, optuna.distributions.BaseDistribution] = {}

        def follow(name: str, choices: Sequence[Value]) -> Value:
            among[name] = optuna.distributions.CategoricalDistribution(tuple(choices))
            return parameters[name]

        self._space.draw(follow)
        trial = optuna.trial.create_trial(
            params={name: parameters[name] for name in among}, distributions=among, value=values[max(values)],
            intermediate_values=dict(values),
        )  # fmt: skip
        self._study.add_trial(trial)
        self._known.add(notation)
        return True

    def ask(self) -> Proposal:
        """The next operation: a new one, unless there is none near by."""
        proposal = self._asked()
        for step in range(1, STEPS + 1):
            if proposal.notation not in self._known:
                break
            self.tell(proposal, {}, whole=False)
            self._study.enqueue_trial(self._changed(proposal.trial.params, min(1.0, step * STEP)))
            proposal = self._asked()
        if proposal.notation:
            self._known.add(proposal.notation)
        return proposal

    def _asked(self) -> Proposal:
        trial = self._study.ask()
        try:
            return Proposal(self._space.draw(trial.suggest_categorical), "", trial)
        except ValueError as error:
            return Proposal("", str(error), trial)

    def _changed(self, choices: Mapping[str, Value], share: float) -> dict[str, Value]:
        """The choices, such a share of them drawn anew, and what then has to be chosen besides."""
        found: dict[str, Value] = {}

        def follow(name: str, among: Sequence[Value]) -> Value:
            keeps = choices.get(name) in among and self._random.random() >= share
            found[name] = choices[name] if keeps else self._random.choice(list(among))
            return found[name]

        with contextlib.suppress(ValueError):  # the grammar refuses it: so it will when it is asked
            self._space.draw(follow)
        return found

    def tell(self, proposal: Proposal, values: Mapping[int, float], whole: bool) -> None:
        """Say what a proposal came to: one that came further is better than one that was left behind.

        Args:
            proposal: from `ask`.
            values: validation accuracy by epochs; none: nothing can be learned from it.
            whole: whether the last run was one at full length.
        """
        for epochs, value in values.items():
            proposal.trial.report(value, epochs)
        if not values:
            self._study.tell(proposal.trial, state=self._states.FAIL)
        elif whole:
            self._study.tell(proposal.trial, values[max(values)])
        else:
            self._study.tell(proposal.trial, state=self._states.PRUNED)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("nearfold search needs Optuna: pip install optuna") from error
    return optuna

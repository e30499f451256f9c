"""Outer rules: with which coefficients a merged delta g moves the parameters θ. Decisions; tensors/outer.py computes.

Every rule is a case of one step over θ and at most one momentum m:

    m ← decay·m + intake·g
    θ ← θ − (gain·g + pull·m)

and decides on the four numbers anew for each step. They stand in its `Stepped` record, so whatever a rule looks at when
it decides, replaying the log needs nothing of it. η is the run's outer learning rate, μ its momentum.
"""

from typing import NamedTuple, Protocol

from hetero_async.core.records import RunSettings
from hetero_async.core.state import State


class Coefficients(NamedTuple):
    decay: float
    intake: float
    gain: float
    pull: float


class OuterRule(Protocol):
    name: str

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        """Of the step that would be made of all that is pending."""
        ...


class Sgd:
    """θ ← θ − ηg. For codecs whose error feedback is a momentum already. 4 bytes a parameter."""

    name = "sgd"

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        return Coefficients(decay=0.0, intake=0.0, gain=settings.outer_learning_rate, pull=0.0)


class Nesterov:
    """m ← μm + g; θ ← θ − η(g + μm). DiLoCo's outer optimizer (Douillard et al. 2023, arXiv 2311.08105), the same as
    torch.optim.SGD(nesterov=True): a constant g moves θ by η/(1−μ) in the long run. 8 bytes a parameter."""

    name = "nesterov"

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        eta, mu = settings.outer_learning_rate, settings.momentum
        return Coefficients(decay=mu, intake=1.0, gain=eta, pull=eta * mu)


class Lookahead:
    """m ← μm + (1−μ)g; θ ← θ − η(g + μm). Momentum look-ahead, with an averaged momentum (Ajanthan et al. 2025): a
    constant g moves θ by η(1+μ) in the long run, so η need not shrink with small steps. 8 bytes a parameter."""

    name = "lookahead"

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        eta, mu = settings.outer_learning_rate, settings.momentum
        return Coefficients(decay=mu, intake=1.0 - mu, gain=eta, pull=eta * mu)


class DelayedNesterov:
    """Momentum that is used once in a turn of N steps, N being the number of workers: with a step for each push it is
    what `nesterov` is with a step for each round (Liu et al. 2024, arXiv 2401.09135, algorithm 3 with c = 0).

    The sum of a turn's deltas is gathered in m itself, for m is not looked at before the turn ends: the first step of a
    turn lets it decay, each adds to it, the last is pulled by it. g is the push's share of a round's mean already,
    Δ/N in the paper. Merges of whole rounds are turns of one step. 8 bytes a parameter.
    """

    name = "delayed-nesterov"

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        eta, mu = settings.outer_learning_rate, settings.momentum
        turn = max(1, len(state.active)) if settings.merge == "per-push" else 1
        is_first, is_last = state.version % turn == 0, (state.version + 1) % turn == 0
        return Coefficients(decay=mu if is_first else 1.0, intake=1.0, gain=eta, pull=eta * mu if is_last else 0.0)


RULES: dict[str, OuterRule] = {rule.name: rule for rule in (Nesterov(), Lookahead(), DelayedNesterov(), Sgd())}

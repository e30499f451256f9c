"""Outer rules: with which coefficients a merged delta g moves the parameters θ. Decisions; tensors/outer.py computes.

Every rule is a case of one step over θ and at most one momentum m:

    m ← decay·m + intake·g
    θ ← θ − (gain·g + pull·m)

and decides on the four numbers anew for each step. They stand in its `Stepped` record, so whatever a rule looks at when
it decides, replaying the log needs nothing of it. η is the run's outer learning rate, μ its momentum.
"""

from typing import NamedTuple

from hetero_async.core.records import RunSettings
from hetero_async.core.state import State


class Coefficients(NamedTuple):
    decay: float
    intake: float
    gain: float
    pull: float


class OuterRule:
    """What a rule decides, from the state and the settings alone."""

    name: str

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        """Of the step that is made of all that is pending."""
        raise NotImplementedError


# Merges in which the momentum of `auto` comes to half of its strength.
RAMP_ROUNDS = 3
# These leave so much for later pushes that their error feedback is a momentum by itself.
CODECS_WITH_MOMENTUM = frozenset({"topk"})


class Auto(OuterRule):
    """Nesterov with η = 1 and a momentum that follows the run: μ = min(1 − 1/K, t/(t + 3)) at merge t of K workers.

    Nothing here is to be tuned, for nothing depends on the model, the length of a round or the inner learning rate:

    - η = 1: what a round moved all its workers by, it moves the parameters by. Whatever one round brings into balance
      (the steep directions of the loss) is in balance after the merge, neither short of it nor beyond.
    - 1/(1 − μ) = K: a direction that persists, in which no single round gets far, is followed in the long run by the
      sum of all workers' progress instead of its mean. That is the linear scaling of a batch that is K times larger
      (Goyal et al. 2017, arXiv 1706.02677), reached by momentum, so that only what merges have in common is scaled. One
      worker alone trains as if nobody merged anything.
    - A merge with deltas of m < K workers is s = m/K of a round: m ← μˢm + (1 − μˢ)/(1 − μ)·g; θ ← θ − s(g + μm). A
      direction that persists is followed by the sum of those workers' progress, and whoever comes alone, as the last
      ones of a run do, moves the parameters by a share of what all would.
    - t/(t + 3): the first deltas are long and nearly parallel, and momentum would carry them far beyond where they
      lead; Goyal et al. warm up for the same reason.
    - Where deltas are L merges old, the momentum pulls 1/(1 + L) as hard. Workers answer what it has carried too far in
      a steep direction only after it has pulled there once more, so with all of it such directions swing for long, and
      ever wider where weights add up to more than 1 (`tokens` of unequal workers); with half of it at L = 1 they die
      out. What lasts is followed by (K + L)/(1 + L) rounds' progress.

    A step for each push is made of turns, as in `delayed-nesterov`. 8 bytes a parameter.
    """

    name = "auto"

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        mu, turn = self._momentum(state, settings), _steps_per_round(state, settings)
        merged = len({delta.worker for delta in state.pending.values() if delta.steps})
        share = min(1.0, merged * turn / max(1, len(state.active)))
        step = _in_turns(state, settings, 1.0, mu)
        return Coefficients(
            decay=step.decay**share,
            intake=(1.0 - mu**share) / (1.0 - mu),
            gain=share,
            pull=share * step.pull / (1.0 + state.lag / turn),
        )

    def _momentum(self, state: State, settings: RunSettings) -> float:
        if settings.codec_up in CODECS_WITH_MOMENTUM:
            return 0.0
        merges = state.version // _steps_per_round(state, settings)
        return min(1.0 - 1.0 / max(1, len(state.active)), merges / (merges + RAMP_ROUNDS))


class Sgd(OuterRule):
    """θ ← θ − ηg. For codecs whose error feedback is a momentum already. 4 bytes a parameter."""

    name = "sgd"

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        return Coefficients(decay=0.0, intake=0.0, gain=settings.outer_learning_rate, pull=0.0)


class Nesterov(OuterRule):
    """m ← μm + g; θ ← θ − η(g + μm). DiLoCo's outer optimizer (Douillard et al. 2023, arXiv 2311.08105), the same as
    torch.optim.SGD(nesterov=True): a constant g moves θ by η/(1−μ) in the long run. 8 bytes a parameter."""

    name = "nesterov"

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        eta, mu = settings.outer_learning_rate, settings.momentum
        return Coefficients(decay=mu, intake=1.0, gain=eta, pull=eta * mu)


class Lookahead(OuterRule):
    """m ← μm + (1−μ)g; θ ← θ − η(g + μm). Momentum look-ahead, with an averaged momentum (Ajanthan et al. 2025): a
    constant g moves θ by η(1+μ) in the long run, so η need not shrink with small steps. 8 bytes a parameter."""

    name = "lookahead"

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        eta, mu = settings.outer_learning_rate, settings.momentum
        return Coefficients(decay=mu, intake=1.0 - mu, gain=eta, pull=eta * mu)


class DelayedNesterov(OuterRule):
    """Momentum that is used once in a turn of N steps, N being the number of workers: with a step for each push it is
    what `nesterov` is with a step for each round (Liu et al. 2024, arXiv 2401.09135, algorithm 3 with c = 0).

    The sum of a turn's deltas is gathered in m itself, for m is not looked at before the turn ends: the first step of a
    turn lets it decay, each adds to it, the last is pulled by it. g is the push's share of a round's mean already,
    Δ/N in the paper. Merges of whole rounds are turns of one step. 8 bytes a parameter.
    """

    name = "delayed-nesterov"

    def coefficients(self, state: State, settings: RunSettings) -> Coefficients:
        return _in_turns(state, settings, settings.outer_learning_rate, settings.momentum)


def _in_turns(state: State, settings: RunSettings, eta: float, mu: float) -> Coefficients:
    """Nesterov's, once in as many steps as make a round."""
    turn = _steps_per_round(state, settings)
    is_first, is_last = state.version % turn == 0, (state.version + 1) % turn == 0
    return Coefficients(decay=mu if is_first else 1.0, intake=1.0, gain=eta, pull=eta * mu if is_last else 0.0)


def _steps_per_round(state: State, settings: RunSettings) -> int:
    return max(1, len(state.active)) if settings.merge == "per-push" else 1


RULES: dict[str, OuterRule] = {rule.name: rule for rule in (Auto(), Nesterov(), Lookahead(), DelayedNesterov(), Sgd())}

"""Who measures which publish, and which of those that were measured is the best.

Called by core/server.py, which writes down what comes of it. One worker at a time measures the newest publish, whenever
another `every` of the run is trained, and the last one. It is the fastest, and then the same one each time while it is
there and not much slower than another, so that the figures of a run are of one device and dtype and can be compared; if
it leaves before it has answered, another one measures the next publish. Nobody waits for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hetero_async.core import ranges
from hetero_async.core.members import Presences
from hetero_async.core.messages import MetricReport
from hetero_async.core.records import Evaluated, Evaluation, Metric
from hetero_async.core.state import State

# Names of figures in a run: each is kept for good, in every checkpoint.
METRICS_MAX = 256
# A worker whose speed is below this share of the fastest one's does not go on measuring: it began when nobody else was
# there, or nobody's speed was known.
SLOW = 0.5


@dataclass(frozen=True, slots=True)
class KeepBest:
    """The figure that says which publish is the best one; none where `name` is empty."""

    name: str = ""
    is_max: bool = False

    def is_better(self, state: State, value: float) -> bool:
        if state.best is None or state.best.name != self.name:
            return True
        return value > state.best.value if self.is_max else value < state.best.value


def handed_out(state: State, presences: Presences) -> Evaluation | None:
    """The evaluation that is due, if one is and somebody can do it."""
    every = {worker: presences.evaluates_every(worker) for worker in state.active}
    able = [worker for worker in state.active if every[worker] > 0]
    if not able or not _is_due(state, min(every[worker] for worker in able)):
        return None

    fastest = max(presences.rate(worker) for worker in able)

    def fitness(worker: str) -> tuple[bool, bool, float, str]:
        rate = presences.rate(worker)
        stays = worker == state.evaluator and rate >= SLOW * fastest
        return worker != state.forsaken_by, stays, rate, worker

    return Evaluation(worker=max(able, key=fitness), publish=state.publish)


def _is_due(state: State, every: float) -> bool:
    if state.publish == state.evaluated_publish:
        return False
    if state.evaluation is not None:
        # The last one matters most, so it does not wait for the one before.
        return state.is_finished and state.evaluation.publish != state.publish
    interval = every * state.ledger.positions
    trained = ranges.size(state.ledger.trained)
    return state.is_finished or (trained > 0 and trained // interval > state.evaluated_at // interval)


def recorded(state: State, worker: str, report: MetricReport, keep_best: KeepBest) -> Iterator[Metric | Evaluated]:
    """What is recorded of a worker's figures, to be folded one by one.

    What ends an evaluation comes last: after a crash in between the figures are said again.
    """
    given = state.evaluation if report.is_evaluation else None
    is_awaited = given is not None and given.worker == worker
    if report.is_evaluation and not is_awaited and report.publish <= state.evaluated_publish:
        return  # said twice
    version = state.publish_versions.get(report.publish, state.version)
    for name, value in report.figures:
        if name in state.metrics or len(state.metrics) < METRICS_MAX:
            yield Metric(worker=worker, name=name, value=value, version=version)
    if given is None or not is_awaited or report.publish < given.publish:
        return
    decisive = dict(report.figures).get(keep_best.name)
    if report.publish == given.publish and decisive is not None and keep_best.is_better(state, decisive):
        yield Evaluated(worker=worker, publish=given.publish, name=keep_best.name, value=decisive)
    else:
        yield Evaluated(worker=worker, publish=given.publish)

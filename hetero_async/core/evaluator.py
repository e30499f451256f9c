"""The worker's half of an evaluation: what it was asked to measure, and what came of the newest.

An answer may be lost on its way, so the server asks until it has one; the same question is then answered from here.
"""

from hetero_async.core.messages import MetricReport
from hetero_async.core.worker_events import Evaluated

NOTHING = Evaluated(publish=0, figures=())


class Evaluator:
    def __init__(self) -> None:
        self.due = 0  # the publish to be measured, or a later one; 0: none
        self._taken = 0  # what the training loop was given as due
        self._done = NOTHING
        self._common = 0

    def joined(self, common: int) -> None:
        """A server that shares with those before it the publishes up to `common`: later ones are other ones there."""
        self._common, self.due = common, 0
        if self._taken > common:
            self._taken = 0
        if self._done.publish > common:
            self._done = NOTHING

    def asked(self, publish: int) -> Evaluated | None:
        """To measure that one; 0: none. What is to be said again, if it was measured."""
        if publish > max(self._taken, self._done.publish):
            self.due = publish
        return self._done if 0 < publish <= self._done.publish else None

    def last_words(self, incarnation: int) -> list[MetricReport]:
        """For a worker that leaves, and whom the server cannot ask again."""
        return [report_of(self._done, incarnation, True)] if self._done is not NOTHING else []

    def taken(self) -> None:
        """The training loop has it."""
        self._taken, self.due = self.due, 0

    def evaluated(self, done: Evaluated, term: int) -> Evaluated | None:
        """What to say of it, to the server of that term."""
        if done.term < term and done.publish > self._common:
            self._taken = 0
            return None
        self._done = done
        return done


def report_of(told: Evaluated, incarnation: int, is_evaluation: bool) -> MetricReport:
    return MetricReport(
        incarnation=incarnation, figures=told.figures, publish=told.publish, is_evaluation=is_evaluation
    )

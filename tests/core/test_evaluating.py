"""Who measures which publish, and which is the best: one worker at a time, the last publish too, nobody held up."""

from dataclasses import replace

import pytest
from core.test_server import Bench, told_to

from hetero_async.core import ranges
from hetero_async.core.evaluating import METRICS_MAX, KeepBest
from hetero_async.core.evaluator import Evaluator
from hetero_async.core.messages import Beat, Heartbeat, Message, MetricReport, PublishReady
from hetero_async.core.records import Evaluated, Evaluation, Metric
from hetero_async.core.server import Server
from hetero_async.core.state import State
from hetero_async.core.worker_events import Evaluated as Done

EVERY = 0.25


class Measured(Bench):
    """Two workers, of which b is the faster, train 16 of 64 samples in each version, and both can evaluate."""

    def __init__(self, *, every: float = EVERY, keep_best: KeepBest = KeepBest("loss")) -> None:  # noqa: B008, frozen
        super().__init__(merge="all", norm_gate=0.0)
        self.every = every
        self.rates = {"a": 1.0, "b": 2.0}
        self.server = Server(self.server.settings, State(), keep_best=keep_best)
        self.begin("a", "b")

    def beat(self, worker: str, rate: float = 0.0) -> list[tuple[str, Message]]:
        member = self.server.state.members[worker]
        return self.say(
            worker,
            Heartbeat(
                incarnation=member.incarnation, state="training", steps=1, steps_per_second=self.rates.get(worker, 1.0),
                publish=0, bytes_up=0, bytes_down=0, evaluates_every=self.every,
            ),
        )  # fmt: skip

    def version(self) -> list[tuple[str, Message]]:
        told: list[tuple[str, Message]] = []
        ledger = self.server.state.ledger
        for worker in self.server.state.active:
            self.lease(worker, 8)
            while ranges.size(ledger.held(worker)) < 8 and ledger.room:  # near the end a lease is less
                self.lease(worker, 8 - ranges.size(ledger.held(worker)))
        for worker in self.server.state.active:
            told += self.push(worker, anchor=self.server.state.publish)
        return told

    def report(self, worker: str, publish: int, *figures: tuple[str, float]) -> None:
        incarnation = self.server.state.members[worker].incarnation
        report = MetricReport(incarnation=incarnation, publish=publish, figures=figures, is_evaluation=True)
        self.say(worker, report)

    @property
    def handed_out(self) -> list[tuple[str, int]]:
        return [(given.worker, given.publish) for given in self.records(Evaluation)]


def test_the_fastest_worker_measures_and_it_alone_is_told() -> None:
    bench = Measured()
    told = bench.version()
    assert bench.handed_out == [("b", 1)]
    assert told_to("b", PublishReady, told) == [PublishReady(number=1, version=1, evaluate=True)]
    assert told_to("a", PublishReady, told) == [PublishReady(number=1, version=1)]
    assert [beat.evaluate for worker in "ab" for beat in told_to(worker, Beat, bench.beat(worker))] == [0, 1]


def test_nothing_is_measured_before_so_much_is_trained_and_nothing_twice() -> None:
    bench = Measured(every=0.5)
    bench.version()
    assert bench.handed_out == []
    bench.version()
    assert bench.handed_out == [("b", 2)]
    bench.report("b", 2, ("loss", 3.0))
    bench.report("b", 2, ("loss", 3.0))  # said again
    assert bench.records(Metric) == [Metric(worker="b", name="loss", value=3.0, version=2)]
    bench.version()
    assert bench.handed_out == [("b", 2)]


def test_while_one_measures_nobody_else_does_until_the_last_publish() -> None:
    bench = Measured()
    for _ in range(3):
        bench.version()
    assert bench.handed_out == [("b", 1)]
    bench.version()
    assert bench.server.state.is_finished
    assert bench.handed_out == [("b", 1), ("b", 4)], "which does not wait for the one before"
    bench.report("b", 1, ("loss", 3.0))
    assert bench.records(Evaluated) == [] and bench.records(Metric)[0].version == 1
    bench.report("b", 4, ("loss", 2.0))
    assert bench.records(Evaluated) == [Evaluated(worker="b", publish=4, name="loss", value=2.0)]


def test_when_it_leaves_another_measures_the_next_publish_and_goes_on_doing_so() -> None:
    bench = Measured(every=0.25)
    bench.version()
    for _ in range(60):  # a is heard, b is not
        bench.now_ms += 100
        bench.beat("a")
    assert bench.server.state.active == ["a"]
    assert bench.handed_out == [("b", 1), ("a", 1)], "what was not measured is due still"
    bench.report("a", 1, ("loss", 3.0))
    bench.say("b", replace_life(b"second"))
    bench.beat("b")
    bench.version()
    assert bench.handed_out[2:] == [("a", 2)], "though b is faster: figures of one device can be compared"


def test_one_that_measures_because_nobody_else_was_there_gives_way_to_a_much_faster_one() -> None:
    bench = Measured(every=0.25)
    bench.rates = {"b": 0.0}
    bench.beat("b")
    bench.version()
    assert bench.handed_out == [("a", 1)], "b has not said yet how fast it is"
    bench.report("a", 1, ("loss", 3.0))
    bench.rates = {"b": 2.1}
    bench.beat("b")
    bench.version()
    assert bench.handed_out[1:] == [("b", 2)]


def replace_life(life: bytes) -> Message:
    from core.test_server import HELLO

    return replace(HELLO, life=life)


@pytest.mark.parametrize(
    ("is_max", "values", "best"), [(False, [3.0, 2.0, 2.5], [3.0, 2.0]), (True, [3.0, 2.0, 3.5], [3.0, 3.5])]
)
def test_the_best_is_the_first_and_then_whatever_is_better(
    is_max: bool, values: list[float], best: list[float]
) -> None:
    bench = Measured(keep_best=KeepBest("loss", is_max))
    for publish, value in enumerate(values, 1):
        bench.version()
        bench.report("b", publish, ("other", 0.0), ("loss", value))
    assert [done.value for done in bench.records(Evaluated) if done.name] == best
    assert bench.server.state.best is not None
    assert bench.server.state.best.value == best[-1]
    assert bench.server.state.best.version == values.index(best[-1]) + 1


def test_figures_of_a_later_publish_count_and_cannot_be_the_best() -> None:
    """The worker had gone on by the time that it was asked: nobody has the parameters that it measured."""
    bench = Measured()
    bench.version()
    bench.version()
    bench.report("b", 2, ("loss", 0.5))
    assert bench.records(Metric) == [Metric(worker="b", name="loss", value=0.5, version=2)]
    assert bench.records(Evaluated) == [Evaluated(worker="b", publish=1)]
    assert bench.server.state.best is None


def test_figures_of_another_name_than_last_time_are_no_worse_for_it() -> None:
    bench = Measured(keep_best=KeepBest("accuracy"))
    bench.version()
    bench.report("b", 1, ("accuracy", 0.1))
    bench.server = Server(bench.server.settings, bench.server.state, keep_best=KeepBest("loss"))
    for worker in "ab":
        bench.say(worker, replace_life(b"second"))
        bench.beat(worker)
    bench.version()
    bench.report("b", 2, ("loss", 7.0))
    assert bench.server.state.best is not None
    assert bench.server.state.best.name == "loss"


def test_names_of_figures_are_bounded() -> None:
    bench = Measured()
    bench.version()
    bench.report("b", 1, *((f"figure {number}", 0.0) for number in range(METRICS_MAX + 5)))
    assert len(bench.server.state.metrics) == METRICS_MAX


def test_a_worker_is_given_it_once_and_says_what_came_of_it_as_often_as_it_is_asked() -> None:
    evaluator = Evaluator()
    assert evaluator.asked(3) is None and evaluator.due == 3
    evaluator.taken()
    assert evaluator.asked(3) is None and evaluator.due == 0, "it is at work on it"
    done = Done(publish=4, term=1, figures=(("loss", 1.0),))
    assert evaluator.evaluated(done, term=1) == done
    assert evaluator.asked(3) == done and evaluator.due == 0
    assert evaluator.asked(5) is None and evaluator.due == 5


def test_after_a_takeover_the_same_number_may_be_another_publish() -> None:
    evaluator = Evaluator()
    evaluator.asked(3)
    evaluator.taken()
    evaluator.joined(common=2)
    assert evaluator.evaluated(Done(publish=3, term=1, figures=()), term=2) is None
    assert evaluator.asked(3) is None and evaluator.due == 3
    evaluator.taken()
    evaluator.evaluated(Done(publish=3, term=2, figures=()), term=2)
    evaluator.joined(common=2)
    assert evaluator.asked(3) is None and evaluator.due == 3, "what was measured of the old one is no answer"
